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
    /// Read for content receipts, if they are asked for. Predicted: an upper
    /// bound.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub receipt_bytes_read: u64,
    /// Time taken. Predicted: an estimate.
    pub seconds: f64,
    /// What failed or was left, and why.
    pub failed: Vec<FailedNode>,
    /// What was predicted when it began; not there in a prediction itself,
    /// and where predicting would have held up the work.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub predicted: Option<Box<Report>>,
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
        self.receipt_bytes_read += other.receipt_bytes_read;
        self.seconds += other.seconds;
        self.failed.extend(other.failed);
        // A sum of which a part is missing would be read as a bound.
        self.predicted = match (self.predicted.take(), other.predicted) {
            (Some(mut sum), Some(more)) => {
                sum.add(*more);
                Some(sum)
            }
            _ => None,
        };
    }
}

fn is_zero(bytes: &u64) -> bool {
    *bytes == 0
}

/// What a job was expected to take and give when it was chosen, from block
/// tables alone. In bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Expected {
    /// At most so much is copied or shared.
    pub bytes_copied: u64,
    /// At least so much goes away on balance.
    pub bytes_freed: u64,
    /// At most so much room is needed beyond what was in use.
    pub peak_extra_bytes: u64,
}

/// A node that was not collected.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailedNode {
    /// Which.
    pub uuid: Uuid,
    /// Why not.
    pub reason: String,
}
