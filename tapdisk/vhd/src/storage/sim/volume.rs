//! An open simulated file.

use std::any::Any;
use std::io;
use std::os::fd::BorrowedFd;

use super::super::{CopyKind, Volume, Why};
use super::devices::EXTENT;
use super::disk::SimDisk;
use super::effect::{Ino, Lasting};
use super::log::What;
use super::sabotage::{OpClass, Step};
use super::sector::SECTOR;
use crate::units::BLOCK_BYTES;

/// An open simulated file.
#[derive(Debug)]
pub struct SimVolume {
    pub(super) disk: SimDisk,
    pub(super) ino: Ino,
    /// The lock, if opened for writing.
    pub(super) token: Option<u64>,
}

impl Drop for SimVolume {
    fn drop(&mut self) {
        self.disk.with(|live| {
            if let Some(token) = self.token {
                live.unlock(self.ino, token);
            }
            if let Some(count) = live.open.get_mut(&self.ino) {
                *count -= 1;
                if *count == 0 {
                    live.open.remove(&self.ino);
                }
            }
        });
    }
}

impl SimVolume {
    /// Refuses what a descriptor opened for reading refuses.
    pub(super) fn writable(&self) -> io::Result<()> {
        match self.token {
            Some(_) => Ok(()),
            None => Err(io::Error::from_raw_os_error(nix::libc::EBADF)),
        }
    }

    fn resize_device(&self, len: u64) -> io::Result<()> {
        self.change(What::Lasting(Lasting::Resize { ino: self.ino, len }), "resize device")
    }

    fn change(&self, what: What, why: Why) -> io::Result<()> {
        self.writable()?;
        self.disk.change(what, why)
    }
}

impl Volume for SimVolume {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.disk.with(|live| {
            live.alive(self.disk.process)?;
            live.fault(OpClass::Read)?;
            match live.state.content(self.ino).read(buf, offset) {
                true => Ok(()),
                false => Err(io::ErrorKind::UnexpectedEof.into()),
            }
        })
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        if buf.is_empty() {
            return Ok(());
        }
        self.change(What::Write { ino: self.ino, offset, bytes: buf.into() }, "write")
    }

    // Unlike the other changes a flush needs no write access, as fdatasync.
    fn flush(&self, why: Why) -> io::Result<()> {
        self.disk.change(What::Flush { ino: self.ino }, why)
    }

    fn len(&self) -> io::Result<u64> {
        self.disk.with(|live| {
            live.alive(self.disk.process)?;
            Ok(live.state.content(self.ino).len)
        })
    }

    fn set_len(&self, len_bytes: u64) -> io::Result<()> {
        self.change(What::SetLen { ino: self.ino, len: len_bytes }, "set length")
    }

    fn extend(&self, len_bytes: u64) -> io::Result<()> {
        let now = self.len()?;
        match self.is_device() {
            _ if now >= len_bytes => Ok(()),
            true => self.resize_device(len_bytes.next_multiple_of(EXTENT)),
            false => self.set_len(len_bytes),
        }
    }

    fn reduced_len(&self, len_bytes: u64) -> io::Result<u64> {
        match self.is_device() {
            true => Ok(len_bytes.next_multiple_of(EXTENT).min(self.len()?)),
            false => Ok(len_bytes),
        }
    }

    fn reduce(&self, len_bytes: u64) -> io::Result<()> {
        let (now, then) = (self.len()?, self.reduced_len(len_bytes)?);
        match self.is_device() {
            true if then < now => self.resize_device(then),
            true => Ok(()),
            false => self.set_len(len_bytes),
        }
    }

    fn zero(&self, offset: u64, len_bytes: u64) -> io::Result<()> {
        let what = What::Zero { ino: self.ino, offset, len: len_bytes, keep: false };
        self.change(what, "zero")
    }

    fn zero_keeping_space(&self, offset: u64, len_bytes: u64) -> io::Result<()> {
        let what = What::Zero { ino: self.ino, offset, len: len_bytes, keep: true };
        self.change(what, "zero, keeping space")
    }

    fn copy_from(
        &self,
        source: &dyn Volume,
        source_offset: u64,
        offset: u64,
        len_bytes: u64,
    ) -> io::Result<CopyKind> {
        let Some(source) = source.as_any().downcast_ref::<Self>() else {
            let mut bytes = vec![0; usize::try_from(len_bytes).unwrap_or(0)];
            source.read_at(&mut bytes, source_offset)?;
            self.write_at(&bytes, offset)?;
            return Ok(CopyKind::Copied);
        };
        let (from, from_at) = (source.ino, source_offset);
        let (to, to_at) = (self.ino, offset);
        let several = len_bytes > BLOCK_BYTES;
        let short = several
            && self.disk.with(|live| live.family.meets(Step::Neighbours, "a copy of blocks side by side"));
        let len = if short { BLOCK_BYTES } else { len_bytes };
        self.change(What::Copy { from, from_at, to, to_at, len }, "copy")?;
        Ok(copy_kind(from_at, to_at, len_bytes))
    }

    fn allocated(&self) -> io::Result<u64> {
        self.disk.with(|live| {
            live.alive(self.disk.process)?;
            Ok(live.state.content(self.ino).allocated() * SECTOR)
        })
    }

    fn is_device(&self) -> bool {
        self.disk.with(|live| live.state.devices.contains(&self.ino))
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// What a filesystem with 4 KiB blocks that shares extents would answer.
pub(super) fn copy_kind(from_at: u64, to_at: u64, len: u64) -> CopyKind {
    match [from_at, to_at, len].iter().all(|n| n.is_multiple_of(4096)) && len > 0 {
        true => CopyKind::Cloned,
        false => CopyKind::Copied,
    }
}
