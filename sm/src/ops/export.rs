//! A VDI as a stream: raw, one flattened VHD, or a VHD over any other node of
//! its SR.
//!
//! The lease on both chains is taken before their first BAT read and kept to
//! the last byte (invariant 8): no merge and no delete disturbs an export,
//! however slowly it is read, and neither VDI is attached for writing
//! meanwhile. An attached VDI is refused: its tapdisk alone may read it, and
//! a stream that takes minutes would be no instant of it.

use uuid::Uuid;
use vhd::create::ParentLink;
use vhd::stream::export::{Export, Identity};
use vhd::stream::{Sink, extents};

use crate::error::{Error, Result};
use crate::identity;
use crate::image;
use crate::progress::Progress;
use crate::reading::Reading;
use crate::repo::Repo;

/// What an export or an import looks like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// Every byte of the disk.
    Raw,
    /// A raw disk without its holes: see [`vhd::stream::extents`].
    Extents,
    /// A VHD.
    Vhd,
}

/// Writes a VDI to `sink`. `begun` is called once the leases stand and it is
/// known how many bytes of progress there will be.
///
/// # Errors
/// [`Error::InUse`] while it is attached for writing, [`Error::Unsupported`]
/// for a raw delta, [`Error::Cancelled`], what breaks a chain, what the sink
/// said.
pub fn export(
    repo: &Repo,
    vdi: Uuid,
    base: Option<Uuid>,
    format: Format,
    progress: &Progress,
    begun: impl FnOnce(u64),
    sink: Sink<'_>,
) -> Result<()> {
    if base == Some(vdi) {
        return Err(Error::BadRequest { reason: "a delta of a disk over itself".into() });
    }
    if base.is_some() && format != Format::Vhd {
        return Err(Error::Unsupported { what: "a raw stream over a base: it holds the whole disk".into() });
    }
    let disk = Reading::open(repo, vdi, true)?;
    let base = match base {
        Some(base) => Some((base, Reading::open(repo, base, true)?)),
        None => None,
    };
    let mut sink = |bytes: &[u8]| {
        progress.go_on().map_err(std::io::Error::other)?;
        sink(bytes)
    };
    let outcome = match format {
        Format::Vhd => vhd(repo, vdi, &disk, base.as_ref(), progress, begun, &mut sink)?,
        Format::Raw | Format::Extents => {
            let virtual_bytes = disk.chain.virtual_bytes();
            progress.expect(virtual_bytes);
            begun(virtual_bytes);
            let mut passed = |at: u64| progress.add(at.saturating_sub(progress.done_bytes()));
            let write = if format == Format::Raw { extents::write_plain } else { extents::write };
            write(&disk.chain, &mut sink, &mut passed)
        }
    };
    // The sink only carries I/O errors: what it was stopped by is told here.
    progress.go_on()?;
    outcome.map_err(|error| of(&disk, error))
}

fn vhd(
    repo: &Repo,
    vdi: Uuid,
    disk: &Reading,
    base: Option<&(Uuid, Reading)>,
    progress: &Progress,
    begun: impl FnOnce(u64),
    sink: Sink<'_>,
) -> Result<vhd::Result<()>> {
    let timestamp_s = image::vhd_time(repo);
    let parent = base
        .map(|(base, reading)| {
            let uuid = match hidden(reading) {
                true => reading.chain.nodes().next().map_or(Uuid::nil(), |top| top.uuid),
                false => identity::of_or_new(repo, *base)?,
            };
            let volume = vhd::storage::VolumeName::vhd(*base);
            Ok::<_, Error>(ParentLink { uuid, volume, timestamp_s })
        })
        .transpose()?;
    // A hidden node's content may change by merges once we are gone: what is
    // exported of it is named by nothing else.
    let uuid = if hidden(disk) { repo.ids.uuid() } else { identity::of_or_new(repo, vdi)? };
    let identity = Identity { uuid, parent, timestamp_s };
    let export = Export::plan(&disk.chain, base.map(|(_, reading)| &reading.chain), &identity);
    let export = match export {
        Ok(export) => export,
        Err(error) => return Ok(Err(error)),
    };
    progress.expect(export.bytes());
    begun(export.bytes());
    Ok(export.write(&mut |bytes| {
        sink(bytes)?;
        progress.add(bytes.len() as u64);
        Ok(())
    }))
}

fn hidden(reading: &Reading) -> bool {
    reading.chain.nodes().next().is_some_and(|top| top.hidden)
}

fn of(reading: &Reading, error: vhd::Error) -> Error {
    match reading.chain.nodes().next() {
        Some(top) => image::bad(&top.name, error),
        None => Error::NotFound { what: "chain to export".into() },
    }
}
