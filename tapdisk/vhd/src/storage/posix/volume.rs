//! One open file or block device, as a [`Volume`].

use std::any::Any;
use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::sync::{Mutex, OnceLock};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, FcntlArg, OFlag, PosixFadviseAdvice, fallocate, fcntl, posix_fadvise};
use nix::sys::statfs::fstatfs;
use nix::sys::statvfs::fstatvfs;
use nix::unistd::{Whence, lseek};

use super::super::{Access, CopyKind, CopyRange, Volume, Why};
use super::features::is_network;
use super::removed::OpenFile;
use super::ring::Movers;
use crate::limits::PLENTY_SHARE;

/// Zeros written at a time where the filesystem cannot punch holes.
const ZERO_BUFFER_BYTES: usize = 256 << 10;

/// Alignment of direct transfers where the kernel does not tell.
const DIRECT_UNIT_SAFE: u32 = 4096;

/// A file or block device behind one descriptor. A lock taken on it lives as
/// long as this does.
#[derive(Debug)]
pub struct PosixVolume {
    /// Carries the lock.
    file: OpenFile,
    /// A second description of the same file, through the page cache, once
    /// `file` goes past it.
    cached: OnceLock<OpenFile>,
    device: bool,
    /// Set once the filesystem refused to share extents, to spare the rest of
    /// a merge one failing call per run.
    pub(super) clone_refused: AtomicBool,
    /// Whether the filesystem is another machine's.
    remote: OnceLock<bool>,
    /// What copies many ranges at once, from the first time on.
    pub(super) mover: Mutex<Option<Movers>>,
}

impl PosixVolume {
    /// Wraps an open descriptor; it must be a plain file or a block device.
    pub fn from_file(file: File) -> io::Result<Self> {
        let kind = file.metadata()?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            let message = "neither a file nor a block device";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
        }
        Ok(Self {
            file: file.into(),
            cached: OnceLock::new(),
            device: kind.is_block_device(),
            clone_refused: AtomicBool::new(false),
            remote: OnceLock::new(),
            mover: Mutex::new(None),
        })
    }

    /// Opens a block device by path (`/dev/<vg>/<lv>`, a symbolic link that
    /// the system made, so links are followed here). With [`Access::Write`]
    /// it is locked, or `WouldBlock`. The caller checks that the path still
    /// leads to this device where it can be renamed.
    pub fn open_device(path: &Path, access: Access) -> io::Result<Self> {
        let write = access == Access::Write;
        let flags = nix::libc::O_CLOEXEC;
        let file = OpenOptions::new().read(true).write(write).custom_flags(flags).open(path)?;
        if write {
            super::lock(&file)?;
        }
        let volume = Self::from_file(file)?;
        if !volume.device {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a block device"));
        }
        Ok(volume)
    }

    /// The locked description, if it goes past the page cache.
    pub(super) fn direct(&self) -> Option<BorrowedFd<'_>> {
        self.cached.get().map(|_| self.file.as_fd())
    }

    /// For everything this type does itself: always through the page cache.
    pub(super) fn io(&self) -> &File {
        self.cached.get().unwrap_or(&self.file)
    }

    /// Whether bytes are kept by another machine, which may copy them there.
    pub(super) fn is_remote(&self) -> bool {
        *self.remote.get_or_init(|| fstatfs(&self.file).is_ok_and(|found| is_network(&found)))
    }

    /// What direct transfers must be multiples of, in offset, length and
    /// memory; `None` where there are none.
    fn direct_unit(&self) -> Option<u32> {
        let path = c"";
        let mut found = std::mem::MaybeUninit::<nix::libc::statx>::zeroed();
        // SAFETY: the path is a terminated string and `found` has room for one
        // `statx`; both live until the call returns.
        let failed = unsafe {
            let (flags, mask) = (nix::libc::AT_EMPTY_PATH, nix::libc::STATX_DIOALIGN);
            nix::libc::statx(self.file.as_raw_fd(), path.as_ptr(), flags, mask, found.as_mut_ptr())
        };
        // SAFETY: all-zero bytes are a valid `statx`, and the call wrote only
        // a valid one.
        let found = unsafe { found.assume_init() };
        if failed != 0 || found.stx_mask & nix::libc::STATX_DIOALIGN == 0 {
            // An older kernel does not say. 4 KiB suits every device there is.
            return Some(DIRECT_UNIT_SAFE);
        }
        let unit = found.stx_dio_offset_align.max(found.stx_dio_mem_align);
        (unit != 0).then_some(unit)
    }

    /// Zeros by a call of the filesystem, or by writing where it has none.
    /// What lies past the end is ignored.
    fn zero_by(&self, way: FallocateFlags, offset: u64, len_bytes: u64) -> io::Result<()> {
        let end = offset.saturating_add(len_bytes).min(self.len()?);
        if offset >= end {
            return Ok(());
        }
        let len_bytes = end - offset;
        let (offset_s, len_s) = (offset_of(offset)?, offset_of(len_bytes)?);
        loop {
            return match fallocate(&self.file, way | FallocateFlags::FALLOC_FL_KEEP_SIZE, offset_s, len_s) {
                Ok(()) => Ok(()),
                Err(Errno::EINTR) => continue,
                // EINVAL: a device and a range off its blocks.
                Err(Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::EINVAL) => self.write_zeros(offset, len_bytes),
                Err(errno) => Err(errno.into()),
            };
        }
    }

    /// Has a file take space for a range it is going to fill, as unwritten
    /// extents, which read as zeros. What cannot be had now is found, or shows
    /// as missing, when the range is written.
    pub(super) fn find_room(&self, offset: u64, len_bytes: u64) {
        if let (Ok(at), Ok(len)) = (offset_of(offset), offset_of(len_bytes)) {
            let _ = fallocate(&self.file, FallocateFlags::FALLOC_FL_KEEP_SIZE, at, len);
        }
    }

    /// Whether the filesystem can spare so many bytes for what may never be
    /// written.
    fn has_plenty(&self, bytes: u64) -> bool {
        fstatvfs(&self.file).is_ok_and(|found| {
            let unit = found.fragment_size();
            let free = found.blocks_available().saturating_mul(unit);
            free.saturating_sub(bytes) >= found.blocks().saturating_mul(unit) / PLENTY_SHARE
        })
    }

    fn write_zeros(&self, offset: u64, len_bytes: u64) -> io::Result<()> {
        let end = offset.saturating_add(len_bytes);
        let run_max = ZERO_BUFFER_BYTES.min(usize_of(len_bytes));
        let zeros = vec![0u8; run_max + DIRECT_UNIT_SAFE as usize];
        // Guest sectors go the one way guest data goes: see `go_direct`.
        let skip = zeros.as_ptr().align_offset(DIRECT_UNIT_SAFE as usize);
        let buffer = zeros.get(skip..).and_then(|aligned| aligned.get(..run_max)).unwrap_or(&zeros);
        let sectors = offset.is_multiple_of(512) && len_bytes.is_multiple_of(512);
        let file = if sectors { &self.file } else { self.io() };
        let mut at = offset;
        while at < end {
            let run = buffer.len().min(usize_of(end - at));
            file.write_all_at(&buffer[..run], at)?;
            at += run as u64;
        }
        Ok(())
    }
}

/// For lengths that are clamped by a buffer afterwards.
pub(super) fn usize_of(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}

/// For system calls, which count in signed bytes.
pub(super) fn offset_of(bytes: u64) -> io::Result<i64> {
    i64::try_from(bytes).map_err(|_| io::Error::from(Errno::EFBIG))
}

impl Volume for PosixVolume {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.io().read_exact_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.io().write_all_at(buf, offset)
    }

    // fdatasync covers the length: metadata needed to read the data back is
    // part of its promise.
    fn flush(&self, _why: Why) -> io::Result<()> {
        self.file.sync_data()
    }

    fn len(&self) -> io::Result<u64> {
        if self.device {
            // The position of the description is used by nobody.
            (&*self.file).seek(SeekFrom::End(0))
        } else {
            Ok(self.file.metadata()?.len())
        }
    }

    fn set_len(&self, len_bytes: u64) -> io::Result<()> {
        if self.device {
            return Err(io::ErrorKind::Unsupported.into());
        }
        self.file.set_len(len_bytes)
    }

    // A device by itself is as long as it is: who can give it space or take
    // some of it wraps this.
    fn extend(&self, len_bytes: u64) -> io::Result<()> {
        match self.len()? {
            len if len >= len_bytes => Ok(()),
            _ if self.device => Err(Errno::ENOSPC.into()),
            _ => self.set_len(len_bytes),
        }
    }

    fn extend_with_room(&self, len_bytes: u64) -> io::Result<()> {
        let old = self.len()?;
        self.extend(len_bytes)?;
        if !self.device && len_bytes > old && self.has_plenty(len_bytes - old) {
            self.find_room(old, len_bytes - old);
        }
        Ok(())
    }

    fn reduced_len(&self, len_bytes: u64) -> io::Result<u64> {
        if self.device { self.len() } else { Ok(len_bytes) }
    }

    fn reduce(&self, len_bytes: u64) -> io::Result<()> {
        if self.device { Ok(()) } else { self.set_len(len_bytes) }
    }

    fn zero(&self, offset: u64, len_bytes: u64) -> io::Result<()> {
        // On a device punching could be answered by a discard that promises
        // no zeros; zero-out promises them.
        let way = if self.device {
            FallocateFlags::FALLOC_FL_ZERO_RANGE
        } else {
            FallocateFlags::FALLOC_FL_PUNCH_HOLE
        };
        self.zero_by(way, offset, len_bytes)
    }

    fn zero_keeping_space(&self, offset: u64, len_bytes: u64) -> io::Result<()> {
        self.zero_by(FallocateFlags::FALLOC_FL_ZERO_RANGE, offset, len_bytes)
    }

    // Unwritten extents count as holes where they are looked for; holes proper
    // are punched for nothing. The file's position is used by nobody else.
    fn give_back_unwritten(&self, offset: u64, len_bytes: u64) -> io::Result<()> {
        let end = offset_of(offset.saturating_add(len_bytes).min(self.len()?))?;
        let way = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let mut at = offset_of(offset)?;
        while !self.device && at < end {
            let hole = lseek(&self.file, at, Whence::SeekHole)?.min(end);
            let data = match lseek(&self.file, hole, Whence::SeekData) {
                Ok(data) => data.min(end),
                // No more of it.
                Err(Errno::ENXIO) => end,
                Err(errno) => return Err(errno.into()),
            };
            if hole < data {
                match fallocate(&self.file, way, hole, data - hole) {
                    Ok(()) => {}
                    Err(Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::EINVAL) => return Ok(()),
                    Err(errno) => return Err(errno.into()),
                }
            }
            at = data;
        }
        Ok(())
    }

    fn copy_from(
        &self,
        source: &dyn Volume,
        source_offset: u64,
        offset: u64,
        len_bytes: u64,
    ) -> io::Result<CopyKind> {
        super::copy::copy(self, source, source_offset, offset, len_bytes)
    }

    fn copy_many(&self, source: &dyn Volume, ranges: &[CopyRange]) -> io::Result<()> {
        super::copy::copy_many(self, source, ranges)
    }

    fn will_read(&self, offset: u64, len_bytes: u64) {
        let (Ok(at), Ok(len)) = (offset_of(offset), offset_of(len_bytes)) else { return };
        // Advice: what comes of it shows when the range is read.
        let _ = posix_fadvise(self.io(), at, len, PosixFadviseAdvice::POSIX_FADV_WILLNEED);
    }

    fn begin_write_out(&self, offset: u64, len_bytes: u64) {
        let (Ok(at), Ok(len)) = (offset_of(offset), offset_of(len_bytes)) else { return };
        // SAFETY: takes numbers only, and the descriptor is open for as long
        // as the call lasts, since it is borrowed.
        let _ = unsafe {
            // An error of a write shows at the flush.
            nix::libc::sync_file_range(self.io().as_raw_fd(), at, len, nix::libc::SYNC_FILE_RANGE_WRITE)
        };
    }

    fn allocated(&self) -> io::Result<u64> {
        if self.device {
            return self.len();
        }
        // st_blocks counts 512-byte units whatever the block size.
        Ok(self.file.metadata()?.blocks().saturating_mul(512))
    }

    fn is_device(&self) -> bool {
        self.device
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.file.as_fd())
    }

    // The locked description is the one that goes direct: its lock then lasts
    // as long as any transfer in flight, whoever dies (invariant 4). What goes
    // through the page cache is done by threads of ours, which keep all
    // descriptions open until their call ends.
    fn go_direct(&self, unit_max: u32) -> io::Result<Option<u32>> {
        let Some(unit) = self.direct_unit().filter(|unit| *unit <= unit_max) else {
            return Ok(None);
        };
        if self.cached.get().is_none() {
            let path = format!("/proc/self/fd/{}", self.file.as_raw_fd());
            let access = OFlag::from_bits_truncate(fcntl(&self.file, FcntlArg::F_GETFL)?) & OFlag::O_ACCMODE;
            let cached = OpenOptions::new().read(true).write(access == OFlag::O_RDWR).open(path)?;
            let _ = self.cached.set(cached.into()); // another thread's is as good
        }
        let flags = OFlag::from_bits_truncate(fcntl(&self.file, FcntlArg::F_GETFL)?);
        match fcntl(&self.file, FcntlArg::F_SETFL(flags | OFlag::O_DIRECT)) {
            Ok(_) => Ok(Some(unit)),
            Err(Errno::EINVAL) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
