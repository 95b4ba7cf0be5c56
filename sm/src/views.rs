//! What the API says of SRs and VDIs.

use std::collections::BTreeMap;

use serde::Serialize;
use uuid::Uuid;
use vhd::storage::VolumeName;

use crate::catalog::Label;
use crate::error::{Error, IoContext, Result};
use crate::heads::in_parallel;
use crate::lease::Lease;
use crate::probe::FeaturesView;
use crate::repo::Repo;
use crate::scan::{self, Scan};
use crate::state::{KnownSr, SrType};
use crate::tree::{Broken, Node, NodeIx, NodeState};
use crate::wanted::{Down, Wanted};

/// A VDI or hidden node. Sizes in bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct VdiView {
    /// Its uuid.
    pub uuid: Uuid,
    /// Its name; may be empty.
    pub name: String,
    /// Free text.
    pub description: String,
    /// Its SR.
    pub sr: Uuid,
    /// What it is.
    pub kind: Kind,
    /// The node it stands on.
    pub parent: Option<Uuid>,
    /// The VDI it is a snapshot of.
    pub snapshot_of: Option<Uuid>,
    /// What a guest sees.
    pub virtual_size: u64,
    /// Storage it takes.
    pub physical_size: u64,
    /// Data blocks of its own.
    pub allocated: u64,
    /// Images in its chain; 0 when that cannot be told.
    pub depth: u32,
    /// Whether it can only be read.
    pub read_only: bool,
    /// Whether a live tapdisk serves it.
    pub attached: bool,
    /// Seconds since 1970.
    pub created: u64,
    /// Exactly why it cannot be used.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub broken: Option<String>,
    /// Where it is served, while attached.
    #[serde(flatten)]
    pub served: Option<Served>,
    /// Set while it is attached but has lost its tapdisk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub down: Option<Down>,
    /// What is wrong with how it is served, and what to do; only where one
    /// disk is asked about.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trouble: Option<String>,
}

/// Where an attached VDI is served.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Served {
    /// An NBD URI.
    pub nbd: String,
    /// The same for clients elsewhere, if it is served to them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nbd_remote: Option<String>,
    /// The NBD socket.
    pub socket: String,
    /// The tapdisk's process.
    pub pid: u32,
}

/// Kind of node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// A disk.
    Leaf,
    /// A read-only snapshot of one.
    Snapshot,
    /// A base copy.
    Hidden,
}

/// An SR. Sizes in bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SrView {
    /// Its uuid.
    pub uuid: Uuid,
    /// Its name.
    pub name: String,
    /// What it is.
    #[serde(rename = "type")]
    pub kind: SrType,
    /// Where it lies.
    pub location: String,
    /// Whether this host uses it.
    pub attached: bool,
    /// Size of what it lies on; `null` while detached.
    pub size: Option<u64>,
    /// Used there, by anybody.
    pub used: Option<u64>,
    /// Free there.
    pub free: Option<u64>,
    /// VDIs, hidden nodes not counted.
    pub vdis: Option<usize>,
    /// What its images are.
    #[serde(flatten)]
    pub images: Option<ImagesView>,
    /// What its filesystem can do.
    #[serde(flatten)]
    pub features: Option<FeaturesView>,
}

/// What the images of an attached SR are and take. Sizes in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct ImagesView {
    /// Base copies.
    pub hidden: usize,
    /// Images that cannot be used.
    pub broken: usize,
    /// Storage all images take. The rest of `used` is somebody else's.
    pub physical_size: u64,
    /// What guests may fill: above `size`, writes can find no space.
    pub virtual_size: u64,
}

/// A node with what stands on it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct NodeView {
    /// The node.
    #[serde(flatten)]
    pub vdi: VdiView,
    /// What stands on it.
    pub children: Vec<NodeView>,
}

/// All trees of an SR.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TreeView {
    /// The SR.
    pub sr: SrView,
    /// Nodes without a parent, or whose parent is not known.
    pub roots: Vec<NodeView>,
}

/// One look at an SR.
#[derive(Debug)]
pub struct Look<'a> {
    repo: &'a Repo,
    scan: Scan,
    labels: BTreeMap<Uuid, Label>,
    /// Of tapdisks that serve, by VDI.
    leases: BTreeMap<Uuid, Lease>,
    wanted: BTreeMap<Uuid, Wanted>,
}

impl<'a> Look<'a> {
    /// Reads headers, labels and leases.
    ///
    /// # Errors
    /// The SR, its journal or the run folder cannot be read.
    pub fn at(repo: &'a Repo) -> Result<Self> {
        Self::with(repo, scan::scan(repo)?, repo.labels.all()?)
    }

    /// The same for what one VDI needs to be shown: as many headers as its
    /// chain is long, unless that is broken.
    ///
    /// # Errors
    /// As [`Look::at`].
    pub fn of(repo: &'a Repo, vdi: Uuid) -> Result<Self> {
        let Some(scan) = scan::scan_chain(repo, vdi)? else {
            return Self::at(repo);
        };
        Self::with(repo, scan, repo.labels.get(vdi)?.map(|label| (vdi, label)).into_iter().collect())
    }

    fn with(repo: &'a Repo, scan: Scan, labels: BTreeMap<Uuid, Label>) -> Result<Self> {
        let leases = {
            let _sr = repo.host.lock_sr().during(|| format!("lock of SR {}", repo.name))?;
            repo.host.leases().during(|| "leases".into())?
        };
        let serving = leases.into_iter().filter(|lease| lease.pid != 0 && lease.serves(lease.vdi));
        let wanted = repo.host.wanted().during(|| "run folder".into())?;
        Ok(Self {
            repo,
            scan,
            labels,
            leases: serving.map(|lease| (lease.vdi, lease)).collect(),
            wanted: wanted.into_iter().map(|wanted| (wanted.vdi, wanted)).collect(),
        })
    }

    /// All visible nodes; with `hidden` the others too.
    #[must_use]
    pub fn vdis(&self, hidden: bool) -> Vec<VdiView> {
        self.read_ahead();
        let nodes = &self.scan.tree.nodes;
        nodes.iter().filter(|node| hidden || !node.is_hidden()).map(|node| self.vdi(node)).collect()
    }

    /// One node.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub fn one(&self, vdi: Uuid) -> Result<VdiView> {
        let not_found = || Error::NotFound { what: format!("VDI {vdi}") };
        match self.scan.tree.by_uuid(vdi) {
            Some(ix) => Ok(self.vdi(&self.scan.tree.nodes[ix])),
            None if self.wanted.contains_key(&vdi) => Ok(self.missing(vdi)),
            None => Err(not_found()),
        }
    }

    /// A VDI whose volume is gone while it was attached.
    #[must_use]
    pub fn missing(&self, vdi: Uuid) -> VdiView {
        let broken = Broken::Unreadable { reason: "its volume is missing".into() };
        self.vdi(&Node {
            volume: VolumeName::vhd(vdi),
            uuid: vdi,
            footer: Uuid::nil(),
            state: NodeState::Broken(broken),
            virtual_bytes: 0,
            physical_bytes: 0,
            allocated_bytes: 0,
            created_s: 0,
            parent: None,
            children: Vec::new(),
            depth: 0,
            intent: None,
            may_stand_on: None,
        })
    }

    /// All trees.
    #[must_use]
    pub fn roots(&self) -> Vec<NodeView> {
        self.read_ahead();
        self.scan.tree.roots.iter().map(|&ix| self.node(ix)).collect()
    }

    /// The SR.
    ///
    /// # Errors
    /// Its room cannot be told.
    pub fn sr(&self, known: &KnownSr) -> Result<SrView> {
        let mut images = ImagesView::default();
        let mut visible = 0;
        for node in &self.scan.tree.nodes {
            images.physical_size += node.allocated_bytes;
            images.broken += usize::from(node.broken().is_some());
            if node.is_hidden() {
                images.hidden += 1;
            } else {
                visible += 1;
                images.virtual_size = images.virtual_size.saturating_add(node.virtual_bytes);
            }
        }
        Ok(SrView { images: Some(images), ..attached_sr(known, self.repo, visible)? })
    }

    /// Reads the block tables that are not known yet, several at a time.
    fn read_ahead(&self) {
        let names: Vec<&VolumeName> = self.scan.tree.nodes.iter().map(|node| &node.volume).collect();
        in_parallel(self.repo.limits.scan_threads, &names, |name| {
            // What cannot be read is shown as broken, or as holding nothing.
            let _ = self.repo.heads.data_bytes(self.repo, name);
        });
    }

    /// Bottom up without recursion: a chain may be as long as an SR is large.
    fn node(&self, root: NodeIx) -> NodeView {
        let tree = &self.scan.tree;
        let mut order = vec![root];
        let mut at = 0;
        while let Some(&ix) = order.get(at) {
            order.extend(&tree.nodes[ix].children);
            at += 1;
        }
        let mut made: BTreeMap<NodeIx, NodeView> = BTreeMap::new();
        for &ix in order.iter().rev() {
            let node = &tree.nodes[ix];
            let children = node.children.iter().filter_map(|child| made.remove(child)).collect();
            made.insert(ix, NodeView { vdi: self.vdi(node), children });
        }
        made.remove(&root)
            .unwrap_or_else(|| NodeView { vdi: self.vdi(&tree.nodes[root]), children: Vec::new() })
    }

    fn vdi(&self, node: &Node) -> VdiView {
        let label = self.labels.get(&node.uuid).cloned().unwrap_or_default();
        let lease = self.leases.get(&node.uuid);
        // Wanted and without a tapdisk: it is attached, and not served.
        let wanted = self.wanted.get(&node.uuid).filter(|wanted| !wanted.starting && lease.is_none());
        let snapshot = label.snapshot_of.is_some() || label.read_only;
        let kind = match (node.is_hidden(), snapshot) {
            (true, _) => Kind::Hidden,
            (false, true) => Kind::Snapshot,
            (false, false) => Kind::Leaf,
        };
        let parent = node.parent.and_then(|ix| self.scan.tree.nodes.get(ix));
        let data = if node.broken().is_none() {
            self.repo.heads.data_bytes(self.repo, &node.volume).ok()
        } else {
            None
        };
        VdiView {
            uuid: node.uuid,
            name: label.name,
            description: label.description,
            sr: self.repo.uuid,
            kind,
            parent: parent.map(|parent| parent.uuid),
            snapshot_of: label.snapshot_of,
            virtual_size: node.virtual_bytes,
            physical_size: node.allocated_bytes,
            allocated: data.unwrap_or(0),
            depth: node.depth,
            read_only: kind != Kind::Leaf
                || lease.is_some_and(|lease| lease.read_only)
                || wanted.is_some_and(|wanted| wanted.read_only),
            attached: lease.is_some() || wanted.is_some(),
            created: if label.created_s == 0 { node.created_s } else { label.created_s },
            broken: node.broken().map(ToString::to_string),
            served: lease.map(|lease| served(self.repo, lease, self.wanted.get(&lease.vdi))),
            down: wanted.map(|wanted| wanted.down.clone().unwrap_or_else(Down::just_now)),
            trouble: None,
        }
    }
}

fn served(repo: &Repo, lease: &Lease, wanted: Option<&Wanted>) -> Served {
    let endpoint = repo.host.endpoint(lease);
    let remote = wanted.and_then(|wanted| wanted.remote.as_ref());
    Served {
        nbd: endpoint.nbd_uri(),
        nbd_remote: remote.map(|remote| remote.nbd_uri(&endpoint.export)),
        socket: endpoint.socket.display().to_string(),
        pid: endpoint.pid,
    }
}

/// An attached SR with `vdis` VDIs.
///
/// # Errors
/// Its room cannot be told.
pub fn attached_sr(known: &KnownSr, repo: &Repo, vdis: usize) -> Result<SrView> {
    let space = repo.volumes.space().during(|| format!("room of SR {}", repo.name))?;
    Ok(SrView {
        size: Some(space.total),
        used: Some(space.total.saturating_sub(space.free)),
        free: Some(space.free),
        vdis: Some(vdis),
        attached: true,
        ..detached_sr(known)
    })
}

/// An SR as it is known without looking at it.
#[must_use]
pub fn known_sr(known: &KnownSr) -> SrView {
    SrView { attached: known.attached, ..detached_sr(known) }
}

/// An SR this host knows and does not use.
#[must_use]
pub fn detached_sr(known: &KnownSr) -> SrView {
    SrView {
        uuid: known.uuid,
        name: known.name.clone(),
        kind: known.kind,
        location: known.path.display().to_string(),
        attached: false,
        size: None,
        used: None,
        free: None,
        vdis: None,
        images: None,
        features: None,
    }
}
