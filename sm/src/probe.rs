//! What lies at a path, before it is taken into use. Changes nothing.

use std::path::{Path, PathBuf};

use serde::Serialize;
use uuid::Uuid;
use vhd::storage::{Features, Fs, PosixFs};

use crate::catalog::SqliteLabels;
use crate::check::Remark;
use crate::error::{Error, IoContext, Result};
use crate::journal;
use crate::offline;
use crate::owner::{HostId, Owner};
use crate::reference::Leftover;
use crate::scan;
use crate::tree::VdiTree;

/// What is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Found {
    /// No folder of that name.
    Missing,
    /// A folder without images: an SR can be created in it.
    Nothing,
    /// An SR of ours: it can be introduced.
    Ours,
    /// Images without our dot folder, like those of the reference: the SR can
    /// be introduced.
    Reference,
}

/// Who uses an SR.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct OwnerView {
    /// The host that took it last.
    pub host: Uuid,
    /// Whether that is this host.
    pub this_host: bool,
    /// Whether a process uses it now.
    pub in_use: bool,
}

/// What a probe found. Sizes in bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Probe {
    /// The folder, as an absolute path.
    pub path: PathBuf,
    /// What is there.
    pub found: Found,
    /// Its uuid, if its catalog says.
    pub uuid: Option<Uuid>,
    /// Its name there.
    pub name: Option<String>,
    /// Who uses it; `null` if nobody ever did.
    pub owner: Option<OwnerView>,
    /// Images, and of them visible disks and snapshots, hidden ones, broken
    /// ones.
    pub images: usize,
    /// Visible ones.
    pub vdis: usize,
    /// Base copies.
    pub hidden: usize,
    /// Images that cannot be used, with the reason.
    pub broken: Vec<Remark>,
    /// What the images take.
    pub physical_size: u64,
    /// What guests may fill.
    pub virtual_size: u64,
    /// Records in the journal: while there are any, the SR cannot go back to
    /// the reference.
    pub half_done: usize,
    /// Files of the reference beside images, and what they mean.
    pub leftovers: Vec<Remark>,
    /// Size of the filesystem.
    pub size: Option<u64>,
    /// Free there.
    pub free: Option<u64>,
    /// What the filesystem can do.
    #[serde(flatten)]
    pub features: Option<FeaturesView>,
}

/// What an SR's filesystem can do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct FeaturesView {
    /// The filesystem.
    pub filesystem: String,
    /// Whether it lies on another machine.
    pub network: bool,
    /// Whether merges can share extents instead of copying; `null` if unknown.
    pub reflink: Option<bool>,
    /// Whether freed blocks give their space back; `null` if unknown.
    pub punch_hole: Option<bool>,
}

impl From<Features> for FeaturesView {
    fn from(features: Features) -> Self {
        let Features { filesystem, network, reflink, punch_hole } = features;
        Self { filesystem, network, reflink, punch_hole }
    }
}

/// Looks at a folder.
///
/// # Errors
/// The folder cannot be read, or a journal record of ours in it.
pub fn probe(path: &Path, id: HostId) -> Result<Probe> {
    let mut probe = Probe {
        path: path.to_owned(),
        found: Found::Missing,
        uuid: None,
        name: None,
        owner: None,
        images: 0,
        vdis: 0,
        hidden: 0,
        broken: Vec::new(),
        physical_size: 0,
        virtual_size: 0,
        half_done: 0,
        leftovers: Vec::new(),
        size: None,
        free: None,
        features: None,
    };
    match std::fs::metadata(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(probe),
        Err(error) => return Err(Error::io(format!("SR folder {}", path.display()), error)),
        Ok(metadata) if !metadata.is_dir() => {
            return Err(Error::BadRequest { reason: format!("{} is no folder", path.display()) });
        }
        Ok(_) => {}
    }
    let what = || format!("SR folder {}", path.display());
    let fs = PosixFs::new(path.to_owned());
    let repo = offline::look(path, Uuid::nil(), &path.display().to_string());
    let space = repo.volumes.space().during(what)?;
    (probe.size, probe.free) = (Some(space.total), Some(space.free));
    probe.features = Some(fs.features().during(what)?.into());
    count(&mut probe, &scan::scan(&repo)?.tree);
    probe.half_done = journal::load(repo.volumes.as_ref())?.len();
    for name in fs.list("").during(what)? {
        if let Some(leftover) = Leftover::of(&name) {
            probe.leftovers.push(Remark { what: name, why: leftover.explain() });
        }
    }
    let ours = path.join(".coppice");
    probe.owner =
        Owner::peek(path)?.map(|(host, in_use)| OwnerView { host, this_host: host == id.host, in_use });
    if let Some((uuid, name)) = SqliteLabels::peek(&ours) {
        (probe.uuid, probe.name) = (Some(uuid), Some(name));
    }
    probe.found = match (ours.is_dir(), probe.images + probe.leftovers.len()) {
        (true, _) => Found::Ours,
        (false, 0) => Found::Nothing,
        (false, _) => Found::Reference,
    };
    Ok(probe)
}

fn count(probe: &mut Probe, tree: &VdiTree) {
    probe.images = tree.nodes.len();
    probe.hidden = tree.nodes.iter().filter(|node| node.is_hidden()).count();
    for node in &tree.nodes {
        probe.physical_size += node.allocated_bytes;
        match node.broken() {
            Some(broken) => {
                probe.broken.push(Remark { what: node.volume.to_string(), why: broken.to_string() });
            }
            None if node.is_hidden() => {}
            None => {
                probe.vdis += 1;
                probe.virtual_size = probe.virtual_size.saturating_add(node.virtual_bytes);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_of_folder_is_told_and_none_is_changed() {
        let folder = tempfile::tempdir().unwrap();
        let id = HostId { host: Uuid::from_u128(1), boot: Uuid::from_u128(2) };
        let at = |name: &str| folder.path().join(name);
        assert_eq!(probe(&at("gone"), id).unwrap().found, Found::Missing);
        std::fs::create_dir(at("sr")).unwrap();
        assert_eq!(probe(&at("sr"), id).unwrap().found, Found::Nothing);
        std::fs::write(at("sr").join(format!("{}.vhd", Uuid::from_u128(7))), "no image").unwrap();
        std::fs::write(at("sr").join("filelog.txt"), "").unwrap();
        let reference = probe(&at("sr"), id).unwrap();
        assert_eq!((reference.found, reference.images, reference.vdis), (Found::Reference, 1, 0));
        assert_eq!((reference.broken.len(), reference.leftovers.len()), (1, 1));
        assert_eq!(std::fs::read_dir(at("sr")).unwrap().count(), 2, "nothing is added");

        let owner = Owner::acquire(&at("sr"), id).unwrap();
        SqliteLabels::open(&at("sr/.coppice")).unwrap().set_sr(Uuid::from_u128(9), "store").unwrap();
        let ours = probe(&at("sr"), HostId { host: Uuid::from_u128(3), ..id }).unwrap();
        assert_eq!((ours.found, ours.uuid), (Found::Ours, Some(Uuid::from_u128(9))));
        assert_eq!(ours.name.as_deref(), Some("store"));
        let used = OwnerView { host: id.host, this_host: false, in_use: true };
        assert_eq!(ours.owner, Some(used));
        drop(owner);
        assert!(!probe(&at("sr"), id).unwrap().owner.unwrap().in_use);
        assert!(probe(&at("sr/filelog.txt"), id).is_err());
    }
}
