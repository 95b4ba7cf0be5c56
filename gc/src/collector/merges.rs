//! One merge from its choice to the history.

use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;

use serde::Serialize;
use sm::catalog::Event;
use sm::journal::Intent;
use uuid::Uuid;
use vhd::merge::Mode;

use super::Collector;
use crate::cost;
use crate::forest::Forest;
use crate::job::{Job, Result, Stop};
use crate::job_watch::JobWatch;
use crate::plan::{Choice, Merge};
use crate::progress::{Doing, Done, Kind, Reading};
use crate::receipt::{Opened, Receipt, Witness, witness};

impl Collector {
    /// Starts a merge on a thread of its own; returns once its record stands
    /// or [`State`] says that it reads disks first (or it failed to begin), so
    /// that the next look sees it.
    pub(super) fn start(self: &Arc<Self>, choice: Choice, forest: &Forest) -> Option<JoinHandle<()>> {
        let (nodes, kind, attached) = subject(&choice, forest);
        let doing = self.doing(kind, nodes, forest);
        let room = match &choice {
            Choice::Begin { cost, mode: Mode::Shadow, .. } => cost.gained_max,
            Choice::Begin { .. } | Choice::Resume { .. } | Choice::Delete { .. } => 0,
        };
        let disks = match &choice {
            Choice::Begin { merge, .. } if self.state().settings.receipts => {
                Some(witness::disks(forest, merge))
            }
            _ => None,
        };
        let expected = cost::expected(&choice);
        let key = self.state().begin(Doing { attached, room, expected, ..doing });
        let (begun, wait) = mpsc::channel();
        let this = self.clone();
        let body = move || {
            let watch = JobWatch { collector: this.clone(), key };
            let (outcome, receipt) = this.merge(&watch, &choice, disks, &begun);
            this.ended(key, &choice, outcome, receipt);
        };
        match std::thread::Builder::new().name("merge".into()).spawn(body) {
            Ok(thread) => {
                // An error: it ended before its record stood.
                wait.recv().ok();
                Some(thread)
            }
            Err(error) => {
                self.state().end(key, Some(error.to_string()), None);
                None
            }
        }
    }

    /// Whether there was anything to do: a record that was seen a moment ago
    /// may have been cleared by the job that ended just then. And the receipt,
    /// if one was asked for: see [`crate::receipt`].
    fn merge(
        &self,
        watch: &JobWatch,
        choice: &Choice,
        disks: Option<Vec<Uuid>>,
        begun: &mpsc::Sender<()>,
    ) -> (Result<bool>, Option<Receipt>) {
        let key = watch.key;
        let tell = |what, disk, disks| {
            if let Some(doing) = self.state().running.get_mut(&key) {
                doing.reading = Some(Reading { what, disk, disks });
            }
        };
        let mut witness = None;
        if let Some(disks) = disks {
            tell("first reading", 0, disks.len());
            begun.send(()).ok();
            match Witness::first(&self.repo, watch, &disks, &tell) {
                Ok(read) => witness = Some(read),
                Err(stop) => return (Err(stop), None),
            }
        }
        let found = match choice {
            Choice::Begin { merge, .. } => Job::begin(&self.repo, watch, merge).map(Some),
            Choice::Resume { intent } => Job::take_over(&self.repo, watch, *intent),
            Choice::Delete { .. } => Ok(None),
        };
        let (job, intent) = match found {
            Ok(Some(found)) => found,
            Ok(None) => return (Ok(false), None),
            Err(stop) => return (Err(stop), None),
        };
        self.state().recorded(key, &intent, self.now());
        begun.send(()).ok();
        let id = intent.id();
        if let Some(witness) = &witness {
            self.note_open(key, &witness.opened(&id.to_string()));
        }
        let outcome = self.carry_on(key, &job, intent);
        let receipt = match (witness, &outcome) {
            (Some(_), Err(Stop::Aborted)) => Some(Receipt::void("the merge was stopped")),
            (Some(witness), _) => Some(witness.second(&id.to_string(), &tell)),
            (None, _) => {
                let why = "the merge was carried on: what its disks were before it began is not known";
                self.state().settings.receipts.then(|| Receipt::void(why))
            }
        };
        (outcome.map(|()| true), receipt)
    }

    fn carry_on(&self, key: u64, job: &Job<'_>, intent: Intent) -> Result<()> {
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
        outcome
    }

    fn ended(&self, key: u64, choice: &Choice, outcome: Result<bool>, receipt: Option<Receipt>) {
        let now = self.now();
        let held = self.state().running.get(&key).is_some_and(|doing| doing.held);
        let intent = self.state().running.get(&key).and_then(|doing| doing.intent);
        let alarm = intent.zip(receipt.as_ref()).and_then(|(id, receipt)| receipt.alarm(&id.to_string()));
        // Before the job ends: until then its tree is its own.
        if let Some(alarm) = &alarm {
            self.raise(alarm);
        }
        let done = {
            let mut state = self.state();
            let named = match choice {
                Choice::Begin { merge, .. } => Some(merge.node()),
                Choice::Resume { .. } | Choice::Delete { .. } => None,
            };
            match &outcome {
                Ok(done) => {
                    for id in named.into_iter().chain(intent) {
                        state.retries.forget(id);
                    }
                    if *done {
                        state.count(key, 0);
                    }
                }
                // The pause or the quiet time holds it, for as long as there is one.
                Err(Stop::Aborted) if held => {}
                Err(stop) => {
                    for id in named.into_iter().chain(intent) {
                        state.retries.failed(id, stop, now);
                    }
                }
            }
            let nothing_to_do = matches!(outcome, Ok(false));
            let errors = outcome.err().map(|stop| stop.to_string()).into_iter();
            let errors: Vec<String> = errors.chain(alarm.map(|alarm| alarm.text)).collect();
            let error = (!errors.is_empty()).then(|| errors.join("; "));
            state.dirty = true;
            if nothing_to_do {
                // Not a job: nobody is to take it for one that was done.
                state.running.remove(&key);
                None
            } else {
                state.end(key, error, receipt)
            }
        };
        self.keep(done);
        self.changed.notify_all();
    }

    /// Writes what came of a job into the SR's history.
    pub(super) fn keep(&self, done: Option<Done>) {
        if let Some(done) = done {
            self.note(done.kind.operation(), done.vdi, &done.job, &done);
        }
    }

    /// Writes there that a receipt is open: before the merge's first step, so
    /// that what nobody closes shows.
    fn note_open(&self, key: u64, opened: &Opened) {
        let vdi = self.state().running.get(&key).and_then(|doing| doing.nodes.first().copied());
        self.note("content-receipt", vdi.unwrap_or_default(), &opened.job, opened);
    }

    fn note(&self, operation: &'static str, vdi: Uuid, job: &str, what: &impl Serialize) {
        let kept = serde_json::to_string(what).map_err(|error| error.to_string()).and_then(|detail| {
            let event = Event { at_s: self.repo.ids.now_s(), operation, vdi, detail };
            self.repo.labels.note(&event).map_err(|error| error.to_string())
        });
        if let Err(error) = kept {
            tracing::warn!(sr = %self.repo.uuid, %vdi, %job, %error, "history not written");
        }
    }
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
