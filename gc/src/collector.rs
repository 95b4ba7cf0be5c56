//! The collector of one repository: a thread that looks, plans, and keeps as
//! many merges running as it may.
//!
//! ```text
//!   kick, clock, a merge's end
//!        |
//!      round:  recover -> glance -> plan -> delete garbage
//!                                       \-> one thread per merge chosen
//!        |
//!   sleeping until the next of the three
//! ```
//!
//! All its knowledge is in [`State`], behind one lock that is never held
//! while anything is read or written. It forgets everything when it ends: the
//! journal and the images know.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::{Duration, Instant};

use sm::Repo;
use sm::catalog::Event;
use sm::journal::Intent;
use uuid::Uuid;
use vhd::merge::Mode;

use crate::budget::Budget;
use crate::cost;
use crate::forest::Forest;
use crate::garbage;
use crate::job::{Job, Result, Stop};
use crate::job_watch::JobWatch;
use crate::limits;
use crate::plan::{Choice, Merge, Settings, View, plan};
use crate::progress::{Doing, Done, Kind, State};
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
        Arc::new(Self {
            repo,
            began: Instant::now(),
            state: Mutex::new(State::new(settings, budget)),
            changed: Condvar::new(),
        })
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

    /// Has it look now.
    pub fn kick(&self) {
        {
            let mut state = self.state();
            state.quiet_until = Duration::ZERO;
            state.asked += 1;
        }
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

    /// Stops merges and starts none, or starts again.
    pub fn pause(&self, paused: bool) {
        {
            let mut state = self.state();
            state.paused = paused;
            if paused {
                state.abort(|_| true);
            }
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
                    state.abort(|_| true)
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
    pub fn collect(&self, scope: Scope) -> Report {
        let begun = self.now();
        let mut state = self.state();
        state.retries.forget_all();
        state.quiet_until = Duration::ZERO;
        state.asked += 1;
        let asked = state.asked;
        let waiter = (scope == Scope::Sr).then(|| state.await_all());
        if let Scope::Vdi(vdi) = scope {
            state.focus_on(vdi);
        }
        self.changed.notify_all();
        while !state.closing && !state.idle(asked, scope) {
            let waited = self.changed.wait_timeout(state, limits::LOOK_EVERY);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        let mut report = match scope {
            Scope::Sr => waiter.map_or_else(Report::default, |waiter| state.awaited(waiter)),
            Scope::Vdi(vdi) => state.unfocus(vdi),
        };
        report.failed = failed(&state, scope);
        report.seconds = (self.now() - begun).as_secs_f64();
        report
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
    pub fn collect_as_predicted(&self, scope: Scope) -> Report {
        let began = self.now();
        let late = || self.now().saturating_sub(began) > limits::PREDICT_FIRST_MAX;
        let predicted = self.predict_unless(scope, &late);
        let predicted = predicted.inspect_err(|error| {
            tracing::info!(sr = %self.repo.uuid, %error, "collecting without a prediction");
        });
        let mut report = self.collect(scope);
        report.predicted = predicted.ok().map(Box::new);
        report
    }

    fn predict_unless(&self, scope: Scope, late: &dyn Fn() -> bool) -> Result<Report> {
        let forest = survey::glance(&self.repo)?;
        let settings = self.state().settings;
        let only = match scope {
            Scope::Sr => None,
            Scope::Vdi(vdi) => Some(vdi),
        };
        let mut report = cost::predict(&self.repo, &forest, settings, only, late)?;
        let rate = self.state().expected_rate();
        report.seconds = report.bytes_copied as f64 / rate;
        Ok(report)
    }

    /// Collects until [`Self::close`]. Returns when every merge has ended.
    pub fn work(self: &Arc<Self>) {
        let mut threads = Vec::new();
        loop {
            let asked = {
                let mut state = self.state();
                if state.closing {
                    break;
                }
                state.dirty = false;
                state.looking = true;
                state.asked
            };
            if let Err(stop) = self.round(&mut threads) {
                tracing::warn!(sr = %self.repo.uuid, error = %stop, "collector: round failed");
                self.state().round_failed(&stop);
            }
            threads.retain(|thread: &std::thread::JoinHandle<()>| !thread.is_finished());
            let mut state = self.state();
            state.looked = asked;
            state.looking = false;
            self.changed.notify_all();
            let now = self.now();
            let next = state.retries.next(now).unwrap_or(limits::LOOK_EVERY);
            let quiet = state.quiet_until.saturating_sub(now);
            let until = now + next.min(limits::LOOK_EVERY).max(quiet.min(limits::LOOK_EVERY));
            while !state.closing && state.asked == asked && !state.dirty && self.now() < until {
                let left = until.saturating_sub(self.now());
                let waited = self.changed.wait_timeout(state, left);
                state = waited.unwrap_or_else(PoisonError::into_inner).0;
            }
        }
        for thread in threads {
            if thread.join().is_err() {
                tracing::error!(sr = %self.repo.uuid, "a merge panicked; its record stands");
            }
        }
    }

    /// One look and what follows from it.
    fn round(self: &Arc<Self>, threads: &mut Vec<std::thread::JoinHandle<()>>) -> Result<()> {
        self.recover()?;
        let mut forest = survey::glance(&self.repo)?;
        let spoken_for = self.state().spoken_for();
        forest.free_bytes = forest.free_bytes.saturating_sub(spoken_for);
        let (planned, paused) = {
            let state = self.state();
            let now = self.now();
            let running = state.running.values().filter_map(|doing| doing.intent).collect();
            let mut holds = state.retries.holds(now);
            let quiet = state.paused || state.quiet_until > now;
            let settings = Settings {
                // Nothing may start: the planner then says why for each.
                parallel: if quiet { 0 } else { state.settings.parallel },
                ..state.settings
            };
            let focus = state.focus.keys().map(|vdi| forest.root(*vdi)).collect();
            drop(state);
            let repo = &self.repo;
            let cost = |merge: &Merge| cost::cost(repo, merge);
            let mut planned = plan(&View {
                forest: &forest,
                settings,
                running: &running,
                holds: &holds,
                focus: &focus,
                cost: &cost,
            });
            holds.clear();
            if quiet {
                let only_paused = |reason: &mut Reason| {
                    if matches!(reason, Reason::Parallel { .. }) {
                        *reason = Reason::Paused;
                    }
                };
                planned.waits.values_mut().for_each(only_paused);
            }
            (planned, quiet)
        };
        let mut active: BTreeSet<Uuid> = BTreeSet::new();
        for choice in &planned.choices {
            match choice {
                Choice::Delete { .. } if self.state().paused => {}
                Choice::Delete { nodes } => {
                    for part in self.by_focus(nodes, &forest) {
                        self.delete(&part, &forest)?;
                    }
                    active.extend(nodes.iter().map(|node| forest.root(*node)));
                }
                Choice::Resume { .. } | Choice::Begin { .. } if paused => {}
                Choice::Resume { .. } | Choice::Begin { .. } => {
                    active.extend(cost::choice_tree(&forest, choice));
                    threads.extend(self.start(choice.clone(), &forest));
                }
            }
        }
        let deleted = planned.choices.iter().any(|choice| matches!(choice, Choice::Delete { .. }))
            && !self.state().paused;
        self.state().planned(&forest, planned.waits, active, deleted, self.now());
        Ok(())
    }

    /// Finishes or undoes what a dead process left, so that it does not hold
    /// up merges for ever with smd dead.
    fn recover(&self) -> Result<()> {
        let _lock = crate::job::io("lock the SR", self.repo.host.lock_sr())?;
        sm::recover::recover(&self.repo, sm::recover::Scope::All)?;
        sm::recover::sweep(&self.repo)?;
        Ok(())
    }

    /// The nodes of each tree that somebody waits for, and the rest, so that
    /// each is told its own.
    fn by_focus(&self, nodes: &[Uuid], forest: &Forest) -> Vec<Vec<Uuid>> {
        let focused: BTreeSet<Uuid> = self.state().focus.keys().map(|vdi| forest.root(*vdi)).collect();
        let mut parts: BTreeMap<Option<Uuid>, Vec<Uuid>> = BTreeMap::new();
        for node in nodes {
            let tree = Some(forest.root(*node)).filter(|tree| focused.contains(tree));
            parts.entry(tree).or_default().push(*node);
        }
        parts.into_values().collect()
    }

    /// A record of work that begins now on nodes of one tree.
    fn doing(&self, kind: Kind, nodes: Vec<Uuid>, forest: &Forest) -> Doing {
        let tree = nodes.first().map(|node| forest.root(*node));
        let focus = self.state().focus.keys().copied().collect::<Vec<_>>();
        let focus = focus.into_iter().filter(|vdi| Some(forest.root(*vdi)) == tree).collect();
        Doing { focus, ..Doing::new(kind, nodes, self.now()) }
    }

    fn delete(self: &Arc<Self>, nodes: &[Uuid], forest: &Forest) -> Result<()> {
        let doing = self.doing(Kind::Delete, nodes.to_vec(), forest);
        let key = self.state().begin(doing);
        let watch = JobWatch { collector: self.clone(), key };
        let outcome = garbage::delete(&self.repo, &watch, nodes);
        let mut state = self.state();
        match outcome {
            Ok(deleted) => {
                for (node, why) in &deleted.failed {
                    tracing::warn!(sr = %self.repo.uuid, vdi = %node, %why, "garbage: not deleted");
                }
                for node in &deleted.gone {
                    tracing::info!(sr = %self.repo.uuid, vdi = %node, "garbage: deleted");
                }
                state.count(key, deleted.gone.len());
                let done = state.end(key, None);
                drop(state);
                self.keep(done);
                Ok(())
            }
            Err(stop) => {
                let done = state.end(key, Some(stop.to_string()));
                drop(state);
                self.keep(done);
                Err(stop)
            }
        }
    }

    /// Writes what came of a job into the SR's history.
    fn keep(&self, done: Option<Done>) {
        let Some(done) = done else {
            return;
        };
        let kept = serde_json::to_string(&done).map_err(|error| error.to_string()).and_then(|detail| {
            let (at_s, operation) = (self.repo.ids.now_s(), done.kind.operation());
            let event = Event { at_s, operation, vdi: done.vdi, detail };
            self.repo.labels.note(&event).map_err(|error| error.to_string())
        });
        if let Err(error) = kept {
            tracing::warn!(sr = %self.repo.uuid, vdi = %done.vdi, job = %done.job, %error, "history not written");
        }
    }

    /// Starts a merge on a thread of its own; returns once its record stands
    /// (or it failed to begin), so that the next look sees it.
    fn start(self: &Arc<Self>, choice: Choice, forest: &Forest) -> Option<std::thread::JoinHandle<()>> {
        let (nodes, kind, attached) = subject(&choice, forest);
        let doing = self.doing(kind, nodes, forest);
        let room = match &choice {
            Choice::Begin { cost, mode: Mode::Shadow, .. } => cost.gained_max,
            Choice::Begin { .. } | Choice::Resume { .. } | Choice::Delete { .. } => 0,
        };
        let expected = cost::expected(&choice);
        let key = self.state().begin(Doing { attached, room, expected, ..doing });
        let (begun, wait) = mpsc::channel();
        let this = self.clone();
        let body = move || {
            let watch = JobWatch { collector: this.clone(), key };
            let outcome = this.merge(&watch, &choice, key, &begun);
            this.ended(key, &choice, outcome);
        };
        match std::thread::Builder::new().name("merge".into()).spawn(body) {
            Ok(thread) => {
                // An error: it ended before its record stood.
                wait.recv().ok();
                Some(thread)
            }
            Err(error) => {
                self.state().end(key, Some(error.to_string()));
                None
            }
        }
    }

    /// Whether there was anything to do: a record that was seen a moment ago
    /// may have been cleared by the job that ended just then.
    fn merge(&self, watch: &JobWatch, choice: &Choice, key: u64, begun: &mpsc::Sender<()>) -> Result<bool> {
        let found = match choice {
            Choice::Begin { merge, .. } => Some(Job::begin(&self.repo, watch, merge)?),
            Choice::Resume { intent } => Job::take_over(&self.repo, watch, *intent)?,
            Choice::Delete { .. } => None,
        };
        let Some((job, intent)) = found else {
            return Ok(false);
        };
        self.state().recorded(key, &intent);
        begun.send(()).ok();
        let id = intent.id();
        let what = match &intent {
            Intent::Inner(_) => "inner coalesce",
            Intent::LeafMerge(_) => "leaf coalesce",
            other => other.word(),
        };
        let vdi = self.state().running.get(&key).and_then(|doing| doing.nodes.first().copied());
        let vdi = vdi.unwrap_or_default();
        tracing::info!(sr = %self.repo.uuid, %vdi, job = %id, "{what}: begins");
        let outcome = job.carry_on(intent);
        match &outcome {
            Ok(()) => tracing::info!(sr = %self.repo.uuid, %vdi, job = %id, "{what}: done"),
            Err(stop) => {
                tracing::warn!(sr = %self.repo.uuid, %vdi, job = %id, error = %stop, "{what}: stopped");
            }
        }
        outcome.map(|()| true)
    }

    fn ended(&self, key: u64, choice: &Choice, outcome: Result<bool>) {
        let now = self.now();
        let done = {
            let mut state = self.state();
            let named = match choice {
                Choice::Begin { merge, .. } => Some(merge.node()),
                Choice::Resume { .. } | Choice::Delete { .. } => None,
            };
            let intent = state.running.get(&key).and_then(|doing| doing.intent);
            match &outcome {
                Ok(done) => {
                    for id in named.into_iter().chain(intent) {
                        state.retries.forget(id);
                    }
                    if *done {
                        state.count(key, 0);
                    }
                }
                // The pause or the quiet time holds everything anyway.
                Err(Stop::Aborted) if state.paused || state.quiet_until > now => {}
                Err(stop) => {
                    for id in named.into_iter().chain(intent) {
                        state.retries.failed(id, stop, now);
                    }
                }
            }
            let done = state.end(key, outcome.err().map(|stop| stop.to_string()));
            state.dirty = true;
            done
        };
        self.keep(done);
        self.changed.notify_all();
    }
}

/// What was not collected although it could have been asked for.
fn failed(state: &State, scope: Scope) -> Vec<FailedNode> {
    let in_scope = |node: &Uuid| match scope {
        Scope::Sr => true,
        Scope::Vdi(vdi) => state.same_tree(*node, vdi),
    };
    let counts =
        |reason: &Reason| reason.is_blocked() || matches!(reason, Reason::Retry { .. } | Reason::Paused);
    let waits = state.waits.iter().filter(|(node, reason)| in_scope(node) && counts(reason));
    waits.map(|(uuid, reason)| FailedNode { uuid: *uuid, reason: reason.to_string() }).collect()
}

/// Nodes (the one that names the merge first), kind, and whether a tapdisk
/// does it.
fn subject(choice: &Choice, forest: &Forest) -> (Vec<Uuid>, Kind, bool) {
    match choice {
        Choice::Begin { merge, .. } => {
            let mut nodes = vec![merge.node()];
            nodes.extend(merge.sources().iter().filter(|node| **node != merge.node()));
            nodes.push(merge.parent());
            match merge {
                Merge::Inner { .. } => (nodes, Kind::Inner, false),
                Merge::Leaf { attached, .. } => (nodes, Kind::Leaf, *attached),
            }
        }
        Choice::Resume { intent } => {
            let claim = forest.claims.iter().find(|claim| claim.id == *intent);
            (claim.map(|claim| claim.nodes.clone()).unwrap_or_default(), Kind::Inner, false)
        }
        Choice::Delete { nodes } => (nodes.clone(), Kind::Delete, false),
    }
}
