//! How blocks move from the leaf L to its parent P in a live merge.
//!
//! ```text
//!  InLeaf --> Draining --> Copying --> Copied --P durable--> InParent (Clearing) --L durable--> gone
//!    ^            |           |           |
//!    +---- stop, or an error  +-----------+
//!   writes to   park        park      go to both         go to P
//!   L's sectors
//! ```
//!
//! No guest request ever waits for a flush here: writes to a block park only
//! while it is being copied. Blocks are copied in batches ([`super::copies`]);
//! one batch is in each stage at one time, so the copy of the next overlaps the
//! flush of P that covers the last, and that the flush of L that clears those
//! before. Each block makes the steps below by itself, whatever its batch does:
//! nothing in the argument depends on how many are under way. The batches are
//! as large as is quick, and where extents are shared and no guest is busy a
//! flush covers more of them ([`super::pace`]); blocks for which P takes room
//! are counted apart, as L gives its own back only in step 5.
//!
//! 1. `Draining`: writes to the block in flight end, new ones park.
//! 2. `Copying`: L's present sectors are copied into P, all runs of a batch at
//!    the same time and in any order. When the last has landed, P's record
//!    vouches for them like for a guest's write. P's are shadowed by L's, so a
//!    crash here changes nothing anybody reads, whichever runs landed. The
//!    bitmaps of blocks that are shared with their neighbours come along
//!    ([`super::neighbours`]); no entry on P's file names their slots before 4.
//! 3. `Copied`: reads come from L as before, and what is written to sectors
//!    that L has is written to both, so that L and P stay the same. A crash:
//!    L's sectors win, and L has every acknowledged write. (Two writes to one
//!    place do not run at the same time, or L and P could end up different.)
//! 4. A write-back of P that began after 3 has made data, bitmaps and BAT
//!    durable. In memory the block leaves L, and L's record says `Freed`, in
//!    one instant. From here on writes go to P alone. The death of the
//!    process: the record clears L's entry, and P has the copies durably and
//!    the later writes by its own record, whichever of the two is replayed
//!    first. A power cut: both records are void. L's entry stands: L has
//!    everything up to this instant, and what came later was not flushed, for
//!    FLUSH and FUA cover L's clear. Or it is clear: P's durable copies are
//!    read.
//! 5. A write-back of L clears the entry durably (L's BATmap was zeroed when
//!    L was opened). Then, and once no request issued before is in flight,
//!    L's slot may be zeroed, together with neighbours that left too, or stay as
//!    it is: L gains nothing, so nobody reuses it. A crash here, and an L that
//!    stays because the merge was stopped: nobody looks at what no entry names,
//!    a slot is only reused once it was zeroed, and the next opening for writing
//!    zeroes what was not.
//!
//! A block that a guest trimmed whole, with nothing below P, is zeros in all
//! its present sectors. It moves without a copy: P's entry, if it has one, is
//! freed in step 2, so durably before L's. A write to it in step 3 ends its
//! move, as P has no copy to keep the same.

use std::collections::VecDeque;

use vhd::record::Entry;
use vhd::rw::Presence;
use vhd::units::{BLOCK_BYTES, BlockNo, SectorRun, Slot};

use super::merge::{LEAF, Merge, PARENT, Phase};
use super::pace::AtOnce;
use super::under_way::Stage;
use super::{Engine, FileId, Wait};
use crate::limits::{ABOUT_US, POSTPONED_SLOTS_MAX};

impl Engine {
    /// Whether writes to the block park until it is copied.
    pub(super) fn in_window(&self, block: BlockNo) -> bool {
        self.merge.moves.stage(block).is_some_and(|stage| !matches!(stage, Stage::Copied { .. }))
    }

    /// Whether what is written to the block's sectors in L must reach P too;
    /// `None` if that must wait for an overlapping write.
    pub(super) fn mirrored(&mut self, block: BlockNo, run: SectorRun, zeros: bool) -> Option<bool> {
        if !matches!(self.merge.moves.stage(block), Some(Stage::Copied { .. })) {
            return Some(false);
        }
        if self.merge.moves.get(block).is_some_and(|moving| moving.zeroed) {
            if !zeros {
                self.merge.moves.remove(block);
            }
            return Some(false);
        }
        let busy = self.merge.writes.get(&block);
        let overlaps = |other: &SectorRun| other.first < run.end() && run.first < other.end();
        busy.is_none_or(|busy| !busy.iter().any(overlaps)).then_some(true)
    }

    /// A write into an image of a merge started.
    pub(super) fn write_started(&mut self, block: BlockNo, run: SectorRun) {
        if self.merging() {
            self.merge.writes.entry(block).or_default().push(run);
        }
    }

    /// Notes what a guest's write makes of a block: `trimmed` if it gives all
    /// of it up. While another write into the block is in flight nobody knows
    /// which of the two will have been the last.
    pub(super) fn note_content(&mut self, block: BlockNo, zeros: bool, trimmed: bool) {
        if !self.merging() {
            return;
        }
        if !zeros {
            self.merge.zeroed.remove(&block);
        } else if trimmed && !self.lower.has(block) && !self.merge.writes.contains_key(&block) {
            self.merge.zeroed.insert(block);
        }
    }

    /// It ended.
    pub(super) fn write_ended(&mut self, block: BlockNo, run: SectorRun, result: Result<(), i32>) {
        let Some(runs) = self.merge.writes.get_mut(&block) else { return };
        if let Some(at) = runs.iter().position(|other| *other == run) {
            runs.swap_remove(at);
        }
        if runs.is_empty() {
            self.merge.writes.remove(&block);
        }
        if result.is_err() {
            self.merge.zeroed.remove(&block);
        }
        if !self.in_window(block) {
            self.wake(Wait::Window(block));
        }
    }

    /// Does whatever can be done for the blocks under way, and takes on more.
    pub(super) fn progress_moves(&mut self) {
        self.leave_leaf();
        self.take_on();
        self.copy_drained();
        if !matches!(self.merge.phase, Phase::Moving) {
            return;
        }
        self.flush_parent();
        if self.stack[LEAF].rw.is_dirty() && self.stack[LEAF].writeback.is_idle() {
            self.start_writeback(LEAF);
        }
        self.finish_moving();
    }

    /// Step 4, for every block that P has durably.
    fn leave_leaf(&mut self) {
        let done = self.stack[PARENT].writeback.done();
        for block in self.merge.moves.durable(done) {
            // Whoever was woken by one that left may have ended another's move.
            let Some(gained) = self.merge.moves.get(block).map(|moving| moving.gained) else { continue };
            if self.stack[LEAF].record.push(Entry::Freed { block }).is_err() {
                return self.start_writeback(LEAF);
            }
            if let Presence::Whole(slot) | Presence::Partial(slot) = self.stack[LEAF].rw.presence(block) {
                self.merge.owed.insert(slot, gained);
            }
            self.stack[LEAF].rw.free(block);
            self.merge.moves.remove(block);
            self.merge.zeroed.remove(&block);
            self.merge.figures.blocks_done += 1;
            self.wake(Wait::Window(block));
        }
    }

    /// A write-back of P begins with everything it has now.
    pub(super) fn parent_captured(&mut self, number: u64) {
        self.merge.moves.captured_by(number);
    }

    /// Starts a write-back of P once that covers enough blocks, or nothing
    /// more can be copied before.
    fn flush_parent(&mut self) {
        let (waiting, gained) = self.merge.moves.waiting();
        let AtOnce { flush, flush_gained, .. } = self.at_once();
        let copying = self.merge.moves.in_window() > 0 || self.merge.reading_pages;
        if waiting == 0 || (waiting < flush && gained < flush_gained && copying) {
            return;
        }
        let parent = &self.stack[PARENT];
        if parent.is_clean() {
            // Zeros of which P never had anything.
            let done = parent.writeback.done();
            self.parent_captured(done);
            self.leave_leaf();
        } else if parent.writeback.is_idle() {
            self.start_writeback(PARENT);
        }
    }

    fn finish_moving(&mut self) {
        let leaf = &self.stack[LEAF];
        let gives_back = !self.merge.owed.is_empty() && self.guests_about();
        if leaf.rw.allocated_blocks() > 0 || gives_back {
            return;
        }
        if leaf.is_clean() {
            debug_assert!(self.merge.moves.is_empty());
            self.merge.phase = Phase::Empty;
        } else if leaf.writeback.is_idle() {
            self.start_writeback(LEAF);
        }
    }

    /// Whether a guest asked for anything lately: who does not may be kept from
    /// reading L by nothing, and the merge is soon over.
    fn guests_about(&self) -> bool {
        self.last_activity_us > 0 && self.now_us.saturating_sub(self.last_activity_us) < ABOUT_US
    }

    /// Which of L's freed slots are zeroed now, one operation at a time. Giving
    /// space back keeps everybody from reading L meanwhile, the longer the more
    /// scattered a block was; and once L is empty it goes as a whole. So without
    /// guests just those go for which P took room, and others where many wait. What
    /// L gave up before the merge goes at once: L's write-back may wait for the room.
    pub(super) fn zero_in_merge(&mut self) -> VecDeque<Vec<Slot>> {
        let about = self.guests_about();
        let Merge { phase, owed, .. } = &self.merge;
        let leaf = &mut self.stack[LEAF];
        if leaf.zeroing > 0 || matches!(phase, Phase::Empty | Phase::Committing { .. }) {
            return VecDeque::new();
        }
        let took_room = |slots: &Vec<Slot>| slots.iter().any(|slot| owed.get(slot) == Some(&true));
        if matches!(phase, Phase::Starting) {
            return std::mem::take(&mut leaf.to_zero);
        }
        let at = match leaf.to_zero.iter().position(took_room) {
            Some(at) => at,
            None if about || owed.len() > POSTPONED_SLOTS_MAX => 0,
            None => return VecDeque::new(),
        };
        leaf.to_zero.remove(at).into_iter().collect()
    }

    /// Slots that left an image were zeroed, or could not be.
    pub(super) fn merge_released(&mut self, file: FileId, slots: &[Slot]) {
        if self.merging() && self.index_of(file) == Some(LEAF) {
            for slot in slots {
                self.merge.owed.remove(slot);
                self.merge.figures.bytes_freed += BLOCK_BYTES;
            }
        }
    }

    /// Ends every move that has no copy in flight; the block is in L, which
    /// never ceased to have everything.
    pub(super) fn cancel_moves(&mut self) {
        self.merge.moves.keep_copying();
        for wait in self.windows() {
            if matches!(wait, Wait::Window(block) if !self.in_window(block)) {
                self.wake(wait);
            }
        }
    }
}
