//! A decided swap: the prepared child takes the leaf's name and place.
//!
//! Nothing can take it back, and nobody else may do it while this process
//! lives. So a rename that fails is tried again: with growing waits, a stated
//! number of times, and after that whenever it is asked for. Until then guest
//! requests are held, as in any pause: a write to the former leaf would change
//! what is a snapshot by now.
//!
//! ```text
//!   Renaming ------ it has the name ------> a new leaf, requests run
//!     |    ^
//!   fails  | its time comes, or somebody asks
//!     v    |
//!   Waiting --- too many attempts ---> OnRequest --- somebody asks ---> Renaming
//! ```

use std::io;

use super::command::{CommandError, CommandReply, NewLeaf, Token};
use super::image::Purpose;
use super::quiesce::State;
use super::{Engine, Image, Op, Second};
use crate::limits::{SWAP_ATTEMPTS_MAX, SWAP_ATTEMPTS_TOLD, SWAP_WAIT_US_FIRST, SWAP_WAIT_US_MAX};

/// A leaf on its way in.
#[derive(Debug)]
pub(super) struct Swapping {
    token: Token,
    /// It still has its temporary name.
    leaf: NewLeaf,
    /// Attempts that failed.
    attempts: u32,
    stage: Stage,
    /// Who waits for the end of the next attempt.
    asked: Option<Token>,
}

/// What the swap waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// A rename under way.
    Renaming,
    /// The time of the next attempt.
    Waiting { until_us: u64, errno: i32 },
    /// Somebody who asks for one.
    OnRequest { errno: i32 },
}

impl Stage {
    /// After the given number of attempts that failed.
    fn after(attempts: u32, now_us: u64, errno: i32) -> Self {
        if attempts >= SWAP_ATTEMPTS_MAX {
            return Self::OnRequest { errno };
        }
        let doublings = attempts.saturating_sub(1);
        let wait_us = SWAP_WAIT_US_FIRST.saturating_mul(1 << doublings.min(32)).min(SWAP_WAIT_US_MAX);
        Self::Waiting { until_us: now_us.saturating_add(wait_us), errno }
    }
}

impl Swapping {
    /// What is wrong, while an attempt that failed was the last one.
    pub(super) fn trouble(&self) -> Option<String> {
        let (errno, next) = match self.stage {
            Stage::Renaming => return None,
            Stage::Waiting { errno, .. } => (errno, "it is tried again"),
            Stage::OnRequest { errno } => (errno, "it is tried again when an operation asks for it"),
        };
        let (new, over, attempts) = (&self.leaf.image.name, &self.leaf.name, self.attempts);
        let error = io::Error::from_raw_os_error(errno);
        Some(format!("{new} cannot take the name {over}: {error}; {attempts} attempts, {next}"))
    }
}

impl Engine {
    /// Gives the prepared child the leaf's name: the only step inside the
    /// pause, one rename or two; nothing is synced (the next FLUSH, and the
    /// snapshot's own answer, owe that).
    pub(super) fn swap(&mut self, token: Token, leaf: NewLeaf) -> Result<(), CommandError> {
        if self.stack.len() != 1 {
            return Err(CommandError::Busy("no single leaf to swap"));
        }
        let stage = Stage::Renaming;
        self.state = State::Swapping(Box::new(Swapping { token, leaf, attempts: 0, stage, asked: None }));
        self.rename_leaf();
        Ok(())
    }

    /// Whether a swap was decided and is not done.
    #[must_use]
    pub fn is_swapping(&self) -> bool {
        matches!(self.state, State::Swapping(_))
    }

    /// Starts the next attempt if it is time.
    pub(super) fn swap_when_due(&mut self) {
        let now_us = self.now_us;
        if let Some(Swapping { stage: Stage::Waiting { until_us, .. }, .. }) = self.state.swapping()
            && *until_us <= now_us
        {
            self.rename_leaf();
        }
    }

    /// An attempt now; answered when it ends.
    pub(super) fn swap_now(&mut self, asked: Token) -> Result<(), CommandError> {
        let Some(swapping) = self.state.swapping() else {
            return Err(CommandError::Busy("no swap is under way"));
        };
        if swapping.asked.is_some() {
            return Err(CommandError::Busy("the swap is being tried already"));
        }
        swapping.asked = Some(asked);
        if swapping.stage != Stage::Renaming {
            self.rename_leaf();
        }
        Ok(())
    }

    fn rename_leaf(&mut self) {
        let Some(swapping) = self.state.swapping() else { return };
        swapping.stage = Stage::Renaming;
        let leaf = &swapping.leaf;
        let op = Op::Swap {
            new: leaf.image.name.clone(),
            over: leaf.name.clone(),
            aside: leaf.aside.clone(),
            why: "swap: the new leaf takes the name",
        };
        self.start(op, Purpose::Swap);
    }

    pub(super) fn swapped(&mut self, result: Result<(), i32>) {
        let now_us = self.now_us;
        if let (Err(errno), Some(swapping)) = (result, self.state.swapping()) {
            swapping.attempts = swapping.attempts.saturating_add(1);
            swapping.stage = Stage::after(swapping.attempts, now_us, errno);
            let trouble = swapping.trouble().unwrap_or_default();
            // Who resumed is told once; the swap still answers when it is done.
            let told = (swapping.attempts == SWAP_ATTEMPTS_TOLD).then_some(swapping.token);
            let asked = swapping.asked.take();
            for token in [told, asked].into_iter().flatten() {
                self.answer(token, Err(CommandError::Failed(trouble.clone())));
            }
            return;
        }
        let Some(Swapping { token, leaf, asked, .. }) = self.state.take_swap() else { return };
        let NewLeaf { image, name, .. } = leaf;
        if let Some(former) = self.stack.first_mut() {
            // Settling it cuts off what no write completed in.
            former.rw.drop_unwritten();
        }
        self.stack.insert(0, Image { name, ..image });
        self.second = Second::Frozen;
        self.names_owed = true;
        self.release();
        for token in [Some(token), asked].into_iter().flatten() {
            self.answer(token, Ok(CommandReply::Done));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_to_their_limit_and_attempts_have_one() {
        let mut waited_us = Vec::new();
        let mut attempts = 1;
        while let Stage::Waiting { until_us, errno: 28 } = Stage::after(attempts, 1000, 28) {
            waited_us.push(until_us - 1000);
            attempts += 1;
        }
        assert_eq!(Stage::after(attempts, 1000, 28), Stage::OnRequest { errno: 28 });
        assert_eq!(attempts, SWAP_ATTEMPTS_MAX);
        assert_eq!(waited_us.first(), Some(&SWAP_WAIT_US_FIRST));
        assert_eq!(waited_us.last(), Some(&SWAP_WAIT_US_MAX));
        assert!(waited_us.windows(2).all(|two| two[1] == (two[0] * 2).min(SWAP_WAIT_US_MAX)));
    }
}
