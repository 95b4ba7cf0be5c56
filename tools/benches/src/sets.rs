//! What the image sets hold, whoever stores them. Pure.
//!
//! S(n): every block full at the bottom, then n-1 levels with one random
//! 64 KiB write in every block. E(n): the same with empty levels. The same
//! bytes go into VHD chains, qcow2 chains and raw files.

/// Bytes of a VHD block: the grain of all sets.
pub const BLOCK_BYTES: u64 = 2 << 20;
/// Bytes of the one write per block and level.
pub const PATCH_BYTES: u64 = 64 << 10;

/// Bytes of a scattered run.
pub const RUN_BYTES: u64 = 4 << 10;

/// One write of a set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Patch {
    /// Block it lies in.
    pub block: u32,
    /// First byte inside the block.
    pub at: u64,
    /// Bytes.
    pub bytes: u64,
}

impl Patch {
    /// First byte on the disk.
    #[must_use]
    pub fn offset(&self) -> u64 {
        u64::from(self.block) * BLOCK_BYTES + self.at
    }
}

/// What level `level` of S(n) writes, level 0 being the bottom.
pub fn patches(level: u32, blocks: u32) -> impl Iterator<Item = Patch> {
    (0..blocks).map(move |block| match level {
        0 => Patch { block, at: 0, bytes: BLOCK_BYTES },
        _ => {
            let place = mix(u64::from(level) << 32 | u64::from(block)) % (BLOCK_BYTES / PATCH_BYTES);
            Patch { block, at: place * PATCH_BYTES, bytes: PATCH_BYTES }
        }
    })
}

/// Where `runs` runs of [`RUN_BYTES`] lie that are at random all over a disk,
/// each in a place of its own, in no order; fewer where there are not so many
/// places.
pub fn scattered(disk_bytes: u64, runs: u32) -> Vec<u64> {
    let places = disk_bytes / RUN_BYTES;
    let mut taken = std::collections::HashSet::new();
    let at_random = (1..).map(|n| mix(n) % places).filter(|place| taken.insert(*place));
    at_random.take(places.min(u64::from(runs)) as usize).map(|place| place * RUN_BYTES).collect()
}

/// Fills `buf` with what level `level` writes at byte `offset` of the disk:
/// it does not compress, is nowhere zero, and differs from level to level.
pub fn content(level: u32, offset: u64, buf: &mut [u8]) {
    let mut state = mix(u64::from(level) << 48 ^ offset);
    for word in buf.chunks_mut(8) {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let bytes = (mix(state) | 0x0101_0101_0101_0101).to_le_bytes();
        word.copy_from_slice(&bytes[..word.len()]);
    }
}

/// A finalizer of the SplitMix family.
fn mix(mut z: u64) -> u64 {
    z = z.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_level_writes_once_into_every_block() {
        for level in 0..30 {
            let all: Vec<Patch> = patches(level, 40).collect();
            assert_eq!(all.len(), 40);
            for (block, patch) in all.iter().enumerate() {
                assert_eq!(patch.block as usize, block);
                assert!(patch.at % PATCH_BYTES == 0 && patch.at + patch.bytes <= BLOCK_BYTES);
            }
            assert_eq!(all, patches(level, 40).collect::<Vec<_>>());
        }
        let places: std::collections::BTreeSet<u64> = patches(3, 1000).map(|patch| patch.at).collect();
        assert_eq!(places.len(), 32, "the writes are not spread over the block");
    }

    #[test]
    fn scattered_runs_never_meet() {
        for disk in [256 << 20, 16 << 20, 1000 << 20] {
            let all = scattered(disk, 4096);
            assert!(all.iter().all(|at| at % RUN_BYTES == 0 && at + RUN_BYTES <= disk));
            let places: std::collections::BTreeSet<u64> = all.iter().copied().collect();
            assert_eq!(places.len(), all.len());
            assert!(!all.is_sorted());
            let blocks: std::collections::BTreeSet<u64> = all.iter().map(|at| at / BLOCK_BYTES).collect();
            assert!(blocks.len() as u64 >= disk / BLOCK_BYTES / 2, "{} blocks", blocks.len());
        }
    }

    #[test]
    fn content_is_never_zero_and_differs_by_level_and_place() {
        let of = |level, offset| {
            let mut buf = vec![0; 4099];
            content(level, offset, &mut buf);
            buf
        };
        assert!(of(0, 0).iter().all(|byte| *byte != 0));
        assert_ne!(of(0, 0), of(1, 0));
        assert_ne!(of(0, 0), of(0, 4096));
        assert_eq!(of(5, 4096), of(5, 4096));
    }
}
