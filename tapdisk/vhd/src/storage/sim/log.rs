//! The log of everything that happened, and walking along it.

use std::fmt;
use std::sync::Arc;

use super::super::Why;
use super::effect::{Ino, Lasting};
use super::run::RunEvent;
use super::state::State;

/// Names an operation in the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct OpNo(pub(super) u64);

/// One entry of the log. A prefix of the log is an instant.
#[derive(Clone)]
pub(super) enum Event {
    /// An operation was issued: from here on it may have any part of its effect.
    Begin(OpNo, Arc<Op>),
    /// It completed: from here on readers see all of it.
    End(OpNo, Outcome),
    /// The scenario's own mark.
    Mark(u64),
    /// Something in the run folder; instant.
    Run(RunEvent),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    Done,
    Failed,
}

/// An operation that changes something.
#[derive(Debug)]
pub(super) struct Op {
    pub(super) what: What,
    pub(super) why: Why,
    /// Sabotaged: it completes without effect.
    pub(super) void: bool,
}

pub(super) enum What {
    Write { ino: Ino, offset: u64, bytes: Arc<[u8]> },
    Zero { ino: Ino, offset: u64, len: u64, keep: bool },
    SetLen { ino: Ino, len: u64 },
    Copy { from: Ino, from_at: u64, to: Ino, to_at: u64, len: u64 },
    Flush { ino: Ino },
    Create { path: Arc<str>, ino: Ino },
    Link { from: Arc<str>, to: Arc<str> },
    Rename { from: Arc<str>, to: Arc<str> },
    Unlink { path: Arc<str> },
    SyncNames { folder: Arc<str> },
    MakeFolder { folder: Arc<str> },
    Lasting(Lasting),
}

impl fmt::Debug for What {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Write { ino, offset, bytes } => {
                write!(f, "write #{} {offset}+{}", ino.0, bytes.len())
            }
            Self::Zero { ino, offset, len, keep } => {
                write!(f, "zero #{} {offset}+{len}{}", ino.0, if *keep { " keep" } else { "" })
            }
            Self::SetLen { ino, len } => write!(f, "set length #{} {len}", ino.0),
            Self::Copy { from, from_at, to, to_at, len } => {
                write!(f, "copy #{} {from_at}+{len} to #{} {to_at}", from.0, to.0)
            }
            Self::Flush { ino } => write!(f, "flush #{}", ino.0),
            Self::Create { path, ino } => write!(f, "create {path} #{}", ino.0),
            Self::Link { from, to } => write!(f, "link {from} {to}"),
            Self::Rename { from, to } => write!(f, "rename {from} {to}"),
            Self::Unlink { path } => write!(f, "unlink {path}"),
            Self::SyncNames { folder } => write!(f, "sync names of {folder:?}"),
            Self::Lasting(change) => write!(f, "{change}"),
            Self::MakeFolder { folder } => write!(f, "make folder {folder}"),
        }
    }
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Begin(no, op) => {
                let void = if op.void { " [left out]" } else { "" };
                write!(f, "begin {} {:?} ({}){void}", no.0, op.what, op.why)
            }
            Self::End(no, Outcome::Done) => write!(f, "end {}", no.0),
            Self::End(no, Outcome::Failed) => write!(f, "failed {}", no.0),
            Self::Mark(mark) => write!(f, "mark {mark}"),
            Self::Run(event) => write!(f, "run {event:?}"),
        }
    }
}

/// Events between two remembered states. A state costs about as much as a few
/// hundred events.
const CHECKPOINT_EVENTS: usize = 256;

/// Walks along a log and remembers states on the way, so that going through
/// all prefixes in order costs one replay, and a step back at most
/// [`CHECKPOINT_EVENTS`] events.
#[derive(Clone)]
pub(super) struct Cursor {
    at: usize,
    state: State,
    checkpoints: Vec<(usize, State)>,
}

impl Cursor {
    pub(super) fn new(base: State) -> Self {
        let checkpoints = vec![(0, base.clone())];
        Self { at: 0, state: base, checkpoints }
    }

    /// The state after the first `prefix` events.
    pub(super) fn seek(&mut self, log: &[Event], prefix: usize) -> &State {
        let prefix = prefix.min(log.len());
        if prefix < self.at {
            let near = self.checkpoints.partition_point(|(at, _)| *at <= prefix) - 1;
            let (at, state) = &self.checkpoints[near];
            (self.at, self.state) = (*at, state.clone());
        }
        while self.at < prefix {
            self.state.apply(&log[self.at]);
            self.at += 1;
            let last = self.checkpoints.last().map_or(0, |(at, _)| *at);
            if self.at >= last + CHECKPOINT_EVENTS {
                self.checkpoints.push((self.at, self.state.clone()));
            }
        }
        &self.state
    }
}
