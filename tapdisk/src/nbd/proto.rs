//! The NBD protocol's structs, big-endian as on the wire, and its numbers,
//! which clients have from the same place.
//!
//! Bytes from a peer become one of these structs and nothing more: what the
//! fields mean is decided in [`super::handshake`] and [`super::transmission`].

pub use tapdisk_control::nbd::wire::*;
use zerocopy::byteorder::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Errors as the protocol numbers them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum NbdError {
    /// Not permitted: the export is read-only.
    Perm = 1,
    /// The disk failed.
    Io = 5,
    /// No memory.
    NoMem = 12,
    /// The request makes no sense.
    Invalid = 22,
    /// No space, also for a write past the end.
    NoSpace = 28,
    /// An unfragmented read that is too long.
    Overflow = 75,
    /// Not supported (a fast zero that would be slow).
    NotSup = 95,
    /// The server is going away.
    Shutdown = 108,
}

impl NbdError {
    /// The protocol's word for an errno.
    #[must_use]
    pub fn from_errno(errno: i32) -> Self {
        match errno {
            libc::EPERM | libc::EROFS | libc::EACCES => Self::Perm,
            libc::ENOMEM => Self::NoMem,
            libc::EINVAL => Self::Invalid,
            libc::ENOSPC | libc::EDQUOT | libc::EFBIG => Self::NoSpace,
            libc::EOVERFLOW => Self::Overflow,
            libc::EOPNOTSUPP => Self::NotSup,
            libc::ESHUTDOWN => Self::Shutdown,
            _ => Self::Io,
        }
    }
}

/// The server's first words.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Greeting {
    /// [`MAGIC`].
    pub magic: U64,
    /// [`OPTION_MAGIC`].
    pub option_magic: U64,
    /// [`handshake_flag`]s.
    pub flags: U16,
}

/// In front of an option's data.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct OptionHeader {
    /// [`OPTION_MAGIC`].
    pub magic: U64,
    /// One of [`option`].
    pub option: U32,
    /// Bytes of data that follow.
    pub len: U32,
}

/// In front of an option reply's data.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct OptionReply {
    /// [`OPTION_REPLY_MAGIC`].
    pub magic: U64,
    /// The option answered.
    pub option: U32,
    /// One of [`option_reply`].
    pub kind: U32,
    /// Bytes of data that follow.
    pub len: U32,
}

/// Data of an [`info::EXPORT`].
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct InfoExport {
    /// [`info::EXPORT`].
    pub kind: U16,
    /// Virtual bytes.
    pub virtual_bytes: U64,
    /// [`transmission_flag`]s.
    pub flags: U16,
}

/// Data of an [`info::BLOCK_SIZE`], all in bytes.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct InfoBlockSize {
    /// [`info::BLOCK_SIZE`].
    pub kind: U16,
    /// Requests are multiples of this.
    pub min: U32,
    /// And best multiples of this.
    pub preferred: U32,
    /// A request carries at most this much data.
    pub max: U32,
}

/// A request; after a `WRITE` come `len` bytes.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct RequestHeader {
    /// [`REQUEST_MAGIC`].
    pub magic: U32,
    /// [`command_flag`]s.
    pub flags: U16,
    /// One of [`command`].
    pub command: U16,
    /// Chosen by the client, repeated in the reply.
    pub cookie: U64,
    /// First byte on the disk.
    pub offset: U64,
    /// Bytes.
    pub len: U32,
}

/// A request with extended headers.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct ExtendedRequestHeader {
    /// [`EXTENDED_REQUEST_MAGIC`].
    pub magic: U32,
    /// [`command_flag`]s.
    pub flags: U16,
    /// One of [`command`].
    pub command: U16,
    /// Chosen by the client, repeated in the reply.
    pub cookie: U64,
    /// First byte on the disk.
    pub offset: U64,
    /// Bytes.
    pub len: U64,
}

/// In front of a chunk's data, with extended headers.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct ExtendedChunkHeader {
    /// [`EXTENDED_CHUNK_MAGIC`].
    pub magic: U32,
    /// [`chunk::FLAG_DONE`] or 0.
    pub flags: U16,
    /// One of [`chunk`].
    pub kind: U16,
    /// The request's cookie.
    pub cookie: U64,
    /// The request's offset.
    pub offset: U64,
    /// Bytes of data that follow.
    pub len: U64,
}

/// A simple reply; after a successful read the data follows.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct SimpleReply {
    /// [`SIMPLE_REPLY_MAGIC`].
    pub magic: U32,
    /// 0 or an [`NbdError`].
    pub error: U32,
    /// The request's.
    pub cookie: U64,
}

/// In front of a chunk's data.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct ChunkHeader {
    /// [`CHUNK_MAGIC`].
    pub magic: U32,
    /// [`chunk::FLAG_DONE`] or 0.
    pub flags: U16,
    /// One of [`chunk`].
    pub kind: U16,
    /// The request's cookie.
    pub cookie: U64,
    /// Bytes of data that follow.
    pub len: U32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structs_have_the_protocols_sizes() {
        assert_eq!(size_of::<Greeting>(), 18);
        assert_eq!(size_of::<OptionHeader>(), 16);
        assert_eq!(size_of::<OptionReply>(), 20);
        assert_eq!(size_of::<InfoExport>(), 12);
        assert_eq!(size_of::<InfoBlockSize>(), 14);
        assert_eq!(size_of::<RequestHeader>(), 28);
        assert_eq!(size_of::<SimpleReply>(), 16);
        assert_eq!(size_of::<ChunkHeader>(), 20);
        assert_eq!(size_of::<ExtendedRequestHeader>(), 32);
        assert_eq!(size_of::<ExtendedChunkHeader>(), 32);
    }

    #[test]
    fn magics_spell_their_words() {
        assert_eq!(&U64::new(MAGIC).to_bytes(), b"NBDMAGIC");
        assert_eq!(&U64::new(OPTION_MAGIC).to_bytes(), b"IHAVEOPT");
    }
}
