//! What the simulated machine holds at one instant, and how an event
//! changes it.
//!
//! ```text
//!   volatile   what a reader sees now (page cache)
//!      |  pending: completed, in order, not yet covered by a flush or sync
//!   durable    what is certain after a power cut
//!   in flight  begun, not completed: no effect on readers yet
//! ```
//!
//! The live disk and every replay of its log run through [`State::apply`], so
//! a replayed prefix cannot differ from what really happened.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::effect::{Change, Effect, Ino, Lasting, NameOp, Names, folder_of, hash_names};
use super::log::{Event, Op, OpNo, Outcome, What};
use super::run::RunState;
use super::sector::{Content, Litter, SECTOR, Slot, hash_bytes, mix};

#[derive(Clone)]
pub(super) struct Pending {
    /// Completion order.
    pub(super) seq: u64,
    pub(super) effect: Effect,
    /// A flush that should have covered it failed: the kernel has dropped it
    /// from its list, no later flush writes it.
    pub(super) dead: bool,
}

#[derive(Clone, Default)]
pub(super) struct Inode {
    pub(super) durable: Arc<Content>,
    pub(super) volatile: Arc<Content>,
}

#[derive(Clone)]
pub(super) struct InFlight {
    pub(super) op: Arc<Op>,
    /// Effects with a smaller number completed before this was begun.
    pub(super) begun_at: u64,
}

/// Everything at one instant. Copies share what they can.
#[derive(Clone, Default)]
pub(super) struct State {
    pub(super) durable_names: Names,
    pub(super) names: Names,
    pub(super) folders: BTreeSet<Arc<str>>,
    pub(super) devices: BTreeSet<Ino>,
    /// What lies in the space of new devices; `None`: this machine's volumes
    /// are files.
    pub(super) litter: Option<Litter>,
    /// Records of a volume manager, by name.
    pub(super) records: BTreeMap<Arc<str>, Arc<[u8]>>,
    pub(super) inodes: BTreeMap<Ino, Inode>,
    pub(super) pending: Vec<Pending>,
    pub(super) in_flight: BTreeMap<OpNo, InFlight>,
    pub(super) run: RunState,
    pub(super) next_ino: u64,
    pub(super) next_seq: u64,
}

impl State {
    /// The one transition.
    pub(super) fn apply(&mut self, event: &Event) {
        match event {
            Event::Begin(no, op) => {
                let begun_at = self.next_seq;
                let op = op.clone();
                self.in_flight.insert(*no, InFlight { op, begun_at });
            }
            Event::End(no, outcome) => {
                let Some(flight) = self.in_flight.remove(no) else {
                    return;
                };
                match outcome {
                    Outcome::Done if flight.op.void => {}
                    Outcome::Done => self.complete(&flight),
                    Outcome::Failed => self.fail(&flight),
                }
            }
            Event::Run(event) => self.run.apply(event),
            Event::Mark(_) => {}
        }
    }

    fn complete(&mut self, flight: &InFlight) {
        match &flight.op.what {
            What::Flush { ino } => self.flush(*ino, flight.begun_at),
            What::SyncNames { folder } => self.sync_names(folder, flight.begun_at),
            What::MakeFolder { folder } => {
                self.folders.insert(folder.clone());
            }
            what => {
                for effect in self.effects(what) {
                    self.perform(effect);
                }
            }
        }
    }

    /// A change that is durable once it shows. What is on a device's new
    /// space has always been there.
    fn last(&mut self, change: &Lasting) {
        match change {
            Lasting::Make { path, ino, len } => {
                let litter = self.litter.clone().unwrap_or_else(|| Litter::new(0, &[]));
                let content = Arc::new(Content::littered(litter, *len));
                self.inodes.insert(*ino, Inode { durable: content.clone(), volatile: content });
                self.devices.insert(*ino);
                self.next_ino = self.next_ino.max(ino.0 + 1);
                self.names.insert(path.clone(), *ino);
                self.durable_names.insert(path.clone(), *ino);
            }
            Lasting::Resize { ino, len } => {
                let inode = self.inodes.entry(*ino).or_default();
                for content in [&mut inode.durable, &mut inode.volatile] {
                    Arc::make_mut(content).resize_device(*len);
                }
            }
            Lasting::Rename { from, to } => {
                for names in [&mut self.names, &mut self.durable_names] {
                    if let Some(ino) = names.remove(from) {
                        names.insert(to.clone(), ino);
                    }
                }
            }
            Lasting::Remove { path } => {
                self.names.remove(path);
                self.durable_names.remove(path);
                self.forget_unreachable();
            }
            Lasting::PutRecord { name, bytes } => {
                self.records.insert(name.clone(), bytes.clone());
            }
            Lasting::RenameRecord { from, to } => {
                if let Some(bytes) = self.records.remove(from) {
                    self.records.insert(to.clone(), bytes);
                }
            }
            Lasting::RemoveRecord { name } => {
                self.records.remove(name);
            }
        }
    }

    /// Shows an effect to readers and remembers that it is not durable, unless
    /// it is.
    pub(super) fn perform(&mut self, effect: Effect) {
        match &effect {
            Effect::Lasting(change) => return self.last(change),
            Effect::Name(op) => {
                op.apply(&mut self.names);
                if let NameOp::Add { ino, .. } = op {
                    self.next_ino = self.next_ino.max(ino.0 + 1);
                }
            }
            Effect::Bytes(ino, change) => {
                let inode = self.inodes.entry(*ino).or_default();
                change.apply(Arc::make_mut(&mut inode.volatile));
            }
        }
        let seq = self.next_seq;
        self.next_seq += 1;
        self.pending.push(Pending { seq, effect, dead: false });
    }

    /// What an operation does if it completes now. Length and bytes of a
    /// write are separate: a power cut may take either.
    pub(super) fn effects(&self, what: &What) -> Vec<Effect> {
        match what {
            What::Write { ino, offset, bytes } => self.write(*ino, bytes, *offset),
            What::Zero { ino, offset, len, keep } => self.zero(*ino, *offset, *len, *keep),
            What::SetLen { ino, len } => vec![Effect::Bytes(*ino, Change::Len(*len))],
            What::Copy { from, from_at, to, to_at, len } => self.copy(*from, *from_at, *to, *to_at, *len),
            What::Create { path, ino } => {
                let (to, ino, from) = (path.clone(), *ino, None);
                vec![Effect::Name(NameOp::Add { to, ino, from })]
            }
            What::Link { from, to } => {
                self.name_op(from, |ino| NameOp::Add { to: to.clone(), ino, from: Some(from.clone()) })
            }
            What::Rename { from, to } => {
                self.name_op(from, |ino| NameOp::Rename { from: from.clone(), to: to.clone(), ino })
            }
            What::Unlink { path } => self.name_op(path, |_| NameOp::Remove { name: path.clone() }),
            What::Flush { .. } | What::SyncNames { .. } | What::MakeFolder { .. } => Vec::new(),
            What::Lasting(change) => vec![Effect::Lasting(change.clone())],
        }
    }

    fn name_op(&self, name: &str, op: impl FnOnce(Ino) -> NameOp) -> Vec<Effect> {
        let op = self.names.get(name).map(|ino| Effect::Name(op(*ino)));
        op.into_iter().collect()
    }

    pub(super) fn content(&self, ino: Ino) -> Arc<Content> {
        self.inodes.get(&ino).map(|inode| inode.volatile.clone()).unwrap_or_default()
    }

    fn write(&self, ino: Ino, bytes: &[u8], offset: u64) -> Vec<Effect> {
        if bytes.is_empty() {
            return Vec::new();
        }
        let content = self.content(ino);
        self.put(ino, content.written(bytes, offset), offset + bytes.len() as u64)
    }

    /// Sector values, and the new length if they reach past the end.
    fn put(&self, ino: Ino, values: Vec<(u64, Slot)>, end: u64) -> Vec<Effect> {
        let mut effects = Vec::new();
        if end > self.content(ino).len {
            effects.push(Effect::Bytes(ino, Change::Grow(end)));
        }
        effects.push(Effect::Bytes(ino, Change::Data(values.into())));
        effects
    }

    /// Whole sectors as a range, edges as written zeros; never past the end.
    fn zero(&self, ino: Ino, offset: u64, len: u64, keep: bool) -> Vec<Effect> {
        let content = self.content(ino);
        let keep = keep || self.devices.contains(&ino);
        let end = offset.saturating_add(len).min(content.len);
        if offset >= end {
            return Vec::new();
        }
        let (first, last) = (offset.div_ceil(SECTOR), end / SECTOR);
        let zeros = |from: u64, to: u64| {
            let zeros = vec![0; usize::try_from(to - from).unwrap_or(0)];
            Effect::Bytes(ino, Change::Data(content.written(&zeros, from).into()))
        };
        if first > last {
            return vec![zeros(offset, end)];
        }
        let mut effects = Vec::new();
        if offset < first * SECTOR {
            effects.push(zeros(offset, first * SECTOR));
        }
        if first < last {
            effects.push(Effect::Bytes(ino, Change::Zero { first, end: last, keep }));
        }
        if last * SECTOR < end {
            effects.push(zeros(last * SECTOR, end));
        }
        effects
    }

    /// Holes stay holes where sectors line up.
    fn copy(&self, from: Ino, from_at: u64, to: Ino, to_at: u64, len: u64) -> Vec<Effect> {
        if len == 0 {
            return Vec::new();
        }
        let source = self.content(from);
        if [from_at, to_at, len].iter().all(|n| n.is_multiple_of(SECTOR)) {
            let (first, to_first) = (from_at / SECTOR, to_at / SECTOR);
            let values = (0..len / SECTOR).map(|i| (to_first + i, source.slot(first + i)));
            return self.put(to, values.collect(), to_at + len);
        }
        let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
        source.read(&mut bytes, from_at);
        self.write(to, &bytes, to_at)
    }

    /// Exactly what completed before the flush began becomes certain, in the
    /// order of completion; what a failed flush dropped stays lost.
    fn flush(&mut self, ino: Ino, begun_at: u64) {
        let Some(inode) = self.inodes.get_mut(&ino) else {
            return;
        };
        let durable = Arc::make_mut(&mut inode.durable);
        let mut dropped = false;
        self.pending.retain(|pending| match &pending.effect {
            Effect::Bytes(of, change) if *of == ino && pending.seq < begun_at => {
                if !pending.dead {
                    change.apply(durable);
                }
                dropped |= pending.dead;
                false
            }
            _ => true,
        });
        if dropped {
            // A length among them leaves bytes past the end.
            durable.cut();
        }
    }

    /// Name changes in this folder become certain, and what they build on.
    fn sync_names(&mut self, folder: &str, begun_at: u64) {
        let mut needed: BTreeSet<Arc<str>> = BTreeSet::new();
        let mut synced = BTreeSet::new();
        for pending in self.pending.iter().rev().filter(|p| p.seq < begun_at) {
            if let Effect::Name(op) = &pending.effect
                && op.touches().any(|name| folder_of(name) == folder || needed.contains(name))
            {
                needed.extend(op.touches().cloned());
                synced.insert(pending.seq);
            }
        }
        let names = &mut self.durable_names;
        self.pending.retain(|pending| match &pending.effect {
            Effect::Name(op) if synced.contains(&pending.seq) => {
                op.apply(names);
                false
            }
            _ => true,
        });
        self.forget_unreachable();
    }

    /// Bytes of files that no name can lead to any more, whatever is lost,
    /// matter to no crash.
    fn forget_unreachable(&mut self) {
        let mut reachable: BTreeSet<Ino> = self.names.values().copied().collect();
        reachable.extend(self.durable_names.values().copied());
        reachable.extend(self.pending.iter().filter_map(|pending| match &pending.effect {
            Effect::Name(NameOp::Add { ino, .. } | NameOp::Rename { ino, .. }) => Some(*ino),
            _ => None,
        }));
        self.pending.retain(|pending| match &pending.effect {
            Effect::Bytes(ino, _) => reachable.contains(ino),
            Effect::Name(_) | Effect::Lasting(_) => true,
        });
    }

    /// A failed flush: nothing it should have covered will be written by a
    /// later one. Anything else that fails has no effect.
    fn fail(&mut self, flight: &InFlight) {
        let What::Flush { ino } = flight.op.what else {
            return;
        };
        for pending in &mut self.pending {
            let covered = pending.seq < flight.begun_at;
            if covered && matches!(&pending.effect, Effect::Bytes(of, _) if *of == ino) {
                pending.dead = true;
            }
        }
    }

    /// A hash of all that a recovery can see: names, which of them lead to
    /// one file, lengths, bytes, the run folder.
    pub(super) fn hash(&self) -> u128 {
        let shown = |ino| self.content(ino).hash();
        let record = |hash, (name, bytes): (&Arc<str>, &Arc<[u8]>)| {
            mix(mix(hash, hash_bytes(name.as_bytes())), hash_bytes(bytes))
        };
        let records = self.records.iter().fold(0, record);
        mix(self.run.hash(), hash_names(&self.names, shown)) ^ records
    }

    /// The same, and what is durable and what is not yet. Files are told
    /// apart by number here, so states that differ in numbers alone count
    /// twice.
    pub(super) fn full_hash(&self) -> u128 {
        let durable = |ino| self.inodes.get(&ino).map_or(0, |inode| inode.durable.hash());
        let mut hash = mix(self.hash(), hash_names(&self.durable_names, durable));
        for pending in &self.pending {
            hash = mix(hash, pending.effect.hash() ^ u128::from(pending.dead));
        }
        let flying = self.in_flight.values().flat_map(|flight| self.effects(&flight.op.what));
        flying.fold(hash, |hash, effect| mix(hash, effect.hash()))
    }
}
