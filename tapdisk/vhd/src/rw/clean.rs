//! Bitmaps that are as the file has them, kept so that they need not be read
//! again: the last used first, up to a stated limit.
//!
//! Most are a few runs of present sectors, and are kept as such: a disk of
//! 100 GiB with a run or two in every block then fits as a whole.

use lru::LruCache;

use crate::bitmap::SectorBitmap;
use crate::limits::{CLEAN_BITMAP_BYTES, CLEAN_BITMAPS_BYTES_MAX};
use crate::units::{BLOCK_SECTORS, BlockNo, SectorRun};

/// See the module.
#[derive(Debug)]
pub(super) struct CleanBitmaps {
    blocks: LruCache<BlockNo, Kept>,
    bytes: usize,
}

/// A bitmap in the shorter of its two forms.
#[derive(Debug)]
enum Kept {
    /// The sectors at which presence changes, the first of them present.
    Changes(Box<[u16]>),
    Bits(Box<SectorBitmap>),
}

impl Default for CleanBitmaps {
    fn default() -> Self {
        Self { blocks: LruCache::unbounded(), bytes: 0 }
    }
}

impl CleanBitmaps {
    /// A block's bitmap, which becomes the last used.
    pub(super) fn get(&mut self, block: BlockNo) -> Option<SectorBitmap> {
        self.blocks.get(&block).map(Kept::bitmap)
    }

    /// The same without a claim to keep it for longer.
    pub(super) fn peek(&self, block: BlockNo) -> Option<SectorBitmap> {
        self.blocks.peek(&block).map(Kept::bitmap)
    }

    pub(super) fn pop(&mut self, block: BlockNo) -> Option<SectorBitmap> {
        let kept = self.blocks.pop(&block)?;
        self.bytes -= kept.bytes();
        Some(kept.bitmap())
    }

    /// Keeps a bitmap, and forgets those not used for longest where that takes
    /// too much.
    pub(super) fn put(&mut self, block: BlockNo, bitmap: &SectorBitmap) {
        let kept = Kept::new(bitmap);
        self.bytes += kept.bytes();
        if let Some(old) = self.blocks.put(block, kept) {
            self.bytes -= old.bytes();
        }
        while self.bytes > CLEAN_BITMAPS_BYTES_MAX {
            let Some((_, old)) = self.blocks.pop_lru() else { return };
            self.bytes -= old.bytes();
        }
    }
}

impl Kept {
    fn new(bitmap: &SectorBitmap) -> Self {
        let most = size_of::<SectorBitmap>() / size_of::<u16>();
        let changes: Vec<u16> = bitmap
            .present()
            .flat_map(|run| [run.first, run.end()])
            .map(|sector| u16::try_from(sector).unwrap_or(u16::MAX))
            .take(most + 1)
            .collect();
        if changes.len() > most {
            return Self::Bits(Box::new(bitmap.clone()));
        }
        Self::Changes(changes.into())
    }

    fn bitmap(&self) -> SectorBitmap {
        match self {
            Self::Bits(bits) => (**bits).clone(),
            Self::Changes(changes) => {
                let mut bitmap = SectorBitmap::EMPTY;
                for run in changes.chunks(2) {
                    let [first, end] = run else { continue };
                    let (first, end) = (u32::from(*first), u32::from(*end).min(BLOCK_SECTORS));
                    bitmap.set(SectorRun { first, count: end - first });
                }
                bitmap
            }
        }
    }

    /// Memory it takes, its place in the table and in the order of use included.
    fn bytes(&self) -> usize {
        CLEAN_BITMAP_BYTES
            + match self {
                Self::Changes(changes) => size_of_val(&**changes),
                Self::Bits(bits) => size_of_val(&**bits),
            }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every `step`-th sector, and the last.
    fn bitmap(step: u32) -> SectorBitmap {
        let mut bitmap = SectorBitmap::EMPTY;
        for first in (0..BLOCK_SECTORS).step_by(step as usize).chain([BLOCK_SECTORS - 1]) {
            bitmap.set(SectorRun { first, count: 1 });
        }
        bitmap
    }

    fn check(clean: &CleanBitmaps) {
        let bytes: usize = clean.blocks.iter().map(|(_, kept)| kept.bytes()).sum();
        assert_eq!(clean.bytes, bytes);
        assert!(bytes <= CLEAN_BITMAPS_BYTES_MAX);
    }

    #[test]
    fn what_comes_out_is_what_was_put_in() {
        let mut clean = CleanBitmaps::default();
        let bitmaps: Vec<_> = [1, 2, 3, 31, 32, 33, 64, 4095].map(bitmap).into_iter().collect();
        let all = [SectorBitmap::EMPTY, SectorBitmap::FULL].into_iter().chain(bitmaps);
        for (block, bitmap) in (0..).map(BlockNo).zip(all) {
            clean.put(block, &bitmap);
            assert_eq!(clean.get(block), Some(bitmap.clone()));
            assert_eq!(clean.peek(block), Some(bitmap.clone()));
            // Put there again, it counts once.
            clean.put(block, &bitmap);
            check(&clean);
            assert_eq!(clean.pop(block), Some(bitmap));
            assert_eq!((clean.get(block), clean.bytes), (None, 0));
        }
    }

    #[test]
    fn a_disk_of_100_gib_fits_with_a_few_runs_in_each_block() {
        let mut clean = CleanBitmaps::default();
        let mut few = SectorBitmap::EMPTY;
        for first in [0, 700, 4000] {
            few.set(SectorRun { first, count: 64 });
        }
        let blocks = 51_200;
        (0..blocks).for_each(|block| clean.put(BlockNo(block), &few));
        check(&clean);
        assert!((0..blocks).all(|block| clean.get(BlockNo(block)).is_some()));
    }

    #[test]
    fn those_not_used_for_longest_go_first() {
        let mut clean = CleanBitmaps::default();
        let scattered = bitmap(2);
        let fit = u32::try_from(CLEAN_BITMAPS_BYTES_MAX / Kept::new(&scattered).bytes()).unwrap();
        (0..fit).for_each(|block| clean.put(BlockNo(block), &scattered));
        assert!(clean.get(BlockNo(0)).is_some());
        clean.put(BlockNo(fit), &scattered);
        check(&clean);
        assert!(clean.peek(BlockNo(0)).is_some() && clean.peek(BlockNo(1)).is_none());
    }
}
