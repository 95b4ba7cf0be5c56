//! Both footers, byte by byte.

use super::{Options, Part, Problem, Report, all_zero, sector};
use crate::error::{Error, Result};
use crate::footer::{CREATOR_TAP, CREATOR_VERSION, DiskType, Footer, Geometry};
use crate::storage::Volume;
use crate::units::SECTOR_BYTES;

/// Seconds a creation time may lie in the future: clocks of hosts differ.
const CLOCK_SKEW_S: u32 = 1800;

pub(super) fn check(volume: &dyn Volume, options: &Options<'_>, report: &mut Report) -> Result<()> {
    let len = volume.len()?;
    let end = end_bytes(volume, len)?;
    let end_footer = end.as_ref().map(Footer::parse);
    if matches!(&end_footer, Some(Ok(footer)) if footer.disk_type == DiskType::Fixed) {
        if let (Some(bytes), Some(Ok(footer))) = (&end, &end_footer) {
            footer_rules(bytes, footer, Part::EndFooter, options, report);
        }
        return Ok(());
    }
    match (&end, &end_footer) {
        (Some(bytes), Some(Ok(footer))) => footer_rules(bytes, footer, Part::EndFooter, options, report),
        _ if options.allow_bad_end => {}
        (_, Some(Err(error))) => report.invalid(Part::EndFooter, why(error, end.as_ref())),
        _ => report.invalid(Part::EndFooter, "the file is shorter than a footer"),
    }
    let front = sector(volume, 0, len)?;
    match (&front, front.as_ref().map(Footer::parse)) {
        (Some(bytes), Some(Ok(footer))) => {
            if !matches!(end_footer, Some(Ok(_))) {
                footer_rules(bytes, &footer, Part::FrontFooter, options, report);
            } else if end.as_ref() != Some(bytes) {
                report.add(Problem::FootersDiffer);
            }
        }
        (bytes, Some(Err(error))) => report.invalid(Part::FrontFooter, why(&error, bytes.as_ref())),
        _ => report.invalid(Part::FrontFooter, "the file is shorter than a footer"),
    }
    Ok(())
}

/// The footer sector at the end; of an early Microsoft image, 511 bytes and a
/// zero.
fn end_bytes(volume: &dyn Volume, len: u64) -> Result<Option<[u8; 512]>> {
    let Some(at) = len.checked_sub(SECTOR_BYTES) else {
        return Ok(None);
    };
    let whole = sector(volume, at, len)?;
    if len % SECTOR_BYTES == 511 && whole.as_ref().is_some_and(|bytes| Footer::parse(bytes).is_err()) {
        let mut bytes = [0; 512];
        volume.read_at(&mut bytes[..511], at + 1)?;
        return Ok(Some(bytes));
    }
    Ok(whole)
}

fn why(error: &Error, bytes: Option<&[u8; 512]>) -> &'static str {
    let cookie = bytes.is_some_and(|bytes| bytes[..8] == crate::footer::COOKIE);
    match error {
        Error::BadFooter { reason } => reason,
        Error::NotVhd if cookie => "invalid checksum",
        Error::TooLarge { .. } => "the virtual size is more than 2040 GiB",
        _ => "invalid cookie",
    }
}

fn footer_rules(bytes: &[u8; 512], footer: &Footer, part: Part, options: &Options<'_>, report: &mut Report) {
    let mut rule = |holds: bool, reason| {
        if !holds {
            report.invalid(part, reason);
        }
    };
    rule(!footer.poisoned, "invalid cookie");
    rule(footer.features & 2 != 0 && footer.features & !3 == 0, "invalid features");
    rule(bytes[12..16] == [0, 1, 0, 0], "unsupported format version");
    if footer.disk_type == DiskType::Fixed {
        rule(footer.data_offset == u64::MAX, "invalid data offset");
    }
    if let Some(now) = options.now_s {
        rule(footer.timestamp <= now.saturating_add(CLOCK_SKEW_S), "creation time in the future");
    }
    if footer.creator == CREATOR_TAP {
        rule(footer.creator_version <= CREATOR_VERSION, "unsupported tap creator version");
    }
    let (have, want) = (footer.geometry, Geometry::of(footer.virtual_bytes));
    let total = |g: Geometry| u64::from(g.cylinders) * u64::from(g.heads) * u64::from(g.sectors);
    rule(total(have) <= total(want), "geometry too large");
    rule(bytes[84] <= 1, "invalid saved state");
    rule(bytes[85] <= 1, "invalid hidden flag");
    rule(all_zero(&bytes[86..]), "reserved bits not zero");
    rule(!footer.uuid.is_nil(), "no uuid");
}
