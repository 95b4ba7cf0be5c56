//! A look at the SR that failed, and who is told.

use super::State;
use crate::job::Stop;
use crate::report::Report;

/// Why a look at the SR failed as a whole. Nothing was begun by it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct LookFailed {
    /// The stable upper-case word of the API.
    pub code: &'static str,
    /// What happened, and to which file.
    pub message: String,
    /// Whether the next look may go well without anybody's help.
    pub may_pass: bool,
}

impl From<&Stop> for LookFailed {
    fn from(stop: &Stop) -> Self {
        Self { code: stop.code(), message: stop.to_string(), may_pass: stop.may_pass() }
    }
}

impl LookFailed {
    /// Nobody looks any more.
    #[must_use]
    pub fn closed() -> Self {
        let message = "the SR was detached, or gcd was told to end, before all was collected";
        Self { code: "SR_DETACHED", message: message.into(), may_pass: false }
    }
}

/// A collection that was waited for and broke off.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{why}")]
pub struct BrokenOff {
    /// Why.
    pub why: LookFailed,
    /// What was done before.
    pub report: Report,
}

impl State {
    /// A round broke off: what it would have found is not known.
    pub(crate) fn round_failed(&mut self, stop: &Stop) {
        self.round_error = Some(stop.into());
        self.active.clear();
        self.again = false;
    }
}
