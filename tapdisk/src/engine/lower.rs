//! Everything below the stack: an immutable map, and a cache of who owns
//! which sectors of the blocks no level has whole.

use std::collections::HashMap;
use std::sync::Arc;

use tapdisk_control::CacheStats;
use uuid::Uuid;
use vhd::bitmap::SectorBitmap;
use vhd::chain::{BlockOwners, ChainMap, Node, Owner, OwnerRun, Place, clip, overlay, resolve};
use vhd::rw::RwImage;
use vhd::units::{BlockNo, Slot};

use super::image::{Purpose, bitmap_of};
use super::owner_cache::OwnerCache;
use super::{Completion, Engine, FileId, Op, Wait};
use crate::limits::KNOWN_BLOCKS_MAX;

/// A generation of the lower part: replaced whole, or given one more level on
/// top. The cache belongs to the generation, so nothing resolved under another
/// one can enter.
#[derive(Debug)]
pub struct Lower {
    /// Tells bitmaps read for this generation from those of an older one.
    generation: u64,
    map: ChainMap,
    /// The driver's file of each node of the map, by its number.
    files: Vec<FileId>,
    owners: OwnerCache,
    hits: u64,
    misses: u64,
    resolving: HashMap<BlockNo, Resolving>,
}

/// What a generation knows of one block, in words that a later one
/// understands.
#[derive(Debug, Clone)]
pub struct Known {
    block: BlockNo,
    /// Footer uuid and place of each level that has the block.
    places: Vec<(Uuid, Slot, bool)>,
    owners: BlockOwners,
    /// Footer uuids by level number.
    levels: Arc<[Uuid]>,
}

/// A block whose bitmaps are being read, all levels at once.
#[derive(Debug)]
struct Resolving {
    bitmaps: Vec<(Place, Option<SectorBitmap>)>,
    left: usize,
    error: Option<i32>,
}

/// Where a block's sectors come from below the stack.
#[derive(Debug, Clone)]
pub(super) enum Below {
    /// Nobody has the block.
    Nothing,
    /// One level has all of it.
    Whole(Place),
    /// These runs.
    Owners(BlockOwners),
}

impl Lower {
    /// A generation of `map`, whose nodes are `files` in the driver's table.
    #[must_use]
    pub fn new(map: ChainMap, files: Vec<FileId>) -> Self {
        debug_assert_eq!(map.nodes().len(), files.len());
        Self {
            generation: 0,
            map,
            files,
            owners: OwnerCache::default(),
            hits: 0,
            misses: 0,
            resolving: HashMap::new(),
        }
    }

    /// The flattened map.
    #[must_use]
    pub fn map(&self) -> &ChainMap {
        &self.map
    }

    /// The files of the levels, the root's first.
    #[must_use]
    pub fn files(&self) -> &[FileId] {
        &self.files
    }

    /// What is known of blocks, the last used first, for [`Self::learn`].
    #[must_use]
    pub fn known(&self) -> Vec<Known> {
        let levels: Arc<[Uuid]> = self.map.nodes().rev().map(|node| node.uuid).collect();
        let known = self.owners.iter().take(KNOWN_BLOCKS_MAX).map(|(block, owners)| Known {
            block,
            places: self.places_by_uuid(block),
            owners: owners.clone(),
            levels: Arc::clone(&levels),
        });
        known.collect()
    }

    /// Takes over what an older generation knew: as it is where the same
    /// levels have the block in the same places, else as `resolve` finds it
    /// anew. Levels below the stack change in a block only when one of them
    /// gives it to another, so equal places mean equal owners.
    pub fn learn(&mut self, known: Vec<Known>, mut resolve: impl FnMut(BlockNo) -> Option<Vec<OwnerRun>>) {
        // The last used at the end, as if it had just been.
        for Known { block, places, owners, levels } in known.into_iter().rev() {
            if self.map.places(block).next().is_none_or(|first| first.whole) {
                continue;
            }
            let same = self.places_by_uuid(block) == places;
            let kept = same.then(|| self.renumbered(&owners, &levels)).flatten();
            if let Some(runs) = kept.or_else(|| resolve(block)) {
                self.owners.insert(block, &runs);
            }
        }
    }

    fn places_by_uuid(&self, block: BlockNo) -> Vec<(Uuid, Slot, bool)> {
        let place = |p: Place| self.map.node(p.node).map(|node| (node.uuid, p.slot, p.whole));
        self.map.places(block).filter_map(place).collect()
    }

    fn renumbered(&self, owners: &BlockOwners, levels: &[Uuid]) -> Option<Vec<OwnerRun>> {
        let number = |old: u8| {
            let uuid = levels.get(usize::from(old))?;
            let new = self.map.nodes().rev().position(|node| node.uuid == *uuid)?;
            u8::try_from(new).ok()
        };
        let run = |part: OwnerRun| {
            let owner = match part.owner {
                Owner::Zero => Owner::Zero,
                Owner::Node { node, slot } => Owner::Node { node: number(node)?, slot },
            };
            Some(OwnerRun { owner, ..part })
        };
        owners.runs().map(run).collect()
    }

    /// Whether any level has the block.
    pub(super) fn has(&self, block: BlockNo) -> bool {
        self.map.has(block)
    }

    /// The file and byte offset of a sector that `node` owns.
    pub(super) fn locate(&self, node: u8, block: BlockNo, slot: Slot, sector: u32) -> Option<(FileId, u64)> {
        let level = self.map.node(node)?;
        Some((*self.files.get(usize::from(node))?, level.data_offset(block, slot, sector)))
    }
}

impl Default for Lower {
    fn default() -> Self {
        Self::new(ChainMap::default(), Vec::new())
    }
}

impl Engine {
    /// What lies below the stack for a block; `None` once its bitmaps are
    /// being read: park under [`Wait::Owners`].
    pub(super) fn below(&mut self, block: BlockNo) -> Option<Below> {
        let lower = &mut self.lower;
        let Some(first) = lower.map.places(block).next() else { return Some(Below::Nothing) };
        if first.whole {
            return Some(Below::Whole(first));
        }
        if let Some(owners) = lower.owners.get(block) {
            lower.hits += 1;
            return Some(Below::Owners(owners.clone()));
        }
        if !lower.resolving.contains_key(&block) {
            self.resolve_block(block);
        }
        // Known at once where no bitmap was to be read.
        self.lower.owners.get(block).map(|owners| Below::Owners(owners.clone()))
    }

    /// The cache of owners, in figures.
    #[must_use]
    pub fn owners(&self) -> CacheStats {
        self.lower.owners.stats(self.lower.hits, self.lower.misses)
    }

    /// Reads every bitmap the block's owners depend on, at the same time.
    fn resolve_block(&mut self, block: BlockNo) {
        let generation = self.lower.generation;
        self.lower.misses += 1;
        let places: Vec<Place> = self.lower.map.places(block).collect();
        let bitmaps: Vec<_> =
            places.iter().map(|place| (*place, place.whole.then_some(SectorBitmap::FULL))).collect();
        let left = bitmaps.iter().filter(|(_, bitmap)| bitmap.is_none()).count();
        self.lower.resolving.insert(block, Resolving { bitmaps, left, error: None });
        for (level, place) in places.into_iter().enumerate() {
            let Some(&file) = self.lower.files.get(usize::from(place.node)) else { continue };
            let Some(node) = self.lower.map.node(place.node) else { continue };
            if place.whole {
                continue;
            }
            if node.storage == vhd::chain::Storage::Flat {
                // A flat level is partial only where its end cuts the block.
                self.owners_read(generation, block, level, Completion::Bytes(vec![0xFF; 512]));
            } else {
                let op = Op::ReadMeta { file, offset: place.slot.bitmap_offset(), len: 512 };
                self.start(op, Purpose::Owners { generation, block, level });
            }
        }
    }

    pub(super) fn owners_read(
        &mut self,
        generation: u64,
        block: BlockNo,
        level: usize,
        completion: Completion,
    ) {
        // Read for a replaced generation: whoever waited was woken then.
        if generation != self.lower.generation {
            return;
        }
        let Some(resolving) = self.lower.resolving.get_mut(&block) else { return };
        let Some((place, entry)) = resolving.bitmaps.get_mut(level) else { return };
        match bitmap_of(completion) {
            Ok(mut bitmap) => {
                if let Some(node) = self.lower.map.node(place.node) {
                    clip(&mut bitmap, node.visible_sectors(block));
                }
                *entry = Some(bitmap);
            }
            Err(errno) => resolving.error = Some(errno),
        }
        resolving.left -= 1;
        if resolving.left > 0 {
            return;
        }
        let Some(done) = self.lower.resolving.remove(&block) else { return };
        if let Some(errno) = done.error {
            return self.fail_parked(Wait::Owners(block), errno);
        }
        let known: Vec<_> = done.bitmaps.into_iter().filter_map(|(p, b)| b.map(|b| (p, b))).collect();
        self.lower.owners.insert(block, &resolve(&known));
        self.wake(Wait::Owners(block));
    }

    /// Replaces the lower part. Reads of the old generation's bitmaps are
    /// forgotten; the pieces that waited for them look again.
    pub(super) fn replace_lower(&mut self, mut lower: Lower) -> Lower {
        lower.generation = self.lower.generation + 1;
        (lower.hits, lower.misses) = (self.lower.hits, self.lower.misses);
        let old = std::mem::replace(&mut self.lower, lower);
        self.wake_owners();
        old
    }

    /// An image of the stack, which nobody writes any more, becomes the top
    /// level. All that is known of the other blocks stays known; so the next
    /// read after a snapshot is as warm as the one before.
    pub(super) fn fold_into_lower(&mut self, rw: &RwImage, node: Node, file: FileId) {
        let lower = &mut self.lower;
        lower.map.push_top(node, rw.allocated());
        lower.files.push(file);
        for (block, _, whole) in rw.allocated() {
            let Some(owners) = lower.owners.forget(block).filter(|_| !whole) else { continue };
            let top = lower.map.places(block).next();
            if let (Some(place), Some(bitmap)) = (top, rw.known_bitmap(block)) {
                let runs: Vec<_> = owners.runs().collect();
                lower.owners.insert(block, &overlay(place, &bitmap, &runs));
            }
        }
        // What is being read was to be resolved without the new level.
        lower.generation += 1;
        lower.resolving.clear();
        self.wake_owners();
    }

    fn wake_owners(&mut self) {
        let waits: Vec<Wait> =
            self.parked.keys().filter(|wait| matches!(wait, Wait::Owners(_))).copied().collect();
        for wait in waits {
            self.wake(wait);
        }
    }
}

#[cfg(test)]
#[path = "lower_tests.rs"]
mod tests;
