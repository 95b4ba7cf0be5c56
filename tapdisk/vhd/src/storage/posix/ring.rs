//! Many ranges moved from one file to another at once, past the page cache,
//! on an io_uring.
//!
//! ```text
//!   pieces --> group (one buffer) --reads--> all read --writes--> done
//!              group              --reads--> ...
//! ```
//!
//! Reads of all groups are handed over together, so that the kernel joins
//! those that lie side by side on the disk. What the ring does not do, or not
//! all of it, is given back for somebody else to do; so it is never the one
//! to say that a file cannot be read.

use std::collections::VecDeque;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, BorrowedFd};

use io_uring::types::Fd;
use io_uring::{IoUring, opcode, squeue};
use memmap2::{Advice, MmapMut};

use super::super::CopyRange;

/// Buffers.
const GROUPS: usize = 8;
/// Bytes of each.
const GROUP_BYTES: usize = 512 << 10;
/// A huge page, where the system has them. A disk takes a transfer as a list of
/// physically contiguous parts, and the fewer they are the faster it is: a
/// buffer in ordinary pages has one for each.
const HUGE_PAGE_BYTES: usize = 2 << 20;
/// Pieces in one.
const GROUP_PIECES: usize = 64;
/// Entries of the submission queue; a turn that has more submits twice.
const ENTRIES: u32 = 512;

// What is in flight fits into the completion queue, which is twice as long.
const _: () = assert!(GROUPS * GROUP_PIECES <= 2 * ENTRIES as usize);

/// Longest piece.
pub(super) const PIECE_BYTES_MAX: u64 = GROUP_BYTES as u64;

/// A range to move.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Piece {
    /// Where it is.
    pub from: u64,
    /// Where it goes.
    pub to: u64,
    /// At most [`PIECE_BYTES_MAX`].
    pub len: u32,
}

impl Piece {
    pub(super) fn range(&self) -> CopyRange {
        CopyRange { from: self.from, to: self.to, len_bytes: u64::from(self.len) }
    }
}

/// Pieces that share a buffer.
#[derive(Debug, Default)]
struct Group {
    /// Index of each piece, where in the buffer it is, and whether it is there.
    pieces: Vec<(usize, usize, bool)>,
    /// Transfers in flight.
    left: usize,
    writing: bool,
}

/// Pieces that are worth a second thread.
const PIECES_FOR_TWO: usize = 512;

/// Rings, each run by a thread of its own while there is much to do: handing
/// a transfer to the kernel takes longer than the disk does.
#[derive(Debug)]
pub(super) struct Movers([Mover; 2]);

impl Movers {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self([Mover::new()?, Mover::new()?]))
    }

    /// Moves `pieces`, which do not overlap where they go. Returns those that
    /// are still to be moved.
    ///
    /// # Errors
    /// A ring itself failed: any of them may still be to be moved, and this
    /// is of no more use.
    pub(super) fn run(
        &mut self,
        from: BorrowedFd<'_>,
        to: BorrowedFd<'_>,
        pieces: &[Piece],
    ) -> io::Result<Vec<Piece>> {
        let [one, two] = &mut self.0;
        if pieces.len() < PIECES_FOR_TWO {
            return one.run(from, to, pieces);
        }
        let (first, second) = pieces.split_at(pieces.len() / 2);
        let (missed, more) = std::thread::scope(|scope| {
            let other = scope.spawn(|| two.run(from, to, second));
            let missed = one.run(from, to, first);
            (missed, other.join().unwrap_or_else(|_| Err(io::Error::other("the other thread panicked"))))
        });
        let mut missed = missed?;
        missed.extend(more?);
        Ok(missed)
    }
}

/// A ring with its buffers.
struct Mover {
    ring: ManuallyDrop<IoUring>,
    /// The kernel reads and writes it while a transfer is in flight.
    memory: ManuallyDrop<MmapMut>,
    /// Where in it the first buffer begins: with a huge page.
    start: usize,
    in_flight: usize,
}

impl std::fmt::Debug for Mover {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Mover").field("in_flight", &self.in_flight).finish_non_exhaustive()
    }
}

impl Drop for Mover {
    fn drop(&mut self) {
        // After a failure of the ring itself nobody knows when the kernel is
        // done with the memory: it is then kept for good.
        if self.in_flight == 0 {
            // SAFETY: neither is used after this, as `self` is going away.
            unsafe {
                ManuallyDrop::drop(&mut self.ring);
                ManuallyDrop::drop(&mut self.memory);
            }
        }
    }
}

impl Mover {
    fn new() -> io::Result<Self> {
        let memory = MmapMut::map_anon(GROUPS * GROUP_BYTES + HUGE_PAGE_BYTES)?;
        let start = memory.as_ptr().align_offset(HUGE_PAGE_BYTES);
        // A system that has none works all the same.
        let _ = memory.advise(Advice::HugePage);
        let ring = IoUring::new(ENTRIES)?;
        Ok(Self { ring: ManuallyDrop::new(ring), memory: ManuallyDrop::new(memory), start, in_flight: 0 })
    }

    /// As [`Movers::run`], by one ring.
    fn run(&mut self, from: BorrowedFd<'_>, to: BorrowedFd<'_>, pieces: &[Piece]) -> io::Result<Vec<Piece>> {
        if self.in_flight > 0 {
            return Err(io::Error::other("the ring failed before"));
        }
        let mut groups: Vec<Group> = (0..GROUPS).map(|_| Group::default()).collect();
        let mut vacant: Vec<usize> = (0..GROUPS).collect();
        let mut waiting: VecDeque<usize> = (0..pieces.len()).collect();
        let mut missed = Vec::new();
        loop {
            while !waiting.is_empty()
                && let Some(at) = vacant.pop()
            {
                groups[at] = gather(&mut waiting, pieces);
                self.submit_group(at, &groups[at], pieces, from)?;
            }
            if self.in_flight == 0 {
                return Ok(missed);
            }
            match self.ring.submit_and_wait(1) {
                Ok(_) => {}
                Err(error) if is_passing(&error) => {}
                Err(error) => return Err(error),
            }
            let ended: Vec<(u64, i32)> =
                self.ring.completion().map(|done| (done.user_data(), done.result())).collect();
            self.in_flight -= ended.len();
            for (name, result) in ended {
                let (at, nth) = ((name >> 32) as usize, (name & u64::from(u32::MAX)) as usize);
                let group = &mut groups[at];
                let (index, _, sound) = &mut group.pieces[nth];
                if u32::try_from(result) != Ok(pieces[*index].len) {
                    *sound = false;
                    missed.push(pieces[*index]);
                }
                group.left -= 1;
                if group.left > 0 {
                    continue;
                }
                if !group.writing {
                    group.writing = true;
                    group.left = group.pieces.iter().filter(|(_, _, sound)| *sound).count();
                    self.submit_group(at, &groups[at], pieces, to)?;
                }
                if groups[at].left == 0 {
                    vacant.push(at);
                }
            }
        }
    }

    fn submit_group(
        &mut self,
        at: usize,
        group: &Group,
        pieces: &[Piece],
        fd: BorrowedFd<'_>,
    ) -> io::Result<()> {
        let fd = Fd(fd.as_raw_fd());
        for (nth, (index, offset, sound)) in group.pieces.iter().enumerate() {
            if !sound {
                continue;
            }
            let piece = pieces[*index];
            let start = self.start + at * GROUP_BYTES + offset;
            let memory = self.memory[start..start + piece.len as usize].as_mut_ptr();
            let entry = if group.writing {
                opcode::Write::new(fd, memory, piece.len).offset(piece.to).build()
            } else {
                opcode::Read::new(fd, memory, piece.len).offset(piece.from).build()
            };
            self.push(&entry.user_data((at as u64) << 32 | nth as u64))?;
        }
        Ok(())
    }

    fn push(&mut self, entry: &squeue::Entry) -> io::Result<()> {
        loop {
            // SAFETY: the descriptors are borrowed by `run`, which returns
            // without an error only when nothing is in flight; after an error
            // the kernel holds the files itself. The memory lives as long as
            // anything is in flight (see `Drop`), and no two entries in
            // flight share any of it.
            if unsafe { self.ring.submission().push(entry) }.is_ok() {
                self.in_flight += 1;
                return Ok(());
            }
            match self.ring.submit() {
                Ok(_) => {}
                Err(error) if is_passing(&error) => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// As many pieces as fit into one buffer.
fn gather(waiting: &mut VecDeque<usize>, pieces: &[Piece]) -> Group {
    let mut group = Group::default();
    let mut used = 0;
    while let Some(index) = waiting.front().copied() {
        let len = pieces[index].len as usize;
        if group.pieces.len() == GROUP_PIECES || used + len > GROUP_BYTES {
            break;
        }
        waiting.pop_front();
        group.pieces.push((index, used, true));
        used += len;
    }
    group.left = group.pieces.len();
    group
}

/// The kernel asks to take completions first, or a signal came.
fn is_passing(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY))
}
