//! The states a crash can leave.
//!
//! ```text
//!   log:   b0 e0 b1 b2 e2 | ...            b begin, e end
//!                         ^ prefix
//!   Kill:      volatile state, and of each operation in flight (1) any part
//!   PowerCut:  durable state, and of everything not yet certain (0, 1, 2)
//!              any part, bytes, lengths and names each on their own
//! ```
//!
//! What is uncertain is cut into *units*, each kept or lost as a whole (or,
//! for bytes, sector by sector): a change of names, the bytes of a write, a
//! zeroed range, a length. Two rules tie units together, because a journaling
//! filesystem writes its metadata in order: a change of names is lost with
//! any earlier change it builds on (one that touched a same name), and a
//! length is lost with any earlier length of the same file. Since units apply
//! in order and any of them may be lost, a sector can end as any value
//! written since it was last certain: a later write lost while an earlier one
//! is kept is what reordering looks like.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use rand::Rng;
use rand::rngs::SmallRng;
use rand::seq::IndexedRandom;

use super::disk::SimDisk;
use super::effect::{Change, Effect, Ino};
use super::sector::Content;
use super::state::{Inode, State};

/// No limit on space, in sectors.
pub(super) const UNLIMITED: u64 = u64::MAX >> 10;

/// What happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum CrashKind {
    /// All processes die; the kernel goes on, and so do the page cache and
    /// the run folder. A power cut can follow.
    Kill,
    /// The machine dies; the run folder is empty afterwards.
    PowerCut,
}

/// Which of the possible states.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Strategy {
    /// Only what is certain.
    AllLost,
    /// Everything, what is in flight included.
    AllKept,
    /// Everything but this unit and what needs it; see [`SimDisk::units`].
    OnlyLost(usize),
    /// This unit and what it needs.
    OnlyKept(usize),
    /// Each unit kept or lost.
    RandomPerOp,
    /// Each sector kept or lost.
    RandomPerSector,
}

/// What ties units together: a unit is lost with an earlier one of same key.
#[derive(PartialEq, Eq, PartialOrd, Ord, Clone)]
enum Key {
    Name(Arc<str>),
    Length(Ino),
}

/// Something that may be kept or lost.
struct Unit {
    effect: Effect,
}

impl Unit {
    fn keys(&self) -> Vec<Key> {
        match &self.effect {
            Effect::Name(op) => op.touches().cloned().map(Key::Name).collect(),
            Effect::Bytes(ino, Change::Len(_) | Change::Grow(_)) => vec![Key::Length(*ino)],
            Effect::Bytes(..) | Effect::Lasting(_) => Vec::new(),
        }
    }
}

/// What of the operations in flight could happen now.
fn flying(state: &State) -> impl Iterator<Item = Unit> {
    let flights = state.in_flight.values().filter(|flight| !flight.op.void);
    let effects = flights.flat_map(|flight| state.effects(&flight.op.what));
    effects.map(|effect| Unit { effect })
}

fn units(state: &State, kind: CrashKind) -> Vec<Unit> {
    let pending = match kind {
        CrashKind::Kill => &[][..],
        CrashKind::PowerCut => &state.pending[..],
    };
    let pending = pending.iter().map(|pending| Unit { effect: pending.effect.clone() });
    pending.chain(flying(state)).collect()
}

/// Decides for each unit whether it is kept, the two rules obeyed.
fn choose(units: &[Unit], strategy: Strategy, rng: &mut SmallRng) -> Vec<bool> {
    let odds = [0.1, 0.5, 0.9].choose(rng).copied().unwrap_or(0.5);
    let mut kept: Vec<bool> = (0..units.len())
        .map(|at| match strategy {
            Strategy::AllLost => false,
            Strategy::AllKept => true,
            Strategy::OnlyLost(lost) => at != lost,
            Strategy::OnlyKept(kept) => at == kept,
            Strategy::RandomPerOp | Strategy::RandomPerSector => rng.random_bool(odds),
        })
        .collect();
    let mut keys = BTreeSet::new();
    if let Strategy::OnlyKept(wanted) = strategy {
        // Backwards: what a kept unit builds on is kept.
        for at in (0..units.len().min(wanted + 1)).rev() {
            let own = units[at].keys();
            if kept[at] || own.iter().any(|key| keys.contains(key)) {
                kept[at] = true;
                keys.extend(own);
            }
        }
    } else {
        // Forwards: what builds on a lost unit is lost.
        for (unit, kept) in units.iter().zip(&mut kept) {
            let own = unit.keys();
            if !*kept || own.iter().any(|key| keys.contains(key)) {
                *kept = false;
                keys.extend(own);
            }
        }
    }
    kept
}

/// The part of a change of bytes that happens when each sector is decided on
/// its own.
fn torn(change: &Change, content: &Content, rng: &mut SmallRng) -> Change {
    let odds = [0.1, 0.5, 0.9].choose(rng).copied().unwrap_or(0.5);
    match change {
        Change::Data(values) => {
            let some = values.iter().filter(|_| rng.random_bool(odds));
            Change::Data(some.cloned().collect())
        }
        Change::Zero { first, end, keep } => {
            let zero = keep.then(super::sector::Sector::zero);
            let set = content.set_within(*first, *end).into_iter();
            let some = set.filter(|_| rng.random_bool(odds));
            Change::Data(some.map(|sector_no| (sector_no, zero.clone())).collect())
        }
        Change::Len(_) | Change::Grow(_) => change.clone(),
    }
}

/// All processes died: what is in flight happened in part, and all else is as
/// it was, the uncertainty of a later power cut included.
fn kill(state: &State, strategy: Strategy, rng: &mut SmallRng) -> State {
    let units = units(state, CrashKind::Kill);
    let mut after = state.clone();
    after.in_flight.clear();
    after.run.unmap();
    for (unit, kept) in units.iter().zip(decide(&units, strategy, rng)) {
        if !kept {
            continue;
        }
        let effect = match &unit.effect {
            Effect::Bytes(ino, change) if strategy == Strategy::RandomPerSector => {
                Effect::Bytes(*ino, torn(change, &after.content(*ino), rng))
            }
            effect => effect.clone(),
        };
        after.perform(effect);
    }
    after
}

/// As `choose`, but where sectors are decided one by one every change of
/// bytes gets its chance.
fn decide(units: &[Unit], strategy: Strategy, rng: &mut SmallRng) -> Vec<bool> {
    let mut kept = choose(units, strategy, rng);
    if strategy == Strategy::RandomPerSector {
        for (unit, kept) in units.iter().zip(&mut kept) {
            *kept |= matches!(&unit.effect, Effect::Bytes(_, Change::Data(_) | Change::Zero { .. }));
        }
    }
    kept
}

fn power_cut(state: &State, strategy: Strategy, rng: &mut SmallRng) -> State {
    let units = units(state, CrashKind::PowerCut);
    let kept = decide(&units, strategy, rng);
    let lasting = |unit: &Unit| matches!(unit.effect, Effect::Lasting(_));
    let lasted = units.iter().zip(&kept).any(|(unit, kept)| *kept && lasting(unit));
    let after = lasted.then(|| {
        let mut after = state.clone();
        let kept = units.iter().zip(&kept).filter(|(unit, kept)| **kept && lasting(unit));
        kept.for_each(|(unit, _)| after.perform(unit.effect.clone()));
        after
    });
    let state = after.as_ref().unwrap_or(state);
    let mut names = state.durable_names.clone();
    let mut changed: BTreeMap<Ino, Arc<Content>> = BTreeMap::new();
    for (unit, kept) in units.iter().zip(kept) {
        match &unit.effect {
            _ if !kept => {}
            Effect::Lasting(_) => {}
            Effect::Name(op) => op.apply(&mut names),
            Effect::Bytes(ino, change) => {
                let content = changed.entry(*ino).or_insert_with(|| durable(state, *ino));
                let content = Arc::make_mut(content);
                if strategy == Strategy::RandomPerSector {
                    torn(change, content, rng).apply(content);
                } else {
                    change.apply(content);
                }
            }
        }
    }
    let mut inodes = BTreeMap::new();
    for ino in names.values() {
        let content = match changed.remove(ino) {
            Some(mut content) => {
                Arc::make_mut(&mut content).cut();
                content
            }
            None if inodes.contains_key(ino) => continue,
            None => durable(state, *ino),
        };
        inodes.insert(*ino, Inode { durable: content.clone(), volatile: content });
    }
    let last = names.values().map(|ino| ino.0).max().unwrap_or(0);
    State {
        durable_names: names.clone(),
        names,
        folders: state.folders.clone(),
        devices: state.devices.clone(),
        litter: state.litter.clone(),
        records: state.records.clone(),
        inodes,
        next_ino: state.next_ino.max(last + 1),
        next_seq: state.next_seq,
        ..State::default()
    }
}

fn durable(state: &State, ino: Ino) -> Arc<Content> {
    state.inodes.get(&ino).map(|inode| inode.durable.clone()).unwrap_or_default()
}

impl SimDisk {
    /// A fresh machine in a state that a crash after the first `prefix`
    /// events could leave, with an empty log and no locks. Going through
    /// prefixes in order is cheapest.
    #[must_use]
    pub fn crash(&self, prefix: usize, kind: CrashKind, rng: &mut SmallRng, strategy: Strategy) -> Self {
        self.at(prefix, |state, family| {
            let after = match kind {
                CrashKind::Kill => kill(state, strategy, rng),
                CrashKind::PowerCut => power_cut(state, strategy, rng),
            };
            Self::over(after, family)
        })
    }

    /// How many units are uncertain at this instant: the bound of the numbers
    /// in [`Strategy::OnlyLost`] and [`Strategy::OnlyKept`].
    #[must_use]
    pub fn units(&self, prefix: usize, kind: CrashKind) -> usize {
        self.at(prefix, |state, _| units(state, kind).len())
    }

    /// The strategies worth trying at this instant: the two extremes, each
    /// unit alone lost and alone kept (at most `singles_max` of each, spread
    /// evenly over the units), and `randoms` of both random kinds. One that can show nothing new is left out.
    #[must_use]
    pub fn strategies(
        &self,
        prefix: usize,
        kind: CrashKind,
        singles_max: usize,
        randoms: usize,
    ) -> Vec<Strategy> {
        let units = self.units(prefix, kind);
        let mut all = vec![Strategy::AllLost];
        if units == 0 {
            return all;
        }
        all.push(Strategy::AllKept);
        let singles = units.min(singles_max);
        for single in (0..singles).map(|n| n * units / singles) {
            all.push(Strategy::OnlyLost(single));
            all.push(Strategy::OnlyKept(single));
        }
        for _ in 0..randoms {
            all.push(Strategy::RandomPerOp);
            all.push(Strategy::RandomPerSector);
        }
        all
    }

    fn at<T>(&self, prefix: usize, act: impl FnOnce(&State, Arc<super::live::Family>) -> T) -> T {
        self.with(|live| {
            let family = live.family.clone();
            act(live.at(prefix), family)
        })
    }
}
