//! Who reads a chain right now (invariant 8).
//!
//! A lease is a small locked file in the run folder. It is made and reaped
//! under the SR lock; its lock is held through a descriptor that the reader
//! inherits and keeps for its whole life. A lease that nobody locks is dead,
//! whatever it says.

use serde::{Deserialize, Serialize};
use tapdisk_control::ImageRef;
use uuid::Uuid;
use vhd::storage::VolumeName;

/// One reader of a chain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// The VDI that is attached.
    pub vdi: Uuid,
    /// Its SR.
    pub sr: Uuid,
    /// Process of the tapdisk; 0 while it is being started.
    pub pid: u32,
    /// Whether its leaf is open for reading only.
    pub read_only: bool,
    /// Every image in its map, leaf first. Until the reader has refreshed
    /// its map it counts as a child of each of them.
    pub chain: Vec<ImageRef>,
}

impl Lease {
    /// Whether the lease names an image, by its volume or by its footer: the
    /// two part ways while a snapshot renames the leaf.
    #[must_use]
    pub fn names(&self, volume: &VolumeName, footer: Uuid) -> bool {
        self.chain.iter().any(|image| image.volume == volume.as_str() || image.footer == footer)
    }
}
