//! The collector of one repository: a thread that looks, plans, and keeps as
//! many merges running as it may.
//!
//! ```text
//!   kick, clock, a merge's end
//!        |
//!      round:  recover -> glance -> plan -> delete garbage
//!                                       \-> one thread per merge chosen
//!                                        \-> give back space nobody wrote
//!        |
//!   sleeping until the next of the three
//! ```
//!
//! All its knowledge is in [`State`], behind one lock that is never held
//! while anything is read or written. It forgets everything when it ends: the
//! journal and the images know.

mod alarms;
mod merges;
mod rounds;

use std::collections::BTreeSet;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use sm::Repo;
use uuid::Uuid;

use crate::budget::Budget;
use crate::cost;
use crate::job::Result;
use crate::limits;
use crate::plan::Settings;
use crate::progress::{BrokenOff, Kind, LookFailed, State};
use crate::reason::Reason;
use crate::report::{FailedNode, Report};
use crate::survey;

/// See the module.
#[derive(Debug)]
pub struct Collector {
    repo: Repo,
    began: Instant,
    state: Mutex<State>,
    pub(crate) changed: Condvar,
}

/// What a caller wants collected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// The whole repository.
    Sr,
    /// The tree of this VDI.
    Vdi(Uuid),
}

impl Collector {
    /// A collector that does nothing until [`Self::work`] is called.
    #[must_use]
    pub fn new(repo: Repo, settings: Settings, rate_bytes_per_s: u64) -> Arc<Self> {
        let budget = Budget::new(rate_bytes_per_s, Duration::ZERO);
        let mut state = State::new(settings, budget);
        state.alarms = alarms::standing(&repo);
        Arc::new(Self { repo, began: Instant::now(), state: Mutex::new(state), changed: Condvar::new() })
    }

    /// The repository.
    #[must_use]
    pub fn repo(&self) -> &Repo {
        &self.repo
    }

    /// What it is doing; held for a moment only.
    pub fn state(&self) -> MutexGuard<'_, State> {
        // A state is whole between any two statements that hold it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Time since it was made.
    #[must_use]
    pub fn now(&self) -> Duration {
        self.began.elapsed()
    }

    /// Has it look now. What was aborted stays so for its while: whoever kicks
    /// did something else to the repository.
    pub fn kick(&self) {
        self.state().asked += 1;
        self.changed.notify_all();
    }

    /// Has it look now, and try again what failed before.
    pub fn again(&self) {
        {
            let mut state = self.state();
            state.retries.forget_all();
            state.quiet_until = Duration::ZERO;
        }
        self.kick();
    }

    /// Stops merges and starts none, or starts again: at once, also what
    /// [`Self::abort`] has stopped.
    pub fn pause(&self, paused: bool) {
        {
            let mut state = self.state();
            state.paused = paused;
            if paused {
                state.hold(|_| true);
            } else {
                state.quiet_until = Duration::ZERO;
            }
            state.asked += 1;
        }
        self.changed.notify_all();
    }

    /// From now on the leaves of these disks are left alone: no merge of one is
    /// begun, and one that runs ends at the next safe point. Nodes below them
    /// are merged as before.
    pub fn switch_off(&self, vdis: BTreeSet<Uuid>) {
        {
            let mut state = self.state();
            if state.off == vdis {
                return;
            }
            state.hold(|doing| {
                doing.kind == Kind::Leaf && doing.nodes.first().is_some_and(|vdi| vdis.contains(vdi))
            });
            state.off = vdis;
            state.asked += 1;
        }
        self.changed.notify_all();
    }

    /// Has it look now, under other settings.
    pub fn apply(&self, change: impl FnOnce(&mut State, Duration)) {
        {
            let mut state = self.state();
            change(&mut state, self.now());
            state.asked += 1;
        }
        self.changed.notify_all();
    }

    /// Ends running merges, of one tree or all; what was copied stays. They
    /// are begun again after a while: one tree's as after a failure, all
    /// others when somebody asks or [`limits::ABORT_QUIET`] is over.
    pub fn abort(&self, scope: Scope) -> usize {
        let ended = {
            let mut state = self.state();
            match scope {
                Scope::Sr => {
                    state.quiet_until = self.now() + limits::ABORT_QUIET;
                    state.hold(|_| true)
                }
                Scope::Vdi(vdi) => state.abort(|doing| doing.nodes.contains(&vdi)),
            }
        };
        self.changed.notify_all();
        ended
    }

    /// Ends the thread in [`Self::work`], its merges first.
    pub fn close(&self) {
        {
            let mut state = self.state();
            state.closing = true;
            state.abort(|_| true);
        }
        self.changed.notify_all();
    }

    /// Collects now and waits until nothing is left that could be done.
    ///
    /// # Errors
    /// The SR could not be looked at, nor at the next few looks where that
    /// may pass; or the collector was closed. What was done by then is in it.
    pub fn collect(&self, scope: Scope) -> std::result::Result<Report, Box<BrokenOff>> {
        let begun = self.now();
        let mut state = self.state();
        state.retries.forget_all();
        state.quiet_until = Duration::ZERO;
        let waiter = (scope == Scope::Sr).then(|| state.await_all());
        if let Scope::Vdi(vdi) = scope {
            state.focus_on(vdi);
        }
        let (mut state, broken_off) = self.settled(state, scope);
        let mut report = match scope {
            Scope::Sr => waiter.map_or_else(Report::default, |waiter| state.awaited(waiter)),
            Scope::Vdi(vdi) => state.unfocus(vdi),
        };
        report.failed = failed(&state, scope);
        report.seconds = (self.now() - begun).as_secs_f64();
        match broken_off {
            Some(why) => Err(Box::new(BrokenOff { why, report })),
            None => Ok(report),
        }
    }

    /// Asks for a look and waits until nothing is left to be done, or it shows
    /// that nobody can tell.
    fn settled<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        scope: Scope,
    ) -> (MutexGuard<'a, State>, Option<LookFailed>) {
        for attempt in 1.. {
            state.asked += 1;
            let asked = state.asked;
            self.changed.notify_all();
            while !state.closing && !state.idle(asked, scope) {
                let waited = self.changed.wait_timeout(state, limits::LOOK_EVERY);
                state = waited.unwrap_or_else(PoisonError::into_inner).0;
            }
            if !state.idle(asked, scope) {
                return (state, Some(LookFailed::closed()));
            }
            let failed = state.round_error.clone();
            if failed.as_ref().is_none_or(|error| !error.may_pass) || attempt >= limits::AWAITED_LOOKS {
                return (state, failed);
            }
            let waited = self.changed.wait_timeout_while(state, limits::AWAITED_LOOK_WAIT, |s| !s.closing);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        (state, None)
    }

    /// What [`Self::collect`] would do.
    ///
    /// # Errors
    /// The repository or a block table cannot be read.
    pub fn predict(&self, scope: Scope) -> Result<Report> {
        self.predict_unless(scope, &|| false)
    }

    /// As [`Self::collect`], with a prediction made first beside it. A
    /// prediction that would hold up the work is left out.
    ///
    /// # Errors
    /// As [`Self::collect`].
    pub fn collect_as_predicted(&self, scope: Scope) -> std::result::Result<Report, Box<BrokenOff>> {
        let began = self.now();
        let late = || self.now().saturating_sub(began) > limits::PREDICT_FIRST_MAX;
        let predicted = self.predict_unless(scope, &late);
        let predicted = predicted.inspect_err(|error| {
            tracing::info!(sr = %self.repo.uuid, %error, "collecting without a prediction");
        });
        let mut report = self.collect(scope)?;
        report.predicted = predicted.ok().map(Box::new);
        Ok(report)
    }

    fn predict_unless(&self, scope: Scope, late: &dyn Fn() -> bool) -> Result<Report> {
        let mut forest = survey::glance(&self.repo)?;
        forest.alarms = self.state().alarmed();
        let (settings, off) = {
            let state = self.state();
            (state.settings, state.switched_off())
        };
        let only = match scope {
            Scope::Sr => None,
            Scope::Vdi(vdi) => Some(vdi),
        };
        let mut report = cost::predict(&self.repo, &forest, settings, off, only, late)?;
        let rate = self.state().expected_rate();
        report.seconds = report.bytes_copied as f64 / rate;
        Ok(report)
    }
}

/// What was not collected although it could have been asked for.
fn failed(state: &State, scope: Scope) -> Vec<FailedNode> {
    let in_scope = |node: &Uuid| match scope {
        Scope::Sr => true,
        Scope::Vdi(vdi) => state.same_tree(*node, vdi),
    };
    let counts = |reason: &Reason| {
        reason.is_blocked() || matches!(reason, Reason::Retry { .. } | Reason::Paused | Reason::Quiet { .. })
    };
    let waits = state.waits.iter().filter(|(node, reason)| in_scope(node) && counts(reason));
    let waits = waits.map(|(uuid, reason)| FailedNode { uuid: *uuid, reason: reason.to_string() });
    let alarmed = state.alarms.values().flat_map(|alarm| alarm.disks.iter().map(|disk| (*disk, &alarm.text)));
    let alarmed = alarmed.filter(|(disk, _)| in_scope(disk));
    waits.chain(alarmed.map(|(uuid, text)| FailedNode { uuid, reason: text.clone() })).collect()
}
