//! Two readings of one disk, block by block, and what they say of what lies
//! between them. Pure.

use serde::{Serialize, Serializer};
use sha2::{Digest as _, Sha256};
use vhd::stream::extents::is_zero;
use vhd::units::BLOCK_BYTES;

use crate::limits;

/// SHA-256 of a block's bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Digest([u8; 32]);

impl Digest {
    /// Of some bytes; `None` of zeros, which are never hashed: a block that
    /// is not there and one full of zeros read the same.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Option<Self> {
        (!is_zero(bytes)).then(|| Self(Sha256::digest(bytes).into()))
    }
}

impl Serialize for Digest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let hex: String = self.0.iter().map(|byte| format!("{byte:02x}")).collect();
        serializer.serialize_str(&hex)
    }
}

/// One digest over all blocks of a disk that are not zeros, with their
/// numbers, in order.
#[derive(Debug, Default)]
pub struct Sum(Sha256);

impl Sum {
    /// Takes in the next block.
    pub fn add(&mut self, block: u32, digest: &Digest) {
        self.0.update(block.to_be_bytes());
        self.0.update(digest.0);
    }

    /// The sum.
    #[must_use]
    pub fn end(self) -> Digest {
        Digest(self.0.finalize().into())
    }
}

/// The first reading: every block that is not zeros, in order.
pub type Hashes = Vec<(u32, Digest)>;

/// Takes the blocks of a second reading, in order, and keeps those that are
/// not as in the first one.
#[derive(Debug)]
pub struct Against<'a> {
    before: &'a [(u32, Digest)],
    unequal: Vec<(u32, Option<Digest>)>,
    sum: Sum,
}

impl<'a> Against<'a> {
    /// Nothing read yet.
    #[must_use]
    pub fn new(before: &'a [(u32, Digest)]) -> Self {
        Self { before, unequal: Vec::new(), sum: Sum::default() }
    }

    /// The next block that is not zeros.
    pub fn add(&mut self, block: u32, digest: Digest) {
        self.sum.add(block, &digest);
        self.skip_to(block);
        match self.before.split_first() {
            Some(((same, was), rest)) if *same == block => {
                self.before = rest;
                if *was != digest {
                    self.unequal.push((block, Some(digest)));
                }
            }
            _ => self.unequal.push((block, Some(digest))),
        }
    }

    /// What was something and is zeros now.
    fn skip_to(&mut self, block: u32) {
        while let Some(((gone, _), rest)) = self.before.split_first()
            && *gone < block
        {
            self.unequal.push((*gone, None));
            self.before = rest;
        }
    }

    /// Blocks that are not as before, in order, with what they are now
    /// (nothing: zeros); and the sum.
    #[must_use]
    pub fn end(mut self) -> (Vec<(u32, Option<Digest>)>, Digest) {
        self.skip_to(u32::MAX);
        (self.unequal, self.sum.end())
    }
}

/// What the comparison of a disk came to, in blocks of 2 MiB.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Found {
    /// Blocks the disk has.
    pub blocks: u64,
    /// Those that read the same before and after, and nobody wrote.
    pub matched: u64,
    /// Those a guest wrote, trimmed or zeroed meanwhile.
    pub written: u64,
    /// Those nobody wrote and that do not read the same.
    pub different: u64,
    /// The first of them.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub different_blocks: Vec<u32>,
}

/// Blocks of a disk of so many bytes.
#[must_use]
pub fn blocks_of(virtual_bytes: u64) -> u64 {
    virtual_bytes.div_ceil(BLOCK_BYTES)
}

/// Judges. `unequal` in order; `changed`: first block and number of blocks of
/// runs that a guest changed, in order, possibly past the disk's end.
#[must_use]
pub fn judge(virtual_bytes: u64, unequal: &[(u32, Option<Digest>)], changed: &[(u32, u32)]) -> Found {
    let blocks = blocks_of(virtual_bytes);
    let clipped = |(first, count): &(u32, u32)| {
        let first = u64::from(*first).min(blocks);
        first..(first + u64::from(*count)).min(blocks)
    };
    let written = changed.iter().map(|run| clipped(run).count() as u64).sum::<u64>();
    let is_written = |block: u32| {
        let after = changed.partition_point(|(first, _)| *first <= block);
        let run = after.checked_sub(1).and_then(|at| changed.get(at));
        run.is_some_and(|(first, count)| block - first < *count)
    };
    let different = unequal.iter().map(|(block, _)| *block).filter(|block| !is_written(*block));
    let different: Vec<u32> = different.collect();
    Found {
        blocks,
        matched: blocks.saturating_sub(written).saturating_sub(different.len() as u64),
        written,
        different: different.len() as u64,
        different_blocks: different.into_iter().take(limits::RECEIPT_BLOCKS_NAMED).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(n: u8) -> Digest {
        Digest::of(&[n; 4096]).unwrap()
    }

    /// A disk of ten blocks read twice: block and content, 0 being zeros.
    fn compared(before: &[(u32, u8)], after: &[(u32, u8)], changed: &[(u32, u32)]) -> Found {
        let of = |list: &[(u32, u8)]| -> Hashes {
            list.iter().filter_map(|(block, n)| Some((*block, Digest::of(&[*n; 512])?))).collect()
        };
        let (before, after) = (of(before), of(after));
        let mut against = Against::new(&before);
        after.into_iter().for_each(|(block, digest)| against.add(block, digest));
        judge(10 * BLOCK_BYTES - 512, &against.end().0, changed)
    }

    #[test]
    fn every_block_is_the_same_written_or_different() {
        let disk = [(0, 1), (3, 1), (9, 1)];
        // before, after, what guests changed, (matched, written), different
        type Case<'a> = (&'a [(u32, u8)], &'a [(u32, u8)], &'a [(u32, u32)], (u64, u64), &'a [u32]);
        let cases: [Case<'_>; 14] = [
            (&[], &[], &[], (10, 0), &[]),
            (&disk, &disk, &[], (10, 0), &[]),
            // Zeros that are stored and zeros that are not are the same.
            (&[(4, 0), (9, 1)], &[(9, 1)], &[], (10, 0), &[]),
            (&[(9, 1)], &[(4, 0), (9, 1)], &[], (10, 0), &[]),
            // Other content, something for nothing, nothing for something.
            (&disk, &[(0, 1), (3, 2), (9, 1)], &[], (9, 0), &[3]),
            (&disk, &[(0, 1), (2, 7), (3, 1), (9, 1)], &[], (9, 0), &[2]),
            (&disk, &[(3, 1), (9, 1)], &[], (9, 0), &[0]),
            (&disk, &[(0, 1), (3, 1)], &[], (9, 0), &[9]),
            (&disk, &[], &[], (7, 0), &[0, 3, 9]),
            // A guest wrote it: whatever it is now.
            (&disk, &[(0, 1), (3, 2), (9, 1)], &[(3, 1)], (9, 1), &[]),
            (&disk, &disk, &[(3, 1)], (9, 1), &[]),
            // That hides nothing beside it.
            (&disk, &[(0, 2), (3, 2), (9, 2)], &[(2, 2), (5, 4)], (2, 6), &[0, 9]),
            (&disk, &[(0, 2), (3, 2), (9, 2)], &[(1, 2), (4, 5)], (0, 7), &[0, 3, 9]),
            // A run past the end: the disk cannot have grown, so it counts up to there.
            (&disk, &[(0, 1), (3, 1), (9, 2)], &[(8, 100), (200, 5)], (8, 2), &[]),
        ];
        for (n, (before, after, changed, (matched, written), different)) in cases.into_iter().enumerate() {
            let found = compared(before, after, changed);
            assert_eq!((found.matched, found.written), (matched, written), "case {n}: {found:?}");
            assert_eq!(found.different_blocks, different, "case {n}");
            assert_eq!(found.different, different.len() as u64, "case {n}");
            assert_eq!(found.blocks, 10);
            assert_eq!(found.matched + found.written + found.different, 10, "case {n}: each block once");
        }
    }

    #[test]
    fn of_many_different_blocks_the_first_are_named() {
        let before: Hashes = (0..500).map(|block| (block, digest(1))).collect();
        let (unequal, _) = Against::new(&before).end();
        let found = judge(500 * BLOCK_BYTES, &unequal, &[]);
        assert_eq!((found.different, found.different_blocks.len()), (500, limits::RECEIPT_BLOCKS_NAMED));
    }

    #[test]
    fn the_sum_tells_contents_and_places_apart() {
        let sum = |blocks: &[(u32, u8)]| {
            let mut against = Against::new(&[]);
            blocks.iter().for_each(|(block, n)| against.add(*block, digest(*n)));
            against.end().1
        };
        let all = [sum(&[]), sum(&[(0, 1)]), sum(&[(1, 1)]), sum(&[(0, 2)]), sum(&[(0, 1), (1, 1)])];
        for (n, a) in all.iter().enumerate() {
            assert!(all.iter().skip(n + 1).all(|b| a != b), "{n}");
        }
        assert_eq!(sum(&[(3, 5)]), sum(&[(3, 5)]));
    }
}
