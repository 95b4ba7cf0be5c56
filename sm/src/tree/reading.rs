//! How one image is read: what it is called, what it is, what it stands on.
//! Intents say which of these are half done.

use std::collections::BTreeMap;

use uuid::Uuid;
use vhd::storage::VolumeName;

use super::{Broken, Image, Node, NodeIx, NodeState, ParentName};
use crate::journal::{Intent, JobState, RecordState, Shape, Stored};

/// What the intents say about a volume.
pub(super) enum Role {
    Ordinary,
    /// Not a VDI (yet, or any more).
    Prepared,
    /// A base whose flag may not be set yet.
    Hidden,
}

/// An image that is taking a name nothing has in the middle of it is shown as
/// what it becomes: its disk is there all the time.
pub(super) fn give_names(images: &mut [Image], intents: &[Stored]) {
    let swaps = intents.iter().filter_map(|stored| stored.intent.name_swaps().ok()).flatten();
    for swap in swaps {
        let has = |name: &VolumeName| images.iter().position(|image| image.volume == *name);
        if let (None, Some(new)) = (has(&swap.over), has(&swap.new)) {
            images[new].volume = swap.over;
        }
    }
}

pub(super) fn node(image: Image, uuid: Uuid, hidden: bool, intents: &[Stored]) -> (Node, Option<ParentName>) {
    let (footer, virtual_bytes, created_s, state, parent) = match image.head {
        Ok(head) => {
            let hidden = hidden || head.hidden;
            let state = if hidden { NodeState::Hidden } else { NodeState::Visible };
            (head.footer, head.virtual_bytes, head.created_s, state, head.parent)
        }
        Err(reason) => (Uuid::nil(), 0, 0, NodeState::Broken(Broken::Unreadable { reason }), None),
    };
    // A nil footer names nothing; without this every raw volume would match.
    let key = if footer.is_nil() { uuid } else { footer };
    let intent = intents.iter().find(|s| s.intent.names(&image.volume, key));
    let node = Node {
        volume: image.volume,
        uuid,
        footer,
        state,
        virtual_bytes,
        physical_bytes: image.physical_bytes,
        allocated_bytes: image.allocated_bytes,
        created_s,
        parent: None,
        children: Vec::new(),
        depth: 0,
        intent: intent.map(|s| s.intent.id()),
        may_stand_on: None,
    };
    (node, parent)
}

/// What an unreadable image may stand on: what its record says, and what merges
/// that are rewriting its parent say.
pub(super) fn recorded_parents(image: &Image, intents: &[Stored]) -> Option<Vec<Uuid>> {
    image.head.as_ref().err()?;
    let mut footers = image.may_stand_on.clone()?;
    for stored in intents {
        if let Intent::Inner(inner) = &stored.intent
            && let JobState::Relinking { children } = &inner.state
            && children.iter().any(|child| child.volume == image.volume.as_str())
        {
            footers.push(inner.parent.footer);
        }
    }
    Some(footers)
}

/// The first candidate with the right uuid: while a parent link is being
/// rewritten, locators of the old and the new parent stand side by side.
pub(super) fn find_parent(
    parent: &ParentName,
    by_name: &BTreeMap<VolumeName, NodeIx>,
    nodes: &[Node],
) -> Result<NodeIx, Broken> {
    let Some(first) = parent.candidates.first() else {
        return Err(Broken::ParentOutside);
    };
    let mut there = parent.candidates.iter().filter_map(|name| by_name.get(name)).peekable();
    let Some(&&some) = there.peek() else {
        return Err(Broken::ParentMissing { name: first.clone() });
    };
    // An unreadable parent may be the right one; the child then waits for it.
    let fits = |ix: &&NodeIx| {
        let node = &nodes[**ix];
        let raw = node.volume.is_raw();
        (!raw && node.footer == parent.footer)
            || (raw && parent.footer.is_nil())
            || matches!(node.broken(), Some(Broken::Unreadable { .. }))
    };
    there
        .find(fits)
        .copied()
        .ok_or_else(|| Broken::ParentMismatch { name: nodes[some].volume.clone(), expected: parent.footer })
}

pub(super) fn role(volume: &VolumeName, footers: &BTreeMap<VolumeName, Uuid>, intents: &[Stored]) -> Role {
    if volume.temporary_of().is_some() {
        return Role::Prepared;
    }
    for stored in intents {
        match &stored.intent {
            Intent::Snapshot(intent) => {
                for member in &intent.members {
                    if *volume == VolumeName::vhd(member.sibling.vdi) {
                        return Role::Prepared;
                    }
                    let Shape::Divide { base, new_leaf } = &member.shape else {
                        continue;
                    };
                    if *volume != VolumeName::vhd(*base) {
                        continue;
                    }
                    // Before the swap the base is a second name of the leaf;
                    // in the middle of it, nothing has the leaf's.
                    let leaf = footers.get(&VolumeName::vhd(member.vdi));
                    let swapped = leaf == Some(&new_leaf.footer);
                    debug_assert!(!swapped || stored.name.state != RecordState::Void);
                    return if swapped || leaf.is_none() { Role::Hidden } else { Role::Prepared };
                }
            }
            // While it commits the parent is unhidden under its own name.
            Intent::LeafMerge(intent) => {
                if volume.as_str() == intent.parent.volume {
                    return Role::Hidden;
                }
            }
            Intent::Revert(intent) => {
                if let Some(swap) = intent.swaps.iter().find(|swap| *volume == VolumeName::vhd(swap.aside)) {
                    let now = footers.get(&VolumeName::vhd(swap.vdi));
                    let swapped = now.is_none_or(|now| *now == swap.new.footer);
                    return if swapped { Role::Hidden } else { Role::Prepared };
                }
            }
            // A VDI is whole before it has its name.
            Intent::Inner(_) | Intent::Make(_) | Intent::Resize(_) => {}
        }
    }
    Role::Ordinary
}
