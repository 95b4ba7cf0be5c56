//! Real files and block devices.
//!
//! ```text
//!   PosixFs (a root folder)          PosixVolume (one open description)
//!     names: openat, linkat,           bytes: pread, pwrite, fdatasync
//!     renameat, fsync of folders       space: fallocate, FICLONERANGE
//! ```
//!
//! Every name is looked up from the root folder step by step and no step
//! follows a symbolic link, so a link planted in a repository leads nowhere
//! (invariant 10). Locks are `flock`s on the description that does the I/O
//! (invariant 4): they die with their holder and cross no `fork` unnoticed,
//! since every descriptor is close-on-exec.
//!
//! Absent on purpose: a guest's I/O, which belongs to the data path's driver
//! and uses [`Volume::fd`].

use std::fs::{File, TryLockError};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, open, openat, renameat};
use nix::sys::stat::{FileStat, Mode, SFlag, fstatat, mkdirat};
use nix::unistd::{UnlinkatFlags, linkat, unlinkat};

use super::path::{parts, split};
use super::{Access, CopyKind, Fs, Space, Stamp, Volume, Why};
use removed::{OpenFile, takes_long};

mod copy;
mod features;
mod removed;
mod ring;
mod volume;

pub use features::Features;
pub use volume::PosixVolume;

/// How often a name may be replaced under our hands between opening and
/// locking before we report it as busy.
const LOCK_TRIES_MAX: u32 = 8;
/// How often a taken lock is tried again: see [`lock`].
const FORK_TRIES_MAX: u32 = 10;
/// And how long between.
const FORK_WAIT: Duration = Duration::from_millis(2);

/// A folder of the host's filesystem, as an [`Fs`].
#[derive(Debug, Clone)]
pub struct PosixFs {
    root: PathBuf,
}

impl PosixFs {
    /// Takes `root` as it is; a missing folder shows at the first use.
    /// Symbolic links on the way *to* the root are followed: they are the
    /// administrator's.
    #[must_use]
    pub fn new(root: PathBuf) -> Self {
        Self { root }
    }

    /// The folder this was made with.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Opens a folder below the root without following symbolic links.
    fn folder(&self, folder: &str) -> io::Result<OwnedFd> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let mut fd = open(&self.root, flags, Mode::empty())?;
        for part in parts(folder)? {
            fd = openat(&fd, part, flags | OFlag::O_NOFOLLOW, Mode::empty())?;
        }
        Ok(fd)
    }

    /// The folder of a path, and the last name in it.
    fn place<'a>(&self, path: &'a str) -> io::Result<(OwnedFd, &'a str)> {
        let (folder, name) = split(path)?;
        Ok((self.folder(folder)?, name))
    }

    /// Opens once, without lock. Looks at the type first: opening a FIFO
    /// would block and opening some devices has effects.
    fn open_once(&self, path: &str, access: Access) -> io::Result<File> {
        let (folder, name) = self.place(path)?;
        check_type(&fstatat(&folder, name, AtFlags::AT_SYMLINK_NOFOLLOW)?)?;
        let mode = match access {
            Access::Read => OFlag::O_RDONLY,
            Access::Write => OFlag::O_RDWR,
        };
        let flags = mode | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        Ok(File::from(openat(&folder, name, flags, Mode::empty())?))
    }

    /// Whether `path` leads to the inode behind `file` at this moment.
    fn leads_to(&self, path: &str, file: &File) -> io::Result<bool> {
        let (folder, name) = self.place(path)?;
        let meta = file.metadata()?;
        match fstatat(&folder, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(stat.st_dev == meta.dev() && stat.st_ino == meta.ino()),
            Err(Errno::ENOENT) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }
}

/// Plain files and block devices only.
fn check_type(stat: &FileStat) -> io::Result<()> {
    match SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits()) {
        SFlag::S_IFREG | SFlag::S_IFBLK => Ok(()),
        SFlag::S_IFLNK => Err(Errno::ELOOP.into()),
        _ => Err(io::Error::new(io::ErrorKind::InvalidInput, "neither a file nor a block device")),
    }
}

/// Takes the exclusive lock of this description, or `WouldBlock`.
///
/// A process that this one is just starting holds copies of all descriptors
/// until its exec, and with them the locks we gave up meanwhile. So a lock
/// that is taken is tried again, for longer than that can last.
fn lock(file: &File) -> io::Result<()> {
    let mut tries = 0;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(()),
            Err(TryLockError::Error(error)) => return Err(error),
            Err(TryLockError::WouldBlock) if tries == FORK_TRIES_MAX => {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            Err(TryLockError::WouldBlock) => {
                tries += 1;
                std::thread::sleep(FORK_WAIT);
            }
        }
    }
}

/// Holds the file of a name that is about to go, if it is the file's last and
/// freeing it may take long: nobody waits for that then.
fn last_name(folder: &OwnedFd, name: &str) -> Option<OpenFile> {
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    // What cannot be held is freed at once.
    let file = File::from(openat(folder, name, flags, Mode::empty()).ok()?);
    takes_long(&file, 1).then(|| file.into())
}

fn busy() -> io::Error {
    io::Error::new(io::ErrorKind::WouldBlock, "the name kept being replaced")
}

impl Fs for PosixFs {
    // Lock, then look again: between our open and our lock the former holder
    // may have renamed another file over the name, or removed it. Its lock
    // would then be on the new inode and ours on a file nobody can reach.
    fn open(&self, path: &str, access: Access) -> io::Result<Arc<dyn Volume>> {
        if access == Access::Read {
            return Ok(Arc::new(PosixVolume::from_file(self.open_once(path, access)?)?));
        }
        for _ in 0..LOCK_TRIES_MAX {
            let file = self.open_once(path, access)?;
            lock(&file)?;
            if self.leads_to(path, &file)? {
                return Ok(Arc::new(PosixVolume::from_file(file)?));
            }
        }
        Err(busy())
    }

    // The same second look as in `open`: somebody who cleans up leftovers may
    // lock and remove the new file before we lock it.
    fn create(&self, path: &str) -> io::Result<Arc<dyn Volume>> {
        let (folder, name) = self.place(path)?;
        let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC;
        for _ in 0..LOCK_TRIES_MAX {
            let file = File::from(openat(&folder, name, flags, Mode::from_bits_truncate(0o600))?);
            lock(&file)?;
            if self.leads_to(path, &file)? {
                return Ok(Arc::new(PosixVolume::from_file(file)?));
            }
        }
        Err(busy())
    }

    fn link(&self, from: &str, to: &str) -> io::Result<()> {
        let (from_folder, from_name) = self.place(from)?;
        let (to_folder, to_name) = self.place(to)?;
        Ok(linkat(&from_folder, from_name, &to_folder, to_name, AtFlags::empty())?)
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let (from_folder, from_name) = self.place(from)?;
        let (to_folder, to_name) = self.place(to)?;
        let _replaced = last_name(&to_folder, to_name);
        Ok(renameat(&from_folder, from_name, &to_folder, to_name)?)
    }

    fn unlink(&self, path: &str) -> io::Result<()> {
        let (folder, name) = self.place(path)?;
        let _removed = last_name(&folder, name);
        Ok(unlinkat(&folder, name, UnlinkatFlags::NoRemoveDir)?)
    }

    fn list(&self, folder: &str) -> io::Result<Vec<String>> {
        // Opening it first refuses symbolic links on the way.
        drop(self.folder(folder)?);
        let mut names = Vec::new();
        for entry in std::fs::read_dir(self.root.join(folder))? {
            let entry = entry?;
            let kind = entry.file_type()?;
            if !(kind.is_file() || kind.is_block_device()) {
                continue;
            }
            // A name that is not UTF-8 is none of ours.
            if let Ok(name) = entry.file_name().into_string() {
                names.push(name);
            }
        }
        names.sort_unstable();
        Ok(names)
    }

    // Each parent is synced even if the folder was there: its maker may have
    // died between making and syncing it, and records in a folder that a
    // power cut takes away would not be durable.
    fn make_folder(&self, folder: &str) -> io::Result<()> {
        let mut fd = self.folder("")?;
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
        for part in parts(folder)? {
            match mkdirat(&fd, part, Mode::from_bits_truncate(0o700)) {
                Ok(()) | Err(Errno::EEXIST) => {}
                Err(errno) => return Err(errno.into()),
            }
            let parent = File::from(fd);
            parent.sync_all()?;
            fd = openat(&parent, part, flags, Mode::empty())?;
        }
        Ok(())
    }

    fn sync_names(&self, folder: &str, _why: Why) -> io::Result<()> {
        File::from(self.folder(folder)?).sync_all()
    }

    fn same_file(&self, a: &str, b: &str) -> io::Result<bool> {
        let stat = |path: &str| -> io::Result<Option<FileStat>> {
            let (folder, name) = self.place(path)?;
            match fstatat(&folder, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
                Ok(stat) => Ok(Some(stat)),
                Err(Errno::ENOENT) => Ok(None),
                Err(errno) => Err(errno.into()),
            }
        };
        Ok(match (stat(a)?, stat(b)?) {
            (Some(a), Some(b)) => a.st_dev == b.st_dev && a.st_ino == b.st_ino,
            _ => false,
        })
    }

    // A filesystem without times of birth may give a number of a deleted file
    // to a new one: then nothing names a file for good.
    fn stamp(&self, path: &str) -> io::Result<Option<Stamp>> {
        split(path)?;
        let meta = std::fs::symlink_metadata(self.root.join(path))?;
        let Some(born_ns) = meta.created().ok().and_then(|at| at.duration_since(UNIX_EPOCH).ok()) else {
            return Ok(None);
        };
        if !meta.is_file() {
            return Ok(None);
        }
        let ns = |seconds: i64, nanos: i64| i128::from(seconds) * 1_000_000_000 + i128::from(nanos);
        Ok(Some(Stamp {
            identity: format!("{:x}.{:x}", meta.ino(), born_ns.as_nanos()),
            len: meta.len(),
            allocated: meta.blocks() * 512,
            modified_ns: ns(meta.mtime(), meta.mtime_nsec()),
            changed_ns: ns(meta.ctime(), meta.ctime_nsec()),
        }))
    }

    fn space(&self) -> io::Result<Space> {
        let stat = nix::sys::statvfs::fstatvfs(self.folder("")?)?;
        let unit = stat.fragment_size();
        Ok(Space {
            total: stat.blocks().saturating_mul(unit),
            free: stat.blocks_available().saturating_mul(unit),
        })
    }
}

#[cfg(test)]
mod tests;
