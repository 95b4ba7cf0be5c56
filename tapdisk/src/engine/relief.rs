//! Room made by what the guest gives up while a write-back waits for room.
//!
//! ```text
//!   cycle fails: ENOSPC      tried again: is anything given up?
//!   Failed ────────────────> Running, holding the failed capture
//!     ^                        BAT entries cleared, flush
//!     │   all slots zeroed   Relieved
//!     └──────────────────────── freed slots zeroed, their space given back
//! ```
//!
//! What of the two captures becomes durable when, and why a crash between is
//! harmless: [`vhd::rw`], `relief`.

use vhd::rw::Captured;

use super::writeback::{Cycle, Stage, State};
use super::{Barrier, Engine, FileId};

/// A capture that waits for space.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) captured: Captured,
    /// How writing it failed.
    pub(super) errno: i32,
}

impl Engine {
    /// Begins a cycle of what gives space back, if a failed one waits for
    /// space and there is anything; whether it did. Not in a merge, which has
    /// its own order in which blocks leave an image.
    pub(super) fn relieve(&mut self, index: usize) -> bool {
        if self.merging() {
            return false;
        }
        let image = &mut self.stack[index];
        let State::Failed(captured, libc::ENOSPC) = &mut image.writeback.state else { return false };
        let Some(relief) = image.rw.relief(captured) else { return false };
        let held = Held { captured: std::mem::take(captured), errno: libc::ENOSPC };
        let cycle = Cycle { captured: relief, stage: Stage::Entries, left: 0, error: None, held: Some(held) };
        self.write_entries(index, cycle);
        true
    }

    /// The entries are durably clear.
    pub(super) fn relieved(&mut self, index: usize, relief: Captured, held: Held) {
        let image = &mut self.stack[index];
        let file = image.file;
        let freed = image.rw.durable(relief);
        image.writeback.state = State::Relieved { held, left: freed.len() };
        self.after_all_so_far(Barrier::Release(file, freed));
    }

    /// A freed slot was zeroed, or could not be. After the last one the failed
    /// capture is written again: there may be room for it.
    pub(super) fn slot_released(&mut self, file: FileId) {
        let Some(index) = self.index_of(file) else { return };
        let state = &mut self.stack[index].writeback.state;
        let State::Relieved { held, left } = state else { return };
        // One of an earlier cycle counts too: that only means an attempt more.
        *left = left.saturating_sub(1);
        if *left == 0 {
            let Held { captured, errno } =
                std::mem::replace(held, Held { captured: Captured::default(), errno: 0 });
            *state = State::Failed(captured, errno);
            self.start_writeback(index);
        }
    }
}
