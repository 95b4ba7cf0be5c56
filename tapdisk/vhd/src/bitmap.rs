//! A block's sector bitmap: which sectors this image has.
//!
//! On disk one bit per sector, most significant bit first (bit 0 is 0x80 of
//! byte 0), padded to a sector. Source: the VHD specification, "Block bitmap".

use crate::units::SectorRun;

/// Bits of one block, at most 4096 (2 MiB); smaller blocks use fewer.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct SectorBitmap([u64; 64]);

impl std::fmt::Debug for SectorBitmap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.present()).finish()
    }
}

impl Default for SectorBitmap {
    fn default() -> Self {
        Self::EMPTY
    }
}

/// A run of equal bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BitRun {
    /// Which sectors.
    pub run: SectorRun,
    /// Whether the image has them.
    pub present: bool,
}

// Words hold 64 sectors each, sector 0 in the most significant bit: the
// on-disk bytes of a word are then simply its big-endian form.
impl SectorBitmap {
    /// No sector present.
    pub const EMPTY: Self = Self([0; 64]);
    /// All 4096 sectors present.
    pub const FULL: Self = Self([u64::MAX; 64]);

    /// From the bytes of a bitmap sector.
    #[must_use]
    pub fn from_bytes(bytes: &[u8; 512]) -> Self {
        let mut words = [0; 64];
        for (word, chunk) in words.iter_mut().zip(bytes.as_chunks::<8>().0) {
            *word = u64::from_be_bytes(*chunk);
        }
        Self(words)
    }

    /// The bytes of the bitmap sector.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; 512] {
        let mut bytes = [0; 512];
        for (chunk, word) in bytes.as_chunks_mut::<8>().0.iter_mut().zip(self.0) {
            *chunk = word.to_be_bytes();
        }
        bytes
    }

    /// Whether a sector is present.
    #[must_use]
    pub fn get(&self, sector: u32) -> bool {
        self.0[(sector / 64) as usize] & (1 << (63 - sector % 64)) != 0
    }

    /// Whether every sector of `run` is present.
    #[must_use]
    pub fn has_all(&self, run: SectorRun) -> bool {
        self.masks(run).all(|(word, mask)| word & mask == mask)
    }

    /// Whether any sector of `run` is present.
    #[must_use]
    pub fn has_any(&self, run: SectorRun) -> bool {
        self.masks(run).any(|(word, mask)| word & mask != 0)
    }

    /// Marks sectors present.
    pub fn set(&mut self, run: SectorRun) {
        for (i, mask) in word_masks(run) {
            self.0[i] |= mask;
        }
    }

    /// Marks sectors absent.
    pub fn clear(&mut self, run: SectorRun) {
        for (i, mask) in word_masks(run) {
            self.0[i] &= !mask;
        }
    }

    /// Adds every sector the other has.
    pub fn union(&mut self, other: &Self) {
        for (word, more) in self.0.iter_mut().zip(other.0) {
            *word |= more;
        }
    }

    /// Takes away every sector the other has.
    pub fn subtract(&mut self, other: &Self) {
        for (word, less) in self.0.iter_mut().zip(other.0) {
            *word &= !less;
        }
    }

    /// Number of sectors present.
    #[must_use]
    pub fn count(&self) -> u32 {
        self.0.iter().map(|w| w.count_ones()).sum()
    }

    /// All 4096 present.
    #[must_use]
    pub fn is_full(&self) -> bool {
        *self == Self::FULL
    }

    /// None present.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::EMPTY
    }

    /// `within` cut into runs of equal bits, in order.
    pub fn runs(&self, within: SectorRun) -> impl Iterator<Item = BitRun> + '_ {
        let mut at = within.first;
        std::iter::from_fn(move || {
            if at >= within.end() {
                return None;
            }
            let first = at;
            let present = self.get(first);
            at = self.next_change(first, present).min(within.end());
            Some(BitRun { run: SectorRun { first, count: at - first }, present })
        })
    }

    /// The runs of present sectors of the whole block.
    pub fn present(&self) -> impl Iterator<Item = SectorRun> + '_ {
        self.runs(SectorRun::BLOCK).filter(|r| r.present).map(|r| r.run)
    }

    /// First sector after `from` whose bit differs from `value`, or 4096.
    fn next_change(&self, from: u32, value: bool) -> u32 {
        let mut at = from;
        while at < 4096 {
            let word = self.0[(at / 64) as usize];
            let differing = if value { !word } else { word };
            let rest = differing & (u64::MAX >> (at % 64));
            if rest != 0 {
                return at / 64 * 64 + rest.leading_zeros();
            }
            at = (at / 64 + 1) * 64;
        }
        4096
    }

    fn masks(&self, run: SectorRun) -> impl Iterator<Item = (u64, u64)> + '_ {
        word_masks(run).map(|(i, mask)| (self.0[i], mask))
    }
}

fn word_masks(run: SectorRun) -> impl Iterator<Item = (usize, u64)> {
    let end = run.end();
    let mut at = run.first;
    std::iter::from_fn(move || {
        if at >= end {
            return None;
        }
        let word = at / 64;
        let stop = end.min((word + 1) * 64);
        let mask = (u64::MAX >> (at % 64)) & (u64::MAX << ((word + 1) * 64 - stop));
        at = stop;
        Some((word as usize, mask))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(first: u32, count: u32) -> SectorRun {
        SectorRun { first, count }
    }

    #[test]
    fn bit_zero_is_the_top_bit_of_byte_zero() {
        let mut map = SectorBitmap::EMPTY;
        map.set(run(0, 1));
        map.set(run(15, 1));
        let bytes = map.to_bytes();
        assert_eq!(bytes[..2], [0x80, 0x01]);
        assert_eq!(SectorBitmap::from_bytes(&bytes), map);
    }

    #[test]
    fn ranges_agree_with_single_bits() {
        for (first, count) in [(0, 4096), (0, 1), (63, 2), (64, 64), (1, 4095), (4095, 1), (100, 777)] {
            let mut map = SectorBitmap::EMPTY;
            map.set(run(first, count));
            for sector in 0..4096 {
                assert_eq!(map.get(sector), sector >= first && sector < first + count);
            }
            assert_eq!(map.count(), count);
            assert!(map.has_all(run(first, count)));
            assert_eq!(map.present().collect::<Vec<_>>(), [run(first, count)]);
            map.clear(run(first, count));
            assert!(map.is_empty());
        }
    }

    #[test]
    fn runs_cover_the_range_in_order() {
        let mut map = SectorBitmap::EMPTY;
        map.set(run(10, 5));
        map.set(run(64, 70));
        let got: Vec<_> = map.runs(run(12, 100)).map(|r| (r.run.first, r.run.count, r.present)).collect();
        assert_eq!(got, [(12, 3, true), (15, 49, false), (64, 48, true)]);
    }
}
