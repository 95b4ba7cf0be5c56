//! A job's outside world inside a collector.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use crate::collector::Collector;
use crate::progress::State;
use crate::watch::{Aborted, Event, Watch};

/// A job's view of its collector.
#[derive(Debug)]
pub(crate) struct JobWatch {
    pub collector: Arc<Collector>,
    /// Names the job in the collector's state.
    pub key: u64,
}

impl JobWatch {
    fn aborted(&self, state: &State) -> std::result::Result<(), Aborted> {
        match state.running.get(&self.key) {
            Some(doing) if !doing.aborted => Ok(()),
            _ => Err(Aborted),
        }
    }
}

impl Watch for JobWatch {
    fn now(&self) -> Duration {
        self.collector.now()
    }

    fn sleep(&self, time: Duration) -> std::result::Result<(), Aborted> {
        let until = self.now() + time;
        let mut state = self.collector.state();
        loop {
            self.aborted(&state)?;
            let left = until.saturating_sub(self.now());
            if left.is_zero() {
                return Ok(());
            }
            let waited = self.collector.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn allow(&self, bytes: u64) -> std::result::Result<(), Aborted> {
        let wait = {
            let mut state = self.collector.state();
            self.aborted(&state)?;
            state.budget.take(bytes, self.now())
        };
        if wait.is_zero() { Ok(()) } else { self.sleep(wait) }
    }

    fn note(&self, event: Event) {
        self.collector.state().note(self.key, event);
    }

    fn rate(&self) -> u64 {
        let state = self.collector.state();
        // The budget is shared by as many merges as may run.
        state.budget.rate().div_ceil(state.settings.parallel.max(1) as u64)
    }
}
