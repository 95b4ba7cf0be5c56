//! Whether to wait for the disk awake or asleep.
//!
//! A client with a deep queue and a disk that answers in batches can fall
//! into step: all requests are at the disk, or here, or at the client, and
//! two of the three always wait for the third. The scheduler keeps it so,
//! since who is woken by a message often lands on the sender's processor and
//! starts when the sender sleeps. A server that stays awake for a moment
//! breaks the step, at the price of processor time; so it does so only for a
//! spell after it saw that step: a queue that was deep and ran dry at once. Nor
//! does it when it waits in vain: a disk that is slow, or writes that threads of
//! the kernel carry out and need the processor for.

use std::time::{Duration, Instant};

use crate::limits::{POLL_DEPTH_MIN, POLL_SPELL, POLL_TIME_MAX, POLL_VAIN_MAX};

/// See the module.
#[derive(Debug, Default)]
pub struct Patience {
    /// Most transfers in flight since there were none.
    deepest: usize,
    awake_until: Option<Instant>,
    /// Waits in a row that brought nothing.
    vain: u32,
}

impl Patience {
    /// How long to stay awake for the next completion, if at all.
    pub fn before_wait(&mut self, in_flight: usize, now: Instant) -> Option<Duration> {
        self.deepest = self.deepest.max(in_flight);
        let awake = in_flight > 0 && self.awake_until.is_some_and(|until| now < until);
        awake.then_some(POLL_TIME_MAX)
    }

    /// What became of such a wait.
    pub fn waited(&mut self, arrived: bool) {
        self.vain = if arrived { 0 } else { self.vain + 1 };
        if self.vain >= POLL_VAIN_MAX {
            (self.awake_until, self.vain) = (None, 0);
        }
    }

    /// All that had ended was taken; so much is left in flight.
    pub fn after_wait(&mut self, in_flight: usize, now: impl FnOnce() -> Instant) {
        if in_flight == 0 && std::mem::take(&mut self.deepest) >= POLL_DEPTH_MIN {
            self.awake_until = Some(now() + POLL_SPELL);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A queue of this depth is handed in and comes back whole.
    fn runs_dry(patience: &mut Patience, depth: usize, now: Instant) {
        patience.before_wait(depth, now);
        patience.after_wait(depth / 2, || now);
        patience.before_wait(depth / 2, now);
        patience.after_wait(0, || now);
    }

    #[test]
    fn a_deep_queue_that_runs_dry_is_waited_for_awake_for_a_spell() {
        let (mut patience, now) = (Patience::default(), Instant::now());
        assert_eq!(patience.before_wait(POLL_DEPTH_MIN, now), None);
        runs_dry(&mut patience, POLL_DEPTH_MIN, now);
        assert_eq!(patience.before_wait(1, now), Some(POLL_TIME_MAX));
        assert_eq!(patience.before_wait(1, now + POLL_SPELL), None);
    }

    #[test]
    fn nobody_stays_awake_for_a_shallow_queue_or_none() {
        let (mut patience, now) = (Patience::default(), Instant::now());
        runs_dry(&mut patience, POLL_DEPTH_MIN - 1, now);
        assert_eq!(patience.before_wait(1, now), None);
        runs_dry(&mut patience, POLL_DEPTH_MIN, now);
        assert_eq!(patience.before_wait(0, now), None);
    }

    #[test]
    fn waits_in_vain_end_the_spell() {
        let (mut patience, now) = (Patience::default(), Instant::now());
        runs_dry(&mut patience, POLL_DEPTH_MIN, now);
        for _ in 1..POLL_VAIN_MAX {
            patience.waited(false);
        }
        patience.waited(true);
        for _ in 0..POLL_VAIN_MAX {
            assert_eq!(patience.before_wait(1, now), Some(POLL_TIME_MAX));
            patience.waited(false);
        }
        assert_eq!(patience.before_wait(1, now), None);
        runs_dry(&mut patience, POLL_DEPTH_MIN, now);
        assert_eq!(patience.before_wait(1, now), Some(POLL_TIME_MAX));
    }

    #[test]
    fn a_queue_that_never_runs_dry_needs_nobody_awake() {
        let (mut patience, now) = (Patience::default(), Instant::now());
        for _ in 0..1000 {
            assert_eq!(patience.before_wait(POLL_DEPTH_MIN * 2, now), None);
            patience.after_wait(1, || now);
        }
    }
}
