//! What a collector knows of itself: what runs, what waits, what was done.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Serialize;
use sm::journal::Intent;
use tapdisk_control::ImageRef;
use uuid::Uuid;
use vhd::storage::VolumeName;

use crate::backoff::Backoff;
use crate::budget::Budget;
use crate::collector::Scope;
use crate::forest::Forest;
use crate::job::Stop;
use crate::limits;
use crate::plan::Settings;
use crate::reason::Reason;
use crate::report::{Expected, Report};
use crate::retry::Retries;
use crate::watch::{Event, Ledger};

/// Kinds of work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Hidden nodes into their parent.
    Inner,
    /// A leaf into its parent.
    Leaf,
    /// Garbage.
    Delete,
}

impl Kind {
    /// What the history of an SR calls it.
    #[must_use]
    pub fn operation(self) -> &'static str {
        match self {
            Self::Inner => "coalesce",
            Self::Leaf => "leaf-coalesce",
            Self::Delete => "collect-garbage",
        }
    }
}

/// Work under way.
#[derive(Debug, Clone)]
pub struct Doing {
    /// What kind.
    pub kind: Kind,
    /// Nodes concerned, the one that names it first, the parent last.
    pub nodes: Vec<Uuid>,
    /// Its record, once that stands.
    pub intent: Option<Uuid>,
    /// Whether a tapdisk does it.
    pub attached: bool,
    /// When it began.
    pub began: Duration,
    /// The same on the wall clock, milliseconds since 1970.
    pub began_ms: u64,
    /// What it did so far.
    pub ledger: Ledger,
    /// It was told to stop.
    pub aborted: bool,
    /// VDIs of its tree that somebody waits for.
    pub focus: Vec<Uuid>,
    /// Bytes it may still gain on balance, as forecast.
    pub room: u64,
    /// What it was chosen by.
    pub expected: Option<Expected>,
}

/// What was done in the tree of a VDI that somebody waits for.
#[derive(Debug, Clone, Default)]
pub struct Focus {
    /// How many wait.
    pub waiters: usize,
    /// Counts of what was done.
    sums: Report,
    /// Bytes of what was done.
    room: Ledger,
}

/// Somebody who waits for the whole repository.
#[derive(Debug, Clone, Default)]
struct Waiter {
    /// Sums when they began to.
    before: Report,
    /// Bytes of everything since, for the peak over all jobs.
    room: Ledger,
}

impl Doing {
    /// Work that begins now.
    #[must_use]
    pub fn new(kind: Kind, nodes: Vec<Uuid>, now: Duration) -> Self {
        Self {
            kind,
            nodes,
            intent: None,
            attached: false,
            began: now,
            began_ms: wall_ms(),
            ledger: Ledger::default(),
            aborted: false,
            focus: Vec::new(),
            room: 0,
            expected: None,
        }
    }

    /// Bytes per second so far.
    #[must_use]
    pub fn rate(&self, now: Duration) -> f64 {
        self.ledger.done as f64 / now.saturating_sub(self.began).as_secs_f64().max(0.001)
    }
}

/// Work that ended.
#[derive(Debug, Clone, Serialize)]
pub struct Done {
    /// Names it: the intent, or a number for a deletion.
    pub job: String,
    /// The node that names it.
    pub vdi: Uuid,
    /// What kind.
    pub kind: Kind,
    /// When it began, milliseconds since 1970.
    pub began_ms: u64,
    /// When it ended, milliseconds since 1970.
    pub ended_ms: u64,
    /// Bytes read and written.
    pub bytes_copied: u64,
    /// Bytes shared.
    pub bytes_cloned: u64,
    /// Bytes of blocks that went away on balance.
    pub bytes_freed: u64,
    /// Most room needed beyond what was in use when it began.
    pub peak_extra_bytes: u64,
    /// Times space was given back before all was copied, as there was not
    /// enough of it; every leaf merge that we run ourselves does that.
    pub slices: u64,
    /// What it was expected to come to; not there for one that was carried on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub predicted: Option<Expected>,
    /// Why it ended early.
    pub error: Option<String>,
}

/// See the module.
#[derive(Debug)]
pub struct State {
    /// What may be chosen.
    pub settings: Settings,
    /// Shared by all merges that we run ourselves.
    pub budget: Budget,
    /// Bytes per second that were wished for; 0 is no limit.
    pub rate: u64,
    /// How much slower than calm a disk may get before merges step back; 0 is
    /// never.
    pub latency_factor: f64,
    /// What became of that.
    pub backoff: Backoff,
    /// Nothing is started.
    pub paused: bool,
    /// The thread is to end.
    pub closing: bool,
    /// Nothing is started before then: somebody aborted.
    pub quiet_until: Duration,
    /// Counts requests to look.
    pub asked: u64,
    /// The last of them that a round has answered.
    pub looked: u64,
    /// Something ended: look again.
    pub dirty: bool,
    /// A round is under way: what the last one found may be out of date.
    pub looking: bool,
    /// Failed merges.
    pub retries: Retries,
    /// Work under way, by key.
    pub running: BTreeMap<u64, Doing>,
    /// Why nodes wait, as of the last round.
    pub waits: BTreeMap<Uuid, Reason>,
    /// VDIs whose trees somebody waits for.
    pub focus: BTreeMap<Uuid, Focus>,
    /// Sums of everything since the collector was made.
    pub totals: Report,
    /// Work that ended, newest last; at most [`limits::DONE_KEPT`].
    pub done: VecDeque<Done>,
    /// The last failure of a round as a whole.
    pub round_error: Option<String>,
    /// Root of each node's tree, as of the last round.
    roots: BTreeMap<Uuid, Uuid>,
    /// Trees in which the last round found something to do.
    active: BTreeSet<Uuid>,
    /// The last round changed the forest itself.
    again: bool,
    /// Those who wait for the whole repository, by number.
    waiters: BTreeMap<u64, Waiter>,
    next_key: u64,
}

impl State {
    /// Nothing done, nothing known.
    #[must_use]
    pub fn new(settings: Settings, budget: Budget) -> Self {
        Self {
            settings,
            rate: budget.rate(),
            budget,
            latency_factor: limits::LATENCY_FACTOR,
            backoff: Backoff::default(),
            paused: false,
            closing: false,
            quiet_until: Duration::ZERO,
            asked: 1,
            looked: 0,
            dirty: false,
            looking: false,
            retries: Retries::default(),
            running: BTreeMap::new(),
            waits: BTreeMap::new(),
            focus: BTreeMap::new(),
            totals: Report::default(),
            done: VecDeque::new(),
            round_error: None,
            roots: BTreeMap::new(),
            active: BTreeSet::new(),
            again: false,
            waiters: BTreeMap::new(),
            next_key: 1,
        }
    }

    /// The budget becomes what is wished for, or less while merges are held
    /// back.
    pub(crate) fn apply_rate(&mut self, now: Duration) {
        let rate = match (self.rate, self.backoff.limit()) {
            (rate, None) => rate,
            (0, Some(limit)) => limit,
            (rate, Some(limit)) => rate.min(limit),
        };
        if self.budget.rate() != rate {
            self.budget.set_rate(rate, now);
        }
    }

    /// Bytes moved by all merges so far.
    pub(crate) fn moved(&self) -> u64 {
        let running = self.running.values().map(|doing| doing.ledger.copied + doing.ledger.cloned);
        self.totals.bytes_copied + self.totals.bytes_cloned + running.sum::<u64>()
    }

    pub(crate) fn begin(&mut self, doing: Doing) -> u64 {
        let key = self.next_key;
        self.next_key += 1;
        self.running.insert(key, doing);
        key
    }

    /// The record of a job stands; it tells what the job is.
    pub(crate) fn recorded(&mut self, key: u64, intent: &Intent) {
        let Some(doing) = self.running.get_mut(&key) else {
            return;
        };
        doing.intent = Some(intent.id());
        let uuid = |image: &ImageRef| VolumeName::new(&image.volume).and_then(|name| name.uuid());
        match intent {
            Intent::Inner(inner) => {
                doing.kind = Kind::Inner;
                let images = inner.nodes.iter().rev().chain([&inner.parent]);
                doing.nodes = images.filter_map(uuid).collect();
            }
            Intent::LeafMerge(leaf) => {
                doing.kind = Kind::Leaf;
                doing.nodes = [&leaf.leaf, &leaf.parent].into_iter().filter_map(uuid).collect();
            }
            _ => {}
        }
    }

    pub(crate) fn note(&mut self, key: u64, event: Event) {
        for waiter in self.waiters.values_mut() {
            waiter.room.note(event);
        }
        let Some(doing) = self.running.get_mut(&key) else {
            return;
        };
        doing.ledger.note(event);
        for vdi in &doing.focus {
            if let Some(focus) = self.focus.get_mut(vdi) {
                focus.room.note(event);
            }
        }
    }

    /// A merge was completed, or `deleted` nodes are gone.
    pub(crate) fn count(&mut self, key: u64, deleted: usize) {
        let Some(doing) = self.running.get(&key) else {
            return;
        };
        let focus = &mut self.focus;
        let focused = doing.focus.iter().filter_map(|vdi| {
            // Each VDI is in the list once, so no two of these are one.
            focus.remove(vdi).map(|one| (*vdi, one))
        });
        let mut focused: Vec<(Uuid, Focus)> = focused.collect();
        let sums = focused.iter_mut().map(|(_, one)| &mut one.sums);
        for sums in sums.chain([&mut self.totals]) {
            match doing.kind {
                // All nodes but the parent.
                Kind::Inner => sums.coalesced += doing.nodes.len().saturating_sub(1) as u64,
                Kind::Leaf => sums.leaf_coalesced += 1,
                Kind::Delete => sums.deleted += deleted as u64,
            }
        }
        self.focus.extend(focused);
    }

    /// Returns what is to be kept of it.
    pub(crate) fn end(&mut self, key: u64, error: Option<String>) -> Option<Done> {
        let doing = self.running.remove(&key)?;
        self.totals.bytes_copied += doing.ledger.copied;
        self.totals.bytes_cloned += doing.ledger.cloned;
        self.totals.bytes_freed += doing.ledger.net_freed();
        if self.done.len() == limits::DONE_KEPT {
            self.done.pop_front();
        }
        let done = Done {
            job: doing.intent.map_or_else(|| format!("{}-{key}", doing.began_ms), |id| id.to_string()),
            vdi: doing.nodes.first().copied().unwrap_or_default(),
            kind: doing.kind,
            began_ms: doing.began_ms,
            ended_ms: wall_ms(),
            bytes_copied: doing.ledger.copied,
            bytes_cloned: doing.ledger.cloned,
            bytes_freed: doing.ledger.net_freed(),
            peak_extra_bytes: doing.ledger.peak,
            slices: doing.ledger.slices,
            predicted: doing.expected,
            error,
        };
        self.done.push_back(done.clone());
        Some(done)
    }

    pub(crate) fn abort(&mut self, which: impl Fn(&Doing) -> bool) -> usize {
        let chosen = self.running.values_mut().filter(|doing| which(doing));
        chosen.map(|doing| doing.aborted = true).count()
    }

    /// Takes in what a round found.
    pub(crate) fn planned(
        &mut self,
        forest: &Forest,
        waits: BTreeMap<Uuid, Reason>,
        mut active: BTreeSet<Uuid>,
        again: bool,
        now: Duration,
    ) {
        self.roots = forest.nodes().map(|node| (node.uuid, forest.root(node.uuid))).collect();
        // What only has to wait a little, and what a running merge or the
        // number of them holds up, is still to come.
        for (node, reason) in &waits {
            let comes = match reason {
                Reason::Retry { attempts, .. } => *attempts < limits::AWAITED_ATTEMPTS,
                // What goes first where `ParentFirst` is said counts for
                // itself; it may be blocked, and would be awaited for ever.
                Reason::TreeBusy | Reason::Parallel { .. } => true,
                _ => false,
            };
            if comes {
                active.insert(forest.root(*node));
            }
        }
        for doing in self.running.values() {
            active.extend(doing.nodes.iter().map(|node| forest.root(*node)));
        }
        self.active = active;
        self.waits = waits;
        self.again = again;
        self.dirty |= again;
        self.round_error = None;
        let _ = now;
    }

    pub(crate) fn round_failed(&mut self, stop: &Stop) {
        self.round_error = Some(stop.to_string());
        self.active.clear();
        self.again = false;
    }

    /// Whether request `asked` was answered and nothing in its scope is left
    /// to be done.
    pub(crate) fn idle(&self, asked: u64, scope: Scope) -> bool {
        if self.looked < asked || self.dirty || self.again || self.looking {
            return false;
        }
        match scope {
            Scope::Sr => self.running.is_empty() && self.active.is_empty(),
            Scope::Vdi(vdi) => {
                let mut nodes = self.running.values().flat_map(|doing| &doing.nodes);
                !nodes.any(|node| self.same_tree(*node, vdi))
                    && self.roots.get(&vdi).is_none_or(|root| !self.active.contains(root))
            }
        }
    }

    /// Whether two nodes were in one tree in the last round.
    #[must_use]
    pub fn same_tree(&self, a: Uuid, b: Uuid) -> bool {
        a == b || self.roots.get(&a).is_some_and(|root| self.roots.get(&b) == Some(root))
    }

    pub(crate) fn focus_on(&mut self, vdi: Uuid) {
        let mut focus = self.focus.remove(&vdi).unwrap_or_default();
        focus.waiters += 1;
        // What runs already is waited for too, so it counts.
        let roots = &self.roots;
        let root = roots.get(&vdi);
        for doing in self.running.values_mut() {
            let here = |node: &Uuid| *node == vdi || (root.is_some() && roots.get(node) == root);
            if doing.nodes.iter().any(here) && !doing.focus.contains(&vdi) {
                doing.focus.push(vdi);
                focus.room.add(&doing.ledger);
            }
        }
        self.focus.insert(vdi, focus);
    }

    /// What was done in the VDI's tree since the first of those who wait for
    /// it began to.
    pub(crate) fn unfocus(&mut self, vdi: Uuid) -> Report {
        let Some(focus) = self.focus.get_mut(&vdi) else {
            return Report::default();
        };
        focus.waiters -= 1;
        let report = Report {
            bytes_copied: focus.room.copied,
            bytes_cloned: focus.room.cloned,
            bytes_freed: focus.room.net_freed(),
            peak_extra_bytes: focus.room.peak,
            ..focus.sums.clone()
        };
        if focus.waiters == 0 {
            self.focus.remove(&vdi);
        }
        report
    }

    /// Somebody waits for everything from now on; returns their number. What
    /// runs already is waited for too, so it counts.
    pub(crate) fn await_all(&mut self) -> u64 {
        let mut room = Ledger::default();
        self.running.values().for_each(|doing| room.add(&doing.ledger));
        let key = self.next_key;
        self.next_key += 1;
        self.waiters.insert(key, Waiter { before: self.totals.clone(), room });
        key
    }

    /// Free space that merges under way will still take.
    pub(crate) fn spoken_for(&self) -> u64 {
        let left = |doing: &Doing| doing.room.saturating_sub(doing.ledger.gained);
        self.running.values().map(left).sum()
    }

    /// What was done since a waiter began to wait.
    pub(crate) fn awaited(&mut self, waiter: u64) -> Report {
        let Some(Waiter { before, room }) = self.waiters.remove(&waiter) else {
            return Report::default();
        };
        Report {
            coalesced: self.totals.coalesced - before.coalesced,
            leaf_coalesced: self.totals.leaf_coalesced - before.leaf_coalesced,
            deleted: self.totals.deleted - before.deleted,
            bytes_copied: self.totals.bytes_copied - before.bytes_copied,
            bytes_cloned: self.totals.bytes_cloned - before.bytes_cloned,
            bytes_freed: room.net_freed(),
            peak_extra_bytes: room.peak,
            ..Report::default()
        }
    }

    /// Bytes per second to expect, for estimates: the budget, else what the
    /// last merges reached, else a guess.
    #[must_use]
    pub fn expected_rate(&self) -> f64 {
        let recent = self.done.iter().rev().filter(|done| done.bytes_copied > 0).take(10);
        let (bytes, ms) = recent.fold((0, 0), |(bytes, ms), done| {
            (bytes + done.bytes_copied, ms + done.ended_ms.saturating_sub(done.began_ms))
        });
        let reached = if bytes > 0 { bytes as f64 * 1000.0 / ms.max(1) as f64 } else { 200e6 };
        match self.budget.rate() {
            0 => reached,
            rate => reached.min(rate as f64),
        }
    }
}

fn wall_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
