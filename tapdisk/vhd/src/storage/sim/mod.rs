//! The crash simulator: a machine that remembers every operation and can be
//! asked for any state a crash could leave.
//!
//! ```text
//!   code under test                       scenario
//!     | Volumes, Fs, Volume                 | mark, sabotage, inject
//!     | begin/complete (in flight)          | crash(prefix, kind, strategy)
//!     v                                     v
//!   SimDisk --- Live: state + log ------ Cursor: state at any prefix
//!     |           |                         |
//!   SimRun     State: names, files       crash.rs: keeps or loses each unit
//!   (memory)    volatile / pending /        |
//!               durable / in flight         v
//!                                        a fresh SimDisk, to recover on
//! ```
//!
//! | file | what |
//! |---|---|
//! | `sector` | bytes of a file, cheap to copy, hashed as they change |
//! | `effect` | what operations do, in pieces a crash can keep or lose |
//! | `state` | everything at one instant, and the one transition |
//! | `log` | events, and walking along them |
//! | `live` | the running machine: locks, limits, faults |
//! | `disk`, `volume` | the handles: [`Fs`](super::Fs) and [`Volume`](super::Volume) |
//! | `devices` | a repository whose volumes are devices |
//! | `flight` | operations in flight, completed in any order |
//! | `run` | memory that survives a process but not the power |
//! | `crash` | the states a crash can leave |
//! | `explore` | going through all of them |
//! | `sabotage` | steps left out, operations that fail |
//!
//! What is assumed of a real machine: a sector is written whole or not at
//! all; a rename is atomic; a flush covers what completed before it began,
//! and no names; a sync of names covers no bytes; a lock is only free again
//! once nothing its holder began is in flight. A folder is durable once
//! made, because the real one syncs its parent at once. What a volume manager
//! does (make, resize, rename and remove a device, keep a record) is
//! indivisible and durable once it shows, as it promises.
//!
//! Absent on purpose: time, and any knowledge of VHD.

use std::sync::{Mutex, MutexGuard, PoisonError};

mod crash;
mod devices;
mod disk;
mod effect;
mod explore;
mod flight;
mod live;
mod log;
mod run;
mod sabotage;
mod sector;
mod state;
mod volume;

pub use crash::{CrashKind, Strategy};
pub use disk::SimDisk;
pub use explore::{Crashed, Effort, Seen, Tally};
pub use flight::{SimDone, SimFile, SimOp, SimRequest};
pub use run::{SimBuffer, SimRun};
pub use sabotage::{Fault, OpClass, Sabotage, Step};
pub use volume::SimVolume;

/// A panic in a test must not hide behind a poisoned lock.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
