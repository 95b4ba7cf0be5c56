//! The shape of an SR: which image stands on which.
//!
//! Pure: image headers and intents in, trees out. What the images say is the
//! authority; intents tell which of them are half done, so that temporaries
//! and half-made names never show up as VDIs:
//!
//! ```text
//!   <L>.vhd   <B>.vhd   tmp-…-0.vhd        pending snapshot: one VDI, L
//!      \_same image_/        \_ prepared
//!
//!   <B>.vhd <-- <L>.vhd, tmp-…-1.vhd       decided: B counts as hidden even
//!                                          while its flag is not set yet
//! ```
//!
//! Labels (names, what is a snapshot of what) are the catalog's business.

mod reading;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use uuid::Uuid;
use vhd::storage::VolumeName;

use self::reading::{Role, find_parent, give_names, node, recorded_parents, role};
use crate::journal::Stored;

/// One volume as a scan found it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// Its name.
    pub volume: VolumeName,
    /// Length of the volume in bytes.
    pub physical_bytes: u64,
    /// Storage it takes in bytes, holes not counted.
    pub allocated_bytes: u64,
    /// What its headers say, or why they cannot be read.
    pub head: Result<Head, String>,
    /// Footer uuids of what an unreadable image stood on when it was read last;
    /// `None`: nobody knows (invariant 11).
    pub may_stand_on: Option<Vec<Uuid>>,
}

/// The part of an image's headers that the tree needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Head {
    /// Footer uuid; nil for a raw volume, which has no footer.
    pub footer: Uuid,
    /// Size of the disk in bytes.
    pub virtual_bytes: u64,
    /// The hidden flag.
    pub hidden: bool,
    /// Seconds since 1970, from the footer; 0 if unknown.
    pub created_s: u64,
    /// What it stands on.
    pub parent: Option<ParentName>,
}

/// A parent as a child's header names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParentName {
    /// Its footer uuid; nil for a raw parent.
    pub footer: Uuid,
    /// Where it may be, first choice first; empty when every locator leads
    /// out of the SR.
    pub candidates: Vec<VolumeName>,
}

/// Position of a node in [`VdiTree::nodes`].
pub type NodeIx = usize;

/// What a node is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NodeState {
    /// A VDI that guests may see, snapshots included.
    Visible,
    /// A base copy: read by its children only.
    Hidden,
    /// Cannot be used, nor can what stands on it.
    Broken(Broken),
}

/// Exactly why a node cannot be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Broken {
    /// Its headers cannot be read; which image it stands on is unknown
    /// (invariant 11).
    Unreadable {
        /// Why.
        reason: String,
    },
    /// Its locators lead out of the SR (invariant 10).
    ParentOutside,
    /// No volume of the parent's names is there.
    ParentMissing {
        /// The first of them.
        name: VolumeName,
    },
    /// The volume is there but its footer uuid is another.
    ParentMismatch {
        /// The volume.
        name: VolumeName,
        /// The uuid that was expected.
        expected: Uuid,
    },
    /// It is its own ancestor.
    Cycle,
    /// Its parent is broken.
    OnBroken {
        /// The nearest broken ancestor.
        ancestor: VolumeName,
    },
    /// Another volume carries the same footer uuid; which is meant by a
    /// parent link or a pending record cannot be told.
    SharedFooter {
        /// The other volume.
        other: VolumeName,
    },
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unreadable { reason } => write!(f, "{reason}"),
            Self::ParentOutside => write!(f, "its parent lies outside the repository"),
            Self::ParentMissing { name } => write!(f, "its parent {name} is missing"),
            Self::ParentMismatch { name, expected } => {
                write!(f, "its parent {name} has another uuid than {expected}")
            }
            Self::Cycle => write!(f, "its chain leads back to itself"),
            Self::OnBroken { ancestor } => write!(f, "its ancestor {ancestor} is broken"),
            Self::SharedFooter { other } => write!(f, "{other} carries the same footer uuid"),
        }
    }
}

/// One image in the tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// Its volume.
    pub volume: VolumeName,
    /// Its VDI uuid: the volume's name.
    pub uuid: Uuid,
    /// Footer uuid; nil when raw or unreadable.
    pub footer: Uuid,
    /// What it is.
    pub state: NodeState,
    /// Size of the disk in bytes; 0 when unreadable.
    pub virtual_bytes: u64,
    /// Length of the volume in bytes.
    pub physical_bytes: u64,
    /// Storage taken in bytes.
    pub allocated_bytes: u64,
    /// Seconds since 1970, from the footer.
    pub created_s: u64,
    /// What it stands on.
    pub parent: Option<NodeIx>,
    /// What stands on it.
    pub children: Vec<NodeIx>,
    /// Images from here to the root, both included: 1 = no parent. 0 when
    /// that cannot be told.
    pub depth: u32,
    /// An intent that names it.
    pub intent: Option<Uuid>,
    /// What it may stand on, if it is unreadable and that is known.
    pub may_stand_on: Option<Vec<NodeIx>>,
}

impl Node {
    /// Whether it is a base copy.
    #[must_use]
    pub fn is_hidden(&self) -> bool {
        self.state == NodeState::Hidden
    }

    /// Why it cannot be used, if so.
    #[must_use]
    pub fn broken(&self) -> Option<&Broken> {
        match &self.state {
            NodeState::Broken(reason) => Some(reason),
            NodeState::Visible | NodeState::Hidden => None,
        }
    }
}

/// All trees of one SR.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct VdiTree {
    /// Every image but prepared ones, sorted by volume name.
    pub nodes: Vec<Node>,
    /// Nodes without a (known) parent.
    pub roots: Vec<NodeIx>,
    /// Prepared images of an intent, not VDIs yet. What they stand on has
    /// them as children all the same.
    pub prepared: Vec<Image>,
    /// Volumes whose name is not `<uuid>.vhd` or `<uuid>.raw`: not ours to
    /// touch.
    pub foreign: Vec<VolumeName>,
}

impl VdiTree {
    /// Builds the trees.
    #[must_use]
    pub fn build(mut images: Vec<Image>, intents: &[Stored]) -> Self {
        give_names(&mut images, intents);
        images.sort_unstable_by(|a, b| a.volume.cmp(&b.volume));
        let footers: BTreeMap<VolumeName, Uuid> = images
            .iter()
            .filter_map(|image| Some((image.volume.clone(), image.head.as_ref().ok()?.footer)))
            .collect();
        let mut tree = Self::default();
        let mut parents = Vec::new();
        let mut unreadable = Vec::new();
        for image in images {
            let role = role(&image.volume, &footers, intents);
            let uuid = match (role, image.volume.uuid()) {
                (Role::Prepared, _) => {
                    tree.prepared.push(image);
                    continue;
                }
                (_, None) => {
                    tree.foreign.push(image.volume);
                    continue;
                }
                (Role::Hidden, Some(uuid)) => (uuid, true),
                (Role::Ordinary, Some(uuid)) => (uuid, false),
            };
            unreadable.extend(recorded_parents(&image, intents).map(|footers| (tree.nodes.len(), footers)));
            let (node, parent) = node(image, uuid.0, uuid.1, intents);
            tree.nodes.push(node);
            parents.push(parent);
        }
        tree.mark_shared_footers();
        tree.link(&parents);
        tree.suspect(unreadable);
        tree.measure();
        tree
    }

    /// The node of a volume.
    #[must_use]
    pub fn by_volume(&self, volume: &VolumeName) -> Option<NodeIx> {
        self.nodes.binary_search_by(|node| node.volume.cmp(volume)).ok()
    }

    /// The node of a VDI.
    #[must_use]
    pub fn by_uuid(&self, vdi: Uuid) -> Option<NodeIx> {
        let raw = || VolumeName::new(&format!("{vdi}.raw"));
        self.by_volume(&VolumeName::vhd(vdi)).or_else(|| self.by_volume(&raw()?))
    }

    /// From a node down to its root.
    pub fn chain(&self, from: NodeIx) -> impl Iterator<Item = &Node> {
        std::iter::successors(self.nodes.get(from), |node| self.nodes.get(node.parent?))
            .take(self.nodes.len())
    }

    /// Images whose parent is unknown. While there are any, no hidden node of
    /// the SR may be merged or deleted: it could be theirs (invariant 11).
    pub fn parents_unknown(&self) -> impl Iterator<Item = (&VolumeName, &str)> {
        self.nodes
            .iter()
            .filter_map(|node| match node.broken() {
                Some(Broken::Unreadable { reason }) if node.may_stand_on.is_none() => {
                    Some((&node.volume, reason.as_str()))
                }
                _ => None,
            })
            .chain(self.prepared.iter().filter_map(|image| {
                let reason = image.head.as_ref().err()?;
                Some((&image.volume, reason.as_str()))
            }))
    }

    /// Prepared images that stand on the node.
    pub fn prepared_on<'a>(&'a self, node: &'a Node) -> impl Iterator<Item = &'a Image> {
        self.prepared.iter().filter(|image| {
            image
                .head
                .as_ref()
                .ok()
                .and_then(|head| head.parent.as_ref())
                .is_some_and(|parent| parent.candidates.contains(&node.volume))
        })
    }

    fn mark_shared_footers(&mut self) {
        let mut first: BTreeMap<Uuid, NodeIx> = BTreeMap::new();
        for ix in 0..self.nodes.len() {
            let footer = self.nodes[ix].footer;
            if footer.is_nil() {
                continue;
            }
            let Some(&other) = first.get(&footer) else {
                first.insert(footer, ix);
                continue;
            };
            for (one, two) in [(ix, other), (other, ix)] {
                let other = self.nodes[two].volume.clone();
                self.nodes[one].state = NodeState::Broken(Broken::SharedFooter { other });
            }
        }
    }

    /// Finds every node's parent; what cannot be found breaks the node.
    fn link(&mut self, parents: &[Option<ParentName>]) {
        let by_name: BTreeMap<VolumeName, NodeIx> =
            self.nodes.iter().enumerate().map(|(ix, n)| (n.volume.clone(), ix)).collect();
        for (ix, parent) in parents.iter().enumerate() {
            let Some(parent) = parent else { continue };
            match find_parent(parent, &by_name, &self.nodes) {
                Ok(found) => {
                    self.nodes[ix].parent = Some(found);
                    self.nodes[found].children.push(ix);
                }
                Err(broken) => {
                    if self.nodes[ix].broken().is_none() {
                        self.nodes[ix].state = NodeState::Broken(broken);
                    }
                }
            }
        }
    }

    /// Finds what unreadable images may stand on. If one of those is not there
    /// the record is older than the trees, and worth nothing.
    fn suspect(&mut self, unreadable: Vec<(NodeIx, Vec<Uuid>)>) {
        if unreadable.is_empty() {
            return;
        }
        let by_footer: BTreeMap<Uuid, NodeIx> =
            self.nodes.iter().enumerate().map(|(ix, node)| (node.footer, ix)).collect();
        for (ix, footers) in unreadable {
            let found: Option<BTreeSet<NodeIx>> =
                footers.iter().map(|footer| by_footer.get(footer).copied()).collect();
            self.nodes[ix].may_stand_on = found.map(|found| found.into_iter().collect());
        }
    }

    /// Depths from the roots up, and broken ancestors. What is never reached
    /// from a root is on a cycle.
    fn measure(&mut self) {
        self.roots = (0..self.nodes.len()).filter(|&ix| self.nodes[ix].parent.is_none()).collect();
        let mut waiting: Vec<(NodeIx, u32)> = self.roots.iter().map(|&ix| (ix, 1)).collect();
        let mut reached = BTreeSet::new();
        while let Some((ix, depth)) = waiting.pop() {
            reached.insert(ix);
            let whole = self.nodes[ix].broken().is_none();
            self.nodes[ix].depth = if whole { depth } else { 0 };
            let ancestor = match self.nodes[ix].broken() {
                Some(Broken::OnBroken { ancestor }) => Some(ancestor.clone()),
                Some(_) => Some(self.nodes[ix].volume.clone()),
                None => None,
            };
            for child in self.nodes[ix].children.clone() {
                if let (Some(ancestor), None) = (&ancestor, self.nodes[child].broken()) {
                    let ancestor = ancestor.clone();
                    self.nodes[child].state = NodeState::Broken(Broken::OnBroken { ancestor });
                }
                waiting.push((child, depth + 1));
            }
        }
        for ix in (0..self.nodes.len()).filter(|ix| !reached.contains(ix)) {
            self.nodes[ix].state = NodeState::Broken(Broken::Cycle);
        }
    }
}

#[cfg(test)]
#[path = "tree_tests.rs"]
mod tests;
