//! The one door to the outside world.
//!
//! ```text
//!   image, chain, merge, check          sm, gc, tapdisk
//!            |                                |
//!         Volume (bytes of one image)      Volumes (names, records)
//!            |                                |
//!            +--------- FileVolumes ----------+        <- one code for both
//!                           |
//!                          Fs  (open, link, rename, sync)
//!                        /      \
//!                   posix/      sim/ (feature "sim": the crash simulator)
//! ```
//!
//! A file repository is written once, over [`Fs`], so that the crash
//! simulator tears the very code that runs in production. A backend whose
//! volumes are devices implements [`Volume`] and [`Volumes`] directly.
//!
//! Every step whose *order* or *durability* matters carries a name, the
//! `why` argument. It documents the step, appears in traces, and is the
//! handle by which the crash simulator leaves out one step at a time to show
//! that it is needed.
//!
//! Absent on purpose: async, caching, retries, knowledge of VHD.

use std::fmt::Debug;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

mod file_volumes;
mod path;
mod posix;
#[cfg(feature = "sim")]
pub mod sim;
#[cfg(feature = "sim")]
pub mod via;

pub use file_volumes::FileVolumes;
pub use posix::{Features, PosixFs, PosixVolume};

/// Names a step for traces and for the crash simulator, like
/// `"writeback: data before bitmaps"`.
pub type Why = &'static str;

/// How [`Volume::copy_from`] moved bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CopyKind {
    /// The filesystem shares the extents; nothing was read or written.
    Cloned,
    /// Bytes were read and written.
    Copied,
}

/// A range to copy, for [`Volume::copy_many`]. In bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CopyRange {
    /// Where it is in the source.
    pub from: u64,
    /// Where it goes.
    pub to: u64,
    /// How long it is.
    pub len_bytes: u64,
}

/// The bytes of one image: positioned, blocking, safe to share.
///
/// Nothing here is durable before [`Volume::flush`] returns, the length
/// included. All offsets and lengths are bytes.
// `len` here is a length that can fail, not a collection's.
#[allow(clippy::len_without_is_empty)]
pub trait Volume: Send + Sync + Debug {
    /// Fills `buf` from `offset`; `UnexpectedEof` where the volume ends before.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;
    /// Writes all of `buf` at `offset`, growing a file where needed.
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()>;
    /// Makes everything completed before this call durable.
    fn flush(&self, why: Why) -> io::Result<()>;
    /// Current length in bytes.
    fn len(&self) -> io::Result<u64>;
    /// Cuts or extends a file; an extension reads as zeros. A device answers
    /// `Unsupported`: see [`Volume::extend`] and [`Volume::reduce`].
    fn set_len(&self, len_bytes: u64) -> io::Result<()>;
    /// Makes the volume at least this long. What a file gains reads as zeros,
    /// and lasts with the next flush. A device is given space by its backend,
    /// durably and as one change, perhaps more than asked for: it holds
    /// whatever others left there, but its last sector reads as zeros, so that
    /// nobody takes a stranger's footer for this image's. `StorageFull` where
    /// there is no more.
    fn extend(&self, len_bytes: u64) -> io::Result<()> {
        if self.len()? < len_bytes {
            self.set_len(len_bytes)?;
        }
        Ok(())
    }
    /// As [`Volume::extend`], for what is soon written in small pieces all over:
    /// a file takes the space of what it gains at once, where the filesystem
    /// has plenty, so that finding some is not part of each write and the
    /// pieces lie side by side. Where it cannot, this is `extend`.
    fn extend_with_room(&self, len_bytes: u64) -> io::Result<()> {
        self.extend(len_bytes)
    }
    /// Length that [`Volume::reduce`] would leave: for a device whole extents,
    /// or what it has if nobody can take any of it.
    fn reduced_len(&self, len_bytes: u64) -> io::Result<u64> {
        Ok(len_bytes)
    }
    /// Gives back space that nobody needs past `len_bytes`, as far as the
    /// backend can; of a device durably and as one change.
    fn reduce(&self, len_bytes: u64) -> io::Result<()> {
        self.set_len(len_bytes)
    }
    /// Makes a range read as zeros and gives its space back where that is
    /// possible. Never changes the length: what lies past the end is ignored.
    fn zero(&self, offset: u64, len_bytes: u64) -> io::Result<()>;
    /// As [`Volume::zero`], but the range has space of its own afterwards, so
    /// that a later write there cannot fail for want of it. A backend that
    /// cannot tell space from zeros does what `zero` does.
    fn zero_keeping_space(&self, offset: u64, len_bytes: u64) -> io::Result<()> {
        self.zero(offset, len_bytes)
    }
    /// Gives back the space of what was never written of a range, as
    /// [`Volume::extend_with_room`] takes it: it reads as zeros before and after.
    /// A backend that cannot tell does nothing.
    fn give_back_unwritten(&self, offset: u64, len_bytes: u64) -> io::Result<()> {
        let _ = (offset, len_bytes);
        Ok(())
    }
    /// Copies a range from another volume of the same backend, sharing
    /// extents where it can.
    fn copy_from(
        &self,
        source: &dyn Volume,
        source_offset: u64,
        offset: u64,
        len_bytes: u64,
    ) -> io::Result<CopyKind>;
    /// Copies several ranges, none of which overlap where they go, many at a
    /// time where that is possible. Shares no extents.
    fn copy_many(&self, source: &dyn Volume, ranges: &[CopyRange]) -> io::Result<()> {
        for range in ranges {
            self.copy_from(source, range.from, range.to, range.len_bytes)?;
        }
        Ok(())
    }
    /// A range is going to be read: a backend may begin to fetch it, so that
    /// what is asked for one after the other comes from many reads at once.
    fn will_read(&self, offset: u64, len_bytes: u64) {
        let _ = (offset, len_bytes);
    }
    /// A range was written and a flush will follow: a backend may begin to
    /// write it out. Nothing is durable by this.
    fn begin_write_out(&self, offset: u64, len_bytes: u64) {
        let _ = (offset, len_bytes);
    }
    /// Bytes of storage in use (for a file: its blocks, holes not counted).
    fn allocated(&self) -> io::Result<u64>;
    /// Whether new space reads as zeros and zeroing gives space back (files),
    /// or the volume is a device with a fixed length and garbage in new space.
    fn is_device(&self) -> bool;
    /// The descriptor behind a real volume, for drivers and extent cloning.
    fn fd(&self) -> Option<BorrowedFd<'_>>;
    /// From now on transfers by [`Volume::fd`] go past the page cache and must
    /// be aligned: offset, length and memory are multiples of the answer, in
    /// bytes. `None`: this volume cannot, or needs more than `unit_max`;
    /// nothing changed then. What the volume
    /// does itself goes on without alignment, through the page cache; so
    /// nothing may be written both ways within one page. To be called before
    /// the volume is shared.
    fn go_direct(&self, unit_max: u32) -> io::Result<Option<u32>> {
        let _ = unit_max;
        Ok(None)
    }
    /// For backends that must recognise their own volumes in `copy_from`.
    fn as_any(&self) -> &dyn std::any::Any;
}

/// How a file or volume is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Reading only, no lock.
    Read,
    /// Reading and writing, under an exclusive lock on this very description
    /// (invariant 4). `WouldBlock` if somebody else holds it.
    Write,
}

/// A flat folder tree as a filesystem offers it. Paths are relative to the
/// root the `Fs` was made with, `/`-separated, never absolute, never `..`.
pub trait Fs: Send + Sync + Debug {
    /// Opens an existing file. With [`Access::Write`] the lock is taken and
    /// the name is then checked to still lead to the locked inode.
    fn open(&self, path: &str, access: Access) -> io::Result<Arc<dyn Volume>>;
    /// Creates a file that must not exist, opened and locked for writing.
    fn create(&self, path: &str) -> io::Result<Arc<dyn Volume>>;
    /// A second name for a file; fails with `AlreadyExists`.
    fn link(&self, from: &str, to: &str) -> io::Result<()>;
    /// Renames, atomically replacing `to` if it exists.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;
    /// Removes a name.
    fn unlink(&self, path: &str) -> io::Result<()>;
    /// Names of plain files directly in `folder` (`""` is the root), sorted.
    fn list(&self, folder: &str) -> io::Result<Vec<String>>;
    /// Creates a folder; fine if it is there.
    fn make_folder(&self, folder: &str) -> io::Result<()>;
    /// Makes the names in `folder` durable.
    fn sync_names(&self, folder: &str, why: Why) -> io::Result<()>;
    /// Whether both names lead to the same file now (false if either is missing).
    fn same_file(&self, a: &str, b: &str) -> io::Result<bool>;
    /// Free and total bytes of the filesystem.
    fn space(&self) -> io::Result<Space>;
    /// What tells whether a file has changed; `None` where nothing does.
    fn stamp(&self, _path: &str) -> io::Result<Option<Stamp>> {
        Ok(None)
    }
}

/// What a filesystem says of a file without reading it: every write changes
/// it, after a tick of the filesystem's clock.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stamp {
    /// Names the file through renames, and no other, earlier or later.
    pub identity: String,
    /// Length in bytes.
    pub len: u64,
    /// Storage in use, in bytes.
    pub allocated: u64,
    /// Last change of its content, in nanoseconds since 1970.
    pub modified_ns: i128,
    /// Last change of anything about it.
    pub changed_ns: i128,
}

/// Room on a repository, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Space {
    /// Total bytes.
    pub total: u64,
    /// Bytes a new file may take.
    pub free: u64,
}

/// The name of a volume in its repository: a base name such as
/// `0b6f….vhd`. Never empty, no `/`, no control characters, not starting
/// with a dot, at most 255 bytes: a locator can carry it and it cannot leave
/// the repository (invariant 10).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VolumeName(String);

impl VolumeName {
    /// Checks `name`; `None` if it could lead out of the repository.
    #[must_use]
    pub fn new(name: &str) -> Option<Self> {
        let ok = !name.is_empty()
            && name.len() <= 255
            && !name.starts_with('.')
            && !name.contains('/')
            && !name.chars().any(char::is_control);
        ok.then(|| Self(name.to_owned()))
    }

    /// `<uuid>.vhd`: how a VDI's volume is called.
    #[must_use]
    pub fn vhd(uuid: uuid::Uuid) -> Self {
        Self(format!("{uuid}.vhd"))
    }

    /// A prepared image of an intent, not yet visible: `tmp-<intent>-<n>.vhd`.
    #[must_use]
    pub fn temporary(intent: uuid::Uuid, n: u32) -> Self {
        Self(format!("tmp-{intent}-{n}.vhd"))
    }

    /// The intent a temporary name belongs to.
    #[must_use]
    pub fn temporary_of(&self) -> Option<uuid::Uuid> {
        let rest = self.0.strip_prefix("tmp-")?;
        uuid::Uuid::try_parse(rest.get(..36)?).ok()
    }

    /// The VDI uuid of `<uuid>.vhd` or `<uuid>.raw`.
    #[must_use]
    pub fn uuid(&self) -> Option<uuid::Uuid> {
        let stem = self.0.strip_suffix(".vhd").or_else(|| self.0.strip_suffix(".raw"))?;
        if stem.len() != 36 {
            return None;
        }
        uuid::Uuid::try_parse(stem).ok()
    }

    /// Whether the name says raw. The format of a volume comes from its name,
    /// never from its bytes (invariant 10).
    #[must_use]
    pub fn is_raw(&self) -> bool {
        self.0.ends_with(".raw")
    }

    /// The name itself.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Display for VolumeName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// The set of volumes of one repository, and its small durable records.
///
/// Name changes are atomic each, but for [`Volumes::swap`], and durable after
/// [`Volumes::sync`].
pub trait Volumes: Send + Sync + Debug {
    /// All image volumes, temporaries included, sorted by name.
    fn list(&self) -> io::Result<Vec<VolumeName>>;
    /// A new, empty volume, locked for writing.
    fn create(&self, name: &VolumeName) -> io::Result<Arc<dyn Volume>>;
    /// Opens a volume; see [`Access`].
    fn open(&self, name: &VolumeName, access: Access) -> io::Result<Arc<dyn Volume>>;
    /// A volume gets another name, which must be free (a file's may have been
    /// given to it before).
    fn rename(&self, from: &VolumeName, to: &VolumeName) -> io::Result<()>;
    /// Prepares a swap in which the volume called `over` must not get lost:
    /// where volumes can have two names, `aside` becomes its second one.
    fn lay_aside(&self, over: &VolumeName, aside: &VolumeName) -> io::Result<()>;
    /// `new` takes the name `over`; what had it is called `aside` from then on.
    ///
    /// Where names can be replaced this is one step, and who did not
    /// [lay it aside](Volumes::lay_aside) loses it. Else it is two: `over`
    /// becomes `aside`, then `new` becomes `over`. So whoever swaps has
    /// recorded that before, takes a missing `over` for the state between, and
    /// calls this again to go on from there. Who has no use for `aside`
    /// deletes it afterwards.
    fn swap(&self, new: &VolumeName, over: &VolumeName, aside: &VolumeName) -> io::Result<()>;
    /// Removes a name; fine if it is gone already.
    fn delete(&self, name: &VolumeName) -> io::Result<()>;
    /// Whether both names lead to one volume.
    fn same(&self, a: &VolumeName, b: &VolumeName) -> io::Result<bool>;
    /// Makes name changes durable.
    fn sync(&self, why: Why) -> io::Result<()>;
    /// Room for more.
    fn space(&self) -> io::Result<Space>;
    /// What tells whether a volume has changed; `None` where nothing does.
    fn stamp(&self, _name: &VolumeName) -> io::Result<Option<Stamp>> {
        Ok(None)
    }

    /// Names of all records, sorted. A record that is found need not be durable
    /// yet, if its writer died on the way: call [`Volumes::sync_records`]
    /// before changing anything because of it.
    fn records(&self) -> io::Result<Vec<String>>;
    /// A record's bytes; `None` if it is not there.
    fn record(&self, name: &str) -> io::Result<Option<Vec<u8>>>;
    /// Writes a record, replacing it whole; durable when this returns.
    fn put_record(&self, name: &str, bytes: &[u8], why: Why) -> io::Result<()>;
    /// Renames a record if it is there; of two racing renames of one record
    /// just one finds it. Atomic, but durable only after
    /// [`Volumes::sync_records`]. Returns whether it was there.
    fn rename_record(&self, from: &str, to: &str) -> io::Result<bool>;
    /// Removes a record if it is there; durable when this returns.
    fn delete_record(&self, name: &str, why: Why) -> io::Result<()>;
    /// Makes renames of records durable.
    fn sync_records(&self, why: Why) -> io::Result<()>;
}

#[cfg(test)]
mod tests;
