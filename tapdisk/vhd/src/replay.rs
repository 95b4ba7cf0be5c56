//! What a killed holder left in its pending record, made part of the image.

use std::collections::BTreeMap;

use crate::bat::{BAT_FREE, Layout, read_bat};
use crate::bitmap::SectorBitmap;
use crate::error::Result;
use crate::record::{Entry, PendingRecord};
use crate::storage::Volume;
use crate::units::{BlockNo, Slot};

/// Applies what a killed holder left in its record.
///
/// 1. flush: the data every entry vouches for was in the page cache when the
///    entry became valid; now it is durable.
/// 2. bitmaps are written, flush: of a block that the record places they are
///    what the record says (its slot may hold anything), of others merged with
///    what is on the file.
/// 3. BAT entries are written. The caller may remove the record: only a power
///    cut could lose them now, and that voids the record anyway. A second
///    crash anywhere starts over, and what a power cut leaves of steps 2 and 3
///    is the state of some write-back.
pub(crate) fn replay(volume: &dyn Volume, layout: &Layout, record: &PendingRecord) -> Result<()> {
    let mut blocks: BTreeMap<BlockNo, Replayed> = BTreeMap::new();
    let bat = read_bat(volume, layout)?;
    let now = |block: BlockNo| bat.get(block.index()).copied().unwrap_or(BAT_FREE);
    for entry in record.entries() {
        match entry {
            Entry::Placed { block, slot, whole } => {
                let bitmap = if whole { SectorBitmap::FULL } else { SectorBitmap::EMPTY };
                blocks.insert(block, Replayed { entry: slot.0, placed: true, bitmap });
            }
            Entry::Present { block, run } => {
                let known = || Replayed { entry: now(block), placed: false, bitmap: SectorBitmap::EMPTY };
                blocks.entry(block).or_insert_with(known).bitmap.set(run);
            }
            Entry::Freed { block } => {
                let freed = Replayed { entry: BAT_FREE, placed: true, bitmap: SectorBitmap::EMPTY };
                blocks.insert(block, freed);
            }
        }
    }
    blocks.retain(|block, _| block.0 < layout.entries);
    if blocks.is_empty() {
        return Ok(());
    }
    volume.flush("replay: data before metadata")?;
    for block in blocks.values().filter(|block| block.entry != BAT_FREE) {
        let mut bytes = [0; 512];
        let at = Slot(block.entry).bitmap_offset();
        let mut bitmap = block.bitmap.clone();
        if !block.placed {
            volume.read_at(&mut bytes, at)?;
            bitmap.union(&SectorBitmap::from_bytes(&bytes));
        }
        volume.write_at(&bitmap.to_bytes(), at)?;
    }
    volume.flush("replay: bitmaps before BAT")?;
    for (block, Replayed { entry, .. }) in &blocks {
        let at = layout.table_offset + u64::from(block.0) * 4;
        volume.write_at(&entry.to_be_bytes(), at)?;
    }
    Ok(())
}

/// What a record says of a block.
struct Replayed {
    /// Its BAT entry.
    entry: u32,
    /// The record has all that happened to it since it was given this entry.
    placed: bool,
    bitmap: SectorBitmap,
}
