//! What the daemons answer, as far as tables need it.
//!
//! With `--json` the daemon's own document is printed untouched; these types
//! only serve the human views, so every field that may be absent has a
//! default and unknown ones are ignored.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

use crate::failure::{Failure, Outcome};

/// A virtual disk, snapshot or hidden node. Sizes in bytes.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Vdi {
    /// Its uuid.
    pub uuid: String,
    /// Its name; hidden nodes may have none.
    pub name: String,
    /// The storage repository.
    pub sr: String,
    /// `leaf`, `snapshot` or `hidden`.
    pub kind: String,
    /// The node below.
    pub parent: Option<String>,
    /// Of which disk it is a snapshot.
    pub snapshot_of: Option<String>,
    /// What the guest sees.
    pub virtual_size: u64,
    /// What it takes on disk.
    pub physical_size: u64,
    /// Data blocks it names itself.
    pub allocated: u64,
    /// Length of its chain, itself included.
    pub depth: u64,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Whether it is served now.
    pub attached: bool,
    /// When it was made: text or seconds since 1970.
    pub created: Value,
    /// Why it cannot be used.
    pub broken: Option<String>,
    /// What smd does about a tapdisk that died.
    pub down: Value,
}

/// A storage repository. Sizes in bytes.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Sr {
    /// Its uuid.
    pub uuid: String,
    /// Its name.
    pub name: String,
    /// `file` and so on.
    #[serde(rename = "type")]
    pub kind: String,
    /// Folder or devices.
    pub location: Value,
    /// Whether this host uses it now.
    pub attached: bool,
    /// Size of what it lies on.
    pub size: Option<u64>,
    /// Used by images.
    pub used: Option<u64>,
    /// Free there.
    pub free: Option<u64>,
    /// Number of disks, or the disks.
    pub vdis: Value,
}

/// A node of a tree.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Node {
    /// The node itself.
    #[serde(flatten)]
    pub vdi: Vdi,
    /// What hangs on it.
    pub children: Vec<Node>,
    /// What the collector does or waits for here.
    pub gc: Option<GcState>,
}

/// What the collector does with a node.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct GcState {
    /// `waiting`, `merging` or `blocked`.
    pub state: String,
    /// Why.
    pub reason: Option<String>,
    /// Moved so far.
    pub bytes_done: Option<u64>,
    /// To move in all.
    pub bytes_total: Option<u64>,
    /// Bytes per second.
    pub rate: Option<f64>,
    /// Seconds left.
    pub eta_s: Option<f64>,
}

/// A range of a disk that can differ from another. In bytes.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(default)]
pub struct ChangedRange {
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
}

/// A run of a disk and where it lies. In bytes.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct MapExtent {
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
    /// The node that has it; nobody: zeros.
    pub node: Option<String>,
    /// The node's volume.
    pub volume: Option<String>,
    /// Where in the volume.
    pub file_offset: Option<u64>,
    /// 1 is the disk itself, 0 nobody.
    pub depth: u64,
}

/// What a disk takes. In bytes.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Stat {
    /// In its own image.
    pub own_bytes: u64,
    /// Below it, read by others too.
    pub shared_bytes: u64,
    /// What merges of its chain would free.
    pub reclaimable_bytes: u64,
    /// What nobody would read without it.
    pub freed_if_deleted_bytes: u64,
    /// What a merge would free then.
    pub freed_by_merge_then_bytes: u64,
    /// In its chain.
    pub chain_bytes: u64,
    /// Images, leaf first.
    pub chain: Vec<StatNode>,
}

/// One image of a chain.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct StatNode {
    /// The node.
    pub uuid: String,
    /// Its data.
    pub allocated_bytes: u64,
    /// Whether it is hidden.
    pub hidden: bool,
    /// What stands on it.
    pub children: u64,
}

/// The trees of one storage repository.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Forest {
    /// The storage repository.
    pub sr: Sr,
    /// Nodes without a parent.
    pub roots: Vec<Node>,
}

/// What the collector says of itself.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct GcStatus {
    /// Attached storage repositories.
    pub srs: Vec<GcSr>,
    /// Attached ones it cannot collect, and why.
    pub refused: BTreeMap<String, String>,
    /// Jobs that ended.
    pub done: Vec<GcDone>,
}

/// A job of the collector that ended. Sizes in bytes.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct GcDone {
    /// Names it.
    pub job: String,
    /// The node that names it.
    pub vdi: String,
    /// `inner`, `leaf` or `delete`.
    pub kind: String,
    /// Read and written.
    pub bytes_copied: u64,
    /// Shared.
    pub bytes_cloned: u64,
    /// Given back on balance.
    pub bytes_freed: u64,
    /// Most room needed beyond what was in use.
    pub peak_extra_bytes: u64,
    /// What it was expected to come to.
    pub predicted: Option<GcExpected>,
    /// Why it ended early, or what is wrong after it.
    pub error: Option<String>,
    /// What became of the disks on it, if that was asked for.
    pub receipt: Option<GcReceipt>,
}

/// What a job was expected to come to. Sizes in bytes.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct GcExpected {
    /// At most so much is copied or shared.
    pub bytes_copied: u64,
    /// At least so much is given back.
    pub bytes_freed: u64,
    /// At most so much room is needed.
    pub peak_extra_bytes: u64,
}

/// What became of the disks on a merge.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct GcReceipt {
    /// Each of them.
    pub disks: Vec<GcDiskReceipt>,
    /// Why there is nothing about any.
    pub void: Option<String>,
}

/// What became of one disk. Blocks are of 2 MiB.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct GcDiskReceipt {
    /// The disk.
    pub vdi: String,
    /// `same`, `different`, `unreadable` or `void`.
    pub verdict: String,
    /// Blocks that read the same.
    pub matched: u64,
    /// Blocks that guests wrote meanwhile.
    pub written: u64,
    /// Blocks that differ.
    pub different: u64,
    /// The first of them.
    pub different_blocks: Vec<u64>,
    /// Why it is void, or cannot be read.
    pub reason: Option<String>,
}

/// A difference that nobody has said anything to yet.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct GcAlarm {
    /// The merge.
    pub job: String,
    /// Everything about it.
    pub text: String,
}

/// One storage repository in the collector's eyes.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct GcSr {
    /// Its uuid.
    pub uuid: String,
    /// Its name.
    pub name: String,
    /// Whether nothing is started.
    pub paused: bool,
    /// Seconds until merges begin again that somebody aborted.
    pub quiet_s: Option<u64>,
    /// Merges under way.
    pub running: u64,
    /// Merges allowed at one time.
    pub parallel: u64,
    /// Bytes per second allowed; 0 is no limit.
    pub rate: u64,
    /// Bytes per second allowed while attached disks are slow.
    pub held_back_to: Option<u64>,
    /// Why the last look failed.
    pub error: Option<String>,
    /// Nodes that wait or are being merged.
    pub nodes: BTreeMap<String, GcState>,
    /// Disks that a merge has changed.
    pub alarms: Vec<GcAlarm>,
}

/// The list inside a document under `key`, or the document itself.
pub fn inner(document: Value, key: &str) -> Value {
    match document {
        Value::Object(mut map) if map.contains_key(key) => map.remove(key).unwrap_or_default(),
        other => other,
    }
}

/// Reads a document, or the list inside it under `key`.
pub fn list_of<T: serde::de::DeserializeOwned>(document: &Value, key: &str) -> Outcome<Vec<T>> {
    read(document.get(key).unwrap_or(document))
}

/// Reads one object.
pub fn read<T: serde::de::DeserializeOwned>(document: &Value) -> Outcome<T> {
    T::deserialize(document)
        .map_err(|e| Failure::new("IO_ERROR", format!("an answer that cannot be read: {e}")))
}
