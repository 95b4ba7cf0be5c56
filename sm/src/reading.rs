//! Reading a whole chain from this process: for a copy, an export, a
//! comparison, a map.
//!
//! The lease is taken under the SR lock before the first BAT read and kept
//! for as long as the chain is read (invariant 8). While it lives nothing in
//! the chain is deleted, reused or merged away, and the VDI is not attached
//! for writing.

use std::fmt;

use uuid::Uuid;
use vhd::chain::Chain;

use crate::chain::{self, Link};
use crate::error::{Error, IoContext, Result};
use crate::host::Guard;
use crate::image;
use crate::lease::{Lease, Reader};
use crate::ops;
use crate::repo::Repo;

/// Times a chain is opened anew because its shape changed between taking the
/// lease and opening it.
const ATTEMPTS_MAX: u32 = 8;

/// A chain, open for reading under a lease.
pub struct Reading {
    /// The chain.
    pub chain: Chain,
    _lease: Guard,
}

impl fmt::Debug for Reading {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reading").field("chain", &self.chain).finish_non_exhaustive()
    }
}

impl Reading {
    /// Opens the chain of a node that nobody writes: a VDI, or with `hidden`
    /// a base copy too.
    ///
    /// # Errors
    /// [`Error::InUse`] while the VDI is attached for writing,
    /// [`Error::Busy`] while an operation or a merge works on it,
    /// [`Error::NotFound`], what breaks its chain.
    pub fn open(repo: &Repo, vdi: Uuid, hidden: bool) -> Result<Self> {
        Self::open_as(repo, vdi, hidden, Reader::Copy)
    }

    /// The same for a VDI and a purpose that can wait: the caller looks now and
    /// then whether [`crate::host::Host::is_asked_to_leave`], and leaves then.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_yielding(repo: &Repo, vdi: Uuid) -> Result<Self> {
        Self::open_as(repo, vdi, false, Reader::Yielding)
    }

    fn open_as(repo: &Repo, vdi: Uuid, hidden: bool, reader: Reader) -> Result<Self> {
        for _ in 0..ATTEMPTS_MAX {
            let (links, lease) = lease(repo, vdi, hidden, reader)?;
            let chain = Chain::open(repo.volumes.as_ref(), &links[0].volume)
                .map_err(|error| image::bad(&links[0].volume, error))?;
            // Names may have moved on since the lock was dropped; what was
            // opened must be what the lease names.
            let footers = links.iter().map(|link| link.head.footer);
            if chain.nodes().map(|node| node.uuid).eq(footers) {
                return Ok(Self { chain, _lease: lease });
            }
        }
        Err(Error::Busy { reason: format!("the chain of VDI {vdi} changes while it is opened") })
    }
}

fn lease(repo: &Repo, vdi: Uuid, hidden: bool, reader: Reader) -> Result<(Vec<Link>, Guard)> {
    let locked = ops::lock(repo, &[vdi])?;
    let mut links = if hidden { chain::read(repo, vdi)? } else { ops::visible_chain(repo, vdi)? };
    let top = &links[0];
    if let Some(lease) = locked.lease(vdi).filter(|lease| !lease.read_only) {
        let reason = format!(
            "it is attached for writing, process {}; take a snapshot and use that, or detach it",
            lease.pid
        );
        return Err(Error::InUse { what: format!("VDI {vdi}"), reason });
    }
    locked.no_operation_on(top)?;
    locked.no_revival(repo, vdi)?;
    // What a merge fills, or empties, is not to be read as a node of its own.
    let claimed = locked.intents.iter().find(|stored| stored.intent.names(&top.volume, top.head.footer));
    let relinking = ops::relink(repo, &links, &locked.intents)?;
    if let Some(stored) = claimed.filter(|_| top.head.hidden || locked.leaf_merge(top).is_some()) {
        return Err(Error::Busy { reason: format!("job {} works on {}", stored.name.id, top.volume) });
    }
    if relinking {
        links = chain::read(repo, vdi)?;
    }
    let top = &links[0];
    if !top.volume.is_raw() && locked.lease(vdi).is_none() {
        image::settle(repo, &top.volume)?;
    }
    let chain = links.iter().map(Link::image_ref).collect();
    let pid = std::process::id();
    let lease = Lease { vdi, sr: repo.uuid, pid, read_only: true, reader, chain };
    let held = repo.host.make_reader(&lease).during(|| format!("lease on VDI {vdi}"))?;
    Ok((links, held))
}
