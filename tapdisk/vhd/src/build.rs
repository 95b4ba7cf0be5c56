//! A new image with its content, in one go: for what comes as a stream.
//!
//! ```text
//!   1. blocks, as they come, each with its bitmap, behind room for the headers
//!   2. headers, BAT, BATmap, both footers
//!   3. a flush
//! ```
//!
//! Nothing names the volume yet, so no order matters before the flush, and
//! the size need not be known before the end. What the headers leave of their
//! room is a hole.

use std::sync::Arc;

use crate::bat::{BAT_FREE, table_bytes};
use crate::batmap::map_bytes;
use crate::bitmap::SectorBitmap;
use crate::create::{Contents, NewImage, TABLE_OFFSET, footer, head};
use crate::error::{Error, Result};
use crate::locator::space_for;
use crate::meta::Meta;
use crate::settle::{footer_place, give_back};
use crate::slots::{EXTEND_SLOTS, NoRoom, STRIDE_SECTORS};
use crate::storage::Volume;
use crate::units::{BLOCK_BYTES, BLOCK_SECTORS, BlockNo, SECTOR_BYTES, Slot, round_up};

/// Bytes of the longest locator: UTF-16 of a name of 255 bytes, and `.\`.
const LOCATOR_BYTES_MAX: usize = 2 * (255 + 2);

/// See the module.
#[derive(Debug)]
pub struct Builder {
    volume: Arc<dyn Volume>,
    bat: Vec<u32>,
    batmap: Vec<u8>,
    next_sector: u64,
    blocks: u32,
}

impl Builder {
    /// For an empty volume and a disk of at most so many blocks.
    #[must_use]
    pub fn new(volume: Arc<dyn Volume>, blocks_max: u32) -> Self {
        let locators = 3 * space_for(LOCATOR_BYTES_MAX);
        let headers =
            TABLE_OFFSET + table_bytes(blocks_max) + SECTOR_BYTES + map_bytes(blocks_max) + locators;
        let next_sector = first_sector(headers.div_ceil(SECTOR_BYTES));
        Self { volume, bat: Vec::new(), batmap: Vec::new(), next_sector, blocks: 0 }
    }

    /// Blocks put so far.
    #[must_use]
    pub fn blocks(&self) -> u32 {
        self.blocks
    }

    /// Adds a block: its bitmap, and all of its bytes, which count where the
    /// bitmap says so.
    ///
    /// # Errors
    /// [`Error::BadBat`] for a block that was put already, what writing said.
    pub fn put(&mut self, block: BlockNo, bitmap: &SectorBitmap, data: &[u8]) -> Result<()> {
        debug_assert_eq!(data.len() as u64, BLOCK_BYTES);
        let sector =
            u32::try_from(self.next_sector).map_err(|_| Error::Unsupported { what: NoRoom.what() })?;
        if self.bat.len() <= block.index() {
            self.bat.resize(block.index() + 1, BAT_FREE);
            self.batmap.resize(self.bat.len().div_ceil(8), 0);
        }
        match self.bat.get_mut(block.index()) {
            Some(entry) if *entry == BAT_FREE => *entry = sector,
            _ => return Err(Error::BadBat { block: block.0, sector, reason: "it comes twice" }),
        }
        if let Some(byte) = self.batmap.get_mut(block.index() / 8).filter(|_| bitmap.is_full()) {
            *byte |= 0x80 >> (block.0 % 8);
        }
        let slot = Slot(sector);
        self.hold(slot.data_offset(BLOCK_SECTORS))?;
        self.volume.write_at(&bitmap.to_bytes(), slot.bitmap_offset())?;
        self.volume.write_at(data, slot.data_offset(0))?;
        self.next_sector += STRIDE_SECTORS;
        self.blocks += 1;
        Ok(())
    }

    /// Steps 2 and 3. The image is settled and durable then.
    ///
    /// # Errors
    /// [`Error::BadSize`] when a block lies past the disk's end, what writing
    /// said.
    pub fn finish(self, new: &NewImage) -> Result<Meta> {
        let footer = footer(new)?;
        if self.bat.len() as u64 * BLOCK_BYTES > footer.virtual_bytes {
            return Err(Error::BadSize { reason: "it has blocks past its end" });
        }
        let head = head(new, &footer, &Contents { bat: &self.bat, batmap: &self.batmap })?;
        let last = self.bat.iter().filter(|entry| **entry != BAT_FREE).max();
        let data_end = last.map_or(head.len() as u64, |slot| Slot(*slot).data_offset(BLOCK_SECTORS));
        debug_assert!(self.bat.iter().all(|entry| u64::from(*entry) * SECTOR_BYTES >= head.len() as u64));
        let end = footer_place(self.volume.as_ref(), data_end)?;
        self.volume.write_at(&head, 0)?;
        self.volume.write_at(&footer.to_bytes(), end)?;
        self.volume.flush("build: the new image before anything names it")?;
        give_back(self.volume.as_ref(), end)?;
        Meta::read(self.volume.as_ref())
    }

    /// A device is given space for many blocks at once; a file grows as it is
    /// written.
    fn hold(&self, end: u64) -> Result<()> {
        if self.volume.is_device() && self.volume.len()? < end {
            self.volume.extend(end + EXTEND_SLOTS * STRIDE_SECTORS * SECTOR_BYTES)?;
        }
        Ok(())
    }
}

/// The first sector from this one on where a bitmap may lie: data begins on a
/// 4 KiB boundary behind it.
pub(crate) fn first_sector(from: u64) -> u64 {
    round_up(from + 1, 8) - 1
}

#[cfg(test)]
#[path = "build_tests.rs"]
mod tests;
