//! The one thread that owns the core and every socket.
//!
//! ```text
//!             +------------ wait (reactor) ------------+
//!             |                                        |
//!   ring    --+--> complete --+                        |
//!   workers --+--> complete --+                        |
//!   clients --+--> submit   --+--> Core --> effects ---+--> ring, workers, sockets
//!   peers   --+--> call     --+
//! ```
//!
//! Guest data moves on the ring where there is one, else on the workers;
//! which, is decided once, at the start ([`reactor`]).
//!
//! All sockets are non-blocking and each gets a bounded share of a turn, so a
//! peer that stalls, floods or sends garbage costs the others nothing. All
//! that can block runs on the [`Workers`].
//!
//! Absent on purpose: any decision about the disk.

use std::io;
use std::net::TcpListener;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::poll::PollFlags;
use nix::sys::signalfd::SignalFd;
use tapdisk_control::{Call, Request as ControlRequest};
use vhd::storage::Volumes;

mod client;
mod clients;
mod counters;
mod doors;
#[cfg(any(test, feature = "fuzz"))]
pub mod fuzz;
mod guests;
mod peers;
mod reactor;
mod transport;

pub use reactor::DriverChoice;

use crate::buffer::Pool;
use crate::disk::Files;
use crate::driver::exec::{Failure, Tables, prepare};
use crate::driver::threads::{Ended, Workers};
use crate::driver::{Core, Effect, PeerId};
use crate::engine::{BufferRange, Completion, Op, OpId, Output};
use crate::limits::{COMPLETIONS_PER_TURN, FAILURE_LOG_PAUSE, FAREWELL_TIME_MAX, STOP_RETRY, STOP_TIME_MAX};
use crate::nbd::Export;
use crate::tls::Tls;
use clients::Clients;
use doors::Doors;
use guests::{Answered, Guests};
use peers::Peers;
use reactor::{Happening, Reactor, Source, Started};

/// What a server is made from.
#[derive(Debug)]
pub struct Parts {
    /// What clients are offered.
    pub export: Export,
    /// Where those of this host connect.
    pub nbd: UnixListener,
    /// Where all others do.
    pub tcp: Option<TcpListener>,
    /// With it, these must use TLS.
    pub tls: Option<Tls>,
    /// Where control peers connect.
    pub control: UnixListener,
    /// The repository.
    pub volumes: Arc<dyn Volumes>,
    /// Volumes the core knows by number.
    pub files: Arc<Files>,
    /// Readable when the process is asked to end.
    pub signals: Option<SignalFd>,
    /// What moves guest data.
    pub driver: DriverChoice,
}

/// Serves one disk. See the module.
pub struct Server<C: Core> {
    core: C,
    started: Instant,
    /// When this turn began, in microseconds since the start.
    now_us: u64,
    workers: Workers<C::JobDone>,
    volumes: Arc<dyn Volumes>,
    files: Arc<Files>,
    doors: Doors,
    signals: Option<SignalFd>,
    clients: Clients,
    peers: Peers,
    guests: Guests,
    reactor: Reactor,
    /// Kept for its memory.
    happened: Vec<Happening>,
    failures: FailureLog,
    /// When a signal asked for the end, and when to try next.
    stopping: Option<Stopping>,
    ending: bool,
}

/// An end asked for by a signal.
#[derive(Debug, Clone, Copy)]
struct Stopping {
    next_attempt: Instant,
    deadline: Instant,
}

/// Says that operations fail, but not each time: a full disk fails thousands
/// of them in a second.
#[derive(Debug, Default)]
struct FailureLog {
    last: Option<Instant>,
    unsaid: u64,
}

impl FailureLog {
    fn note(&mut self, failure: &Failure) {
        let now = Instant::now();
        if self.last.is_some_and(|last| now < last + FAILURE_LOG_PAUSE) {
            self.unsaid += 1;
            return;
        }
        tracing::warn!(error = %failure, unsaid = self.unsaid, "an operation failed");
        (self.last, self.unsaid) = (Some(now), 0);
    }
}

impl<C: Core> Server<C> {
    /// A server that has not begun; its workers have. To be called on the
    /// thread that will run it.
    ///
    /// # Errors
    /// What the system says when threads or descriptors run out, or there is
    /// no io_uring and [`DriverChoice::Uring`] wants one.
    pub fn new(core: C, parts: Parts) -> io::Result<Self> {
        let (pool, arena) = Pool::with_arena().ok_or(io::ErrorKind::OutOfMemory)?;
        let reactor = Reactor::new(parts.driver, Some(arena))?;
        tracing::info!(driver = reactor.word(), "data moves");
        Ok(Self {
            core,
            started: Instant::now(),
            now_us: 0,
            workers: Workers::start()?,
            volumes: parts.volumes,
            files: parts.files,
            doors: Doors::new(parts.nbd, parts.tcp, parts.control)?,
            signals: parts.signals,
            clients: Clients::new(Arc::new(parts.export), parts.tls, pool.clone()),
            peers: Peers::default(),
            guests: Guests::new(pool),
            reactor,
            happened: Vec::new(),
            failures: FailureLog::default(),
            stopping: None,
            ending: false,
        })
    }

    /// Serves until the core says [`Effect::Exit`].
    ///
    /// # Errors
    /// Only when `poll` itself fails.
    pub fn run(mut self) -> io::Result<()> {
        self.settle_turn();
        while !self.ending {
            self.wait()?;
            self.turn_begins();
            for happening in std::mem::take(&mut self.happened) {
                self.handle(happening);
            }
            let now_us = self.now_us;
            if self.core.tick_due_us().is_some_and(|due_us| due_us <= now_us) {
                self.core.tick(now_us);
            }
            self.clients.drop_late_handshakes(Instant::now());
            self.try_stop(Instant::now());
            self.settle_turn();
        }
        self.peers.farewell(Instant::now() + FAREWELL_TIME_MAX);
        Ok(())
    }

    /// What happens in one turn happens at one time.
    fn turn_begins(&mut self) {
        self.now_us = u64::try_from(self.started.elapsed().as_micros()).unwrap_or(u64::MAX);
    }

    /// Waits until something can be done.
    fn wait(&mut self) -> io::Result<()> {
        let timeout = self.timeout();
        let Self { workers, doors, signals, clients, peers, reactor, happened, .. } = self;
        let mut sources: Vec<(Source, BorrowedFd<'_>, PollFlags)> =
            vec![(Source::Workers, workers.wake_fd(), PollFlags::POLLIN)];
        sources.extend(doors.sources(Instant::now()).map(|(door, fd)| (door, fd, PollFlags::POLLIN)));
        if let Some(signals) = &*signals {
            sources.push((Source::Signals, signals.as_fd(), PollFlags::POLLIN));
        }
        sources.extend(clients.sources().map(|(id, fd, want)| (Source::Client(id), fd, want)));
        sources.extend(peers.sources().map(|(id, fd, want)| (Source::Peer(id), fd, want)));
        reactor.wait(&sources, timeout, happened)
    }

    fn timeout(&self) -> Option<Duration> {
        let now = Instant::now();
        let tick = self.core.tick_due_us().map(|due_us| self.started + Duration::from_micros(due_us));
        let stop = self.stopping.map(|stopping| stopping.next_attempt);
        let due = [tick, stop, self.clients.next_deadline(), self.doors.opens(now)];
        let due = due.into_iter().flatten().min();
        due.map(|due| due.saturating_duration_since(now))
    }

    fn handle(&mut self, happening: Happening) {
        let (source, flags) = match happening {
            Happening::Ready(source, flags) => (source, flags),
            Happening::Ended(id, result) => return self.ended(id, result),
            Happening::Again(id, work) => return self.workers.start_op(id, work),
        };
        match source {
            Source::Workers => self.take_ended(),
            Source::Signals => self.take_signals(),
            Source::Nbd => self.doors.heed(self.clients.accept(&self.doors.nbd)),
            Source::NbdTcp => {
                let taken = self.doors.tcp.as_ref().map_or(Ok(()), |tcp| self.clients.accept_tcp(tcp));
                self.doors.heed(taken);
            }
            Source::Control => self.doors.heed(self.peers.accept(&self.doors.control)),
            Source::Client(id) => {
                let now_us = self.now_us;
                let Self { clients, core, guests, .. } = self;
                clients.serve(id, flags, |request| {
                    guests.submit(core, now_us, id, request);
                });
            }
            Source::Peer(id) => self.peers.serve(id, flags),
        }
    }

    /// An operation ended, here or there.
    fn ended(&mut self, id: OpId, result: Result<Completion, Failure>) {
        let completion = result.unwrap_or_else(|failure| {
            self.failures.note(&failure);
            Completion::Failed(failure.errno())
        });
        self.core.complete(self.now_us, id, completion);
    }

    fn take_ended(&mut self) {
        self.workers.drain_wake();
        let now_us = self.now_us;
        for _ in 0..COMPLETIONS_PER_TURN {
            match self.workers.next_ended() {
                None => return,
                Some(Ended::Op(id, result)) => self.ended(id, result),
                Some(Ended::Job(done)) => self.core.job_done(now_us, done),
            }
        }
        self.workers.wake(); // there may be more
    }

    fn take_signals(&mut self) {
        while let Some(Ok(Some(signal))) = self.signals.as_ref().map(SignalFd::read_signal) {
            tracing::info!(signal = signal.ssi_signo, "asked to end by a signal");
            let now = Instant::now();
            let stopping = Stopping { next_attempt: now, deadline: now + STOP_TIME_MAX };
            self.stopping.get_or_insert(stopping);
        }
    }

    /// Asks the core to stop if a signal wants it. It may refuse for a while:
    /// whatever it is busy with has a limit of its own.
    fn try_stop(&mut self, now: Instant) {
        let Some(stopping) = &mut self.stopping else {
            return;
        };
        if now >= stopping.deadline {
            tracing::error!("could not settle in time; ending as it is");
            self.workers.detach();
            self.ending = true;
        } else if now >= stopping.next_attempt {
            stopping.next_attempt = now + STOP_RETRY;
            let call = Call { id: 0, request: ControlRequest::Stop { force: true } };
            let stats = self.guests.stats(self.clients.guests());
            self.core.call(self.now_us, PeerId::SELF, call, &stats);
        }
    }

    /// Carries out effects, and hands over what they made room for, until
    /// nothing is left to do without waiting.
    fn settle_turn(&mut self) {
        loop {
            while let Some(effect) = self.core.next_effect() {
                self.carry_out(effect);
            }
            while let Some(answered) = self.guests.next_answered() {
                let Answered { client, slot, result, extents } = answered;
                self.clients.finish(client, slot, result, &extents);
            }
            self.peers.flush();
            let now_us = self.now_us;
            let mut handed_over = self.peers.take_calls(|event| match event {
                peers::Event::Call(peer, call) => {
                    let stats = self.guests.stats(self.clients.guests());
                    self.core.call(now_us, peer, call, &stats);
                }
                peers::Event::Gone(peer) => self.core.peer_gone(now_us, peer),
            });
            let Self { clients, core, guests, .. } = self;
            handed_over |= clients.flush(|client, request| {
                guests.submit(core, now_us, client, request);
            });
            if !handed_over {
                return;
            }
        }
    }

    fn carry_out(&mut self, effect: Effect<C::JobDone>) {
        match effect {
            Effect::Engine(Output::Start(id, op)) => self.start(id, op),
            Effect::Engine(Output::ZeroFill(range)) => self.zero_fill(range),
            Effect::Engine(Output::Extents(id, extents)) => {
                self.guests.extents(id, extents);
            }
            Effect::Engine(Output::Done(id, result)) => {
                let now_us = self.now_us;
                self.guests.done(&mut self.core, now_us, id, result);
            }
            Effect::Engine(Output::Close(file)) => {
                self.reactor.forget(file);
                self.files.close(file);
            }
            Effect::Engine(Output::Answer(token, _)) => {
                // The service answers its own orders; nobody else gives any.
                debug_assert!(false, "an answer nobody took: {token:?}");
            }
            Effect::Answer(peer, answer) => self.peers.answer(peer, &answer),
            Effect::Run(job) => self.workers.start_job(job),
            Effect::Resized(bytes) => self.clients.resized(bytes),
            Effect::Exit => self.ending = true,
        }
    }

    fn start(&mut self, id: OpId, op: Op) {
        let tables = Tables { files: &self.files, volumes: &self.volumes };
        let buffer_of = |range: BufferRange| self.guests.buffer_of(range).cloned();
        match prepare(op, &tables, buffer_of) {
            Ok(work) => match self.reactor.start(id, work) {
                Started::UnderWay => {}
                Started::Done(completion) => self.core.complete(self.now_us, id, completion),
                Started::ForWorker(work) => self.workers.start_op(id, work),
            },
            Err(errno) => {
                tracing::error!(?id, errno, "an operation names what is not there");
                self.core.complete(self.now_us, id, Completion::Failed(errno));
            }
        }
    }

    fn zero_fill(&mut self, range: BufferRange) {
        let buffer = self.guests.buffer_of(range);
        let loan = buffer.and_then(|buffer| buffer.lend_mut(range.at as usize, range.len as usize));
        match loan {
            Some(mut bytes) => bytes.fill(0),
            None => tracing::error!(?range, "zeros for a range that is not there"),
        }
    }
}

#[cfg(test)]
mod tests;
