//! Where the bytes of a VDI lie, whoever has it open.
//!
//! What nobody writes is read from its images, under a lease. Of a VDI that
//! is attached for writing the tables on disk are behind, and its leaf is
//! nobody else's to read (invariant 8): its tapdisk is asked, and answers for
//! the moment it is asked at. Guests write on between two questions.

use std::fmt;

use tapdisk_control::{Extent, Refusal, Reply, Request};
use uuid::Uuid;
use vhd::placed::{At, Placed, image_id, push};
use vhd::storage::VolumeName;
use vhd::units::BlockNo;

use crate::chain;
use crate::error::{Error, IoContext, Result};
use crate::host::Tap;
use crate::image;
use crate::ops;
use crate::reading::Reading;
use crate::repo::Repo;

/// A disk that can be asked where its bytes lie.
#[derive(Debug)]
pub struct Disk(Kind);

enum Kind {
    Read(Reading),
    Live { vdi: Uuid, tap: Box<dyn Tap>, virtual_bytes: u64 },
}

impl fmt::Debug for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Read(reading) => reading.fmt(f),
            Self::Live { vdi, .. } => f.debug_struct("Live").field("vdi", vdi).finish_non_exhaustive(),
        }
    }
}

/// An image of a chain: its id as [`image_id`] tells it, and its volume.
pub type Known = (Uuid, VolumeName);

impl Disk {
    /// Opens a VDI or a hidden node.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::Busy`] while an operation or a merge
    /// works on it, [`Error::NotRunning`], what breaks its chain.
    pub fn open(repo: &Repo, vdi: Uuid) -> Result<Self> {
        let served = {
            let locked = ops::lock(repo, &[vdi])?;
            locked.lease(vdi).is_some_and(|lease| !lease.read_only)
        };
        if !served {
            return Ok(Self(Kind::Read(Reading::open(repo, vdi, true)?)));
        }
        let detached = || Error::Busy { reason: format!("VDI {vdi} is just being detached") };
        let mut tap = repo.host.tap(vdi).map_err(|e| lost(vdi, &e))?.ok_or_else(detached)?;
        match tap.call(Request::Stats).map_err(|e| lost(vdi, &e))? {
            Reply::Stats(stats) => Ok(Self(Kind::Live { vdi, tap, virtual_bytes: stats.virtual_bytes })),
            other => Err(unexpected(vdi, &other)),
        }
    }

    /// The chain, if it is read from its images.
    #[must_use]
    pub fn chain(&self) -> Option<&vhd::chain::Chain> {
        match &self.0 {
            Kind::Read(reading) => Some(&reading.chain),
            Kind::Live { .. } => None,
        }
    }

    /// Its size in bytes.
    #[must_use]
    pub fn virtual_bytes(&self) -> u64 {
        match &self.0 {
            Kind::Read(reading) => reading.chain.virtual_bytes(),
            Kind::Live { virtual_bytes, .. } => *virtual_bytes,
        }
    }

    /// Where the range from `offset` to `end` lies, or the first part of it;
    /// nothing only from the disk's end on. `offset` is a multiple of 512.
    ///
    /// # Errors
    /// A bitmap could not be read, or the tapdisk gives no answer.
    pub fn placed(&mut self, offset: u64, end: u64) -> Result<Vec<Placed>> {
        let end = end.min(self.virtual_bytes());
        if offset >= end {
            return Ok(Vec::new());
        }
        match &mut self.0 {
            Kind::Read(reading) => {
                let block = BlockNo::of_byte(offset);
                let bad = |error| match reading.chain.nodes().next() {
                    Some(top) => image::bad(&top.name, error),
                    None => Error::NotFound { what: "chain".into() },
                };
                Ok(clipped(&reading.chain.placed(block).map_err(bad)?, offset, end))
            }
            Kind::Live { vdi, tap, .. } => {
                let length = (end - offset).next_multiple_of(512);
                match tap.call(Request::Extents { offset, length }) {
                    Ok(Reply::Extents { extents }) => Ok(clipped(&placed(offset, &extents), offset, end)),
                    Ok(other) => Err(unexpected(*vdi, &other)),
                    Err(tapdisk_control::ClientError::Refused(Refusal::Busy { detail })) => {
                        Err(Error::Busy { reason: detail })
                    }
                    Err(error) => Err(lost(*vdi, &error)),
                }
            }
        }
    }

    /// The images of its chain as they are now, topmost first.
    ///
    /// # Errors
    /// What breaks its chain.
    pub fn images(&self, repo: &Repo) -> Result<Vec<Known>> {
        match &self.0 {
            Kind::Read(reading) => {
                Ok(reading.chain.nodes().map(|node| (image_id(node), node.name.clone())).collect())
            }
            Kind::Live { vdi, .. } => {
                let _sr = repo.host.lock_sr().during(|| format!("lock of SR {}", repo.name))?;
                let id = |link: &chain::Link| match link.head.footer {
                    footer if footer.is_nil() => link.volume.uuid().unwrap_or_default(),
                    footer => footer,
                };
                Ok(chain::read(repo, *vdi)?.into_iter().map(|link| (id(&link), link.volume)).collect())
            }
        }
    }
}

/// Blocks that the leaf of an attached VDI has, memory included.
///
/// # Errors
/// The tapdisk gives no answer.
pub fn leaf_blocks(vdi: Uuid, tap: &mut dyn Tap) -> Result<Vec<u32>> {
    let mut blocks = Vec::new();
    let mut from = Some(0);
    while let Some(at) = from {
        match tap.call(Request::LeafBlocks { from: at }).map_err(|e| lost(vdi, &e))? {
            Reply::Blocks { runs, next } => {
                blocks.extend(runs.into_iter().flat_map(|(first, count)| first..first.saturating_add(count)));
                // It only ever goes forward, so this ends.
                from = next.filter(|next| *next > at);
            }
            other => return Err(unexpected(vdi, &other)),
        }
    }
    Ok(blocks)
}

fn placed(offset: u64, extents: &[Extent]) -> Vec<Placed> {
    let mut list = Vec::new();
    let mut at = offset;
    for extent in extents {
        let place = extent.at.map(|(image, offset)| At { image, offset });
        push(&mut list, Placed { offset: at, len: extent.length, at: place });
        at = at.saturating_add(extent.length);
    }
    list
}

fn clipped(list: &[Placed], from: u64, end: u64) -> Vec<Placed> {
    list.iter().filter_map(|run| run.within(from, end)).collect()
}

fn lost(vdi: Uuid, error: &dyn fmt::Display) -> Error {
    Error::NotRunning { what: format!("the tapdisk of VDI {vdi}"), reason: error.to_string() }
}

fn unexpected(vdi: Uuid, reply: &Reply) -> Error {
    lost(vdi, &format!("an answer to another question: {reply:?}"))
}
