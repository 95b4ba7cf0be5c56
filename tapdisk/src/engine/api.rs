//! What goes into the engine and what comes out of it.

use std::sync::Arc;

use vhd::storage::{CopyRange, VolumeName, Why};

/// A guest request, as any front end hands it in. The engine knows no NBD:
/// it never sees the data, only which bytes of the request's buffer an
/// operation moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// Chosen by the driver, unique among requests in flight.
    pub id: RequestId,
    /// What is asked.
    pub kind: RequestKind,
    /// First byte on the virtual disk, a multiple of 512.
    pub offset: u64,
    /// Bytes, a multiple of 512. 0 for a flush.
    pub len: u32,
}

/// Names a guest request in flight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub u64);

/// Kinds of guest request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RequestKind {
    /// Fill the request's buffer.
    Read,
    /// Write the request's buffer.
    Write {
        /// Durable before it is answered.
        fua: bool,
    },
    /// The range reads as zeros afterwards.
    WriteZeroes {
        /// Durable before it is answered.
        fua: bool,
        /// Keep the space.
        no_hole: bool,
    },
    /// The range is not needed any more (reads as zeros afterwards, here).
    Trim {
        /// Durable before it is answered.
        fua: bool,
    },
    /// Everything answered before this becomes durable.
    Flush,
    /// Which runs are data, zero, and at which depth: answered with
    /// [`Output::Extents`], perhaps for less than was asked.
    BlockStatus,
    /// The range will be read soon.
    Cache,
}

/// An open volume in the driver's table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileId(pub u32);

/// Names an operation in flight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OpId(pub u64);

/// Bytes of a guest request's buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BufferRange {
    /// Whose buffer.
    pub request: RequestId,
    /// First byte in it.
    pub at: u32,
    /// Bytes.
    pub len: u32,
}

/// Something the driver does, in any order relative to other operations in
/// flight. Whatever must come after another operation is only started once
/// that one completed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    /// Reads from a file into a guest buffer.
    ReadGuest {
        /// From.
        file: FileId,
        /// Byte offset in the file.
        offset: u64,
        /// Into.
        into: BufferRange,
    },
    /// Writes from a guest buffer.
    WriteGuest {
        /// To.
        file: FileId,
        /// Byte offset in the file.
        offset: u64,
        /// From.
        from: BufferRange,
    },
    /// Reads metadata; completes with [`Completion::Bytes`].
    ReadMeta {
        /// From.
        file: FileId,
        /// Byte offset in the file.
        offset: u64,
        /// Bytes.
        len: u32,
    },
    /// Reads pieces of metadata of one length; completes with
    /// [`Completion::Bytes`], one piece after the other.
    ReadPages {
        /// From.
        file: FileId,
        /// Where each begins in the file, in bytes.
        offsets: Arc<[u64]>,
        /// Bytes of each.
        len: u32,
    },
    /// Writes pieces of metadata, in no order that counts.
    WriteMeta {
        /// To.
        file: FileId,
        /// Where each begins in the file, in bytes, and its bytes.
        parts: Vec<(u64, Arc<[u8]>)>,
        /// Names the step.
        why: Why,
    },
    /// Copies ranges between files, in any order; none of them overlap where
    /// they go. Completes with [`Completion::Copied`].
    Copy {
        /// From this file.
        from: FileId,
        /// To this file.
        to: FileId,
        /// Where from, where to, and how much.
        ranges: Arc<[CopyRange]>,
        /// Whether extents of long ranges are to be shared, where the
        /// filesystem can.
        share: bool,
    },
    /// Makes a range read as zeros, giving the space back unless `keep`.
    Zero {
        /// The file.
        file: FileId,
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
        /// Keep the space allocated.
        keep: bool,
        /// Names the step.
        why: Why,
    },
    /// Makes a volume longer, for writes all over what it gains: see
    /// [`vhd::storage::Volume::extend_with_room`].
    Extend {
        /// The volume.
        file: FileId,
        /// Bytes it has at least afterwards.
        len: u64,
    },
    /// Makes everything completed before its start durable.
    Flush {
        /// The file.
        file: FileId,
        /// Names the step.
        why: Why,
    },
    /// A volume takes another's name: see [`vhd::storage::Volumes::swap`].
    Swap {
        /// The one that takes the name.
        new: VolumeName,
        /// The name taken.
        over: VolumeName,
        /// What the one that had it is called then.
        aside: VolumeName,
        /// Names the step.
        why: Why,
    },
    /// Makes renames durable.
    SyncNames {
        /// Names the step.
        why: Why,
    },
}

/// How an operation ended. The error is an errno.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Completion {
    /// Done.
    Done,
    /// A read of metadata.
    Bytes(Vec<u8>),
    /// A copy.
    Copied {
        /// Bytes of it that share extents with their source.
        shared_bytes: u64,
    },
    /// Failed with this errno.
    Failed(i32),
}

/// A run of a block-status answer, in order, covering the request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Bytes.
    pub len: u64,
    /// Level of the chain that has it, 1 = leaf; 0 = nobody, it reads as zeros.
    pub depth: u32,
}

/// What the driver is to do.
#[derive(Debug)]
pub enum Output {
    /// Start an operation.
    Start(OpId, Op),
    /// Fill part of a guest buffer with zeros, now.
    ZeroFill(BufferRange),
    /// Answer a guest request; its buffer is free again. The error is an errno.
    Done(RequestId, Result<(), i32>),
    /// The answer to a block-status request, before its `Done`.
    Extents(RequestId, Vec<Extent>),
    /// Close a file: nothing will use it any more.
    Close(FileId),
    /// A command was carried out or refused.
    Answer(super::Token, Result<super::CommandReply, super::CommandError>),
}
