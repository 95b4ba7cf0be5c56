//! The I/O budget: a token bucket in bytes, without a clock of its own.

use std::time::Duration;

/// Bytes per second that all merges of a repository share.
#[derive(Debug, Clone)]
pub struct Budget {
    /// 0 is no limit.
    rate_bytes_per_s: u64,
    /// Bytes that may be taken at once; negative while a large take is paid
    /// off.
    level: i128,
    /// When `level` was right.
    at: Duration,
}

impl Budget {
    /// A full bucket of one second's worth.
    #[must_use]
    pub fn new(rate_bytes_per_s: u64, now: Duration) -> Self {
        Self { rate_bytes_per_s, level: i128::from(rate_bytes_per_s), at: now }
    }

    /// The present rate; 0 is no limit.
    #[must_use]
    pub fn rate(&self) -> u64 {
        self.rate_bytes_per_s
    }

    /// Changes the rate from now on.
    pub fn set_rate(&mut self, rate_bytes_per_s: u64, now: Duration) {
        self.refill(now);
        self.rate_bytes_per_s = rate_bytes_per_s;
        self.level = self.level.min(i128::from(rate_bytes_per_s));
    }

    /// Takes `bytes` and tells how long to wait before using them. What is
    /// larger than the bucket is lent and paid off by the wait, so no window
    /// is too large to ever pass.
    pub fn take(&mut self, bytes: u64, now: Duration) -> Duration {
        if self.rate_bytes_per_s == 0 {
            return Duration::ZERO;
        }
        self.refill(now);
        self.level -= i128::from(bytes);
        let lent = u128::try_from(-self.level).unwrap_or(0);
        let wait_us = lent * 1_000_000 / u128::from(self.rate_bytes_per_s);
        Duration::from_micros(u64::try_from(wait_us).unwrap_or(u64::MAX))
    }

    fn refill(&mut self, now: Duration) {
        let passed_us = i128::try_from(now.saturating_sub(self.at).as_micros()).unwrap_or(0);
        let rate = i128::from(self.rate_bytes_per_s);
        self.level = (self.level + passed_us * rate / 1_000_000).min(rate);
        self.at = self.at.max(now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: Duration = Duration::from_secs(1);

    #[test]
    fn without_a_rate_nothing_waits() {
        let mut budget = Budget::new(0, S);
        assert_eq!(budget.take(u64::MAX, S), Duration::ZERO);
    }

    #[test]
    fn a_second_may_be_used_at_once_and_more_is_paid_off() {
        let mut budget = Budget::new(1000, S);
        assert_eq!(budget.take(1000, S), Duration::ZERO);
        assert_eq!(budget.take(500, S), S / 2);
        assert_eq!(budget.take(500, S), S);
        // Paid off after one second, and half a bucket half a second later.
        assert_eq!(budget.take(500, S * 5 / 2), Duration::ZERO);
        assert_eq!(budget.take(1, S * 5 / 2), S / 1000);
    }

    #[test]
    fn the_rate_holds_over_any_windows() {
        for window in [1, 77, 1000, 123_456] {
            let mut budget = Budget::new(10_000, S);
            let mut now = S;
            let mut taken = 0;
            while now < S * 61 {
                taken += window;
                now += budget.take(window, now).max(Duration::from_micros(100));
            }
            assert!(taken <= 10_000 * 61 + window, "{window}: {taken}");
        }
    }

    #[test]
    fn a_clock_that_steps_back_gives_nothing() {
        let mut budget = Budget::new(1000, S * 10);
        assert_eq!(budget.take(2000, S * 10), S);
        assert_eq!(budget.take(0, S), S);
    }
}
