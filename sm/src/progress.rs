//! How far a long operation is, and whether it is to stop.
//!
//! An operation adds what it has done and asks now and then whether to go on.
//! Without a clock, so that the crash simulator runs the same code; rates are
//! made of it in [`crate::jobs`].

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::error::{Error, Result};

/// Shared between an operation and those who watch it.
#[derive(Debug, Default)]
pub struct Progress {
    done_bytes: AtomicU64,
    /// 0 while nobody knows.
    total_bytes: AtomicU64,
    cancelled: AtomicBool,
}

impl Progress {
    /// Says how much there is to do in all.
    pub fn expect(&self, total_bytes: u64) {
        self.total_bytes.store(total_bytes, Ordering::Relaxed);
    }

    /// So much more is done.
    pub fn add(&self, bytes: u64) {
        self.done_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Bytes done.
    #[must_use]
    pub fn done_bytes(&self) -> u64 {
        self.done_bytes.load(Ordering::Relaxed)
    }

    /// Bytes to do in all, once that is known.
    #[must_use]
    pub fn total_bytes(&self) -> Option<u64> {
        match self.total_bytes.load(Ordering::Relaxed) {
            0 => None,
            total => Some(total),
        }
    }

    /// Asks the operation to stop and to leave nothing behind.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }

    /// Whether to go on: to be asked at least once per block moved.
    ///
    /// # Errors
    /// [`Error::Cancelled`].
    pub fn go_on(&self) -> Result<()> {
        if self.cancelled.load(Ordering::Relaxed) { Err(Error::Cancelled) } else { Ok(()) }
    }
}
