//! The intents of operations on one VDI that more than one step makes:
//! what [`crate::journal`] stores besides snapshots and merges.

use serde::{Deserialize, Serialize};
use tapdisk_control::ImageRef;
use uuid::Uuid;
use vhd::storage::VolumeName;

/// A new VDI that is being filled under a temporary name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MakeIntent {
    /// Names the intent, its record and its temporary volume.
    pub id: Uuid,
    /// The VDI it becomes.
    pub vdi: Uuid,
    /// The image under its temporary name.
    pub image: ImageRef,
    /// Its label, here so that recovery can give it.
    pub name: String,
    /// Its description.
    pub description: String,
    /// What makes it, like `copy`: for the history.
    pub operation: String,
}

/// A detached VDI that changes its size.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResizeIntent {
    /// Names the intent.
    pub id: Uuid,
    /// The VDI.
    pub vdi: Uuid,
    /// Its image.
    pub image: ImageRef,
    /// The size it shall have, in bytes.
    pub virtual_bytes: u64,
}

/// A VDI that goes back to what a snapshot of it holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RevertIntent {
    /// Names the intent and its temporary volumes.
    pub id: Uuid,
    /// The VDI.
    pub vdi: Uuid,
    /// The snapshot.
    pub snapshot: Uuid,
    /// The VDI's swap; and the snapshot's, if that holds data of its own and
    /// becomes a base.
    pub swaps: Vec<Swap>,
}

/// A VDI gets a new, empty image; its former one lives on, hidden, under
/// another name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Swap {
    /// The VDI.
    pub vdi: Uuid,
    /// Footer uuid of its former image.
    pub former: Uuid,
    /// The volume the former image becomes.
    pub aside: Uuid,
    /// The new image under its temporary name.
    pub new: ImageRef,
}

impl MakeIntent {
    /// As [`crate::journal::Intent::names`].
    #[must_use]
    pub fn names(&self, volume: &VolumeName, footer: Uuid) -> bool {
        is(&self.image, volume, footer) || *volume == VolumeName::vhd(self.vdi)
    }
}

impl ResizeIntent {
    /// As [`crate::journal::Intent::names`].
    #[must_use]
    pub fn names(&self, volume: &VolumeName, footer: Uuid) -> bool {
        is(&self.image, volume, footer)
    }
}

impl RevertIntent {
    /// As [`crate::journal::Intent::names`].
    #[must_use]
    pub fn names(&self, volume: &VolumeName, footer: Uuid) -> bool {
        let vhd = |uuid: Uuid| *volume == VolumeName::vhd(uuid);
        let swapped = |swap: &Swap| {
            vhd(swap.vdi) || vhd(swap.aside) || swap.former == footer || is(&swap.new, volume, footer)
        };
        vhd(self.snapshot) || self.swaps.iter().any(swapped)
    }
}

fn is(image: &ImageRef, volume: &VolumeName, footer: Uuid) -> bool {
    image.volume == volume.as_str() || image.footer == footer
}
