//! Which blocks a live merge copies next, and how: steps 1 and 2 of
//! [`super::moves`].
//!
//! ```text
//!   take on a batch --> all bitmaps in memory --> one operation --> recorded
//!   (Draining)          (their writes ended)      (Copying)         (Copied)
//! ```
//!
//! Blocks are copied in batches, by one operation each: hundreds of scattered
//! runs are then read and written at the same time. The next batch is taken on
//! when one has ended, so that no write waits for two; the bitmaps it will need
//! are read meanwhile. A block in which a guest's write is still in flight
//! holds up nobody else and is copied by itself.

use std::borrow::Cow;
use std::sync::Arc;

use tapdisk_control::MERGE_EXTRA_BLOCKS;
use vhd::bitmap::SectorBitmap;
use vhd::record::Entry;
use vhd::rw::Presence;
use vhd::slots::BITMAP_PAGE_BYTES;
use vhd::storage::CopyRange;
use vhd::units::{BLOCK_BYTES, BLOCK_SECTORS, BlockNo, SectorRun, Slot};

use super::image::{Purpose, result};
use super::merge::{LEAF, PARENT, Phase};
use super::pace::AtOnce;
use super::under_way::{Move, Stage};
use super::{Completion, Engine, Op, Wait};
use crate::limits::{BUSY_US, COPYING_BLOCKS_BUSY_MAX, POSTPONED_SLOTS_MAX, SHORT_RUN_BYTES_MAX};

/// One copy of a block.
#[derive(Debug)]
pub(crate) struct CopyRun {
    block: BlockNo,
    from: Slot,
    to: Slot,
    run: SectorRun,
    /// It goes on from the copy before it, the block's bitmap between them.
    with_bitmap: bool,
}

impl CopyRun {
    /// The bytes of it, without a bitmap.
    fn range(&self) -> CopyRange {
        CopyRange {
            from: self.from.data_offset(self.run.first),
            to: self.to.data_offset(self.run.first),
            len_bytes: self.run.bytes(),
        }
    }
}

/// A batch being copied.
#[derive(Debug)]
pub(crate) struct CopyBatch {
    copies: Vec<CopyRun>,
    blocks: usize,
    began_us: u64,
}

impl Engine {
    /// Takes on the next batch, when none is being copied.
    pub(super) fn take_on(&mut self) {
        if self.merge.moves.in_window() > 0 {
            return;
        }
        let (busy, at_once) = (self.guests_busy(), self.at_once());
        let most = if busy { COPYING_BLOCKS_BUSY_MAX } else { self.merge.batch.blocks(at_once.copying) };
        if !busy && self.state.runs() && self.look_at_pages(most) {
            return;
        }
        let mut coming = self.merge.figures.bytes_copied;
        for _ in 0..most {
            let merge = &self.merge;
            let held = self.stack[LEAF].rw.allocated_blocks() as usize;
            let full = merge.moves.len() >= at_once.moving
                || merge.moves.len() >= held
                || merge.owed.len() >= 2 * POSTPONED_SLOTS_MAX;
            // Held, nothing may begin: a new holder would meet its copies.
            let may = self.state.runs() && merge.pace.allows(coming, self.now_us);
            if full || !may {
                return;
            }
            let Some(block) = self.next_block() else { return };
            let gained = self.takes_room(block);
            if gained && self.merge.gained() >= at_once.gained {
                return;
            }
            coming += BLOCK_BYTES;
            self.merge.cursor = block.0 + 1;
            self.merge.moves.insert(block, Move::new(self.now_us, gained));
        }
        if !busy {
            self.look_ahead(most);
            self.look_at_pages(most);
        }
    }

    /// How many blocks may be in each stage now.
    pub(super) fn at_once(&self) -> AtOnce {
        let (busy, most) = (self.guests_busy(), self.merge.bounds.extra_blocks);
        // What was copied and not flushed is written twice when it is written.
        let extra_blocks = if busy { most.min(MERGE_EXTRA_BLOCKS as usize) } else { most };
        AtOnce::new(self.merge.shares == Some(true) && !busy, extra_blocks)
    }

    /// Whether P grows by a block while L still has it. Extents that are shared
    /// take no room.
    fn takes_room(&self, block: BlockNo) -> bool {
        self.merge.shares != Some(true) && self.stack[PARENT].rw.presence(block) == Presence::Absent
    }

    /// Begins to read the bitmaps that the batch after this one needs.
    fn look_ahead(&mut self, blocks: usize) {
        let rw = &self.stack[LEAF].rw;
        let coming = rw.blocks_held_from(BlockNo(self.merge.cursor));
        let coming: Vec<BlockNo> =
            coming.filter(|block| !self.merge.moves.contains(*block)).take(blocks).collect();
        for block in coming {
            self.has_bitmaps(block);
        }
    }

    pub(super) fn guests_busy(&self) -> bool {
        self.now_us.saturating_sub(self.last_activity_us) < BUSY_US
    }

    /// The next block of L that is not under way, in a circle.
    fn next_block(&self) -> Option<BlockNo> {
        let rw = &self.stack[LEAF].rw;
        let free = |block: &BlockNo| !self.merge.moves.contains(*block);
        rw.blocks_held_from(BlockNo(self.merge.cursor)).find(free).or_else(|| rw.blocks_held().find(free))
    }

    /// Step 2 for the blocks that have drained, once all they need is in memory
    /// and P's file is long enough; what is not is tried again when it is so.
    pub(super) fn copy_drained(&mut self) {
        if self.merge.moves.in_window() == 0 {
            return;
        }
        let mut drained = self.merge.moves.in_stage(|stage| *stage == Stage::Draining);
        drained.retain(|block| !self.merge.writes.contains_key(block));
        // Asked of each, so that all bitmaps are read at the same time.
        if drained.iter().filter(|block| !self.has_bitmaps(**block)).count() > 0 {
            return;
        }
        if !self.place_in_parent(&drained) {
            return;
        }
        let mut planned = Vec::new();
        for block in drained {
            let zeroed = self.merge.zeroed.contains(&block);
            let copies = if zeroed { self.drop_from_parent(block) } else { self.plan_copies(block) };
            if !matches!(self.merge.phase, Phase::Moving) {
                // It failed: no block of the batch has been touched in L.
                return;
            }
            planned.extend(copies.map(|copies| (block, zeroed, copies)));
        }
        let mut batch = Vec::new();
        let blocks: Vec<BlockNo> = planned.iter().map(|(block, ..)| *block).collect();
        let (mut before, mut along) = (None, Vec::new());
        for block in &blocks {
            along.push(before.is_some_and(|before| self.comes_along(before, *block)));
            before = Some(*block);
        }
        for ((block, zeroed, mut copies), along) in planned.into_iter().zip(along) {
            self.merge.pages.remove(&block);
            self.merge.moves.change(block, |moving| {
                moving.stage = Stage::Copying { left: copies.len() };
                moving.zeroed = zeroed;
            });
            copies.iter_mut().for_each(|copy| copy.with_bitmap = along);
            batch.extend(copies);
        }
        if !batch.is_empty() {
            self.start_copies(batch, blocks.len());
        }
        for block in blocks {
            self.copied_if_done(block);
        }
    }

    /// Whether the bitmaps of a block are in memory, where L and P have it in
    /// part. They are read if not.
    fn has_bitmaps(&mut self, block: BlockNo) -> bool {
        let zeroed = self.merge.zeroed.contains(&block);
        // Both are asked, so that both are read at the same time.
        let [leaf, parent] = [LEAF, PARENT].map(|index| self.bitmap_or_load(index, block).is_some());
        zeroed || (leaf && parent)
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

    /// Gives every block its slot in P, and makes the file long enough for all
    /// of them at once; whether it is.
    fn place_in_parent(&mut self, blocks: &[BlockNo]) -> bool {
        let mut last = None;
        for block in blocks.iter().copied().filter(|block| !self.merge.zeroed.contains(block)) {
            // Full at once where nothing lies below P: L's sectors shadow
            // their own, and the others read as zeros either way.
            let whole = !self.lower.has(block);
            let rw = &mut self.stack[PARENT].rw;
            let slot = match rw.presence(block) {
                Presence::Absent => rw.allocate(block, whole),
                Presence::Whole(slot) | Presence::Partial(slot) => Ok(slot),
            };
            match slot {
                Ok(slot) => last = last.max(Some(slot)),
                Err(full) => {
                    self.merge_failed(full.to_string());
                    return false;
                }
            }
        }
        last.is_none_or(|slot| self.ensure_length(PARENT, slot))
    }

    /// What to copy of a block that has a slot in P; `None` while something is
    /// being read.
    fn plan_copies(&mut self, block: BlockNo) -> Option<Vec<CopyRun>> {
        let (from, present) = self.bitmap_or_load(LEAF, block)?;
        let to = self.bitmap_or_load(PARENT, block)?.0;
        let copy = |run| CopyRun { block, from, to, run, with_bitmap: false };
        Some(present.present().map(copy).collect())
    }

    /// Slot and bitmap of a block an image has, if the bitmap is in memory.
    fn bitmap_or_load(&mut self, index: usize, block: BlockNo) -> Option<(Slot, SectorBitmap)> {
        match self.stack[index].rw.presence(block) {
            Presence::Absent => Some((Slot(0), SectorBitmap::EMPTY)),
            Presence::Whole(slot) => Some((slot, SectorBitmap::FULL)),
            Presence::Partial(slot) => {
                let bitmap = self.stack[index].rw.bitmap(block).map(Cow::into_owned);
                if bitmap.is_none() {
                    self.load_bitmap(index, block, slot);
                }
                bitmap.map(|bitmap| (slot, bitmap))
            }
        }
    }

    fn start_copies(&mut self, copies: Vec<CopyRun>, blocks: usize) {
        let mut ranges: Vec<CopyRange> = Vec::new();
        for copy in &copies {
            match ranges.last_mut() {
                Some(last) if copy.with_bitmap => {
                    last.len_bytes = copy.to.data_offset(BLOCK_SECTORS) - last.to;
                }
                _ => ranges.push(copy.range()),
            }
        }
        let op = Op::Copy {
            from: self.stack[LEAF].file,
            to: self.stack[PARENT].file,
            ranges: Arc::from(ranges),
            share: self.merge.shares != Some(false),
        };
        self.start(op, Purpose::Copy(CopyBatch { copies, blocks, began_us: self.now_us }));
    }

    /// A batch ended. Its entries go to P's record like a guest's: a later
    /// guest write into the same block relies on them.
    pub(super) fn copied(&mut self, batch: CopyBatch, completion: &Completion) {
        let CopyBatch { copies, blocks, began_us } = batch;
        if let Err(errno) = result(completion) {
            for copy in copies {
                self.copy_recorded(copy.block, Err(errno));
            }
            return;
        }
        let most = self.at_once().copying;
        self.merge.batch.ended(blocks, self.now_us.saturating_sub(began_us), most);
        let bytes =
            |copies: &mut dyn Iterator<Item = &CopyRun>| copies.map(|copy| copy.run.bytes()).sum::<u64>();
        self.merge.figures.bytes_copied += bytes(&mut copies.iter());
        if let Completion::Copied { shared_bytes } = *completion {
            let pages = copies.iter().filter(|copy| copy.with_bitmap).count() as u64 * BITMAP_PAGE_BYTES;
            self.merge.figures.bytes_cloned += shared_bytes.saturating_sub(pages);
            let long = bytes(&mut copies.iter().filter(|copy| copy.run.bytes() > SHORT_RUN_BYTES_MAX));
            if long > 0 {
                self.merge.shares = Some(shared_bytes > long / 2);
            }
        }
        for copy in copies {
            self.record_copy(copy.block, copy.to, copy.run, copy.with_bitmap);
        }
    }

    /// The entries of a copy are valid, or it failed.
    pub(super) fn copy_recorded(&mut self, block: BlockNo, result: Result<(), i32>) {
        if let Err(errno) = result {
            let error = format!("copying block {} failed: errno {errno}", block.0);
            self.merge.figures.error.get_or_insert(error);
        }
        self.merge.moves.change(block, |moving| {
            if let Stage::Copying { left } = &mut moving.stage {
                *left -= 1;
            }
        });
        self.copied_if_done(block);
    }

    fn copied_if_done(&mut self, block: BlockNo) {
        let Some(moving) = self.merge.moves.get(block) else { return };
        if moving.stage != (Stage::Copying { left: 0 }) {
            return;
        }
        let held_us = self.now_us.saturating_sub(moving.since_us);
        self.merge.moves.change(block, |moving| moving.stage = Stage::Copied { cycle: None });
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
}
