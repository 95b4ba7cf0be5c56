//! Blocks that lie side by side in the leaf of a merge and will in its parent:
//! where extents are shared, one call shares all of them.
//!
//! ```text
//!   L   | bitmap | data of 4 | page | data of 5 | page | data of 6 |
//!                 \_________________ shared at once ______________/
//!   P   | bitmap | data of 4 | page | data of 5 | page | data of 6 |
//!       written                 come along
//! ```
//!
//! The page between two blocks, which ends with the bitmap of the second, comes
//! along. So it must be what P's write-back would have written there: zeros and
//! a full bitmap. That is looked at before the block is taken on, so that no
//! write waits for it, and holds until the block leaves L: a leaf in merge gains
//! no sector, so no bitmap of it changes, and nobody zeroes the slot of a block
//! that it has.
//!
//! A bitmap that came along is there before the flush that makes the data
//! durable, as the write-back of P writes those of new slots ([`vhd::rw`], step
//! 1), and no entry of P names the slot before that.

use std::sync::Arc;

use vhd::rw::Presence;
use vhd::slots::{BITMAP_PAGE_BYTES, follows, is_full_bitmap_page};
use vhd::units::{BlockNo, Slot};

use super::image::Purpose;
use super::merge::{LEAF, PARENT};
use super::{Completion, Engine, Op};

impl Engine {
    /// Looks at the pages of the next so many blocks, as far as they may come
    /// along; whether that is under way.
    pub(super) fn look_at_pages(&mut self, blocks: usize) -> bool {
        if self.merge.shares != Some(true) || self.merge.reading_pages {
            return self.merge.reading_pages;
        }
        let (leaf, parent) = (&self.stack[LEAF].rw, &self.stack[PARENT].rw);
        let next = leaf.blocks_held_from(BlockNo(self.merge.cursor));
        let next = next.filter(|block| !self.merge.moves.contains(*block)).take(blocks);
        let (mut before, mut coming, mut offsets) = (None, Vec::new(), Vec::new());
        for block in next {
            let Presence::Whole(slot) = leaf.presence(block) else {
                before = None;
                continue;
            };
            let behind = before.is_some_and(|before| follows(before, slot));
            before = Some(slot);
            let known = self.merge.pages.contains_key(&block) || parent.presence(block) != Presence::Absent;
            if let Some(offset) = slot.data_offset(0).checked_sub(BITMAP_PAGE_BYTES)
                && behind
                && !known
            {
                coming.push(block);
                offsets.push(offset);
            }
        }
        if coming.is_empty() {
            return false;
        }
        let (file, len) = (self.stack[LEAF].file, BITMAP_PAGE_BYTES as u32);
        self.merge.reading_pages = true;
        self.start(Op::ReadPages { file, offsets: Arc::from(offsets), len }, Purpose::Pages(coming));
        true
    }

    /// What was read of them; where nothing was, none of them comes along.
    pub(super) fn pages_read(&mut self, blocks: &[BlockNo], completion: &Completion) {
        self.merge.reading_pages = false;
        let bytes = match completion {
            Completion::Bytes(bytes) => bytes.as_slice(),
            _ => &[],
        };
        let mut pages = bytes.chunks_exact(BITMAP_PAGE_BYTES as usize);
        for block in blocks {
            let sound = pages.next().is_some_and(is_full_bitmap_page);
            self.merge.pages.insert(*block, sound);
        }
    }

    /// Whether a block is shared together with the one before it.
    pub(super) fn comes_along(&self, before: BlockNo, block: BlockNo) -> bool {
        self.merge.pages.get(&block) == Some(&true) && self.side_by_side(before, block)
    }

    /// Whether two blocks are shared as wholes and lie side by side in both
    /// images.
    fn side_by_side(&self, one: BlockNo, next: BlockNo) -> bool {
        match (self.shared_whole(one), self.shared_whole(next)) {
            (Some((from, to)), Some((next_from, next_to))) => {
                follows(from, next_from) && follows(to, next_to)
            }
            _ => false,
        }
    }

    /// Where a block lies in L and will in P, if it is shared as a whole: L has
    /// all of it, and P only just gave it a slot.
    fn shared_whole(&self, block: BlockNo) -> Option<(Slot, Slot)> {
        if self.merge.shares != Some(true) || self.merge.zeroed.contains(&block) {
            return None;
        }
        let parent = &self.stack[PARENT].rw;
        match (self.stack[LEAF].rw.presence(block), parent.presence(block)) {
            (Presence::Whole(from), Presence::Whole(to) | Presence::Partial(to))
                if parent.is_unwritten(block) =>
            {
                Some((from, to))
            }
            _ => None,
        }
    }
}
