//! Where requests go. All offsets are multiples of the request's length.

use rand::rngs::SmallRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};

use crate::sets::BLOCK_BYTES;

/// Anywhere in `size_bytes`, without end.
pub fn random(size_bytes: u64, request_bytes: u32, seed: u64) -> impl Iterator<Item = u64> {
    let places = (size_bytes / u64::from(request_bytes)).max(1);
    let mut rng = SmallRng::seed_from_u64(seed);
    std::iter::repeat_with(move || rng.random_range(0..places) * u64::from(request_bytes))
}

/// One after another from 0, around and around.
pub fn sequential(size_bytes: u64, request_bytes: u32) -> impl Iterator<Item = u64> {
    let places = (size_bytes / u64::from(request_bytes)).max(1);
    (0..places).cycle().map(move |place| place * u64::from(request_bytes))
}

/// One in every block, each block once, in random order.
pub fn each_block(size_bytes: u64, request_bytes: u32, seed: u64) -> impl Iterator<Item = u64> {
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut blocks: Vec<u64> = (0..size_bytes / BLOCK_BYTES).collect();
    blocks.shuffle(&mut rng);
    let places = BLOCK_BYTES / u64::from(request_bytes);
    blocks
        .into_iter()
        .map(move |block| block * BLOCK_BYTES + rng.random_range(0..places) * u64::from(request_bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 16 * BLOCK_BYTES;

    #[test]
    fn random_offsets_stay_inside_and_are_aligned() {
        assert!(random(SIZE, 4096, 7).take(10_000).all(|at| at + 4096 <= SIZE && at % 4096 == 0));
    }

    #[test]
    fn sequential_offsets_start_over_at_the_end() {
        let all: Vec<u64> = sequential(3 << 20, 1 << 20).take(4).collect();
        assert_eq!(all, [0, 1 << 20, 2 << 20, 0]);
    }

    #[test]
    fn each_block_is_met_once() {
        let mut blocks: Vec<u64> = each_block(SIZE, 4096, 3).map(|at| at / BLOCK_BYTES).collect();
        blocks.sort_unstable();
        assert_eq!(blocks, (0..16).collect::<Vec<u64>>());
    }
}
