//! Drivers: what stands between the pure core and the machine.
//!
//! ```text
//!   server (sockets) --submit/call--> Core --Effect--> server
//!                                       ^                |
//!                            complete   |                v
//!                                     Workers (threads.rs), each running
//!                                     exec.rs on the volumes in disk::Files
//! ```
//!
//! One thread owns the core and all sockets; the core never waits. What can
//! wait, an operation on a volume, runs on a worker. The core is the
//! [`crate::service`] around the engine, or a stand-in in tests.

use tapdisk_control::{Answer, Call, Stats};

use crate::engine::{Completion, OpId, Output, Request};

pub mod cached;
pub mod exec;
#[cfg(feature = "sim")]
pub mod sim;
pub mod threads;
pub mod uring;

/// A control connection, or the process itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PeerId(pub u64);

impl PeerId {
    /// The process itself: who asks for the stop when a signal arrives.
    /// Answers to it go nowhere.
    pub const SELF: Self = Self(0);
}

/// A background job of a control call: may block, runs beside everything.
pub type Job<D> = Box<dyn FnOnce() -> D + Send>;

/// What the core wants done.
pub enum Effect<D> {
    /// What the engine gave out. Never [`Output::Answer`].
    Engine(Output),
    /// An answer to a control peer.
    Answer(PeerId, Answer),
    /// Run this, then give its result to [`Core::job_done`].
    Run(Job<D>),
    /// The disk has this size in bytes from here on.
    Resized(u64),
    /// Everything is settled and closed: end the process.
    Exit,
}

/// The pure middle of a tapdisk, as drivers see it. `now_us` is microseconds
/// since an arbitrary start and never goes back.
pub trait Core {
    /// What a background job brings back.
    type JobDone: Send + 'static;

    /// Takes a guest request; it is answered by [`Output::Done`].
    fn submit(&mut self, now_us: u64, request: Request);
    /// An operation ended.
    fn complete(&mut self, now_us: u64, op: OpId, completion: Completion);
    /// Takes a control call; a peer has at most one unanswered. `counters` is
    /// what the server knows of the statistics.
    fn call(&mut self, now_us: u64, peer: PeerId, call: Call, counters: &Stats);
    /// A control connection ended; what it leased is over.
    fn peer_gone(&mut self, now_us: u64, peer: PeerId);
    /// A background job ended.
    fn job_done(&mut self, now_us: u64, done: Self::JobDone);
    /// Time has passed.
    fn tick(&mut self, now_us: u64);
    /// When the next [`Core::tick`] is wanted at the latest.
    fn tick_due_us(&self) -> Option<u64>;
    /// The next thing to do; to be called until there is none, after each of
    /// the above.
    fn next_effect(&mut self) -> Option<Effect<Self::JobDone>>;
}
