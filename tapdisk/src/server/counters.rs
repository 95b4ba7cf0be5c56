//! What is counted of guest requests.

use tapdisk_control::{KindStats, Stats};

use crate::engine::RequestKind;

/// Buckets of a histogram: the last one also takes everything slower, from
/// about an hour on.
const BUCKETS: usize = 32;

/// Counters since the start.
#[derive(Debug, Clone, Default)]
pub struct Counters {
    read: KindStats,
    write: KindStats,
    flush: KindStats,
    discard: KindStats,
}

impl Counters {
    /// A request of `bytes` was answered `took_us` after it came.
    pub fn answered(&mut self, kind: RequestKind, bytes: u32, took_us: u64, failed: bool) {
        let of_kind = match kind {
            RequestKind::Read => &mut self.read,
            RequestKind::Write { .. } => &mut self.write,
            RequestKind::Flush => &mut self.flush,
            RequestKind::WriteZeroes { .. } | RequestKind::Trim { .. } => &mut self.discard,
            RequestKind::BlockStatus => return, // moves no data
        };
        of_kind.count += 1;
        of_kind.bytes += u64::from(bytes);
        of_kind.errors += u64::from(failed);
        of_kind.longest_us = of_kind.longest_us.max(took_us);
        let bucket = (took_us.max(1).ilog2() as usize).min(BUCKETS - 1);
        if of_kind.histogram_us.len() <= bucket {
            of_kind.histogram_us.resize(bucket + 1, 0);
        }
        if let Some(count) = of_kind.histogram_us.get_mut(bucket) {
            *count += 1;
        }
    }

    /// The statistics as far as the server knows them.
    pub fn stats(&self, clients: u64, in_flight: u64) -> Stats {
        Stats {
            clients,
            in_flight,
            read: self.read.clone(),
            write: self.write.clone(),
            flush: self.flush.clone(),
            discard: self.discard.clone(),
            ..Stats::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_answer_is_counted_in_its_bucket() {
        let mut counters = Counters::default();
        for took_us in [0, 1, 2, 3, 4, u64::MAX] {
            counters.answered(RequestKind::Read, 512, took_us, took_us == 4);
        }
        let read = counters.stats(3, 1).read;
        assert_eq!((read.count, read.bytes, read.errors), (6, 3072, 1));
        assert_eq!(read.longest_us, u64::MAX);
        assert_eq!(read.histogram_us[..3], [2, 2, 1]);
        assert_eq!(read.histogram_us.iter().sum::<u64>(), 6);
        assert_eq!(read.histogram_us.len(), BUCKETS);
    }
}
