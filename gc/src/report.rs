//! What a collection did, or would do: the outside form of the contract.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// The answer of `gc run`. Bytes are of data blocks, bitmaps not counted.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Hidden nodes merged into their parents.
    pub coalesced: u64,
    /// Leaves that took their parent's place.
    pub leaf_coalesced: u64,
    /// Hidden nodes deleted as garbage.
    pub deleted: u64,
    /// Read and written. Predicted: an upper bound.
    pub bytes_copied: u64,
    /// Shared between files instead of copied. Predicted: an upper bound,
    /// as nobody knows before what the filesystem will share.
    pub bytes_cloned: u64,
    /// Blocks that went away on balance. Predicted exactly for a tree nobody
    /// changes.
    pub bytes_freed: u64,
    /// Most room needed beyond what was in use. Predicted: an upper bound.
    pub peak_extra_bytes: u64,
    /// Time taken. Predicted: an estimate.
    pub seconds: f64,
    /// What failed or was left, and why.
    pub failed: Vec<FailedNode>,
}

impl Report {
    /// Adds the report of another repository. Their room may be one
    /// filesystem, so their peaks add up.
    pub fn add(&mut self, other: Self) {
        self.coalesced += other.coalesced;
        self.leaf_coalesced += other.leaf_coalesced;
        self.deleted += other.deleted;
        self.bytes_copied += other.bytes_copied;
        self.bytes_cloned += other.bytes_cloned;
        self.bytes_freed += other.bytes_freed;
        self.peak_extra_bytes += other.peak_extra_bytes;
        self.seconds += other.seconds;
        self.failed.extend(other.failed);
    }
}

/// A node that was not collected.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailedNode {
    /// Which.
    pub uuid: Uuid,
    /// Why not.
    pub reason: String,
}
