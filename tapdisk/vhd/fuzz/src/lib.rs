//! What the fuzz targets share: the entry points, which the crate's ordinary
//! tests run too, and inputs that begin at real images.

#[path = "../../tests/format/entry.rs"]
pub mod entry;
#[path = "../../tests/format/mem.rs"]
pub mod mem;

use std::io::Read;
use std::sync::OnceLock;

macro_rules! seeds {
    ($($path:literal),* $(,)?) => {
        &[$(include_bytes!(concat!("../../tests/fixtures/vhd/", $path, ".xz"))),*]
    };
}

// The smaller ones: an input is a copy of one, and speed is coverage.
const SEEDS: &[&[u8]] = seeds![
    "dyn-empty-64m.vhd",
    "killed-data.vhd",
    "crashed-after-resume.vhd",
    "marker-5.vhd",
    "fixed-2m.vhd",
    "full-2m.vhd",
    "sub/child.vhd",
    "bigger-child.vhd",
    "rawchild.vhd",
    "prealloc-fast.vhd",
    "qemu-fixed-chs.vhd",
];

fn unpacked() -> &'static [Vec<u8>] {
    static UNPACKED: OnceLock<Vec<Vec<u8>>> = OnceLock::new();
    UNPACKED.get_or_init(|| SEEDS.iter().map(|packed| unpack(packed)).collect())
}

fn unpack(packed: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    // An unreadable fixture is the tests' concern; here it is an empty seed.
    let _ = xz2::read::XzDecoder::new(packed).read_to_end(&mut bytes);
    bytes
}

/// The image an input stands for. First byte: 0, the rest is the image
/// itself; else a fixture. Second byte: bit 0, checksums are made right
/// again; bit 1, the image is cut. Then patches of 4 bytes: a place, counted
/// from the front or (top bit) from the end, and a value with which two bytes
/// there are replaced.
#[must_use]
pub fn image(input: &[u8]) -> Vec<u8> {
    patched(input, usize::MAX)
}

/// As [`image`], but of the first 8 KiB of a fixture: the headers, fast.
#[must_use]
pub fn headers(input: &[u8]) -> Vec<u8> {
    patched(input, 8192)
}

fn patched(input: &[u8], bytes_max: usize) -> Vec<u8> {
    let [which, flags, patches @ ..] = input else {
        return input.to_vec();
    };
    let Some(which) = usize::from(*which).checked_sub(1) else {
        return patches.to_vec();
    };
    let seeds = unpacked();
    let seed = seeds
        .get(which % seeds.len())
        .map_or(&[][..], Vec::as_slice);
    let mut bytes = seed
        .get(..bytes_max.min(seed.len()))
        .unwrap_or(seed)
        .to_vec();
    let (patches, _) = patches.as_chunks::<4>();
    for [a, b, c, d] in patches {
        let place = usize::from(u16::from_be_bytes([*a, *b]));
        let at = if place & 0x8000 == 0 {
            place
        } else {
            bytes.len().saturating_sub(place & 0x7FFF)
        };
        if let Some(two) = bytes.get_mut(at..at + 2) {
            two.copy_from_slice(&[*c, *d]);
        }
    }
    if flags & 2 != 0
        && let Some([a, b, c, d]) = patches.first()
    {
        bytes.truncate(u32::from_be_bytes([*a, *b, *c, *d]) as usize % (bytes.len() + 1));
    }
    if flags & 1 != 0 {
        seal(&mut bytes);
    }
    bytes
}

/// Makes the checksums of footers and header right.
fn seal(bytes: &mut [u8]) {
    let end = bytes.len().saturating_sub(512);
    for (from, size, field) in [(0, 512, 64), (512, 1024, 36), (end, 512, 64)] {
        let Some(part) = bytes.get_mut(from..from + size) else {
            continue;
        };
        part[field..field + 4].fill(0);
        let sum = !part.iter().map(|byte| u32::from(*byte)).sum::<u32>();
        part[field..field + 4].copy_from_slice(&sum.to_be_bytes());
    }
}

/// The undo journal of a reference resize, patched in the same way, behind
/// the first 4 KiB of its image: what [`entry::journal`] takes.
#[must_use]
pub fn journal(input: &[u8]) -> Vec<u8> {
    static WHOLE: OnceLock<Vec<u8>> = OnceLock::new();
    let whole = WHOLE.get_or_init(|| {
        let mut image = unpack(include_bytes!(
            "../../tests/fixtures/vhd/resize-crashed.vhd.xz"
        ));
        image.truncate(4096);
        image.extend(unpack(include_bytes!(
            "../../tests/fixtures/vhd/resize-crashed.journal.xz"
        )));
        image
    });
    let mut bytes = whole.clone();
    for [a, b, c] in input.as_chunks::<3>().0 {
        let at = 4096 + usize::from(u16::from_be_bytes([*a, *b]) & 0x1FFF);
        if let Some(byte) = bytes.get_mut(at) {
            *byte = *c;
        }
    }
    bytes
}
