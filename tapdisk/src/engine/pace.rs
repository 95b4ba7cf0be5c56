//! How much of a live merge goes on at one time: its rate, its rests, and how
//! many blocks are copied together.

use crate::limits::{
    COPY_TIME_US, COPYING_BLOCKS_FIRST, COPYING_BLOCKS_MAX, COPYING_SHARED_BLOCKS_MAX, FLUSH_SHARE,
    MOVING_BLOCKS_MAX, MOVING_SHARED_BLOCKS_MAX, PACE_BURST_BYTES, REST_US_MAX,
};

/// How many blocks a merge may have in its stages at this moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct AtOnce {
    /// Under way.
    pub(super) moving: usize,
    /// Those for which P took room and L gave none back.
    pub(super) gained: usize,
    /// Copied together.
    pub(super) copying: usize,
    /// Copied and worth a flush while others are being copied.
    pub(super) flush: usize,
    /// The same of those for which P took room.
    pub(super) flush_gained: usize,
}

impl AtOnce {
    /// `shared`: extents are, and no guest is busy, who could have to wait for
    /// what a flush covers. `extra_blocks`: those that P may take room for.
    pub(super) fn new(shared: bool, extra_blocks: usize) -> Self {
        let (moving, copying) = match shared {
            true => (MOVING_SHARED_BLOCKS_MAX, COPYING_SHARED_BLOCKS_MAX),
            false => (MOVING_BLOCKS_MAX, COPYING_BLOCKS_MAX),
        };
        let flush_gained = (extra_blocks / FLUSH_SHARE).max(1);
        Self { moving, gained: extra_blocks, copying, flush: moving / FLUSH_SHARE, flush_gained }
    }
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
    pub(super) fn rest(&mut self, took_us: u64, now_us: u64) {
        self.rests_until_us = now_us + took_us.min(REST_US_MAX);
    }

    /// Whether another block may be copied.
    pub(super) fn allows(&self, copied_bytes: u64, now_us: u64) -> bool {
        let elapsed_us = u128::from(now_us.saturating_sub(self.since_us));
        let due = u128::from(self.rate_bytes_per_s) * elapsed_us / 1_000_000;
        let copied = u128::from(copied_bytes.saturating_sub(self.before_bytes));
        let within = self.rate_bytes_per_s == 0 || copied <= due + u128::from(PACE_BURST_BYTES);
        within && now_us >= self.rests_until_us
    }
}

/// How many blocks are copied together: as many as take no longer than a
/// guest's write to one of them may wait.
#[derive(Debug)]
pub(super) struct Batch {
    blocks: usize,
}

impl Default for Batch {
    fn default() -> Self {
        Self { blocks: COPYING_BLOCKS_FIRST }
    }
}

impl Batch {
    /// Blocks of the next batch, `most` or fewer.
    pub(super) fn blocks(&self, most: usize) -> usize {
        self.blocks.min(most)
    }

    /// One of so many blocks ended; the next has `most` or fewer.
    pub(super) fn ended(&mut self, blocks: usize, took_us: u64, most: usize) {
        if took_us > COPY_TIME_US {
            self.blocks = (self.blocks.min(blocks) / 2).max(1);
        } else if took_us < COPY_TIME_US / 2 && blocks >= self.blocks {
            let times = if took_us < COPY_TIME_US / 8 { 4 } else { 2 };
            self.blocks = (self.blocks * times).min(most);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: u64 = 1_000_000;
    const MOST: usize = COPYING_BLOCKS_MAX;

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

    #[test]
    fn batches_grow_while_they_are_quick_and_shrink_at_once_when_they_are_not() {
        let mut batch = Batch::default();
        for _ in 0..20 {
            batch.ended(batch.blocks(MOST), COPY_TIME_US / 4, MOST);
        }
        assert_eq!(batch.blocks(MOST), MOST);
        batch.ended(MOST, COPY_TIME_US + 1, MOST);
        assert_eq!(batch.blocks(MOST), MOST / 2);
        // A single block says nothing of many.
        batch.ended(1, COPY_TIME_US / 10, MOST);
        assert_eq!(batch.blocks(MOST), MOST / 2);
        batch.ended(1, 100 * COPY_TIME_US, MOST);
        assert_eq!(batch.blocks(MOST), 1);
        // The quicker they are, the sooner they are large.
        for blocks in [4, 16, 64, 64] {
            batch.ended(batch.blocks(MOST), COPY_TIME_US / 10, MOST);
            assert_eq!(batch.blocks(MOST), blocks);
        }
        let most = COPYING_SHARED_BLOCKS_MAX;
        (0..20).for_each(|_| batch.ended(batch.blocks(most), 0, most));
        assert_eq!((batch.blocks(most), batch.blocks(MOST)), (most, MOST));
    }

    #[test]
    fn where_extents_are_shared_a_flush_covers_more() {
        let (copied, shared) = (AtOnce::new(false, 16), AtOnce::new(true, 16));
        assert_eq!((copied.moving, copied.flush, copied.flush_gained), (192, 64, 5));
        assert_eq!((shared.moving, shared.flush, shared.flush_gained), (1024, 341, 5));
        // However little room there is, what took it is flushed at some time.
        for extra_blocks in 1..200 {
            let flush = AtOnce::new(false, extra_blocks).flush_gained;
            assert!((1..=extra_blocks).contains(&flush), "{extra_blocks}");
        }
    }
}
