//! An image in memory, and a record of what was done to it.

use std::any::Any;
use std::io::{Error, ErrorKind, Result};
use std::os::fd::BorrowedFd;
use std::sync::{Mutex, MutexGuard, PoisonError};

use vhd::storage::{CopyKind, Volume, Why};

/// No test image grows past this; a hostile one must not make it.
const BYTES_MAX: u64 = 64 << 20;

/// One operation, as it reached the volume.
#[derive(Debug, Clone)]
pub enum Op {
    /// Bytes written at an offset.
    Write(u64, Vec<u8>),
    /// A new length.
    SetLen(u64),
    /// Everything before is durable.
    Flush,
}

/// Bytes, and every operation since the volume was made.
#[derive(Debug, Default)]
pub struct Mem {
    inner: Mutex<(Vec<u8>, Vec<Op>)>,
    device: bool,
}

impl Mem {
    /// A file with this content.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self { inner: Mutex::new((bytes, Vec::new())), device: false }
    }

    /// A device with this content.
    #[allow(dead_code, reason = "the fuzz targets share this file")]
    pub fn device(bytes: Vec<u8>) -> Self {
        Self { device: true, ..Self::new(bytes) }
    }

    /// Content as it is now.
    #[allow(dead_code, reason = "the fuzz targets share this file")]
    pub fn bytes(&self) -> Vec<u8> {
        self.lock().0.clone()
    }

    /// Everything done to it.
    #[allow(dead_code, reason = "the fuzz targets share this file")]
    pub fn ops(&self) -> Vec<Op> {
        self.lock().1.clone()
    }

    fn lock(&self) -> MutexGuard<'_, (Vec<u8>, Vec<Op>)> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Does an operation to bytes.
pub fn apply(bytes: &mut Vec<u8>, op: &Op) {
    match op {
        Op::Write(offset, data) => {
            let from = usize::try_from(*offset).unwrap_or(usize::MAX);
            let end = from.saturating_add(data.len());
            if bytes.len() < end {
                bytes.resize(end, 0);
            }
            bytes[from..end].copy_from_slice(data);
        }
        Op::SetLen(len) => bytes.resize(usize::try_from(*len).unwrap_or(usize::MAX), 0),
        Op::Flush => {}
    }
}

impl Volume for Mem {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let inner = self.lock();
        let from = usize::try_from(offset).ok();
        let range = from.and_then(|from| Some(from..from.checked_add(buf.len())?));
        let data = range.and_then(|range| inner.0.get(range)).ok_or(ErrorKind::UnexpectedEof)?;
        buf.copy_from_slice(data);
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        let end = offset.checked_add(buf.len() as u64).ok_or(ErrorKind::FileTooLarge)?;
        let mut inner = self.lock();
        if end > BYTES_MAX || (self.device && end > inner.0.len() as u64) {
            return Err(ErrorKind::FileTooLarge.into());
        }
        let op = Op::Write(offset, buf.to_vec());
        apply(&mut inner.0, &op);
        inner.1.push(op);
        Ok(())
    }

    fn flush(&self, _why: Why) -> Result<()> {
        self.lock().1.push(Op::Flush);
        Ok(())
    }

    fn len(&self) -> Result<u64> {
        Ok(self.lock().0.len() as u64)
    }

    fn set_len(&self, len_bytes: u64) -> Result<()> {
        if self.device {
            return Err(ErrorKind::Unsupported.into());
        }
        if len_bytes > BYTES_MAX {
            return Err(ErrorKind::FileTooLarge.into());
        }
        let mut inner = self.lock();
        let op = Op::SetLen(len_bytes);
        apply(&mut inner.0, &op);
        inner.1.push(op);
        Ok(())
    }

    fn zero(&self, offset: u64, len_bytes: u64) -> Result<()> {
        let len = self.len()?;
        let end = offset.saturating_add(len_bytes).min(len);
        match end.checked_sub(offset) {
            None | Some(0) => Ok(()),
            Some(bytes) => self.write_at(&vec![0; usize::try_from(bytes).unwrap_or(0)], offset),
        }
    }

    fn copy_from(&self, source: &dyn Volume, from: u64, offset: u64, len_bytes: u64) -> Result<CopyKind> {
        let bytes = usize::try_from(len_bytes).map_err(Error::other)?;
        let mut data = vec![0; bytes];
        source.read_at(&mut data, from)?;
        self.write_at(&data, offset)?;
        Ok(CopyKind::Copied)
    }

    fn allocated(&self) -> Result<u64> {
        self.len()
    }

    fn is_device(&self) -> bool {
        self.device
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
