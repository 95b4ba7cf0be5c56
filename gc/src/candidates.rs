//! What could be merged by the shape of the trees, and what stands against it.
//!
//! ```text
//!   hidden P with just one child C:
//!     C hidden   -> inner merge, C goes into P; adjacent ones join:
//!                   N1 - N2 - N3 - P   is one pass [N1, N2, N3] into P
//!     C visible  -> leaf merge, C goes into P, which becomes C
//! ```

use uuid::Uuid;

use crate::forest::{Forest, Format, Health, Lease, Node, Role, Use};
use crate::limits::SOURCES_MAX;
use crate::reason::Reason;

/// A merge that the trees' shape allows.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Merge {
    /// Hidden nodes into the hidden node below them.
    Inner {
        /// Newest first, adjacent; the last is the parent's only child.
        sources: Vec<Uuid>,
        /// Takes everything.
        parent: Uuid,
    },
    /// A visible leaf into its hidden parent, which then takes its name.
    Leaf {
        /// The leaf.
        vdi: Uuid,
        /// Its parent.
        parent: Uuid,
        /// Whether its tapdisk does it.
        attached: bool,
    },
}

impl Merge {
    /// The image that takes everything.
    #[must_use]
    pub fn parent(&self) -> Uuid {
        match self {
            Self::Inner { parent, .. } | Self::Leaf { parent, .. } => *parent,
        }
    }

    /// The images emptied, newest first.
    #[must_use]
    pub fn sources(&self) -> &[Uuid] {
        match self {
            Self::Inner { sources, .. } => sources,
            Self::Leaf { vdi, .. } => std::slice::from_ref(vdi),
        }
    }

    /// The source that lies on the parent; names the merge in reports.
    #[must_use]
    pub fn node(&self) -> Uuid {
        self.sources().last().copied().unwrap_or_else(|| self.parent())
    }
}

/// All merges the shape allows, with the first thing that stands against
/// each. Ordered by parent.
#[must_use]
pub fn candidates(forest: &Forest) -> Vec<(Merge, Option<Reason>)> {
    let mut found = Vec::new();
    for parent in forest.nodes().filter(|node| node.role == Role::Hidden) {
        let Some(child) = forest.only_child(parent.uuid) else {
            continue;
        };
        match child.role {
            Role::Visible if forest.children(child.uuid).next().is_some() => {}
            Role::Visible => {
                let attached = forest
                    .leases_on(child.uuid)
                    .any(|lease| lease.vdi == child.uuid && lease.usage == Use::Writes);
                let merge = Merge::Leaf { vdi: child.uuid, parent: parent.uuid, attached };
                let against = leaf_obstacle(forest, child, parent);
                found.push((merge, against));
            }
            // Garbage is not worth merging; it is deleted.
            Role::Hidden if forest.children(child.uuid).next().is_none() => {}
            Role::Hidden => found.push(inner(forest, child, parent)),
        }
    }
    join(forest, found)
}

fn inner(forest: &Forest, node: &Node, parent: &Node) -> (Merge, Option<Reason>) {
    let merge = Merge::Inner { sources: vec![node.uuid], parent: parent.uuid };
    let read_as_leaf = || {
        let lease = forest.leases_on(node.uuid).find(|l| l.chain.first() == Some(&node.uuid))?;
        Some(Reason::Read { node: node.uuid, vdi: lease.vdi })
    };
    let against = pair_obstacle(forest, node, parent).or_else(read_as_leaf);
    (merge, against)
}

/// What forbids that `child`'s content goes into `parent`, whoever does it.
fn pair_obstacle(forest: &Forest, child: &Node, parent: &Node) -> Option<Reason> {
    [child, parent]
        .into_iter()
        .find_map(|node| image_obstacle(forest, node))
        .or_else(|| size_obstacle(forest, child, parent))
        .or_else(|| {
            // A map in which something else lies on P is older than the
            // tree, or not of this tree at all: it must go first.
            let other = |lease: &&Lease| {
                let at = lease.chain.iter().position(|uuid| *uuid == parent.uuid);
                at.is_some_and(|at| at == 0 || lease.chain.get(at - 1) != Some(&child.uuid))
            };
            let lease = forest.leases.iter().find(other)?;
            Some(Reason::Read { node: parent.uuid, vdi: lease.vdi })
        })
}

fn image_obstacle(forest: &Forest, node: &Node) -> Option<Reason> {
    let uuid = node.uuid;
    match node.format {
        Format::Raw | Format::Fixed => return Some(Reason::ParentTakesNothing { parent: uuid }),
        Format::OtherBlocks => return Some(Reason::OtherBlocks { node: uuid }),
        Format::Sparse => {}
    }
    if let Some(claim) = forest.claim_on(uuid) {
        return Some(Reason::Claimed { node: uuid, id: claim.id });
    }
    let held_open = forest.leases_on(uuid).any(|l| l.usage == Use::Writes && l.vdi == uuid);
    match &node.health {
        Health::Settled => None,
        // Its own tapdisk settles it when the merge starts.
        Health::Unsettled if held_open => None,
        Health::Unsettled => Some(Reason::Unsettled { node: uuid }),
        Health::Broken(why) => Some(Reason::BrokenTree { node: uuid, why: why.clone() }),
    }
}

fn size_obstacle(forest: &Forest, child: &Node, parent: &Node) -> Option<Reason> {
    if child.virtual_bytes < parent.virtual_bytes {
        return Some(Reason::SmallerThanParent { parent: parent.uuid });
    }
    if child.virtual_bytes == parent.virtual_bytes {
        return None;
    }
    // Past its end P reads as zeros to its children; grown, it would let an
    // ancestor's data through.
    let taller = |node: &&Node| node.virtual_bytes > parent.virtual_bytes;
    let ancestor = forest.ancestry(parent.uuid).skip(1).find(taller)?;
    Some(Reason::Uncovers { parent: parent.uuid, ancestor: ancestor.uuid })
}

fn leaf_obstacle(forest: &Forest, leaf: &Node, parent: &Node) -> Option<Reason> {
    pair_obstacle(forest, leaf, parent).or_else(|| {
        let mut leases = forest.leases_on(leaf.uuid);
        leases.find_map(|lease| match lease.usage {
            Use::Writes if lease.vdi == leaf.uuid => None,
            Use::Reads if lease.vdi == leaf.uuid => Some(Reason::AttachedReadOnly),
            _ => Some(Reason::Read { node: leaf.uuid, vdi: lease.vdi }),
        })
    })
}

/// Joins adjacent inner merges that nothing stands against, and lets what
/// lies above a mergeable parent wait for it.
fn join(forest: &Forest, found: Vec<(Merge, Option<Reason>)>) -> Vec<(Merge, Option<Reason>)> {
    let is_free_source = |uuid: Uuid| {
        found.iter().any(|(merge, against)| {
            against.is_none() && matches!(merge, Merge::Inner { .. }) && merge.node() == uuid
        })
    };
    let mut joined = Vec::new();
    for (merge, against) in &found {
        if against.is_some() {
            joined.push((merge.clone(), against.clone()));
            continue;
        }
        let parent = merge.parent();
        match merge {
            Merge::Leaf { .. } if is_free_source(parent) => {
                joined.push((merge.clone(), Some(Reason::ParentFirst { parent })));
            }
            Merge::Leaf { .. } => joined.push((merge.clone(), None)),
            // The run it belongs to begins further down.
            Merge::Inner { .. } if is_free_source(parent) => {}
            Merge::Inner { .. } => runs(forest, merge.node(), parent, &is_free_source, &mut joined),
        }
    }
    joined
}

/// The run of free sources upward from `lowest`, as one pass; what is past
/// [`SOURCES_MAX`] waits for the next.
fn runs(
    forest: &Forest,
    lowest: Uuid,
    parent: Uuid,
    is_free_source: &dyn Fn(Uuid) -> bool,
    joined: &mut Vec<(Merge, Option<Reason>)>,
) {
    let mut sources = vec![lowest];
    let mut top = lowest;
    while let Some(next) = forest.only_child(top).filter(|next| is_free_source(next.uuid)) {
        if sources.len() == SOURCES_MAX {
            let rest = Merge::Inner { sources: vec![next.uuid], parent: top };
            joined.push((rest, Some(Reason::ParentFirst { parent: top })));
            break;
        }
        sources.push(next.uuid);
        top = next.uuid;
    }
    sources.reverse();
    joined.push((Merge::Inner { sources, parent }, None));
}
