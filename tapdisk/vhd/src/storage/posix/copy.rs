//! Copying between files without copying, where the filesystem can.
//!
//! ```text
//!   head  |        middle, whole filesystem blocks        | tail
//!   copy  |  FICLONERANGE, else hole by hole as below     | copy
//!
//!   source:  data ------- hole ------- data
//!   here:    read, write  punch        read, write
//! ```
//!
//! Data of single ranges is read and written through a buffer:
//! `copy_file_range` moves local files page by page and takes twice as long.
//! On another machine's filesystem it is asked first, as that may copy without
//! the network. Many ranges go past the page cache, a deep queue of them: then
//! reading and writing overlap, and the flush after it finds little to write.
//! Short runs are not looked through for holes, which takes longer than
//! copying.
//!
//! Each way falls back to the next when the filesystem or the pair of
//! filesystems cannot; only real errors are reported.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;

use nix::errno::Errno;
use nix::fcntl::copy_file_range;
use nix::unistd::{Whence, lseek};

use super::super::{CopyKind, CopyRange, Volume};
use super::ring::{Movers, PIECE_BYTES_MAX, Piece};
use super::volume::{PosixVolume, offset_of, usize_of};

/// What extents can be shared in, on every filesystem that can at all. Where
/// blocks are larger the clone is refused and the bytes are copied.
const CLONE_UNIT: u64 = 4096;
/// Shorter runs are copied: that is faster than sharing them, and leaves the
/// file in fewer pieces.
const CLONE_BYTES_MIN: u64 = 64 << 10;
/// Bytes moved per read and write where nothing better works.
const COPY_BUFFER_BYTES: u64 = 512 << 10;
/// So many ranges are worth a second thread.
const RANGES_FOR_TWO: usize = 4;
/// Runs shorter than this are copied without a look for holes.
const HOLES_BYTES_MIN: u64 = 128 << 10;
/// Bytes per `copy_file_range`, so that a signal is answered soon.
const COPY_CALL_BYTES: u64 = 16 << 20;

nix::ioctl_write_ptr!(ficlonerange, 0x94, 13, nix::libc::file_clone_range);

/// Copies `len_bytes`; the ranges must not overlap within one file. Grows
/// `to` as a write does, also where the source ends in a hole. The answer is
/// `Cloned` when all but unaligned edges is shared.
pub(super) fn copy(
    to: &PosixVolume,
    source: &dyn Volume,
    from_at: u64,
    to_at: u64,
    len_bytes: u64,
) -> io::Result<CopyKind> {
    if len_bytes == 0 {
        return Ok(CopyKind::Copied);
    }
    let Some(from) = source.as_any().downcast_ref::<PosixVolume>() else {
        copy_buffered(to, source, from_at, to_at, len_bytes)?;
        return Ok(CopyKind::Copied);
    };
    if len_bytes < CLONE_BYTES_MIN || (len_bytes < HOLES_BYTES_MIN && to.clones_nothing(from)) {
        // The end of the source shows as such.
        copy_data(to, from, from_at, to_at, len_bytes)?;
        return Ok(CopyKind::Copied);
    }
    if from_at.saturating_add(len_bytes) > from.len()? {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    if from_at % CLONE_UNIT == to_at % CLONE_UNIT {
        let head = (CLONE_UNIT - from_at % CLONE_UNIT) % CLONE_UNIT;
        let middle = len_bytes.saturating_sub(head) / CLONE_UNIT * CLONE_UNIT;
        if middle > 0 && clone(to, from, from_at + head, to_at + head, middle)? {
            let tail = head + middle;
            copy_data(to, from, from_at, to_at, head)?;
            copy_data(to, from, from_at + tail, to_at + tail, len_bytes - tail)?;
            return Ok(CopyKind::Cloned);
        }
    }
    from.will_read(from_at, len_bytes);
    copy_sparse(to, from, from_at, to_at, len_bytes)?;
    to.begin_write_out(to_at, len_bytes);
    Ok(CopyKind::Copied)
}

/// Copies many ranges, past the page cache and many at a time where both
/// sides can; the others by two threads, as much of it is moving memory.
pub(super) fn copy_many(to: &PosixVolume, source: &dyn Volume, ranges: &[CopyRange]) -> io::Result<()> {
    let from = source.as_any().downcast_ref::<PosixVolume>();
    let rest = match from.and_then(|from| Some((from, from.direct()?, to.direct()?))) {
        Some((from, from_fd, to_fd)) => {
            let (pieces, mut rest) = pieces_of(to, from, ranges)?;
            rest.extend(move_at_once(to, from_fd, to_fd, &pieces));
            rest
        }
        None => ranges.to_vec(),
    };
    let each = |ranges: &[CopyRange]| {
        let mut coming = ranges.iter().skip(1);
        ranges.iter().try_for_each(|range| {
            if let Some(next) = coming.next() {
                source.will_read(next.from, next.len_bytes);
            }
            copy(to, source, range.from, range.to, range.len_bytes).map(drop)
        })
    };
    if rest.len() < RANGES_FOR_TWO {
        return each(&rest);
    }
    let (first, second) = rest.split_at(rest.len() / 2);
    std::thread::scope(|scope| {
        let other = scope.spawn(|| each(second));
        let one = each(first);
        other.join().unwrap_or_else(|_| Err(io::Error::other("the other thread panicked"))).and(one)
    })
}

/// The data of `ranges` in pieces for a ring, its holes made; and those ranges
/// that a ring cannot move.
fn pieces_of(
    to: &PosixVolume,
    from: &PosixVolume,
    ranges: &[CopyRange],
) -> io::Result<(Vec<CopyRange>, Vec<CopyRange>)> {
    let from_end = from.len()?;
    let (mut pieces, mut data, mut rest) = (Vec::new(), Vec::new(), Vec::new());
    for range in joined(ranges) {
        let aligned = [range.from, range.to, range.len_bytes].iter().all(|n| n % CLONE_UNIT == 0);
        let short = range.len_bytes < HOLES_BYTES_MIN;
        // Where the source ends too soon, that shows when it is copied.
        let ends = range.from.saturating_add(range.len_bytes) > from_end;
        if !aligned || ends || (to.is_remote() && !short) {
            rest.push(range);
        } else if short {
            pieces.push(range);
        } else {
            without_holes(to, from, range, &mut data)?;
            grow_to(to, range.to + range.len_bytes)?;
        }
    }
    find_room(to, &data);
    for range in data {
        let cut = (0..range.len_bytes).step_by(usize_of(PIECE_BYTES_MAX));
        pieces.extend(cut.map(|at| CopyRange {
            from: range.from + at,
            to: range.to + at,
            len_bytes: (range.len_bytes - at).min(PIECE_BYTES_MAX),
        }));
    }
    Ok((pieces, rest))
}

/// Makes the holes of a range, as far as they are whole pages, and adds its
/// data to `data`.
fn without_holes(
    to: &PosixVolume,
    from: &PosixVolume,
    range: CopyRange,
    data: &mut Vec<CopyRange>,
) -> io::Result<()> {
    let from_end = range.from + range.len_bytes;
    let mut at = range.from;
    while at < from_end {
        let begin = (next_data(from, at)?.min(from_end) / CLONE_UNIT * CLONE_UNIT).max(at);
        if begin > at {
            to.zero(range.to + (at - range.from), begin - at)?;
        }
        let end = next_hole(from, begin)?.min(from_end).next_multiple_of(CLONE_UNIT);
        if end > begin {
            data.push(CopyRange { from: begin, to: range.to + (begin - range.from), len_bytes: end - begin });
        }
        at = end;
    }
    Ok(())
}

/// Has the filesystem find room for all of it at once: in few extents, and
/// transfers past the page cache then need not wait for each other.
fn find_room(to: &PosixVolume, ranges: &[CopyRange]) {
    if to.is_device() {
        return;
    }
    let mut targets: Vec<(u64, u64)> =
        ranges.iter().map(|range| (range.to, range.to + range.len_bytes)).collect();
    targets.sort_unstable();
    for stretch in targets.chunk_by(|one, next| next.0 <= one.1 + CLONE_UNIT) {
        let (Some(first), Some(last)) = (stretch.first(), stretch.last()) else { continue };
        to.find_room(first.0, last.1 - first.0);
    }
}

/// Neighbours as one, as long as a ring takes them.
fn joined(ranges: &[CopyRange]) -> Vec<CopyRange> {
    let mut joined: Vec<CopyRange> = Vec::new();
    for range in ranges {
        match joined.last_mut() {
            Some(last)
                if last.from + last.len_bytes == range.from
                    && last.to + last.len_bytes == range.to
                    && last.len_bytes + range.len_bytes <= PIECE_BYTES_MAX =>
            {
                last.len_bytes += range.len_bytes;
            }
            _ => joined.push(*range),
        }
    }
    joined
}

/// Moves ranges by a ring; returns what is left to be moved, which is all of
/// it where there is none.
fn move_at_once(
    to: &PosixVolume,
    from: BorrowedFd<'_>,
    direct: BorrowedFd<'_>,
    ranges: &[CopyRange],
) -> Vec<CopyRange> {
    // Somebody else's copy has it: then this one goes the other way.
    let Ok(mut mover) = to.mover.try_lock() else { return ranges.to_vec() };
    if mover.is_none() {
        *mover = Movers::new().ok();
    }
    let Some(rings) = mover.as_mut() else { return ranges.to_vec() };
    let pieces: Vec<Piece> = ranges
        .iter()
        .filter_map(|range| {
            Some(Piece { from: range.from, to: range.to, len: u32::try_from(range.len_bytes).ok()? })
        })
        .collect();
    debug_assert_eq!(pieces.len(), ranges.len());
    match rings.run(from, direct, &pieces) {
        Ok(missed) => missed.iter().map(Piece::range).collect(),
        Err(_) => {
            *mover = None;
            ranges.to_vec()
        }
    }
}

impl PosixVolume {
    /// Whether extents of `from` are known not to be shared with this.
    fn clones_nothing(&self, from: &PosixVolume) -> bool {
        self.is_device() || from.is_device() || self.clone_refused.load(Ordering::Relaxed)
    }
}

/// Shares extents; `false` if this filesystem does not do that here.
fn clone(to: &PosixVolume, from: &PosixVolume, from_at: u64, to_at: u64, len_bytes: u64) -> io::Result<bool> {
    if to.clones_nothing(from) {
        return Ok(false);
    }
    let range = nix::libc::file_clone_range {
        src_fd: i64::from(from.io().as_raw_fd()),
        src_offset: from_at,
        src_length: len_bytes,
        dest_offset: to_at,
    };
    // SAFETY: both descriptors are open for as long as the call lasts, since
    // `to` and `from` are borrowed, and `range` is the struct that this ioctl
    // reads and does not keep.
    match unsafe { ficlonerange(to.io().as_raw_fd(), &range) } {
        Ok(_) => Ok(true),
        // Says nothing about the next range.
        Err(Errno::EINVAL | Errno::ETXTBSY | Errno::EINTR) => Ok(false),
        Err(Errno::EOPNOTSUPP | Errno::ENOTTY | Errno::ENOSYS | Errno::EXDEV | Errno::EPERM) => {
            to.clone_refused.store(true, Ordering::Relaxed);
            Ok(false)
        }
        Err(errno) => Err(errno.into()),
    }
}

/// Copies data runs, and makes holes of holes.
fn copy_sparse(
    to: &PosixVolume,
    from: &PosixVolume,
    from_at: u64,
    to_at: u64,
    len_bytes: u64,
) -> io::Result<()> {
    let from_end = from_at + len_bytes;
    let mut at = from_at;
    while at < from_end {
        let data = next_data(from, at)?.min(from_end);
        to.zero(to_at + (at - from_at), data - at)?;
        let hole = next_hole(from, data)?.min(from_end);
        copy_data(to, from, data, to_at + (data - from_at), hole - data)?;
        at = hole;
    }
    grow_to(to, to_at + len_bytes)
}

/// Makes sure the file reaches to `end`, by a zero in the last byte of our
/// own range: setting the length could cut what somebody else just appended.
fn grow_to(to: &PosixVolume, end: u64) -> io::Result<()> {
    if to.len()? < end { to.io().write_all_at(&[0], end - 1) } else { Ok(()) }
}

/// First byte of data at or after `at`; beyond everything if there is none.
/// All is data where holes are not reported.
fn next_data(from: &PosixVolume, at: u64) -> io::Result<u64> {
    match lseek(from.io(), offset_of(at)?, Whence::SeekData) {
        Ok(found) => Ok(u64::try_from(found).unwrap_or(at)),
        Err(Errno::ENXIO) => Ok(u64::MAX),
        Err(Errno::EINVAL | Errno::EOPNOTSUPP) => Ok(at),
        Err(errno) => Err(errno.into()),
    }
}

/// First hole after `at`, which is data; the end of the file counts as one.
/// A hole that vanished meanwhile must not make us go back or stand still.
fn next_hole(from: &PosixVolume, at: u64) -> io::Result<u64> {
    if at == u64::MAX {
        return Ok(at);
    }
    match lseek(from.io(), offset_of(at)?, Whence::SeekHole) {
        Ok(found) => match u64::try_from(found) {
            Ok(found) if found > at => Ok(found),
            _ => Ok(u64::MAX),
        },
        Err(Errno::ENXIO | Errno::EINVAL | Errno::EOPNOTSUPP) => Ok(u64::MAX),
        Err(errno) => Err(errno.into()),
    }
}

/// Copies bytes where they are kept, or through a buffer.
fn copy_data(
    to: &PosixVolume,
    from: &PosixVolume,
    from_at: u64,
    to_at: u64,
    len_bytes: u64,
) -> io::Result<()> {
    if !to.is_remote() {
        return copy_buffered(to, from, from_at, to_at, len_bytes);
    }
    let (mut from_pos, mut to_pos) = (offset_of(from_at)?, offset_of(to_at)?);
    let mut left = len_bytes;
    while left > 0 {
        let run = usize_of(left.min(COPY_CALL_BYTES));
        match copy_file_range(from.io(), Some(&mut from_pos), to.io(), Some(&mut to_pos), run) {
            Ok(0) => return copy_rest(to, from, from_pos, to_pos, left),
            Ok(moved) => left -= moved as u64,
            Err(Errno::EINTR) => {}
            Err(
                Errno::EINVAL
                | Errno::EXDEV
                | Errno::ENOSYS
                | Errno::EOPNOTSUPP
                | Errno::EBADF
                | Errno::EPERM,
            ) => return copy_rest(to, from, from_pos, to_pos, left),
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

fn copy_rest(
    to: &PosixVolume,
    from: &PosixVolume,
    from_at: i64,
    to_at: i64,
    len_bytes: u64,
) -> io::Result<()> {
    let position = |at: i64| u64::try_from(at).map_err(|_| io::Error::from(Errno::EINVAL));
    copy_buffered(to, from, position(from_at)?, position(to_at)?, len_bytes)
}

/// Copies through a buffer of bounded size; the end of the source shows as
/// `UnexpectedEof` here.
fn copy_buffered(
    to: &PosixVolume,
    source: &dyn Volume,
    from_at: u64,
    to_at: u64,
    len_bytes: u64,
) -> io::Result<()> {
    let mut buffer = vec![0u8; usize_of(len_bytes.min(COPY_BUFFER_BYTES))];
    let mut done = 0;
    while done < len_bytes {
        let run = usize_of((len_bytes - done).min(COPY_BUFFER_BYTES));
        source.read_at(&mut buffer[..run], from_at + done)?;
        to.io().write_all_at(&buffer[..run], to_at + done)?;
        done += run as u64;
    }
    Ok(())
}
