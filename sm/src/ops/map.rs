//! Which image of its chain has which bytes of a VDI, and where.

use serde::Serialize;
use uuid::Uuid;
use vhd::placed::{Placed, push};
use vhd::storage::VolumeName;

use crate::error::{Error, Result};
use crate::limits::{LOOK_BYTES_MAX, MAP_EXTENTS_MAX};
use crate::places::{Disk, Known};
use crate::repo::Repo;

/// Times an attached VDI is asked anew because a merge took an image out of
/// its chain while we asked.
const ATTEMPTS_MAX: u32 = 4;

/// A run of the disk and where it lies. Offsets and lengths in bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct MapExtent {
    /// First byte on the virtual disk.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
    /// The VDI or hidden node that has it; `None`: nobody, it reads as zeros.
    pub node: Option<Uuid>,
    /// That node's volume.
    pub volume: Option<String>,
    /// Where in the volume.
    pub file_offset: Option<u64>,
    /// How far down the chain the node is: 1 is the VDI itself, 0 nobody.
    pub depth: u32,
}

/// A part of a map.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Map {
    /// In order, without gaps.
    pub extents: Vec<MapExtent>,
    /// Where to ask on; `None`: that was all.
    pub next: Option<u64>,
}

/// Maps `length` bytes from `offset` on, as far as one answer goes. Of a VDI
/// that is attached for writing its tapdisk is asked: each answer is what
/// held at its moment.
///
/// # Errors
/// [`Error::BadSize`] for a range that does not lie in the disk, else as
/// [`Disk::open`].
pub fn map(repo: &Repo, vdi: Uuid, offset: u64, length: Option<u64>) -> Result<Map> {
    let mut disk = Disk::open(repo, vdi)?;
    let size = disk.virtual_bytes();
    let end = length.map_or(Some(size), |length| offset.checked_add(length)).filter(|end| *end <= size);
    let Some(end) = end.filter(|_| offset < size) else {
        let reason = format!("VDI {vdi} has {size} bytes; the range asked for does not lie in it");
        return Err(Error::BadSize { reason });
    };
    for _ in 0..ATTEMPTS_MAX {
        let (placed, next) = collect(&mut disk, offset, end)?;
        let images = disk.images(repo)?;
        let extents: Option<Vec<_>> = placed.iter().map(|run| extent(run, &images)).collect();
        if let Some(extents) = extents {
            return Ok(Map { extents, next });
        }
    }
    Err(Error::Busy { reason: format!("the chain of VDI {vdi} changes while it is looked at") })
}

fn collect(disk: &mut Disk, offset: u64, end: u64) -> Result<(Vec<Placed>, Option<u64>)> {
    let stop = end.min(offset.saturating_add(LOOK_BYTES_MAX));
    let mut list: Vec<Placed> = Vec::new();
    // Sectors are the unit of images; what was asked for need not be.
    let mut at = offset - offset % 512;
    while at < stop && list.len() < MAP_EXTENTS_MAX {
        let part = disk.placed(at, stop)?;
        let Some(last) = part.last().map(Placed::end) else {
            break;
        };
        part.into_iter().filter_map(|run| run.within(offset, stop)).for_each(|run| push(&mut list, run));
        at = last;
    }
    Ok((list, (at < end).then_some(at)))
}

/// `None` if the image is not in the chain any more.
fn extent(run: &Placed, images: &[Known]) -> Option<MapExtent> {
    let nobody = MapExtent {
        offset: run.offset,
        length: run.len,
        node: None,
        volume: None,
        file_offset: None,
        depth: 0,
    };
    let Some(at) = run.at else {
        return Some(nobody);
    };
    let level = images.iter().position(|(id, _)| *id == at.image)?;
    let volume: &VolumeName = &images.get(level)?.1;
    Some(MapExtent {
        node: volume.uuid(),
        volume: Some(volume.to_string()),
        file_offset: Some(at.offset),
        depth: u32::try_from(level + 1).unwrap_or(u32::MAX),
        ..nobody
    })
}
