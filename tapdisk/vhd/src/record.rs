//! The pending record: what waits for a flush, kept where it survives the
//! process but not the power.
//!
//! A sector bit or BAT entry must not reach the disk before the data it
//! vouches for is durable, yet an acknowledged write must survive `kill -9`
//! (invariants 1, 2, 5). So bits and entries wait in a small file on tmpfs,
//! mapped into memory:
//!
//! ```text
//! words of 64 bits
//!   0 magic   1 version   2,3 boot id   4,5 footer uuid   6 SR epoch
//!   7 poisoned (1 after a failed flush)
//!   8 sequence number of half 0, 0 = empty   9 the same of half 1
//!  16 .. 16+N      entries of half 0, 0 = no entry (nor any after it)
//!  16+N .. 16+2N   entries of half 1
//! ```
//!
//! * An entry becomes valid by one aligned store of its word, after its data
//!   is in the page cache and before the write is acknowledged.
//! * Write-back switches halves, makes the old half's content durable on the
//!   image, and then drops that half by one store (its sequence number to 0).
//!   A kill between the two replays what is already durable, which changes
//!   nothing: entries are applied in order, older half first, and name final
//!   places.
//! * Another boot id, footer uuid or SR epoch voids the whole record: after a
//!   power cut, or once the SR was elsewhere, it describes a past that the
//!   image does not share.

use std::io;

use uuid::Uuid;

pub use crate::record_files::TmpfsRecords;
use crate::units::{BlockNo, SectorRun, Slot};

/// Entries in one half; a full half starts a write-back, two full ones make
/// writes wait.
pub const HALF_ENTRIES: usize = 32 * 1024;
const HEADER_WORDS: usize = 16;
/// Size of a record in 64-bit words.
pub const RECORD_WORDS: usize = HEADER_WORDS + 2 * HALF_ENTRIES;

const MAGIC: u64 = u64::from_be_bytes(*b"coppicer");
const VERSION: u64 = 1;
const W_MAGIC: usize = 0;
const W_VERSION: usize = 1;
const W_BOOT: usize = 2;
const W_FOOTER: usize = 4;
const W_EPOCH: usize = 6;
const W_POISONED: usize = 7;
const W_SEQUENCE: usize = 8;

/// One thing that waits for a flush.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// The block lies at this slot; `whole`: all its sectors are present
    /// (never-written ones read as zeros there).
    Placed {
        /// Which block.
        block: BlockNo,
        /// Where.
        slot: Slot,
        /// Whether its bitmap is full.
        whole: bool,
    },
    /// These sectors of the block are present.
    Present {
        /// Which block.
        block: BlockNo,
        /// Which sectors.
        run: SectorRun,
    },
    /// The block is not in this image any more.
    Freed {
        /// Which block.
        block: BlockNo,
    },
}

const KIND_PLACED: u64 = 1;
const KIND_PRESENT: u64 = 2;
const KIND_FREED: u64 = 3;

impl Entry {
    // 63..62 kind, 61 whole, 60..41 block; then the slot in 31..0, or the run
    // as first in 28..16 and count in 15..0.
    fn encode(self) -> u64 {
        let word = |kind: u64, block: BlockNo| kind << 62 | u64::from(block.0) << 41;
        match self {
            Self::Placed { block, slot, whole } => {
                word(KIND_PLACED, block) | u64::from(whole) << 61 | u64::from(slot.0)
            }
            Self::Present { block, run } => {
                word(KIND_PRESENT, block) | u64::from(run.first) << 16 | u64::from(run.count)
            }
            Self::Freed { block } => word(KIND_FREED, block),
        }
    }

    /// `None` for a word no version of ours wrote.
    fn decode(word: u64) -> Option<Self> {
        let block = BlockNo(u32::try_from(word >> 41 & 0xF_FFFF).ok()?);
        let low = u32::try_from(word & 0xFFFF_FFFF).ok()?;
        match word >> 62 {
            KIND_PLACED => Some(Self::Placed { block, slot: Slot(low), whole: word >> 61 & 1 == 1 }),
            KIND_PRESENT => {
                let run = SectorRun { first: low >> 16, count: low & 0xFFFF };
                (run.count > 0 && run.end() <= crate::units::BLOCK_SECTORS)
                    .then_some(Self::Present { block, run })
            }
            KIND_FREED => Some(Self::Freed { block }),
            _ => None,
        }
    }
}

/// 64-bit words that outlive the process: a mapped file, or the simulator's.
pub trait Words: Send + std::fmt::Debug {
    /// Reads a word.
    fn load(&self, index: usize) -> u64;
    /// Writes a word in one store.
    fn store(&mut self, index: usize, value: u64);
}

/// Whose record it is; anything else in the header voids it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owner {
    /// This boot of the machine.
    pub boot: Uuid,
    /// The image's footer uuid.
    pub footer: Uuid,
    /// The SR's attach epoch.
    pub epoch: u64,
}

/// Both halves are taken; the write must wait for a write-back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Full;

/// The pending record of one image.
#[derive(Debug)]
pub struct PendingRecord {
    words: Box<dyn Words>,
    /// Which half takes new entries.
    active: usize,
    /// Entries in each half.
    used: [usize; 2],
    sequence: u64,
}

impl PendingRecord {
    /// Formats a record. The magic is stored last: a half-made record is no
    /// record.
    #[must_use]
    pub fn format(mut words: Box<dyn Words>, owner: Owner) -> Self {
        words.store(W_MAGIC, 0);
        words.store(W_VERSION, VERSION);
        for (at, id) in [(W_BOOT, owner.boot), (W_FOOTER, owner.footer)] {
            let (high, low) = id.as_u64_pair();
            words.store(at, high);
            words.store(at + 1, low);
        }
        words.store(W_EPOCH, owner.epoch);
        words.store(W_POISONED, 0);
        for half in 0..2 {
            words.store(W_SEQUENCE + half, 0);
            let mut at = first_word(half);
            // Only entries before the first 0 count, so only those need go.
            while at < first_word(half) + HALF_ENTRIES && words.load(at) != 0 {
                words.store(at, 0);
                at += 1;
            }
        }
        words.store(W_SEQUENCE, 1);
        words.store(W_MAGIC, MAGIC);
        Self { words, active: 0, used: [0, 0], sequence: 1 }
    }

    /// Opens what a former holder left; `None` if it is void for `owner`.
    #[must_use]
    pub fn existing(words: Box<dyn Words>, owner: Owner) -> Option<Self> {
        let id = |at: usize| Uuid::from_u64_pair(words.load(at), words.load(at + 1));
        let ours = words.load(W_MAGIC) == MAGIC
            && words.load(W_VERSION) == VERSION
            && id(W_BOOT) == owner.boot
            && id(W_FOOTER) == owner.footer
            && words.load(W_EPOCH) == owner.epoch;
        if !ours {
            return None;
        }
        let sequences = [words.load(W_SEQUENCE), words.load(W_SEQUENCE + 1)];
        let active = usize::from(sequences[1] > sequences[0]);
        let used = [0, 1].map(|half| count(words.as_ref(), half, sequences[half]));
        Some(Self { words, active, used, sequence: sequences[active] })
    }

    /// Makes an entry valid.
    ///
    /// # Errors
    /// [`Full`] when the active half has no room: see [`Self::capture`].
    pub fn push(&mut self, entry: Entry) -> Result<(), Full> {
        let used = self.used[self.active];
        if used == HALF_ENTRIES {
            return Err(Full);
        }
        self.words.store(first_word(self.active) + used, entry.encode());
        self.used[self.active] = used + 1;
        Ok(())
    }

    /// Room in the active half.
    #[must_use]
    pub fn room(&self) -> usize {
        HALF_ENTRIES - self.used[self.active]
    }

    /// Entries in both halves.
    #[must_use]
    pub fn len(&self) -> usize {
        self.used[0] + self.used[1]
    }

    /// Whether nothing waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Turns to the other half, so that the present one can be written back.
    /// Returns false, changing nothing, while the other half is still held by
    /// an earlier capture.
    pub fn capture(&mut self) -> bool {
        let other = 1 - self.active;
        if self.words.load(W_SEQUENCE + other) != 0 {
            return false;
        }
        self.sequence += 1;
        self.words.store(W_SEQUENCE + other, self.sequence);
        self.active = other;
        true
    }

    /// Drops exactly what was captured, once it is durable on the image.
    pub fn drop_captured(&mut self) {
        let half = 1 - self.active;
        self.words.store(W_SEQUENCE + half, 0);
        // From the end: a kill in between leaves no entry behind a 0.
        for at in (0..self.used[half]).rev() {
            self.words.store(first_word(half) + at, 0);
        }
        self.used[half] = 0;
    }

    /// Notes that a flush failed: what the page cache holds is not trusted.
    pub fn poison(&mut self) {
        self.words.store(W_POISONED, 1);
    }

    /// Whether a flush failed.
    #[must_use]
    pub fn poisoned(&self) -> bool {
        self.words.load(W_POISONED) != 0
    }

    /// All entries, oldest first. Words that are no entries are left out:
    /// the folder is private to root, but a wrong word must not panic.
    #[must_use]
    pub fn entries(&self) -> Vec<Entry> {
        let mut halves = [0, 1].map(|half| (self.words.load(W_SEQUENCE + half), half));
        halves.sort_unstable();
        halves
            .into_iter()
            .filter(|(sequence, _)| *sequence != 0)
            .flat_map(|(_, half)| (0..self.used[half]).map(move |at| first_word(half) + at))
            .filter_map(|at| Entry::decode(self.words.load(at)))
            .collect()
    }
}

fn first_word(half: usize) -> usize {
    HEADER_WORDS + half * HALF_ENTRIES
}

fn count(words: &dyn Words, half: usize, sequence: u64) -> usize {
    if sequence == 0 {
        return 0;
    }
    (0..HALF_ENTRIES).take_while(|at| words.load(first_word(half) + at) != 0).count()
}

/// The records of one SR in the run folder, by footer uuid.
pub trait RecordStore: Send + Sync + std::fmt::Debug {
    /// What a former holder of the image left, if it is valid now.
    ///
    /// # Errors
    /// Whatever opening the file says.
    fn existing(&self, footer: Uuid) -> io::Result<Option<PendingRecord>>;
    /// A fresh, empty record, its space reserved in full.
    ///
    /// # Errors
    /// Whatever creating the file says, `StorageFull` included.
    fn create(&self, footer: Uuid) -> io::Result<PendingRecord>;
    /// Removes a record; fine if there is none.
    ///
    /// # Errors
    /// Whatever removing the file says.
    fn remove(&self, footer: Uuid) -> io::Result<()>;
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    #[derive(Debug, Clone)]
    struct Shared(Arc<Mutex<Vec<u64>>>);

    impl Words for Shared {
        fn load(&self, index: usize) -> u64 {
            self.0.lock().unwrap()[index]
        }
        fn store(&mut self, index: usize, value: u64) {
            self.0.lock().unwrap()[index] = value;
        }
    }

    fn fresh() -> (Shared, Owner) {
        let owner = Owner { boot: Uuid::from_u128(1), footer: Uuid::from_u128(2), epoch: 3 };
        (Shared(Arc::new(Mutex::new(vec![0; RECORD_WORDS]))), owner)
    }

    fn placed(block: u32, slot: u32) -> Entry {
        Entry::Placed { block: BlockNo(block), slot: Slot(slot), whole: block.is_multiple_of(2) }
    }

    #[test]
    fn entries_survive_the_holder_in_order() {
        let (words, owner) = fresh();
        let mut record = PendingRecord::format(Box::new(words.clone()), owner);
        let run = SectorRun { first: 4095, count: 1 };
        let old = [placed(1_044_479, 0xFFFF_FFFE), Entry::Present { block: BlockNo(7), run }];
        let new =
            [Entry::Freed { block: BlockNo(7) }, Entry::Present { block: BlockNo(0), run: SectorRun::BLOCK }];
        old.iter().for_each(|e| record.push(*e).unwrap());
        assert!(record.capture());
        new.iter().for_each(|e| record.push(*e).unwrap());
        assert!(!record.capture(), "the other half is still held");

        let left = PendingRecord::existing(Box::new(words.clone()), owner).unwrap();
        assert_eq!(left.entries(), [old, new].concat());

        record.drop_captured();
        let left = PendingRecord::existing(Box::new(words), owner).unwrap();
        assert_eq!(left.entries(), new);
    }

    #[test]
    fn any_other_owner_voids_it() {
        let (words, owner) = fresh();
        let _ = PendingRecord::format(Box::new(words.clone()), owner);
        for other in [
            Owner { boot: Uuid::from_u128(9), ..owner },
            Owner { footer: Uuid::from_u128(9), ..owner },
            Owner { epoch: 9, ..owner },
        ] {
            assert!(PendingRecord::existing(Box::new(words.clone()), other).is_none());
        }
        assert!(PendingRecord::existing(Box::new(words), owner).is_some());
    }

    #[test]
    fn a_full_half_refuses_until_captured_and_dropped() {
        let (words, owner) = fresh();
        let mut record = PendingRecord::format(Box::new(words), owner);
        for block in 0..HALF_ENTRIES {
            record.push(placed(block as u32, 7)).unwrap();
        }
        assert_eq!(record.push(placed(0, 7)), Err(Full));
        assert!(record.capture());
        record.push(placed(0, 7)).unwrap();
        record.drop_captured();
        assert_eq!(record.entries(), [placed(0, 7)]);
    }
}
