//! Merges that ended early: when to try again, and when to stop trying.

use std::collections::BTreeMap;
use std::time::Duration;

use uuid::Uuid;

use crate::job::Stop;
use crate::limits;
use crate::plan::Holds;
use crate::reason::Reason;

/// What is known of one node's failures.
#[derive(Debug, Clone)]
struct Failure {
    attempts: u32,
    why: String,
    /// `None`: set aside.
    not_before: Option<Duration>,
}

/// All nodes with failures of one repository, by the node or intent that
/// names the merge. At most [`limits::FAILURES_KEPT`]; of more the oldest
/// are forgotten, and so tried again.
#[derive(Debug, Clone, Default)]
pub struct Retries {
    failures: BTreeMap<Uuid, Failure>,
}

impl Retries {
    /// A merge ended early. What only had to wait is tried for ever, ever
    /// more slowly; what failed is set aside after
    /// [`limits::ATTEMPTS_MAX`] attempts.
    pub fn failed(&mut self, node: Uuid, stop: &Stop, now: Duration) {
        let attempts = self.failures.get(&node).map_or(0, |failure| failure.attempts) + 1;
        let ends = matches!(stop, Stop::Failed(error) if !error.is_busy());
        let wait = limits::RETRY_FIRST.saturating_mul(1 << (attempts - 1).min(16)).min(limits::RETRY_MAX);
        let not_before = (!ends || attempts < limits::ATTEMPTS_MAX).then(|| now + wait);
        if self.failures.len() >= limits::FAILURES_KEPT && !self.failures.contains_key(&node) {
            let oldest = self.failures.iter().min_by_key(|(_, failure)| failure.not_before);
            if let Some(oldest) = oldest.map(|(uuid, _)| *uuid) {
                self.failures.remove(&oldest);
            }
        }
        self.failures.insert(node, Failure { attempts, why: stop.to_string(), not_before });
    }

    /// A merge was done, or somebody asks for it again.
    pub fn forget(&mut self, node: Uuid) {
        self.failures.remove(&node);
    }

    /// Somebody asks for everything again.
    pub fn forget_all(&mut self) {
        self.failures.clear();
    }

    /// What must not be tried now.
    #[must_use]
    pub fn holds(&self, now: Duration) -> Holds {
        let hold = |failure: &Failure| {
            let (attempts, why) = (failure.attempts, failure.why.clone());
            match failure.not_before {
                None => Some(Reason::SetAside { attempts, why }),
                Some(at) if at > now => {
                    let wait_s = (at - now).as_secs_f64().ceil() as u64;
                    Some(Reason::Retry { attempts, why, wait_s })
                }
                Some(_) => None,
            }
        };
        self.failures.iter().filter_map(|(node, failure)| Some((*node, hold(failure)?))).collect()
    }

    /// Time until the next retry, if one is due at all.
    #[must_use]
    pub fn next(&self, now: Duration) -> Option<Duration> {
        let waits = self.failures.values().filter_map(|failure| failure.not_before);
        waits.map(|at| at.saturating_sub(now)).filter(|wait| !wait.is_zero()).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NODE: Uuid = Uuid::from_u128(1);

    fn failure() -> Stop {
        Stop::Failed(sm::Error::NoSpace { what: "x".into() })
    }

    #[test]
    fn waits_grow_and_end() {
        let mut retries = Retries::default();
        let mut now = Duration::ZERO;
        let mut waits = Vec::new();
        for _ in 0..limits::ATTEMPTS_MAX {
            retries.failed(NODE, &failure(), now);
            if let Some(wait) = retries.next(now) {
                assert!(matches!(retries.holds(now)[&NODE], Reason::Retry { .. }));
                now += wait;
                assert!(retries.holds(now).is_empty());
                waits.push(wait.as_secs());
            }
        }
        assert_eq!(waits, [5, 10, 20, 40, 80]);
        assert!(matches!(retries.holds(now)[&NODE], Reason::SetAside { attempts: 6, .. }));
        assert_eq!(retries.next(now), None);
        retries.forget(NODE);
        assert!(retries.holds(now).is_empty());
    }

    #[test]
    fn what_only_waits_is_never_set_aside() {
        let mut retries = Retries::default();
        for _ in 0..50 {
            retries.failed(NODE, &Stop::Later("read".into()), Duration::ZERO);
        }
        assert_eq!(retries.next(Duration::ZERO), Some(limits::RETRY_MAX));
    }

    #[test]
    fn the_list_is_bounded() {
        let mut retries = Retries::default();
        for n in 0..1000 {
            retries.failed(Uuid::from_u128(n), &failure(), Duration::from_secs(n as u64));
        }
        assert_eq!(retries.failures.len(), limits::FAILURES_KEPT);
        assert!(retries.failures.contains_key(&Uuid::from_u128(999)));
    }
}
