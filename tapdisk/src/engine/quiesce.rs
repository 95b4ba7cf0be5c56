//! Holding guest requests: for a pause, and for the instant at which a leaf
//! merge begins or ends.
//!
//! ```text
//!            drain_then               nothing in flight
//!  Running -------------> Draining ----------------------> Held --Resume--> Running
//!                             |                             | Resume{swap}
//!                             +-- merge start, stop --> Running   Swapping --> Running
//! ```

use super::command::{CommandError, CommandReply, Token};
use super::merge::MergeBounds;
use super::swap::Swapping;
use super::{CleanWaiter, Engine, Image, Lower};

/// How long requests were held at pauses and drains, in microseconds.
#[derive(Debug, Clone, Copy, Default)]
pub struct Holds {
    since_us: u64,
    /// At the last one.
    pub last_us: u64,
    /// At the longest one.
    pub longest_us: u64,
}

/// Whether guest requests run.
#[derive(Debug)]
pub(super) enum State {
    /// They do.
    Running,
    /// New ones queue until those in flight are done.
    Draining(Then),
    /// Nothing is in flight.
    Held,
    /// As held; a swap was decided: see [`super::swap`].
    Swapping(Box<Swapping>),
}

/// What happens once nothing is in flight.
#[derive(Debug)]
pub(super) enum Then {
    Pause(Token),
    MergeStart { token: Token, parent: Box<Image>, below: Box<Lower>, bounds: MergeBounds },
    MergeStop(Token),
    Close(Token),
}

impl State {
    pub(super) fn runs(&self) -> bool {
        matches!(self, Self::Running)
    }

    pub(super) fn is_held(&self) -> bool {
        matches!(self, Self::Held)
    }

    pub(super) fn swapping(&mut self) -> Option<&mut Swapping> {
        match self {
            Self::Swapping(swapping) => Some(swapping),
            _ => None,
        }
    }

    /// What is being swapped in; the state is held again.
    pub(super) fn take_swap(&mut self) -> Option<Swapping> {
        match std::mem::replace(self, Self::Held) {
            Self::Swapping(swapping) => Some(*swapping),
            other => {
                *self = other;
                None
            }
        }
    }

    pub(super) fn word(&self) -> String {
        let word = match self {
            Self::Running => "running",
            Self::Draining(_) => "draining",
            Self::Held => "paused",
            Self::Swapping(swapping) => match swapping.trouble() {
                Some(trouble) => return format!("stuck: {trouble}"),
                None => "paused",
            },
        };
        word.to_owned()
    }
}

impl Engine {
    pub(super) fn drain_then(&mut self, then: Then) -> Result<(), CommandError> {
        match self.state {
            State::Running => {
                self.holds.since_us = self.now_us;
                self.state = State::Draining(then);
                Ok(())
            }
            State::Held if matches!(then, Then::Close(_)) => {
                self.state = State::Draining(then);
                Ok(())
            }
            State::Draining(_) => Err(CommandError::Busy("already draining")),
            State::Held | State::Swapping(_) => Err(CommandError::Busy("paused")),
        }
    }

    pub(super) fn progress_quiesce(&mut self) {
        if !self.active.is_empty() {
            return;
        }
        let then = match std::mem::replace(&mut self.state, State::Held) {
            State::Draining(then) => then,
            other => {
                self.state = other;
                return;
            }
        };
        match then {
            Then::Pause(token) => {
                let leaf_is_empty = self.leaf_blocks() == 0;
                self.answer(token, Ok(CommandReply::Paused { leaf_is_empty }));
            }
            Then::MergeStart { token, parent, below, bounds } => {
                self.merge_begins(*parent, *below, bounds);
                self.release();
                self.answer(token, Ok(CommandReply::Done));
                // Nothing may be in flight whose end would move it on.
                self.progress_merge();
            }
            Then::MergeStop(token) => {
                self.merge_ends();
                self.release();
                self.answer(token, Ok(CommandReply::Done));
            }
            Then::Close(token) => {
                self.clean.push(CleanWaiter { token, file: None, quiet: true, since_us: self.now_us });
                self.progress_clean();
            }
        }
    }

    /// How long requests were held.
    #[must_use]
    pub fn holds(&self) -> Holds {
        self.holds
    }

    /// Lets requests run again, those that queued first.
    pub(super) fn release(&mut self) {
        self.state = State::Running;
        self.holds.last_us = self.now_us.saturating_sub(self.holds.since_us);
        self.holds.longest_us = self.holds.longest_us.max(self.holds.last_us);
        while let Some(request) = self.queue.pop_front() {
            self.begin(request);
        }
    }
}
