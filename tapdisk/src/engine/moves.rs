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
//! while it is being copied. Several blocks are in each stage at one time, so
//! the copy of the next overlaps the flush of P that covers the last, and that
//! the flush of L that clears those before.
//!
//! 1. `Draining`: writes to the block in flight end, new ones park.
//! 2. `Copying`: L's present sectors are copied into P, and P's record vouches
//!    for them like for a guest's write. P's are shadowed by L's, so a crash
//!    here changes nothing anybody reads.
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
//!    L's slot is zeroed.
//!
//! A block that a guest trimmed whole, with nothing below P, is zeros in all
//! its present sectors. It moves without a copy: P's entry, if it has one, is
//! freed in step 2, so durably before L's. A write to it in step 3 ends its
//! move, as P has no copy to keep the same.

use std::collections::btree_map::Entry as Place;

use vhd::bitmap::SectorBitmap;
use vhd::record::Entry;
use vhd::rw::Presence;
use vhd::units::{BLOCK_BYTES, BlockNo, SectorRun, Slot};

use super::image::{Purpose, result};
use super::merge::{LEAF, PARENT, Phase};
use super::{Completion, Engine, FileId, Op, Wait};
use crate::limits::{
    BUSY_US, COPYING_BLOCKS_BUSY_MAX, COPYING_BLOCKS_MAX, FLUSH_BLOCKS, MOVING_BLOCKS_MAX, PACE_BURST_BYTES,
    REST_US_MAX,
};

/// A block under way.
#[derive(Debug)]
pub(super) struct Move {
    stage: Stage,
    since_us: u64,
    /// It moves without a copy.
    zeroed: bool,
}

/// See the module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Draining,
    Copying {
        /// Copies in flight, or whose record entries are not valid yet.
        left: usize,
    },
    Copied {
        /// The write-back of P that makes it durable, once that has begun.
        cycle: Option<u64>,
    },
}

/// One copy of a block.
struct CopyRun {
    block: BlockNo,
    from: Slot,
    to: Slot,
    run: SectorRun,
}

/// Keeps the bytes copied within a rate that may change, and lets busy guests
/// breathe.
#[derive(Debug, Default)]
pub(super) struct Pace {
    /// 0 is no limit.
    rate_bytes_per_s: u64,
    /// Since when the rate holds, and what had been copied by then.
    since_us: u64,
    before_bytes: u64,
    /// Nothing is copied until then.
    rests_until_us: u64,
}

impl Pace {
    pub(super) fn new(rate_bytes_per_s: u64, now_us: u64) -> Self {
        Self { rate_bytes_per_s, since_us: now_us, before_bytes: 0, rests_until_us: 0 }
    }

    pub(super) fn set_rate(&mut self, rate_bytes_per_s: u64, copied_bytes: u64, now_us: u64) {
        (self.rate_bytes_per_s, self.since_us, self.before_bytes) = (rate_bytes_per_s, now_us, copied_bytes);
    }

    /// A copy that took so long ended while guests were busy.
    fn rest(&mut self, took_us: u64, now_us: u64) {
        self.rests_until_us = now_us + took_us.min(REST_US_MAX);
    }

    /// Whether another block may be copied.
    fn allows(&self, copied_bytes: u64, now_us: u64) -> bool {
        let elapsed_us = u128::from(now_us.saturating_sub(self.since_us));
        let due = u128::from(self.rate_bytes_per_s) * elapsed_us / 1_000_000;
        let copied = u128::from(copied_bytes.saturating_sub(self.before_bytes));
        let within = self.rate_bytes_per_s == 0 || copied <= due + u128::from(PACE_BURST_BYTES);
        within && now_us >= self.rests_until_us
    }
}

impl Engine {
    /// Whether writes to the block park until it is copied.
    pub(super) fn in_window(&self, block: BlockNo) -> bool {
        self.stage(block).is_some_and(|stage| !matches!(stage, Stage::Copied { .. }))
    }

    /// Whether what is written to the block's sectors in L must reach P too;
    /// `None` if that must wait for an overlapping write.
    pub(super) fn mirrored(&mut self, block: BlockNo, run: SectorRun, zeros: bool) -> Option<bool> {
        if !matches!(self.stage(block), Some(Stage::Copied { .. })) {
            return Some(false);
        }
        if self.merge.moves.get(&block).is_some_and(|moving| moving.zeroed) {
            if !zeros {
                self.merge.moves.remove(&block);
            }
            return Some(false);
        }
        let busy = self.merge.writes.get(&block);
        let overlaps = |other: &SectorRun| other.first < run.end() && run.first < other.end();
        busy.is_none_or(|busy| !busy.iter().any(overlaps)).then_some(true)
    }

    fn stage(&self, block: BlockNo) -> Option<Stage> {
        self.merge.moves.get(&block).map(|moving| moving.stage)
    }

    /// A write into an image of a merge started.
    pub(super) fn write_started(&mut self, block: BlockNo, run: SectorRun) {
        if self.merging() {
            self.merge.writes.entry(block).or_default().push(run);
        }
    }

    /// Notes what a guest's write makes of a block: `trimmed` if it gives all
    /// of it up.
    pub(super) fn note_content(&mut self, block: BlockNo, zeros: bool, trimmed: bool) {
        if !self.merging() {
            return;
        }
        if !zeros {
            self.merge.zeroed.remove(&block);
        } else if trimmed && !self.lower.has(block) {
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
        let draining: Vec<BlockNo> = self.in_stage(|stage| *stage == Stage::Draining).collect();
        for block in draining {
            if !self.merge.writes.contains_key(&block) {
                self.copy_block(block);
            }
            if !matches!(self.merge.phase, Phase::Moving) {
                return;
            }
        }
        self.flush_parent();
        if self.stack[LEAF].rw.is_dirty() && self.stack[LEAF].writeback.is_idle() {
            self.start_writeback(LEAF);
        }
        self.finish_moving();
    }

    fn in_stage(&self, which: impl Fn(&Stage) -> bool) -> impl Iterator<Item = BlockNo> {
        self.merge.moves.iter().filter(move |(_, moving)| which(&moving.stage)).map(|(block, _)| *block)
    }

    /// Step 4, for every block that P has durably.
    fn leave_leaf(&mut self) {
        let done = self.stack[PARENT].writeback.done();
        let durable = |stage: &Stage| matches!(stage, Stage::Copied { cycle: Some(c) } if *c <= done);
        let blocks: Vec<BlockNo> = self.in_stage(durable).collect();
        for block in blocks {
            if !self.stage(block).is_some_and(|stage| durable(&stage)) {
                continue;
            }
            if self.stack[LEAF].record.push(Entry::Freed { block }).is_err() {
                return self.start_writeback(LEAF);
            }
            self.stack[LEAF].rw.free(block);
            self.merge.moves.remove(&block);
            self.merge.zeroed.remove(&block);
            self.merge.owed += 1;
            self.merge.figures.blocks_done += 1;
            self.wake(Wait::Window(block));
        }
    }

    /// Takes on blocks, as many as may be under way.
    fn take_on(&mut self) {
        let copying = self.in_stage(|stage| !matches!(stage, Stage::Copied { .. })).count();
        let most = if self.guests_busy() { COPYING_BLOCKS_BUSY_MAX } else { COPYING_BLOCKS_MAX };
        for _ in copying..most {
            let merge = &self.merge;
            let held = self.stack[LEAF].rw.allocated_blocks() as usize;
            let full = merge.moves.len() + merge.owed >= MOVING_BLOCKS_MAX || merge.moves.len() >= held;
            // Held, nothing may begin: a new holder would meet its copies.
            let may = self.state.runs() && merge.pace.allows(merge.figures.bytes_copied, self.now_us);
            if full || !may {
                return;
            }
            let Some(block) = self.next_block() else { return };
            self.merge.cursor = block.0 + 1;
            let moving = Move { stage: Stage::Draining, since_us: self.now_us, zeroed: false };
            self.merge.moves.insert(block, moving);
        }
    }

    fn guests_busy(&self) -> bool {
        self.now_us.saturating_sub(self.last_activity_us) < BUSY_US
    }

    /// The next block of L that is not under way, in a circle.
    fn next_block(&self) -> Option<BlockNo> {
        let rw = &self.stack[LEAF].rw;
        let free = |block: &BlockNo| !self.merge.moves.contains_key(block);
        rw.blocks_held_from(BlockNo(self.merge.cursor)).find(free).or_else(|| rw.blocks_held().find(free))
    }

    /// Step 2, if everything it needs is in memory and P's file long enough;
    /// else it is tried again when that is so.
    fn copy_block(&mut self, block: BlockNo) {
        let zeroed = self.merge.zeroed.contains(&block);
        let copies = if zeroed { self.drop_from_parent(block) } else { self.plan_copies(block) };
        let Some(copies) = copies else { return };
        if let Some(moving) = self.merge.moves.get_mut(&block) {
            moving.stage = Stage::Copying { left: copies.len() };
            moving.zeroed = zeroed;
        }
        for copy in copies {
            self.start_copy(&copy);
        }
        self.copied_if_done(block);
    }

    /// A block that is zeros all over: P must not have it.
    fn drop_from_parent(&mut self, block: BlockNo) -> Option<Vec<CopyRun>> {
        let parent = &mut self.stack[PARENT];
        if parent.rw.presence(block) != Presence::Absent {
            if parent.record.push(Entry::Freed { block }).is_err() {
                self.start_writeback(PARENT);
                return None;
            }
            parent.rw.free(block);
        }
        Some(Vec::new())
    }

    /// What to copy of a block, with P's slot in place; `None` while something
    /// is being read or the file grows.
    fn plan_copies(&mut self, block: BlockNo) -> Option<Vec<CopyRun>> {
        let (from, present) = self.bitmap_or_load(LEAF, block)?;
        let to = match self.stack[PARENT].rw.presence(block) {
            // Full at once where nothing lies below P: L's sectors shadow
            // their own, and the others read as zeros either way.
            Presence::Absent => {
                let whole = !self.lower.has(block);
                match self.stack[PARENT].rw.allocate(block, whole) {
                    Ok(slot) => slot,
                    Err(full) => {
                        self.merge_failed(full.to_string());
                        return None;
                    }
                }
            }
            Presence::Whole(_) | Presence::Partial(_) => self.bitmap_or_load(PARENT, block)?.0,
        };
        let long_enough = self.ensure_length(PARENT, to);
        long_enough.then(|| present.present().map(|run| CopyRun { block, from, to, run }).collect())
    }

    /// Slot and bitmap of a block an image has, if the bitmap is in memory.
    fn bitmap_or_load(&mut self, index: usize, block: BlockNo) -> Option<(Slot, SectorBitmap)> {
        match self.stack[index].rw.presence(block) {
            Presence::Absent => Some((Slot(0), SectorBitmap::EMPTY)),
            Presence::Whole(slot) => Some((slot, SectorBitmap::FULL)),
            Presence::Partial(slot) => {
                let bitmap = self.stack[index].rw.bitmap(block).cloned();
                if bitmap.is_none() {
                    self.load_bitmap(index, block, slot);
                }
                bitmap.map(|bitmap| (slot, bitmap))
            }
        }
    }

    fn start_copy(&mut self, copy: &CopyRun) {
        let op = Op::Copy {
            from: self.stack[LEAF].file,
            from_offset: copy.from.data_offset(copy.run.first),
            to: self.stack[PARENT].file,
            to_offset: copy.to.data_offset(copy.run.first),
            len: copy.run.bytes(),
        };
        self.start(op, Purpose::Copy { block: copy.block, slot: copy.to, run: copy.run });
    }

    /// A copy ended. Its entries go to P's record like a guest's: a later
    /// guest write into the same block relies on them.
    pub(super) fn copied(&mut self, block: BlockNo, slot: Slot, run: SectorRun, completion: &Completion) {
        if let Err(errno) = result(completion) {
            return self.copy_recorded(block, Err(errno));
        }
        self.merge.figures.bytes_copied += run.bytes();
        if *completion == Completion::Copied(vhd::storage::CopyKind::Cloned) {
            self.merge.figures.bytes_cloned += run.bytes();
        }
        self.record_copy(block, slot, run);
    }

    /// The entries of a copy are valid, or it failed.
    pub(super) fn copy_recorded(&mut self, block: BlockNo, result: Result<(), i32>) {
        if let Err(errno) = result {
            let error = format!("copying block {} failed: errno {errno}", block.0);
            self.merge.figures.error.get_or_insert(error);
        }
        if let Some(Move { stage: Stage::Copying { left }, .. }) = self.merge.moves.get_mut(&block) {
            *left -= 1;
        }
        self.copied_if_done(block);
    }

    fn copied_if_done(&mut self, block: BlockNo) {
        let Place::Occupied(mut place) = self.merge.moves.entry(block) else { return };
        if place.get().stage != (Stage::Copying { left: 0 }) {
            return;
        }
        let moving = place.get_mut();
        moving.stage = Stage::Copied { cycle: None };
        let held_us = self.now_us.saturating_sub(moving.since_us);
        if self.parked.contains_key(&Wait::Window(block)) {
            let longest = &mut self.merge.figures.longest_wait_us;
            *longest = held_us.max(*longest);
        }
        if self.guests_busy() {
            self.merge.pace.rest(held_us, self.now_us);
        }
        if let Some(error) = self.merge.figures.error.clone() {
            return self.merge_failed(error);
        }
        self.wake(Wait::Window(block));
    }

    /// A write-back of P begins with everything it has now.
    pub(super) fn parent_captured(&mut self, number: u64) {
        for moving in self.merge.moves.values_mut() {
            if let Stage::Copied { cycle: cycle @ None } = &mut moving.stage {
                *cycle = Some(number);
            }
        }
    }

    /// Starts a write-back of P once that covers enough blocks, or nothing
    /// more can be copied before.
    fn flush_parent(&mut self) {
        let waiting = self.in_stage(|stage| *stage == Stage::Copied { cycle: None }).count();
        let copying = self.in_stage(|stage| !matches!(stage, Stage::Copied { .. })).next().is_some();
        if waiting == 0 || (waiting < FLUSH_BLOCKS && copying) {
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
        if leaf.rw.allocated_blocks() > 0 || self.merge.owed > 0 {
            return;
        }
        if leaf.is_clean() {
            debug_assert!(self.merge.moves.is_empty());
            self.merge.phase = Phase::Empty;
        } else if leaf.writeback.is_idle() {
            self.start_writeback(LEAF);
        }
    }

    /// A slot that left an image was zeroed, or could not be.
    pub(super) fn merge_released(&mut self, file: FileId) {
        if self.merging() && self.index_of(file) == Some(LEAF) {
            self.merge.owed = self.merge.owed.saturating_sub(1);
            self.merge.figures.bytes_freed += BLOCK_BYTES;
        }
    }

    /// Ends every move that has no copy in flight; the block is in L, which
    /// never ceased to have everything.
    pub(super) fn cancel_moves(&mut self) {
        self.merge.moves.retain(|_, moving| matches!(moving.stage, Stage::Copying { .. }));
        for wait in self.windows() {
            if matches!(wait, Wait::Window(block) if !self.in_window(block)) {
                self.wake(wait);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: u64 = 1_000_000;

    #[test]
    fn a_changed_rate_counts_from_its_change() {
        let mut pace = Pace::new(1 << 20, 0);
        assert!(pace.allows(PACE_BURST_BYTES, 0));
        assert!(!pace.allows(PACE_BURST_BYTES + (2 << 20), S));
        assert!(pace.allows(PACE_BURST_BYTES + (2 << 20), 2 * S));
        // Faster from now on, and what was copied before is forgotten.
        pace.set_rate(10 << 20, 100 << 20, 3 * S);
        assert!(pace.allows(110 << 20, 4 * S));
        assert!(!pace.allows(120 << 20, 4 * S));
        pace.set_rate(0, 120 << 20, 4 * S);
        assert!(pace.allows(u64::MAX, 4 * S));
    }

    #[test]
    fn it_rests_as_long_as_a_copy_took_but_not_for_ever() {
        let mut pace = Pace::new(0, 0);
        pace.rest(5_000, S);
        assert!(!pace.allows(0, S + 4_999));
        assert!(pace.allows(0, S + 5_000));
        pace.rest(60 * S, 2 * S);
        assert!(pace.allows(0, 2 * S + REST_US_MAX));
    }
}
