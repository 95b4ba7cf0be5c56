//! Which blocks guests change while somebody wants to know.
//!
//! Who compares the disk before and after a merge must not take a guest's
//! writes for a mistake of the merge, nor overlook one beside them. So from
//! the moment it is asked, the engine marks each block that a guest writes,
//! trims or zeroes, *before* the change can be seen by any read:
//!
//! ```text
//!   request -> plan: mark, then start the operation -> data lands -> answer
//! ```
//!
//! What was on its way when the list was begun may still land, and is marked
//! at once. A request that is parked or queued then is planned later, and
//! marked there. What a merge moves is no change, and is never marked.
//!
//! The list belongs to the process: who finds another list, or none, knows
//! only that he does not know.

use uuid::Uuid;
use vhd::units::BlockNo;

use super::Engine;
use super::command::{CommandError, CommandReply};
use super::image::Purpose;
use crate::limits::CONTROL_RUNS_MAX;

/// A list: one bit a block, up to the last one marked.
#[derive(Debug, Default)]
pub(super) struct Tracked {
    id: Uuid,
    bits: Vec<u64>,
    /// It was asked for: nothing is added any more.
    ended: bool,
}

impl Tracked {
    fn mark(&mut self, block: BlockNo) {
        let (word, bit) = (block.index() / 64, block.0 % 64);
        if word >= self.bits.len() {
            self.bits.resize(word + 1, 0);
        }
        if let Some(word) = self.bits.get_mut(word) {
            *word |= 1 << bit;
        }
    }

    /// Runs of marked blocks from one on, as many as one answer holds, and
    /// where to ask on.
    fn runs(&self, from: u32) -> (Vec<(u32, u32)>, Option<u32>) {
        let mut runs: Vec<(u32, u32)> = Vec::new();
        let first = from as usize / 64;
        let words = (0_u32..).step_by(64).zip(&self.bits).skip(first);
        let marked = words.flat_map(|(base, word)| {
            (0..64).filter(move |bit| word >> bit & 1 != 0).map(move |bit| base + bit)
        });
        for block in marked.filter(|block| *block >= from) {
            let full = runs.len() == CONTROL_RUNS_MAX;
            match runs.last_mut() {
                Some((first, count)) if *first + *count == block => *count += 1,
                _ if full => return (runs, Some(block)),
                _ => runs.push((block, 1)),
            }
        }
        (runs, None)
    }
}

impl Engine {
    /// Begins a list; one that stands is dropped.
    pub(super) fn track(&mut self, id: Uuid) {
        let mut list = Tracked { id, ..Tracked::default() };
        let flying = self.ops.values().filter_map(|purpose| match purpose {
            Purpose::Write(part) => Some(part.block),
            _ => None,
        });
        // Landed, but not to be seen before the record has room.
        let landed = self.stack.iter().flat_map(|image| &image.unrecorded).map(|part| part.block);
        flying.chain(landed).for_each(|block| list.mark(block));
        self.tracked = Some(list);
    }

    /// A guest is about to change a block.
    pub(super) fn note_change(&mut self, block: BlockNo) {
        if let Some(list) = self.tracked.as_mut().filter(|list| !list.ended) {
            list.mark(block);
        }
    }

    /// Ends a list and hands out a part of it.
    pub(super) fn tracked(&mut self, id: Uuid, from: u32) -> Result<CommandReply, CommandError> {
        let list = self.tracked.as_mut().filter(|list| list.id == id).ok_or(CommandError::Unknown)?;
        list.ended = true;
        let (runs, next) = list.runs(from);
        Ok(CommandReply::Blocks { runs, next })
    }

    /// Drops a list.
    pub(super) fn track_end(&mut self, id: Uuid) {
        self.tracked.take_if(|list| list.id == id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_is_handed_out_in_runs_and_in_parts() {
        let mut list = Tracked::default();
        for block in [0, 1, 2, 63, 64, 1000, 5] {
            list.mark(BlockNo(block));
        }
        assert_eq!(list.runs(0), (vec![(0, 3), (5, 1), (63, 2), (1000, 1)], None));
        assert_eq!(list.runs(2), (vec![(2, 1), (5, 1), (63, 2), (1000, 1)], None));
        assert_eq!(list.runs(1001), (vec![], None));
        let mut list = Tracked::default();
        let blocks = CONTROL_RUNS_MAX as u32 + 10;
        (0..blocks).for_each(|n| list.mark(BlockNo(n * 2)));
        let (first, next) = list.runs(0);
        let (second, end) = list.runs(next.unwrap());
        assert_eq!((first.len(), second.len(), end), (CONTROL_RUNS_MAX, 10, None));
        assert_eq!(second[0], (CONTROL_RUNS_MAX as u32 * 2, 1));
    }
}
