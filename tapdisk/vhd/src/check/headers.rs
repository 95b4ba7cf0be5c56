//! The dynamic header, the BATmap's header and the locators.

use super::{Options, Part, Report, all_zero, inside, sector};
use crate::batmap::{self, BatmapState};
use crate::error::Result;
use crate::footer::{CREATOR_TAP, DiskType};
use crate::header::DynHeader;
use crate::locator::{Code, LocatorEntry, volume_of};
use crate::meta::Meta;
use crate::storage::Volume;

/// The first creator version that writes a BATmap in every image.
const BATMAP_SINCE: u32 = 0x0001_0002;

pub(super) fn check(
    volume: &dyn Volume,
    meta: &Meta,
    header: &DynHeader,
    options: &Options<'_>,
    report: &mut Report,
) -> Result<()> {
    let mut bytes = [0; 1024];
    volume.read_at(&mut bytes, meta.footer.data_offset)?;
    let mut rule = |holds: bool, reason| {
        if !holds {
            report.invalid(Part::Header, reason);
        }
    };
    rule(bytes[8..16] == [0xFF; 8], "invalid data offset");
    rule(bytes[24..28] == [0, 1, 0, 0], "unsupported version");
    rule(all_zero(&bytes[60..64]) && all_zero(&bytes[768..]), "reserved bits not zero");
    if meta.disk_type() == DiskType::Differencing {
        if let Some(now) = options.now_s {
            rule(header.parent_timestamp <= now.saturating_add(1800), "parent's time in the future");
        }
        rule(!header.parent_name.is_empty(), "no parent name");
    } else {
        rule(header.parent_uuid.is_nil(), "a parent uuid, but the image has no parent");
        rule(header.parent_name.is_empty(), "a parent name, but the image has no parent");
        rule(
            header.locators.iter().all(|l| *l == LocatorEntry::NONE),
            "a locator, but the image has no parent",
        );
    }
    locators(volume, meta, header, report);
    if meta.footer.creator == CREATOR_TAP && meta.footer.creator_version >= BATMAP_SINCE {
        match batmap::state(volume, meta) {
            BatmapState::Sound => {}
            BatmapState::Missing => report.invalid(Part::Batmap, "no valid header behind the BAT"),
            BatmapState::Torn => report.invalid(Part::Batmap, "invalid checksum"),
        }
    }
    batmap_reserve(volume, meta, report)
}

/// Behind marker and key hash the BATmap's header is zero.
fn batmap_reserve(volume: &dyn Volume, meta: &Meta, report: &mut Report) -> Result<()> {
    let Some(at) = meta.layout.as_ref().and_then(|layout| layout.batmap_header) else {
        return Ok(());
    };
    if let Some(bytes) = sector(volume, at, meta.file_len)?
        && !all_zero(&bytes[94..])
    {
        report.invalid(Part::Batmap, "reserved bits not zero");
    }
    Ok(())
}

fn locators(volume: &dyn Volume, meta: &Meta, header: &DynHeader, report: &mut Report) {
    if meta.disk_type() != DiskType::Differencing {
        return;
    }
    let mut seen: Vec<Code> = Vec::new();
    for (slot, locator) in (0_u8..).zip(&header.locators) {
        let part = Part::Locator(slot);
        if locator.code == Code::Other(0) {
            if *locator != LocatorEntry::NONE {
                report.invalid(part, "no code, but not empty");
            }
            continue;
        }
        if seen.contains(&locator.code) {
            report.invalid(part, "its code is used twice");
        }
        seen.push(locator.code);
        if matches!(locator.code, Code::Other(code) if ![0x5769_3272, 0x5769_326B, 0x4D61_6320].contains(&code))
        {
            report.invalid(part, "unknown code");
        } else if locator.offset == 0 || locator.len == 0 || locator.space_bytes() == 0 {
            report.invalid(part, "empty");
        } else if !inside(locator.offset, locator.space_bytes(), meta.file_len) {
            report.invalid(part, "it lies outside the file");
        } else {
            text(volume, locator, part, header, report);
        }
    }
    if seen.is_empty() {
        report.invalid(Part::Header, "no parent locator");
    }
}

/// Each path ends in the header's name. A path that leaves the folder is
/// refused by whoever follows it, but it is not malformed.
fn text(volume: &dyn Volume, locator: &LocatorEntry, part: Part, header: &DynHeader, report: &mut Report) {
    match locator.read(volume) {
        Ok(None) => {}
        Ok(Some(path)) => {
            let base = path.rsplit('/').next().unwrap_or(&path);
            let name = volume_of(&path).map_or_else(|_| base.to_owned(), |name| name.to_string());
            if name != header.parent_name {
                report.invalid(part, "its path does not end in the header's parent name");
            }
        }
        Err(crate::Error::BadLocator { reason }) => report.invalid(part, reason),
        Err(_) => report.invalid(part, "it cannot be read"),
    }
}
