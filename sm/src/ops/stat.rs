//! What a VDI takes and what deleting it would free.

use serde::Serialize;
use uuid::Uuid;

use crate::error::{Error, Result};
use crate::image;
use crate::repo::Repo;
use crate::scan;

/// Figures of one VDI, in bytes of data blocks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Stat {
    /// Blocks in its own image.
    pub own_bytes: u64,
    /// Blocks of images below it that others read too.
    pub shared_bytes: u64,
    /// Blocks that no visible disk would read any more if it were deleted:
    /// its own and those of images below that only it stands on.
    pub freed_if_deleted_bytes: u64,
    /// Blocks in its chain.
    pub chain_bytes: u64,
    /// Volumes of its chain, leaf first.
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
}

/// Adds up a VDI's chain. For an attached leaf its own figure is what is on
/// disk, a lower bound.
///
/// # Errors
/// [`Error::NotFound`], or the first image of the chain that cannot be read.
pub fn stat(repo: &Repo, vdi: Uuid) -> Result<Stat> {
    let tree = scan::scan(repo)?.tree;
    let leaf = tree
        .by_uuid(vdi)
        .ok_or_else(|| Error::NotFound { what: format!("VDI {vdi} in SR {}", repo.name) })?;
    let mut stat =
        Stat { own_bytes: 0, shared_bytes: 0, freed_if_deleted_bytes: 0, chain_bytes: 0, chain: Vec::new() };
    let mut alone = tree.nodes[leaf].children.is_empty();
    for (level, node) in tree.chain(leaf).enumerate() {
        if let Some(broken) = node.broken() {
            let reason = broken.to_string();
            return Err(Error::BadImage { volume: node.volume.clone(), reason });
        }
        let bytes = image::allocated_bytes(repo, &node.volume)?;
        alone &= level == 0 || (node.is_hidden() && node.children.len() == 1);
        stat.chain_bytes += bytes;
        match (level, alone) {
            (0, _) => stat.own_bytes = bytes,
            (_, true) => {}
            (_, false) => stat.shared_bytes += bytes,
        }
        if alone {
            stat.freed_if_deleted_bytes += bytes;
        }
        stat.chain.push(ChainStat { uuid: node.uuid, allocated_bytes: bytes, hidden: node.is_hidden() });
    }
    Ok(stat)
}
