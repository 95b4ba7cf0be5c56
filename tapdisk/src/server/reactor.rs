//! What the serving thread waits on: `poll`, or an io_uring that moves guest
//! data as well.
//!
//! The ring is taken where the kernel offers it and nobody said otherwise;
//! everything works without it, with more system calls and wake-ups.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout};

use super::clients::ClientId;
use crate::buffer::Arena;
use crate::driver::PeerId;
use crate::driver::cached::CachedReads;
use crate::driver::exec::{Failure, Work};
use crate::driver::uring::{Event, Uring, Watch};
use crate::engine::{Completion, FileId, OpId};

/// Which driver moves guest data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum DriverChoice {
    /// The ring if the kernel has one, else threads
    #[default]
    Auto,
    /// io_uring, or do not start
    Uring,
    /// Threads with blocking calls
    Threads,
}

/// What can become ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// A worker ended something.
    Workers,
    /// The process was sent a signal.
    Signals,
    /// An NBD client waits at the door.
    Nbd,
    /// An NBD client from another host does.
    NbdTcp,
    /// A control peer waits at the door.
    Control,
    /// A connected NBD client.
    Client(ClientId),
    /// A connected control peer.
    Peer(PeerId),
}

/// Bits of a [`Watch`] that say which kind of source it is.
const KIND_BITS: u32 = 3;

impl Source {
    fn watch(self) -> Option<Watch> {
        let (kind, number) = match self {
            Self::Workers => (0, 0),
            Self::Signals => (1, 0),
            Self::Nbd => (2, 0),
            Self::Control => (3, 0),
            Self::Client(id) => (4, id.number()),
            Self::Peer(PeerId(number)) => (5, number),
            Self::NbdTcp => (6, 0),
        };
        Watch::new(number << KIND_BITS | kind)
    }

    fn of(watch: Watch) -> Option<Self> {
        let number = watch.name() >> KIND_BITS;
        Some(match watch.name() & ((1 << KIND_BITS) - 1) {
            0 => Self::Workers,
            1 => Self::Signals,
            2 => Self::Nbd,
            3 => Self::Control,
            4 => Self::Client(ClientId::of(number)),
            5 => Self::Peer(PeerId(number)),
            6 => Self::NbdTcp,
            _ => return None,
        })
    }
}

/// What a wait brought.
#[derive(Debug)]
pub enum Happening {
    /// A socket can be read or written, or hung up.
    Ready(Source, PollFlags),
    /// An operation ended.
    Ended(OpId, Result<Completion, Failure>),
    /// An operation is to be carried out by a worker after all.
    Again(OpId, Work),
}

/// What became of an operation handed to a [`Reactor`].
#[derive(Debug)]
pub enum Started {
    /// A [`Happening`] will tell.
    UnderWay,
    /// It is done.
    Done(Completion),
    /// It is for a worker.
    ForWorker(Work),
}

/// See the module.
pub enum Reactor {
    /// `poll`, and reads of what the page cache has.
    Poll(CachedReads),
    /// A ring.
    Ring(Box<Uring>),
}

impl Reactor {
    /// Chooses. To be called on the thread that will use it.
    ///
    /// # Errors
    /// Why there is no ring, if nothing else will do.
    pub fn new(choice: DriverChoice, arena: Option<Arc<Arena>>) -> io::Result<Self> {
        if choice == DriverChoice::Threads {
            return Ok(Self::Poll(CachedReads::default()));
        }
        match Uring::new(arena) {
            Ok(ring) => Ok(Self::Ring(Box::new(ring))),
            Err(error) if choice == DriverChoice::Auto => {
                tracing::warn!(%error, "no io_uring: threads move the data");
                Ok(Self::Poll(CachedReads::default()))
            }
            Err(error) => Err(error),
        }
    }

    /// A word for it.
    #[must_use]
    pub fn word(&self) -> &'static str {
        match self {
            Self::Poll(_) => "threads",
            Self::Ring(_) => "uring",
        }
    }

    /// Starts an operation.
    pub fn start(&mut self, id: OpId, mut work: Work) -> Started {
        match self {
            Self::Poll(cached) => match work.run_at_once(cached) {
                Some(completion) => Started::Done(completion),
                None => Started::ForWorker(work),
            },
            Self::Ring(ring) => match ring.start(id, work) {
                Ok(()) => Started::UnderWay,
                Err(work) => Started::ForWorker(work),
            },
        }
    }

    /// Waits until something happened, at most so long; what.
    ///
    /// # Errors
    /// When waiting itself fails.
    pub fn wait(
        &mut self,
        sources: &[(Source, BorrowedFd<'_>, PollFlags)],
        timeout: Option<Duration>,
        happened: &mut Vec<Happening>,
    ) -> io::Result<()> {
        match self {
            Self::Poll(_) => poll(sources, timeout, happened),
            Self::Ring(ring) => {
                for (source, fd, want) in sources {
                    if let Some(watch) = source.watch() {
                        ring.watch(watch, *fd, *want);
                    }
                }
                ring.wait(timeout)?;
                happened.extend(std::iter::from_fn(|| ring.next_event()).filter_map(|event| {
                    Some(match event {
                        Event::Ended(id, result) => Happening::Ended(id, result),
                        Event::Again(id, work) => Happening::Again(id, work),
                        Event::Ready(watch, flags) => Happening::Ready(Source::of(watch)?, flags),
                    })
                }));
                Ok(())
            }
        }
    }

    /// A file is about to be closed; nothing of it is under way.
    pub fn forget(&mut self, file: FileId) {
        if let Self::Ring(ring) = self {
            ring.forget(file);
        }
    }
}

fn poll(
    sources: &[(Source, BorrowedFd<'_>, PollFlags)],
    timeout: Option<Duration>,
    happened: &mut Vec<Happening>,
) -> io::Result<()> {
    let mut fds: Vec<PollFd<'_>> = sources.iter().map(|(_, fd, want)| PollFd::new(*fd, *want)).collect();
    let timeout = match timeout {
        None => PollTimeout::NONE,
        // Rounded up: waking a moment too early would spin.
        Some(wait) => PollTimeout::try_from(wait + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX),
    };
    match nix::poll::poll(&mut fds, timeout) {
        Ok(_) | Err(nix::Error::EINTR) => {}
        Err(error) => return Err(error.into()),
    }
    let ready = sources.iter().zip(&fds).filter_map(|((source, ..), fd)| {
        fd.revents().filter(|flags| !flags.is_empty()).map(|flags| Happening::Ready(*source, flags))
    });
    happened.extend(ready);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_is_recognised_by_its_watch() {
        let sources = [
            Source::Workers,
            Source::Signals,
            Source::Nbd,
            Source::NbdTcp,
            Source::Control,
            Source::Client(ClientId::of(77)),
            Source::Peer(PeerId(1 << 40)),
        ];
        for source in sources {
            assert_eq!(Source::of(source.watch().unwrap()), Some(source));
        }
        assert_eq!(Source::Peer(PeerId(1 << 58)).watch(), None);
    }
}
