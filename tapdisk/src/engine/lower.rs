//! Everything below the stack: an immutable map, and a cache of who owns
//! which sectors of the blocks no level has whole.

use std::collections::HashMap;
use std::sync::Arc;

use lru::LruCache;
use tapdisk_control::CacheStats;
use vhd::bitmap::SectorBitmap;
use vhd::chain::{ChainMap, OwnerRun, Place, clip, resolve};
use vhd::units::BlockNo;

use super::image::{Purpose, bitmap_of};
use super::{Completion, Engine, FileId, Op, Wait};
use crate::limits::OWNER_RUNS_MAX;

/// A generation of the lower part: never changed, only replaced. The cache
/// belongs to the generation, so nothing resolved under another one can enter.
#[derive(Debug)]
pub struct Lower {
    /// Tells bitmaps read for this generation from those of an older one.
    generation: u64,
    map: ChainMap,
    /// The driver's file of each node of the map.
    files: Vec<FileId>,
    owners: LruCache<BlockNo, Arc<[OwnerRun]>>,
    runs_cached: usize,
    hits: u64,
    misses: u64,
    resolving: HashMap<BlockNo, Resolving>,
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
    Owners(Arc<[OwnerRun]>),
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
            owners: LruCache::unbounded(),
            runs_cached: 0,
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

    /// The files of the levels, topmost first.
    #[must_use]
    pub fn files(&self) -> &[FileId] {
        &self.files
    }

    /// Whether any level has the block.
    pub(super) fn has(&self, block: BlockNo) -> bool {
        self.map.has(block)
    }

    /// The file and byte offset of a sector that `node` owns.
    pub(super) fn locate(
        &self,
        node: u8,
        block: BlockNo,
        slot: vhd::units::Slot,
        sector: u32,
    ) -> Option<(FileId, u64)> {
        let level = self.map.nodes().get(usize::from(node))?;
        Some((*self.files.get(usize::from(node))?, level.data_offset(block, slot, sector)))
    }

    fn insert(&mut self, block: BlockNo, runs: Arc<[OwnerRun]>) {
        self.runs_cached += runs.len();
        if let Some(old) = self.owners.put(block, runs) {
            self.runs_cached -= old.len();
        }
        while self.runs_cached > OWNER_RUNS_MAX && self.owners.len() > 1 {
            if let Some((_, old)) = self.owners.pop_lru() {
                self.runs_cached -= old.len();
            }
        }
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
        if let Some(runs) = lower.owners.get(&block) {
            lower.hits += 1;
            return Some(Below::Owners(Arc::clone(runs)));
        }
        if !lower.resolving.contains_key(&block) {
            self.resolve_block(block);
        }
        None
    }

    /// The cache of owners, in figures.
    #[must_use]
    pub fn owners(&self) -> CacheStats {
        CacheStats {
            blocks: self.lower.owners.len() as u64,
            runs: self.lower.runs_cached as u64,
            runs_max: OWNER_RUNS_MAX as u64,
            hits: self.lower.hits,
            misses: self.lower.misses,
        }
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
            let Some(node) = self.lower.map.nodes().get(usize::from(place.node)) else { continue };
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
                if let Some(node) = self.lower.map.nodes().get(usize::from(place.node)) {
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
        self.lower.insert(block, resolve(&known).into());
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

    fn wake_owners(&mut self) {
        let waits: Vec<Wait> =
            self.parked.keys().filter(|wait| matches!(wait, Wait::Owners(_))).copied().collect();
        for wait in waits {
            self.wake(wait);
        }
    }
}
