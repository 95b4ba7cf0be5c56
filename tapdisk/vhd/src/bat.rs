//! The block allocation table, and where everything before the blocks lies.

use crate::bitmap::SectorBitmap;
use crate::error::{Error, Result};
use crate::footer::Footer;
use crate::header::DynHeader;
use crate::limits::{BAT_ENTRIES_MAX, SCAN_BYTES};
use crate::storage::Volume;
use crate::units::{SECTOR_BYTES, round_up};

/// A BAT entry that names nothing.
pub const BAT_FREE: u32 = 0xFFFF_FFFF;

/// Where the parts of a dynamic image lie, in bytes unless said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// The BAT.
    pub table_offset: u64,
    /// Entries the BAT has room for.
    pub max_entries: u32,
    /// Entries in use: blocks of the virtual size.
    pub entries: u32,
    /// The BATmap's header, if the image has one.
    pub batmap_header: Option<u64>,
    /// The BATmap's bits: offset, and length in sectors.
    pub batmap_bits: Option<(u64, u32)>,
    /// End of all headers: no block may begin before.
    pub data_start: u64,
    /// Sectors in a block.
    pub block_sectors: u32,
}

impl Layout {
    /// What footer and header say, without the BATmap.
    ///
    /// # Errors
    /// [`Error::BadHeader`] when the BAT is too small for the virtual size or
    /// overlaps the headers.
    pub fn of(footer: &Footer, header: &DynHeader) -> Result<Self> {
        let bad = |reason| Error::BadHeader { reason };
        let blocks = footer.virtual_bytes.div_ceil(u64::from(header.block_bytes));
        let entries = u32::try_from(blocks).map_err(|_| bad("more blocks than a BAT can hold"))?;
        if header.max_entries > BAT_ENTRIES_MAX {
            return Err(Error::TooLarge { what: "a BAT", bytes: u64::from(header.max_entries) * 4 });
        }
        if entries > header.max_entries {
            return Err(bad("the BAT has fewer entries than the virtual size needs"));
        }
        if header.table_offset < footer.data_offset.saturating_add(1024) {
            return Err(bad("the BAT overlaps the header"));
        }
        let table_end = header
            .table_offset
            .checked_add(table_bytes(header.max_entries))
            .ok_or_else(|| bad("the BAT lies past the end of any file"))?;
        let locators = header.locators.iter().filter(|l| l.space_bytes() > 0 && l.len > 0);
        let locators_end = locators.map(|l| l.offset.saturating_add(l.space_bytes())).max().unwrap_or(0);
        Ok(Self {
            table_offset: header.table_offset,
            max_entries: header.max_entries,
            entries,
            batmap_header: None,
            batmap_bits: None,
            data_start: table_end.max(locators_end),
            block_sectors: header.block_bytes / 512,
        })
    }

    /// Sectors of a block's bitmap.
    #[must_use]
    pub fn bitmap_sectors(&self) -> u32 {
        self.block_sectors.div_ceil(8 * 512)
    }
}

/// Bytes a BAT of so many entries takes: whole sectors, at least one.
#[must_use]
pub fn table_bytes(entries: u32) -> u64 {
    round_up(u64::from(entries) * 4, SECTOR_BYTES).max(SECTOR_BYTES)
}

/// Reads the BAT entries in use and checks each: behind the headers, and the
/// whole block inside the file. Memory: 4 bytes per block of the virtual size.
/// (Overlaps are [`crate::check`]'s: they cost a sort.)
///
/// # Errors
/// [`Error::BadBat`] naming the entry.
pub fn read_bat(volume: &dyn Volume, layout: &Layout) -> Result<Vec<u32>> {
    let len = volume.len()?;
    let needed = u64::from(layout.entries) * 4;
    if layout.table_offset.saturating_add(needed) > len {
        return Err(Error::BadHeader { reason: "the BAT lies past the end of the file" });
    }
    let mut bat = Vec::with_capacity(layout.entries as usize);
    let mut buffer = vec![0; SCAN_BYTES];
    let mut at = layout.table_offset;
    let mut left = needed;
    while left > 0 {
        let part = left.min(SCAN_BYTES as u64);
        let Some(chunk) = buffer.get_mut(..part as usize) else {
            break;
        };
        volume.read_at(chunk, at)?;
        bat.extend(chunk.as_chunks::<4>().0.iter().map(|entry| u32::from_be_bytes(*entry)));
        at += part;
        left -= part;
    }
    // The length as it is now: a merge may be filling the image meanwhile, and
    // it lengthens the file before it names a block there.
    check_places(volume, layout, &bat, volume.len()?)?;
    Ok(bat)
}

/// Each block must lie behind the headers and inside the file, and must not
/// cover a sector that reads as the footer: then the guest would have chosen
/// it (invariant 10).
///
/// One block, the last, may stick out of a file: the reference can die while
/// it allocates one. Then no sector past the end may be marked present.
fn check_places(volume: &dyn Volume, layout: &Layout, bat: &[u32], len: u64) -> Result<()> {
    let bitmap_bytes = u64::from(layout.bitmap_sectors()) * SECTOR_BYTES;
    let block_bytes = bitmap_bytes + u64::from(layout.block_sectors) * SECTOR_BYTES;
    let footer_at = len.checked_sub(SECTOR_BYTES).filter(|at| {
        let mut bytes = [0; 512];
        volume.read_at(&mut bytes, *at).is_ok() && Footer::parse(&bytes).is_ok()
    });
    let mut sticks_out = false;
    for (block, &sector) in (0_u32..).zip(bat) {
        if sector == BAT_FREE {
            continue;
        }
        let bad = |reason| Err(Error::BadBat { block, sector, reason });
        let start = u64::from(sector) * SECTOR_BYTES;
        let end = start + block_bytes;
        if start < layout.data_start {
            return bad("it lies inside the headers");
        }
        if footer_at.is_some_and(|at| start < at + SECTOR_BYTES && end > at) {
            return bad("it covers the footer");
        }
        if end > len {
            if sticks_out || start + bitmap_bytes > len || volume.is_device() {
                return bad("it lies past the end of the file");
            }
            sticks_out = true;
            let mut bytes = [0; 512];
            volume.read_at(&mut bytes, start)?;
            let inside = u32::try_from((len - start - bitmap_bytes) / SECTOR_BYTES).unwrap_or(u32::MAX);
            if SectorBitmap::from_bytes(&bytes).present().any(|run| run.end() > inside) {
                return bad("it has sectors past the end of the file");
            }
        }
    }
    Ok(())
}

/// One past the last byte any block takes, at least the end of the headers.
#[must_use]
pub fn data_end(bat: &[u32], layout: &Layout) -> u64 {
    let sectors = u64::from(layout.bitmap_sectors() + layout.block_sectors);
    let last = bat.iter().filter(|entry| **entry != BAT_FREE).max();
    last.map_or(0, |entry| (u64::from(*entry) + sectors) * SECTOR_BYTES).max(layout.data_start)
}
