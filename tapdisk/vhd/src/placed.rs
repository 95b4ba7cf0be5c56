//! Where the bytes of a virtual disk lie, and in what two disks of one tree
//! can differ.
//!
//! ```text
//!   base ── a ── x         x since y: what a and x have, and what b and y
//!      └─── b ── y         have. Elsewhere both read the same bytes of base.
//! ```
//!
//! Two disks read the same wherever both find a sector at the same place of
//! the same image, or both nowhere. That is decided from maps and bitmaps
//! alone, sector by sector; no data is read. What is not listed is equal for
//! certain; what is listed may still happen to hold the same bytes.
//!
//! Absent on purpose: who may read the images meanwhile (leases), and how
//! the map of an attached disk is asked for.

use std::ops::Range;

use uuid::Uuid;

use crate::chain::{Chain, Node, Owner, OwnerRun};
use crate::error::Result;
use crate::units::{BLOCK_BYTES, BlockNo, SECTOR_BYTES};

/// A place in an image of the tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct At {
    /// The image: see [`image_id`].
    pub image: Uuid,
    /// Byte offset in its volume.
    pub offset: u64,
}

/// A run of the virtual disk, and where it lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Placed {
    /// First byte on the virtual disk.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// Where; `None`: nowhere, it reads as zeros.
    pub at: Option<At>,
}

impl Placed {
    /// One past its last byte.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.offset + self.len
    }

    /// The part of the run that lies in a range, if any does.
    #[must_use]
    pub fn within(&self, from: u64, end: u64) -> Option<Self> {
        let (from, end) = (self.offset.max(from), self.end().min(end));
        (from < end).then(|| Self { offset: from, len: end - from, at: self.at_byte(from) })
    }

    /// The place of a byte inside the run.
    fn at_byte(&self, byte: u64) -> Option<At> {
        self.at.map(|at| At { offset: at.offset + (byte - self.offset), ..at })
    }
}

/// What tells an image from all others of its repository, whatever its volume
/// is called just now: the uuid of its footer. A raw image has none and is
/// told by its volume's name, which never changes.
#[must_use]
pub fn image_id(node: &Node) -> Uuid {
    if node.uuid.is_nil() { node.name.uuid().unwrap_or_default() } else { node.uuid }
}

/// Adds a run to a list in order, as part of its last one where it continues
/// that on the disk and in the image.
pub fn push(list: &mut Vec<Placed>, next: Placed) {
    match list.last_mut() {
        Some(last) if last.end() == next.offset && last.at_byte(next.offset) == next.at => {
            last.len += next.len;
        }
        _ => list.push(next),
    }
}

/// Adds a range to a list in order, joined with its last one where they touch.
pub fn push_range(list: &mut Vec<Range<u64>>, next: Range<u64>) {
    match list.last_mut() {
        Some(last) if last.end >= next.start => last.end = last.end.max(next.end),
        _ => list.push(next),
    }
}

/// The ranges in which two disks can differ, given where each has a part of
/// them: two lists in order, without gaps, of the same beginning. What only
/// one of them covers is compared with zeros.
#[must_use]
pub fn differing(a: &[Placed], b: &[Placed]) -> Vec<Range<u64>> {
    let (Some(first), Some(end)) = (
        a.iter().chain(b).map(|run| run.offset).min(),
        [a.last(), b.last()].into_iter().flatten().map(Placed::end).max(),
    ) else {
        return Vec::new();
    };
    let (mut a, mut b) = (a.iter().peekable(), b.iter().peekable());
    let mut found = Vec::new();
    let mut byte = first;
    while byte < end {
        let _passed = (a.next_if(|run| run.end() <= byte), b.next_if(|run| run.end() <= byte));
        let (in_a, in_b) = (a.peek(), b.peek());
        let stops = [in_a, in_b].into_iter().flatten().map(|run| run.end());
        let stop = stops.filter(|stop| *stop > byte).min().unwrap_or(end);
        let at = |run: Option<&&&Placed>| run.and_then(|run| run.at_byte(byte));
        if at(in_a.as_ref()) != at(in_b.as_ref()) {
            push_range(&mut found, byte..stop);
        }
        byte = stop;
    }
    found
}

impl Chain {
    /// Where a block of the disk lies, in order, up to the disk's end. Reads
    /// the bitmaps of the levels that have it in part, and no data.
    ///
    /// # Errors
    /// A bitmap could not be read.
    pub fn placed(&self, block: BlockNo) -> Result<Vec<Placed>> {
        let end = self.virtual_bytes();
        let mut list = Vec::new();
        for OwnerRun { run, owner } in self.owners(block)? {
            let offset = block.first_byte() + u64::from(run.first) * SECTOR_BYTES;
            let len = run.bytes().min(end.saturating_sub(offset));
            if len == 0 {
                break;
            }
            let at = match owner {
                Owner::Zero => None,
                Owner::Node { node, slot } => self.map().node(node).map(|node| At {
                    image: image_id(node),
                    offset: node.data_offset(block, slot, run.first),
                }),
            };
            push(&mut list, Placed { offset, len, at });
        }
        Ok(list)
    }

    /// Blocks of the virtual disk.
    #[must_use]
    pub fn blocks(&self) -> u32 {
        u32::try_from(self.virtual_bytes().div_ceil(BLOCK_BYTES)).unwrap_or(u32::MAX)
    }

    /// Whether both chains look a block up in the same places, and as much of
    /// it: then nothing differs, and no bitmap need be read.
    fn same_places(&self, other: &Self, block: BlockNo) -> bool {
        let seen = |chain: &Self| chain.virtual_bytes().saturating_sub(block.first_byte()).min(BLOCK_BYTES);
        if seen(self) != seen(other) {
            return false;
        }
        let places = |chain: &Self| {
            let of = |place: crate::chain::Place| (chain.map().node(place.node).map(image_id), place.slot);
            chain.map().places(block).map(of).collect::<Vec<_>>()
        };
        places(self) == places(other)
    }
}

/// The ranges in which one disk can differ from another, in order, block by
/// block: up to the first one's end, and past the other's end compared with
/// zeros.
#[derive(Debug)]
pub struct Changes<'a> {
    disk: &'a Chain,
    since: &'a Chain,
    next: u32,
}

impl<'a> Changes<'a> {
    /// What `disk` can differ in from `since`.
    #[must_use]
    pub fn new(disk: &'a Chain, since: &'a Chain) -> Self {
        Self { disk, since, next: 0 }
    }

    /// The ranges in which one block of `disk` can differ.
    ///
    /// # Errors
    /// A bitmap could not be read.
    pub fn of_block(disk: &Chain, since: &Chain, block: BlockNo) -> Result<Vec<Range<u64>>> {
        if disk.same_places(since, block) {
            return Ok(Vec::new());
        }
        let end = disk.virtual_bytes();
        let mut ranges = differing(&disk.placed(block)?, &since.placed(block)?);
        ranges.retain_mut(|range| {
            range.end = range.end.min(end);
            range.start < range.end
        });
        Ok(ranges)
    }
}

impl Iterator for Changes<'_> {
    type Item = Result<Vec<Range<u64>>>;

    /// The ranges of the next block, possibly none.
    fn next(&mut self) -> Option<Self::Item> {
        let block = BlockNo(self.next);
        (block.0 < self.disk.blocks()).then(|| {
            self.next += 1;
            Self::of_block(self.disk, self.since, block)
        })
    }
}

#[cfg(test)]
#[path = "placed_tests.rs"]
pub(crate) mod tests;
