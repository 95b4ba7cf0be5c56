//! Moving blocks out of the way of larger metadata.

use super::{blocks_of, front_footer, needs_moving, resizable, write_header};
use crate::bat::{BAT_FREE, Layout, data_end, read_bat, table_bytes};
use crate::batmap::{header_for, map_bytes};
use crate::error::{Error, Result};
use crate::limits::BAT_ENTRIES_MAX;
use crate::meta::{FooterState, Meta};
use crate::storage::Volume;
use crate::units::{BLOCK_SECTORS, SECTOR_BYTES, Slot, round_up};

/// Where the BAT, the BATmap's header and its bits will lie.
///
/// Not where the present ones lie, grown: the locators stand behind those,
/// and moving them would change both sectors of the header at once. Behind
/// all present metadata the new tables can be complete before one sector of
/// the header switches to them.
#[derive(Debug, Clone, Copy)]
struct Place {
    table: u64,
    max_entries: u32,
}

impl Place {
    /// Room for some entries more, so that small steps do not move again.
    fn of(layout: &Layout, needed: u32) -> Self {
        let max_entries = needed.next_multiple_of(128).min(BAT_ENTRIES_MAX);
        Self { table: layout.data_start, max_entries }
    }

    fn batmap_header(self) -> u64 {
        self.table + table_bytes(self.max_entries)
    }

    fn end(self) -> u64 {
        self.batmap_header() + SECTOR_BYTES + map_bytes(self.max_entries)
    }
}

/// Moves blocks away from where the larger metadata of a new size will lie,
/// durably. The image reads as before, also through an older map of it: the
/// old places keep their content until [`super::grow`] is called, which the
/// caller may put off until everybody reads through a new map.
///
/// Crash argument; every state is the image as it was, and doing it again
/// finds what is left to do:
/// 1. The footer's copy at the front is made sound, for the end is about to
///    be not. Flush.
/// 2. The file is lengthened past the new places, by a sector more that no
///    guest chooses. Flush: no crash may end the file inside a copy.
/// 3. Blocks are copied, bitmaps included, flush; then their BAT entries name
///    the copies, flush.
///
/// # Errors
/// [`Error::BadSize`] when no sector number is left for a block, what reading
/// and writing said.
pub fn make_room(volume: &dyn Volume, meta: &mut Meta, new_virtual_bytes: u64) -> Result<()> {
    let layout = resizable(meta)?.clone();
    if !needs_moving(meta, new_virtual_bytes) {
        return Ok(());
    }
    let place = Place::of(&layout, blocks_of(new_virtual_bytes));
    let bat = read_bat(volume, &layout)?;
    let moves = plan(&bat, &layout, place)?;
    let Some(end) = moves.iter().map(|(_, _, to)| to.data_offset(BLOCK_SECTORS)).max() else {
        return Ok(());
    };
    front_footer(volume, meta)?;
    lengthen(volume, meta, end)?;
    for (_, from, to) in &moves {
        copy_block(volume, *from, *to)?;
    }
    volume.flush("resize: copies of blocks before the BAT names them")?;
    for (block, _, to) in &moves {
        volume.write_at(&to.0.to_be_bytes(), layout.table_offset + u64::from(*block) * 4)?;
    }
    volume.flush("resize: the BAT before the old places are used")?;
    Ok(())
}

/// Which blocks stand in the way, and where each goes.
fn plan(bat: &[u32], layout: &Layout, place: Place) -> Result<Vec<(u32, Slot, Slot)>> {
    let mut moves = Vec::new();
    let mut free = data_end(bat, layout).max(place.end()).div_ceil(SECTOR_BYTES);
    for (block, &entry) in (0_u32..).zip(bat) {
        if entry == BAT_FREE || Slot(entry).bitmap_offset() >= place.end() {
            continue;
        }
        // Data begins on a 4 KiB boundary, the bitmap in the sector before.
        let to = round_up(free + 1, 8) - 1;
        let slot = u32::try_from(to).ok().filter(|slot| *slot != BAT_FREE);
        let slot =
            slot.ok_or(Error::BadSize { reason: "no room below 2 TiB to move blocks out of the way" })?;
        moves.push((block, Slot(entry), Slot(slot)));
        free = to + 1 + u64::from(BLOCK_SECTORS);
    }
    Ok(moves)
}

/// Copies a block with its bitmap. A block that sticks out of the file has
/// nothing there; its copy reads as zeros.
fn copy_block(volume: &dyn Volume, from: Slot, to: Slot) -> Result<()> {
    const PART_SECTORS: u32 = 512;
    let mut part = vec![0; (PART_SECTORS as usize) * 512];
    let mut done = 0;
    while done < 1 + BLOCK_SECTORS {
        let sectors = (1 + BLOCK_SECTORS - done).min(PART_SECTORS);
        let offset = u64::from(done) * SECTOR_BYTES;
        let Some(buffer) = part.get_mut(..sectors as usize * 512) else {
            break;
        };
        volume.read_at(buffer, from.bitmap_offset() + offset)?;
        volume.write_at(buffer, to.bitmap_offset() + offset)?;
        done += sectors;
    }
    Ok(())
}

/// Writes a larger BAT and an empty BATmap where no block lies any more, and
/// switches the header to them: steps 2 and 3 of [`super::grow`]. Marker and
/// key hash go along.
pub(super) fn move_table(volume: &dyn Volume, meta: &mut Meta, needed: u32) -> Result<()> {
    let layout = resizable(meta)?.clone();
    let place = Place::of(&layout, needed);
    let bat = read_bat(volume, &layout)?;
    if bat.iter().any(|entry| *entry != BAT_FREE && Slot(*entry).bitmap_offset() < place.end()) {
        return Err(Error::BadSize { reason: "blocks still stand where the BAT goes" });
    }
    lengthen(volume, meta, place.end())?;
    let mut table = Vec::with_capacity(table_bytes(place.max_entries) as usize);
    table.extend(bat.iter().flat_map(|entry| entry.to_be_bytes()));
    table.resize(place.max_entries as usize * 4, 0xFF);
    table.resize(table_bytes(place.max_entries) as usize, 0);
    volume.write_at(&table, place.table)?;
    let map = vec![0; map_bytes(place.max_entries) as usize];
    volume.write_at(&map, place.batmap_header() + SECTOR_BYTES)?;
    let header = header_for(volume, &layout, place.batmap_header(), place.max_entries);
    volume.write_at(&header, place.batmap_header())?;
    volume.flush("resize: the new BAT before the header names it")?;
    write_header(volume, meta, place.table, place.max_entries)
}

/// Lengthens the file to hold `end` bytes and a sector more, durably, so that
/// no crash ends it inside what is written there.
fn lengthen(volume: &dyn Volume, meta: &mut Meta, end: u64) -> Result<()> {
    let needed = end + SECTOR_BYTES;
    if volume.len()? >= needed {
        return Ok(());
    }
    volume.extend(needed)?;
    volume.flush("resize: the length before anything is written there")?;
    meta.footer_state = FooterState::EndMissing;
    Ok(())
}
