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

/// Who reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reader {
    /// A tapdisk: the VDI is attached. It can be told to refresh its map.
    #[default]
    Tapdisk,
    /// A copy, an export or a comparison: reads with the map it has, to its
    /// end, and cannot be told anything.
    Copy,
    /// The same for a purpose that can wait: it leaves within a moment when
    /// it is asked to, and keeps nobody from the VDI.
    Yielding,
}

/// One reader of a chain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// The VDI that is attached, or copied.
    pub vdi: Uuid,
    /// Its SR.
    pub sr: Uuid,
    /// The reading process; 0 while a tapdisk is being started.
    pub pid: u32,
    /// Whether its leaf is open for reading only.
    pub read_only: bool,
    /// Who reads.
    #[serde(default)]
    pub reader: Reader,
    /// Every image in its map, leaf first. Until the reader has refreshed
    /// its map it counts as a child of each of them.
    pub chain: Vec<ImageRef>,
}

impl Lease {
    /// Whether it is the lease of the tapdisk that serves a VDI.
    #[must_use]
    pub fn serves(&self, vdi: Uuid) -> bool {
        self.vdi == vdi && self.reader == Reader::Tapdisk
    }

    /// Whether the lease names an image, by its volume or by its footer: the
    /// two part ways while a snapshot renames the leaf.
    #[must_use]
    pub fn names(&self, volume: &VolumeName, footer: Uuid) -> bool {
        self.chain.iter().any(|image| image.volume == volume.as_str() || image.footer == footer)
    }
}
