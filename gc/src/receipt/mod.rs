//! Content receipts: what every visible disk reads is hashed before a merge
//! and again after it, block by block, and must be the same (invariant 3).
//!
//! ```text
//!   receipts are asked for, a merge was chosen
//!     1  each disk that stands on the merged nodes: first reading
//!     2  the merge, whole: its record written, done, cleared
//!     3  each of them: second reading; compared; kept with the history
//! ```
//!
//! The tree is not planned for in all three. No lease and no lock outlives the
//! reading of one disk, so 1 and 3 hold up nobody: who wants to attach or
//! resize a disk that is being read has the reading end (see
//! [`sm::lease::Reader::Yielding`]), a detach does not ask about an observer.
//!
//! # Why a difference is one, and none is a guest's
//!
//! Guests go on all the while, and disks come and go. A block counts as
//! different only where it is *certain* that nobody could write it:
//!
//! * **Attached for writing.** Only its tapdisk knows what is written, so it is
//!   read through it. The tapdisk keeps a list from before the first reading
//!   begins to after the second has ended; a block is on it before its change
//!   can be seen, and what was on its way when the list began is on it from the
//!   beginning. So a block that is not on the list was not written between its
//!   two readings. One that is on it counts as written, whatever it holds. The
//!   list dies with the process, and an order for it names it: a tapdisk that
//!   died, or was detached and attached again, does not know it, and the
//!   receipt of this disk is void.
//! * **Not attached, or for reading only.** It has a *content id*
//!   ([`sm::identity`]), which is forgotten under the SR lock before the disk
//!   can change: before it is attached for writing, resized, reverted. Both
//!   readings hold a lease, under which none of these can begin, and look at
//!   the id while they hold it. The same id at both: nobody could write it
//!   between the two. Another or none: void. Ids are random and never used
//!   again; a snapshot's is its own uuid, and nobody writes a snapshot.
//! * Of another size than before, deleted, busy for long, unreachable, wanted
//!   by somebody during a reading: void, with that reason.
//!
//! A void receipt says nothing, and alarms nobody. What *cannot be read* any
//! more after a merge although it could before is as bad as a difference and
//! treated as one.
//!
//! # What ends early
//!
//! First readings are in memory. A merge that was aborted, and one whose
//! collector ended or died, have no receipt or a void one: nothing is
//! compared with a reading nobody remembers. Its next attempt begins with
//! readings of its own; a merge that is carried on from its record has a void
//! receipt, because some of it was done before.
//!
//! The SR's history says so, whoever dies when. A line of its own
//! ([`Opened`]) says that a receipt is *open*, with what each disk was, once
//! the merge's record stands and before its first step; the job's line says
//! how it was closed ([`State`]). A collector that dies
//!
//! * before 2 leaves neither: nothing was merged;
//! * in 2 leaves an open one, closed as void by whoever carries the merge on;
//! * after it leaves an open one that nobody closes: the merge was not
//!   compared. What the disks were stands in that line.
//!
//! # A difference
//!
//! The job ends as failed, naming disk and blocks; it is an error in the log, a
//! metric, and a line of the SR's status. And it is an [`Alarm`], kept in the
//! SR's catalog: nothing is merged or deleted in a tree with such a disk, by
//! this collector or a later one, until a person has looked and says so
//! (`coppice gc acknowledge`). A crash after the second reading and before the
//! alarm is written loses it: that is a moment.

pub mod compare;
mod live;
mod read;
pub(crate) mod witness;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

pub use compare::Found;
pub(crate) use witness::Witness;

/// What came of one disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "verdict", rename_all = "snake_case")]
pub enum Verdict {
    /// Every block that nobody wrote reads as before.
    Same(Found),
    /// Some do not.
    Different(Found),
    /// It could be read before the merge and cannot be now.
    Unreadable {
        /// What reading says.
        reason: String,
    },
    /// Nothing can be said.
    Void {
        /// Why not.
        reason: String,
    },
}

impl Verdict {
    pub(crate) fn void(reason: impl Into<String>) -> Self {
        Self::Void { reason: reason.into() }
    }

    fn of(found: Found) -> Self {
        if found.different == 0 { Self::Same(found) } else { Self::Different(found) }
    }

    /// What is wrong, if anything is.
    fn trouble(&self) -> Option<String> {
        match self {
            Self::Same(_) | Self::Void { .. } => None,
            Self::Unreadable { reason } => Some(format!("cannot be read any more: {reason}")),
            Self::Different(found) => {
                let named: Vec<String> = found.different_blocks.iter().map(u32::to_string).collect();
                let more = if found.different > named.len() as u64 { ", …" } else { "" };
                let (different, blocks) = (found.different, found.blocks);
                let named = named.join(", ");
                Some(format!("differs in {different} of {blocks} blocks of 2 MiB ({named}{more})"))
            }
        }
    }
}

/// One disk's part of a receipt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DiskReceipt {
    /// The disk.
    pub vdi: Uuid,
    /// Whether it was read through its tapdisk, guests writing meanwhile.
    pub attached: bool,
    /// What came of it.
    #[serde(flatten)]
    pub verdict: Verdict,
    /// SHA-256 over numbers and SHA-256 of all blocks that were not zeros, at
    /// the first reading and at the second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sha256: Option<[compare::Digest; 2]>,
}

/// How far a receipt is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// First readings were taken; the job's own line will say what came of
    /// it. If there is none, nothing was compared.
    Open,
    /// Both readings were taken, and each disk says what came of it.
    #[default]
    Compared,
    /// It says nothing.
    Void,
}

/// A line of history: the receipt of a job is open.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Opened {
    /// The job.
    pub job: String,
    /// The receipt so far.
    pub receipt: OpenReceipt,
}

/// A receipt with first readings alone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct OpenReceipt {
    /// [`State::Open`].
    pub state: State,
    /// The disks that were read.
    pub disks: Vec<FirstReading>,
}

/// What a disk was before a merge.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct FirstReading {
    /// The disk.
    pub vdi: Uuid,
    /// As in [`DiskReceipt`]; not there where it could not be read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sha256: Option<compare::Digest>,
}

/// What came of a job's disks.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Receipt {
    /// How far it is: never open in the line of a job that ended.
    pub state: State,
    /// Each disk that stood on the merged nodes.
    pub disks: Vec<DiskReceipt>,
    /// Why there is nothing about any of them, if so.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub void: Option<String>,
    /// Bytes read for it.
    pub bytes_read: u64,
}

impl Receipt {
    /// One that says nothing.
    pub(crate) fn void(reason: impl Into<String>) -> Self {
        Self { state: State::Void, void: Some(reason.into()), ..Self::default() }
    }

    /// Disks that are not what they were.
    pub(crate) fn troubled(&self) -> impl Iterator<Item = (Uuid, String)> + '_ {
        self.disks.iter().filter_map(|disk| Some((disk.vdi, disk.verdict.trouble()?)))
    }

    /// What a person is to be told, if something is wrong.
    pub(crate) fn alarm(&self, job: &str) -> Option<Alarm> {
        let (disks, texts): (Vec<Uuid>, Vec<String>) =
            self.troubled().map(|(vdi, what)| (vdi, format!("disk {vdi} {what}"))).unzip();
        if disks.is_empty() {
            return None;
        }
        let text = format!(
            "content receipt: after this merge {}; nothing more is merged in its tree: \
            compare it with a backup, then `coppice gc acknowledge SR {job}`",
            texts.join("; ")
        );
        Some(Alarm { job: job.to_owned(), disks, text })
    }
}

/// A difference that nobody has said anything to yet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Alarm {
    /// The merge.
    pub job: String,
    /// Disks that are not what they were: their trees wait.
    pub disks: Vec<Uuid>,
    /// Everything about it, for people.
    pub text: String,
}
