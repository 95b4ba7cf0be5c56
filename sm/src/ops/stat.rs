//! What a VDI takes, and what would be free without it.

use std::collections::BTreeSet;

use serde::Serialize;
use uuid::Uuid;
use vhd::storage::VolumeName;
use vhd::units::BLOCK_BYTES;

use crate::error::{Error, IoContext, Result};
use crate::image;
use crate::limits::STAT_LOOKS_MAX;
use crate::places;
use crate::repo::Repo;
use crate::scan;
use crate::tree::{Node, NodeIx, VdiTree};

/// Figures of one VDI, in bytes of data blocks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Stat {
    /// Blocks in its own image.
    pub own_bytes: u64,
    /// Blocks of images below it that others read too.
    pub shared_bytes: u64,
    /// Blocks that merges of its chain would free as it is: what a node has
    /// again that the node above it, its only child, has newer.
    pub reclaimable_bytes: u64,
    /// Blocks that no visible disk would read any more if it were deleted:
    /// its own and those of images below that only it stands on.
    pub freed_if_deleted_bytes: u64,
    /// What a merge would free besides, once it is deleted and the image it
    /// shared with one other is left to that one alone.
    pub freed_by_merge_then_bytes: u64,
    /// Blocks in its chain.
    pub chain_bytes: u64,
    /// Images of its chain, leaf first.
    pub chain: Vec<ChainStat>,
}

/// One image of the chain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ChainStat {
    /// The node.
    pub uuid: Uuid,
    /// Its blocks.
    pub allocated_bytes: u64,
    /// Whether it is hidden.
    pub hidden: bool,
    /// Images that stand on it.
    pub children: u32,
}

/// A node of the chain with its blocks.
struct Level<'a> {
    node: &'a Node,
    blocks: BTreeSet<u32>,
}

/// Adds up a VDI's chain. Figures to decide by, not to act on: no lease is
/// taken, and what changes meanwhile makes them stale. Of a leaf that is
/// attached for writing its tapdisk is asked.
///
/// # Errors
/// [`Error::NotFound`], or the first image of the chain that cannot be read;
/// [`Error::NotRunning`] when the tapdisk gives no answer; [`Error::Busy`]
/// when images of its chain were merged away each time it was looked at.
pub fn stat(repo: &Repo, vdi: Uuid) -> Result<Stat> {
    // Without a lease an image may be merged away between the scan that found
    // it and its reading. Then a new scan shows a chain without it.
    for _ in 0..STAT_LOOKS_MAX {
        let tree = scan::scan(repo)?.tree;
        let leaf = tree
            .by_uuid(vdi)
            .ok_or_else(|| Error::NotFound { what: format!("VDI {vdi} in SR {}", repo.name) })?;
        match add_up(repo, &tree, leaf) {
            Err(Error::NotFound { .. }) => {}
            found => return found,
        }
    }
    Err(Error::Busy { reason: format!("the chain of VDI {vdi} is being merged") })
}

fn add_up(repo: &Repo, tree: &VdiTree, leaf: NodeIx) -> Result<Stat> {
    let mut levels = Vec::new();
    for node in tree.chain(leaf) {
        levels.push(Level { node, blocks: blocks(repo, node)? });
    }
    let bytes = |level: &Level<'_>| level.blocks.len() as u64 * BLOCK_BYTES;
    let alone = levels
        .iter()
        .enumerate()
        .take_while(|(at, level)| {
            let children = level.node.children.len();
            if *at == 0 { children == 0 } else { level.node.is_hidden() && children == 1 }
        })
        .count();
    Ok(Stat {
        own_bytes: levels.first().map_or(0, bytes),
        shared_bytes: levels.iter().skip(alone.max(1)).map(bytes).sum(),
        reclaimable_bytes: reclaimable(&levels),
        freed_if_deleted_bytes: levels.iter().take(alone).map(bytes).sum(),
        freed_by_merge_then_bytes: merged_then(repo, tree, &levels, alone)?,
        chain_bytes: levels.iter().map(bytes).sum(),
        chain: levels
            .iter()
            .map(|level| ChainStat {
                uuid: level.node.uuid,
                allocated_bytes: bytes(level),
                hidden: level.node.is_hidden(),
                children: u32::try_from(level.node.children.len()).unwrap_or(u32::MAX),
            })
            .collect(),
    })
}

/// Runs of nodes each of which is the only child of the hidden one below it
/// become one image; what more than one of them has is freed.
fn reclaimable(levels: &[Level<'_>]) -> u64 {
    let mut freed = 0;
    let mut above: BTreeSet<u32> = BTreeSet::new();
    for (at, level) in levels.iter().enumerate() {
        let joins = at > 0 && level.node.is_hidden() && level.node.children.len() == 1;
        if !joins {
            above.clear();
        }
        let before = above.len();
        above.extend(&level.blocks);
        freed += (before + level.blocks.len() - above.len()) as u64 * BLOCK_BYTES;
    }
    freed
}

/// Without the first `alone` levels, which go, the next one may be left with
/// one child, that then merges into it.
fn merged_then(repo: &Repo, tree: &VdiTree, levels: &[Level<'_>], alone: usize) -> Result<u64> {
    let (Some(below), Some(gone)) = (levels.get(alone), alone.checked_sub(1).and_then(|at| levels.get(at)))
    else {
        return Ok(0);
    };
    let is_gone = |ix: &&NodeIx| tree.nodes.get(**ix).is_some_and(|node| node.uuid == gone.node.uuid);
    let mut left = below.node.children.iter().filter(|ix| !is_gone(ix));
    let (Some(other), None, true) = (left.next(), left.next(), below.node.is_hidden()) else {
        return Ok(0);
    };
    let Some(other) = tree.nodes.get(*other).filter(|node| node.broken().is_none()) else {
        return Ok(0);
    };
    let twice = blocks(repo, other)?.intersection(&below.blocks).count();
    Ok(twice as u64 * BLOCK_BYTES)
}

/// The blocks an image has.
fn blocks(repo: &Repo, node: &Node) -> Result<BTreeSet<u32>> {
    if let Some(broken) = node.broken() {
        let reason = broken.to_string();
        return Err(Error::BadImage { volume: node.volume.clone(), reason });
    }
    if node.volume == VolumeName::vhd(node.uuid)
        && let Some(live) = live_blocks(repo, node.uuid)?
    {
        return Ok(live);
    }
    Ok(image::blocks(repo, &node.volume)?.into_iter().collect())
}

fn live_blocks(repo: &Repo, vdi: Uuid) -> Result<Option<BTreeSet<u32>>> {
    let writes = {
        let _sr = repo.host.lock_sr().during(|| format!("lock of SR {}", repo.name))?;
        let leases = repo.host.leases().during(|| "leases".into())?;
        leases.iter().any(|lease| lease.serves(vdi) && !lease.read_only && lease.pid != 0)
    };
    if !writes {
        return Ok(None);
    }
    let lost = |reason: String| Error::NotRunning { what: format!("the tapdisk of VDI {vdi}"), reason };
    let Some(mut tap) = repo.host.tap(vdi).map_err(|e| lost(e.to_string()))? else {
        return Ok(None);
    };
    Ok(Some(places::leaf_blocks(vdi, tap.as_mut())?.into_iter().collect()))
}
