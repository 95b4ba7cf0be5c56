//! Exclusive use of a file SR by one host.
//!
//! `<sr>/.coppice/owner` holds host id, boot id and attach epoch. Its flock
//! says whether anybody uses the SR now:
//!
//! ```text
//!   shared      by every process of the owning host that uses the SR (smd,
//!               gcd, each tapdisk, which inherits it)
//!   exclusive   to take over: nobody uses it
//! ```
//!
//! The same host in the same boot keeps the epoch: pending records in its run
//! folder stay valid. Anybody else raises it, which voids them: an SR taken
//! without a detach counts as a power cut.

use std::fs::{DirBuilder, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::error::{Error, IoContext, Result};

/// Its name in the dot folder.
pub(crate) const OWNER_FILE: &str = "owner";
/// The file is written in one piece of this size, so a power cut leaves the
/// old content or the new one.
const FILE_BYTES: usize = 512;
/// Rounds of taking over before we report the SR as in use: between two
/// locks another host may be faster each time.
const ROUNDS_MAX: u32 = 4;
/// How long a round waits for an exclusive lock to go.
const PEEK_WAIT: Duration = Duration::from_millis(5);

/// Which host, in which boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostId {
    /// Made once per state folder.
    pub host: Uuid,
    /// The kernel's boot id.
    pub boot: Uuid,
}

impl HostId {
    /// This boot of the machine, for the host of a state folder.
    ///
    /// # Errors
    /// The kernel does not say.
    pub fn of_this_boot(host: Uuid) -> io::Result<Self> {
        let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
        let boot = Uuid::try_parse(text.trim()).map_err(io::Error::other)?;
        Ok(Self { host, boot })
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Content {
    #[serde(flatten)]
    id: HostId,
    epoch: u64,
}

/// Use of an SR, for as long as this or an inherited copy of its descriptor
/// is open.
#[derive(Debug)]
pub struct Owner {
    file: File,
    /// The attach epoch.
    pub epoch: u64,
    /// Whether another host had it before us, or nobody knows who.
    pub elsewhere: bool,
}

impl Owner {
    /// The descriptor that carries the lock.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Takes the SR in `folder` for this host, or joins its other processes.
    ///
    /// # Errors
    /// [`Error::SrInUse`] while another host uses it, I/O errors.
    pub fn acquire(folder: &Path, id: HostId) -> Result<Self> {
        let what = || format!("owner of {}", folder.display());
        let file = open(folder).during(what)?;
        let mut elsewhere = false;
        for _ in 0..ROUNDS_MAX {
            if !try_lock(file.try_lock_shared()).during(what)? {
                // Somebody takes it over, or only peeks.
                std::thread::sleep(PEEK_WAIT);
                continue;
            }
            let found = read(&file).during(what)?;
            if let Found::Owned(content) = found
                && content.id == id
            {
                return Ok(Self { file, epoch: content.epoch, elsewhere });
            }
            file.unlock().during(what)?;
            if !try_lock(file.try_lock()).during(what)? {
                break;
            }
            // Under the exclusive lock nobody else can have changed it since
            // this read; and nobody uses the SR. flock cannot go from here to
            // a shared lock without a gap, so the next round looks again.
            let before = read(&file).during(what)?;
            elsewhere |= !matches!(&before, Found::Owned(content) if content.id.host == id.host);
            let epoch = match before {
                Found::Owned(content) if content.id == id => content.epoch,
                Found::Owned(content) => content.epoch + 1,
                Found::Nothing => 1,
                // Above any epoch that was counted up to.
                Found::Garbage => now_s(),
            };
            write(&file, Content { id, epoch }).during(what)?;
            file.unlock().during(what)?;
        }
        Err(Error::SrInUse { holder: holder(&file) })
    }

    /// The host that took the SR last, and whether anybody uses it now; `None`
    /// if nobody ever did. Makes nothing.
    ///
    /// # Errors
    /// I/O errors.
    pub fn peek(folder: &Path) -> Result<Option<(Uuid, bool)>> {
        let what = || format!("owner of {}", folder.display());
        let file = match File::open(folder.join(".coppice").join(OWNER_FILE)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            file => file.during(what)?,
        };
        // For an instant we hold it: whoever takes the SR then tries again.
        let in_use = !try_lock(file.try_lock()).during(what)?;
        match read(&file).during(what)? {
            Found::Owned(content) => Ok(Some((content.id.host, in_use))),
            Found::Nothing | Found::Garbage => Ok(None),
        }
    }

    /// Joins an SR that a process of this host has taken already.
    ///
    /// # Errors
    /// [`Error::SrInUse`] if it is not this host's at this epoch (any more).
    pub fn join(folder: &Path, id: HostId, epoch: u64) -> Result<Self> {
        let what = || format!("owner of {}", folder.display());
        let file = open(folder).during(what)?;
        if try_lock(file.try_lock_shared()).during(what)?
            && let Found::Owned(content) = read(&file).during(what)?
            && content == (Content { id, epoch })
        {
            return Ok(Self { file, epoch, elsewhere: false });
        }
        Err(Error::SrInUse { holder: holder(&file) })
    }
}

fn open(folder: &Path) -> io::Result<File> {
    let dot = folder.join(".coppice");
    match DirBuilder::new().mode(0o700).create(&dot) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(dot.join(OWNER_FILE))
}

fn try_lock(outcome: Result<(), TryLockError>) -> io::Result<bool> {
    match outcome {
        Ok(()) => Ok(true),
        Err(TryLockError::WouldBlock) => Ok(false),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

enum Found {
    /// A fresh file.
    Nothing,
    Owned(Content),
    /// Somebody scribbled on it.
    Garbage,
}

fn read(file: &File) -> io::Result<Found> {
    let mut bytes = [0; FILE_BYTES];
    let mut at = 0;
    while at < bytes.len() {
        match file.read_at(&mut bytes[at..], at as u64)? {
            0 => break,
            n => at += n,
        }
    }
    if at == 0 {
        return Ok(Found::Nothing);
    }
    Ok(serde_json::from_slice(&bytes[..at]).map_or(Found::Garbage, Found::Owned))
}

fn write(file: &File, content: Content) -> io::Result<()> {
    let mut bytes = serde_json::to_vec(&content).map_err(io::Error::other)?;
    bytes.resize(FILE_BYTES - 1, b' ');
    bytes.push(b'\n');
    file.write_all_at(&bytes, 0)?;
    file.sync_all()
}

fn holder(file: &File) -> String {
    match read(file) {
        Ok(Found::Owned(content)) => format!("host {}, boot {}", content.id.host, content.id.boot),
        _ => "another process".into(),
    }
}

fn now_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(n: u128, boot: u128) -> HostId {
        HostId { host: Uuid::from_u128(n), boot: Uuid::from_u128(boot) }
    }

    #[test]
    fn one_host_shares_and_others_wait_for_its_last_process() {
        let sr = tempfile::tempdir().unwrap();
        let first = Owner::acquire(sr.path(), host(1, 1)).unwrap();
        let second = Owner::acquire(sr.path(), host(1, 1)).unwrap();
        assert_eq!((first.epoch, second.epoch), (1, 1));
        for other in [host(2, 1), host(1, 2)] {
            assert_eq!(Owner::acquire(sr.path(), other).unwrap_err().code(), "SR_IN_USE");
        }
        drop(first);
        assert_eq!(Owner::acquire(sr.path(), host(2, 1)).unwrap_err().code(), "SR_IN_USE");
        drop(second);
        let taken = Owner::acquire(sr.path(), host(2, 1)).unwrap();
        assert_eq!(taken.epoch, 2);
        assert!(Owner::join(sr.path(), host(1, 1), 1).is_err());
        assert!(Owner::join(sr.path(), host(2, 1), 2).is_ok());
    }

    #[test]
    fn the_same_boot_keeps_the_epoch_and_another_voids_it() {
        let sr = tempfile::tempdir().unwrap();
        let epochs = [host(1, 1), host(1, 1), host(1, 2), host(1, 1)]
            .map(|id| Owner::acquire(sr.path(), id).unwrap().epoch);
        assert_eq!(epochs, [1, 1, 2, 3]);
    }

    #[test]
    fn a_garbled_owner_file_gives_an_epoch_never_used() {
        let sr = tempfile::tempdir().unwrap();
        drop(Owner::acquire(sr.path(), host(1, 1)).unwrap());
        std::fs::write(sr.path().join(".coppice/owner"), "no json").unwrap();
        assert!(Owner::acquire(sr.path(), host(1, 1)).unwrap().epoch > 1_000_000_000);
    }
}
