//! In what a VDI can differ from another.

use std::ops::Range;

use serde::Serialize;
use uuid::Uuid;
use vhd::placed::{Changes, Placed, differing, push_range};
use vhd::units::{BLOCK_BYTES, BlockNo};

use crate::error::{Error, Result};
use crate::image;
use crate::limits::{CHANGED_RANGES_MAX, LOOK_BYTES_MAX};
use crate::places::Disk;
use crate::repo::Repo;

/// A range of the disk, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct ChangedRange {
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
}

/// A part of what changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Changed {
    /// In order; neighbours do not touch.
    pub ranges: Vec<ChangedRange>,
    /// Where to ask on; `None`: that was all.
    pub next: Option<u64>,
}

/// The ranges from `offset` on in which `vdi` can differ from `since`, as far
/// as one answer goes: sector by sector, from the maps and bitmaps of both
/// down to what they have in common, siblings too. What is not listed is the
/// same in both. Past the end of `since` it counts as zeros; past that of
/// `vdi` nothing is listed.
///
/// Of one that is attached for writing its tapdisk is asked: a write that is
/// answered before an answer begins is in it, others may be.
///
/// # Errors
/// As [`Disk::open`], of either.
pub fn changed(repo: &Repo, vdi: Uuid, since: Uuid, offset: u64) -> Result<Changed> {
    if vdi == since {
        return Ok(Changed { ranges: Vec::new(), next: None });
    }
    // The one whose map goes on changing last: what it has of both is newer.
    let mut then = Disk::open(repo, since)?;
    let mut now = Disk::open(repo, vdi)?;
    let size = now.virtual_bytes();
    let from = offset - offset % BLOCK_BYTES;
    let stop = size.min(from.saturating_add(LOOK_BYTES_MAX));
    let mut ranges: Vec<Range<u64>> = Vec::new();
    let mut at = from;
    while at < stop && ranges.len() < CHANGED_RANGES_MAX {
        at = match (now.chain(), then.chain()) {
            (Some(disk), Some(other)) => {
                let block = BlockNo::of_byte(at);
                let top = disk.nodes().next().map(|node| node.name.clone());
                let found = Changes::of_block(disk, other, block).map_err(|error| match top {
                    Some(top) => image::bad(&top, error),
                    None => Error::NotFound { what: "chain".into() },
                })?;
                found.into_iter().for_each(|range| push_range(&mut ranges, range));
                at + BLOCK_BYTES
            }
            _ => window(&mut now, &mut then, at, stop, &mut ranges)?,
        };
    }
    let ranges = ranges
        .into_iter()
        .map(|range| (range.start.max(offset), range.end))
        .filter(|(start, end)| start < end)
        .map(|(offset, end)| ChangedRange { offset, length: end - offset });
    Ok(Changed { ranges: ranges.collect(), next: (at < size).then_some(at) })
}

/// Compares what both say of the range from `at` on, as far as both say
/// something; returns how far that was.
fn window(now: &mut Disk, then: &mut Disk, at: u64, stop: u64, ranges: &mut Vec<Range<u64>>) -> Result<u64> {
    let a = now.placed(at, stop)?;
    let mut end = a.last().map_or(stop, Placed::end);
    let b = then.placed(at, end)?;
    if let Some(last) = b.last() {
        end = end.min(last.end());
    }
    // Past the end of the other it counts as zeros.
    let a: Vec<_> = a.iter().filter_map(|run| run.within(at, end)).collect();
    differing(&a, &b).into_iter().for_each(|range| push_range(ranges, range.start..range.end.min(end)));
    Ok(end)
}
