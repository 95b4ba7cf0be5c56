//! The intents of operations on one VDI that more than one step makes: what
//! [`crate::journal`] stores besides snapshots and merges. And which names all
//! of them exchange.

use serde::{Deserialize, Serialize};
use tapdisk_control::ImageRef;
use uuid::Uuid;
use vhd::storage::VolumeName;

use crate::error::Result;
use crate::journal::{Intent, LeafMergeIntent, LeafMergeState, Member, Shape, volume_of};
use crate::naming::NameSwap;

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

impl Intent {
    /// The exchanges of names that it makes, or may make: while it stands,
    /// nothing may have the name that one of them is about.
    ///
    /// # Errors
    /// As [`volume_of`].
    pub fn name_swaps(&self) -> Result<Vec<NameSwap>> {
        match self {
            Self::Snapshot(intent) => {
                intent.members.iter().filter_map(|member| member.name_swap().transpose()).collect()
            }
            Self::LeafMerge(intent) => match intent.state {
                LeafMergeState::Merging => Ok(Vec::new()),
                LeafMergeState::Committing => Ok(vec![intent.name_swap()?]),
            },
            Self::Revert(intent) => intent.swaps.iter().map(Swap::name_swap).collect(),
            Self::Inner(_) | Self::Make(_) | Self::Resize(_) => Ok(Vec::new()),
        }
    }

    /// Whether one of them is about the name of a VDI. One that cannot be
    /// read is about none: it is never carried out.
    #[must_use]
    pub fn gives_name(&self, vdi: Uuid) -> bool {
        let name = VolumeName::vhd(vdi);
        self.name_swaps().is_ok_and(|swaps| swaps.iter().any(|swap| swap.over == name))
    }
}

impl Member {
    /// How the new leaf takes the leaf's name; `None` if the leaf stays.
    ///
    /// # Errors
    /// As [`volume_of`].
    pub fn name_swap(&self) -> Result<Option<NameSwap>> {
        let Shape::Divide { base, new_leaf } = &self.shape else {
            return Ok(None);
        };
        let (over, aside) = (VolumeName::vhd(self.vdi), VolumeName::vhd(*base));
        Ok(Some(NameSwap { new: volume_of(new_leaf)?, footer: new_leaf.footer, over, aside }))
    }
}

impl LeafMergeIntent {
    /// How the parent takes the leaf's name. What steps aside is empty then,
    /// and garbage.
    ///
    /// # Errors
    /// As [`volume_of`].
    pub fn name_swap(&self) -> Result<NameSwap> {
        Ok(NameSwap {
            new: volume_of(&self.parent)?,
            footer: self.parent.footer,
            over: volume_of(&self.leaf)?,
            aside: VolumeName::temporary(self.id, 0),
        })
    }
}

impl Swap {
    /// How the new image takes the name.
    ///
    /// # Errors
    /// As [`volume_of`].
    pub fn name_swap(&self) -> Result<NameSwap> {
        let (over, aside) = (VolumeName::vhd(self.vdi), VolumeName::vhd(self.aside));
        Ok(NameSwap { new: volume_of(&self.new)?, footer: self.new.footer, over, aside })
    }
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
