//! What a simulated file holds: sectors, cheap to copy and to compare.
//!
//! ```text
//!   Content: chunk number -> Arc<Chunk>      a copy shares every chunk
//!   Chunk:   64 slots                        None is a hole
//!   Sector:  Arc<bytes, hash of the bytes>   zeros are one shared sector
//!   Fill:    what a hole reads as            zeros; litter on a device
//! ```
//!
//! The hash of a content is the sum of what each sector contributes, so it is
//! kept up to date by every change and costs nothing to ask for. Holes and
//! zeros contribute nothing: they cannot be told apart by reading.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

/// Bytes in a sector, the unit in which a write tears.
pub(super) const SECTOR: u64 = 512;
/// Sectors in a chunk, the unit of copy-on-write.
const CHUNK: u64 = 64;

/// The bytes of one sector, shared by all states that hold them.
#[derive(Clone)]
pub(super) struct Sector(Arc<Data>);

struct Data {
    /// 0 for zeros, and for nothing else.
    hash: u128,
    bytes: [u8; SECTOR as usize],
}

impl Sector {
    /// The sector of zeros.
    pub(super) fn zero() -> Self {
        static ZERO: OnceLock<Sector> = OnceLock::new();
        ZERO.get_or_init(|| {
            let bytes = [0; SECTOR as usize];
            Self(Arc::new(Data { hash: 0, bytes }))
        })
        .clone()
    }

    pub(super) fn new(bytes: [u8; SECTOR as usize]) -> Self {
        if bytes.iter().all(|byte| *byte == 0) {
            return Self::zero();
        }
        Self(Arc::new(Data { hash: hash_bytes(&bytes) | 1, bytes }))
    }

    pub(super) fn bytes(&self) -> &[u8; SECTOR as usize] {
        &self.0.bytes
    }
}

/// What a place in a file holds; `None` is a hole.
pub(super) type Slot = Option<Sector>;

/// What a device's unused space holds: what others left there. The worst of it
/// looks like the metadata of an image, or like a full bitmap.
#[derive(Clone)]
pub(super) struct Litter {
    seed: u64,
    kinds: Arc<[Sector]>,
}

impl Litter {
    /// Sectors in which pieces of images, whole ones of `more` among them, lie
    /// about as a seed has it.
    pub(super) fn new(seed: u64, more: &[[u8; SECTOR as usize]]) -> Self {
        let cookies: [&[u8]; 4] = [b"conectix", b"cxsparse", b"tdbatmap", &[0xff; 512]];
        let kind = |cookie: &[u8]| {
            let mut bytes = [0xa5; SECTOR as usize];
            bytes[..cookie.len()].copy_from_slice(cookie);
            Sector::new(bytes)
        };
        let kinds = cookies.into_iter().map(kind).chain(more.iter().map(|bytes| Sector::new(*bytes)));
        Self { seed, kinds: kinds.collect() }
    }

    fn at(&self, sector_no: u64) -> Sector {
        let n = match self.seed {
            0 => u128::from(sector_no),
            seed => mix(seed.into(), sector_no.into()) >> 64,
        };
        let kind = n % self.kinds.len() as u128;
        self.kinds[usize::try_from(kind).unwrap_or(0)].clone()
    }
}

/// A hash for counting distinct states; not meant to resist an adversary.
pub(super) fn hash_bytes(bytes: &[u8]) -> u128 {
    const A: u64 = 0x9e37_79b9_7f4a_7c15;
    const B: u64 = 0xd6e8_feb8_6659_fd93;
    let (mut a, mut b) = (A ^ bytes.len() as u64, B);
    for piece in bytes.chunks(8) {
        let mut word = [0; 8];
        word[..piece.len()].copy_from_slice(piece);
        let word = u64::from_le_bytes(word);
        a = (a ^ word).wrapping_mul(A).rotate_left(29);
        b = (b.rotate_left(23) ^ word).wrapping_mul(B);
        b ^= b >> 31;
    }
    mix(u128::from(a), u128::from(b))
}

/// Combines two hashes; the order matters.
pub(super) fn mix(a: u128, b: u128) -> u128 {
    const K: u128 = 0x2360_ed05_1fc6_5da4_4385_df64_9fcc_f645;
    let mut h = a.wrapping_mul(K) ^ b.rotate_left(64);
    h ^= h >> 67;
    h = h.wrapping_mul(K);
    h ^ (h >> 61)
}

/// The hash of what a place holds; holes and zeros are alike.
pub(super) fn hash_slot(slot: &Slot) -> u128 {
    slot.as_ref().map_or(0, |sector| sector.0.hash)
}

/// What a sector at a place adds to the hash of its file. Where holes read as
/// litter, zeros are something.
fn share(sector_no: u64, slot: &Slot, littered: bool) -> u128 {
    match (hash_slot(slot), slot) {
        (0, Some(_)) if littered => mix(1, u128::from(sector_no) + 1),
        (0, _) => 0,
        (hash, _) => mix(hash, u128::from(sector_no) + 1),
    }
}

#[derive(Clone)]
struct Chunk {
    slots: [Slot; CHUNK as usize],
    hash: u128,
    allocated: u64,
}

impl Chunk {
    const EMPTY: Self = Self { slots: [const { None }; CHUNK as usize], hash: 0, allocated: 0 };
}

/// The bytes of a file and its length.
#[derive(Clone, Default)]
pub(super) struct Content {
    /// Bytes. Slots past it may be set in the middle of a replay; they are
    /// not readable, and `cut` drops them.
    pub(super) len: u64,
    chunks: BTreeMap<u64, Arc<Chunk>>,
    /// What holes read as, if not as zeros.
    litter: Option<Litter>,
    hash: u128,
    allocated: u64,
}

impl Content {
    /// A hash of all that reading can show.
    pub(super) fn hash(&self) -> u128 {
        mix(self.hash, u128::from(self.len))
    }

    /// Sectors in use.
    pub(super) fn allocated(&self) -> u64 {
        match self.litter {
            None => self.allocated,
            Some(_) => self.len / SECTOR,
        }
    }

    pub(super) fn slot(&self, sector_no: u64) -> Slot {
        let chunk = self.chunks.get(&(sector_no / CHUNK));
        let written = chunk.and_then(|chunk| chunk.slots[index(sector_no)].clone());
        match &self.litter {
            Some(litter) if written.is_none() && sector_no < self.len / SECTOR => Some(litter.at(sector_no)),
            _ => written,
        }
    }

    pub(super) fn set(&mut self, sector_no: u64, slot: Slot) {
        let key = sector_no / CHUNK;
        if slot.is_none() && !self.chunks.contains_key(&key) {
            return;
        }
        let chunk = self.chunks.entry(key).or_insert_with(|| Arc::new(Chunk::EMPTY));
        let chunk = Arc::make_mut(chunk);
        let old = &mut chunk.slots[index(sector_no)];
        let littered = self.litter.is_some();
        let delta = share(sector_no, &slot, littered).wrapping_sub(share(sector_no, old, littered));
        chunk.allocated -= u64::from(old.is_some());
        chunk.allocated += u64::from(slot.is_some());
        self.allocated -= u64::from(old.is_some());
        self.allocated += u64::from(slot.is_some());
        chunk.hash = chunk.hash.wrapping_add(delta);
        self.hash = self.hash.wrapping_add(delta);
        *old = slot;
        if chunk.allocated == 0 {
            self.chunks.remove(&key);
        }
    }

    /// Makes holes of `first .. end`, or with `keep` zeros of what is set.
    pub(super) fn zero(&mut self, first: u64, end: u64, keep: bool) {
        for sector_no in self.set_within(first, end) {
            self.set(sector_no, keep.then(Sector::zero));
        }
    }

    /// Sectors of `first .. end` that are no holes, in order: on a device all.
    pub(super) fn set_within(&self, first: u64, end: u64) -> Vec<u64> {
        match self.litter {
            None => self.written_within(first, end),
            Some(_) => (first..end.min(self.len / SECTOR)).collect(),
        }
    }

    fn written_within(&self, first: u64, end: u64) -> Vec<u64> {
        let mut found = Vec::new();
        if first >= end {
            return found;
        }
        for (key, chunk) in self.chunks.range(first / CHUNK..=(end - 1) / CHUNK) {
            let set = chunk.slots.iter().enumerate().filter(|(_, slot)| slot.is_some());
            let set = set.map(|(at, _)| key * CHUNK + at as u64);
            found.extend(set.filter(|sector_no| (first..end).contains(sector_no)));
        }
        found
    }

    /// Sets the length; what lies past it is gone for good, as on a
    /// filesystem: a later extension reads as zeros.
    pub(super) fn set_len(&mut self, len_bytes: u64) {
        let shorter = len_bytes < self.len;
        self.len = len_bytes;
        if shorter {
            self.cut();
        }
    }

    /// A device of whole sectors, with what somebody left there.
    pub(super) fn littered(litter: Litter, len_bytes: u64) -> Self {
        Self { len: len_bytes, litter: Some(litter), ..Self::default() }
    }

    /// Sets the length of a device, whose new space holds what somebody left
    /// there, but for the last sector: see
    /// [`Volume::extend`](super::super::Volume::extend).
    pub(super) fn resize_device(&mut self, len_bytes: u64) {
        let longer = len_bytes > self.len;
        self.set_len(len_bytes);
        if longer {
            self.set(len_bytes / SECTOR - 1, Some(Sector::zero()));
        }
    }

    /// Drops what lies past the length.
    pub(super) fn cut(&mut self) {
        let edge = usize_of(self.len % SECTOR);
        if edge != 0
            && let Some(sector) = self.slot(self.len / SECTOR)
        {
            let mut bytes = *sector.bytes();
            bytes[edge..].fill(0);
            self.set(self.len / SECTOR, Some(Sector::new(bytes)));
        }
        for sector_no in self.written_within(self.len.div_ceil(SECTOR), u64::MAX) {
            self.set(sector_no, None);
        }
    }

    /// Fills `buf` from `offset`; `false` where the file ends before.
    pub(super) fn read(&self, buf: &mut [u8], offset: u64) -> bool {
        if offset.saturating_add(buf.len() as u64) > self.len {
            return false;
        }
        for (sector_no, at, part) in pieces(offset, buf.len()) {
            let to = &mut buf[part];
            match self.slot(sector_no) {
                Some(sector) => to.copy_from_slice(&sector.bytes()[at..at + to.len()]),
                None => to.fill(0),
            }
        }
        true
    }

    /// The sectors that writing `bytes` at `offset` makes, read-modified at
    /// the edges.
    pub(super) fn written(&self, bytes: &[u8], offset: u64) -> Vec<(u64, Slot)> {
        let patch = |(sector_no, at, part): (u64, usize, std::ops::Range<usize>)| {
            let from = &bytes[part];
            let mut whole = match self.slot(sector_no) {
                Some(sector) if from.len() < SECTOR as usize => *sector.bytes(),
                _ => [0; SECTOR as usize],
            };
            whole[at..at + from.len()].copy_from_slice(from);
            (sector_no, Some(Sector::new(whole)))
        };
        pieces(offset, bytes.len()).map(patch).collect()
    }
}

fn index(sector_no: u64) -> usize {
    usize_of(sector_no % CHUNK)
}

/// For numbers below a sector's or a chunk's size.
fn usize_of(small: u64) -> usize {
    usize::try_from(small).unwrap_or(usize::MAX)
}

/// Cuts `offset .. offset + len` at sector borders: sector number, first byte
/// in the sector, and the range of the buffer.
fn pieces(offset: u64, len: usize) -> impl Iterator<Item = (u64, usize, std::ops::Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        if done >= len {
            return None;
        }
        let at_byte = offset + done as u64;
        let at = usize_of(at_byte % SECTOR);
        let run = (SECTOR as usize - at).min(len - done);
        let part = done..done + run;
        done += run;
        Some((at_byte / SECTOR, at, part))
    })
}
