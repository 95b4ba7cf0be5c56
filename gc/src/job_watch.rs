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
        self.collector.state().live_rate()
    }

    fn moved(&self, bytes: u64) {
        // It has been moved: whoever asks next waits for it.
        self.collector.state().budget.take(bytes, self.now());
    }
}

#[cfg(test)]
mod tests {
    use crate::budget::Budget;
    use crate::plan::Settings;
    use crate::progress::{Doing, Kind, State};

    use super::*;

    const S: Duration = Duration::from_secs(1);

    fn doing(kind: Kind) -> Doing {
        Doing::new(kind, Vec::new(), Duration::ZERO)
    }

    #[test]
    fn a_tapdisk_has_an_even_share_of_the_rate_and_all_of_it_when_it_is_alone() {
        let mut state = State::new(Settings::default(), Budget::new(20 << 20, Duration::ZERO));
        state.begin(doing(Kind::Leaf));
        assert_eq!(state.live_rate(), 20 << 20);
        state.begin(doing(Kind::Delete));
        assert_eq!(state.live_rate(), 20 << 20);
        let inner = state.begin(doing(Kind::Inner));
        assert_eq!(state.live_rate(), 10 << 20);
        state.end(inner, None, None);
        assert_eq!(state.live_rate(), 20 << 20);
        state.budget.set_rate(0, S);
        assert_eq!(state.live_rate(), 0);
    }
}
