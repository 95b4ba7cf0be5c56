//! Space given back while a write-back waits for space.
//!
//! On a full filesystem the bitmaps of new blocks cannot be written, so their
//! capture cannot become durable, and what the guest gives up meanwhile would
//! wait behind it for ever. But clearing a BAT entry needs no space and no
//! other change: it can go first.
//!
//! Crash argument, for blocks taken out of a capture that is held back:
//! 1. Their entries are written as free, neighbours as the file has them
//!    (invariant 5: nothing else becomes visible). A crash here: each reads as
//!    before, or as what the guest gave up.
//! 2. flush, then their slots may be zeroed and reused (invariant 6): no
//!    durable entry names them, and the held capture, when it is written at
//!    last, neither, for every entry and bitmap of these blocks was taken out.
//! 3. The record keeps its entries for them until both halves are dropped. A
//!    replay applies them in order, and the last one of such a block is that
//!    it was freed, or names a slot that it was given later.

use std::collections::BTreeSet;

use super::{Captured, Presence, RwImage};
use crate::bat::BAT_FREE;
use crate::units::{BlockNo, Slot};

impl RwImage {
    /// Takes what gives space back out of a capture that cannot be written
    /// for want of it, and out of what waits for the next one; `None` if there
    /// is nothing. It is a capture of its own, without bitmaps or data.
    pub fn relief(&mut self, held: &mut Captured) -> Option<Captured> {
        let mut relief = Captured::default();
        let given_up: BTreeSet<BlockNo> =
            held.freed.iter().chain(&self.freed).map(|(block, _)| *block).collect();
        for block in given_up {
            if self.presence(block) == Presence::Absent || self.unwritten.contains(&block) {
                // Nothing of it is left: all its former slots go. It stays
                // dirty, so that the record's half that says so is captured.
                relief.freed.extend(self.freed.extract_if(.., |(of, _)| *of == block));
            } else if held.entries.get(&block) != Some(&BAT_FREE) {
                continue; // it was written again, and that waits for space
            }
            relief.freed.extend(held.freed.extract_if(.., |(of, _)| *of == block));
            held.entries.remove(&block);
            relief.entries.insert(block, BAT_FREE);
        }
        let slots: BTreeSet<Slot> = relief.freed.iter().map(|(_, slot)| *slot).collect();
        held.bitmaps.retain(|(slot, _)| !slots.contains(slot));
        (!slots.is_empty()).then_some(relief)
    }
}

impl Captured {
    /// Takes back what was taken out of it and could not be written.
    pub fn take_back(&mut self, relief: Self) {
        self.entries.extend(relief.entries);
        self.freed.extend(relief.freed);
    }
}
