//! The chain of one VDI, read header by header from its leaf down.
//!
//! For operations on one disk: they hold the SR lock for as many header reads
//! as the chain is long, not for a scan of the whole SR.

use tapdisk_control::ImageRef;
use uuid::Uuid;
use vhd::storage::VolumeName;

use crate::error::{Error, Result};
use crate::image;
use crate::journal;
use crate::repo::Repo;
use crate::tree::{Head, ParentName};

/// Links followed before a chain counts as endless. Above any limit an
/// operator may set, so that long chains can still be attached and merged.
const LINKS_MAX: usize = 1024;

/// One image of a chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// Its volume.
    pub volume: VolumeName,
    /// What its headers say.
    pub head: Head,
}

impl Link {
    /// The image as leases and control requests name it.
    #[must_use]
    pub fn image_ref(&self) -> ImageRef {
        ImageRef { volume: self.volume.as_str().to_owned(), footer: self.head.footer }
    }
}

/// Reads the chain of a VDI, leaf first; never empty. Exact, without trust in
/// the catalog (invariant 8).
///
/// # Errors
/// [`Error::NotFound`] if the VDI has no volume; [`Error::Busy`] when a merge
/// gave the chain another shape meanwhile; else the error of the first image
/// that cannot be used, naming it.
pub fn read(repo: &Repo, vdi: Uuid) -> Result<Vec<Link>> {
    let leaf = leaf_volume(repo, vdi)?;
    let mut chain = vec![link(repo, &leaf)?];
    while let Some((child, parent)) = chain.last().and_then(|l| Some((l, l.head.parent.as_ref()?))) {
        let next = parent_of(repo, &child.volume, parent).map_err(|error| moved_on(repo, child, error))?;
        let again = chain.iter().any(|link| link.volume == next.volume);
        if again || chain.len() >= LINKS_MAX {
            let reason = "its chain leads back to itself".into();
            return Err(Error::BadImage { volume: next.volume, reason });
        }
        chain.push(next);
    }
    Ok(chain)
}

/// The volume of a VDI: `<uuid>.vhd`, or `<uuid>.raw` if that is there
/// instead.
///
/// # Errors
/// [`Error::Busy`] while nothing has the name because an operation is giving
/// it to another image, in two steps; [`Error::NotFound`], I/O errors.
pub fn leaf_volume(repo: &Repo, vdi: Uuid) -> Result<VolumeName> {
    if let Some(volume) = volume_there(repo, vdi)? {
        return Ok(volume);
    }
    let intents = journal::load(repo.volumes.as_ref())?;
    if let Some(stored) = intents.iter().find(|stored| stored.intent.gives_name(vdi)) {
        let (what, id) = (stored.intent.word(), stored.name.id);
        let reason = format!("{what} ({id}) is giving VDI {vdi} another image");
        return Err(Error::Busy { reason });
    }
    // One that ended between the two looks has given the name.
    let not_found = || Error::NotFound { what: format!("VDI {vdi} in SR {}", repo.name) };
    volume_there(repo, vdi)?.ok_or_else(not_found)
}

fn volume_there(repo: &Repo, vdi: Uuid) -> Result<Option<VolumeName>> {
    let raw = VolumeName::new(&format!("{vdi}.raw"));
    for volume in [Some(VolumeName::vhd(vdi)), raw].into_iter().flatten() {
        match image::open(repo, &volume, vhd::storage::Access::Read) {
            Ok(_) => return Ok(Some(volume)),
            Err(Error::NotFound { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}

fn link(repo: &Repo, volume: &VolumeName) -> Result<Link> {
    let seen =
        image::look(repo, volume).ok_or_else(|| Error::NotFound { what: format!("volume {volume}") })?;
    let head = seen.head.map_err(|reason| Error::BadImage { volume: volume.clone(), reason })?;
    Ok(Link { volume: seen.volume, head })
}

/// A merge of a detached leaf ends with one rename of the parent over it: who
/// has read the leaf before looks for a parent that is not there any more. The
/// child tells, read once more.
fn moved_on(repo: &Repo, child: &Link, error: Error) -> Error {
    let missing = matches!(error, Error::MissingParent { .. });
    if missing && link(repo, &child.volume).is_ok_and(|now| now.head != child.head) {
        return Error::Busy { reason: format!("a merge gives {} another parent", child.volume) };
    }
    error
}

/// The first candidate with the right uuid; see [`crate::tree`].
fn parent_of(repo: &Repo, child: &VolumeName, parent: &ParentName) -> Result<Link> {
    let Some(first) = parent.candidates.first() else {
        return Err(Error::ParentOutside { volume: child.clone() });
    };
    let mut refused = None;
    for candidate in &parent.candidates {
        match link(repo, candidate) {
            Ok(found) if found.head.footer == parent.footer => return Ok(found),
            Ok(found) => {
                let reason = format!(
                    "its parent {candidate} has uuid {} and not {}",
                    found.head.footer, parent.footer
                );
                refused.get_or_insert(Error::BadImage { volume: child.clone(), reason });
            }
            Err(Error::NotFound { .. }) => {}
            Err(error) => {
                refused.get_or_insert(error);
            }
        }
    }
    Err(refused.unwrap_or_else(|| Error::MissingParent { volume: child.clone(), parent: first.to_string() }))
}
