//! Changing the virtual size of a dynamic or differencing image.
//!
//! The metadata of an image lies before its blocks, so a larger BAT may need
//! room where blocks are. Three ways to grow, cheapest first:
//!
//! * the BAT has entries to spare (the reference's `-S`): only the footers
//!   change;
//! * it has room in its last sector: header and footers change;
//! * blocks move to the end first, and a new BAT and BATmap are written where
//!   they were.
//!
//! Fixed images do not change size: their only footer stands just where new
//! data would go, so no order of writes survives a power cut.

use crate::bat::{BAT_FREE, Layout, data_end, read_bat, table_bytes};
use crate::batmap::{map_bytes, read_batmap, write_batmap};
use crate::create::checked_size;
use crate::error::{Error, Result};
use crate::footer::{CREATOR_TAP, Footer, Geometry};
use crate::limits::SCAN_BYTES;
use crate::meta::{FooterState, Meta};
use crate::storage::Volume;
use crate::units::{BLOCK_BYTES, BLOCK_SECTORS, SECTOR_BYTES};
use crate::writer::{Settled, settle_files};

mod journal;
mod moving;
mod shrink;

pub use journal::revert;
pub use moving::make_room;
pub use shrink::shrink;

/// Whether growing to a size moves blocks. Then nobody may be reading the
/// image through an older map: see [`make_room`].
#[must_use]
pub fn needs_moving(meta: &Meta, new_virtual_bytes: u64) -> bool {
    meta.layout.as_ref().is_some_and(|layout| {
        let needed = blocks_of(new_virtual_bytes);
        needed > layout.max_entries && !fits_padding(layout, needed)
    })
}

/// Grows a settled image that the caller holds the lock of, to a size that is
/// rounded up to whole blocks. A size it has already changes nothing. The new
/// part reads as zeros, or as what an ancestor has there.
///
/// Crash argument. Until step 4 the footers say the old size, and nothing
/// that the old size reaches has changed its meaning; so recovery is to do
/// nothing, or to grow again.
/// 1. Blocks move out of the way: see [`make_room`].
/// 2. The entries the new size uses are made free, in the old BAT where it
///    has room, else in a new one where no block lies; flush. What stood in
///    them (zeros behind the table's end, places of a shrunken image) must
///    not come to life with the new size.
/// 3. If the header must change (entries, place of the BAT) that is one
///    sector, so it names the old BAT or the new one, both complete; flush.
/// 4. BATmap and footers: see [`settle_files`]. A BATmap summed for the other
///    size is ignored and rebuilt.
///
/// # Errors
/// [`Error::BadSize`], [`Error::Unsupported`], what reading and writing said.
pub fn grow(volume: &dyn Volume, meta: &mut Meta, new_virtual_bytes: u64) -> Result<()> {
    let new_bytes = checked_size(new_virtual_bytes)?;
    let layout = resizable(meta)?.clone();
    if new_bytes <= meta.virtual_bytes() {
        return Ok(());
    }
    let needed = blocks_of(new_bytes);
    front_footer(volume, meta)?;
    if needs_moving(meta, new_bytes) {
        make_room(volume, meta, new_bytes)?;
        moving::move_table(volume, meta, needed)?;
    } else {
        free_entries(volume, &layout, needed)?;
        if needed > layout.max_entries {
            write_header(volume, meta, layout.table_offset, needed)?;
        }
    }
    finish(volume, meta, new_bytes)
}

/// The layout of an image whose size can change.
fn resizable(meta: &Meta) -> Result<&Layout> {
    let unsupported = |what| Err(Error::Unsupported { what });
    let Some(layout) = &meta.layout else {
        return unsupported("changing the size of a fixed image");
    };
    if layout.block_sectors != BLOCK_SECTORS {
        return unsupported("changing the size of an image whose blocks are not 2 MiB");
    }
    // The reference refuses these too. Others take the size from the geometry,
    // and what they left behind the old end would come to light.
    if meta.footer.creator != CREATOR_TAP || !meta.virtual_bytes().is_multiple_of(BLOCK_BYTES) {
        return unsupported("changing the size of an image of another program");
    }
    Ok(layout)
}

fn blocks_of(virtual_bytes: u64) -> u32 {
    u32::try_from(virtual_bytes.div_ceil(BLOCK_BYTES)).unwrap_or(u32::MAX)
}

/// Whether a BAT of so many entries ends where the present one ends, and its
/// BATmap too.
fn fits_padding(layout: &Layout, needed: u32) -> bool {
    let map_fits =
        layout.batmap_bits.is_none_or(|(_, sectors)| map_bytes(needed) <= u64::from(sectors) * SECTOR_BYTES);
    table_bytes(needed) == table_bytes(layout.max_entries) && map_fits
}

/// Makes the entries from the old size up to `needed` free, durably.
fn free_entries(volume: &dyn Volume, layout: &Layout, needed: u32) -> Result<()> {
    let mut at = layout.table_offset + u64::from(layout.entries) * 4;
    let end = layout.table_offset + u64::from(needed) * 4;
    let free = vec![0xFF; SCAN_BYTES];
    while at < end {
        let part = (end - at).min(SCAN_BYTES as u64);
        volume.write_at(free.get(..part as usize).unwrap_or(&free), at)?;
        at += part;
    }
    volume.flush("resize: new BAT entries before anything reaches them")?;
    Ok(())
}

/// Changes the place and the capacity of the BAT in the header, durably:
/// fields of its first sector, so one write that is whole or not at all.
fn write_header(volume: &dyn Volume, meta: &mut Meta, table_offset: u64, max_entries: u32) -> Result<()> {
    let Some(header) = &mut meta.header else {
        return Err(Error::BadHeader { reason: "no header" });
    };
    header.table_offset = table_offset;
    header.max_entries = max_entries;
    let bytes = header.to_bytes()?;
    volume.write_at(&bytes[..512], meta.footer.data_offset)?;
    volume.flush("resize: the header before the footers")?;
    Ok(())
}

/// The copy of the footer at the front must serve while the end is not whole.
fn front_footer(volume: &dyn Volume, meta: &mut Meta) -> Result<()> {
    if matches!(meta.footer_state, FooterState::CopyBad | FooterState::CopyDiffers) {
        volume.write_at(&meta.footer.to_bytes(), 0)?;
        volume.flush("resize: the footer's copy before the end changes")?;
        meta.footer_state = FooterState::EndMissing;
    }
    Ok(())
}

/// Footers and BATmap for a new size; `meta` becomes what is on the file.
fn finish(volume: &dyn Volume, meta: &mut Meta, new_bytes: u64) -> Result<()> {
    let whole = read_batmap(volume, meta).unwrap_or_default();
    let footer =
        Footer { virtual_bytes: new_bytes, geometry: Geometry::of(new_bytes), ..meta.footer.clone() };
    let mut next = Meta { footer, ..Meta::read(volume)? };
    let Some(layout) = &mut next.layout else {
        return Err(Error::BadHeader { reason: "no header" });
    };
    layout.entries = blocks_of(new_bytes);
    let bat = read_bat(volume, layout)?;
    let batmap = masked(whole, &bat);
    let settled = Settled { batmap, data_end: data_end(&bat, layout) };
    guard(volume, &settled, next.footer_state)?;
    settle_files(volume, &mut next, &settled, None)?;
    *meta = Meta::read(volume)?;
    Ok(())
}

/// Sees to it that the file ends in a sector no guest chose before its length
/// is cut to just behind the last block; see [`settle_files`].
fn guard(volume: &dyn Volume, settled: &Settled, state: FooterState) -> Result<()> {
    let end = settled.data_end + SECTOR_BYTES;
    let at_end = matches!(state, FooterState::Settled | FooterState::CopyDiffers);
    if volume.is_device() || (at_end && volume.len()? == end) {
        return Ok(());
    }
    volume.zero(settled.data_end, SECTOR_BYTES)?;
    volume.flush("resize: a zero sector behind the last block before the file is cut there")?;
    Ok(())
}

/// BATmap bits, of allocated blocks only.
fn masked(mut whole: Vec<u8>, bat: &[u32]) -> Vec<u8> {
    whole.resize(bat.len().div_ceil(8), 0);
    for (block, _) in bat.iter().enumerate().filter(|(_, entry)| **entry == BAT_FREE) {
        if let Some(byte) = whole.get_mut(block / 8) {
            *byte &= !(0x80 >> (block % 8));
        }
    }
    whole
}

/// Zeroes the BATmap, durably: before a change that could make a bit lie.
fn drop_batmap(volume: &dyn Volume, meta: &Meta) -> Result<()> {
    write_batmap(volume, meta, &[])?;
    volume.flush("resize: an empty BATmap before blocks go")?;
    Ok(())
}
