//! Pending records as mapped files in a folder of the run directory (tmpfs).

use std::fs::{File, OpenOptions};
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};

use memmap2::MmapRaw;
use nix::fcntl::{FallocateFlags, fallocate};
use uuid::Uuid;

use crate::record::{Owner, PendingRecord, RECORD_WORDS, RecordStore, Words};

/// The records of one SR: `<folder>/<footer uuid>`.
#[derive(Debug, Clone)]
pub struct TmpfsRecords {
    folder: PathBuf,
    boot: Uuid,
    epoch: u64,
}

impl TmpfsRecords {
    /// Records in `folder`, valid for this boot and this attach epoch of the
    /// SR. The folder is made when the first record is.
    #[must_use]
    pub fn new(folder: PathBuf, boot: Uuid, epoch: u64) -> Self {
        Self { folder, boot, epoch }
    }

    fn path(&self, footer: Uuid) -> PathBuf {
        self.folder.join(footer.to_string())
    }

    fn owner(&self, footer: Uuid) -> Owner {
        Owner { boot: self.boot, footer, epoch: self.epoch }
    }
}

impl RecordStore for TmpfsRecords {
    fn existing(&self, footer: Uuid) -> io::Result<Option<PendingRecord>> {
        let file = match OpenOptions::new().read(true).write(true).open(self.path(footer)) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        if file.metadata()?.len() != RECORD_BYTES {
            // Made by a process that died before it could format it.
            return Ok(None);
        }
        Ok(PendingRecord::existing(Box::new(Mapped::new(&file)?), self.owner(footer)))
    }

    fn create(&self, footer: Uuid) -> io::Result<PendingRecord> {
        std::fs::create_dir_all(&self.folder)?;
        let file =
            OpenOptions::new().read(true).write(true).create(true).truncate(true).open(self.path(footer))?;
        // Reserved in full: a store into a mapping of a full tmpfs is fatal.
        let bytes = i64::try_from(RECORD_BYTES).map_err(io::Error::other)?;
        fallocate(&file, FallocateFlags::empty(), 0, bytes)?;
        Ok(PendingRecord::format(Box::new(Mapped::new(&file)?), self.owner(footer)))
    }

    fn remove(&self, footer: Uuid) -> io::Result<()> {
        match std::fs::remove_file(self.path(footer)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

const RECORD_BYTES: u64 = RECORD_WORDS as u64 * 8;

#[derive(Debug)]
struct Mapped(MmapRaw);

impl Mapped {
    fn new(file: &File) -> io::Result<Self> {
        let map = MmapRaw::map_raw(file)?;
        if map.len() as u64 == RECORD_BYTES {
            Ok(Self(map))
        } else {
            Err(io::Error::other("a record of another size"))
        }
    }

    fn word(&self, index: usize) -> &AtomicU64 {
        assert!(index < RECORD_WORDS, "no such word in a record");
        // SAFETY: the mapping is RECORD_WORDS * 8 bytes long (checked when it
        // was made), starts at a page and lives as long as self, so the
        // pointer is in bounds and aligned. Other processes map the file only
        // after they got the image's lock, and all access is atomic.
        unsafe { AtomicU64::from_ptr(self.0.as_mut_ptr().cast::<u64>().add(index)) }
    }
}

impl Words for Mapped {
    fn load(&self, index: usize) -> u64 {
        self.word(index).load(Ordering::Acquire)
    }

    fn store(&mut self, index: usize, value: u64) {
        self.word(index).store(value, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::Entry;
    use crate::units::BlockNo;

    #[test]
    fn a_record_outlives_its_holder_but_not_its_boot_or_epoch() {
        let folder = tempfile::tempdir().unwrap();
        let (boot, footer) = (Uuid::from_u128(1), Uuid::from_u128(2));
        let store = TmpfsRecords::new(folder.path().join("records"), boot, 1);
        assert!(store.existing(footer).unwrap().is_none());
        let entry = Entry::Freed { block: BlockNo(3) };
        store.create(footer).unwrap().push(entry).unwrap();
        assert_eq!(store.existing(footer).unwrap().unwrap().entries(), [entry]);
        for (boot, epoch) in [(Uuid::from_u128(9), 1), (boot, 2)] {
            let other = TmpfsRecords::new(folder.path().join("records"), boot, epoch);
            assert!(other.existing(footer).unwrap().is_none());
        }
        store.remove(footer).unwrap();
        store.remove(footer).unwrap();
        assert!(store.existing(footer).unwrap().is_none());
    }
}
