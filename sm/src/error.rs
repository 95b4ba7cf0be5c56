//! What can go wrong, with the stable codes of the API.

use std::io;

use vhd::storage::VolumeName;

/// Shorthand for results of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a request was refused or failed. [`Error::code`] is what programs
/// match on; the message is for the operator and names what it is about.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No SR or VDI of that uuid or name.
    #[error("there is no {what}")]
    NotFound {
        /// What was looked for.
        what: String,
    },
    /// A name that several have.
    #[error("{what} is ambiguous: use the uuid")]
    Ambiguous {
        /// What was looked for.
        what: String,
    },
    /// It is there already.
    #[error("{what} exists already")]
    Exists {
        /// What.
        what: String,
    },
    /// Attached, or otherwise in use.
    #[error("{what} is in use: {reason}")]
    InUse {
        /// What.
        what: String,
        /// By whom.
        reason: String,
    },
    /// In use in a way that detaching the VDI does not end.
    #[error("{what} is in use: {reason}")]
    Held {
        /// What.
        what: String,
        /// By whom.
        reason: String,
        /// What ends it.
        next: &'static str,
    },
    /// No room on the repository.
    #[error("no space left on the repository: {what}")]
    NoSpace {
        /// What was being written.
        what: String,
    },
    /// One more node would exceed the chain limit.
    #[error(
        "the chain of {vdi} has {depth} images; the limit is {depth_max}: let the garbage collector run first"
    )]
    ChainTooLong {
        /// Whose chain.
        vdi: uuid::Uuid,
        /// Images in it now.
        depth: u32,
        /// Most it may have.
        depth_max: u32,
    },
    /// A size out of range.
    #[error("bad size: {reason}")]
    BadSize {
        /// What is wrong.
        reason: String,
    },
    /// An image that cannot be read or is inconsistent.
    #[error("image {volume} is broken: {reason}")]
    BadImage {
        /// Which.
        volume: VolumeName,
        /// Exactly why.
        reason: String,
    },
    /// The parent of an image is not in the repository.
    #[error("image {volume}: its parent {parent} is missing")]
    MissingParent {
        /// Which image.
        volume: VolumeName,
        /// What its header names.
        parent: String,
    },
    /// A parent locator that leads out of the repository (invariant 10).
    #[error("image {volume}: its parent lies outside the repository")]
    ParentOutside {
        /// Which image.
        volume: VolumeName,
    },
    /// The SR is not attached on this host.
    #[error("SR {sr} is not attached")]
    SrDetached {
        /// Which.
        sr: String,
    },
    /// Another host, or this one under another state folder, uses the SR.
    #[error("the repository is in use: {holder}")]
    SrInUse {
        /// By whom.
        holder: String,
    },
    /// A change to something read-only.
    #[error("{what} is read-only")]
    ReadOnly {
        /// What.
        what: String,
    },
    /// Something that must run does not.
    #[error("{what} does not run: {reason}")]
    NotRunning {
        /// What.
        what: String,
        /// How that showed.
        reason: String,
    },
    /// Another operation is under way; trying again later can succeed.
    #[error("busy: {reason}")]
    Busy {
        /// Which operation.
        reason: String,
    },
    /// A disk whose decided snapshot cannot be finished: guests wait.
    #[error("VDI {vdi} stands still in the middle of a snapshot: {reason}")]
    Stuck {
        /// The disk.
        vdi: uuid::Uuid,
        /// Which image cannot take which name, and why.
        reason: String,
    },
    /// A stream that no image can be made of.
    #[error("the stream is no usable image: {reason}")]
    BadStream {
        /// Exactly why.
        reason: String,
    },
    /// A delta and a base that do not belong together.
    #[error("the base does not fit: {reason}")]
    WrongBase {
        /// What stands on what.
        reason: String,
    },
    /// Somebody asked it to stop; nothing of it is left.
    #[error("cancelled: nothing was changed")]
    Cancelled,
    /// Not offered.
    #[error("not supported: {what}")]
    Unsupported {
        /// What.
        what: String,
    },
    /// A request that makes no sense.
    #[error("bad request: {reason}")]
    BadRequest {
        /// What is wrong.
        reason: String,
    },
    /// A journal record that this version cannot read. Nothing may change
    /// in its SR before an operator has looked.
    #[error("journal record {record} cannot be read: {reason}")]
    Journal {
        /// Its name.
        record: String,
        /// Why.
        reason: String,
    },
    /// The catalog (labels) failed; data is not concerned.
    #[error("catalog: {0}")]
    Catalog(String),
    /// Input or output failed.
    #[error("{what}: {source}")]
    Io {
        /// What was being done.
        what: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// What to do about a disk that stands still.
pub const STUCK_NEXT: &str = "make room on the SR, or mend its filesystem: the disk goes on by itself \
    within some minutes, or at once when any operation on it is asked for; until then its guest waits";

impl Error {
    /// The stable upper-case word of the API.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::NotFound { .. } => "NOT_FOUND",
            Self::Ambiguous { .. } => "AMBIGUOUS",
            Self::Exists { .. } => "EXISTS",
            Self::InUse { .. } | Self::Held { .. } => "IN_USE",
            Self::NoSpace { .. } => "NO_SPACE",
            Self::ChainTooLong { .. } => "CHAIN_TOO_LONG",
            Self::BadSize { .. } => "BAD_SIZE",
            Self::BadImage { .. } => "BAD_IMAGE",
            Self::MissingParent { .. } => "MISSING_PARENT",
            Self::ParentOutside { .. } => "PARENT_OUTSIDE_SR",
            Self::SrDetached { .. } => "SR_DETACHED",
            Self::SrInUse { .. } => "SR_IN_USE",
            Self::ReadOnly { .. } => "READ_ONLY",
            Self::NotRunning { .. } => "NOT_RUNNING",
            Self::Busy { .. } => "BUSY",
            Self::BadStream { .. } => "BAD_IMAGE",
            Self::WrongBase { .. } => "WRONG_BASE",
            Self::Cancelled => "CANCELLED",
            Self::Unsupported { .. } => "UNSUPPORTED",
            Self::BadRequest { .. } => "BAD_REQUEST",
            Self::Journal { .. } => "BAD_JOURNAL",
            Self::Catalog(_) | Self::Io { .. } | Self::Stuck { .. } => "IO_ERROR",
        }
    }

    /// What to do next, where the code alone does not tell.
    #[must_use]
    pub fn next(&self) -> Option<&'static str> {
        match self {
            Self::Held { next, .. } => Some(next),
            Self::Stuck { .. } => Some(STUCK_NEXT),
            Self::BadStream { .. } => Some(
                "nothing was imported: check the file and the form (`--format`), or make the export again",
            ),
            _ => None,
        }
    }

    /// An I/O error while doing `what`; a full or read-only repository and a
    /// lock that somebody holds are told apart.
    pub fn io(what: impl Into<String>, source: io::Error) -> Self {
        let what = what.into();
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::NoSpace { what },
            io::ErrorKind::ReadOnlyFilesystem => Self::ReadOnly { what },
            io::ErrorKind::WouldBlock => Self::Busy { reason: format!("{what}: somebody holds it") },
            _ => Self::Io { what, source },
        }
    }

    /// Whether trying again later can succeed without anybody's help.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        matches!(self, Self::Busy { .. })
    }
}

/// Says what was being done when an I/O error came up.
pub trait IoContext<T> {
    /// Turns the error into [`Error::io`] with this text.
    ///
    /// # Errors
    /// The error, with its context.
    fn during(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T> IoContext<T> for io::Result<T> {
    fn during(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|source| Error::io(what(), source))
    }
}
