//! Which values a sector may have after a crash.
//!
//! A write is *over* another if it began after the other was answered. After
//! a kill a sector may hold any write that began, unless an answered one is
//! over it (invariant 1); after a power cut, unless an answered one that a
//! completed flush covers is over it (invariant 2). Never anything else.

use std::collections::{BTreeMap, BTreeSet};

use vhd::storage::sim::CrashKind;

/// What a sector holds: 0 is zeros, else the stamp of one write.
pub type Value = u64;

/// Place in the machine's log.
pub type At = usize;

/// Sectors of each block that guests write and checks read.
const TRACKED: [(u64, u64); 3] = [(0, 8), (2044, 8), (4088, 8)];

/// The tracked sectors of a disk of so many blocks.
pub fn tracked(blocks: u64) -> impl Iterator<Item = u64> {
    (0..blocks).flat_map(|block| {
        TRACKED
            .into_iter()
            .flat_map(move |(first, count)| (first..first + count).map(move |s| block * 4096 + s))
    })
}

/// The bytes of a sector with a stamp.
pub fn stamp(value: Value, sector: u64) -> [u8; 512] {
    let mut bytes = [0; 512];
    if value != 0 {
        for chunk in bytes.as_chunks_mut::<16>().0 {
            chunk[..8].copy_from_slice(&value.to_be_bytes());
            chunk[8..].copy_from_slice(&(!sector).to_be_bytes());
        }
    }
    bytes
}

/// The stamp of a sector's bytes; what no write put there is an error.
pub fn unstamp(bytes: &[u8], sector: u64) -> Result<Value, String> {
    let value = bytes.first_chunk::<8>().map_or(0, |head| u64::from_be_bytes(*head));
    if bytes == stamp(value, sector) {
        Ok(value)
    } else {
        Err(format!("bytes nobody wrote there: {:02x?}…", &bytes[..24]))
    }
}

#[derive(Debug, Clone, Copy)]
struct Write {
    value: Value,
    began: At,
    answered: Option<At>,
    fua: bool,
    /// It may come to nothing.
    hint: bool,
}

/// When a snapshot was taken.
#[derive(Debug, Clone, Copy)]
pub struct Instant {
    /// The operation began.
    pub began: At,
    /// It ended.
    pub ended: At,
}

/// What was written to one disk, and what was promised.
#[derive(Debug, Clone, Default)]
pub struct Oracle {
    writes: BTreeMap<u64, Vec<Write>>,
    flushes: Vec<(At, At)>,
}

impl Oracle {
    /// A write (or zeroing, value 0) of tracked sectors began.
    pub fn began(&mut self, sectors: impl Iterator<Item = u64>, value: Value, at: At, fua: bool) {
        for sector in sectors {
            let write = Write { value, began: at, answered: None, fua, hint: false };
            self.writes.entry(sector).or_default().push(write);
        }
    }

    /// A request began after which sectors hold zeros or what they held.
    pub fn hinted(&mut self, sectors: impl Iterator<Item = u64>, at: At) {
        for sector in sectors {
            let write = Write { value: 0, began: at, answered: None, fua: false, hint: true };
            self.writes.entry(sector).or_default().push(write);
        }
    }

    /// It was answered. `began` names it: no two requests begin at one place
    /// with one value.
    pub fn answered(&mut self, sectors: impl Iterator<Item = u64>, value: Value, began: At, at: At) {
        for sector in sectors {
            for write in self.writes.entry(sector).or_default() {
                if write.value == value && write.began == began {
                    write.answered = Some(at);
                }
            }
        }
    }

    /// A flush that began at the one place was answered at the other.
    pub fn flushed(&mut self, began: At, answered: At) {
        self.flushes.push((began, answered));
    }

    /// What the disk may hold after a crash at `at`.
    pub fn after_crash(&self, sector: u64, kind: CrashKind, at: At) -> BTreeSet<Value> {
        let flushed =
            self.flushes.iter().filter(|(_, answered)| *answered <= at).map(|(began, _)| *began).max();
        self.allowed(sector, at, |write| match (kind, write.answered) {
            (_, None) => false,
            (CrashKind::Kill, Some(answered)) => answered <= at,
            (CrashKind::PowerCut, Some(answered)) => {
                answered <= at && (write.fua || flushed.is_some_and(|flush| answered <= flush))
            }
        })
    }

    /// What a read that began and ended at these places may see.
    pub fn readable(&self, sector: u64, began: At, ended: At) -> BTreeSet<Value> {
        self.allowed(sector, ended, |write| write.answered.is_some_and(|answered| answered <= began))
    }

    /// What a snapshot may hold (invariant 1).
    pub fn in_snapshot(&self, sector: u64, instant: Instant) -> BTreeSet<Value> {
        self.readable(sector, instant.began, instant.ended)
    }

    /// Writes begun up to `at` that no `promised` one is over.
    fn allowed(&self, sector: u64, at: At, promised: impl Fn(&Write) -> bool) -> BTreeSet<Value> {
        let first = Write { value: 0, began: 0, answered: Some(0), fua: true, hint: false };
        let known = self.writes.get(&sector).map_or(&[][..], Vec::as_slice);
        let all = || std::iter::once(&first).chain(known).filter(|write| write.began <= at);
        all()
            .filter(|write| {
                let over = |other: &&Write| {
                    promised(other)
                        && !other.hint
                        && write.answered.is_some_and(|answered| answered <= other.began)
                        && (other.began, other.value) != (write.began, write.value)
                };
                all().find(over).is_none()
            })
            .map(|write| write.value)
            .collect()
    }
}
