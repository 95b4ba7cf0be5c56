//! What a tapdisk counts.

use serde::{Deserialize, Serialize};

use crate::ImageRef;

/// Counters of one tapdisk since its start, and its state now.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Stats {
    /// The leaf.
    pub leaf: Option<ImageRef>,
    /// Volumes of the chain, leaf first.
    pub chain: Vec<ImageRef>,
    /// Levels of the chain: 1 is a leaf without a parent.
    pub depth: u64,
    /// Virtual size in bytes.
    pub virtual_bytes: u64,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Connected NBD clients.
    pub clients: u64,
    /// The depth of the queue now: guest requests not answered yet.
    pub in_flight: u64,
    /// The deepest the queue ever was.
    pub in_flight_max: u64,
    /// Of those in flight, requests held back by a pause or a drain.
    pub held: u64,
    /// Operations on volumes in flight, those for metadata and for merges
    /// included.
    pub operations: u64,
    /// Per kind: reads.
    pub read: KindStats,
    /// Per kind: writes.
    pub write: KindStats,
    /// Per kind: flushes.
    pub flush: KindStats,
    /// Per kind: trims.
    pub trim: KindStats,
    /// Per kind: writes of zeros.
    pub write_zeroes: KindStats,
    /// Per kind: questions about what a range is made of.
    pub block_status: KindStats,
    /// Per kind: hints that a range will be read.
    pub cache: KindStats,
    /// The cache of owners.
    pub owners: CacheStats,
    /// Guest memory in use, in bytes.
    pub buffer_bytes: u64,
    /// Blocks the leaf holds.
    pub leaf_blocks: u64,
    /// Entries waiting in the pending record.
    pub record_entries: u64,
    /// How long guest requests were held at the last pause or drain, from its
    /// beginning to its end, in microseconds.
    pub last_pause_us: u64,
    /// The longest of these.
    pub longest_pause_us: u64,
    /// `running`, `draining`, `paused`, `stuck: …` (a decided swap fails) or
    /// `failed: …`.
    pub state: String,
}

/// Counters of one kind of request.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct KindStats {
    /// Requests answered.
    pub count: u64,
    /// Bytes asked for.
    pub bytes: u64,
    /// Answered with an error.
    pub errors: u64,
    /// Sum of the times from arrival to answer, in microseconds.
    pub total_us: u64,
    /// Longest of them, in microseconds.
    pub longest_us: u64,
    /// How these times are spread.
    pub latency: Histogram,
}

/// The cache that knows, for blocks no level has whole, who owns which
/// sectors.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct CacheStats {
    /// Blocks in it.
    pub blocks: u64,
    /// Runs of sectors in it.
    pub runs: u64,
    /// Memory they take, in bytes.
    pub bytes: u64,
    /// The limit of that.
    pub bytes_max: u64,
    /// Lookups that found their block.
    pub hits: u64,
    /// Lookups for which bitmaps had to be read.
    pub misses: u64,
}

/// Buckets per doubling, as a power of two: a bucket is at most an eighth
/// wider than its start.
const FINE_BITS: u32 = 3;
const FINE: u64 = 1 << FINE_BITS;
/// Buckets: the last one also takes all from about an hour on.
const BUCKETS: usize = 240;

/// How often which time was seen, in microseconds. Times below 8 each have
/// their own bucket; from there on every doubling is parted into 8. Buckets
/// after the last one in use are left out.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Histogram {
    counts: Vec<u64>,
}

impl Histogram {
    /// Counts a time.
    pub fn record(&mut self, time_us: u64) {
        let bucket = bucket_of(time_us);
        if self.counts.len() <= bucket {
            self.counts.resize(bucket + 1, 0);
        }
        if let Some(count) = self.counts.get_mut(bucket) {
            *count += 1;
        }
    }

    /// Times counted.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// Times counted that are shorter than `bound_us`, a power of two of at
    /// least 8: only those are bounds of buckets.
    #[must_use]
    pub fn count_below_us(&self, bound_us: u64) -> u64 {
        self.counts.iter().take(bucket_of(bound_us)).sum()
    }

    /// The time in microseconds, to an eighth, that `part` in `of` of all
    /// times do not exceed: `at_most_us(99, 100)` is the 99th percentile. 0
    /// when nothing was counted.
    #[must_use]
    pub fn at_most_us(&self, part: u64, of: u64) -> u64 {
        let wanted = u128::from(self.count()) * u128::from(part);
        let mut seen = 0;
        for (bucket, count) in self.counts.iter().enumerate() {
            seen += u128::from(*count);
            if *count > 0 && seen * u128::from(of.max(1)) >= wanted {
                return last_of(bucket);
            }
        }
        0
    }
}

fn bucket_of(time_us: u64) -> usize {
    if time_us < FINE {
        return time_us as usize;
    }
    let octave = time_us.ilog2() - FINE_BITS;
    let within = (time_us >> octave) - FINE;
    let bucket = (u64::from(octave) + 1) * FINE + within;
    usize::try_from(bucket).unwrap_or(BUCKETS).min(BUCKETS - 1)
}

/// The longest time of a bucket.
fn last_of(bucket: usize) -> u64 {
    let bucket = bucket as u64;
    if bucket < FINE {
        return bucket;
    }
    let octave = bucket / FINE - 1;
    ((bucket % FINE + FINE + 1) << octave) - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_follow_each_other_without_gap_and_are_narrow() {
        let mut last = 0;
        for bucket in 1..BUCKETS - 1 {
            let next = last_of(bucket);
            assert_eq!(bucket_of(last + 1), bucket);
            assert_eq!(bucket_of(next), bucket);
            assert!(next - last <= last / 8 + 1, "{bucket}");
            last = next;
        }
        assert!(last > 3_600_000_000 / 2);
        assert_eq!(bucket_of(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn percentiles_are_found_to_an_eighth() {
        let mut histogram = Histogram::default();
        assert_eq!(histogram.at_most_us(99, 100), 0);
        for time_us in 1..=1000 {
            histogram.record(time_us);
        }
        for (part, of, exact) in [(1, 2, 500), (99, 100, 990), (999, 1000, 999), (0, 1, 1), (1, 1, 1000)] {
            let found = histogram.at_most_us(part, of);
            assert!(found >= exact && found <= exact + exact / 8 + 1, "{part}/{of}: {found}");
        }
        assert_eq!(histogram.count(), 1000);
        for (bound, below) in [(8, 7), (16, 15), (512, 511), (1024, 1000)] {
            assert_eq!(histogram.count_below_us(bound), below);
        }
    }

    #[test]
    fn statistics_of_another_version_are_understood() {
        let stats: Stats = serde_json::from_str(r#"{"clients": 3, "no_such": 1, "read": {}}"#).unwrap();
        assert_eq!(stats.clients, 3);
    }
}
