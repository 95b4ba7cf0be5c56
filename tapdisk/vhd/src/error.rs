//! What can be wrong with an image, one kind per thing a caller may do
//! something about.

use crate::storage::VolumeName;

/// Result of everything here.
pub type Result<T> = std::result::Result<T, Error>;

/// Why an image cannot be used. The text is the reason; [`Error::of`] puts the
/// image's name before it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system said no.
    #[error("{0}")]
    Io(#[from] std::io::Error),
    /// Neither end nor front holds a footer.
    #[error("not a VHD: no valid footer at the end or the front")]
    NotVhd,
    /// A footer with a valid checksum says something impossible.
    #[error("bad footer: {reason}")]
    BadFooter {
        /// What.
        reason: &'static str,
    },
    /// The footers at the end and at the front are of different images.
    #[error("the footers at the end and at the front disagree in {what}")]
    FootersDisagree {
        /// In what.
        what: &'static str,
    },
    /// A resize of the reference tools was interrupted; its journal is needed.
    #[error("an interrupted resize left it disabled (v_poison): revert it with its journal")]
    Poisoned,
    /// The dynamic header is wrong.
    #[error("bad header: {reason}")]
    BadHeader {
        /// What.
        reason: &'static str,
    },
    /// The block allocation table is wrong.
    #[error("bad BAT: block {block} at sector {sector}: {reason}")]
    BadBat {
        /// Which entry.
        block: u32,
        /// What it says.
        sector: u32,
        /// Why that cannot be.
        reason: &'static str,
    },
    /// A parent locator is wrong.
    #[error("bad parent locator: {reason}")]
    BadLocator {
        /// What.
        reason: &'static str,
    },
    /// A parent locator leads out of the repository.
    #[error("its parent locator {path:?} leads out of the repository")]
    ParentOutside {
        /// The path it names.
        path: String,
    },
    /// No locator leads to an existing image.
    #[error("its parent {name:?} is missing")]
    ParentMissing {
        /// The name in the header.
        name: String,
    },
    /// The image a locator leads to is not the parent.
    #[error("its parent {name} is another image by now: the footer uuid differs")]
    ParentMismatch {
        /// The image found.
        name: String,
    },
    /// The chain comes back to itself.
    #[error("it is its own ancestor: the chain of parents is a cycle")]
    Cycle,
    /// Sizes past what the format or this program can hold.
    #[error("{what} of {bytes} bytes is too large")]
    TooLarge {
        /// What is too large.
        what: &'static str,
        /// How large.
        bytes: u64,
    },
    /// The undo journal of a reference resize is wrong.
    #[error("bad resize journal: {reason}")]
    BadJournal {
        /// What.
        reason: &'static str,
    },
    /// A size that cannot be had.
    #[error("bad size: {reason}")]
    BadSize {
        /// Why.
        reason: &'static str,
    },
    /// Sound, but not something this program does.
    #[error("not supported: {what}")]
    Unsupported {
        /// What.
        what: &'static str,
    },
    /// The same, of a named image.
    #[error("{image}: {source}")]
    Of {
        /// Its volume.
        image: String,
        /// What is wrong with it.
        source: Box<Error>,
    },
}

impl Error {
    /// Names the image the error is about, unless one is named already.
    #[must_use]
    pub fn of(self, image: &VolumeName) -> Self {
        match self {
            Self::Of { .. } => self,
            source => Self::Of { image: image.to_string(), source: Box::new(source) },
        }
    }

    /// The error itself, without the image's name.
    #[must_use]
    pub fn kind(&self) -> &Self {
        match self {
            Self::Of { source, .. } => source.kind(),
            kind => kind,
        }
    }

    /// Whether the volume does not exist.
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        matches!(self.kind(), Self::Io(e) if e.kind() == std::io::ErrorKind::NotFound)
    }

    /// Whether somebody else holds the image.
    #[must_use]
    pub fn is_locked(&self) -> bool {
        matches!(self.kind(), Self::Io(e) if e.kind() == std::io::ErrorKind::WouldBlock)
    }
}
