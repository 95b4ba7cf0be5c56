//! What is remembered of blocks that no level has whole, the last used first,
//! up to a stated limit.

use lru::LruCache;
use tapdisk_control::CacheStats;
use vhd::chain::{BlockOwners, OwnerRun};
use vhd::units::BlockNo;

use crate::limits::{OWNER_BLOCK_BYTES, OWNER_BYTES_MAX};

/// See the module.
#[derive(Debug)]
pub(super) struct OwnerCache {
    blocks: LruCache<BlockNo, BlockOwners>,
    runs: usize,
}

impl Default for OwnerCache {
    fn default() -> Self {
        Self { blocks: LruCache::unbounded(), runs: 0 }
    }
}

impl OwnerCache {
    /// What is known of a block, which becomes the last used.
    pub(super) fn get(&mut self, block: BlockNo) -> Option<&BlockOwners> {
        self.blocks.get(&block)
    }

    /// All that is known, the last used first.
    pub(super) fn iter(&self) -> impl Iterator<Item = (BlockNo, &BlockOwners)> {
        self.blocks.iter().map(|(block, owners)| (*block, owners))
    }

    pub(super) fn forget(&mut self, block: BlockNo) -> Option<BlockOwners> {
        let owners = self.blocks.pop(&block)?;
        self.runs -= owners.count();
        Some(owners)
    }

    /// Remembers a block, and forgets those not used for longest where that
    /// takes too much.
    pub(super) fn insert(&mut self, block: BlockNo, runs: &[OwnerRun]) {
        let owners = BlockOwners::new(runs);
        self.runs += owners.count();
        if let Some(old) = self.blocks.put(block, owners) {
            self.runs -= old.count();
        }
        while self.bytes() > OWNER_BYTES_MAX && self.blocks.len() > 1 {
            if let Some((_, old)) = self.blocks.pop_lru() {
                self.runs -= old.count();
            }
        }
    }

    fn bytes(&self) -> usize {
        self.runs * BlockOwners::RUN_BYTES + self.blocks.len() * OWNER_BLOCK_BYTES
    }

    /// The cache in figures, with who found what in it.
    pub(super) fn stats(&self, hits: u64, misses: u64) -> CacheStats {
        CacheStats {
            blocks: self.blocks.len() as u64,
            runs: self.runs as u64,
            bytes: self.bytes() as u64,
            bytes_max: OWNER_BYTES_MAX as u64,
            hits,
            misses,
        }
    }
}

#[cfg(test)]
mod tests {
    use vhd::chain::Owner;
    use vhd::units::SectorRun;

    use super::*;

    /// As scattered as a block can be.
    fn scattered() -> Vec<OwnerRun> {
        (0..4096).map(|first| OwnerRun { run: SectorRun { first, count: 1 }, owner: Owner::Zero }).collect()
    }

    #[test]
    fn it_forgets_what_was_not_used_for_longest() {
        let mut cache = OwnerCache::default();
        let one = scattered().len() * BlockOwners::RUN_BYTES + OWNER_BLOCK_BYTES;
        let fit = u32::try_from(OWNER_BYTES_MAX / one).unwrap();
        for block in 0..fit {
            cache.insert(BlockNo(block), &scattered());
        }
        assert!(cache.get(BlockNo(0)).is_some());
        cache.insert(BlockNo(fit), &scattered());
        assert!(cache.get(BlockNo(0)).is_some() && cache.get(BlockNo(fit)).is_some());
        assert!(cache.get(BlockNo(1)).is_none());
        let stats = cache.stats(0, 0);
        assert!(stats.bytes <= stats.bytes_max && stats.blocks == u64::from(fit));
    }

    #[test]
    fn small_blocks_count_too() {
        let mut cache = OwnerCache::default();
        let whole = [OwnerRun { run: SectorRun::BLOCK, owner: Owner::Zero }];
        for block in 0..400_000 {
            cache.insert(BlockNo(block), &whole);
        }
        let stats = cache.stats(0, 0);
        assert!(stats.blocks < 400_000 && stats.runs == stats.blocks && stats.bytes <= stats.bytes_max);
        cache.insert(BlockNo(399_999), &scattered());
        assert_eq!(cache.forget(BlockNo(399_999)).unwrap().count(), 4096);
        assert_eq!(cache.stats(0, 0).runs, cache.stats(0, 0).blocks);
    }
}
