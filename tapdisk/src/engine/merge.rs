//! The live leaf merge: the leaf L moves into its parent P while the guest
//! writes, and only shrinks from its start on.
//!
//! The rule, per sector, while it runs: *present in L: read and written in L;
//! absent: read through and written in P alone.* It takes effect at an instant
//! with nothing in flight, so L gains nothing afterwards.
//!
//! ```text
//!  None --start--> Starting --L clean--> Moving --L empty--> Empty --commit--> Committing --> None
//!                     |                   |  ^ |                |
//!                     |             error |  | | window by window
//!                     |                   v  |
//!                     +------stop----- Failed / any of these: window settles, drain,
//!                                      P frozen, then settled and folded: None
//! ```
//!
//! A window is a few blocks; each block goes
//! `InLeaf -> Copying -> Clearing -> InParent`:
//!
//! 1. `Draining`: writes to the window's blocks park; those in flight end.
//! 2. `Copying`: L's present sectors are copied into P. P's are shadowed by
//!    L's, so a crash here changes nothing anybody reads.
//! 3. `ParentFlush`: a write-back of P makes data, bitmaps and BAT durable. A
//!    crash: both have the sectors, L's win, and they are the same.
//! 4. `Clearing`: L's BAT entries are cleared, durably, by a write-back of L.
//!    (L's BATmap was zeroed when L was opened.) A crash: each entry is either
//!    there (L's sectors win) or not (P's durable ones are read). L's entries
//!    clear only after 3, so nothing is lost; no guest write to these blocks
//!    was answered since 1, so nothing is older than acknowledged.
//! 5. `InParent`: parked writes go on, into P. L's slots are zeroed once no
//!    earlier read is in flight.
//!
//! After a crash anywhere L over P is a correct image; the next merge carries
//! on with what L still has.

use std::collections::{HashMap, VecDeque};

use vhd::bitmap::SectorBitmap;
use vhd::rw::Presence;
use vhd::units::{BlockNo, SectorRun, Slot};

use super::command::{CommandError, Token};
use super::image::{Purpose, result};
use super::quiesce::Then;
use super::{Barrier, Completion, Engine, FileId, Image, Lower, Op, Second, Wait};
use crate::limits::WINDOW_BLOCKS;

/// A leaf merge, or none.
#[derive(Debug, Default)]
pub(super) struct Merge {
    pub(super) phase: Phase,
    /// Writes in flight per block; a window starts copying when its have ended.
    pub(super) writes: HashMap<BlockNo, u32>,
    /// Blocks a request waits for to be moved.
    wanted: VecDeque<BlockNo>,
    pub(super) stop: Option<Token>,
    figures: MergeFigures,
    rate_bytes_per_s: u64,
    started_us: u64,
}

/// Progress, in blocks, bytes of data and microseconds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MergeFigures {
    /// Blocks the leaf had at the start.
    pub blocks_total: u64,
    /// Blocks moved.
    pub blocks_done: u64,
    /// Bytes copied or shared.
    pub bytes_copied: u64,
    /// Bytes shared instead of copied.
    pub bytes_cloned: u64,
    /// Bytes of slots the leaf gave back.
    pub bytes_freed: u64,
    /// Longest a window held writes.
    pub longest_wait_us: u64,
    /// Why it failed.
    pub error: Option<String>,
}

/// See the module's drawing.
#[derive(Debug, Default)]
pub(super) enum Phase {
    #[default]
    None,
    Starting,
    Moving(Option<Window>),
    Empty,
    Committing {
        token: Token,
        step: CommitStep,
    },
    Failed,
}

/// Steps of a commit; each starts when the one before completed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum CommitStep {
    /// P's footer copy without the hidden flag is being written.
    Unhide,
    /// That is being made durable.
    UnhideFlush,
    /// P is being renamed over L.
    Rename,
    /// The name is being made durable.
    RenameSync,
}

#[derive(Debug)]
pub(super) struct Window {
    blocks: Vec<BlockNo>,
    stage: Stage,
    started_us: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Draining,
    Copying { left: usize },
    ParentFlush { cycle: u64 },
    Clearing { cycle: u64 },
}

/// One copy of a window.
struct CopyRun {
    block: BlockNo,
    from: Slot,
    to: Slot,
    run: SectorRun,
}

pub(super) const LEAF: usize = 0;
pub(super) const PARENT: usize = 1;

impl Engine {
    /// Where the merge stands, for the control side.
    #[must_use]
    pub fn merge_status(&self) -> (tapdisk_control::MergePhase, MergeFigures) {
        use tapdisk_control::MergePhase as Word;
        let word = match (&self.merge.phase, self.merge.stop) {
            (Phase::None, _) => Word::None,
            (Phase::Committing { .. }, _) => Word::Committing,
            (_, Some(_)) => Word::Stopping,
            (Phase::Starting, None) => Word::Starting,
            (Phase::Moving(_), None) => Word::Moving,
            (Phase::Empty, None) => Word::Empty,
            (Phase::Failed, None) => Word::Failed,
        };
        (word, self.merge.figures.clone())
    }

    fn merging(&self) -> bool {
        self.stack.len() == 2 && self.second == Second::Parent
    }

    /// Whether writes to the block wait for a window.
    pub(super) fn in_window(&self, block: BlockNo) -> bool {
        matches!(&self.merge.phase, Phase::Moving(Some(window)) if window.blocks.contains(&block))
    }

    /// A request waits for the block to be moved.
    pub(super) fn window_wanted(&mut self, block: BlockNo) {
        if !self.merge.wanted.contains(&block) {
            self.merge.wanted.push_back(block);
        }
    }

    pub(super) fn writes_started(&mut self, block: BlockNo) {
        if self.merging() {
            *self.merge.writes.entry(block).or_default() += 1;
        }
    }

    pub(super) fn writes_finished(&mut self, block: BlockNo) {
        if let Some(count) = self.merge.writes.get_mut(&block) {
            *count -= 1;
            if *count == 0 {
                self.merge.writes.remove(&block);
            }
        }
    }

    /// The rule takes effect. Nothing is in flight.
    pub(super) fn merge_begins(&mut self, parent: Image, below: Lower, rate_bytes_per_s: u64) {
        self.stack[LEAF].rw.drop_unwritten();
        self.stack.push(parent);
        self.second = Second::Parent;
        let old = self.replace_lower(below);
        self.after_all_so_far(Barrier::Close(old.files().to_vec()));
        let blocks_total = u64::from(self.stack[LEAF].rw.allocated_blocks());
        self.merge = Merge {
            phase: Phase::Starting,
            figures: MergeFigures { blocks_total, ..MergeFigures::default() },
            rate_bytes_per_s,
            started_us: self.now_us,
            ..Merge::default()
        };
    }

    /// The rule ends: P is only read from here on, until it was settled and
    /// folded. Nothing is in flight.
    pub(super) fn merge_ends(&mut self) {
        self.stack[PARENT].rw.drop_unwritten();
        self.second = Second::Frozen;
        self.merge.phase = Phase::None;
        self.merge.stop = None;
        self.merge.wanted.clear();
        self.merge.writes.clear();
    }

    pub(super) fn merge_stop(&mut self, token: Token) -> Result<(), CommandError> {
        match self.merge.phase {
            Phase::None => return Err(CommandError::Busy("no merge is running")),
            Phase::Committing { .. } => return Err(CommandError::Busy("the merge is committing")),
            _ if self.merge.stop.is_some() => return Err(CommandError::Busy("already stopping")),
            Phase::Starting | Phase::Moving(_) | Phase::Empty | Phase::Failed => {}
        }
        self.merge.stop = Some(token);
        Ok(())
    }

    /// Moves the merge on as far as it can go now.
    pub(super) fn progress_merge(&mut self) {
        match &self.merge.phase {
            Phase::None | Phase::Committing { .. } => {}
            Phase::Moving(Some(_)) => self.progress_window(),
            Phase::Starting | Phase::Moving(None) | Phase::Empty | Phase::Failed
                if self.merge.stop.is_some() =>
            {
                self.drain_for_stop();
            }
            Phase::Starting => {
                if self.stack[LEAF].is_clean() {
                    self.merge.phase = Phase::Moving(None);
                    self.next_window();
                } else {
                    self.start_writeback(LEAF);
                }
            }
            Phase::Moving(None) => self.next_window(),
            Phase::Empty | Phase::Failed => {}
        }
    }

    /// Waiting requests look again under the rule as it is, then all drain.
    fn drain_for_stop(&mut self) {
        let Some(token) = self.merge.stop else { return };
        if self.state.runs() && self.drain_then(Then::MergeStop(token)).is_ok() {
            self.merge.phase = Phase::Failed;
            self.wake_windows();
        }
    }

    /// In `Failed` nothing moves, so a request that needs a window is served
    /// without: a whole block of zeros becomes a write of zeros.
    pub(super) fn windows_come(&self) -> bool {
        matches!(self.merge.phase, Phase::Starting | Phase::Moving(_))
    }

    fn wake_windows(&mut self) {
        let waits: Vec<Wait> =
            self.parked.keys().filter(|wait| matches!(wait, Wait::Window(_))).copied().collect();
        for wait in waits {
            self.wake(wait);
        }
    }

    fn next_window(&mut self) {
        if !self.within_rate() {
            return;
        }
        let leaf = &self.stack[LEAF].rw;
        let mut blocks: Vec<BlockNo> = Vec::with_capacity(WINDOW_BLOCKS);
        while let Some(block) = self.merge.wanted.pop_front() {
            if leaf.presence(block) != Presence::Absent {
                blocks.push(block);
            }
            if blocks.len() == WINDOW_BLOCKS {
                break;
            }
        }
        for block in leaf.blocks_held() {
            if blocks.len() >= WINDOW_BLOCKS {
                break;
            }
            if !blocks.contains(&block) {
                blocks.push(block);
            }
        }
        if blocks.is_empty() {
            if self.stack[LEAF].is_clean() {
                self.merge.phase = Phase::Empty;
                self.wake_windows();
            } else {
                self.start_writeback(LEAF);
            }
            return;
        }
        let window = Window { blocks, stage: Stage::Draining, started_us: self.now_us };
        self.merge.phase = Phase::Moving(Some(window));
        self.progress_window();
    }

    fn within_rate(&self) -> bool {
        let rate = self.merge.rate_bytes_per_s;
        let elapsed_us = self.now_us.saturating_sub(self.merge.started_us);
        rate == 0
            || self.merge.figures.bytes_copied <= rate.saturating_mul(elapsed_us) / 1_000_000 + (4 << 20)
    }

    fn progress_window(&mut self) {
        let Phase::Moving(Some(window)) = &self.merge.phase else { return };
        let blocks = window.blocks.clone();
        match window.stage {
            Stage::Draining => {
                if blocks.iter().any(|block| self.merge.writes.contains_key(block)) {
                    return;
                }
                if let Some(copies) = self.plan_copies(&blocks) {
                    self.set_stage(Stage::Copying { left: copies.len() });
                    for copy in copies {
                        self.start_copy(&copy);
                    }
                    self.copies_done();
                }
            }
            Stage::Copying { .. } => self.copies_done(),
            Stage::ParentFlush { cycle } => {
                if self.stack[PARENT].writeback.done() >= cycle {
                    for block in &blocks {
                        self.stack[LEAF].rw.free(*block);
                    }
                    let cycle = self.covering_cycle(LEAF);
                    self.set_stage(Stage::Clearing { cycle });
                } else {
                    self.start_writeback(PARENT);
                }
            }
            Stage::Clearing { cycle } => {
                if self.stack[LEAF].writeback.done() >= cycle {
                    self.window_done(&blocks);
                } else {
                    self.start_writeback(LEAF);
                }
            }
        }
    }

    fn set_stage(&mut self, stage: Stage) {
        if let Phase::Moving(Some(window)) = &mut self.merge.phase {
            window.stage = stage;
        }
    }

    /// What to copy for a window, everything it needs in memory and the
    /// parent's slots in place; `None` while something is being read or the
    /// file grows.
    fn plan_copies(&mut self, blocks: &[BlockNo]) -> Option<Vec<CopyRun>> {
        let mut copies = Vec::new();
        let mut ready = true;
        for &block in blocks {
            let Some((from, present)) = self.bitmap_or_load(LEAF, block) else {
                ready = false;
                continue;
            };
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
                Presence::Whole(_) | Presence::Partial(_) => match self.bitmap_or_load(PARENT, block) {
                    Some((slot, _)) => slot,
                    None => {
                        ready = false;
                        continue;
                    }
                },
            };
            ready &= self.ensure_length(PARENT, to);
            copies.extend(present.present().map(|run| CopyRun { block, from, to, run }));
        }
        ready.then_some(copies)
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
        let Phase::Moving(Some(Window { stage: Stage::Copying { left }, .. })) = &mut self.merge.phase else {
            return;
        };
        *left -= 1;
        if let Err(errno) = result(completion) {
            let error = format!("copying block {} failed: errno {errno}", block.0);
            self.merge.figures.error.get_or_insert(error);
            return;
        }
        self.merge.figures.bytes_copied += run.bytes();
        if *completion == Completion::Copied(vhd::storage::CopyKind::Cloned) {
            self.merge.figures.bytes_cloned += run.bytes();
        }
        self.stack[PARENT].unflushed = true;
        self.record_copy(block, slot, run);
    }

    fn copies_done(&mut self) {
        let Phase::Moving(Some(Window { stage: Stage::Copying { left: 0 }, .. })) = &self.merge.phase else {
            return;
        };
        if let Some(error) = self.merge.figures.error.clone() {
            return self.merge_failed(error);
        }
        if !self.stack[PARENT].unrecorded.is_empty() {
            return self.start_writeback(PARENT);
        }
        let cycle = self.covering_cycle(PARENT);
        self.set_stage(Stage::ParentFlush { cycle });
    }

    fn window_done(&mut self, blocks: &[BlockNo]) {
        let Phase::Moving(window) = &mut self.merge.phase else { return };
        let started_us = window.take().map_or(self.now_us, |window| window.started_us);
        let held = blocks.iter().any(|block| self.parked.contains_key(&Wait::Window(*block)));
        let figures = &mut self.merge.figures;
        if held {
            figures.longest_wait_us = figures.longest_wait_us.max(self.now_us.saturating_sub(started_us));
        }
        figures.blocks_done += blocks.len() as u64;
        figures.bytes_freed += blocks.len() as u64 * vhd::units::BLOCK_BYTES;
        for block in blocks {
            self.wake(Wait::Window(*block));
        }
        self.progress_merge();
    }

    /// Nothing moves any more; the window's blocks are in the leaf, and the
    /// rule goes on until the merge is stopped.
    fn merge_failed(&mut self, error: String) {
        self.merge.figures.error.get_or_insert(error);
        self.merge.phase = Phase::Failed;
        self.wake_windows();
    }

    pub(super) fn merge_read_failed(&mut self, file: FileId, block: BlockNo, errno: i32) {
        let copying = self.index_of(file).is_some() && self.in_window(block);
        if copying {
            self.merge_failed(format!("reading the bitmap of block {} failed: errno {errno}", block.0));
        }
    }

    pub(super) fn merge_length_failed(&mut self, file: FileId, errno: i32) {
        let window = matches!(self.merge.phase, Phase::Moving(Some(_)));
        if window && self.index_of(file) == Some(PARENT) {
            self.merge_failed(format!("the parent could not grow: errno {errno}"));
        }
    }

    /// A write-back failed. P's: the window goes back to the leaf. L's: its
    /// blocks are in neither state on the disk, so their writes wait until the
    /// clear is tried again, or fail for good once a flush has failed.
    pub(super) fn merge_writeback_failed(&mut self, index: usize, errno: i32) {
        if !self.merging() {
            return;
        }
        let clearing =
            matches!(self.merge.phase, Phase::Moving(Some(Window { stage: Stage::Clearing { .. }, .. })));
        if self.stack[index].poisoned {
            let waits: Vec<Wait> =
                self.parked.keys().filter(|wait| matches!(wait, Wait::Window(_))).copied().collect();
            for wait in waits {
                self.fail_parked(wait, errno);
            }
        }
        // With the leaf empty nothing is left to move: a commit goes on, and
        // the write-back is tried again by itself.
        let moving = matches!(self.merge.phase, Phase::Starting | Phase::Moving(_));
        if moving && !clearing {
            self.merge_failed(format!(
                "writing metadata of {} failed: errno {errno}",
                self.stack[index].name
            ));
        }
    }

    /// Pieces that waited for a bitmap of an image that left look again.
    pub(super) fn wake_bitmaps(&mut self, file: FileId) {
        let waits: Vec<Wait> = self
            .parked
            .keys()
            .filter(|wait| matches!(wait, Wait::Bitmap(f, _) | Wait::Length(f) if *f == file))
            .copied()
            .collect();
        for wait in waits {
            self.wake(wait);
        }
    }
}
