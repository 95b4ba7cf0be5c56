//! Disks as streams of bytes, written and read once from front to end: what
//! leaves a repository and comes into one through a pipe.
//!
//! | where | what |
//! |---|---|
//! | [`export`] | a chain as one dynamic VHD, or as a differencing one over any other disk |
//! | [`import`] | such a stream, or anybody else's VHD: untrusted bytes, checked in full |
//! | [`extents`] | a raw disk without its holes |
//!
//! Absent on purpose: pipes, sockets, and who may read the chain (leases).

pub mod export;
pub mod extents;
pub mod import;
#[cfg(test)]
#[path = "tests.rs"]
mod tests;

/// Where a stream goes, piece by piece. An error ends it.
pub type Sink<'a> = &'a mut dyn FnMut(&[u8]) -> std::io::Result<()>;
