//! Reads that need no disk.
//!
//! Handing a read to a worker and its end back costs two wake-ups, several
//! times the copy of a small block out of the page cache. So a small read is
//! first tried here, where the kernel promises not to wait (`RWF_NOWAIT`);
//! what is not in the cache goes to a worker as ever.

use std::os::fd::{AsRawFd, BorrowedFd};

/// Longest read tried, in bytes: copying more is worth a worker, and would
/// keep the thread that owns all sockets busy.
const CACHED_BYTES_MAX: usize = 64 << 10;

/// Tries reads, until a filesystem says that it cannot promise.
#[derive(Debug)]
pub struct CachedReads {
    supported: bool,
}

impl Default for CachedReads {
    fn default() -> Self {
        Self { supported: true }
    }
}

impl CachedReads {
    /// Fills `buf` from `offset` if that needs no waiting; whether it did.
    /// If not, the content of `buf` is unspecified.
    pub fn read(&mut self, fd: BorrowedFd<'_>, buf: &mut [u8], offset: u64) -> bool {
        let Ok(at) = libc::off_t::try_from(offset) else {
            return false;
        };
        if !self.supported || buf.len() > CACHED_BYTES_MAX {
            return false;
        }
        let part = libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() };
        // SAFETY: the one part describes `buf`, which is borrowed for writing
        // until the call returns, and the call keeps no reference.
        let n = unsafe { libc::preadv2(fd.as_raw_fd(), &raw const part, 1, at, libc::RWF_NOWAIT) };
        if n < 0 {
            let error = std::io::Error::last_os_error().raw_os_error();
            self.supported = !matches!(error, Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL));
        }
        usize::try_from(n).is_ok_and(|n| n == buf.len())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn only_whole_small_reads_succeed() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[7; 200_000]).unwrap();
        let mut cached = CachedReads::default();
        let mut buf = vec![0; 4096];
        // Whether it is cached is the kernel's affair; but never half of it.
        if cached.read(file.as_fd(), &mut buf, 512) {
            assert!(buf.iter().all(|byte| *byte == 7));
        }
        assert!(!cached.read(file.as_fd(), &mut buf, 200_000 - 512));
        assert!(!cached.read(file.as_fd(), &mut vec![0; 100_000], 0));
        assert!(!cached.read(file.as_fd(), &mut buf, u64::MAX));
    }
}
