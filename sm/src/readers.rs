//! Leases of this process's own on the real host: who copies, exports or
//! compares a chain reads it with the map it has, to the end.
//!
//! ```text
//!   <run>/readers/<sr>/<uuid>        locked while somebody reads; JSON, a Lease
//!   <run>/readers/<sr>.leave/<vdi>   somebody waits for those to leave who read
//!                                    the VDI for a purpose that can wait
//! ```
//!
//! A file that nobody locks is of a process that died, and goes.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use uuid::Uuid;

use crate::host::Guard;
use crate::lease::{Lease, Reader};
use crate::limits::{LEAVE_MS_MAX, READERS_MAX};
use crate::run_folder::{make_folder, read_lease, remove};

/// How often one looks whether they have left.
const LEAVE_POLL: Duration = Duration::from_millis(2);

/// The readers of one SR.
#[derive(Debug, Clone)]
pub struct Readers {
    folder: PathBuf,
}

impl Readers {
    /// Opens the folder of an SR's readers.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn open(run: &Path, sr: Uuid) -> io::Result<Self> {
        let folder = run.join("readers").join(sr.to_string());
        make_folder(&folder)?;
        Ok(Self { folder })
    }

    /// Makes a lease. The caller holds the SR lock, under which they are also
    /// read and reaped, so it is never seen unlocked.
    ///
    /// # Errors
    /// `WouldBlock` when there are as many readers as there may be, I/O
    /// errors.
    pub fn make(&self, lease: &Lease) -> io::Result<Guard> {
        if self.live()?.len() >= READERS_MAX {
            let text = format!("{READERS_MAX} copies and exports are running");
            return Err(io::Error::new(io::ErrorKind::WouldBlock, text));
        }
        if lease.reader == Reader::Yielding {
            remove(&self.sign(lease.vdi))?;
        }
        let path = self.folder.join(Uuid::new_v4().to_string());
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path)?;
        let held = Held { file, path };
        held.file.try_lock().map_err(io::Error::from)?;
        held.file.write_all_at(&serde_json::to_vec(lease)?, 0)?;
        Ok(Box::new(held))
    }

    /// Asks those who read a VDI for a purpose that can wait to leave, and
    /// waits for it, at most [`LEAVE_MS_MAX`]. Returns whether there were any,
    /// and all have left. What is asked is asked of those who are there: a
    /// sign that a dead process left is taken away by who comes next.
    ///
    /// # Errors
    /// I/O errors.
    pub fn ask_to_leave(&self, vdi: Uuid) -> io::Result<bool> {
        if !self.has_yielding(vdi)? {
            return Ok(false);
        }
        let sign = self.sign(vdi);
        make_folder(sign.parent().unwrap_or(&self.folder))?;
        File::create(&sign)?;
        let deadline = Instant::now() + Duration::from_millis(LEAVE_MS_MAX);
        let mut there = true;
        while there && Instant::now() < deadline {
            std::thread::sleep(LEAVE_POLL);
            there = self.has_yielding(vdi)?;
        }
        remove(&sign)?;
        Ok(!there)
    }

    /// Whether somebody waits for them.
    #[must_use]
    pub fn is_asked_to_leave(&self, vdi: Uuid) -> bool {
        self.sign(vdi).exists()
    }

    fn sign(&self, vdi: Uuid) -> PathBuf {
        self.folder.with_extension("leave").join(vdi.to_string())
    }

    /// Looks without the SR lock: one that is just being made is not seen, and
    /// none is taken away.
    fn has_yielding(&self, vdi: Uuid) -> io::Result<bool> {
        for entry in fs::read_dir(&self.folder)? {
            let Ok(file) = File::open(entry?.path()) else { continue };
            let held = matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock));
            if held
                && read_lease(&file).is_ok_and(|lease| lease.vdi == vdi && lease.reader == Reader::Yielding)
            {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// All live ones; dead ones are removed. The caller holds the SR lock.
    ///
    /// # Errors
    /// I/O errors, and a live lease that cannot be read.
    pub fn live(&self) -> io::Result<Vec<Lease>> {
        let mut live = Vec::new();
        for entry in fs::read_dir(&self.folder)? {
            let path = entry?.path();
            // One that ends meanwhile removes its file without the lock.
            let file = match File::open(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                file => file?,
            };
            match file.try_lock_shared() {
                Ok(()) => remove(&path)?,
                Err(TryLockError::WouldBlock) => live.push(read_lease(&file)?),
                Err(TryLockError::Error(error)) => return Err(error),
            }
        }
        Ok(live)
    }
}

struct Held {
    file: File,
    path: PathBuf,
}

impl Drop for Held {
    fn drop(&mut self) {
        // A file that stays is only litter: what counts is its lock.
        let _ = fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lease(vdi: u128) -> Lease {
        let (vdi, sr) = (Uuid::from_u128(vdi), Uuid::from_u128(99));
        Lease { vdi, sr, pid: 1, read_only: true, reader: Reader::Copy, chain: Vec::new() }
    }

    #[test]
    fn a_reader_is_seen_for_as_long_as_its_guard_lives() {
        let run = tempfile::tempdir().unwrap();
        let readers = Readers::open(run.path(), Uuid::from_u128(99)).unwrap();
        let (one, two) = (readers.make(&lease(1)).unwrap(), readers.make(&lease(1)).unwrap());
        assert_eq!(readers.live().unwrap(), [lease(1), lease(1)]);
        drop(one);
        assert_eq!(readers.live().unwrap().len(), 1);
        assert_eq!(Readers::open(run.path(), Uuid::from_u128(5)).unwrap().live().unwrap(), []);
        drop(two);
        // What a dead process left is unlocked, and goes.
        fs::write(readers.folder.join("left"), "{").unwrap();
        assert_eq!(readers.live().unwrap(), []);
        assert!(!readers.folder.join("left").exists());
    }

    #[test]
    fn those_who_can_wait_leave_when_they_are_asked() {
        let run = tempfile::tempdir().unwrap();
        let readers = Readers::open(run.path(), Uuid::from_u128(99)).unwrap();
        let (one, two) = (Uuid::from_u128(1), Uuid::from_u128(2));
        let yielding = Lease { reader: Reader::Yielding, ..lease(1) };
        let copying = readers.make(&lease(2)).unwrap();
        // A sign left by a dead process is not for whoever comes next.
        fs::create_dir_all(readers.sign(one).parent().unwrap()).unwrap();
        File::create(readers.sign(one)).unwrap();
        let held = readers.make(&yielding).unwrap();
        assert!(!readers.is_asked_to_leave(one));
        assert!(!readers.ask_to_leave(two).unwrap(), "an export is not asked");
        let reader = readers.clone();
        let reading = std::thread::spawn(move || {
            while !reader.is_asked_to_leave(one) {
                std::thread::yield_now();
            }
            drop(held);
        });
        assert!(readers.ask_to_leave(one).unwrap());
        reading.join().unwrap();
        assert!(!readers.is_asked_to_leave(one) && !readers.ask_to_leave(one).unwrap());
        assert_eq!(readers.live().unwrap().len(), 1);
        drop(copying);
    }

    #[test]
    fn there_is_a_limit() {
        let run = tempfile::tempdir().unwrap();
        let readers = Readers::open(run.path(), Uuid::from_u128(99)).unwrap();
        let held: Vec<Guard> = (0..READERS_MAX).map(|_| readers.make(&lease(1)).unwrap()).collect();
        let error = readers.make(&lease(1)).err().unwrap();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        drop(held);
        assert!(readers.make(&lease(1)).is_ok());
    }
}
