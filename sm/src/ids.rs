//! Fresh uuids and the time, handed in so that a simulated run repeats
//! itself exactly.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use uuid::Uuid;

/// Where operations get uuids and the time from.
pub trait Ids: Send + Sync + std::fmt::Debug {
    /// A uuid nobody has yet.
    fn uuid(&self) -> Uuid;
    /// Seconds since 1970.
    fn now_s(&self) -> u64;
}

/// Random uuids and the system's clock.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemIds;

impl Ids for SystemIds {
    fn uuid(&self) -> Uuid {
        Uuid::new_v4()
    }

    fn now_s(&self) -> u64 {
        SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
    }
}

/// Counts: the same calls give the same answers.
#[derive(Debug)]
pub struct CountedIds {
    next: AtomicU64,
}

impl CountedIds {
    /// Starts at `first`; two counters of one simulated world must not meet.
    #[must_use]
    pub fn from(first: u64) -> Self {
        Self { next: AtomicU64::new(first) }
    }
}

impl Ids for CountedIds {
    fn uuid(&self) -> Uuid {
        let n = self.next.fetch_add(1, Ordering::Relaxed);
        Uuid::from_u64_pair(0xc0bb_1ce0_0000_4000, 0x8000_0000_0000_0000 | n)
    }

    fn now_s(&self) -> u64 {
        1_700_000_000 + self.next.load(Ordering::Relaxed)
    }
}
