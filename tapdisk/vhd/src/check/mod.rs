//! Every invariant of the format, as a checker: what `vhd-util check` looks
//! at, and what it misses (bits of a BATmap that lie, overlaps in n log n).
//!
//! It reads and reports; it changes nothing. It stops looking after
//! [`PROBLEMS_MAX`] problems.

use crate::bat::{BAT_FREE, Layout, read_bat};
use crate::error::Result;
use crate::footer::DiskType;
use crate::limits::PROBLEMS_MAX;
use crate::meta::Meta;
use crate::storage::{Volume, VolumeName, Volumes};
use crate::units::SECTOR_BYTES;

mod blocks;
mod footers;
mod headers;
mod parent;

/// Which footer or header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// The footer at the end.
    EndFooter,
    /// The copy at the front.
    FrontFooter,
    /// The dynamic header.
    Header,
    /// The BATmap.
    Batmap,
    /// A parent locator.
    Locator(u8),
}

impl std::fmt::Display for Part {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::EndFooter => f.write_str("primary footer"),
            Self::FrontFooter => f.write_str("backup footer"),
            Self::Header => f.write_str("header"),
            Self::Batmap => f.write_str("batmap"),
            Self::Locator(slot) => write!(f, "parent locator {slot}"),
        }
    }
}

/// Something wrong with an image.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Problem {
    /// A structure breaks a rule.
    #[error("{part} invalid: {reason}")]
    Invalid {
        /// Which.
        part: Part,
        /// Which rule.
        reason: &'static str,
    },
    /// The two footers are not the same.
    #[error("primary and backup footer differ")]
    FootersDiffer,
    /// The image cannot be read any further.
    #[error("{reason}")]
    Unreadable {
        /// Why.
        reason: String,
    },
    /// Two blocks share sectors.
    #[error("block {block} (offset {sector:#x}) clobbers block {other} (offset {other_sector:#x})")]
    Overlap {
        /// The one.
        block: u32,
        /// Where it lies.
        sector: u32,
        /// The other.
        other: u32,
        /// Where it lies.
        other_sector: u32,
    },
    /// A BATmap bit is set for a block that is not allocated.
    #[error("batmap shows block {block} as whole, but it is not allocated")]
    BatmapUnallocated {
        /// Which.
        block: u32,
    },
    /// A BATmap bit is set for a block with sectors missing.
    #[error("batmap shows block {block} as whole, but {missing} of its sectors are missing")]
    BatmapLies {
        /// Which.
        block: u32,
        /// Sectors its bitmap lacks.
        missing: u32,
    },
    /// Data in a sector that is not marked present.
    #[error("block {block} has data in sector {sector}, which its bitmap does not show")]
    StrayData {
        /// Which block.
        block: u32,
        /// Which sector of it.
        sector: u32,
    },
    /// The parent is not what the header says.
    #[error("invalid parent {name}: {reason}")]
    Parent {
        /// Its name.
        name: String,
        /// What is wrong.
        reason: String,
    },
}

/// What [`check`] looks at, and what it lets pass.
#[derive(Debug, Default, Clone, Copy)]
pub struct Options<'a> {
    /// Now, in seconds since 2000, to find creation times in the future;
    /// `None`: times are not looked at.
    pub now_s: Option<u32>,
    /// A bad footer at the end passes if the copy is good.
    pub allow_bad_end: bool,
    /// Overlaps pass: for an image that is being written.
    pub allow_overlaps: bool,
    /// A parent with another uuid passes.
    pub allow_parent_uuid: bool,
    /// Read all data, and report what the bitmaps do not show.
    pub read_data: bool,
    /// Where to look for the parent; `None`: its name is all that is checked.
    pub parents: Option<&'a dyn Volumes>,
}

/// What a check found; sound if there are no problems.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// What is wrong, in the order it was found; the first is what makes
    /// others follow.
    pub problems: Vec<Problem>,
    /// Allocated blocks.
    pub blocks: u32,
    /// Sectors present in them.
    pub sectors: u64,
}

impl Report {
    /// No problems.
    #[must_use]
    pub fn is_sound(&self) -> bool {
        self.problems.is_empty()
    }

    fn add(&mut self, problem: Problem) {
        if self.problems.len() < PROBLEMS_MAX {
            self.problems.push(problem);
        }
    }

    fn invalid(&mut self, part: Part, reason: &'static str) {
        self.add(Problem::Invalid { part, reason });
    }

    fn is_full(&self) -> bool {
        self.problems.len() >= PROBLEMS_MAX
    }
}

/// Checks an image.
///
/// # Errors
/// Reading failed; what is wrong with the image is in the report.
pub fn check(volume: &dyn Volume, options: &Options<'_>) -> Result<Report> {
    let mut report = Report::default();
    footers::check(volume, options, &mut report)?;
    let meta = match Meta::read_poisoned(volume) {
        Ok(meta) => meta,
        Err(error @ crate::Error::Io(_)) => return Err(error),
        Err(error) => {
            unreadable(&mut report, &error);
            return Ok(report);
        }
    };
    let (Some(header), Some(layout)) = (&meta.header, &meta.layout) else {
        return Ok(report);
    };
    headers::check(volume, &meta, header, options, &mut report)?;
    if meta.disk_type() == DiskType::Differencing {
        parent::check(&meta, options, &mut report);
    }
    match read_bat(volume, layout) {
        Ok(bat) => blocks::check(volume, &meta, layout, &bat, options, &mut report)?,
        Err(error @ crate::Error::Io(_)) => return Err(error),
        Err(error) => unreadable(&mut report, &error),
    }
    Ok(report)
}

/// Checks an image and all its ancestors; the names with their reports, top
/// first. Ends at a parent that cannot be found, which is a problem of its
/// child, and after as many levels as a chain may have.
///
/// # Errors
/// As [`check`].
pub fn check_chain(
    volumes: &dyn Volumes,
    top: &VolumeName,
    options: &Options<'_>,
) -> Result<Vec<(VolumeName, Report)>> {
    let options = Options { parents: Some(volumes), ..*options };
    let mut reports: Vec<(VolumeName, Report)> = Vec::new();
    let mut next = Some(top.clone());
    while let Some(name) = next.take() {
        let known = reports.iter().any(|(seen, _)| *seen == name);
        if known || name.is_raw() || reports.len() >= crate::limits::CHAIN_NODES_MAX {
            break;
        }
        let volume =
            volumes.open(&name, crate::storage::Access::Read).map_err(|e| crate::Error::from(e).of(&name))?;
        let report = check(volume.as_ref(), &options).map_err(|e| e.of(&name))?;
        let meta = Meta::read_poisoned(volume.as_ref()).ok();
        next = meta.and_then(|meta| parent::find(volumes, &meta).ok());
        reports.push((name, report));
    }
    Ok(reports)
}

fn unreadable(report: &mut Report, error: &crate::Error) {
    report.add(Problem::Unreadable { reason: error.to_string() });
}

/// Two blocks that share sectors, if any do: in n log n.
#[must_use]
pub fn overlap(bat: &[u32], layout: &Layout) -> Option<(u32, u32)> {
    let sectors = u64::from(layout.bitmap_sectors() + layout.block_sectors);
    let mut places: Vec<(u32, u32)> = (0_u32..)
        .zip(bat)
        .filter(|(_, entry)| **entry != BAT_FREE)
        .map(|(block, entry)| (*entry, block))
        .collect();
    places.sort_unstable();
    places.windows(2).find_map(|pair| match pair {
        [(low, block), (high, other)] if u64::from(*low) + sectors > u64::from(*high) => {
            Some((*block, *other))
        }
        _ => None,
    })
}

/// Whether a byte range lies inside a file.
fn inside(offset: u64, len_bytes: u64, file_len: u64) -> bool {
    offset.checked_add(len_bytes).is_some_and(|end| end <= file_len)
}

fn all_zero(bytes: &[u8]) -> bool {
    bytes.iter().all(|byte| *byte == 0)
}

/// The sector at a place; `None` where there is none.
fn sector(volume: &dyn Volume, offset: u64, file_len: u64) -> Result<Option<[u8; 512]>> {
    let mut bytes = [0; 512];
    if !inside(offset, SECTOR_BYTES, file_len) {
        return Ok(None);
    }
    volume.read_at(&mut bytes, offset)?;
    Ok(Some(bytes))
}
