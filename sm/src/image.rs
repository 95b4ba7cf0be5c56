//! Single images, as operations need them: the one file that calls the
//! format crate's metadata functions.
//!
//! Every function opens, does one thing and closes; none decides anything.

use std::sync::Arc;

use uuid::Uuid;
use vhd::bat::{BAT_FREE, read_bat};
use vhd::create::{NewImage, NewKind};
use vhd::meta::{FooterState, Meta, ParentRef};
use vhd::reparent::ParentLink;
use vhd::storage::{Access, Volume, VolumeName, Why};
use vhd::units::BLOCK_BYTES;

use crate::error::{Error, IoContext, Result};
use crate::repo::Repo;
use crate::tree::{Head, Image, ParentName};

/// An error of the format crate, about this image or the one it names.
pub fn bad(volume: &VolumeName, error: vhd::error::Error) -> Error {
    match error {
        vhd::error::Error::Of { image, source } => {
            let named = VolumeName::new(&image);
            bad(named.as_ref().unwrap_or(volume), *source)
        }
        vhd::error::Error::Io(source) => Error::io(format!("image {volume}"), source),
        vhd::error::Error::BadSize { reason } => {
            Error::BadSize { reason: format!("image {volume}: {reason}") }
        }
        vhd::error::Error::ParentOutside { .. } => Error::ParentOutside { volume: volume.clone() },
        vhd::error::Error::ParentMissing { name } => {
            Error::MissingParent { volume: volume.clone(), parent: name }
        }
        vhd::error::Error::Unsupported { what } => {
            Error::Unsupported { what: format!("image {volume}: {what}") }
        }
        other => Error::BadImage { volume: volume.clone(), reason: other.to_string() },
    }
}

/// Reads an image's headers.
///
/// # Errors
/// [`Error::NotFound`] if there is no such volume, [`Error::BadImage`] with
/// the exact reason if its headers are not a VHD's, I/O errors.
pub fn meta(repo: &Repo, volume: &VolumeName) -> Result<Meta> {
    Meta::read(open(repo, volume, Access::Read)?.as_ref()).map_err(|e| bad(volume, e))
}

/// Opens a volume. With [`Access::Write`] it is locked by us; a lock that
/// somebody else holds is [`Error::Busy`].
///
/// # Errors
/// As [`meta`].
pub fn open(repo: &Repo, volume: &VolumeName, access: Access) -> Result<Arc<dyn Volume>> {
    repo.volumes.open(volume, access).map_err(|source| match source.kind() {
        std::io::ErrorKind::NotFound => Error::NotFound { what: format!("volume {volume}") },
        _ => Error::io(format!("open {volume}"), source),
    })
}

/// The footer uuid of a volume; `None` if there is no such volume. Raw
/// volumes have none either and answer nil.
///
/// # Errors
/// As [`meta`].
pub fn footer_of(repo: &Repo, volume: &VolumeName) -> Result<Option<Uuid>> {
    if volume.is_raw() {
        return open(repo, volume, Access::Read).map(|_| Some(Uuid::nil()));
    }
    match meta(repo, volume) {
        Ok(meta) => Ok(Some(meta.uuid())),
        Err(Error::NotFound { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// What a scan notes about a volume; `None` if it is gone by now.
pub fn look(repo: &Repo, volume: &VolumeName) -> Option<Image> {
    let unreadable = |reason: String| Image {
        volume: volume.clone(),
        physical_bytes: 0,
        allocated_bytes: 0,
        head: Err(reason),
        may_stand_on: None,
    };
    let opened = match repo.volumes.open(volume, Access::Read) {
        Ok(opened) => opened,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return None,
        Err(error) => return Some(unreadable(error.to_string())),
    };
    let physical_bytes = opened.len().unwrap_or(0);
    let allocated_bytes = opened.allocated().unwrap_or(0);
    let head = if volume.is_raw() { Ok(raw_head(physical_bytes)) } else { read_head(opened.as_ref()) };
    Some(Image { volume: volume.clone(), physical_bytes, allocated_bytes, head, may_stand_on: None })
}

fn raw_head(virtual_bytes: u64) -> Head {
    Head { footer: Uuid::nil(), virtual_bytes, hidden: false, created_s: 0, parent: None }
}

fn read_head(volume: &dyn Volume) -> Result<Head, String> {
    Meta::read(volume).and_then(|meta| head(&meta)).map_err(|e| e.to_string())
}

/// The part of an image's metadata that trees are made of.
fn head(meta: &Meta) -> vhd::error::Result<Head> {
    let parent = match &meta.parent {
        None => None,
        Some(parent) => Some(ParentName { footer: parent.uuid, candidates: candidates(parent)? }),
    };
    Ok(Head {
        footer: meta.uuid(),
        virtual_bytes: meta.virtual_bytes(),
        hidden: meta.hidden(),
        created_s: u64::from(meta.footer.timestamp) + vhd::footer::VHD_EPOCH_S,
        parent,
    })
}

/// No candidate is how the tree says that the parent lies outside.
fn candidates(parent: &ParentRef) -> vhd::error::Result<Vec<VolumeName>> {
    match parent.candidates() {
        Err(vhd::error::Error::ParentOutside { .. }) => Ok(Vec::new()),
        other => other,
    }
}

/// Bytes of data blocks the image has of its own. For an image that is open
/// for writing elsewhere this is what is on disk, a lower bound.
///
/// # Errors
/// As [`meta`].
pub fn allocated_bytes(repo: &Repo, volume: &VolumeName) -> Result<u64> {
    let opened = open(repo, volume, Access::Read)?;
    if volume.is_raw() {
        return opened.len().during(|| format!("length of {volume}"));
    }
    let meta = Meta::read(opened.as_ref()).map_err(|e| bad(volume, e))?;
    let Some(layout) = &meta.layout else {
        return Ok(meta.virtual_bytes());
    };
    let bat = read_bat(opened.as_ref(), layout).map_err(|e| bad(volume, e))?;
    let blocks = bat.iter().filter(|entry| **entry != BAT_FREE).count() as u64;
    Ok(blocks * u64::from(layout.block_sectors) * vhd::units::SECTOR_BYTES)
}

/// Now, as VHDs count: seconds since 2000.
#[must_use]
pub fn vhd_time(repo: &Repo) -> u32 {
    let now_s = repo.ids.now_s().saturating_sub(vhd::footer::VHD_EPOCH_S);
    u32::try_from(now_s).unwrap_or(u32::MAX)
}

/// The blocks of 2 MiB of which an image has a part of its own, in order. As
/// [`allocated_bytes`], what is on disk.
///
/// # Errors
/// As [`meta`].
pub fn blocks(repo: &Repo, volume: &VolumeName) -> Result<Vec<u32>> {
    let opened = open(repo, volume, Access::Read)?;
    let all = |bytes: u64| (0..u32::try_from(bytes.div_ceil(BLOCK_BYTES)).unwrap_or(u32::MAX)).collect();
    if volume.is_raw() {
        return opened.len().during(|| format!("length of {volume}")).map(all);
    }
    let meta = Meta::read(opened.as_ref()).map_err(|e| bad(volume, e))?;
    let Some(layout) = &meta.layout else {
        return Ok(all(meta.virtual_bytes()));
    };
    let bat = read_bat(opened.as_ref(), layout).map_err(|e| bad(volume, e))?;
    // Images of others may have blocks of another size.
    let bytes = u64::from(layout.block_sectors) * vhd::units::SECTOR_BYTES;
    let held = (0..).zip(&bat).filter(|(_, entry)| **entry != BAT_FREE).map(|(block, _): (u64, _)| block);
    let mut blocks: Vec<u32> = held
        .flat_map(|block| block * bytes / BLOCK_BYTES..((block + 1) * bytes).div_ceil(BLOCK_BYTES))
        .filter_map(|block| u32::try_from(block).ok())
        .collect();
    blocks.dedup();
    Ok(blocks)
}

/// What a new image is to be.
#[derive(Debug, Clone)]
pub struct NewVhd<'a> {
    /// Its volume, which must not exist.
    pub volume: &'a VolumeName,
    /// Its footer uuid.
    pub footer: Uuid,
    /// Size of the disk in bytes.
    pub virtual_bytes: u64,
    /// What it stands on: volume and footer uuid.
    pub parent: Option<(&'a VolumeName, Uuid)>,
}

/// Creates an empty dynamic or differencing image, durable in itself; its
/// name is durable once the caller has synced. The lock comes back with it,
/// so that nobody takes it for a leftover.
///
/// # Errors
/// I/O errors; what is left then is a temporary for recovery to delete.
pub fn create(repo: &Repo, new: &NewVhd<'_>) -> Result<Arc<dyn Volume>> {
    let volume = repo.volumes.create(new.volume).during(|| format!("create {}", new.volume))?;
    let timestamp_s = vhd_time(repo);
    let kind = match new.parent {
        None => NewKind::Dynamic,
        Some((parent, uuid)) => {
            NewKind::Child { parent: ParentLink { uuid, volume: parent.clone(), timestamp_s } }
        }
    };
    let image = NewImage {
        uuid: new.footer,
        virtual_bytes: new.virtual_bytes,
        kind,
        bat_entries_max: None,
        hidden: false,
        timestamp_s,
    };
    vhd::create::create(volume.as_ref(), &image).map_err(|e| bad(new.volume, e))?;
    Ok(volume)
}

/// Replays or drops the pending record of an image nobody holds and makes it
/// whole on disk; afterwards anybody may read it. An image that is settled is
/// left as it is: one opened for writing durably lacks its last footer before
/// anything else of it changes.
///
/// # Errors
/// [`Error::Busy`] when somebody holds it, [`Error::BadImage`], I/O errors.
pub fn settle(repo: &Repo, volume: &VolumeName) -> Result<()> {
    let meta = meta(repo, volume)?;
    let ours = meta.layout.as_ref().is_some_and(|l| l.block_sectors == vhd::units::BLOCK_SECTORS);
    let record =
        repo.host.records().existing(meta.uuid()).during(|| format!("pending record of {volume}"))?;
    let settled = meta.footer_state == FooterState::Settled && record.is_none();
    // Fixed images and other block sizes are never opened for writing.
    if settled || !ours {
        return Ok(());
    }
    drop(record);
    vhd::writer::settle(repo.volumes.as_ref(), volume, repo.host.records()).map_err(|e| bad(volume, e))
}

/// Sets or clears the hidden flag of a settled image nobody holds, durably.
/// The caller holds the SR lock (invariant 4).
///
/// # Errors
/// As [`settle`].
pub fn set_hidden(repo: &Repo, volume: &VolumeName, hidden: bool) -> Result<()> {
    let opened = open(repo, volume, Access::Write)?;
    let mut meta = Meta::read(opened.as_ref()).map_err(|e| bad(volume, e))?;
    if meta.hidden() == hidden {
        make_durable(volume, opened.as_ref(), "hidden: found so")?;
    }
    vhd::hidden::set_hidden(opened.as_ref(), &mut meta, hidden).map_err(|e| bad(volume, e))
}

/// What a dead process wrote is seen before it is durable: whoever goes on
/// from there makes it so first, or a power cut takes it away under him.
fn make_durable(volume: &VolumeName, opened: &dyn Volume, why: Why) -> Result<()> {
    opened.flush(why).during(|| format!("flush {volume}"))
}

/// Whether an image has become a base for good: hidden, which comes last, and
/// both footers say so. If it has, that is durable.
///
/// # Errors
/// As [`meta`].
pub fn is_base(repo: &Repo, volume: &VolumeName) -> Result<bool> {
    let opened = open(repo, volume, Access::Read)?;
    let meta = Meta::read(opened.as_ref()).map_err(|e| bad(volume, e))?;
    let is_base = meta.hidden() && meta.footer_state == FooterState::Settled;
    if is_base {
        make_durable(volume, opened.as_ref(), "snapshot: base found hidden")?;
    }
    Ok(is_base)
}

/// Gives a settled image nobody holds another parent, durably. The caller
/// holds the SR lock (invariant 4).
///
/// # Errors
/// As [`settle`].
pub fn set_parent(repo: &Repo, volume: &VolumeName, parent: &VolumeName, footer: Uuid) -> Result<()> {
    let opened = open(repo, volume, Access::Write)?;
    let mut meta = Meta::read(opened.as_ref()).map_err(|e| bad(volume, e))?;
    if meta.parent.as_ref().is_some_and(|now| now.uuid == footer) {
        make_durable(volume, opened.as_ref(), "reparent: found so")?;
    }
    repo.heads.expect(repo, volume, footer)?;
    let link = ParentLink { uuid: footer, volume: parent.clone(), timestamp_s: meta.footer.timestamp };
    vhd::reparent::set_parent(opened.as_ref(), &mut meta, &link).map_err(|e| bad(volume, e))
}
