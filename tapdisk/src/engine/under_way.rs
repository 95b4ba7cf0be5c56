//! The blocks of a merge that are under way, and how many of them are in each
//! stage: every event of a guest asks for that.

use std::collections::BTreeMap;

use vhd::units::BlockNo;

/// A block under way.
#[derive(Debug)]
pub(super) struct Move {
    pub(super) stage: Stage,
    pub(super) since_us: u64,
    /// It moves without a copy.
    pub(super) zeroed: bool,
    /// P takes room for it before L gives any back.
    pub(super) gained: bool,
}

/// See [`super::moves`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
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

impl Move {
    /// One that begins.
    pub(super) fn new(since_us: u64, gained: bool) -> Self {
        Self { stage: Stage::Draining, since_us, zeroed: false, gained }
    }
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Moves {
    by_block: BTreeMap<BlockNo, Move>,
    /// Not copied yet.
    in_window: usize,
    /// Copied, with no write-back that covers them.
    waiting: usize,
    /// Those of them for which P took room.
    waiting_gained: usize,
    /// All for which it did.
    gained: usize,
    /// Blocks that a write-back of P covers, by its number.
    captured: BTreeMap<u64, usize>,
}

impl Moves {
    pub(super) fn len(&self) -> usize {
        self.by_block.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.by_block.is_empty()
    }

    pub(super) fn contains(&self, block: BlockNo) -> bool {
        self.by_block.contains_key(&block)
    }

    pub(super) fn get(&self, block: BlockNo) -> Option<&Move> {
        self.by_block.get(&block)
    }

    pub(super) fn stage(&self, block: BlockNo) -> Option<Stage> {
        self.get(block).map(|moving| moving.stage)
    }

    /// Blocks not copied yet, all of one batch.
    pub(super) fn in_window(&self) -> usize {
        self.in_window
    }

    /// Copied blocks that no write-back covers, and those of them for which P
    /// took room.
    pub(super) fn waiting(&self) -> (usize, usize) {
        (self.waiting, self.waiting_gained)
    }

    /// Blocks for which P takes room before L gives any back.
    pub(super) fn gained(&self) -> usize {
        self.gained
    }

    /// Blocks in a stage, in their order.
    pub(super) fn in_stage(&self, which: impl Fn(&Stage) -> bool) -> Vec<BlockNo> {
        self.by_block.iter().filter(|(_, moving)| which(&moving.stage)).map(|(block, _)| *block).collect()
    }

    /// Blocks that are durable in P once its write-back `done` is.
    pub(super) fn durable(&self, done: u64) -> Vec<BlockNo> {
        match self.captured.first_key_value() {
            Some((cycle, _)) if *cycle <= done => {
                self.in_stage(|stage| matches!(stage, Stage::Copied { cycle: Some(c) } if *c <= done))
            }
            _ => Vec::new(),
        }
    }

    pub(super) fn insert(&mut self, block: BlockNo, moving: Move) {
        self.remove(block);
        self.count(&moving, true);
        self.by_block.insert(block, moving);
    }

    pub(super) fn remove(&mut self, block: BlockNo) -> Option<Move> {
        let moving = self.by_block.remove(&block)?;
        self.count(&moving, false);
        Some(moving)
    }

    /// Changes a block that is under way.
    pub(super) fn change(&mut self, block: BlockNo, how: impl FnOnce(&mut Move)) {
        if let Some(mut moving) = self.remove(block) {
            how(&mut moving);
            self.insert(block, moving);
        }
    }

    /// A write-back of P begins with all that was copied.
    pub(super) fn captured_by(&mut self, number: u64) {
        for moving in self.by_block.values_mut() {
            if let Stage::Copied { cycle: cycle @ None } = &mut moving.stage {
                *cycle = Some(number);
            }
        }
        if self.waiting > 0 {
            *self.captured.entry(number).or_default() += self.waiting;
            (self.waiting, self.waiting_gained) = (0, 0);
        }
    }

    /// Ends every move that has no copy in flight.
    pub(super) fn keep_copying(&mut self) {
        for block in self.in_stage(|stage| !matches!(stage, Stage::Copying { .. })) {
            self.remove(block);
        }
    }

    fn count(&mut self, moving: &Move, more: bool) {
        let change = |number: &mut usize| *number = if more { *number + 1 } else { *number - 1 };
        if moving.gained {
            change(&mut self.gained);
        }
        match moving.stage {
            Stage::Draining | Stage::Copying { .. } => change(&mut self.in_window),
            Stage::Copied { cycle: None } => {
                change(&mut self.waiting);
                if moving.gained {
                    change(&mut self.waiting_gained);
                }
            }
            Stage::Copied { cycle: Some(number) } => {
                let blocks = self.captured.entry(number).or_default();
                change(blocks);
                if *blocks == 0 {
                    self.captured.remove(&number);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the counts must be, counted anew.
    fn check(moves: &Moves) {
        let count = |which: &dyn Fn(&Move) -> bool| moves.by_block.values().filter(|m| which(m)).count();
        let waits = |m: &Move| m.stage == Stage::Copied { cycle: None };
        assert_eq!(moves.in_window(), count(&|m| !matches!(m.stage, Stage::Copied { .. })));
        assert_eq!(moves.waiting(), (count(&waits), count(&|m| waits(m) && m.gained)));
        assert_eq!(moves.gained(), count(&|m| m.gained));
        for done in 0..5 {
            let durable = |m: &Move| matches!(m.stage, Stage::Copied { cycle: Some(c) } if c <= done);
            assert_eq!(moves.durable(done).len(), count(&durable), "by {done}");
        }
    }

    #[test]
    fn counts_follow_every_change() {
        let mut moves = Moves::default();
        for block in 0..12 {
            moves.insert(BlockNo(block), Move::new(0, block % 3 == 0));
            check(&moves);
        }
        for block in 0..10 {
            moves.change(BlockNo(block), |moving| moving.stage = Stage::Copying { left: 1 });
            check(&moves);
        }
        for (blocks, number) in [(0..3, 1), (3..6, 2), (6..8, 4)] {
            for block in blocks {
                moves.change(BlockNo(block), |moving| moving.stage = Stage::Copied { cycle: None });
                check(&moves);
            }
            moves.captured_by(number);
            check(&moves);
        }
        assert_eq!(moves.durable(2), (0..6).map(BlockNo).collect::<Vec<_>>());
        assert!(moves.remove(BlockNo(4)).is_some() && moves.remove(BlockNo(4)).is_none());
        check(&moves);
        moves.insert(BlockNo(3), Move::new(0, true));
        check(&moves);
        moves.keep_copying();
        check(&moves);
        assert_eq!(moves.in_stage(|_| true), [BlockNo(8), BlockNo(9)]);
    }
}
