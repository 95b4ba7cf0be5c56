//! Operations in flight: begun now, completed later, in any order.
//!
//! For the driver of the data path's engine under the simulator. Between
//! [`SimDisk::begin`] and [`SimDisk::complete`] an operation has no effect on
//! readers, and a crash may leave any part of it.

use std::io;
use std::sync::Arc;

use super::super::{CopyKind, Volume, Why};
use super::devices::EXTENT;
use super::disk::SimDisk;
use super::effect::{Ino, Lasting};
use super::log::{OpNo, What};
use super::sabotage::{OpClass, Step};
use super::volume::{SimVolume, copy_kind};
use crate::units::BLOCK_BYTES;

/// Which file an operation is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SimFile(Ino);

impl SimFile {
    /// The file behind an open volume; `None` if it is not a simulated one.
    #[must_use]
    pub fn of(volume: &dyn Volume) -> Option<Self> {
        volume.as_any().downcast_ref::<SimVolume>().map(|volume| Self(volume.ino))
    }
}

/// What to do. Offsets and lengths are bytes. Write access is the driver's
/// to check.
#[derive(Debug, Clone)]
pub enum SimRequest {
    /// Reads, at the moment of completion.
    Read {
        /// From.
        file: SimFile,
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// Writes.
    Write {
        /// To.
        file: SimFile,
        /// First byte.
        offset: u64,
        /// What.
        bytes: Arc<[u8]>,
    },
    /// Makes a range read as zeros, never changing the length.
    Zero {
        /// Where.
        file: SimFile,
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
        /// Keep the space.
        keep: bool,
    },
    /// Makes a volume longer.
    Extend {
        /// Which.
        file: SimFile,
        /// Bytes it has at least afterwards.
        len: u64,
    },
    /// Copies; reads the source at the moment of completion.
    Copy {
        /// From this file.
        from: SimFile,
        /// At this byte.
        from_offset: u64,
        /// To this file.
        to: SimFile,
        /// At this byte.
        to_offset: u64,
        /// Bytes.
        len: u64,
    },
    /// Makes durable what completed before this was begun.
    Flush {
        /// Which file.
        file: SimFile,
    },
    /// Renames a path over another; a device, to a free one.
    Rename {
        /// The path that goes.
        from: String,
        /// The path that leads there afterwards.
        over: String,
    },
    /// Makes names durable whose change completed before this was begun.
    SyncNames {
        /// `""` for the root.
        folder: String,
    },
}

/// An operation in flight. Dropped without completion it stays in flight for
/// good, as after the death of the process that began it.
#[derive(Debug)]
#[must_use]
pub struct SimOp {
    kind: Kind,
    early: bool,
}

#[derive(Debug)]
enum Kind {
    Read { file: Ino, offset: u64, len: u64 },
    Change { no: OpNo, done: SimDone },
}

impl SimOp {
    /// Sabotaged with [`Sabotage::EarlyCompletion`](super::Sabotage): the
    /// driver is to report it complete ([`SimOp::early_answer`]) now, and to
    /// complete it later without telling anybody.
    #[must_use]
    pub fn early(&self) -> bool {
        self.early
    }

    /// What to report for an operation that is reported early.
    #[must_use]
    pub fn early_answer(&self) -> SimDone {
        match &self.kind {
            Kind::Read { .. } => SimDone::Done,
            Kind::Change { done, .. } => done.clone(),
        }
    }
}

/// How an operation ended well.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SimDone {
    /// Done.
    Done,
    /// A read.
    Bytes(Vec<u8>),
    /// A copy.
    Copied(CopyKind),
}

impl SimDisk {
    /// Begins an operation. `why` labels the wait for its completion: give
    /// the step's own, or a word for its class such as `"guest write"`. Fails
    /// only if the process of this handle is dead.
    pub fn begin(&self, request: SimRequest, why: Why) -> io::Result<SimOp> {
        let mut done = SimDone::Done;
        let what = match request {
            SimRequest::Read { file: SimFile(file), offset, len } => {
                self.with(|live| live.alive(self.process))?;
                return Ok(SimOp { kind: Kind::Read { file, offset, len }, early: false });
            }
            SimRequest::Write { file, offset, bytes } => What::Write { ino: file.0, offset, bytes },
            SimRequest::Zero { file, offset, len, keep } => What::Zero { ino: file.0, offset, len, keep },
            SimRequest::Extend { file: SimFile(ino), len } => match self.with(|live| live.device_len(ino)) {
                None => What::SetLen { ino, len },
                Some(now) => {
                    let len = len.next_multiple_of(EXTENT).max(now);
                    What::Lasting(Lasting::Resize { ino, len })
                }
            },
            SimRequest::Copy { from, from_offset, to, to_offset, len } => {
                done = SimDone::Copied(copy_kind(from_offset, to_offset, len));
                let (from_at, to_at) = (from_offset, to_offset);
                let several = len > BLOCK_BYTES;
                let short = several
                    && self.with(|live| {
                        live.family.meets(Step::Neighbours, "a copy in flight of blocks side by side")
                    });
                let len = if short { BLOCK_BYTES } else { len };
                What::Copy { from: from.0, from_at, to: to.0, to_at, len }
            }
            SimRequest::Flush { file } => What::Flush { ino: file.0 },
            SimRequest::Rename { from, over } if self.has_devices() => {
                What::Lasting(Lasting::Rename { from: from.into(), to: over.into() })
            }
            SimRequest::Rename { from, over } => What::Rename { from: from.into(), to: over.into() },
            SimRequest::SyncNames { folder } => What::SyncNames { folder: folder.into() },
        };
        self.with(|live| {
            let early = live.family.meets(Step::Wait, why);
            let no = live.begin(self.process, what, why)?;
            Ok(SimOp { kind: Kind::Change { no, done }, early })
        })
    }

    /// Completes an operation: its effect happens now, or it fails as set up
    /// (no space, an injected fault) and has none.
    pub fn complete(&self, op: SimOp) -> io::Result<SimDone> {
        self.with(|live| match op.kind {
            Kind::Read { file, offset, len } => {
                live.fault(OpClass::Read)?;
                let len = usize::try_from(len).map_err(|_| io::ErrorKind::InvalidInput)?;
                let mut bytes = vec![0; len];
                match live.state.content(file).read(&mut bytes, offset) {
                    true => Ok(SimDone::Bytes(bytes)),
                    false => Err(io::ErrorKind::UnexpectedEof.into()),
                }
            }
            Kind::Change { no, done } => live.end(no).map(|()| done),
        })
    }
}
