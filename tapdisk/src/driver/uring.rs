//! Guest data and readiness of sockets on one io_uring.
//!
//! ```text
//!   transfers --start--> +------+ --next--> what ended, which sockets are ready
//!   sockets   --watch--> | ring |
//!                        +------+ one system call a turn: submits and waits
//! ```
//!
//! Only what a ring is good at runs here: reads and writes between guest
//! memory and an open file. All else, and what the ring gives back, is done
//! by the threads ([`super::threads`]); so the ring is an accelerator that can
//! be left out, and every failure but a plain one is judged there.
//!
//! Absent on purpose: order. Whatever must come after another transfer is
//! only started once that one ended.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use io_uring::types::{Fd, SubmitArgs, Timespec};
use io_uring::{IoUring, cqueue, opcode, squeue};
use nix::poll::PollFlags;
use rustc_hash::FxHashMap;

use super::exec::{Failure, Memory, Transfer, Work};
use crate::buffer::Arena;
use crate::engine::{Completion, FileId, OpId};
use crate::limits::{RING_ENTRIES, RING_FILES_MAX, RING_SUBMIT_BATCH, RING_TRANSFERS_MAX};

/// What the owner of a socket calls it. The upper bits are the ring's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Watch(u64);

impl Watch {
    /// A name of 60 bits.
    #[must_use]
    pub fn new(name: u64) -> Option<Self> {
        (name < 1 << NAME_BITS).then_some(Self(name))
    }

    /// The name.
    #[must_use]
    pub fn name(self) -> u64 {
        self.0
    }
}

/// Bits of `user_data` for a name; above them a tag.
const NAME_BITS: u32 = 60;
const TAG_TRANSFER: u64 = 0;
const TAG_POLL: u64 = 1;
/// Two more bits say which poll of a socket it is.
const TAG_POLL_IN: u64 = 2;
const TAG_POLL_OUT: u64 = 4;

/// What the ring brought.
#[derive(Debug)]
pub enum Event {
    /// A transfer ended.
    Ended(OpId, Result<Completion, Failure>),
    /// The ring could not, or not all of it: a thread is to do it again.
    Again(OpId, Work),
    /// A watched socket is ready; it is no longer watched for that.
    Ready(Watch, PollFlags),
}

/// See the module.
pub struct Uring {
    ring: IoUring,
    /// Transfers in flight. The kernel uses the memory and the descriptor of
    /// each until its completion is taken.
    flights: Vec<Option<(OpId, Work)>>,
    vacant: Vec<usize>,
    /// Polls in the kernel, by socket: bits of [`TAG_POLL_IN`] and so on.
    watched: FxHashMap<Watch, u64>,
    files: RegisteredFiles,
    /// The registered memory, kept as long as the ring.
    arena: Option<Arc<Arena>>,
}

impl Uring {
    /// Sets up a ring. It must be used on the thread that made it.
    ///
    /// # Errors
    /// What the kernel says, when it has no io_uring, an old one, or forbids it.
    pub fn new(arena: Option<Arc<Arena>>) -> io::Result<Self> {
        // Completions are taken when we ask, on this thread: no interrupt of
        // a turn that is busy anyway.
        let mut builder = IoUring::builder();
        builder.setup_single_issuer().setup_defer_taskrun();
        builder.setup_cqsize(RING_ENTRIES * 8);
        let ring = builder
            .build(RING_ENTRIES)
            .or_else(|_| IoUring::builder().setup_cqsize(RING_ENTRIES * 8).build(RING_ENTRIES))?;
        if !(ring.params().is_feature_ext_arg() && ring.params().is_feature_nodrop()) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let files = RegisteredFiles::new(&ring);
        let arena = arena.filter(|arena| {
            let (start, len) = arena.span();
            let part = libc::iovec { iov_base: start.cast(), iov_len: len };
            // SAFETY: the memory stays where it is until the ring is gone: the
            // ring keeps the arena. Registering only pins it; transfers in it
            // are governed by loans as everywhere.
            let registered = unsafe { ring.submitter().register_buffers(&[part]) };
            registered.inspect_err(|error| tracing::info!(%error, "guest memory is not registered")).is_ok()
        });
        let (flights, vacant, watched) = (Vec::new(), Vec::new(), FxHashMap::default());
        Ok(Self { ring, flights, vacant, watched, files, arena })
    }

    /// Starts a transfer with the next [`Uring::wait`]; gives the work back if
    /// it is none, or the ring is full.
    ///
    /// # Errors
    /// The work, untouched.
    pub fn start(&mut self, id: OpId, mut work: Work) -> Result<(), Work> {
        if self.in_flight() >= RING_TRANSFERS_MAX {
            return Err(work);
        }
        let Some(mut transfer) = work.transfer() else { return Err(work) };
        let at = self.vacant.last().copied().unwrap_or(self.flights.len());
        let entry = self.entry(&mut transfer).user_data(at as u64 | TAG_TRANSFER << NAME_BITS);
        // SAFETY: the memory is on loan to `work` and the descriptor open by
        // it; `work` stays in `flights` until the completion was taken, and is
        // leaked if the ring ends before.
        if unsafe { push(&mut self.ring, &entry) }.is_err() {
            return Err(work);
        }
        match self.vacant.pop() {
            Some(at) => self.flights[at] = Some((id, work)),
            None => self.flights.push(Some((id, work))),
        }
        if self.ring.submission().len() >= RING_SUBMIT_BATCH {
            // What cannot be submitted now stays queued for the wait, which
            // also says why.
            let _ = self.ring.submit();
        }
        Ok(())
    }

    fn entry(&mut self, transfer: &mut Transfer<'_>) -> squeue::Entry {
        let (start, len, fills) = match &mut transfer.memory {
            Memory::Fill(into) => (into.as_mut_ptr(), into.len(), true),
            Memory::Take(from) => (from.as_ptr().cast_mut(), from.len(), false),
        };
        let registered = self.arena.as_ref().is_some_and(|arena| arena.contains(start, len));
        let slot = transfer.registrable.and_then(|id| self.files.slot(&self.ring, id, transfer.fd));
        let fd = Fd(slot.unwrap_or_else(|| transfer.fd.as_raw_fd()));
        let offset = transfer.offset;
        // The largest buffer is far below 4 GiB.
        let len = u32::try_from(len).unwrap_or(u32::MAX);
        let entry = match (fills, registered) {
            (true, true) => opcode::ReadFixed::new(fd, start, len, 0).offset(offset).build(),
            (true, false) => opcode::Read::new(fd, start, len).offset(offset).build(),
            (false, true) => opcode::WriteFixed::new(fd, start, len, 0).offset(offset).build(),
            (false, false) => opcode::Write::new(fd, start, len).offset(offset).build(),
        };
        if slot.is_some() { entry.flags(squeue::Flags::FIXED_FILE) } else { entry }
    }

    /// Watches a socket for what it is not yet watched for. Hang-ups are
    /// reported with anything.
    pub fn watch(&mut self, name: Watch, fd: BorrowedFd<'_>, want: PollFlags) {
        let held = self.watched.get(&name).copied().unwrap_or(0);
        let wanted = [(PollFlags::POLLIN, TAG_POLL_IN), (PollFlags::POLLOUT, TAG_POLL_OUT)];
        let mut missing: Vec<(PollFlags, u64)> =
            wanted.into_iter().filter(|(flag, tag)| want.contains(*flag) && held & tag == 0).collect();
        if held == 0 && missing.is_empty() {
            missing.push((PollFlags::empty(), TAG_POLL));
        }
        for (flag, tag) in missing {
            let mask = flag.bits().cast_unsigned().into();
            let entry = opcode::PollAdd::new(Fd(fd.as_raw_fd()), mask).build();
            let entry = entry.user_data(name.0 | (tag | TAG_POLL) << NAME_BITS);
            // SAFETY: a poll uses no memory of ours, and the kernel keeps the
            // socket itself.
            if unsafe { push(&mut self.ring, &entry) }.is_ok() {
                *self.watched.entry(name).or_default() |= tag | TAG_POLL;
            }
        }
    }

    /// Submits everything and waits for a completion, at most so long.
    ///
    /// # Errors
    /// What the kernel says; an interruption is none.
    pub fn wait(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        let limit = timeout.map(Timespec::from);
        let mut args = SubmitArgs::new();
        if let Some(limit) = &limit {
            args = args.timespec(limit);
        }
        unless_momentary(self.ring.submitter().submit_with_args(1, &args))
    }

    fn in_flight(&self) -> usize {
        self.flights.len() - self.vacant.len()
    }

    /// The next thing that ended or is ready, until there is none.
    pub fn next_event(&mut self) -> Option<Event> {
        loop {
            let entry = self.ring.completion().next()?;
            let (tag, name) = (entry.user_data() >> NAME_BITS, entry.user_data() & ((1 << NAME_BITS) - 1));
            if tag == TAG_TRANSFER {
                if let Some(event) = usize::try_from(name).ok().and_then(|at| self.ended(at, &entry)) {
                    return Some(event);
                }
            } else {
                let watch = Watch(name);
                let left = self.watched.get_mut(&watch).map(|held| {
                    *held &= !tag;
                    // Any poll that is left keeps the common bit.
                    *held |= if *held == 0 { 0 } else { TAG_POLL };
                    *held
                });
                if left == Some(0) {
                    self.watched.remove(&watch);
                }
                let flags = i16::try_from(entry.result()).unwrap_or(libc::POLLERR);
                return Some(Event::Ready(watch, PollFlags::from_bits_truncate(flags)));
            }
        }
    }

    fn ended(&mut self, at: usize, entry: &cqueue::Entry) -> Option<Event> {
        let (id, mut work) = self.flights.get_mut(at)?.take()?;
        self.vacant.push(at);
        let wanted = work.transfer().map_or(0, |transfer| transfer.memory.bytes().len());
        let result = entry.result();
        Some(match usize::try_from(result) {
            Ok(n) if n == wanted => {
                drop(work); // its loan of the buffer ends before the answer
                Event::Ended(id, Ok(Completion::Done))
            }
            // Half of it: the thread finds out why.
            Ok(_) => Event::Again(id, work),
            Err(_) => match -result {
                libc::EAGAIN | libc::EINTR | libc::EINVAL | libc::EOPNOTSUPP | libc::ECANCELED => {
                    Event::Again(id, work)
                }
                errno => Event::Ended(id, Err(work.failed(io::Error::from_raw_os_error(errno)))),
            },
        })
    }

    /// A file is about to be closed and has no transfer in flight.
    pub fn forget(&mut self, file: FileId) {
        self.files.forget(&self.ring, file);
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        // The kernel may still use their memory, and nobody waits for it: the
        // process is about to end.
        for flight in self.flights.drain(..).flatten() {
            std::mem::forget(flight);
        }
        if let Some(arena) = self.arena.take() {
            std::mem::forget(arena);
        }
    }
}

/// Passes over what is over by the next wait: a time limit, an interruption,
/// or completions that are to be taken first (`EBUSY`).
fn unless_momentary(result: io::Result<usize>) -> io::Result<()> {
    match result.as_ref().err().and_then(io::Error::raw_os_error) {
        Some(libc::ETIME | libc::EINTR | libc::EBUSY | libc::EAGAIN) => Ok(()),
        _ => result.map(drop),
    }
}

/// Queues an entry, submitting first when the queue is full.
///
/// # Safety
/// What the entry names must stay valid until its completion.
unsafe fn push(ring: &mut IoUring, entry: &squeue::Entry) -> Result<(), ()> {
    // SAFETY: as promised by the caller.
    if unsafe { ring.submission().push(entry) }.is_ok() {
        return Ok(());
    }
    ring.submit().map_err(drop)?;
    // SAFETY: as above.
    unsafe { ring.submission().push(entry) }.map_err(drop)
}

/// The ring's own table of descriptors, which spares a look-up per transfer.
///
/// An entry keeps the file open, and the kernel takes a ring apart some time
/// after its process has died. So only files without a lock stand here: after
/// a kill the next holder of an image must not wait for that.
struct RegisteredFiles {
    slots: FxHashMap<FileId, RawFd>,
    vacant: Vec<RawFd>,
}

impl RegisteredFiles {
    fn new(ring: &IoUring) -> Self {
        let registered = ring.submitter().register_files_sparse(RING_FILES_MAX).is_ok();
        let slots = RawFd::try_from(RING_FILES_MAX).unwrap_or(0);
        let vacant = if registered { (0..slots).rev().collect() } else { Vec::new() };
        Self { slots: FxHashMap::default(), vacant }
    }

    fn slot(&mut self, ring: &IoUring, file: FileId, fd: BorrowedFd<'_>) -> Option<RawFd> {
        if let Some(slot) = self.slots.get(&file) {
            return Some(*slot);
        }
        let slot = self.vacant.pop()?;
        if !set(ring, slot, fd.as_raw_fd()) {
            self.vacant.push(slot);
            return None;
        }
        self.slots.insert(file, slot);
        Some(slot)
    }

    fn forget(&mut self, ring: &IoUring, file: FileId) {
        if let Some(slot) = self.slots.remove(&file)
            && set(ring, slot, -1)
        {
            self.vacant.push(slot);
        }
    }
}

/// Sets an entry of the kernel's table; -1 clears it.
fn set(ring: &IoUring, slot: RawFd, fd: RawFd) -> bool {
    u32::try_from(slot).is_ok_and(|slot| ring.submitter().register_files_update(slot, &[fd]).is_ok())
}

#[cfg(test)]
#[path = "uring_tests.rs"]
mod tests;
