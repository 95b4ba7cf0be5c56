//! The space of an image open for writing: where the next block goes.
//!
//! Data starts on a 4 KiB boundary, so a bitmap sits at a sector that is 7
//! modulo 8 and slots are 4104 sectors apart, as the reference places them.
//!
//! On a file a slot that was never used reads as zeros; on a device it holds
//! anything ([`Slots::fresh_is_zero`]).
//!
//! Every length the file is ever given ends in [`GUARD_BYTES`] that no slot
//! takes, now or later: whichever of those lengths a crash leaves, what a
//! reader finds at the end is not a footer a guest forged (invariant 10).

use std::collections::BTreeSet;

use crate::bat::BAT_FREE;
use crate::units::{BLOCK_SECTORS, SECTOR_BYTES, Slot, round_up};

/// Zero bytes at the end of every length.
pub const GUARD_BYTES: u64 = SECTOR_BYTES;
/// Slots by which a volume is extended at once; a file, as what it gains may take
/// space, by no more than were taken.
pub const EXTEND_SLOTS: u64 = 16;
/// The same of a file that guests write to, once they took [`BUSY_SLOTS`].
const EXTEND_FILE_SLOTS: u64 = 64;
/// Whoever took so many slots may well take many more.
const BUSY_SLOTS: u64 = 16;
/// Such a file is extended while it has room for so many more, or for as many as
/// were taken: as many first writes as a guest may well have in flight.
const AHEAD_SLOTS: u64 = 32;
const GUARD_SECTORS: u64 = GUARD_BYTES / SECTOR_BYTES;
/// Sectors from one slot to the next.
pub(crate) const STRIDE_SECTORS: u64 = 8 + BLOCK_SECTORS as u64;

/// No place for another block that a 32-bit sector number can name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{}", Self::WHAT)]
pub struct NoRoom;

impl NoRoom {
    const WHAT: &str = "a block past 2 TiB: the image is full";

    /// For messages.
    #[must_use]
    pub fn what(self) -> &'static str {
        Self::WHAT
    }
}

/// A stretch of the file, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gap {
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
}

/// See the module.
#[derive(Debug)]
pub struct Slots {
    /// Given back, zeroed on a file; lowest first, to keep it short.
    free: BTreeSet<Slot>,
    /// First sector that neither a slot nor the guard behind it has taken.
    end_sector: u64,
    /// Length of the file, or device.
    len_bytes: u64,
    /// Slots taken since the image was opened.
    taken: u64,
    /// See [`Self::fresh_is_zero`].
    fresh_is_zero: bool,
    /// See [`Self::page_aligned`].
    page_aligned: bool,
}

impl Slots {
    /// The space left by the blocks of `bat`, and the gaps between them that
    /// must be zeroed, durably, before anything is written: whole slots of
    /// them are reused. `data_start`: end of the headers.
    #[must_use]
    pub fn survey(bat: &[u32], data_start: u64) -> (Self, Vec<Gap>) {
        let mut taken: Vec<u64> = bat.iter().filter(|e| **e != BAT_FREE).map(|e| u64::from(*e)).collect();
        taken.sort_unstable();
        let page_aligned = taken.iter().all(|slot| (slot + 1).is_multiple_of(8));
        let mut at = data_start.div_ceil(SECTOR_BYTES);
        let mut free = BTreeSet::new();
        let mut gaps = Vec::new();
        for slot in taken {
            let mut place = first_slot(at);
            while place + 1 + u64::from(BLOCK_SECTORS) <= slot {
                free.insert(Slot(u32::try_from(place).unwrap_or(BAT_FREE)));
                place += STRIDE_SECTORS;
            }
            if first_slot(at) + 1 + u64::from(BLOCK_SECTORS) <= slot {
                gaps.push(Gap { offset: at * SECTOR_BYTES, len: (slot - at) * SECTOR_BYTES });
            }
            at = at.max(slot + 1 + u64::from(BLOCK_SECTORS));
        }
        let end_sector = at + GUARD_SECTORS;
        let len_bytes = end_sector * SECTOR_BYTES;
        (Self { free, end_sector, len_bytes, taken: 0, fresh_is_zero: true, page_aligned }, gaps)
    }

    /// The same on a device of some length, where a slot holds whatever was
    /// left there: only what is written to it counts.
    #[must_use]
    pub fn on_device(self, len_bytes: u64) -> Self {
        Self { len_bytes, fresh_is_zero: false, ..self }
    }

    /// Whether a slot that [`Self::take`] gives reads as zeros.
    #[must_use]
    pub fn fresh_is_zero(&self) -> bool {
        self.fresh_is_zero
    }

    /// One past the last byte any slot takes; the guard follows.
    #[must_use]
    pub fn end_bytes(&self) -> u64 {
        (self.end_sector - GUARD_SECTORS) * SECTOR_BYTES
    }

    /// Length of the file: after the survey just the last slot and the guard,
    /// later as told to [`Self::extended`]. A device's is its own.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    /// The length the file needs before anything is written into `slot`, if
    /// it is too short: a batch more than that.
    #[must_use]
    pub fn extension_for(&self, slot: Slot) -> Option<u64> {
        let end = slot.data_offset(BLOCK_SECTORS) + GUARD_BYTES;
        let most = if self.fresh_is_zero { self.taken } else { u64::MAX };
        (end > self.len_bytes).then(|| self.longer(end, most.min(EXTEND_SLOTS - 1)))
    }

    /// A length that spares the next slots that are taken, `most` of them at
    /// most, the wait for one, if there are few left. Of a file only: a device
    /// would be given space for what perhaps nobody writes.
    #[must_use]
    pub fn extension_ahead(&self, most: u64) -> Option<u64> {
        let ahead = self.taken.min(AHEAD_SLOTS).min(most);
        let low = self.end_sector * SECTOR_BYTES + ahead * STRIDE_SECTORS * SECTOR_BYTES;
        let more = if self.taken < BUSY_SLOTS { self.taken } else { EXTEND_FILE_SLOTS };
        (self.fresh_is_zero && low > self.len_bytes).then(|| self.longer(0, more.min(most)))
    }

    /// At least `end`, room for all slots that are taken, and for `more`.
    fn longer(&self, end: u64, more: u64) -> u64 {
        let taken = end.max(self.end_sector * SECTOR_BYTES);
        // A whole number of slots more: the guard then falls into the gap
        // before a bitmap, and no later slot runs across it.
        taken + more * STRIDE_SECTORS * SECTOR_BYTES
    }

    /// Whether the data of every block starts on a 4 KiB boundary, so that no
    /// page holds both guest data and metadata, or data of two blocks. Images
    /// of other makers may have blocks elsewhere.
    #[must_use]
    pub fn page_aligned(&self) -> bool {
        self.page_aligned
    }

    /// The file has this length now.
    pub fn extended(&mut self, len_bytes: u64) {
        self.len_bytes = self.len_bytes.max(len_bytes);
    }

    /// Takes a slot: see [`Self::fresh_is_zero`].
    ///
    /// # Errors
    /// [`NoRoom`].
    pub fn take(&mut self) -> Result<Slot, NoRoom> {
        self.taken += 1;
        if let Some(slot) = self.free.pop_first() {
            return Ok(slot);
        }
        let place = first_slot(self.end_sector);
        let slot = u32::try_from(place).ok().filter(|slot| *slot != BAT_FREE).ok_or(NoRoom)?;
        self.end_sector = place + 1 + u64::from(BLOCK_SECTORS) + GUARD_SECTORS;
        Ok(Slot(slot))
    }

    /// Gives back a slot that was zeroed, where fresh ones are.
    pub fn put(&mut self, slot: Slot) {
        self.free.insert(slot);
    }
}

/// First sector from `at` on where a bitmap may sit.
fn first_slot(at: u64) -> u64 {
    round_up(at + 1, 8) - 1
}

/// Whether a slot is the next one behind another, with nothing but its bitmap
/// between the data of the two.
#[must_use]
pub fn follows(one: Slot, next: Slot) -> bool {
    u64::from(one.0) + STRIDE_SECTORS == u64::from(next.0)
}

/// Bytes from the end of one slot's data to that of the next slot's, where two
/// lie side by side: what no slot takes, and the bitmap.
pub const BITMAP_PAGE_BYTES: u64 = (STRIDE_SECTORS - BLOCK_SECTORS as u64) * SECTOR_BYTES;

/// Whether what lies before a slot's data, [`BITMAP_PAGE_BYTES`] of it, is what
/// this image would have written for a whole block: zeros that no slot takes,
/// then a full bitmap.
#[must_use]
pub fn is_full_bitmap_page(page: &[u8]) -> bool {
    let Some((gap, bitmap)) = page.split_at_checked((BITMAP_PAGE_BYTES - SECTOR_BYTES) as usize) else {
        return false;
    };
    let full = bitmap.len() as u64 == SECTOR_BYTES && bitmap.iter().all(|byte| *byte == 0xff);
    full && gap.iter().all(|byte| *byte == 0)
}

/// The bytes a slot takes in its file, bitmap included.
#[must_use]
pub fn slot_bytes(slot: Slot) -> Gap {
    Gap { offset: slot.bitmap_offset(), len: (1 + u64::from(BLOCK_SECTORS)) * SECTOR_BYTES }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_aligned_and_never_overlap() {
        let (mut slots, gaps) = Slots::survey(&[BAT_FREE; 4], 3072);
        assert!(gaps.is_empty());
        let taken: Vec<_> = (0..3).map(|_| slots.take().unwrap()).collect();
        assert_eq!(taken, [Slot(7), Slot(4111), Slot(8215)]);
        assert!(taken.iter().all(|s| s.data_offset(0).is_multiple_of(4096)));
        let need = slots.extension_for(taken[2]).unwrap();
        assert!(need >= taken[2].data_offset(4096) + GUARD_BYTES);
        slots.extended(need);
        assert_eq!(slots.extension_for(taken[2]), None);
        slots.put(taken[1]);
        assert_eq!(slots.take(), Ok(taken[1]));
        assert!(slots.page_aligned());
    }

    #[test]
    fn no_slot_ever_runs_across_the_guard_of_any_length() {
        for bat in [vec![], vec![4], vec![7], vec![4, 4101]] {
            let (mut slots, _) = Slots::survey(&bat, 2048);
            let mut lengths = vec![slots.len_bytes()];
            let mut taken = Vec::new();
            for _ in 0..100 {
                let slot = slots.take().unwrap();
                let ahead = slots.extension_ahead(100).filter(|_| taken.len() % 3 == 0);
                if let Some(len) = slots.extension_for(slot).or(ahead) {
                    slots.extended(len);
                    lengths.push(len);
                }
                taken.push(slot_bytes(slot));
            }
            for len in lengths {
                let guard = len - GUARD_BYTES;
                assert!(taken.iter().all(|s| s.offset >= len || s.offset + s.len <= guard));
            }
        }
    }

    #[test]
    fn a_file_is_longer_before_anybody_waits_for_it_and_a_device_is_not() {
        let (mut slots, _) = Slots::survey(&[], 2048);
        let first = slots.take().unwrap();
        slots.extended(slots.extension_for(first).unwrap());
        for _ in 0..1000 {
            if let Some(len) = slots.extension_ahead(u64::MAX) {
                assert!(len > slots.len_bytes());
                slots.extended(len);
            }
            let slot = slots.take().unwrap();
            assert_eq!(slots.extension_for(slot), None);
        }
        let long = slots.extension_ahead(u64::MAX).unwrap_or(slots.len_bytes());
        slots.extended(long);
        assert_eq!(slots.extension_ahead(u64::MAX), None);
        let (device, _) = Slots::survey(&[], 2048);
        assert_eq!(device.on_device(1 << 20).extension_ahead(u64::MAX), None);
    }

    #[test]
    fn space_ahead_is_as_little_as_what_was_taken_or_can_be() {
        const STRIDE: u64 = STRIDE_SECTORS * SECTOR_BYTES;
        let (mut slots, _) = Slots::survey(&[], 2048);
        // (taken, slots ahead at most) as it goes on.
        for (taken, most) in [(1, 1), (2, 3), (8, 12), (15, 22), (40, 96), (1000, 96)] {
            while slots.taken < taken {
                let slot = slots.take().unwrap();
                let len = slots.extension_for(slot).or(slots.extension_ahead(u64::MAX));
                slots.extended(len.unwrap_or(0));
            }
            let ahead = (slots.len_bytes - slots.end_sector * SECTOR_BYTES) / STRIDE;
            assert!((1..=most).contains(&ahead), "{ahead} slots ahead after {taken}");
        }
        // The disk has three blocks left, then none.
        let end = slots.len_bytes;
        let len = |slots: &Slots, most| slots.extension_ahead(most).map_or(end, |len| len.max(end));
        while (slots.len_bytes - slots.end_sector * SECTOR_BYTES) / STRIDE > 1 {
            slots.take().unwrap();
        }
        assert_eq!(len(&slots, 3) - slots.end_sector * SECTOR_BYTES, 3 * STRIDE);
        assert_eq!(slots.extension_ahead(0), None);
    }

    #[test]
    fn a_gap_between_blocks_becomes_slots() {
        // Blocks at 7 and 4111 + 4104 = 8215; the slot between is free.
        let (mut slots, gaps) = Slots::survey(&[8215, BAT_FREE, 7], 3072);
        assert_eq!(gaps, [Gap { offset: 4104 * 512, len: 4111 * 512 }]);
        assert_eq!(slots.take(), Ok(Slot(4111)));
        assert_eq!(slots.take(), Ok(Slot(12319)));
    }

    #[test]
    fn packed_foreign_blocks_leave_no_slot_between() {
        let (mut slots, gaps) = Slots::survey(&[4, 4 + 4097], 2048);
        assert!(gaps.is_empty() && !slots.page_aligned());
        let next = slots.take().unwrap();
        assert!(u64::from(next.0) >= 4 + 2 * 4097 && (next.0 + 1).is_multiple_of(8));
    }

    #[test]
    fn only_zeros_and_a_full_bitmap_are_a_page_that_can_be_taken_over() {
        let mut page = vec![0; 3584];
        page.resize(4096, 0xff);
        assert!(is_full_bitmap_page(&page));
        for (at, byte) in [(0, 1), (3583, 0xff), (3584, 0xfe), (4095, 0)] {
            let mut other = page.clone();
            other[at] = byte;
            assert!(!is_full_bitmap_page(&other), "byte {at}");
        }
        for len in [0, 512, 3584, 4095] {
            assert!(!is_full_bitmap_page(&page[..len]), "{len} bytes");
        }
        page.push(0xff);
        assert!(!is_full_bitmap_page(&page));
    }

    #[test]
    fn past_two_tib_is_refused() {
        let (mut slots, _) = Slots::survey(&[u32::MAX - 10], 3072);
        while slots.free.pop_first().is_some() {}
        assert_eq!(slots.take(), Err(NoRoom));
    }
}
