//! A chain as one VHD.
//!
//! ```text
//!   footer copy, header, BAT, BATmap, locators      known before the first byte:
//!   block, block, …  (each 7 sectors of padding,    which blocks there are is
//!   footer            a bitmap, 4096 of data)       read from maps and bitmaps
//! ```
//!
//! Without a base it is a dynamic image with every block that any level has.
//! Over a base it is a differencing image with the sectors in which the two
//! can differ, those that read as zeros now included: laid over the base by
//! anybody's rules it reads as the disk.
//!
//! Blocks are looked at twice, once for the BAT and once for their bytes, so
//! that memory does not grow with what has changed. The chains must not
//! change meanwhile (invariant 8); if they do, that is noticed and said.

use std::ops::Range;

use super::Sink;
use crate::bat::BAT_FREE;
use crate::bitmap::SectorBitmap;
use crate::build::first_sector;
use crate::chain::Chain;
use crate::create::{Contents, NewImage, NewKind, ParentLink, footer, head};
use crate::error::{Error, Result};
use crate::placed::Changes;
use crate::slots::STRIDE_SECTORS;
use crate::units::{BLOCK_BYTES, BLOCK_SECTORS, BlockNo, SECTOR_BYTES, SectorRun, Slot};

/// Who the image says it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Its footer uuid.
    pub uuid: uuid::Uuid,
    /// What it says it stands on; for an export over a base.
    pub parent: Option<ParentLink>,
    /// Creation time, seconds since 2000.
    pub timestamp_s: u32,
}

/// An export whose every byte is decided but the data.
#[derive(Debug)]
pub struct Export<'a> {
    disk: &'a Chain,
    base: Option<&'a Chain>,
    head: Vec<u8>,
    footer: [u8; 512],
    /// Blocks in order, with their places in the stream and whether they are
    /// whole.
    blocks: Vec<(BlockNo, Slot, bool)>,
    data_end: u64,
}

impl<'a> Export<'a> {
    /// Lays an export out: reads bitmaps of what differs from a base, and no
    /// data.
    ///
    /// # Errors
    /// What reading an image said.
    pub fn plan(disk: &'a Chain, base: Option<&'a Chain>, identity: &Identity) -> Result<Self> {
        let kind = match &identity.parent {
            Some(parent) => NewKind::Child { parent: parent.clone() },
            None => NewKind::Dynamic,
        };
        let new = NewImage {
            uuid: identity.uuid,
            virtual_bytes: disk.virtual_bytes(),
            kind,
            bat_entries_max: None,
            hidden: false,
            timestamp_s: identity.timestamp_s,
        };
        let footer = footer(&new)?;
        let head_len = head(&new, &footer, &Contents::default())?.len() as u64;
        let blocks = place(wanted(disk, base)?, head_len)?;
        let mut bat = vec![BAT_FREE; disk.blocks() as usize];
        let mut batmap = vec![0; bat.len().div_ceil(8)];
        for (block, slot, whole) in &blocks {
            if let Some(entry) = bat.get_mut(block.index()) {
                *entry = slot.0;
            }
            if let Some(byte) = batmap.get_mut(block.index() / 8).filter(|_| *whole) {
                *byte |= 0x80 >> (block.0 % 8);
            }
        }
        let data_end = blocks.last().map_or(head_len, |(_, slot, _)| slot.data_offset(BLOCK_SECTORS));
        let head = head(&new, &footer, &Contents { bat: &bat, batmap: &batmap })?;
        Ok(Self { disk, base, head, footer: footer.to_bytes(), blocks, data_end })
    }

    /// Length of the stream in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.data_end + SECTOR_BYTES
    }

    /// Writes the stream.
    ///
    /// # Errors
    /// What reading an image or the sink said.
    pub fn write(&self, sink: Sink<'_>) -> Result<()> {
        sink(&self.head)?;
        let mut at = self.head.len() as u64;
        let mut data = vec![0; BLOCK_BYTES as usize];
        for (block, slot, whole) in &self.blocks {
            let bitmap = self.fill(*block, &mut data)?;
            if bitmap.is_full() != *whole {
                return Err(std::io::Error::other("the chain changed while it was exported").into());
            }
            let padding = usize::try_from(slot.bitmap_offset() - at).unwrap_or(0);
            let mut before = vec![0; padding];
            before.extend(bitmap.to_bytes());
            sink(&before)?;
            sink(&data)?;
            at = slot.data_offset(BLOCK_SECTORS);
        }
        sink(&self.footer)?;
        Ok(())
    }

    /// A block's bitmap, and its data where that says so; zeros elsewhere.
    fn fill(&self, block: BlockNo, data: &mut [u8]) -> Result<SectorBitmap> {
        let Some(base) = self.base else {
            self.disk.read_at(data, block.first_byte())?;
            return Ok(SectorBitmap::FULL);
        };
        data.fill(0);
        let bitmap = bitmap_of(block, &Changes::of_block(self.disk, base, block)?);
        for run in bitmap.present() {
            let first = (u64::from(run.first) * SECTOR_BYTES) as usize;
            let Some(part) = data.get_mut(first..first + run.bytes() as usize) else { continue };
            self.disk.read_at(part, block.first_byte() + first as u64)?;
        }
        Ok(bitmap)
    }
}

/// The blocks an export has, and whether they are whole.
fn wanted(disk: &Chain, base: Option<&Chain>) -> Result<Vec<(BlockNo, bool)>> {
    let all = (0..disk.blocks()).map(BlockNo);
    let Some(base) = base else {
        // Nothing lies below: what no level has reads as zeros either way.
        return Ok(all.filter(|block| disk.map().has(*block)).map(|block| (block, true)).collect());
    };
    let mut blocks = Vec::new();
    for block in all {
        let bitmap = bitmap_of(block, &Changes::of_block(disk, base, block)?);
        if !bitmap.is_empty() {
            blocks.push((block, bitmap.is_full()));
        }
    }
    Ok(blocks)
}

fn place(blocks: Vec<(BlockNo, bool)>, head_len: u64) -> Result<Vec<(BlockNo, Slot, bool)>> {
    let mut next = first_sector(head_len.div_ceil(SECTOR_BYTES));
    let mut placed = Vec::with_capacity(blocks.len());
    for (block, whole) in blocks {
        let too_large = |_| Error::TooLarge { what: "an export", bytes: next * SECTOR_BYTES };
        placed.push((block, Slot(u32::try_from(next).map_err(too_large)?), whole));
        next += STRIDE_SECTORS;
    }
    Ok(placed)
}

/// The sectors of a block that some ranges of the disk touch.
fn bitmap_of(block: BlockNo, ranges: &[Range<u64>]) -> SectorBitmap {
    let mut bitmap = SectorBitmap::EMPTY;
    for range in ranges {
        let sector =
            |byte: u64| u32::try_from(byte.saturating_sub(block.first_byte())).unwrap_or(u32::MAX) / 512;
        let first = sector(range.start);
        let end = sector(range.end + SECTOR_BYTES - 1).min(BLOCK_SECTORS);
        if first < end {
            bitmap.set(SectorRun { first, count: end - first });
        }
    }
    bitmap
}
