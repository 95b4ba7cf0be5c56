//! What the planner looks at: one repository's trees, as plain data.
//!
//! Made from headers read under a lease of nothing: it may be stale the
//! moment it exists. So the planner only proposes, and every job checks its
//! own nodes again under the SR lock before it changes anything.

use std::collections::{BTreeMap, BTreeSet};

use uuid::Uuid;

/// How a node hangs in its tree.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Link {
    /// No parent.
    Root,
    /// Its header names this volume.
    Child(Uuid),
    /// Its header cannot be read; its last verified record names these.
    OneOf(Vec<Uuid>),
    /// Its header cannot be read and there is no valid record (invariant 11).
    Unknown,
}

/// What kind of image a volume holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// Bytes as they are.
    Raw,
    /// A fixed VHD.
    Fixed,
    /// A dynamic or differencing VHD with blocks of 2 MiB.
    Sparse,
    /// A VHD with another block size: neither served nor merged.
    OtherBlocks,
}

/// Who sees the node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// A leaf or a snapshot.
    Visible,
    /// A base copy, or garbage.
    Hidden,
}

/// Whether it can be worked with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Health {
    /// Readable and settled.
    Settled,
    /// Its pending record holds something, or it is open for writing.
    Unsettled,
    /// It cannot be used, with the exact reason.
    Broken(String),
}

/// One volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// The volume, which is the VDI's uuid.
    pub uuid: Uuid,
    /// The uuid in its footer (nil for raw and unreadable images).
    pub footer: Uuid,
    /// Where it hangs.
    pub link: Link,
    /// Who sees it.
    pub role: Role,
    /// What it is.
    pub format: Format,
    /// Its health.
    pub health: Health,
    /// Virtual size in bytes.
    pub virtual_bytes: u64,
}

/// How a lease's holder uses its chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Use {
    /// A tapdisk that writes its leaf.
    Writes,
    /// A tapdisk that only reads; it can be told to refresh.
    Reads,
    /// An export, copy or check: reads with the map it has to the end.
    Copies,
}

/// A live reader of a chain (invariant 8).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    /// Whose.
    pub vdi: Uuid,
    /// Volumes in its map, leaf first.
    pub chain: Vec<Uuid>,
    /// How.
    pub usage: Use,
}

/// What a journal record holds on to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claim {
    /// The intent.
    pub id: Uuid,
    /// Every volume it names.
    pub nodes: Vec<Uuid>,
    /// Whether it is a merge of ours, to be carried on.
    pub merge: bool,
}

/// One repository at one moment.
#[derive(Debug, Clone, Default)]
pub struct Forest {
    nodes: BTreeMap<Uuid, Node>,
    children: BTreeMap<Uuid, BTreeSet<Uuid>>,
    roots: BTreeMap<Uuid, Uuid>,
    /// Leases of readers.
    pub leases: Vec<Lease>,
    /// Records in the journal.
    pub claims: Vec<Claim>,
    /// Disks that were not what they had been after a merge, and the job.
    pub alarms: Vec<(Uuid, String)>,
    /// Bytes a new file may take.
    pub free_bytes: u64,
    /// Bytes of the whole repository.
    pub total_bytes: u64,
}

impl Forest {
    /// Links the nodes up. A parent that is not there, and a cycle, make the
    /// node that names it broken.
    #[must_use]
    pub fn new(nodes: impl IntoIterator<Item = Node>) -> Self {
        let mut forest = Self { nodes: nodes.into_iter().map(|n| (n.uuid, n)).collect(), ..Self::default() };
        let known: BTreeSet<Uuid> = forest.nodes.keys().copied().collect();
        for node in forest.nodes.values_mut() {
            let parents = match &node.link {
                Link::Root | Link::Unknown => &[][..],
                Link::Child(parent) => std::slice::from_ref(parent),
                Link::OneOf(parents) => parents,
            };
            for parent in parents {
                forest.children.entry(*parent).or_default().insert(node.uuid);
            }
            if let Link::Child(parent) = &node.link
                && !known.contains(parent)
                && !matches!(node.health, Health::Broken(_))
            {
                node.health = Health::Broken(format!("its parent {parent} is missing"));
            }
        }
        forest.find_roots();
        forest
    }

    /// The same without some nodes: what a deletion will leave.
    #[must_use]
    pub fn without(&self, gone: &[Uuid]) -> Self {
        let nodes = self.nodes.values().filter(|node| !gone.contains(&node.uuid)).cloned();
        Self {
            leases: self.leases.clone(),
            claims: self.claims.clone(),
            alarms: self.alarms.clone(),
            free_bytes: self.free_bytes,
            total_bytes: self.total_bytes,
            ..Self::new(nodes)
        }
    }

    fn find_roots(&mut self) {
        let mut cyclic = Vec::new();
        for start in self.nodes.keys().copied() {
            let mut at = start;
            let mut seen = BTreeSet::from([at]);
            while let Some(parent) = self.nodes.get(&at).and_then(first_parent) {
                if !self.nodes.contains_key(&parent) {
                    break;
                }
                if !seen.insert(parent) {
                    cyclic.push(start);
                    break;
                }
                at = parent;
            }
            // A cycle has no root; its smallest member stands for it.
            let root = if cyclic.last() == Some(&start) { seen.first().copied() } else { Some(at) };
            self.roots.insert(start, root.unwrap_or(at));
        }
        for uuid in cyclic {
            if let Some(node) = self.nodes.get_mut(&uuid) {
                node.health = Health::Broken("its parents form a cycle".into());
            }
        }
    }

    /// A node.
    #[must_use]
    pub fn node(&self, uuid: Uuid) -> Option<&Node> {
        self.nodes.get(&uuid)
    }

    /// All nodes, by uuid.
    pub fn nodes(&self) -> impl Iterator<Item = &Node> {
        self.nodes.values()
    }

    /// Children, those of unreadable images that may be included.
    pub fn children(&self, uuid: Uuid) -> impl Iterator<Item = &Node> {
        self.children.get(&uuid).into_iter().flatten().filter_map(|child| self.nodes.get(child))
    }

    /// The one child, if there is just one.
    #[must_use]
    pub fn only_child(&self, uuid: Uuid) -> Option<&Node> {
        let mut children = self.children(uuid);
        let first = children.next()?;
        children.next().is_none().then_some(first)
    }

    /// The parent a readable header names.
    #[must_use]
    pub fn parent(&self, node: &Node) -> Option<&Node> {
        match &node.link {
            Link::Child(parent) => self.nodes.get(parent),
            Link::Root | Link::OneOf(_) | Link::Unknown => None,
        }
    }

    /// The root of a node's tree, which names the tree.
    #[must_use]
    pub fn root(&self, uuid: Uuid) -> Uuid {
        self.roots.get(&uuid).copied().unwrap_or(uuid)
    }

    /// Nodes from `uuid` down to the root, itself included. Ends at a cycle.
    pub fn ancestry(&self, uuid: Uuid) -> impl Iterator<Item = &Node> {
        let mut at = self.nodes.get(&uuid);
        let mut left = self.nodes.len();
        std::iter::from_fn(move || {
            let node = at?;
            left = left.checked_sub(1)?;
            at = self.parent(node);
            Some(node)
        })
    }

    /// Number of images a reader of `uuid` goes through; 1 is no parent.
    #[must_use]
    pub fn depth(&self, uuid: Uuid) -> usize {
        self.ancestry(uuid).count()
    }

    /// The longest chain through each node, by node.
    #[must_use]
    pub fn heights(&self) -> BTreeMap<Uuid, usize> {
        let mut longest: BTreeMap<Uuid, usize> = BTreeMap::new();
        for leaf in self.nodes.keys().filter(|uuid| self.children(**uuid).next().is_none()) {
            let depth = self.depth(*leaf);
            for node in self.ancestry(*leaf) {
                let entry = longest.entry(node.uuid).or_default();
                *entry = depth.max(*entry);
            }
        }
        longest
    }

    /// Trees in which an image is broken, with the first such image and why.
    #[must_use]
    pub fn broken_trees(&self) -> BTreeMap<Uuid, (Uuid, String)> {
        let mut trees = BTreeMap::new();
        for node in self.nodes.values() {
            let Health::Broken(why) = &node.health else {
                continue;
            };
            let mut tainted = vec![self.root(node.uuid)];
            if let Link::OneOf(parents) = &node.link {
                tainted.extend(parents.iter().map(|parent| self.root(*parent)));
            }
            for tree in tainted {
                trees.entry(tree).or_insert_with(|| (node.uuid, why.clone()));
            }
        }
        trees
    }

    /// An image whose parents nobody knows: then nothing hidden may be
    /// merged or deleted anywhere (invariant 11).
    #[must_use]
    pub fn unknown_parents(&self) -> Option<(&Node, &str)> {
        self.nodes.values().find_map(|node| match (&node.link, &node.health) {
            (Link::Unknown, Health::Broken(why)) => Some((node, why.as_str())),
            (Link::Unknown, _) => Some((node, "its parent is not known")),
            _ => None,
        })
    }

    /// The record that names a node.
    #[must_use]
    pub fn claim_on(&self, uuid: Uuid) -> Option<&Claim> {
        self.claims.iter().find(|claim| claim.nodes.contains(&uuid))
    }

    /// Leases whose map includes a node.
    pub fn leases_on(&self, uuid: Uuid) -> impl Iterator<Item = &Lease> {
        self.leases.iter().filter(move |lease| lease.chain.contains(&uuid))
    }
}

fn first_parent(node: &Node) -> Option<Uuid> {
    match &node.link {
        Link::Child(parent) => Some(*parent),
        Link::OneOf(parents) => parents.first().copied(),
        Link::Root | Link::Unknown => None,
    }
}
