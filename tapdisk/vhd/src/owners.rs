//! Who owns which sectors of one block: bitmaps of several levels, resolved.
//!
//! Absent on purpose: I/O. Whoever has the bitmaps asks.

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
    fn one_more_level_is_as_resolving_all_of_them() {
        let (top, mid, low) = (bits(&[(0, 9), (500, 700)]), bits(&[(4, 90)]), bits(&[(600, 1000)]));
        let below = resolve(&[(place(1), mid.clone()), (place(0), low.clone())]);
        let all = resolve(&[(place(2), top.clone()), (place(1), mid), (place(0), low)]);
        assert_eq!(overlay(place(2), &top, &below), all);
    }
}
