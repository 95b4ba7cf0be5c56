//! The thread: look, plan, start what was chosen.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use uuid::Uuid;

use super::Collector;
use crate::cost;
use crate::forest::{Claim, Forest};
use crate::garbage;
use crate::job::Result;
use crate::job_watch::JobWatch;
use crate::limits;
use crate::plan::{Choice, Merge, Settings, View, plan};
use crate::progress::{Doing, Kind, State};
use crate::reason::Reason;
use crate::survey;
use crate::unwritten;

/// Why no merge may begin at all, if so.
fn hold_of(state: &State, now: Duration) -> Option<Reason> {
    let left = state.quiet_left(now);
    match (state.paused, left.is_zero()) {
        (true, _) => Some(Reason::Paused),
        (false, true) => None,
        (false, false) => Some(Reason::Quiet { left_s: left.as_secs() + 1 }),
    }
}

impl Collector {
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
            threads.retain(|thread: &JoinHandle<()>| !thread.is_finished());
            let mut state = self.state();
            state.looked = asked;
            state.looking = false;
            self.changed.notify_all();
            let now = self.now();
            let next = state.retries.next(now).unwrap_or(state.look_every);
            let quiet = state.quiet_left(now);
            let until = now + next.min(state.look_every).max(quiet.min(limits::LOOK_EVERY));
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
    fn round(self: &Arc<Self>, threads: &mut Vec<JoinHandle<()>>) -> Result<()> {
        self.recover()?;
        let mut forest = survey::glance(&self.repo)?;
        let spoken_for = self.state().spoken_for();
        forest.free_bytes = forest.free_bytes.saturating_sub(spoken_for);
        let running = self.claim_running(&mut forest);
        let (planned, held) = {
            let state = self.state();
            let now = self.now();
            let mut holds = state.retries.holds(now);
            holds.extend(state.switched_off());
            let hold = hold_of(&state, now);
            let settings = Settings {
                // Nothing may start: the planner then says why for each.
                parallel: if hold.is_some() { 0 } else { state.settings.parallel },
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
            if let Some(hold) = &hold {
                let held = planned.waits.values_mut().filter(|why| matches!(why, Reason::Parallel { .. }));
                held.for_each(|why| *why = hold.clone());
            }
            (planned, hold.is_some())
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
                Choice::Resume { .. } | Choice::Begin { .. } if held => {}
                Choice::Resume { .. } | Choice::Begin { .. } => {
                    active.extend(cost::choice_tree(&forest, choice));
                    threads.extend(self.start(choice.clone(), &forest));
                }
            }
        }
        if !held && !self.state().paused {
            self.give_back(&forest);
        }
        let deleted = planned.choices.iter().any(|choice| matches!(choice, Choice::Delete { .. }))
            && !self.state().paused;
        self.state().planned(&forest, planned.waits, active, deleted);
        Ok(())
    }

    /// Gives back what nobody wrote, where space is short, for a moment; the
    /// next round goes on.
    fn give_back(&self, forest: &Forest) {
        let until = self.now() + limits::GIVE_BACK_TIME;
        while self.now() < until && !self.state().closing {
            let Some((node, from)) = self.state().unwritten.next(forest) else { return };
            let unlock = self.now() + limits::GIVE_BACK_LOCKED;
            let go_on = || self.now() < unlock;
            let (bytes, next) = unwritten::give_back(&self.repo, node, from, &go_on).unwrap_or_else(|stop| {
                tracing::info!(sr = %self.repo.uuid, vdi = %node, error = %stop, "nothing given back");
                (0, None)
            });
            if bytes > 0 {
                tracing::info!(sr = %self.repo.uuid, vdi = %node, bytes, "space that nobody wrote: given back");
            }
            self.state().unwritten.went_on(node, bytes, next);
            std::thread::sleep(limits::GIVE_BACK_LOCKED);
        }
        self.state().dirty = true;
    }

    /// Adds claims for merges whose record does not stand while they read disks
    /// for their receipts, and the alarms. Returns what names the running ones.
    fn claim_running(&self, forest: &mut Forest) -> BTreeSet<Uuid> {
        let state = self.state();
        let mut running = BTreeSet::new();
        for (key, doing) in state.running.iter().filter(|(_, doing)| doing.kind != Kind::Delete) {
            // No intent is called so: their ids are random.
            let id = doing.intent.unwrap_or_else(|| Uuid::from_u64_pair(0, *key));
            running.insert(id);
            if forest.claims.iter().all(|claim| claim.id != id) {
                let nodes = doing.nodes.iter().copied().filter(|node| forest.node(*node).is_some()).collect();
                forest.claims.push(Claim { id, nodes, merge: true });
            }
        }
        forest.alarms = state.alarmed();
        running
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
    pub(super) fn doing(&self, kind: Kind, nodes: Vec<Uuid>, forest: &Forest) -> Doing {
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
                let done = state.end(key, None, None);
                drop(state);
                self.keep(done);
                Ok(())
            }
            Err(stop) => {
                let done = state.end(key, Some(stop.to_string()), None);
                drop(state);
                self.keep(done);
                Err(stop)
            }
        }
    }
}
