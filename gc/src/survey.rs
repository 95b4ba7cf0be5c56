//! From what stands on the SR to what the planner looks at.

use std::collections::BTreeMap;

use sm::journal::{Intent, Stored};
use sm::lease::{Lease as Reader, Reader as Reads};
use sm::tree::{Broken, Image, NodeState, VdiTree};
use sm::{Repo, scan};
use tapdisk_control::ImageRef;
use uuid::Uuid;
use vhd::storage::VolumeName;

use crate::forest::{Claim, Forest, Format, Health, Lease, Link, Node, Role, Use};

/// Reads all headers, the journal and the leases. `readers` were read under
/// the SR lock; if the caller still holds it, the picture is exact
/// (invariant 8), else it is a proposal.
///
/// # Errors
/// The SR cannot be listed, or its journal not be read.
pub fn survey(repo: &Repo, readers: &[Reader]) -> sm::Result<Forest> {
    let found = scan::scan(repo)?;
    let mut forest = Forest::new(nodes(&found.tree));
    forest.claims = found.intents.iter().map(|stored| claim(&found.tree, stored)).collect();
    let footers: BTreeMap<Uuid, Uuid> =
        forest.nodes().filter(|node| !node.footer.is_nil()).map(|node| (node.footer, node.uuid)).collect();
    forest.leases = readers.iter().map(|reader| lease(&footers, reader)).collect();
    let space = repo.volumes.space().map_err(|e| sm::Error::io("free space", e))?;
    (forest.free_bytes, forest.total_bytes) = (space.free, space.total);
    Ok(forest)
}

/// The same, taking the SR lock just for the leases.
///
/// # Errors
/// As [`survey`], and the lock or the leases cannot be had.
pub fn glance(repo: &Repo) -> sm::Result<Forest> {
    let readers = {
        let _lock = repo.host.lock_sr().map_err(|e| sm::Error::io("lock the SR", e))?;
        leases(repo)?
    };
    let forest = survey(repo, &readers)?;
    if let Err(error) = repo.heads.note(repo) {
        // Knowing less only makes more wait.
        tracing::warn!(sr = %repo.uuid, %error, "what images stand on is not noted");
    }
    Ok(forest)
}

/// The live leases. The caller holds the SR lock.
///
/// # Errors
/// A lease cannot be read: nothing may then be changed.
pub fn leases(repo: &Repo) -> sm::Result<Vec<Reader>> {
    repo.host.leases().map_err(|e| sm::Error::io("read the leases", e))
}

fn nodes(tree: &VdiTree) -> Vec<Node> {
    let ordinary = tree.nodes.iter().map(|node| {
        let health = match &node.state {
            NodeState::Broken(broken) => Health::Broken(broken.to_string()),
            NodeState::Visible | NodeState::Hidden => Health::Settled,
        };
        let link = match (node.parent.and_then(|ix| tree.nodes.get(ix)), node.broken()) {
            (Some(parent), _) => Link::Child(parent.uuid),
            (None, Some(Broken::Unreadable { .. })) => match &node.may_stand_on {
                Some(parents) => Link::OneOf(parents.iter().map(|ix| tree.nodes[*ix].uuid).collect()),
                None => Link::Unknown,
            },
            (None, _) => Link::Root,
        };
        Node {
            uuid: node.uuid,
            footer: node.footer,
            link,
            role: if node.is_hidden() { Role::Hidden } else { Role::Visible },
            format: if node.volume.is_raw() { Format::Raw } else { Format::Sparse },
            health,
            virtual_bytes: node.virtual_bytes,
        }
    });
    let prepared = tree.prepared.iter().map(|image| prepared(tree, image));
    ordinary.chain(prepared).collect()
}

/// A prepared image is a child like any other to what it stands on; its
/// claim keeps it from being looked at for itself.
fn prepared(tree: &VdiTree, image: &Image) -> Node {
    let mut node = Node {
        uuid: prepared_uuid(image),
        footer: Uuid::nil(),
        link: Link::Unknown,
        role: Role::Visible,
        format: Format::Sparse,
        health: Health::Settled,
        virtual_bytes: 0,
    };
    match &image.head {
        Err(reason) => node.health = Health::Broken(reason.clone()),
        Ok(head) => {
            node.footer = head.footer;
            node.virtual_bytes = head.virtual_bytes;
            node.link = match &head.parent {
                None => Link::Root,
                Some(parent) => {
                    let named = |name: &VolumeName| tree.nodes.iter().find(|n| n.volume == *name);
                    // A parent that is itself prepared is no node to merge.
                    parent
                        .candidates
                        .iter()
                        .filter_map(named)
                        .find(|n| n.footer == parent.footer)
                        .map_or(Link::Root, |n| Link::Child(n.uuid))
                }
            };
        }
    }
    node
}

fn prepared_uuid(image: &Image) -> Uuid {
    let footer = image.head.as_ref().map_or(Uuid::nil(), |head| head.footer);
    image.volume.uuid().unwrap_or(footer)
}

fn claim(tree: &VdiTree, stored: &Stored) -> Claim {
    let id = stored.intent.id();
    let named = |image: &ImageRef| node_of(tree, image);
    match &stored.intent {
        Intent::Inner(intent) => {
            let images = intent.nodes.iter().chain([&intent.parent]);
            Claim { id, nodes: images.filter_map(named).collect(), merge: true }
        }
        Intent::LeafMerge(intent) => {
            let images = [&intent.leaf, &intent.parent];
            Claim { id, nodes: images.into_iter().filter_map(named).collect(), merge: true }
        }
        _ => {
            let nodes = tree.nodes.iter().filter(|node| {
                let key = if node.footer.is_nil() { node.uuid } else { node.footer };
                stored.intent.names(&node.volume, key)
            });
            let prepared = tree.prepared.iter().map(prepared_uuid);
            Claim { id, nodes: nodes.map(|node| node.uuid).chain(prepared).collect(), merge: false }
        }
    }
}

fn node_of(tree: &VdiTree, image: &ImageRef) -> Option<Uuid> {
    let by_footer = tree.nodes.iter().find(|node| node.footer == image.footer);
    by_footer
        .or_else(|| tree.nodes.iter().find(|node| node.volume.as_str() == image.volume))
        .map(|node| node.uuid)
}

/// The uuid of its footer finds the image also while a snapshot renames it.
fn lease(footers: &BTreeMap<Uuid, Uuid>, reader: &Reader) -> Lease {
    let chain = reader.chain.iter().filter_map(|image| {
        let by_name = || VolumeName::new(&image.volume).and_then(|name| name.uuid());
        footers.get(&image.footer).copied().or_else(by_name)
    });
    Lease {
        vdi: reader.vdi,
        chain: chain.collect(),
        usage: match reader.reader {
            Reads::Copy | Reads::Yielding => Use::Copies,
            Reads::Tapdisk if reader.read_only => Use::Reads,
            Reads::Tapdisk => Use::Writes,
        },
    }
}
