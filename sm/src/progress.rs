//! How far a long operation is, and whether it is to stop.
//!
//! An operation adds what it has done and asks now and then whether to go on.
//! Without a clock, so that the crash simulator runs the same code; rates are
//! made of it in [`crate::jobs`].

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::error::{Error, Result};

/// Shared between an operation and those who watch it.
#[derive(Debug, Default)]
pub struct Progress {
    done_bytes: AtomicU64,
    /// 0 while nobody knows.
    total_bytes: AtomicU64,
    cancelled: AtomicBool,
    stage: Mutex<Stage>,
    /// Somebody said to proceed, or to stop.
    told: Condvar,
}

#[derive(Debug, Default)]
struct Stage {
    reached: Option<&'static str>,
    proceed: bool,
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
        let _stage = self.stage_lock();
        self.cancelled.store(true, Ordering::Relaxed);
        self.told.notify_all();
    }

    /// A point that others wait for has been passed.
    pub fn reach(&self, stage: &'static str) {
        self.stage_lock().reached = Some(stage);
    }

    /// The last such point.
    #[must_use]
    pub fn stage(&self) -> Option<&'static str> {
        self.stage_lock().reached
    }

    /// Says that an operation that holds may go on.
    pub fn proceed(&self) {
        self.stage_lock().proceed = true;
        self.told.notify_all();
    }

    /// Reaches a point and waits there for [`Self::proceed`].
    ///
    /// # Errors
    /// [`Error::Cancelled`], [`Error::Busy`] when nobody says so in time.
    pub fn hold(&self, at: &'static str, limit: Duration) -> Result<()> {
        self.reach(at);
        let waits = |stage: &mut Stage| !stage.proceed && !self.cancelled.load(Ordering::Relaxed);
        let waited = self.told.wait_timeout_while(self.stage_lock(), limit, waits);
        let (stage, _) = waited.unwrap_or_else(PoisonError::into_inner);
        let proceed = stage.proceed;
        drop(stage);
        self.go_on()?;
        let late =
            || Error::Busy { reason: format!("nobody told it to proceed within {} s", limit.as_secs()) };
        if proceed { Ok(()) } else { Err(late()) }
    }

    fn stage_lock(&self) -> MutexGuard<'_, Stage> {
        self.stage.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether to go on: to be asked at least once per block moved.
    ///
    /// # Errors
    /// [`Error::Cancelled`].
    pub fn go_on(&self) -> Result<()> {
        if self.cancelled.load(Ordering::Relaxed) { Err(Error::Cancelled) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_holds_goes_on_when_told_and_not_for_ever() {
        let long = Duration::from_secs(60);
        let progress = Progress::default();
        std::thread::scope(|scope| {
            let held = scope.spawn(|| progress.hold("ready", long));
            progress.proceed();
            held.join().unwrap().unwrap();
        });
        assert_eq!(progress.stage(), Some("ready"));
        let progress = Progress::default();
        let late = progress.hold("ready", Duration::from_millis(1)).unwrap_err();
        assert_eq!(late.code(), "BUSY");
        std::thread::scope(|scope| {
            let held = scope.spawn(|| progress.hold("ready", long));
            progress.cancel();
            assert_eq!(held.join().unwrap().unwrap_err().code(), "CANCELLED");
        });
    }
}
