//! Carrying out one operation with blocking calls.
//!
//! [`prepare`] turns the numbers in an [`Op`] into the things themselves, on
//! the thread that owns the tables; [`Work::run`] then needs nothing else and
//! runs anywhere.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use nix::sys::uio::{pread, pwrite};
use vhd::storage::{CopyKind, CopyRange, Volume, VolumeName, Volumes, Why};

use super::cached::CachedReads;
use crate::buffer::{Buffer, Exclusive, Shared};
use crate::disk::{Files, OpenFile};
use crate::engine::{BufferRange, Completion, FileId, Op};
use crate::limits::SHORT_RUN_BYTES_MAX;

/// Largest [`Op::ReadMeta`] or [`Op::ReadPages`], in bytes: the BAT of the largest disk has 4 MiB.
const META_BYTES_MAX: u32 = 64 << 20;

/// An operation with all it needs.
#[derive(Debug)]
pub struct Work(Task);

#[derive(Debug)]
enum Task {
    ReadGuest { id: FileId, file: OpenFile, offset: u64, into: Exclusive },
    WriteGuest { id: FileId, file: OpenFile, offset: u64, from: Shared },
    ReadMeta { file: Arc<dyn Volume>, offset: u64, len: u32 },
    ReadPages { file: Arc<dyn Volume>, offsets: Arc<[u64]>, len: u32 },
    WriteMeta { file: Arc<dyn Volume>, parts: Vec<(u64, Arc<[u8]>)> },
    Copy { from: Arc<dyn Volume>, to: Arc<dyn Volume>, ranges: Arc<[CopyRange]>, share: bool },
    Zero { file: Arc<dyn Volume>, offset: u64, len: u64, keep: bool },
    Extend { file: Arc<dyn Volume>, len: u64 },
    Flush { file: Arc<dyn Volume>, why: Why },
    Swap { volumes: Arc<dyn Volumes>, new: VolumeName, over: VolumeName, aside: VolumeName },
    SyncNames { volumes: Arc<dyn Volumes>, why: Why },
}

/// Where [`prepare`] looks things up.
#[derive(Debug)]
pub struct Tables<'a> {
    /// Open volumes.
    pub files: &'a Files,
    /// The repository.
    pub volumes: &'a Arc<dyn Volumes>,
}

/// Looks up what `op` names. `buffer_of` finds the buffer of a request.
///
/// # Errors
/// An errno when something named does not exist, or a piece of a buffer is in
/// use by another operation: a mistake of the caller, never of the disk.
pub fn prepare(
    op: Op,
    tables: &Tables<'_>,
    buffer_of: impl Fn(BufferRange) -> Option<Buffer>,
) -> Result<Work, i32> {
    let file = |id: FileId| tables.files.get(id).ok_or(libc::EBADF);
    let open_file = |id: FileId| tables.files.open_file(id).ok_or(libc::EBADF);
    let volumes = || Arc::clone(tables.volumes);
    Ok(Work(match op {
        Op::ReadGuest { file: id, offset, into } => {
            let buffer = buffer_of(into).ok_or(libc::EFAULT)?;
            let into = buffer.lend_mut(into.at as usize, into.len as usize).ok_or(libc::EFAULT)?;
            Task::ReadGuest { id, file: open_file(id)?, offset, into }
        }
        Op::WriteGuest { file: id, offset, from } => {
            let buffer = buffer_of(from).ok_or(libc::EFAULT)?;
            let from = buffer.lend(from.at as usize, from.len as usize).ok_or(libc::EFAULT)?;
            Task::WriteGuest { id, file: open_file(id)?, offset, from }
        }
        Op::ReadMeta { file: id, offset, len } if len <= META_BYTES_MAX => {
            Task::ReadMeta { file: file(id)?, offset, len }
        }
        Op::ReadPages { file: id, offsets, len }
            if offsets.len() as u64 * u64::from(len) <= META_BYTES_MAX.into() =>
        {
            Task::ReadPages { file: file(id)?, offsets, len }
        }
        Op::ReadMeta { .. } | Op::ReadPages { .. } => return Err(libc::EINVAL),
        Op::WriteMeta { file: id, parts, why: _ } => Task::WriteMeta { file: file(id)?, parts },
        Op::Copy { from, to, ranges, share } => {
            Task::Copy { from: file(from)?, to: file(to)?, ranges, share }
        }
        Op::Zero { file: id, offset, len, keep, why: _ } => Task::Zero { file: file(id)?, offset, len, keep },
        Op::Extend { file: id, len } => Task::Extend { file: file(id)?, len },
        Op::Flush { file: id, why } => Task::Flush { file: file(id)?, why },
        Op::Swap { new, over, aside, why: _ } => Task::Swap { volumes: volumes(), new, over, aside },
        Op::SyncNames { why } => Task::SyncNames { volumes: volumes(), why },
    }))
}

impl Work {
    /// Carries it out if that needs no waiting: a small read of what the page
    /// cache has. The rest goes to a worker.
    pub fn run_at_once(&mut self, cached: &mut CachedReads) -> Option<Completion> {
        let Task::ReadGuest { file, offset, into, .. } = &mut self.0 else {
            return None;
        };
        if file.unit > 1 {
            return None; // it goes past the cache
        }
        cached.read(file.volume.fd()?, into, *offset).then_some(Completion::Done)
    }

    /// The transfer this is, if it is one that a ring can carry out.
    pub fn transfer(&mut self) -> Option<Transfer<'_>> {
        let (id, file, offset, memory) = match &mut self.0 {
            Task::ReadGuest { id, file, offset, into } => (*id, &*file, *offset, Memory::Fill(into)),
            Task::WriteGuest { id, file, offset, from } => (*id, &*file, *offset, Memory::Take(from)),
            _ => return None,
        };
        let fd = file.volume.fd()?;
        let bytes = memory.bytes();
        let unit = u64::from(file.unit);
        let aligned = [offset, bytes.as_ptr() as u64, bytes.len() as u64];
        let registrable = (!file.locked).then_some(id);
        aligned.iter().all(|n| n.is_multiple_of(unit)).then_some(Transfer { registrable, fd, offset, memory })
    }

    /// Carries it out; blocks.
    ///
    /// # Errors
    /// What failed, and how.
    pub fn run(mut self) -> Result<Completion, Failure> {
        let (what, offset, len) = self.0.label();
        if let Some(transfer) = self.transfer() {
            let moved = transfer.run().map(|()| Completion::Done);
            return moved.map_err(|error| Failure { what, offset, len, error });
        }
        self.0.run().map_err(|error| Failure { what, offset, len, error })
    }

    /// It failed elsewhere than in [`Self::run`].
    #[must_use]
    pub fn failed(&self, error: io::Error) -> Failure {
        let (what, offset, len) = self.0.label();
        Failure { what, offset, len, error }
    }
}

/// A read or write between a descriptor and guest memory, aligned as the
/// descriptor wants it.
#[derive(Debug)]
pub struct Transfer<'a> {
    /// The engine's name for the file, if the ring may keep the file open by
    /// itself.
    pub registrable: Option<FileId>,
    /// Its descriptor.
    pub fd: BorrowedFd<'a>,
    /// Byte offset in the file.
    pub offset: u64,
    /// The guest's memory.
    pub memory: Memory<'a>,
}

impl Transfer<'_> {
    /// By the descriptor and not by the volume: a file that is written past
    /// the page cache by one driver must not be written through it by another,
    /// or a page with older neighbours would come over what was written.
    fn run(self) -> io::Result<()> {
        let Self { fd, mut offset, memory, .. } = self;
        let short = |kind: io::ErrorKind| io::Error::new(kind, "the file ends here");
        match memory {
            Memory::Fill(mut rest) => {
                while !rest.is_empty() {
                    let at = offset_of(offset)?;
                    let n = uninterrupted(|| pread(fd, rest, at))?;
                    if n == 0 {
                        return Err(short(io::ErrorKind::UnexpectedEof));
                    }
                    rest = rest.get_mut(n..).unwrap_or_default();
                    offset += n as u64;
                }
            }
            Memory::Take(mut rest) => {
                while !rest.is_empty() {
                    let at = offset_of(offset)?;
                    let n = uninterrupted(|| pwrite(fd, rest, at))?;
                    if n == 0 {
                        return Err(short(io::ErrorKind::WriteZero));
                    }
                    rest = rest.get(n..).unwrap_or_default();
                    offset += n as u64;
                }
            }
        }
        Ok(())
    }
}

/// A call that a signal broke off is made again.
fn uninterrupted(mut call: impl FnMut() -> nix::Result<usize>) -> io::Result<usize> {
    loop {
        match call() {
            Err(nix::Error::EINTR) => {}
            other => return Ok(other?),
        }
    }
}

fn offset_of(bytes: u64) -> io::Result<libc::off_t> {
    libc::off_t::try_from(bytes).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))
}

/// Which way a [`Transfer`] goes.
#[derive(Debug)]
pub enum Memory<'a> {
    /// A read fills it.
    Fill(&'a mut [u8]),
    /// A write takes it.
    Take(&'a [u8]),
}

impl Memory<'_> {
    /// The bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        match self {
            Self::Fill(bytes) => bytes,
            Self::Take(bytes) => bytes,
        }
    }
}

impl Task {
    /// A word for it, and the range in its file.
    fn label(&self) -> (&'static str, u64, u64) {
        match self {
            Self::ReadGuest { offset, into, .. } => ("read", *offset, into.len() as u64),
            Self::WriteGuest { offset, from, .. } => ("write", *offset, from.len() as u64),
            Self::ReadMeta { offset, len, .. } => ("metadata read", *offset, u64::from(*len)),
            Self::ReadPages { offsets, len, .. } => {
                let first = offsets.first().copied().unwrap_or(0);
                ("metadata read", first, offsets.len() as u64 * u64::from(*len))
            }
            Self::WriteMeta { parts, .. } => {
                let bytes = parts.iter().map(|(_, bytes)| bytes.len() as u64).sum();
                ("metadata write", parts.first().map_or(0, |(offset, _)| *offset), bytes)
            }
            Self::Copy { ranges, .. } => {
                let first = ranges.first().map_or(0, |range| range.to);
                ("copy", first, ranges.iter().map(|range| range.len_bytes).sum())
            }
            Self::Zero { offset, len, .. } => ("zeroing", *offset, *len),
            Self::Extend { len, .. } => ("extension", *len, 0),
            Self::Flush { .. } => ("flush", 0, 0),
            Self::Swap { .. } => ("rename", 0, 0),
            Self::SyncNames { .. } => ("sync of names", 0, 0),
        }
    }

    fn run(self) -> io::Result<Completion> {
        match self {
            Self::ReadGuest { file, offset, mut into, .. } => file.volume.read_at(&mut into, offset)?,
            Self::WriteGuest { file, offset, from, .. } => file.volume.write_at(&from, offset)?,
            Self::ReadMeta { file, offset, len } => {
                let mut bytes = vec![0; len as usize];
                file.read_at(&mut bytes, offset)?;
                return Ok(Completion::Bytes(bytes));
            }
            Self::ReadPages { file, offsets, len } => {
                // All of them at the same time, so that one need not wait for
                // the other.
                offsets.iter().for_each(|offset| file.will_read(*offset, len.into()));
                let mut bytes = vec![0; offsets.len() * len as usize];
                for (offset, page) in offsets.iter().zip(bytes.chunks_mut((len as usize).max(1))) {
                    file.read_at(page, *offset)?;
                }
                return Ok(Completion::Bytes(bytes));
            }
            Self::WriteMeta { file, parts } => {
                for (offset, bytes) in parts {
                    file.write_at(&bytes, offset)?;
                }
            }
            Self::Copy { from, to, ranges, share } => {
                let shared_bytes = copy(&*from, &*to, &ranges, share)?;
                return Ok(Completion::Copied { shared_bytes });
            }
            Self::Zero { file, offset, len, keep: false } => file.zero(offset, len)?,
            Self::Zero { file, offset, len, keep: true } => file.zero_keeping_space(offset, len)?,
            Self::Extend { file, len } => file.extend_with_room(len)?,
            Self::Flush { file, why } => file.flush(why)?,
            Self::Swap { volumes, new, over, aside } => volumes.swap(&new, &over, &aside)?,
            Self::SyncNames { volumes, why } => volumes.sync(why)?,
        }
        Ok(Completion::Done)
    }
}

/// Copies ranges, long ones by sharing their extents if asked for, until one of
/// them could not be; the rest many at a time. Returns the bytes shared.
fn copy(from: &dyn Volume, to: &dyn Volume, ranges: &[CopyRange], mut share: bool) -> io::Result<u64> {
    let (mut shared_bytes, mut rest) = (0, Vec::new());
    for range in ranges {
        if !share || range.len_bytes <= SHORT_RUN_BYTES_MAX {
            rest.push(*range);
            continue;
        }
        match to.copy_from(from, range.from, range.to, range.len_bytes)? {
            CopyKind::Cloned => shared_bytes += range.len_bytes,
            CopyKind::Copied => share = false,
        }
    }
    if !rest.is_empty() {
        to.copy_many(from, &rest)?;
    }
    Ok(shared_bytes)
}

/// An operation that failed.
#[derive(Debug, thiserror::Error)]
#[error("{what} of {len} bytes at {offset}: {error}")]
pub struct Failure {
    what: &'static str,
    offset: u64,
    len: u64,
    error: io::Error,
}

impl Failure {
    /// Its errno.
    #[must_use]
    pub fn errno(&self) -> i32 {
        errno(&self.error)
    }
}

/// The errno of an error; `EIO` for those that never came from the system.
#[must_use]
pub fn errno(error: &io::Error) -> i32 {
    error.raw_os_error().unwrap_or(match error.kind() {
        io::ErrorKind::StorageFull => libc::ENOSPC,
        io::ErrorKind::Unsupported => libc::EOPNOTSUPP,
        _ => libc::EIO,
    })
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use vhd::storage::PosixVolume;

    use super::*;

    #[test]
    fn every_piece_of_metadata_goes_where_it_belongs() {
        let path = tempfile::NamedTempFile::new().unwrap();
        let file = File::options().read(true).write(true).open(path.path()).unwrap();
        let file = Arc::new(PosixVolume::from_file(file).unwrap());
        let parts = [(3, 8192), (1, 0), (2, 512)].map(|(n, at)| (at, Arc::from([n; 512].as_slice())));
        let work = Work(Task::WriteMeta { file: file.clone(), parts: parts.to_vec() });
        assert_eq!(work.run().unwrap(), Completion::Done);
        let mut all = vec![9; 8704];
        file.read_at(&mut all, 0).unwrap();
        let expected = |at: usize| [1, 2].get(at / 512).copied().unwrap_or(if at < 8192 { 0 } else { 3 });
        assert!(all.iter().enumerate().all(|(at, byte)| *byte == expected(at)));
    }
}
