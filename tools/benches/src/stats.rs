//! Figures from samples: medians, percentiles, ratios. Pure.

use std::time::Duration;

/// Buckets per power of two: a percentile is off by less than 1/64.
const BUCKETS_PER_OCTAVE: u64 = 64;
/// Powers of two of nanoseconds told apart: up to 18 minutes.
const OCTAVES: usize = 40;

/// The middle of `values`, or of the two in the middle; `None` without any.
#[must_use]
pub fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => None,
        n if n % 2 == 1 => Some(sorted[middle]),
        _ => Some(f64::midpoint(sorted[middle - 1], sorted[middle])),
    }
}

/// The median of what each round of `ours` is to the same round of `peer`.
/// Rounds are run side by side, so a disturbance that lasts a round or longer
/// hits both and cancels out, which a ratio of two medians would not do.
#[must_use]
pub fn paired_ratio(ours: &[f64], peer: &[f64]) -> Option<f64> {
    let ratios: Vec<f64> = ours.iter().zip(peer).filter(|(_, p)| **p > 0.0).map(|(o, p)| o / p).collect();
    median(&ratios)
}

/// The value that `share` (0 to 1) of `values` do not exceed.
#[must_use]
pub fn percentile(values: &[f64], share: f64) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (share * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.max(1) - 1).copied()
}

/// A histogram of latencies that takes the same room for a thousand and for
/// a thousand million of them.
#[derive(Debug, Clone)]
pub struct Latencies {
    buckets: Vec<u64>,
    count: u64,
    longest_ns: u64,
}

impl Default for Latencies {
    fn default() -> Self {
        Self { buckets: vec![0; OCTAVES * BUCKETS_PER_OCTAVE as usize], count: 0, longest_ns: 0 }
    }
}

impl Latencies {
    /// Adds one.
    pub fn record(&mut self, latency: Duration) {
        let ns = u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX);
        let at = bucket_of(ns).min(self.buckets.len() - 1);
        self.buckets[at] += 1;
        self.count += 1;
        self.longest_ns = self.longest_ns.max(ns);
    }

    /// How many were added.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count
    }

    /// What `share` (0 to 1) of them did not exceed, in microseconds; 0 when
    /// there are none.
    #[must_use]
    pub fn percentile_us(&self, share: f64) -> f64 {
        let rank = ((share * self.count as f64).ceil() as u64).max(1);
        let mut seen = 0;
        for (at, n) in self.buckets.iter().enumerate() {
            seen += n;
            if seen >= rank {
                return (upper_bound(at).min(self.longest_ns)) as f64 / 1e3;
            }
        }
        0.0
    }
}

/// Linear below one octave's worth of buckets, then [`BUCKETS_PER_OCTAVE`]
/// per power of two.
fn bucket_of(ns: u64) -> usize {
    if ns < BUCKETS_PER_OCTAVE {
        return ns as usize;
    }
    let shift = ns.ilog2() - BUCKETS_PER_OCTAVE.ilog2();
    (u64::from(shift) * BUCKETS_PER_OCTAVE + (ns >> shift)) as usize
}

/// The largest value that falls into bucket `at`.
fn upper_bound(at: usize) -> u64 {
    let at = at as u64;
    if at < 2 * BUCKETS_PER_OCTAVE {
        return at;
    }
    let shift = at / BUCKETS_PER_OCTAVE - 1;
    let mantissa = at - shift * BUCKETS_PER_OCTAVE;
    ((mantissa + 1) << shift) - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_of_odd_even_and_none() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), Some(2.5));
        assert_eq!(median(&[]), None);
    }

    #[test]
    fn a_slow_round_of_both_does_not_move_the_ratio() {
        let ours = [10.0, 1.0, 10.0];
        let peer = [5.0, 0.5, 5.0];
        assert_eq!(paired_ratio(&ours, &peer), Some(2.0));
        assert_eq!(paired_ratio(&[1.0], &[0.0]), None);
    }

    #[test]
    fn percentiles_of_few_values() {
        let values: Vec<f64> = (1..=100).map(f64::from).collect();
        assert_eq!(percentile(&values, 0.99), Some(99.0));
        assert_eq!(percentile(&values, 1.0), Some(100.0));
        assert_eq!(percentile(&[7.0], 0.5), Some(7.0));
        assert_eq!(percentile(&[], 0.5), None);
    }

    #[test]
    fn buckets_are_in_order_and_hold_what_falls_into_them() {
        for ns in (0..5000).chain((0..50).map(|n| 1 << n.min(45))) {
            let at = bucket_of(ns);
            assert!(upper_bound(at) >= ns, "{ns}");
            assert!(at == 0 || upper_bound(at - 1) < ns, "{ns}");
            assert!(upper_bound(at) as f64 <= ns as f64 * (1.0 + 1.0 / 64.0), "{ns}");
        }
    }

    #[test]
    fn a_histogram_agrees_with_sorting() {
        let mut histogram = Latencies::default();
        let values: Vec<u64> = (0..10_000).map(|n| n * n % 1_000_003).collect();
        for ns in &values {
            histogram.record(Duration::from_nanos(*ns));
        }
        let exact: Vec<f64> = values.iter().map(|ns| *ns as f64 / 1e3).collect();
        for share in [0.5, 0.99, 0.999] {
            let want = percentile(&exact, share).unwrap();
            let got = histogram.percentile_us(share);
            assert!(got >= want && got <= want * 1.02, "{share}: {got} for {want}");
        }
        assert_eq!(histogram.count(), 10_000);
        assert_eq!(Latencies::default().percentile_us(0.99), 0.0);
    }
}
