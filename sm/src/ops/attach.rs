//! Attaching a VDI: one tapdisk serves it from here on.

use tapdisk_control::{ClientError, Refusal, Request};
use uuid::Uuid;
use vhd::chain::Chain;

use crate::catalog::Event;
use crate::chain::{self, Link};
use crate::error::{Error, IoContext, Result};
use crate::host::{Endpoint, LeaseHold};
use crate::image;
use crate::journal::{Intent, JobState, volume_of};
use crate::lease::{Lease, Reader};
use crate::repo::Repo;

/// Where an attached VDI is served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attached {
    /// Its sockets and process.
    pub endpoint: Endpoint,
    /// Whether this call attached it; false if it was attached already.
    pub fresh: bool,
}

/// Attaches a VDI, or finds it attached the same way already.
///
/// ```text
///   under the SR lock:
///   1. recover this tree                      the name leads to the right image
///   2. write a recorded new parent, if a merge is relinking this chain
///   3. settle the leaf, if nobody will do so by opening it for writing
///   4. lease, locked by us, naming the chain  crash: unlocked, so dead, reaped
///   after it:
///   5. tapdisk, inheriting the lease's lock   crash of ours: it serves on
/// ```
/// Nothing but the lease is written, so there is no intent.
///
/// # Errors
/// [`Error::ReadOnly`] for a snapshot attached for writing, [`Error::InUse`]
/// when attached the other way, [`Error::Busy`] while an operation is under
/// way, what breaks its chain, [`Error::NotRunning`] with the tapdisk's words.
pub fn attach(repo: &Repo, vdi: Uuid, read_only: bool) -> Result<Attached> {
    let snapshot = repo.labels.get(vdi)?.is_some_and(|label| label.read_only);
    if snapshot && !read_only {
        return Err(Error::ReadOnly { what: format!("snapshot {vdi}") });
    }
    let hold = match lease(repo, vdi, read_only)? {
        Leased::Already(endpoint) => {
            return Ok(Attached { endpoint, fresh: false });
        }
        Leased::Fresh(hold) => hold,
    };
    let endpoint = hold.start_tap().map_err(|error| not_started(repo, vdi, &error))?;
    let detail = if read_only { "read-only" } else { "read-write" }.to_owned();
    repo.labels.note(&Event { at_s: repo.ids.now_s(), operation: "attach", vdi, detail })?;
    Ok(Attached { endpoint, fresh: true })
}

/// Why no tapdisk came up. Mostly an image is broken in a way that headers do
/// not show: then that is the answer, with the image and the reason. Nothing
/// is decided by this look, so it needs no lease.
fn not_started(repo: &Repo, vdi: Uuid, error: &std::io::Error) -> Error {
    let broken = chain::leaf_volume(repo, vdi)
        .and_then(|leaf| Chain::open(repo.volumes.as_ref(), &leaf).map_err(|error| image::bad(&leaf, error)));
    match broken {
        Err(broken @ Error::BadImage { .. }) => broken,
        _ => Error::NotRunning { what: format!("the tapdisk of VDI {vdi}"), reason: error.to_string() },
    }
}

enum Leased {
    Already(Endpoint),
    Fresh(Box<dyn LeaseHold>),
}

fn lease(repo: &Repo, vdi: Uuid, read_only: bool) -> Result<Leased> {
    let locked = super::lock(repo, &[vdi])?;
    if let Some(lease) = locked.lease(vdi) {
        if lease.pid == 0 {
            return Err(Error::Busy { reason: format!("VDI {vdi} is being attached") });
        }
        if lease.read_only != read_only {
            let how = if lease.read_only { "reading only" } else { "writing" };
            let reason = format!("it is attached for {how}");
            return Err(Error::InUse { what: format!("VDI {vdi}"), reason });
        }
        return Ok(Leased::Already(repo.host.endpoint(lease)));
    }
    let mut links = super::visible_chain(repo, vdi)?;
    locked.no_snapshot_of(&links[0])?;
    if !read_only {
        locked.nobody_copies(vdi, &links[0])?;
    }
    // One that nobody alive works on was ended by the recovery above.
    if locked.leaf_merge(&links[0]).is_some() {
        return Err(Error::Busy { reason: format!("the collector merges VDI {vdi}") });
    }
    if relink(repo, &links, &locked.intents)? {
        links = super::visible_chain(repo, vdi)?;
    }
    // A tapdisk that opens it for writing settles it itself.
    let left = read_only && !links[0].volume.is_raw();
    if left {
        image::settle(repo, &links[0].volume)?;
    }
    let chain = links.iter().map(Link::image_ref).collect();
    let lease = Lease { vdi, sr: repo.uuid, pid: 0, read_only, reader: Reader::Tapdisk, chain };
    let hold = repo.host.make_lease(&lease).during(|| format!("lease of VDI {vdi}"))?;
    Ok(Leased::Fresh(hold))
}

/// Writes the new parent of an image of this chain that a merge has recorded
/// and not written yet: a reader that starts now must not learn of the node
/// that goes away. Returns whether anything changed.
pub(crate) fn relink(repo: &Repo, links: &[Link], intents: &[crate::journal::Stored]) -> Result<bool> {
    let mut changed = false;
    for stored in intents {
        let Intent::Inner(inner) = &stored.intent else {
            continue;
        };
        let JobState::Relinking { children } = &inner.state else {
            continue;
        };
        let parent = volume_of(&inner.parent)?;
        let ours = |link: &&Link| {
            children.iter().any(|child| child.footer == link.head.footer)
                && link.head.parent.as_ref().is_some_and(|p| p.footer != inner.parent.footer)
        };
        for link in links.iter().filter(ours) {
            image::settle(repo, &link.volume)?;
            image::set_parent(repo, &link.volume, &parent, inner.parent.footer)?;
            changed = true;
        }
    }
    Ok(changed)
}

/// Detaches a VDI; fine if it is not attached. Returns whether it was.
///
/// The tapdisk settles its images before it ends, and with it ends the lock
/// of the lease. If it is killed meanwhile the lease ends too, and whoever
/// opens the image next replays its record.
///
/// # Errors
/// [`Error::InUse`] while clients are connected, unless `force`;
/// [`Error::Busy`] while an operation is under way; [`Error::NotRunning`]
/// when the tapdisk lives but does not answer.
pub fn detach(repo: &Repo, vdi: Uuid, force: bool) -> Result<bool> {
    let locked = super::lock(repo, &[vdi])?;
    if locked.lease(vdi).is_none() {
        chain::leaf_volume(repo, vdi)?;
        return Ok(false);
    }
    locked.no_snapshot_of(&chain::read(repo, vdi)?[0])?;
    drop(locked);
    let lost = |reason: String| Error::NotRunning { what: format!("the tapdisk of VDI {vdi}"), reason };
    let Some(mut tap) = repo.host.tap(vdi).map_err(|e| lost(e.to_string()))? else {
        return Ok(true);
    };
    match tap.call(Request::Stop { force }) {
        Ok(_) => {}
        Err(ClientError::Refused(Refusal::Busy { detail })) => {
            return Err(Error::InUse { what: format!("VDI {vdi}"), reason: detail });
        }
        Err(ClientError::Refused(refusal)) => return Err(lost(refusal.to_string())),
        // It may have ended before its answer was read.
        Err(ClientError::Io(error)) => {
            if !repo.host.wait_gone(vdi).during(|| "leases".into())? {
                return Err(lost(error.to_string()));
            }
        }
    }
    if !repo.host.wait_gone(vdi).during(|| "leases".into())? {
        return Err(lost("it was stopped but does not end".into()));
    }
    let detail = if force { "forced" } else { "" }.to_owned();
    repo.labels.note(&Event { at_s: repo.ids.now_s(), operation: "detach", vdi, detail })?;
    Ok(true)
}

/// Settles every image of the SR that a killed holder left unsettled: the SR
/// may go to another host afterwards. The caller holds the SR lock and has
/// seen that there are no leases. Broken images are left alone.
///
/// # Errors
/// The first image that cannot be settled.
pub fn settle_all(repo: &Repo) -> Result<()> {
    for volume in repo.volumes.list().during(|| format!("list SR {}", repo.name))? {
        let Some(seen) = image::look(repo, &volume) else {
            continue;
        };
        if seen.head.is_ok() && !volume.is_raw() {
            image::settle(repo, &volume)?;
        }
    }
    Ok(())
}
