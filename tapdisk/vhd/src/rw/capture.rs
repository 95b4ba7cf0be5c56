//! What one write-back takes along, and what the file may say meanwhile. The
//! order of the steps and their crash argument: [`super`].

use std::collections::{BTreeMap, BTreeSet};

use super::{Presence, RwImage};
use crate::bat::BAT_FREE;
use crate::bitmap::SectorBitmap;
use crate::units::{BlockNo, SECTOR_BYTES, Slot};

/// BAT entries in a sector, the unit in which the BAT is written.
const ENTRIES_PER_SECTOR: u32 = 128;

/// Metadata captured for one write-back, to be written in this order: those
/// of `bitmaps` in [`Captured::new_slots`], flush, the other `bitmaps` and
/// [`RwImage::bat_sectors`], flush.
#[derive(Debug, Clone, Default)]
pub struct Captured {
    /// Bitmaps, with the slots they belong to.
    pub bitmaps: Vec<(Slot, SectorBitmap)>,
    /// Final entries of the blocks whose place changed.
    pub(super) entries: BTreeMap<BlockNo, u32>,
    pinned: Vec<BlockNo>,
    /// Slots that blocks left.
    pub(super) freed: Vec<(BlockNo, Slot)>,
}

impl Captured {
    /// Slots that this capture's entries make known.
    #[must_use]
    pub fn new_slots(&self) -> BTreeSet<Slot> {
        self.entries.values().filter(|entry| **entry != BAT_FREE).map(|entry| Slot(*entry)).collect()
    }

    /// Whether any BAT entry is to be written.
    #[must_use]
    pub fn changes_bat(&self) -> bool {
        !self.entries.is_empty()
    }

    /// Whether all it does is to free blocks.
    #[must_use]
    pub fn only_frees(&self) -> bool {
        self.bitmaps.is_empty() && self.changes_bat() && self.new_slots().is_empty()
    }

    /// Whether there is nothing to write.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bitmaps.is_empty() && self.entries.is_empty()
    }
}

impl RwImage {
    /// Takes what waits now, for one write-back (see the module).
    pub fn capture(&mut self) -> Captured {
        let mut captured = Captured { freed: std::mem::take(&mut self.freed), ..Captured::default() };
        for block in std::mem::take(&mut self.dirty_bitmaps) {
            match self.presence(block) {
                Presence::Absent => {}
                Presence::Whole(slot) => captured.bitmaps.push((slot, SectorBitmap::FULL)),
                Presence::Partial(slot) => {
                    if let Some(bitmap) = self.pinned.get(&block) {
                        captured.bitmaps.push((slot, bitmap.clone()));
                    }
                }
            }
            captured.pinned.push(block);
        }
        for block in std::mem::take(&mut self.dirty_entries) {
            if let Some(&entry) = self.bat.get(block.index()) {
                // Freed, and given a new slot that nothing was written to:
                // only the first of the two may become durable.
                let placed = !self.unwritten.contains(&block);
                captured.entries.insert(block, if placed { entry } else { BAT_FREE });
            }
        }
        captured
    }

    /// The BAT sectors to write for a capture: byte offset in the file and
    /// content. Neighbours keep what the file may say of them.
    #[must_use]
    pub fn bat_sectors(&self, captured: &Captured) -> Vec<(u64, [u8; 512])> {
        let sectors: BTreeSet<u32> =
            captured.entries.keys().map(|block| block.0 / ENTRIES_PER_SECTOR).collect();
        sectors
            .into_iter()
            .map(|sector| (self.bat_offset(sector), self.bat_sector(sector, captured)))
            .collect()
    }

    fn bat_offset(&self, sector: u32) -> u64 {
        self.layout.table_offset + u64::from(sector) * SECTOR_BYTES
    }

    fn bat_sector(&self, sector: u32, captured: &Captured) -> [u8; 512] {
        let mut bytes = [0xFF; 512];
        let first = sector * ENTRIES_PER_SECTOR;
        for (block, chunk) in (first..).zip(bytes.as_chunks_mut::<4>().0) {
            let block = BlockNo(block);
            let entry = captured
                .entries
                .get(&block)
                .or_else(|| self.on_file.get(&block))
                .or_else(|| self.bat.get(block.index()));
            *chunk = match entry {
                Some(entry) => entry.to_be_bytes(),
                // The reference leaves 0 behind the table's last entry.
                None if block.0 >= self.layout.max_entries => [0; 4],
                None => BAT_FREE.to_be_bytes(),
            };
        }
        bytes
    }

    /// The BAT sectors of a capture were written: the file may say it from
    /// now on, durable or not.
    pub fn bat_written(&mut self, captured: &Captured) {
        for (&block, &entry) in &captured.entries {
            if self.bat.get(block.index()) == Some(&entry) {
                self.on_file.remove(&block);
            } else {
                self.on_file.insert(block, entry);
            }
        }
    }

    /// A capture is durable in full. Returns the slots it released: to be
    /// zeroed (but on a device), once nothing that was started before still
    /// reads them, and then given to [`Slots::put`].
    pub fn durable(&mut self, captured: Captured) -> Vec<Slot> {
        for block in captured.pinned {
            if self.dirty_bitmaps.contains(&block) || self.unwritten.contains(&block) {
                continue;
            }
            if let Some(bitmap) = self.pinned.remove(&block)
                && matches!(self.presence(block), Presence::Partial(_))
            {
                self.clean.put(block, &bitmap);
            }
        }
        captured.freed.into_iter().map(|(_, slot)| slot).collect()
    }
}
