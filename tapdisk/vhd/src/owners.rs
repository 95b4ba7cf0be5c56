//! Who owns which sectors of one block: bitmaps of several levels, resolved.
//!
//! Absent on purpose: I/O. Whoever has the bitmaps asks.

use std::sync::Arc;

use crate::bitmap::SectorBitmap;
use crate::chain::Place;
use crate::units::{BLOCK_SECTORS, SectorRun, Slot};

/// Who owns a run of sectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Owner {
    /// Nobody: it reads as zeros.
    Zero,
    /// This level, at this slot.
    Node {
        /// The level, as in [`Place`].
        node: u8,
        /// Where it has the block.
        slot: Slot,
    },
}

/// A run of sectors of one block with one owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OwnerRun {
    /// Which sectors.
    pub run: SectorRun,
    /// Whose.
    pub owner: Owner,
}

/// Resolves a block: which level owns which run. `places` with the bitmap of
/// each that is not whole, topmost first; bits past a level's virtual size
/// must have been cleared. The runs cover the block in order, neighbours
/// differ.
#[must_use]
pub fn resolve(places: &[(Place, SectorBitmap)]) -> Vec<OwnerRun> {
    let mut runs = vec![OwnerRun { run: SectorRun::BLOCK, owner: Owner::Zero }];
    for (place, bitmap) in places {
        let owner = Owner::Node { node: place.node, slot: place.slot };
        let mut next: Vec<OwnerRun> = Vec::with_capacity(runs.len());
        for part in runs {
            if part.owner != Owner::Zero {
                push_run(&mut next, part);
                continue;
            }
            for bits in bitmap.runs(part.run) {
                let owner = if bits.present { owner } else { Owner::Zero };
                push_run(&mut next, OwnerRun { run: bits.run, owner });
            }
        }
        runs = next;
    }
    runs
}

/// Puts one more level over a resolved block: what it has is its own, all else
/// stays as `runs` say.
#[must_use]
pub fn overlay(place: Place, bitmap: &SectorBitmap, runs: &[OwnerRun]) -> Vec<OwnerRun> {
    let own = Owner::Node { node: place.node, slot: place.slot };
    let mut next = Vec::with_capacity(runs.len() + 2);
    for part in runs {
        for bits in bitmap.runs(part.run) {
            push_run(
                &mut next,
                OwnerRun { run: bits.run, owner: if bits.present { own } else { part.owner } },
            );
        }
    }
    next
}

fn push_run(runs: &mut Vec<OwnerRun>, part: OwnerRun) {
    match runs.last_mut() {
        Some(last) if last.owner == part.owner => last.run.count += part.run.count,
        _ => runs.push(part),
    }
}

/// The owners of one block as they are kept in memory: eight bytes a run, and
/// a clone costs nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockOwners(Arc<[KeptRun]>);

/// A run up to where the next one begins, or the block ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct KeptRun {
    slot: Slot,
    first: u16,
    node: u8,
    /// Whether `node` has it, at `slot`; otherwise nobody.
    owned: bool,
}

const _: () = assert!(size_of::<KeptRun>() == BlockOwners::RUN_BYTES);

impl BlockOwners {
    /// Memory a run takes, in bytes.
    pub const RUN_BYTES: usize = 8;

    /// Keeps `runs`, which cover the block in order, as [`resolve`] gives them.
    #[must_use]
    pub fn new(runs: &[OwnerRun]) -> Self {
        let kept = runs.iter().map(|part| {
            // A sector's number in its block has twelve bits.
            let first = u16::try_from(part.run.first).unwrap_or(u16::MAX);
            match part.owner {
                Owner::Zero => KeptRun { slot: Slot(0), first, node: 0, owned: false },
                Owner::Node { node, slot } => KeptRun { slot, first, node, owned: true },
            }
        });
        Self(kept.collect())
    }

    /// Number of runs.
    #[must_use]
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// All runs, in order.
    pub fn runs(&self) -> impl Iterator<Item = OwnerRun> + '_ {
        self.within(SectorRun::BLOCK)
    }

    /// The owners of the sectors of `run`, in order.
    pub fn within(&self, run: SectorRun) -> impl Iterator<Item = OwnerRun> + '_ {
        let after = self.0.partition_point(|kept| u32::from(kept.first) <= run.first);
        let parts = self.0.get(after.saturating_sub(1)..).unwrap_or_default();
        let ends = parts.iter().skip(1).map(|next| u32::from(next.first)).chain([BLOCK_SECTORS]);
        parts.iter().zip(ends).map_while(move |(kept, end)| {
            let first = run.first.max(u32::from(kept.first));
            let end = run.end().min(end);
            let owner =
                if kept.owned { Owner::Node { node: kept.node, slot: kept.slot } } else { Owner::Zero };
            (first < end).then(|| OwnerRun { run: SectorRun { first, count: end - first }, owner })
        })
    }
}

/// Clears bits from `sectors` on.
pub fn clip(bitmap: &mut SectorBitmap, sectors: u32) {
    if sectors < BLOCK_SECTORS {
        bitmap.clear(SectorRun { first: sectors, count: BLOCK_SECTORS - sectors });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bits(runs: &[(u32, u32)]) -> SectorBitmap {
        let mut map = SectorBitmap::EMPTY;
        for &(first, count) in runs {
            map.set(SectorRun { first, count });
        }
        map
    }

    fn place(node: u8) -> Place {
        Place { node, whole: false, slot: Slot(u32::from(node) * 5000 + 7) }
    }

    #[test]
    fn the_topmost_owner_wins_and_the_rest_is_zero() {
        let owners = resolve(&[(place(0), bits(&[(10, 10)])), (place(1), bits(&[(0, 15), (100, 5)]))]);
        let got: Vec<_> = owners
            .iter()
            .map(|o| {
                let node = match o.owner {
                    Owner::Zero => None,
                    Owner::Node { node, .. } => Some(node),
                };
                (o.run.first, o.run.count, node)
            })
            .collect();
        assert_eq!(
            got,
            [(0, 10, Some(1)), (10, 10, Some(0)), (20, 80, None), (100, 5, Some(1)), (105, 3991, None)]
        );
    }

    #[test]
    fn resolving_agrees_with_sector_by_sector() {
        let top = bits(&[(0, 1), (64, 64), (4000, 96)]);
        let low = bits(&[(1, 200), (4090, 6)]);
        let owners = resolve(&[(place(0), top.clone()), (place(3), low.clone())]);
        assert_eq!(owners.iter().map(|o| o.run.count).sum::<u32>(), 4096);
        for part in owners {
            for sector in part.run.first..part.run.end() {
                let node = if top.get(sector) { Some(0) } else { low.get(sector).then_some(3) };
                let got = match part.owner {
                    Owner::Zero => None,
                    Owner::Node { node, .. } => Some(node),
                };
                assert_eq!(got, node, "sector {sector}");
            }
        }
    }

    #[test]
    fn what_is_kept_is_what_was_resolved() {
        let levels =
            [(place(0), bits(&[(0, 1), (64, 64), (4000, 96)])), (place(3), bits(&[(1, 200), (4090, 6)]))];
        let resolved = resolve(&levels);
        let kept = BlockOwners::new(&resolved);
        assert_eq!(kept.count(), resolved.len());
        assert_eq!(kept.runs().collect::<Vec<_>>(), resolved);
        for (first, count) in
            [(0, 1), (0, 4096), (63, 2), (64, 64), (127, 4), (150, 3900), (4095, 1), (3999, 2)]
        {
            let wanted: Vec<_> = resolved
                .iter()
                .filter_map(|part| {
                    let from = part.run.first.max(first);
                    let end = part.run.end().min(first + count);
                    (from < end)
                        .then(|| OwnerRun { run: SectorRun { first: from, count: end - from }, ..*part })
                })
                .collect();
            assert_eq!(
                kept.within(SectorRun { first, count }).collect::<Vec<_>>(),
                wanted,
                "{first}+{count}"
            );
        }
    }

    #[test]
    fn one_more_level_is_as_resolving_all_of_them() {
        let (top, mid, low) = (bits(&[(0, 9), (500, 700)]), bits(&[(4, 90)]), bits(&[(600, 1000)]));
        let below = resolve(&[(place(1), mid.clone()), (place(0), low.clone())]);
        let all = resolve(&[(place(2), top.clone()), (place(1), mid), (place(0), low)]);
        assert_eq!(overlay(place(2), &top, &below), all);
    }
}
