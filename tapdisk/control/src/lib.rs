//! What is said to a running tapdisk, and how.
//!
//! One JSON document per line over a Unix stream socket, at most
//! [`LINE_BYTES_MAX`] each. A client sends a [`Call`]; the answer is one or
//! more [`Answer`] lines with the same `id`, the last with `last: true`.
//! Only [`Request::Refresh`] is answered twice. Requests of one connection
//! are served in order; several connections at once are fine.
//!
//! Every order that changes what is served names the footer uuids it is meant
//! for, so that a stale order is refused ([`Refusal::Stale`]).
//!
//! Absent on purpose: sockets to other hosts, authentication (the socket's
//! folder is private to root), any knowledge of VHD.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

mod client;
pub mod nbd;
mod stats;
pub use client::{Client, ClientError};
pub use stats::{CacheStats, Histogram, KindStats, Stats};

/// Longest line either side accepts.
pub const LINE_BYTES_MAX: usize = 64 * 1024;

/// Blocks of extra room that a merge may take where nobody says how many.
pub const MERGE_EXTRA_BLOCKS: u32 = 16;
/// Most that may be asked for.
pub const MERGE_EXTRA_BLOCKS_MAX: u32 = 128;

fn merge_extra_blocks() -> u32 {
    MERGE_EXTRA_BLOCKS
}

/// One request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Call {
    /// Chosen by the client, repeated in the answers.
    pub id: u64,
    /// What is asked.
    #[serde(flatten)]
    pub request: Request,
}

/// One line of answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// The id of the call.
    pub id: u64,
    /// Whether this is the last answer to the call.
    pub last: bool,
    /// What came of it.
    pub outcome: Result<Reply, Refusal>,
}

/// A volume of the SR the tapdisk serves, by name, with the footer uuid it
/// must have.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageRef {
    /// Base name in the SR, like `<uuid>.vhd`.
    pub volume: String,
    /// The uuid in its footer.
    pub footer: Uuid,
}

/// The names under which an intent record stands: its name is its state.
/// `pending` is renamed to `decided` or to `void`, and only one can win.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IntentNames {
    /// While nothing is decided.
    pub pending: String,
    /// Once the swap must happen.
    pub decided: String,
    /// Once it must not.
    pub void: String,
}

/// What can be asked of a tapdisk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case")]
pub enum Request {
    /// Counters and the state of everything below.
    Stats,
    /// Opens `child`, an empty image prepared to become the leaf in place of
    /// `leaf`, so that the swap itself opens nothing.
    Prepare {
        /// The lease of the coming pause.
        intent: IntentNames,
        /// The leaf as the caller knows it.
        leaf: ImageRef,
        /// The prepared child; `None` when the leaf is expected to hold
        /// nothing and will stay the leaf.
        child: Option<ImageRef>,
        /// The volume that the leaf becomes. Without it the swap needs a
        /// repository in which volumes can have two names.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        base: Option<String>,
    },
    /// Stops serving and drains; answered once nothing is in flight. A lease:
    /// after `limit_ms`, or when this connection ends, the tapdisk tries to
    /// void the intent and goes on, swapping if it was decided.
    Pause {
        /// The intent given to `Prepare`.
        intent: IntentNames,
        /// How long the pause may last, in milliseconds.
        limit_ms: u64,
    },
    /// Ends a pause. With `swap` the prepared child takes the leaf's name and
    /// place. Nothing is synced; the next guest FLUSH owes the durability.
    /// Where that failed before, asking again, on any connection, tries it
    /// again at once; refused with why it fails.
    Resume {
        /// The intent given to `Pause`.
        intent: IntentNames,
        /// Whether the intent was decided.
        swap: bool,
    },
    /// After a swap: settles the former leaf, now the volume `base`, and sets
    /// its hidden flag; durable when answered.
    SettleBase {
        /// The former leaf under its new name.
        base: ImageRef,
    },
    /// Re-reads the chain below the leaf while requests go on. With `parent`
    /// the leaf's own header is first given that parent. Answered twice:
    /// [`Reply::HeaderDurable`], then [`Reply::Drained`] once no request uses
    /// the old map.
    Refresh {
        /// The leaf.
        leaf: ImageRef,
        /// Its new parent, if it changes.
        parent: Option<ImageRef>,
    },
    /// Makes durable what was acknowledged before, in the images open for
    /// writing: their tables on disk are then as new as this request. Bounded
    /// by two write-backs of each, whatever guests write meanwhile. Stands in
    /// no other request's way; refused while the disk is paused or ends.
    Settle,
    /// Makes the disk larger while it is served. Guest requests wait while
    /// the leaf's tables change: until those in flight are done, what waits
    /// for a flush is written, and at most 10 MiB of blocks have moved out of
    /// the way of a larger table. NBD clients learn the size when they
    /// connect anew. Durable when answered.
    Grow {
        /// The leaf.
        leaf: ImageRef,
        /// Its new size in bytes, a whole number of blocks.
        virtual_bytes: u64,
    },
    /// Where a range of the disk lies, as requests find it now. Answered
    /// with [`Reply::Extents`], from `offset` on, perhaps for less.
    Extents {
        /// First byte, a multiple of 512.
        offset: u64,
        /// Bytes, a multiple of 512.
        length: u64,
    },
    /// Which blocks the leaf has, memory included: [`Reply::Blocks`].
    LeafBlocks {
        /// First block of interest.
        from: u32,
    },
    /// Notes from here on which blocks are written, trimmed or zeroed, and
    /// which of them already are on their way: one bit a block. There is one
    /// such list; one that was begun before is dropped.
    Track {
        /// Names the list.
        list: Uuid,
    },
    /// Ends a list and hands it out from a block on: [`Reply::Blocks`]. What
    /// is written after the first such request is not in it. Refused with
    /// [`Refusal::Stale`] where the list is not: another was begun since, or
    /// this process did not begin it.
    Tracked {
        /// The list.
        list: Uuid,
        /// First block of interest.
        from: u32,
    },
    /// Drops a list; fine if it is not there.
    TrackEnd {
        /// The list.
        list: Uuid,
    },
    /// Starts merging the leaf into its parent.
    MergeStart {
        /// The leaf to empty.
        leaf: ImageRef,
        /// Its parent, which takes everything.
        parent: ImageRef,
        /// Most bytes copied per second; 0 is no limit.
        rate_bytes_per_s: u64,
        /// Most blocks of 2 MiB for which the parent takes room before the
        /// leaf gives any back: 1 to [`MERGE_EXTRA_BLOCKS_MAX`],
        /// [`MERGE_EXTRA_BLOCKS`] unless told.
        #[serde(default = "merge_extra_blocks")]
        extra_blocks_max: u32,
    },
    /// Changes the rate of the running merge from now on.
    MergeRate {
        /// Most bytes copied per second; 0 is no limit.
        rate_bytes_per_s: u64,
    },
    /// How far the merge is: [`Reply::Merge`].
    MergeStatus,
    /// Stops the merge, bounded by one window; the parent is settled and
    /// read-only again when this is answered.
    MergeStop,
    /// After [`MergePhase::Empty`]: unhides the parent, gives it the leaf's
    /// name and drops the leaf from the map; durable when answered.
    MergeCommit {
        /// The emptied leaf.
        leaf: ImageRef,
        /// The parent that takes its name.
        parent: ImageRef,
        /// What the leaf is called afterwards, where the parent cannot
        /// replace it: the caller's to delete.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        aside: Option<String>,
    },
    /// Settles, closes and ends the process. Refused with [`Refusal::Busy`]
    /// while clients are connected, unless `force`.
    Stop {
        /// Disconnect clients first.
        force: bool,
    },
}

/// What a served request says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "snake_case")]
pub enum Reply {
    /// Done, nothing to add.
    Done,
    /// The pause holds: nothing is in flight.
    Paused {
        /// Whether the leaf holds no block at all, memory included.
        leaf_is_empty: bool,
    },
    /// First answer to a refresh.
    HeaderDurable,
    /// Last answer to a refresh.
    Drained,
    /// Answer to [`Request::Extents`]: runs without gaps.
    Extents {
        /// In order.
        extents: Vec<Extent>,
    },
    /// Answer to [`Request::LeafBlocks`] and [`Request::Tracked`].
    Blocks {
        /// First block and number of blocks of each run, in order.
        runs: Vec<(u32, u32)>,
        /// Where to ask on; `None`: that was all.
        next: Option<u32>,
    },
    /// Answer to [`Request::MergeStatus`].
    Merge(MergeStatus),
    /// Answer to [`Request::Stats`].
    Stats(Box<Stats>),
}

/// Why a request was refused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(tag = "refusal", rename_all = "snake_case")]
pub enum Refusal {
    /// It names images this tapdisk does not serve (any more).
    #[error("stale order: {detail}")]
    Stale {
        /// What differs.
        detail: String,
    },
    /// Another operation is running.
    #[error("busy: {detail}")]
    Busy {
        /// Which.
        detail: String,
    },
    /// Somebody uses the disk.
    #[error("in use: {detail}")]
    InUse {
        /// Who.
        detail: String,
    },
    /// The intent was voided before (a pause that ran out of time).
    #[error("the intent was voided: the pause ended by itself")]
    Voided,
    /// The repository is full; the disk goes on as before.
    #[error("no space left: {detail}")]
    NoSpace {
        /// What was being written.
        detail: String,
    },
    /// It could not be done; the disk goes on as before.
    #[error("{detail}")]
    Failed {
        /// What happened, to which image.
        detail: String,
    },
    /// The request is not understood.
    #[error("bad request: {detail}")]
    Bad {
        /// What is wrong with it.
        detail: String,
    },
}

/// A run of the disk and where it lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extent {
    /// Bytes.
    pub length: u64,
    /// The image that has it, and the byte offset in its volume; `None`:
    /// nowhere, it reads as zeros. An image is named by the uuid in its
    /// footer, a raw one by that in its volume's name.
    pub at: Option<(Uuid, u64)>,
}

/// Where a leaf merge stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MergePhase {
    /// No merge.
    None,
    /// Draining and settling under the old rule.
    Starting,
    /// Blocks are moving.
    Moving,
    /// The leaf is empty, durably; ready for commit.
    Empty,
    /// Stopping: the open window settles.
    Stopping,
    /// Committing.
    Committing,
    /// An I/O error stopped it; the parent is settled again.
    Failed,
}

/// Progress of a leaf merge. Bytes are data bytes (bitmaps not counted).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MergeStatus {
    /// Where it stands.
    pub phase: MergePhase,
    /// Blocks the leaf had when the merge began.
    pub blocks_total: u64,
    /// Blocks moved.
    pub blocks_done: u64,
    /// Bytes copied or cloned so far.
    pub bytes_copied: u64,
    /// Of those, bytes shared instead of copied.
    pub bytes_cloned: u64,
    /// Bytes given back by the leaf.
    pub bytes_freed: u64,
    /// Longest time a guest write waited for a window, in microseconds.
    pub longest_wait_us: u64,
    /// What went wrong, when `phase` is `failed`.
    pub error: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_merge_that_is_not_told_its_room_takes_little() {
        let image = r#"{"volume": "a.vhd", "footer": "00000000-0000-0000-0000-000000000001"}"#;
        let order = format!(
            r#"{{"id": 1, "request": "merge_start", "leaf": {image}, "parent": {image}, "rate_bytes_per_s": 0}}"#
        );
        let call: Call = serde_json::from_str(&order).unwrap();
        let Request::MergeStart { extra_blocks_max, .. } = call.request else { panic!("{call:?}") };
        assert_eq!(extra_blocks_max, MERGE_EXTRA_BLOCKS);
    }
}
