//! A delta of a disk that is smaller than its base.
//!
//! An image never stands on a larger one: with the next growth, data past its
//! old end would come back from below. So such a delta becomes a disk of its
//! own: what it leaves out is taken from the base, up to the disk's end.

use vhd::bitmap::SectorBitmap;
use vhd::chain::Chain;
use vhd::stream::import::Block;
use vhd::units::{BLOCK_BYTES, BlockNo, SECTOR_BYTES};

/// A delta being made whole.
pub(super) struct Whole<'a> {
    base: &'a Chain,
    /// Blocks of the disk, and whether they came with the delta.
    came: Vec<bool>,
}

impl<'a> Whole<'a> {
    /// For a delta of a disk of `virtual_bytes` over `base`; `None` if that is
    /// not larger.
    pub(super) fn over(base: &'a Chain, virtual_bytes: u64) -> Option<Self> {
        let blocks = usize::try_from(virtual_bytes.div_ceil(BLOCK_BYTES)).ok()?;
        (virtual_bytes < base.virtual_bytes()).then(|| Self { base, came: vec![false; blocks] })
    }

    /// Adds to a block of the delta what it leaves out.
    pub(super) fn fill(&mut self, block: &mut Block) -> vhd::Result<()> {
        if let Some(came) = self.came.get_mut(block.number.index()) {
            *came = true;
        }
        if block.bitmap.is_full() {
            return Ok(());
        }
        let mut whole = vec![0; BLOCK_BYTES as usize];
        self.base.read_at(&mut whole, block.number.first_byte())?;
        for run in block.bitmap.present() {
            let first = (u64::from(run.first) * SECTOR_BYTES) as usize;
            let range = first..first + run.bytes() as usize;
            if let (Some(to), Some(from)) = (whole.get_mut(range.clone()), block.data.get(range)) {
                to.copy_from_slice(from);
            }
        }
        block.data = whole;
        block.bitmap = SectorBitmap::FULL;
        Ok(())
    }

    /// Blocks that are the base's alone, as far as it has them.
    pub(super) fn rest(&self) -> Vec<BlockNo> {
        let missing = (0..).map(BlockNo).zip(&self.came).filter(|(_, came)| !**came);
        missing.map(|(block, _)| block).filter(|block| self.base.map().has(*block)).collect()
    }

    /// Reads one of them.
    pub(super) fn read(&self, number: BlockNo, block: &mut Block) -> vhd::Result<()> {
        block.number = number;
        block.bitmap = SectorBitmap::FULL;
        self.base.read_at(&mut block.data, number.first_byte())
    }
}
