//! A VDI out of a stream: raw, any VHD that stands alone, or a delta onto its
//! base.
//!
//! ```text
//!   lease on the base's chain                    it neither changes nor goes
//!   record, temporary volume                     see `making`
//!   the stream's blocks, each checked            nothing of it is visible
//!   the image's headers, flushed
//!   ONE step makes it visible:
//!     no base, or a hidden one    its name
//!     a visible base              a clone of the base, whose new image is this
//!                                 one instead of an empty one: see `snapshot`
//! ```
//!
//! A visible base is thereby divided like any disk that is cloned, unless it
//! holds nothing itself; whatever the tree looks like by then, the new image
//! hangs on a hidden node that holds the base's content. A delta of a smaller
//! disk than its base stands alone: see `import_whole`.
//!
//! Crash argument: that of `making` up to the last step. A clone's record is
//! written first, then the temporary takes the name that the clone would have
//! given it; from there on whichever of the two records recovery finds first,
//! the image is deleted or becomes visible by the clone's decision alone. The
//! making's record, left behind, finds its temporary gone or its VDI named.

use std::io::Read;

use uuid::Uuid;
use vhd::build::Builder;
use vhd::create::{NewImage, NewKind, ParentLink};
use vhd::storage::VolumeName;
use vhd::stream::extents::{self, Piece, is_zero};
use vhd::stream::import::{Block, Import, ParentId};
use vhd::units::{BLOCK_BYTES, BlockNo, VIRTUAL_BYTES_MAX};

use super::export::Format;
use super::import_whole::Whole;
use super::snapshot;
use crate::chain::{self, Link};
use crate::error::{Error, Result};
use crate::identity;
use crate::image;
use crate::making::{Making, NewVdi};
use crate::progress::Progress;
use crate::reading::Reading;
use crate::repo::Repo;

/// What is to come in.
#[derive(Debug, Clone)]
pub struct Wanted<'a> {
    /// Name of the new VDI.
    pub name: &'a str,
    /// What the stream is.
    pub format: Format,
    /// What a delta stands on.
    pub base: Option<Uuid>,
}

/// Reads a stream into a new VDI and returns it. `guarded` is called once a
/// lease and a record keep others from what is read and written.
///
/// # Errors
/// [`Error::BadStream`] with what is wrong with the stream,
/// [`Error::WrongBase`], [`Error::ChainTooLong`], [`Error::NoSpace`],
/// [`Error::Cancelled`]: nothing of it stays.
pub fn import(
    repo: &Repo,
    wanted: &Wanted<'_>,
    stream: &mut dyn Read,
    progress: &Progress,
    guarded: impl FnOnce(),
) -> Result<Uuid> {
    let mut watched = Watched { stream, progress };
    let outcome = match (wanted.format, wanted.base) {
        (Format::Vhd, base) => vhd(repo, wanted.name, base, &mut watched, guarded),
        (_, Some(_)) => {
            let what = "a raw stream over a base: it holds the whole disk".into();
            Err(Error::Unsupported { what })
        }
        (format, None) => raw(repo, wanted.name, format, &mut watched, guarded),
    };
    // A stream that was stopped looks like one that broke off. What became a
    // VDI did, whoever wants it stopped by now.
    outcome.map_err(|error| progress.go_on().err().unwrap_or(error))
}

fn new_vdi(name: &str) -> NewVdi<'_> {
    NewVdi { name, description: "", virtual_bytes: 0, operation: "import" }
}

const BLOCKS_MAX: u32 = (VIRTUAL_BYTES_MAX / BLOCK_BYTES) as u32;

fn raw(
    repo: &Repo,
    name: &str,
    format: Format,
    stream: &mut Watched<'_>,
    guarded: impl FnOnce(),
) -> Result<Uuid> {
    let (making, volume) = Making::begin_unmade(repo, &new_vdi(name))?;
    guarded();
    let mut blocks = Blocks { builder: Builder::new(volume, BLOCKS_MAX), block: Block::default() };
    let virtual_bytes = match format {
        Format::Extents => fill_extents(&mut blocks, stream),
        _ => fill_plain(&mut blocks, stream),
    }?;
    let builder = blocks.end()?;
    stream.progress.go_on()?;
    finish_alone(repo, making, builder, virtual_bytes)
}

fn fill_plain(blocks: &mut Blocks, stream: &mut Watched<'_>) -> Result<u64> {
    let mut buffer = vec![0; BLOCK_BYTES as usize];
    let mut at = 0;
    loop {
        let mut filled = 0;
        while let Some(rest) = buffer.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            match stream.read(rest).map_err(broken)? {
                0 => break,
                n => filled += n,
            }
        }
        blocks.write(at, buffer.get(..filled).unwrap_or_default())?;
        at += filled as u64;
        if filled < buffer.len() {
            return Ok(at);
        }
        if at > VIRTUAL_BYTES_MAX {
            return Err(too_large(at));
        }
    }
}

fn fill_extents(blocks: &mut Blocks, stream: &mut Watched<'_>) -> Result<u64> {
    let mut buffer = vec![0; extents::EXTENT_BYTES_MAX as usize];
    let mut at = 0;
    loop {
        match extents::next(stream, at).map_err(broken)? {
            Piece::Data { offset, len } => {
                let data = buffer.get_mut(..len as usize).unwrap_or_default();
                stream.read_exact(data).map_err(broken)?;
                blocks.write(offset, data)?;
                at = offset + u64::from(len);
            }
            Piece::End { virtual_bytes } => {
                let mut more = [0];
                if stream.read(&mut more).map_err(broken)? > 0 {
                    return Err(Error::BadStream { reason: "more follows its end".into() });
                }
                return Ok(virtual_bytes);
            }
        }
    }
}

fn vhd(
    repo: &Repo,
    name: &str,
    base: Option<Uuid>,
    stream: &mut Watched<'_>,
    guarded: impl FnOnce(),
) -> Result<Uuid> {
    let progress = stream.progress;
    let mut import = Import::open(stream).map_err(bad)?;
    if let Some(virtual_bytes) = import.head().virtual_bytes {
        vhd::create::checked_size(virtual_bytes).map_err(bad)?;
    }
    let parent = import.head().parent.clone();
    let base = base_for(repo, base, parent.as_ref())?;
    let (making, volume) = Making::begin_unmade(repo, &new_vdi(name))?;
    guarded();
    let mut builder = Builder::new(volume, BLOCKS_MAX);
    let mut block = Block::default();
    let size = import.head().virtual_bytes;
    let mut whole = base.as_ref().zip(size).and_then(|(base, size)| Whole::over(&base.reading.chain, size));
    while import.next_block(&mut block).map_err(bad)? {
        progress.go_on()?;
        if let Some(whole) = &mut whole {
            whole.fill(&mut block).map_err(bad)?;
        }
        // Without a base what is zero need not be there; over one it must.
        let needless = match base {
            Some(_) if whole.is_none() => block.bitmap.is_empty(),
            _ => is_zero(&block.data),
        };
        if !needless {
            builder.put(block.number, &block.bitmap, &block.data).map_err(|e| writing(&making, e))?;
        }
    }
    for number in whole.as_ref().map(Whole::rest).unwrap_or_default() {
        progress.go_on()?;
        whole.as_ref().map_or(Ok(()), |whole| whole.read(number, &mut block)).map_err(bad)?;
        if !is_zero(&block.data) {
            builder.put(number, &block.bitmap, &block.data).map_err(|e| writing(&making, e))?;
        }
    }
    let head = import.head().clone();
    let virtual_bytes = head.virtual_bytes.unwrap_or(0);
    progress.go_on()?;
    let vdi = match &base {
        Some(base) if whole.is_none() => finish_over(repo, making, builder, virtual_bytes, base)?,
        _ => finish_alone(repo, making, builder, virtual_bytes)?,
    };
    if let Some(id) = head.uuid.filter(|id| !id.is_nil()) {
        repo.labels.set_content_id(vdi, Some(id))?;
    }
    Ok(vdi)
}

/// A base that holds what a delta stands on, under a lease.
struct Base {
    vdi: Uuid,
    reading: Reading,
}

impl Base {
    fn hidden(&self) -> bool {
        self.reading.chain.nodes().next().is_some_and(|top| top.hidden)
    }
}

fn base_for(repo: &Repo, base: Option<Uuid>, parent: Option<&ParentId>) -> Result<Option<Base>> {
    let (vdi, parent) = match (base, parent) {
        (None, None) => return Ok(None),
        (Some(vdi), Some(parent)) => (vdi, parent),
        (None, Some(parent)) => {
            let reason = format!(
                "it is a delta over {} ({:?}): name the VDI that holds that as its base",
                parent.uuid, parent.name
            );
            return Err(Error::WrongBase { reason });
        }
        (Some(_), None) => {
            let reason =
                "the stream holds a whole disk and stands on nothing: import it without a base".into();
            return Err(Error::WrongBase { reason });
        }
    };
    let reading = Reading::open(repo, vdi, true)?;
    let base = Base { vdi, reading };
    if base.reading.chain.nodes().next().is_some_and(|top| top.name.is_raw()) {
        return Err(Error::Unsupported { what: format!("a delta onto raw VDI {vdi}") });
    }
    let own = base.reading.chain.nodes().next().map(|top| top.uuid);
    let id = if base.hidden() { None } else { identity::of(repo, vdi)? };
    let names = |id: Option<Uuid>| id == Some(parent.uuid) && !parent.uuid.is_nil();
    let fits = names(id) || (base.hidden() && names(own));
    if !fits {
        let known = id.or(own.filter(|_| base.hidden()));
        let holds = known.map_or_else(
            || "a content that was never exported, or has changed since".to_owned(),
            |id| format!("content {id}"),
        );
        let reason = format!("the stream is a delta over content {}; VDI {vdi} holds {holds}", parent.uuid);
        return Err(Error::WrongBase { reason });
    }
    let depth = u32::try_from(base.reading.chain.nodes().count()).unwrap_or(u32::MAX);
    if depth >= repo.limits.chain_max {
        return Err(Error::ChainTooLong { vdi, depth, depth_max: repo.limits.chain_max });
    }
    Ok(Some(base))
}

fn finish_alone(repo: &Repo, making: Making<'_>, builder: Builder, virtual_bytes: u64) -> Result<Uuid> {
    build(repo, &making, builder, virtual_bytes, None)?;
    making.finish()
}

fn finish_over(
    repo: &Repo,
    making: Making<'_>,
    builder: Builder,
    virtual_bytes: u64,
    base: &Base,
) -> Result<Uuid> {
    let node = top_of(repo, base)?;
    let parent = Some((&node.volume, node.head.footer));
    build(repo, &making, builder, virtual_bytes, parent)?;
    if !base.hidden() {
        snapshot::adopt(repo, base.vdi, &making.filled()?)?;
        return making.finish_named();
    }
    making.finish_with(|volume| {
        // It cannot have gone away, but its name may have changed.
        let now = top_of(repo, base)?;
        match now.volume == node.volume {
            true => Ok(()),
            false => image::set_parent(repo, volume, &now.volume, now.head.footer),
        }
    })
}

/// The base's own image, as it is called now. The lease keeps it.
fn top_of(repo: &Repo, base: &Base) -> Result<Link> {
    Ok(chain::read(repo, base.vdi)?.swap_remove(0))
}

fn build(
    repo: &Repo,
    making: &Making<'_>,
    builder: Builder,
    virtual_bytes: u64,
    parent: Option<(&VolumeName, Uuid)>,
) -> Result<()> {
    let timestamp_s = image::vhd_time(repo);
    let kind = match parent {
        None => NewKind::Dynamic,
        Some((volume, uuid)) => {
            NewKind::Child { parent: ParentLink { uuid, volume: volume.clone(), timestamp_s } }
        }
    };
    let new = NewImage {
        uuid: making.footer(),
        virtual_bytes,
        kind,
        bat_entries_max: None,
        hidden: false,
        timestamp_s,
    };
    builder.finish(&new).map(drop).map_err(|error| match error {
        error @ vhd::Error::BadSize { .. } => bad(error),
        error => writing(making, error),
    })
}

/// Bytes of a raw disk on their way into blocks, in rising order.
struct Blocks {
    builder: Builder,
    /// The block being filled; its bitmap is full once anything is in it.
    block: Block,
}

impl Blocks {
    fn write(&mut self, mut at: u64, mut data: &[u8]) -> Result<()> {
        if at + data.len() as u64 > VIRTUAL_BYTES_MAX {
            return Err(too_large(at + data.len() as u64));
        }
        while !data.is_empty() {
            let number = BlockNo::of_byte(at);
            if number != self.block.number {
                self.put()?;
                self.block.number = number;
            }
            let first = (at - number.first_byte()) as usize;
            let space = self.block.data.get_mut(first..).unwrap_or_default();
            let (part, rest) = data.split_at(space.len().min(data.len()));
            space.get_mut(..part.len()).unwrap_or_default().copy_from_slice(part);
            at += part.len() as u64;
            data = rest;
        }
        Ok(())
    }

    fn put(&mut self) -> Result<()> {
        if !is_zero(&self.block.data) {
            let full = vhd::bitmap::SectorBitmap::FULL;
            self.builder
                .put(self.block.number, &full, &self.block.data)
                .map_err(|error| image::bad(&VolumeName::vhd(Uuid::nil()), error))?;
            self.block.data.fill(0);
        }
        Ok(())
    }

    fn end(mut self) -> Result<Builder> {
        self.put()?;
        Ok(self.builder)
    }
}

/// A stream that stops when somebody says so, and counts.
struct Watched<'a> {
    stream: &'a mut dyn Read,
    progress: &'a Progress,
}

impl Read for Watched<'_> {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        self.progress.go_on().map_err(std::io::Error::other)?;
        let got = self.stream.read(buf)?;
        self.progress.add(got as u64);
        Ok(got)
    }
}

fn broken(error: std::io::Error) -> Error {
    bad(error.into())
}

fn too_large(bytes: u64) -> Error {
    bad(vhd::Error::TooLarge { what: "a virtual disk", bytes })
}

/// An error in what the stream says.
fn bad(error: vhd::Error) -> Error {
    match error {
        vhd::Error::BadSize { reason } => Error::BadSize { reason: format!("of the stream: {reason}") },
        vhd::Error::Unsupported { what } => Error::Unsupported { what: format!("a stream with {what}") },
        error => Error::BadStream { reason: error.to_string() },
    }
}

/// An error in what is written.
fn writing(making: &Making<'_>, error: vhd::Error) -> Error {
    match error {
        error @ vhd::Error::BadBat { .. } => bad(error),
        error => match making.volume() {
            Ok(volume) => image::bad(&volume, error),
            Err(worse) => worse,
        },
    }
}
