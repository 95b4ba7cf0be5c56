//! What a job needs from outside: time, pace, and somebody to tell. Jobs
//! have no clock, no sleep and no log of their own, so that the crash
//! simulator can run them whole.

use std::time::Duration;

/// The job was told to stop. Whatever it had begun is settled; its record
/// tells whether it is to be carried on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Aborted;

/// Something a job did, in bytes of data blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// At most this much is going to be copied.
    Total(u64),
    /// Written to the parent.
    Copied {
        /// Bytes.
        bytes: u64,
        /// Whether extents were shared instead.
        cloned: bool,
    },
    /// Looked at and found to be zeros that need no block.
    Dropped(u64),
    /// The parent has durably what was copied.
    Durable,
    /// Blocks the parent gained.
    Gained(u64),
    /// Blocks that are gone from their image.
    Freed(u64),
    /// Extra room that was needed for a moment and is given back.
    Peak(u64),
    /// Space was given back before all was copied, as there is not enough.
    Slice,
}

/// A job's outside world.
pub trait Watch: Send + Sync {
    /// Time since some fixed moment.
    fn now(&self) -> Duration;
    /// Lets time pass.
    ///
    /// # Errors
    /// [`Aborted`], as soon as that is known.
    fn sleep(&self, time: Duration) -> Result<(), Aborted>;
    /// Called before every block: waits until `bytes` may be copied.
    ///
    /// # Errors
    /// [`Aborted`].
    fn allow(&self, bytes: u64) -> Result<(), Aborted>;
    /// Takes note.
    fn note(&self, event: Event);
    /// Bytes per second for a merge that its tapdisk runs; 0 is no limit.
    fn rate(&self) -> u64;
    /// Such a merge moved so many bytes: others have that much less.
    fn moved(&self, _bytes: u64) {}
}

/// Sums of events.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Ledger {
    /// Bytes to be copied, at most.
    pub total: u64,
    /// Bytes of that which are done, dropped ones included.
    pub done: u64,
    /// Bytes read and written.
    pub copied: u64,
    /// Bytes shared.
    pub cloned: u64,
    /// Bytes blocks were gained for.
    pub gained: u64,
    /// Bytes of blocks that are gone.
    pub freed: u64,
    /// Most extra bytes in use at any moment.
    pub peak: u64,
    /// Times space was given back on the way.
    pub slices: u64,
}

impl Ledger {
    /// Adds an event.
    pub fn note(&mut self, event: Event) {
        match event {
            Event::Total(bytes) => self.total += bytes,
            Event::Copied { bytes, cloned } => {
                self.done += bytes;
                *(if cloned { &mut self.cloned } else { &mut self.copied }) += bytes;
            }
            Event::Dropped(bytes) => self.done += bytes,
            Event::Durable => {}
            Event::Gained(bytes) => {
                self.gained += bytes;
                self.peak = self.peak.max(self.extra());
            }
            Event::Freed(bytes) => self.freed += bytes,
            Event::Peak(bytes) => self.peak = self.peak.max(self.extra() + bytes),
            Event::Slice => self.slices += 1,
        }
    }

    /// Adds what another job did.
    pub fn add(&mut self, other: &Self) {
        self.total += other.total;
        self.done += other.done;
        self.copied += other.copied;
        self.cloned += other.cloned;
        self.gained += other.gained;
        self.freed += other.freed;
        self.peak += other.peak;
        self.slices += other.slices;
    }

    /// Bytes of blocks that went away on balance.
    #[must_use]
    pub fn net_freed(&self) -> u64 {
        self.freed.saturating_sub(self.gained)
    }

    fn extra(&self) -> u64 {
        self.gained.saturating_sub(self.freed)
    }
}

/// A watch for tests and simulations: time passes only by sleeping, nothing
/// is limited.
#[derive(Debug, Default)]
pub struct Unhurried {
    /// What happened.
    pub ledger: std::sync::Mutex<Ledger>,
    slept: std::sync::Mutex<Duration>,
}

impl Watch for Unhurried {
    fn now(&self) -> Duration {
        *self.slept.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn sleep(&self, time: Duration) -> Result<(), Aborted> {
        *self.slept.lock().unwrap_or_else(std::sync::PoisonError::into_inner) += time;
        Ok(())
    }

    fn allow(&self, _bytes: u64) -> Result<(), Aborted> {
        Ok(())
    }

    fn note(&self, event: Event) {
        self.ledger.lock().unwrap_or_else(std::sync::PoisonError::into_inner).note(event);
    }

    fn rate(&self) -> u64 {
        0
    }
}
