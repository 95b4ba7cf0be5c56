//! Watches how attached disks fare, and holds merges back by what it sees.

use std::collections::BTreeMap;
use std::sync::PoisonError;
use std::time::Duration;

use tapdisk_control::{Reply, Request};
use uuid::Uuid;

use crate::backoff::Seen;
use crate::collector::Collector;
use crate::limits;
use crate::survey;

/// Reads and writes of a disk since its tapdisk began.
#[derive(Debug, Clone, Copy)]
struct Served {
    requests: u64,
    total_us: u64,
}

impl Served {
    /// What came after `before`. A tapdisk that was started anew counts from
    /// 0: nothing is known then.
    fn since(self, before: Self, vdi: Uuid) -> Seen {
        let requests = self.requests.saturating_sub(before.requests);
        let total_us = self.total_us.saturating_sub(before.total_us);
        Seen { vdi, requests, mean_us: total_us as f64 / requests.max(1) as f64 }
    }
}

impl Collector {
    /// Observes until [`Collector::close`].
    pub fn watch_latency(&self) {
        let mut before: BTreeMap<Uuid, Served> = BTreeMap::new();
        let mut moved = self.state().moved();
        let mut at = self.now();
        while self.pause_between() {
            let now: BTreeMap<Uuid, Served> =
                if self.state().latency_factor > 0.0 { self.served() } else { BTreeMap::new() };
            let seen = now.iter().filter_map(|(vdi, served)| Some(served.since(*before.get(vdi)?, *vdi)));
            let seen: Vec<Seen> = seen.collect();
            let mut state = self.state();
            let passed = (self.now() - at).as_secs_f64().max(0.001);
            let sum = state.moved();
            let rate = (sum.saturating_sub(moved) as f64 / passed) as u64;
            let merges = state.running.values().any(|doing| doing.ledger.total > 0);
            let factor = state.latency_factor;
            let limit = state.backoff.limit();
            state.backoff.observe(&seen, merges.then_some(rate), factor);
            if state.backoff.limit() != limit {
                let now = self.now();
                state.apply_rate(now);
                let limit = state.backoff.limit();
                tracing::debug!(sr = %self.repo().uuid, ?limit, "merges: held back");
            }
            drop(state);
            (before, moved, at) = (now, sum, self.now());
        }
    }

    /// Waits for the next look; false once the collector closes.
    fn pause_between(&self) -> bool {
        let until = self.now() + limits::LATENCY_EVERY;
        let mut state = self.state();
        while !state.closing {
            let left = until.saturating_sub(self.now());
            if left == Duration::ZERO {
                return true;
            }
            let waited = self.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        false
    }

    /// Of every attached disk that answers.
    fn served(&self) -> BTreeMap<Uuid, Served> {
        let repo = self.repo();
        let leases = {
            let Ok(_lock) = repo.host.lock_sr() else { return BTreeMap::new() };
            survey::leases(repo).unwrap_or_default()
        };
        let asked = leases.iter().filter_map(|lease| {
            let mut tap = repo.host.tap(lease.vdi).ok()??;
            match tap.call(Request::Stats) {
                Ok(Reply::Stats(stats)) => {
                    let (read, write) = (&stats.read, &stats.write);
                    let requests = read.count + write.count;
                    Some((lease.vdi, Served { requests, total_us: read.total_us + write.total_us }))
                }
                Ok(_) | Err(_) => None,
            }
        });
        asked.collect()
    }
}
