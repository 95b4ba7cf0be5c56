//! Work under way and work that ended.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Serialize;
use uuid::Uuid;

use crate::receipt::Receipt;
use crate::report::Expected;
use crate::watch::Ledger;

/// Kinds of work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Hidden nodes into their parent.
    Inner,
    /// A leaf into its parent.
    Leaf,
    /// Garbage.
    Delete,
}

impl Kind {
    /// What the history of an SR calls it.
    #[must_use]
    pub fn operation(self) -> &'static str {
        match self {
            Self::Inner => "coalesce",
            Self::Leaf => "leaf-coalesce",
            Self::Delete => "collect-garbage",
        }
    }
}

/// Work under way.
#[derive(Debug, Clone)]
pub struct Doing {
    /// What kind.
    pub kind: Kind,
    /// Nodes concerned, the one that names it first, the parent last.
    pub nodes: Vec<Uuid>,
    /// Its record, once that stands.
    pub intent: Option<Uuid>,
    /// Whether a tapdisk does it.
    pub attached: bool,
    /// When it began.
    pub began: Duration,
    /// The same on the wall clock, milliseconds since 1970.
    pub began_ms: u64,
    /// What it did so far.
    pub ledger: Ledger,
    /// It was told to stop.
    pub aborted: bool,
    /// All work was told to stop, not this one for its own sake: it begins
    /// again as soon as anything may.
    pub held: bool,
    /// VDIs of its tree that somebody waits for.
    pub focus: Vec<Uuid>,
    /// Bytes it may still gain on balance, as forecast.
    pub room: u64,
    /// What it was chosen by.
    pub expected: Option<Expected>,
    /// What it reads for its receipt just now, if that is what it does.
    pub reading: Option<Reading>,
}

/// How far a job is with the readings for its receipt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reading {
    /// Which of them.
    pub what: &'static str,
    /// Which disk, counted from 1.
    pub disk: usize,
    /// Of how many.
    pub disks: usize,
}

impl Doing {
    /// Work that begins now.
    #[must_use]
    pub fn new(kind: Kind, nodes: Vec<Uuid>, now: Duration) -> Self {
        Self {
            kind,
            nodes,
            intent: None,
            attached: false,
            began: now,
            began_ms: wall_ms(),
            ledger: Ledger::default(),
            aborted: false,
            held: false,
            focus: Vec::new(),
            room: 0,
            expected: None,
            reading: None,
        }
    }

    /// Bytes per second so far.
    #[must_use]
    pub fn rate(&self, now: Duration) -> f64 {
        self.ledger.done as f64 / now.saturating_sub(self.began).as_secs_f64().max(0.001)
    }
}

/// Work that ended.
#[derive(Debug, Clone, Serialize)]
pub struct Done {
    /// Names it: the intent, or a number for a deletion.
    pub job: String,
    /// The node that names it.
    pub vdi: Uuid,
    /// What kind.
    pub kind: Kind,
    /// When it began, milliseconds since 1970.
    pub began_ms: u64,
    /// When it ended, milliseconds since 1970.
    pub ended_ms: u64,
    /// Bytes read and written.
    pub bytes_copied: u64,
    /// Bytes shared.
    pub bytes_cloned: u64,
    /// Bytes of blocks that went away on balance.
    pub bytes_freed: u64,
    /// Most room needed beyond what was in use when it began.
    pub peak_extra_bytes: u64,
    /// Times space was given back before all was copied, as there was not
    /// enough of it; every leaf merge that we run ourselves does that.
    pub slices: u64,
    /// What it was expected to come to; not there for one that was carried on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub predicted: Option<Expected>,
    /// What became of the disks that stood on it, if that was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub receipt: Option<Receipt>,
    /// Why it ended early, or what is wrong after it.
    pub error: Option<String>,
}

pub(super) fn wall_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
