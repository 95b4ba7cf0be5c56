//! What a collector knows of itself: what runs, what waits, what was done.

mod doing;
mod looked;
mod totals;
mod waiting;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use sm::journal::Intent;
use tapdisk_control::ImageRef;
use uuid::Uuid;
use vhd::storage::VolumeName;

use crate::backoff::Backoff;
use crate::budget::Budget;
use crate::forest::Forest;
use crate::limits;
use crate::plan::{Holds, Settings};
use crate::reason::Reason;
use crate::receipt::{Alarm, Found, Receipt, Verdict};
use crate::report::Report;
use crate::retry::Retries;
use crate::unwritten;
use crate::watch::Event;

use self::doing::wall_ms;
pub use self::doing::{Doing, Done, Kind, Reading};
pub use self::looked::{BrokenOff, LookFailed};
pub use self::totals::Totals;
pub use self::waiting::Focus;
use self::waiting::Waiter;

/// Sums of receipts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ReceiptTotals {
    /// Blocks that read the same.
    pub matched: u64,
    /// Blocks that guests wrote meanwhile.
    pub written: u64,
    /// Blocks that differ.
    pub different: u64,
    /// Disks that cannot be read any more.
    pub unreadable: u64,
    /// Disks of which nothing can be said.
    pub void: u64,
}

impl ReceiptTotals {
    fn add(&mut self, receipt: &Receipt) {
        for disk in &receipt.disks {
            match &disk.verdict {
                Verdict::Same(Found { matched, written, different, .. })
                | Verdict::Different(Found { matched, written, different, .. }) => {
                    self.matched += matched;
                    self.written += written;
                    self.different += different;
                }
                Verdict::Unreadable { .. } => self.unreadable += 1,
                Verdict::Void { .. } => self.void += 1,
            }
        }
    }
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
    /// Differences nobody has said anything to yet, by job.
    pub alarms: BTreeMap<String, Alarm>,
    /// What all receipts came to.
    pub receipt_totals: ReceiptTotals,
    /// Between two rounds that nobody asked for.
    pub look_every: Duration,
    /// Nothing is started.
    pub paused: bool,
    /// Disks whose leaves are left alone.
    pub off: BTreeSet<Uuid>,
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
    /// Space that nobody wrote, given back.
    pub unwritten: unwritten::Progress,
    /// The last failure of a round as a whole.
    pub round_error: Option<LookFailed>,
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
            alarms: BTreeMap::new(),
            receipt_totals: ReceiptTotals::default(),
            look_every: limits::LOOK_EVERY,
            paused: false,
            off: BTreeSet::new(),
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
            unwritten: unwritten::Progress::default(),
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

    /// The merges that are switched off, as the planner wants them.
    pub(crate) fn switched_off(&self) -> Holds {
        self.off.iter().map(|vdi| (*vdi, Reason::SwitchedOff { vdi: *vdi })).collect()
    }

    /// Bytes moved by all merges so far.
    pub(crate) fn moved(&self) -> u64 {
        let running = self.running.values().map(|doing| doing.ledger.copied + doing.ledger.cloned);
        self.totals.bytes_copied + self.totals.bytes_cloned + running.sum::<u64>()
    }

    /// Bytes per second for a merge that its tapdisk runs, an even share of what
    /// all merges have; 0 is no limit. What it moves is paid for by the others:
    /// see [`Watch::moved`](crate::watch::Watch::moved).
    pub(crate) fn live_rate(&self) -> u64 {
        let merges = |doing: &&Doing| doing.kind != Kind::Delete && doing.reading.is_none();
        let sharing = self.running.values().filter(merges).count() as u64;
        self.budget.rate().div_ceil(sharing.max(1))
    }

    /// Disks whose trees wait for a person, with the job.
    pub(crate) fn alarmed(&self) -> Vec<(Uuid, String)> {
        let of =
            |alarm: &Alarm| alarm.disks.iter().map(|disk| (*disk, alarm.job.clone())).collect::<Vec<_>>();
        self.alarms.values().flat_map(of).collect()
    }

    pub(crate) fn begin(&mut self, doing: Doing) -> u64 {
        let key = self.next_key;
        self.next_key += 1;
        self.running.insert(key, doing);
        key
    }

    /// The record of a job stands; it tells what the job is.
    pub(crate) fn recorded(&mut self, key: u64, intent: &Intent, now: Duration) {
        let Some(doing) = self.running.get_mut(&key) else {
            return;
        };
        doing.intent = Some(intent.id());
        doing.reading = None;
        // What was read for the receipt is not what the merge is slow by.
        doing.began = now;
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
    pub(crate) fn end(&mut self, key: u64, error: Option<String>, receipt: Option<Receipt>) -> Option<Done> {
        let doing = self.running.remove(&key)?;
        if let Some(receipt) = &receipt {
            self.receipt_totals.add(receipt);
            self.totals.receipt_bytes_read += receipt.bytes_read;
            for vdi in &doing.focus {
                if let Some(focus) = self.focus.get_mut(vdi) {
                    focus.sums.receipt_bytes_read += receipt.bytes_read;
                }
            }
        }
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
            receipt,
            error,
        };
        self.done.push_back(done.clone());
        Some(done)
    }

    /// As [`Self::abort`], and no failure for that.
    pub(crate) fn hold(&mut self, which: impl Fn(&Doing) -> bool) -> usize {
        self.running.values_mut().filter(|doing| which(doing)).for_each(|doing| doing.held = true);
        self.abort(which)
    }

    /// Time until merges begin again that somebody has stopped; 0 is now.
    #[must_use]
    pub fn quiet_left(&self, now: Duration) -> Duration {
        self.quiet_until.saturating_sub(now)
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
    }

    /// Free space that merges under way will still take.
    pub(crate) fn spoken_for(&self) -> u64 {
        let left = |doing: &Doing| doing.room.saturating_sub(doing.ledger.gained);
        self.running.values().map(left).sum()
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
