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
//!                     |             error |  | | block by block, see moves.rs
//!                     |                   v  |
//!                     +------stop----- Failed / any of these: copies end, drain,
//!                                      P frozen, then settled and folded: None
//! ```
//!
//! How a block moves, and why a crash anywhere is harmless: [`super::moves`].
//! After one, L over P is a correct image; the next merge carries on with what
//! L still has.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use vhd::storage::VolumeName;
use vhd::units::{BlockNo, SectorRun, Slot};

use super::command::{CommandError, Token};
use super::pace::{Batch, Pace};
use super::quiesce::Then;
use super::under_way::Moves;
use super::{Barrier, Engine, FileId, Image, Lower, Second, Wait};

/// A leaf merge, or none.
#[derive(Debug, Default)]
pub(super) struct Merge {
    pub(super) phase: Phase,
    pub(super) bounds: MergeBounds,
    /// Blocks under way; how many, see [`Engine::at_once`].
    pub(super) moves: Moves,
    /// Writes in flight, by block: what they cover.
    pub(super) writes: HashMap<BlockNo, Vec<SectorRun>>,
    /// Blocks of L that a guest trimmed and did not write again: all that L
    /// has of them is zeros, and nothing lies below P.
    pub(super) zeroed: BTreeSet<BlockNo>,
    /// Where the next block to move is looked for.
    pub(super) cursor: u32,
    /// Slots of blocks that left L which were not given back yet, and whether
    /// P took room for the block.
    pub(super) owed: BTreeMap<Slot, bool>,
    /// Whether the filesystem shares extents of L with P, once that was seen.
    pub(super) shares: Option<bool>,
    /// Blocks that are soon taken on, and whether the page before their data may
    /// come along; at most [`crate::limits::COPYING_SHARED_BLOCKS_MAX`] of them.
    pub(super) pages: BTreeMap<BlockNo, bool>,
    /// Such pages are being looked at.
    pub(super) reading_pages: bool,
    pub(super) stop: Option<Token>,
    pub(super) figures: MergeFigures,
    pub(super) pace: Pace,
    pub(super) batch: Batch,
}

impl Merge {
    /// Blocks for which P took room and L gave none back yet; at most
    /// [`MergeBounds::extra_blocks`].
    pub(super) fn gained(&self) -> usize {
        self.moves.gained() + self.owed.values().filter(|gained| **gained).count()
    }
}

/// How fast a merge may be, and how much room it may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MergeBounds {
    /// Most bytes copied per second; 0 is no limit.
    pub rate_bytes_per_s: u64,
    /// Most blocks that P has gained and L has not given back; at least 1.
    pub extra_blocks: usize,
}

impl Default for MergeBounds {
    fn default() -> Self {
        Self { rate_bytes_per_s: 0, extra_blocks: tapdisk_control::MERGE_EXTRA_BLOCKS as usize }
    }
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
    /// Longest a block held writes.
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
    Moving,
    Empty,
    Committing {
        token: Token,
        step: CommitStep,
        /// What the leaf is called afterwards, if it is called anything.
        aside: VolumeName,
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
    /// P is taking L's name.
    Rename,
    /// The name is being made durable.
    RenameSync,
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
            (Phase::Moving, None) => Word::Moving,
            (Phase::Empty, None) => Word::Empty,
            (Phase::Failed, None) => Word::Failed,
        };
        (word, self.merge.figures.clone())
    }

    pub(super) fn merging(&self) -> bool {
        self.stack.len() == 2 && self.second == Second::Parent
    }

    /// The rule takes effect. Nothing is in flight.
    pub(super) fn merge_begins(&mut self, parent: Image, below: Lower, bounds: MergeBounds) {
        self.stack[LEAF].rw.drop_unwritten();
        self.stack.push(parent);
        self.second = Second::Parent;
        let old = self.replace_lower(below);
        self.after_all_so_far(Barrier::Close(old.files().to_vec()));
        let blocks_total = u64::from(self.stack[LEAF].rw.allocated_blocks());
        self.merge = Merge {
            phase: Phase::Starting,
            figures: MergeFigures { blocks_total, ..MergeFigures::default() },
            pace: Pace::new(bounds.rate_bytes_per_s, self.now_us),
            bounds,
            ..Merge::default()
        };
    }

    /// The rule ends: P is only read from here on, until it was settled and
    /// folded. Nothing is in flight, neither of guests nor of copies.
    pub(super) fn merge_ends(&mut self) {
        debug_assert!(self.merge.moves.is_empty(), "a copy is in flight");
        self.stack[PARENT].rw.drop_unwritten();
        self.second = Second::Frozen;
        self.merge = Merge { figures: std::mem::take(&mut self.merge.figures), ..Merge::default() };
    }

    pub(super) fn merge_stop(&mut self, token: Token) -> Result<(), CommandError> {
        match self.merge.phase {
            Phase::None => return Err(CommandError::Busy("no merge is running")),
            Phase::Committing { .. } => return Err(CommandError::Busy("the merge is committing")),
            _ if self.merge.stop.is_some() => return Err(CommandError::Busy("already stopping")),
            Phase::Starting | Phase::Moving | Phase::Empty | Phase::Failed => {}
        }
        self.merge.stop = Some(token);
        Ok(())
    }

    /// From now on the merge copies at most so many bytes per second.
    pub(super) fn merge_rate(&mut self, rate_bytes_per_s: u64) -> Result<(), CommandError> {
        if matches!(self.merge.phase, Phase::None) {
            return Err(CommandError::Busy("no merge is running"));
        }
        self.merge.pace.set_rate(rate_bytes_per_s, self.merge.figures.bytes_copied, self.now_us);
        Ok(())
    }

    /// Moves the merge on as far as it can go now.
    pub(super) fn progress_merge(&mut self) {
        match self.merge.phase {
            Phase::None | Phase::Committing { .. } => {}
            _ if self.merge.stop.is_some() => {
                self.cancel_moves();
                self.drain_for_stop();
            }
            Phase::Starting if self.stack[LEAF].is_clean() => {
                self.merge.phase = Phase::Moving;
                self.progress_moves();
            }
            Phase::Starting if self.stack[LEAF].writeback.is_idle() => self.start_writeback(LEAF),
            Phase::Starting | Phase::Empty => {}
            Phase::Moving => self.progress_moves(),
            Phase::Failed => self.cancel_moves(),
        }
    }

    /// Waiting requests look again under the rule as it is, then all drain.
    fn drain_for_stop(&mut self) {
        let Some(token) = self.merge.stop else { return };
        let moves = !self.merge.moves.is_empty() || self.merge.reading_pages;
        if !moves && self.state.runs() && self.drain_then(Then::MergeStop(token)).is_ok() {
            self.merge.phase = Phase::Failed;
        }
    }

    /// Nothing moves any more; what was under way is in the leaf, and the rule
    /// goes on until the merge is stopped.
    pub(super) fn merge_failed(&mut self, error: String) {
        self.merge.figures.error.get_or_insert(error);
        self.merge.phase = Phase::Failed;
        self.cancel_moves();
    }

    pub(super) fn merge_read_failed(&mut self, file: FileId, block: BlockNo, errno: i32) {
        if self.index_of(file).is_some() && self.in_window(block) {
            self.merge_failed(format!("reading the bitmap of block {} failed: errno {errno}", block.0));
        }
    }

    pub(super) fn merge_length_failed(&mut self, file: FileId, errno: i32) {
        let moving = matches!(self.merge.phase, Phase::Moving) && !self.merge.moves.is_empty();
        if moving && self.index_of(file) == Some(PARENT) {
            self.merge_failed(format!("the parent could not grow: errno {errno}"));
        }
    }

    /// A write-back failed. P's: what it was to make durable stays in the
    /// leaf. L's: its clears wait in its record until they are tried again.
    pub(super) fn merge_writeback_failed(&mut self, index: usize, errno: i32) {
        if !self.merging() {
            return;
        }
        if self.stack[index].poisoned {
            for wait in self.windows() {
                self.fail_parked(wait, errno);
            }
        }
        // With the leaf empty nothing is left to move: a commit goes on, and
        // the write-back is tried again by itself.
        let fails = match self.merge.phase {
            Phase::Starting => true,
            Phase::Moving => index == PARENT || self.stack[index].poisoned,
            Phase::None | Phase::Empty | Phase::Committing { .. } | Phase::Failed => false,
        };
        if fails {
            self.merge_failed(format!(
                "writing metadata of {} failed: errno {errno}",
                self.stack[index].name
            ));
        }
    }

    pub(super) fn windows(&self) -> Vec<Wait> {
        self.parked.keys().filter(|wait| matches!(wait, Wait::Window(_))).copied().collect()
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
