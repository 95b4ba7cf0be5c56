//! What goes into an image from other volumes of its repository.

use super::Writer;
use crate::error::{Error, Result};
use crate::rw::Presence;
use crate::slots::follows;
use crate::storage::{CopyKind, CopyRange, Volume};
use crate::units::{BLOCK_BYTES, BLOCK_SECTORS, BlockNo, SECTOR_BYTES, SectorRun, Slot};

/// What direct transfers may be multiples of at most: blocks of ours begin on
/// such boundaries.
const PAGE_BYTES: u32 = 4096;

/// Sectors of a block that another volume has, for [`Writer::copy_in_many`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CopyIn {
    /// Which block.
    pub block: BlockNo,
    /// Which of its sectors.
    pub run: SectorRun,
    /// Byte offset of them in the source.
    pub source_offset: u64,
    /// Whether an image below has the block.
    pub below: bool,
}

/// A block that another volume has whole, for [`Writer::copy_whole`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WholeBlock {
    /// Which block.
    pub block: BlockNo,
    /// Where it is in the source.
    pub source_slot: Slot,
}

/// A [`WholeBlock`] with its place here.
type Placed = (WholeBlock, Slot);

impl Writer {
    /// Copies whole sectors of a block from another volume of the same
    /// repository, sharing extents where that is possible.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub fn copy_in(
        &mut self,
        block: BlockNo,
        run: SectorRun,
        source: &dyn Volume,
        source_offset: u64,
        below: bool,
    ) -> Result<CopyKind> {
        let slot = self.place(block, below)?;
        let kind = self
            .open
            .volume
            .copy_from(source, source_offset, slot.data_offset(run.first), run.bytes())
            .map_err(|e| Error::from(e).of(&self.name))?;
        self.landed(block, slot, run);
        Ok(kind)
    }

    /// From now on what is copied in by [`Self::copy_in_many`] goes past the
    /// page cache, where that is possible. To be called first of all.
    ///
    /// # Errors
    /// What the volume said.
    pub fn go_direct(&self) -> Result<()> {
        // Blocks of other makers' images may share pages with metadata.
        let went = self.open.volume.go_direct(PAGE_BYTES).map(|_| ());
        went.map_err(|e| Error::from(e).of(&self.name))
    }

    /// Copies many short runs from one volume, as [`Self::copy_in`] does each.
    /// No two of them overlap.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub fn copy_in_many(&mut self, source: &dyn Volume, copies: &[CopyIn]) -> Result<()> {
        let mut ranges = Vec::with_capacity(copies.len());
        let mut slots = Vec::with_capacity(copies.len());
        for copy in copies {
            let slot = self.place(copy.block, copy.below)?;
            let (from, to) = (copy.source_offset, slot.data_offset(copy.run.first));
            ranges.push(CopyRange { from, to, len_bytes: copy.run.bytes() });
            slots.push(slot);
        }
        self.open.volume.copy_many(source, &ranges).map_err(|e| Error::from(e).of(&self.name))?;
        for (copy, slot) in copies.iter().zip(slots) {
            self.landed(copy.block, slot, copy.run);
        }
        Ok(())
    }

    /// Copies whole blocks that this image does not have, as [`Self::copy_in`]
    /// does each; those that follow one another here and in the source all at
    /// once, with the bitmaps between them. So what lies before the data of
    /// each of them in the source must be
    /// [zeros and a full bitmap](crate::slots::is_full_bitmap_page).
    /// Returns the bytes of blocks that were shared and those that were copied.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub fn copy_whole(&mut self, source: &dyn Volume, blocks: &[WholeBlock]) -> Result<(u64, u64)> {
        let mut placed: Vec<Placed> = Vec::with_capacity(blocks.len());
        for block in blocks {
            debug_assert_eq!(self.presence(block.block), Presence::Absent);
            placed.push((*block, self.place(block.block, false)?));
        }
        let side_by_side = |one: &Placed, next: &Placed| {
            follows(one.0.source_slot, next.0.source_slot) && follows(one.1, next.1)
        };
        let (mut shared, mut copied) = (0, 0);
        for run in placed.chunk_by(side_by_side) {
            let (Some((first, to)), Some((_, last))) = (run.first(), run.last()) else { continue };
            let (from, start) = (first.source_slot.data_offset(0), to.data_offset(0));
            let len = last.data_offset(BLOCK_SECTORS) - start;
            let moved = self.open.volume.copy_from(source, from, start, len);
            let bytes = run.len() as u64 * BLOCK_BYTES;
            match moved.map_err(|e| Error::from(e).of(&self.name))? {
                CopyKind::Cloned => shared += bytes,
                CopyKind::Copied => copied += bytes,
            }
            self.landed(first.block, *to, SectorRun { first: 0, count: BLOCK_SECTORS });
            for (block, slot) in run.iter().skip(1) {
                self.open.rw.written_whole(block.block, *slot);
            }
        }
        Ok((shared, copied))
    }

    /// The bitmap of a block is going to be looked at: see
    /// [`Volume::will_read`].
    pub fn will_look_at(&self, block: BlockNo) {
        if let Presence::Partial(slot) = self.presence(block)
            && self.open.rw.known_bitmap(block).is_none()
        {
            self.open.volume.will_read(slot.bitmap_offset(), SECTOR_BYTES);
        }
    }

    /// Has the storage begin to write out what was written into a block, so
    /// that [`Self::commit`] has less to wait for.
    pub fn begin_write_out(&self, block: BlockNo) {
        if let Presence::Whole(slot) | Presence::Partial(slot) = self.open.rw.presence(block) {
            self.open.volume.begin_write_out(slot.data_offset(0), BLOCK_BYTES);
        }
    }
}

#[cfg(test)]
#[path = "copying_tests.rs"]
mod tests;
