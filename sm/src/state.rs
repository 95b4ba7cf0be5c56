//! The state folder of a host: what smd knows between its lives.
//!
//! ```text
//!   <state>/lock       locked by the one smd of this folder
//!   <state>/host-id    made once: who we are to SRs
//!   <state>/srs.json   SRs that were created or introduced here
//! ```

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use uuid::Uuid;

use crate::error::{Error, IoContext, Result};
use crate::limits::SMALL_FILE_BYTES_MAX;
use crate::run_folder::make_folder;

/// Kind of SR.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SrType {
    /// A folder of image files.
    File,
    /// Logical volumes; known by name only, and refused.
    Lvm,
}

/// An SR this host knows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KnownSr {
    /// Its uuid.
    pub uuid: Uuid,
    /// Its name.
    pub name: String,
    /// What it is.
    #[serde(rename = "type")]
    pub kind: SrType,
    /// Where it lies, an absolute path.
    pub path: PathBuf,
    /// Whether it is to be attached when smd starts.
    pub attached: bool,
}

/// The state folder, held by us.
#[derive(Debug)]
pub struct State {
    folder: PathBuf,
    host: Uuid,
    _lock: File,
}

impl State {
    /// Opens the folder, making it at the first use.
    ///
    /// # Errors
    /// [`Error::Held`] when another smd holds it, I/O errors.
    pub fn open(folder: &Path) -> Result<Self> {
        let what = || format!("state folder {}", folder.display());
        make_folder(folder).during(what)?;
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        let lock = options.open(folder.join("lock")).during(what)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(Error::Held {
                    what: what(),
                    reason: "another smd runs on it".into(),
                    next: "end that one first, or give this one another folder with --state",
                });
            }
            Err(TryLockError::Error(error)) => return Err(Error::io(what(), error)),
        }
        let host = host_id(&folder.join("host-id")).during(what)?;
        Ok(Self { folder: folder.to_owned(), host, _lock: lock })
    }

    /// Who we are to SRs.
    #[must_use]
    pub fn host(&self) -> Uuid {
        self.host
    }

    /// The SRs noted last.
    ///
    /// # Errors
    /// I/O errors, and a file that is not ours.
    pub fn load(&self) -> Result<Vec<KnownSr>> {
        known(&self.folder)
    }

    /// Notes the SRs, durably.
    ///
    /// # Errors
    /// I/O errors; the old list then stands.
    pub fn save(&self, srs: &[KnownSr]) -> Result<()> {
        let path = self.folder.join("srs.json");
        write_json(&path, &srs).during(|| path.display().to_string())
    }
}

/// The SRs noted last in a state folder, whoever holds it.
///
/// # Errors
/// I/O errors, and a file that is not ours.
pub fn known(folder: &Path) -> Result<Vec<KnownSr>> {
    let path = folder.join("srs.json");
    read_json(&path).map(Option::unwrap_or_default).during(|| path.display().to_string())
}

fn host_id(path: &Path) -> io::Result<Uuid> {
    match fs::read_to_string(path) {
        Ok(text) => Uuid::try_parse(text.trim()).map_err(io::Error::other),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let host = Uuid::new_v4();
            write_whole(path, format!("{host}\n").as_bytes())?;
            Ok(host)
        }
        Err(error) => Err(error),
    }
}

/// Reads a small JSON file; `None` if it is not there.
///
/// # Errors
/// I/O errors, and what is no such JSON.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> io::Result<Option<T>> {
    // Opened once: another's removal after that does not matter.
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file?,
    };
    if file.metadata()?.len() > SMALL_FILE_BYTES_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "file too large"));
    }
    let mut bytes = Vec::new();
    file.take(SMALL_FILE_BYTES_MAX).read_to_end(&mut bytes)?;
    let value = serde_json::from_slice(&bytes);
    value.map(Some).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))
}

/// Replaces a small JSON file whole, durably.
///
/// # Errors
/// I/O errors; the old content then stands.
pub fn write_json<T: Serialize>(path: &Path, value: &T) -> io::Result<()> {
    let mut bytes = serde_json::to_vec_pretty(value).map_err(io::Error::other)?;
    bytes.push(b'\n');
    write_whole(path, &bytes)
}

/// Written beside, flushed, renamed, name flushed: a crash leaves old or new.
fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let beside = path.with_extension("new");
    let mut options = OpenOptions::new();
    let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&beside)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&beside, path)?;
    let folder = path.parent().ok_or_else(|| io::Error::other("a file without a folder"))?;
    File::open(folder)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_removed_while_it_is_read_is_there_or_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("wanted");
        let over = std::sync::atomic::AtomicBool::new(false);
        let relaxed = std::sync::atomic::Ordering::Relaxed;
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let beside = folder.path().join("new");
                for _ in 0..5_000 {
                    fs::write(&beside, "7").unwrap();
                    fs::rename(&beside, &path).unwrap();
                    fs::remove_file(&path).unwrap();
                }
                over.store(true, relaxed);
            });
            let mut wrong = 0;
            while !over.load(relaxed) {
                wrong += u32::from(!matches!(read_json::<u32>(&path), Ok(None | Some(7))));
            }
            assert_eq!(wrong, 0);
        });
    }

    #[test]
    fn one_smd_per_folder_and_what_it_knows_survives() {
        let folder = tempfile::tempdir().unwrap();
        let state = State::open(folder.path()).unwrap();
        assert_eq!(State::open(folder.path()).unwrap_err().code(), "IN_USE");
        let sr = KnownSr {
            uuid: Uuid::from_u128(1),
            name: "one".into(),
            kind: SrType::File,
            path: "/somewhere".into(),
            attached: true,
        };
        assert_eq!(state.load().unwrap(), []);
        state.save(std::slice::from_ref(&sr)).unwrap();
        let host = state.host();
        drop(state);
        let state = State::open(folder.path()).unwrap();
        assert_eq!((state.host(), state.load().unwrap()), (host, vec![sr]));
    }
}
