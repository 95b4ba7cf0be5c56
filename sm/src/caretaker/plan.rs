//! When a tapdisk that died is started again. Pure: times come in as
//! milliseconds since any moment.
//!
//! ```text
//!             died                  due              started
//!   Served ---------> Down(n, due) -----> Starting -----------> Served
//!                        ^                   | failed              |
//!                        |                   v                     | died again
//!                        +---- n < most ---- ? ---- n = most ----> GivenUp
//!                        +<----- before it counted as steady ------+
//! ```

use crate::limits::{REVIVE_ATTEMPTS_MAX, REVIVE_STEADY_MS, REVIVE_WAIT_MS_FIRST, REVIVE_WAIT_MS_MAX};

/// What is done about one wanted VDI.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ward {
    /// Its tapdisk lives.
    Served {
        /// Since when.
        since_ms: u64,
        /// Attempts it took; counted on when it does not live long.
        attempts: u32,
    },
    /// It has no tapdisk; the next attempt is due at a time.
    Down {
        /// Attempts so far.
        attempts: u32,
        /// When to try.
        due_ms: u64,
    },
    /// An attempt is under way.
    Starting {
        /// Which.
        attempt: u32,
    },
    /// No more attempts: an operator has to attach it.
    GivenUp,
}

impl Ward {
    /// Its tapdisk was found dead.
    #[must_use]
    pub fn died(self, now_ms: u64) -> Self {
        let attempts = match self {
            Self::Served { since_ms, attempts } if now_ms.saturating_sub(since_ms) < REVIVE_STEADY_MS => {
                attempts
            }
            Self::Served { .. } => 0,
            Self::Down { .. } | Self::Starting { .. } | Self::GivenUp => return self,
        };
        Self::after(attempts, now_ms)
    }

    /// An attempt failed.
    #[must_use]
    pub fn failed(self, now_ms: u64) -> Self {
        match self {
            Self::Starting { attempt } => Self::after(attempt, now_ms),
            other => other,
        }
    }

    /// An attempt succeeded, or it was found alive.
    #[must_use]
    pub fn alive(self, now_ms: u64) -> Self {
        match self {
            Self::Served { .. } => self,
            Self::Starting { attempt } => Self::Served { since_ms: now_ms, attempts: attempt },
            Self::Down { .. } | Self::GivenUp => Self::Served { since_ms: now_ms, attempts: 0 },
        }
    }

    /// Begins an attempt if one is due.
    #[must_use]
    pub fn start(self, now_ms: u64) -> Option<Self> {
        match self {
            Self::Down { attempts, due_ms } if due_ms <= now_ms => {
                Some(Self::Starting { attempt: attempts + 1 })
            }
            _ => None,
        }
    }

    /// Attempts made in this row.
    #[must_use]
    pub fn attempts(self) -> u32 {
        match self {
            Self::Served { attempts, .. } | Self::Down { attempts, .. } => attempts,
            Self::Starting { attempt } => attempt,
            Self::GivenUp => REVIVE_ATTEMPTS_MAX,
        }
    }

    fn after(attempts: u32, now_ms: u64) -> Self {
        if attempts >= REVIVE_ATTEMPTS_MAX {
            return Self::GivenUp;
        }
        Self::Down { attempts, due_ms: now_ms.saturating_add(wait_ms(attempts)) }
    }
}

/// How long to wait after so many attempts: nothing at first, then twice as
/// long each time up to a limit.
fn wait_ms(attempts: u32) -> u64 {
    match attempts.checked_sub(1) {
        None => 0,
        Some(doublings) => {
            REVIVE_WAIT_MS_FIRST.saturating_mul(1 << doublings.min(20)).min(REVIVE_WAIT_MS_MAX)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STEADY: Ward = Ward::Served { since_ms: 0, attempts: 0 };

    #[test]
    fn the_first_attempt_is_at_once_and_later_ones_wait_longer_and_end() {
        let mut now_ms = REVIVE_STEADY_MS;
        let mut ward = STEADY.died(now_ms);
        let mut waits = Vec::new();
        while let Ward::Down { due_ms, .. } = ward {
            waits.push(due_ms - now_ms);
            assert_eq!(ward.start(due_ms.saturating_sub(1)).is_some(), due_ms == 0);
            now_ms = due_ms;
            ward = ward.start(now_ms).unwrap().failed(now_ms);
        }
        assert_eq!(ward, Ward::GivenUp);
        assert_eq!(waits.len(), REVIVE_ATTEMPTS_MAX as usize);
        assert_eq!(waits[..3], [0, REVIVE_WAIT_MS_FIRST, 2 * REVIVE_WAIT_MS_FIRST]);
        assert!(waits.is_sorted());
        assert_eq!(waits.last(), Some(&REVIVE_WAIT_MS_MAX));
        assert_eq!(ward.died(now_ms).start(u64::MAX), None);
    }

    #[test]
    fn one_that_dies_over_and_over_is_given_up_and_a_steady_one_never() {
        let (mut crashing, mut steady) = (STEADY.died(0), STEADY.died(0));
        let mut now_ms = 0;
        for _ in 0..2 * REVIVE_ATTEMPTS_MAX {
            now_ms += 10 * REVIVE_STEADY_MS;
            if let Some(started) = crashing.start(now_ms) {
                crashing = started.alive(now_ms).died(now_ms + 1);
            }
            steady = steady.start(now_ms).unwrap().alive(now_ms).died(now_ms + REVIVE_STEADY_MS);
            assert_eq!(steady, Ward::Down { attempts: 0, due_ms: now_ms + REVIVE_STEADY_MS });
        }
        assert_eq!(crashing, Ward::GivenUp);
        // Somebody attached it by hand.
        assert_eq!(crashing.alive(now_ms), Ward::Served { since_ms: now_ms, attempts: 0 });
    }
}
