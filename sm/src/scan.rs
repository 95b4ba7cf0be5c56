//! Reads the headers of a whole SR.
//!
//! Headers are read without the SR lock, several at a time, and only those that
//! changed since this process read them ([`crate::heads`]); the result is a
//! picture that may be stale the moment it exists. Whoever acts on it takes
//! the lock and looks again at what it is about to change.

use uuid::Uuid;
use vhd::storage::VolumeName;

use crate::error::{IoContext, Result};
use crate::journal::{self, Stored};
use crate::repo::Repo;
use crate::tree::{Image, VdiTree};

/// What a scan found.
#[derive(Debug, Clone)]
pub struct Scan {
    /// All trees.
    pub tree: VdiTree,
    /// What is half done.
    pub intents: Vec<Stored>,
}

/// Scans the SR.
///
/// The journal is read before and after the headers: an operation that began
/// or ended meanwhile is then known from one of the two readings, so its
/// temporaries and half-made names do not show up as VDIs.
///
/// # Errors
/// The SR cannot be listed or its journal not be read. A broken image is no
/// error but a broken node.
pub fn scan(repo: &Repo) -> Result<Scan> {
    let mut known = journal::load(repo.volumes.as_ref())?;
    let names = repo.volumes.list().during(|| format!("list SR {}", repo.name))?;
    let images = repo.heads.images(repo, &names);
    let intents = journal::load(repo.volumes.as_ref())?;
    known.retain(|old| intents.iter().all(|new| new.name.id != old.name.id));
    known.extend(intents.iter().cloned());
    Ok(Scan { tree: VdiTree::build(images, &known), intents })
}

/// As [`scan`], of one VDI's chain only; `None` when that cannot be told
/// without the rest: it is broken, or not there.
///
/// # Errors
/// The journal cannot be read.
pub fn scan_chain(repo: &Repo, vdi: Uuid) -> Result<Option<Scan>> {
    let mut known = journal::load(repo.volumes.as_ref())?;
    let raw = || VolumeName::new(&format!("{vdi}.raw"));
    let leaf = VolumeName::vhd(vdi);
    let Some(leaf) = repo.heads.image(repo, &leaf).or_else(|| repo.heads.image(repo, &raw()?)) else {
        return Ok(None);
    };
    let mut images = vec![leaf];
    while let Some(parent) = match images.last().map(|image| &image.head) {
        Some(Ok(head)) => head.parent.clone(),
        _ => return Ok(None),
    } {
        let fits = |image: &Image| image.head.as_ref().is_ok_and(|head| head.footer == parent.footer);
        let found = parent.candidates.iter().find_map(|name| repo.heads.image(repo, name).filter(fits));
        match found {
            Some(image) if images.iter().all(|known| known.volume != image.volume) => images.push(image),
            _ => return Ok(None),
        }
    }
    let intents = journal::load(repo.volumes.as_ref())?;
    known.retain(|old| intents.iter().all(|new| new.name.id != old.name.id));
    known.extend(intents.iter().cloned());
    let tree = VdiTree::build(images, &known);
    Ok(tree.by_uuid(vdi).is_some().then_some(Scan { tree, intents }))
}
