//! An image open for writing, as data: where blocks lie, which sectors are
//! present, and what waits for a flush. No I/O: the engine and
//! [`crate::writer`] do that, in the order the steps below demand.
//!
//! ```text
//!        written()                capture()              durable()
//! data ------------> dirty ----------------> captured -----------> clean
//! on file            record entries          new bitmaps, flush  record half dropped,
//!                    pushed, then acked      others, BAT, flush  freed slots released
//! ```
//!
//! Crash argument (invariant 5), for the write-back of one capture:
//! 1. bitmaps of [`Captured::new_slots`] are written. A crash here: they lie
//!    in slots nobody names.
//! 2. flush: data of every captured bit and entry, the file's length, and
//!    those bitmaps are durable. A crash here: the old metadata names old
//!    content.
//! 3. the other captured bitmaps and the captured BAT entries are written.
//!    Bits of blocks the durable BAT names vouch for durable data; slot,
//!    bitmap and data behind each entry are durable, whichever of the two
//!    lasts. An entry that frees a block uncovers only what the guest gave
//!    up, or what a merge has made durable in the parent.
//! 4. flush, then the record's half is dropped and freed slots may be zeroed
//!    and reused (invariant 6): no durable entry names them.
//!
//! What only frees blocks, with nothing written since the last first flush
//! began, needs no other one: there is nothing that it names
//! ([`Captured::only_frees`]).
//!
//! Two views of the BAT are kept: memory's, and what the file may say
//! (`on_file`, only where the two differ), so that writing one entry of a BAT
//! sector never carries along a neighbour whose data is not durable yet.

mod capture;
mod clean;
mod relief;

use std::borrow::Cow;
use std::collections::{BTreeSet, HashMap};

use crate::bat::{BAT_FREE, Layout};
use crate::bitmap::SectorBitmap;
use crate::record::Entry;
use crate::slots::{NoRoom, Slots};
use crate::units::{BlockNo, SectorRun, Slot};
pub use capture::Captured;
use clean::CleanBitmaps;

/// What an image has of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Presence {
    /// Nothing.
    Absent,
    /// Every sector; its bitmap need not be read.
    Whole(Slot),
    /// Some sectors: its bitmap tells.
    Partial(Slot),
}

/// See the module.
#[derive(Debug)]
pub struct RwImage {
    layout: Layout,
    /// Memory's BAT, one entry per block of the virtual size.
    bat: Vec<u32>,
    whole: BlockSet,
    allocated: u32,
    /// What the file may say, for blocks where memory says otherwise.
    on_file: HashMap<BlockNo, u32>,
    /// Allocated, but no write into them has completed yet.
    unwritten: BTreeSet<BlockNo>,
    /// Bitmaps that differ from the file's, or are being written.
    pinned: HashMap<BlockNo, SectorBitmap>,
    clean: CleanBitmaps,
    dirty_bitmaps: BTreeSet<BlockNo>,
    dirty_entries: BTreeSet<BlockNo>,
    freed: Vec<(BlockNo, Slot)>,
    slots: Slots,
}

impl RwImage {
    /// From a validated BAT, the blocks the BATmap (if it was sound) says are
    /// whole, and the space the slots leave. Bits of unallocated blocks are
    /// masked (invariant 7).
    #[must_use]
    pub fn new(layout: Layout, bat: Vec<u32>, whole: impl Fn(BlockNo) -> bool, slots: Slots) -> Self {
        let mut set = BlockSet::new(bat.len());
        let mut allocated = 0;
        for (block, entry) in (0..).map(BlockNo).zip(&bat) {
            if *entry != BAT_FREE {
                allocated += 1;
                set.put(block, whole(block));
            }
        }
        Self {
            layout,
            bat,
            whole: set,
            allocated,
            on_file: HashMap::new(),
            unwritten: BTreeSet::new(),
            pinned: HashMap::new(),
            clean: CleanBitmaps::default(),
            dirty_bitmaps: BTreeSet::new(),
            dirty_entries: BTreeSet::new(),
            freed: Vec::new(),
            slots,
        }
    }

    /// Where things lie in the file.
    #[must_use]
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Number of blocks of the virtual disk.
    #[must_use]
    pub fn blocks(&self) -> u32 {
        self.layout.entries
    }

    /// Number of blocks this image has, memory included.
    #[must_use]
    pub fn allocated_blocks(&self) -> u32 {
        self.allocated
    }

    /// Whether the image lies on a device: new space is not zero there, and
    /// zeros give none back.
    #[must_use]
    pub fn on_device(&self) -> bool {
        !self.slots.fresh_is_zero()
    }

    /// Free and used space of the file.
    pub fn slots(&mut self) -> &mut Slots {
        &mut self.slots
    }

    /// What the image has of a block; `Absent` past its end.
    #[must_use]
    pub fn presence(&self, block: BlockNo) -> Presence {
        match self.bat.get(block.index()) {
            None | Some(&BAT_FREE) => Presence::Absent,
            Some(&slot) if self.whole.has(block) => Presence::Whole(Slot(slot)),
            Some(&slot) => Presence::Partial(Slot(slot)),
        }
    }

    /// The bitmap of a partial block, if it is in memory.
    pub fn bitmap(&mut self, block: BlockNo) -> Option<Cow<'_, SectorBitmap>> {
        match self.pinned.get(&block) {
            Some(bitmap) => Some(Cow::Borrowed(bitmap)),
            None => self.clean.get(block).map(Cow::Owned),
        }
    }

    /// The same without a claim to keep it in memory for longer.
    #[must_use]
    pub fn known_bitmap(&self, block: BlockNo) -> Option<Cow<'_, SectorBitmap>> {
        match self.pinned.get(&block) {
            Some(bitmap) => Some(Cow::Borrowed(bitmap)),
            None => self.clean.peek(block).map(Cow::Owned),
        }
    }

    /// Takes in a bitmap read from the file for `slot`. Refused (false) when
    /// the block has moved or changed since the read began, so that an old
    /// bitmap never replaces a newer one.
    pub fn bitmap_read(&mut self, block: BlockNo, slot: Slot, bitmap: SectorBitmap) -> bool {
        if self.presence(block) != Presence::Partial(slot) || self.pinned.contains_key(&block) {
            return false;
        }
        if bitmap.is_full() {
            self.whole.put(block, true);
        } else {
            self.clean.put(block, &bitmap);
        }
        true
    }

    /// Gives an absent block a slot. `alone`: nobody below has the block; if
    /// the slot also reads as zeros all of it becomes present at once. Else,
    /// so on a device always, only what [`Self::written`] names: the rest
    /// reads as what lies below, or as zeros. Nothing is on the file yet.
    ///
    /// # Errors
    /// [`NoRoom`] when block places past 2 TiB would be needed.
    pub fn allocate(&mut self, block: BlockNo, alone: bool) -> Result<Slot, NoRoom> {
        debug_assert_eq!(self.presence(block), Presence::Absent);
        let slot = self.slots.take()?;
        let whole = alone && self.slots.fresh_is_zero();
        self.set_entry(block, slot.0);
        self.allocated += 1;
        self.whole.put(block, whole);
        self.unwritten.insert(block);
        if !whole {
            self.pinned.insert(block, SectorBitmap::EMPTY);
        }
        Ok(slot)
    }

    /// Whether the block was just given a slot: no write into it has completed.
    #[must_use]
    pub fn is_unwritten(&self, block: BlockNo) -> bool {
        self.unwritten.contains(&block)
    }

    /// The record entries a completed write of `run` needs before it may be
    /// acknowledged. Nothing changes yet: see [`Self::written`].
    ///
    /// `at` is the slot the data went to: a block that was freed meanwhile
    /// takes nothing from a write that was overtaken.
    pub fn entries_for(&mut self, block: BlockNo, at: Slot, run: SectorRun) -> Vec<Entry> {
        let mut entries = Vec::new();
        let (slot, whole) = match self.presence(block) {
            Presence::Whole(slot) if slot == at => (slot, true),
            Presence::Partial(slot) if slot == at => (slot, false),
            _ => return entries,
        };
        if self.unwritten.contains(&block) {
            entries.push(Entry::Placed { block, slot, whole });
        }
        if !whole && !self.bitmap(block).is_some_and(|bitmap| bitmap.has_all(run)) {
            entries.push(Entry::Present { block, run });
        }
        entries
    }

    /// Data of `run` is on the file (and its record entries are valid): its
    /// bits are set and wait for write-back. The bitmap of a partial block
    /// must be in memory.
    pub fn written(&mut self, block: BlockNo, at: Slot, run: SectorRun) {
        let presence = self.presence(block);
        if presence != Presence::Whole(at) && presence != Presence::Partial(at) {
            return;
        }
        if self.unwritten.remove(&block) {
            self.dirty_entries.insert(block);
            self.dirty_bitmaps.insert(block);
        } else if self.clean.get(block).is_some_and(|bitmap| bitmap.has_all(run)) {
            return;
        }
        if matches!(presence, Presence::Partial(_)) {
            let bitmap = match self.pinned.get_mut(&block) {
                Some(bitmap) => bitmap,
                None => {
                    let clean = self.clean.pop(block);
                    debug_assert!(clean.is_some(), "the bitmap of {block:?} is not in memory");
                    self.pinned.entry(block).or_insert(clean.unwrap_or_default())
                }
            };
            if !bitmap.has_all(run) {
                bitmap.set(run);
                self.dirty_bitmaps.insert(block);
            }
            if bitmap.is_full() {
                self.whole.put(block, true);
            }
        }
    }

    /// All data of a block that was just given a slot is on the file, and so is
    /// its full bitmap: see [`Self::written`].
    pub fn written_whole(&mut self, block: BlockNo, at: Slot) {
        let presence = self.presence(block);
        if presence != Presence::Whole(at) && presence != Presence::Partial(at) {
            return;
        }
        debug_assert!(self.unwritten.contains(&block), "{block:?} was written before");
        if self.unwritten.remove(&block) {
            self.dirty_entries.insert(block);
            self.pinned.remove(&block);
            self.whole.put(block, true);
        }
    }

    /// The block leaves this image. Its slot is released once a later
    /// write-back has made that durable. Push [`Entry::Freed`] before the
    /// request is acknowledged.
    pub fn free(&mut self, block: BlockNo) {
        let (Presence::Whole(slot) | Presence::Partial(slot)) = self.presence(block) else {
            return;
        };
        self.set_entry(block, BAT_FREE);
        self.allocated -= 1;
        self.whole.put(block, false);
        self.pinned.remove(&block);
        self.clean.pop(block);
        self.dirty_bitmaps.remove(&block);
        self.unwritten.remove(&block);
        self.dirty_entries.insert(block);
        self.freed.push((block, slot));
    }

    /// Forgets blocks that were given a slot but into which no write has
    /// completed. Nothing may be in flight. Their slots are not used again: a
    /// failed write may have left bytes there.
    pub fn drop_unwritten(&mut self) {
        for block in std::mem::take(&mut self.unwritten) {
            if let Some(entry) = self.bat.get_mut(block.index()) {
                *entry = BAT_FREE;
                self.allocated -= 1;
            }
            if self.on_file.get(&block) == Some(&BAT_FREE) {
                self.on_file.remove(&block);
            }
            self.whole.put(block, false);
            self.pinned.remove(&block);
        }
    }

    /// Whether anything waits for write-back.
    #[must_use]
    pub fn is_dirty(&self) -> bool {
        !self.dirty_bitmaps.is_empty() || !self.dirty_entries.is_empty()
    }

    /// Blocks that are whole, for the BATmap: bit 0 of byte 0 is block 0.
    pub fn whole_blocks(&self) -> impl Iterator<Item = BlockNo> + '_ {
        self.blocks_held().filter(|block| self.whole.has(*block))
    }

    /// Where the blocks lie that this image has, and whether they are whole.
    pub fn allocated(&self) -> impl Iterator<Item = (BlockNo, Slot, bool)> + '_ {
        self.blocks_held().filter_map(|block| {
            let slot = Slot(*self.bat.get(block.index())?);
            Some((block, slot, self.whole.has(block)))
        })
    }

    /// Blocks this image has, in order.
    pub fn blocks_held(&self) -> impl Iterator<Item = BlockNo> + '_ {
        self.blocks_held_from(BlockNo(0))
    }

    /// Those of them from `first` on.
    pub fn blocks_held_from(&self, first: BlockNo) -> impl Iterator<Item = BlockNo> + '_ {
        (first.0..)
            .map(BlockNo)
            .zip(self.bat.get(first.index()..).unwrap_or_default())
            .filter(|(block, entry)| **entry != BAT_FREE && !self.unwritten.contains(block))
            .map(|(block, _)| block)
    }

    /// One past the last byte any written block takes, at least the end of
    /// the headers.
    #[must_use]
    pub fn data_end(&self) -> u64 {
        self.blocks_held()
            .filter_map(|block| self.bat.get(block.index()))
            .map(|slot| Slot(*slot).data_offset(crate::units::BLOCK_SECTORS))
            .max()
            .unwrap_or(0)
            .max(self.layout.data_start)
    }

    fn set_entry(&mut self, block: BlockNo, entry: u32) {
        if let Some(now) = self.bat.get_mut(block.index()) {
            self.on_file.entry(block).or_insert(*now);
            *now = entry;
        }
    }
}

/// One bit per block.
#[derive(Debug)]
struct BlockSet(Vec<u64>);

impl BlockSet {
    fn new(blocks: usize) -> Self {
        Self(vec![0; blocks.div_ceil(64)])
    }

    fn has(&self, block: BlockNo) -> bool {
        self.0.get(block.index() / 64).is_some_and(|word| word >> (block.0 % 64) & 1 == 1)
    }

    fn put(&mut self, block: BlockNo, value: bool) {
        if let Some(word) = self.0.get_mut(block.index() / 64) {
            let bit = 1 << (block.0 % 64);
            *word = if value { *word | bit } else { *word & !bit };
        }
    }
}

#[cfg(test)]
#[path = "rw_tests.rs"]
mod tests;
