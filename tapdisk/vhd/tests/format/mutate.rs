//! The fuzz targets' entry points on mutated fixtures, for a few seconds, so
//! that every run of the tests exercises them.

use std::time::{Duration, Instant};

use crate::{entry, fixture};

const TIME_MAX: Duration = Duration::from_secs(4);

/// A small generator; the seed is fixed so that a failure comes back.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed | 1)
    }

    pub fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n.max(1)
    }
}

/// Places that say where everything else is: a random byte of a large image
/// would nearly always be guest data.
fn interesting(random: &mut Random, len: usize) -> usize {
    let len = len as u64;
    let at = match random.below(4) {
        0 => random.below(4096.min(len)),
        1 => len.saturating_sub(512) + random.below(512.min(len)),
        2 => 512 + random.below(1024),
        _ => random.below(len),
    };
    usize::try_from(at.min(len.saturating_sub(1))).unwrap_or(0)
}

fn mutate(bytes: &mut Vec<u8>, random: &mut Random) {
    for _ in 0..=random.below(4) {
        if bytes.is_empty() {
            return;
        }
        let at = interesting(random, bytes.len());
        match random.below(5) {
            0 => bytes[at] ^= 1 << random.below(8),
            1 => bytes[at] = random.below(256) as u8,
            2 => {
                let end = (at + 4).min(bytes.len());
                let fill = if random.below(2) == 0 { 0 } else { 0xFF };
                bytes[at..end].fill(fill);
            }
            3 => bytes.truncate(at),
            _ => bytes.extend(vec![0x5A; random.below(2000) as usize]),
        }
    }
    if random.below(4) != 0 {
        seal(bytes);
    }
}

/// Makes the checksums right again, to get past them.
fn seal(bytes: &mut [u8]) {
    let len = bytes.len();
    for (from, size, field) in [(0, 512, 64), (512, 1024, 36), (len.saturating_sub(512), 512, 64)] {
        let Some(part) = bytes.get_mut(from..from + size) else {
            continue;
        };
        part[field..field + 4].fill(0);
        let sum = !part.iter().map(|b| u32::from(*b)).sum::<u32>();
        part[field..field + 4].copy_from_slice(&sum.to_be_bytes());
    }
}

#[test]
fn mutated_images_harm_nobody() {
    let seeds: Vec<Vec<u8>> = [
        "dyn-empty-64m.vhd",
        "killed-data.vhd",
        "crashed-after-resume.vhd",
        "full-2m.vhd",
        "sub/child.vhd",
        "rawchild.vhd",
        "prealloc-fast.vhd",
        "fixed-2m.vhd",
        "qemu-fixed-chs.vhd",
        "resize-crashed.vhd",
        "qemu-dyn-chs.vhd",
    ]
    .iter()
    .map(|path| fixture::bytes(path))
    .collect();
    let began = Instant::now();
    let mut random = Random::new(0x5EED);
    let mut rounds = 0;
    while began.elapsed() < TIME_MAX {
        // Small images more often: they run faster.
        let which = random.below(seeds.len() as u64).min(random.below(seeds.len() as u64));
        let mut bytes = seeds[which as usize].clone();
        mutate(&mut bytes, &mut random);
        entry::footer(&bytes);
        if let Some(rest) = bytes.get(512..) {
            entry::header(rest);
        }
        entry::open(&bytes);
        entry::check_image(&bytes);
        entry::repair_image(&bytes);
        entry::resize(&bytes);
        entry::stream(&bytes);
        rounds += 1;
    }
    assert!(rounds > 20, "only {rounds} rounds");
}

#[test]
fn mutated_journals_harm_nobody() {
    let image = fixture::bytes("resize-crashed.vhd");
    let journal = fixture::bytes("resize-crashed.journal");
    let mut random = Random::new(0x0DD);
    for _ in 0..60 {
        let mut bytes = [&image[..4096], &journal].concat();
        for _ in 0..=random.below(3) {
            let at = 4096 + random.below(0x12E0);
            bytes[at as usize] = random.below(256) as u8;
        }
        if random.below(3) == 0 {
            bytes.truncate(bytes.len() - random.below(2 << 20) as usize);
        }
        entry::journal(&bytes);
    }
}
