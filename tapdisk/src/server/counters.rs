//! What is counted of guest requests.

use tapdisk_control::{KindStats, Stats};

use crate::engine::RequestKind;

/// Counters since the start.
#[derive(Debug, Clone, Default)]
pub struct Counters {
    read: KindStats,
    write: KindStats,
    flush: KindStats,
    trim: KindStats,
    write_zeroes: KindStats,
    block_status: KindStats,
    cache: KindStats,
    in_flight_max: u64,
}

impl Counters {
    /// So many requests are in flight.
    pub fn in_flight(&mut self, requests: usize) {
        self.in_flight_max = self.in_flight_max.max(requests as u64);
    }

    /// A request of `bytes` was answered `took_us` after it came.
    pub fn answered(&mut self, kind: RequestKind, bytes: u64, took_us: u64, failed: bool) {
        let of_kind = match kind {
            RequestKind::Read => &mut self.read,
            RequestKind::Write { .. } => &mut self.write,
            RequestKind::Flush => &mut self.flush,
            RequestKind::Trim { .. } => &mut self.trim,
            RequestKind::WriteZeroes { .. } => &mut self.write_zeroes,
            RequestKind::BlockStatus => &mut self.block_status,
            RequestKind::Cache => &mut self.cache,
        };
        of_kind.count += 1;
        of_kind.bytes = of_kind.bytes.saturating_add(bytes);
        of_kind.errors += u64::from(failed);
        of_kind.total_us = of_kind.total_us.saturating_add(took_us);
        of_kind.longest_us = of_kind.longest_us.max(took_us);
        of_kind.latency.record(took_us);
    }

    /// The statistics as far as the server knows them.
    pub fn stats(&self, clients: u64) -> Stats {
        Stats {
            clients,
            in_flight_max: self.in_flight_max,
            read: self.read.clone(),
            write: self.write.clone(),
            flush: self.flush.clone(),
            trim: self.trim.clone(),
            write_zeroes: self.write_zeroes.clone(),
            block_status: self.block_status.clone(),
            cache: self.cache.clone(),
            ..Stats::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_answer_is_counted_with_its_kind() {
        let mut counters = Counters::default();
        for took_us in [0, 1, 2, 3, 4, u64::MAX] {
            counters.answered(RequestKind::Read, 512, took_us, took_us == 4);
        }
        counters.answered(RequestKind::Trim { fua: false }, 1024, 7, false);
        counters.in_flight(5);
        counters.in_flight(2);
        let stats = counters.stats(3);
        assert_eq!((stats.clients, stats.in_flight_max), (3, 5));
        assert_eq!((stats.read.count, stats.read.bytes, stats.read.errors), (6, 3072, 1));
        assert_eq!(stats.read.longest_us, u64::MAX);
        assert_eq!(stats.read.latency.count(), 6);
        assert_eq!(stats.read.latency.at_most_us(1, 2), 2);
        assert_eq!((stats.trim.count, stats.trim.total_us, stats.write_zeroes.count), (1, 7, 0));
    }
}
