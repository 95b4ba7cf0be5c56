//! Attaching a VDI: one tapdisk serves it from here on.

use tapdisk_control::{ClientError, Refusal, Request};
use uuid::Uuid;
use vhd::chain::Chain;
use vhd::storage::VolumeName;

use crate::catalog::Event;
use crate::chain::{self, Link};
use crate::error::{Error, IoContext, Result};
use crate::host::{Endpoint, LeaseHold};
use crate::identity;
use crate::image;
use crate::journal::{Intent, JobState, volume_of};
use crate::lease::{Lease, Reader};
use crate::remote::Remote;
use crate::repo::Repo;
use crate::tree::{Broken, NodeState};
use crate::wanted::Wanted;

/// Where an attached VDI is served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attached {
    /// Its sockets and process.
    pub endpoint: Endpoint,
    /// Whether this call attached it; false if it was attached already.
    pub fresh: bool,
}

/// How a VDI is to be attached.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct How {
    /// Refuse writes.
    pub read_only: bool,
    /// Serve it to other hosts too.
    pub remote: Option<Remote>,
    /// Where to serve it if `remote` says nothing; one that is attached stays
    /// where it is.
    pub offer: Option<Remote>,
}

/// Attaches a VDI on this host: see [`attach_as`].
///
/// # Errors
/// As there.
pub fn attach(repo: &Repo, vdi: Uuid, read_only: bool) -> Result<Attached> {
    attach_as(repo, vdi, &How { read_only, ..How::default() })
}

/// Attaches a VDI, or finds it attached the same way already.
///
/// ```text
///   under the SR lock:
///   1. recover this tree                      the name leads to the right image
///   2. write a recorded new parent, if a merge is relinking this chain
///   3. settle the leaf, if nobody will do so by opening it for writing
///   4. noted as wanted                        crash: smd brings it up later
///   5. lease, locked by us, naming the chain  crash: unlocked, so dead, reaped
///   after it:
///   6. tapdisk, inheriting the lease's lock   crash of ours: it serves on
/// ```
/// Nothing on the SR is written, so there is no intent.
///
/// # Errors
/// [`Error::ReadOnly`] for a snapshot attached for writing, [`Error::InUse`]
/// when attached the other way, [`Error::Busy`] while an operation is under
/// way, what breaks its chain, [`Error::BadRequest`] for an address or files of
/// TLS that cannot be used, [`Error::NotRunning`] with the tapdisk's words.
pub fn attach_as(repo: &Repo, vdi: Uuid, how: &How) -> Result<Attached> {
    let read_only = how.read_only;
    let snapshot = repo.labels.get(vdi)?.is_some_and(|label| label.read_only);
    if snapshot && !read_only {
        return Err(Error::ReadOnly { what: format!("snapshot {vdi}") });
    }
    let before = repo.host.wanted_one(vdi).during(|| wanted_of(vdi))?;
    let hold = match super::with_room(repo, vdi, || lease(repo, vdi, how, For::Person))? {
        Leased::Already(endpoint) => {
            return Ok(Attached { endpoint, fresh: false });
        }
        Leased::Fresh(hold) => hold,
    };
    let endpoint = hold.start_tap().map_err(|error| {
        give_back(repo, vdi, before.as_ref());
        not_started(repo, vdi, &error)
    })?;
    {
        let _sr = repo.host.lock_sr().during(|| format!("lock of SR {}", repo.name))?;
        let wanted = repo.host.wanted_one(vdi).during(|| wanted_of(vdi))?;
        if let Some(wanted) = wanted {
            let wanted = wanted.started().listening(endpoint.listen);
            repo.host.want(&wanted).during(|| wanted_of(vdi))?;
        }
    }
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
        // What it was told to use is not fit for use: nothing of ours is broken.
        _ if error.kind() == std::io::ErrorKind::InvalidInput => {
            Error::BadRequest { reason: format!("VDI {vdi} cannot be served: {error}") }
        }
        _ => Error::NotRunning { what: format!("the tapdisk of VDI {vdi}"), reason: error.to_string() },
    }
}

fn wanted_of(vdi: Uuid) -> String {
    format!("run folder of VDI {vdi}")
}

/// After an attach that failed the VDI is as wanted as it was before.
fn give_back(repo: &Repo, vdi: Uuid, before: Option<&Wanted>) {
    let back = || -> Result<()> {
        let locked = super::lock(repo, &[])?;
        if locked.lease(vdi).is_some() {
            // Somebody else has attached it meanwhile.
            return Ok(());
        }
        let back = before.map_or_else(|| repo.host.unwant(vdi), |before| repo.host.want(before));
        back.during(|| wanted_of(vdi))
    };
    if let Err(error) = back() {
        tracing::warn!(sr = %repo.uuid, %vdi, %error, "a failed attach stays noted");
    }
}

/// Starts the tapdisk of a wanted VDI that has none, as it was attached.
/// Returns false if it is not wanted any more.
///
/// There are never two writers: the lease of the dead one is free only when
/// its process is gone, and the new one opens the image under the image's own
/// lock (invariant 4), replaying the pending record.
///
/// # Errors
/// As [`attach`].
pub fn revive(repo: &Repo, vdi: Uuid) -> Result<bool> {
    let Some(wanted) = repo.host.wanted_one(vdi).during(|| wanted_of(vdi))? else {
        return Ok(false);
    };
    let how = How { read_only: wanted.read_only, ..How::default() };
    let hold = match super::with_room(repo, vdi, || lease(repo, vdi, &how, For::Caretaker)) {
        Ok(Leased::Already(_)) => return Ok(true),
        Ok(Leased::Fresh(hold)) => hold,
        Err(_) if repo.host.wanted_one(vdi).during(|| wanted_of(vdi))?.is_none() => return Ok(false),
        Err(error) => return Err(error),
    };
    hold.start_tap().map_err(|error| not_started(repo, vdi, &error))?;
    Ok(true)
}

/// What a dead smd was at: a live tapdisk is wanted, be it that it was being
/// attached or detached; an attach that brought up none is forgotten, as
/// nobody was answered. The caller holds the SR lock.
///
/// # Errors
/// The run folder cannot be read or written.
pub fn adopt(repo: &Repo) -> Result<()> {
    let mut leases = repo.host.leases().during(|| "leases".into())?;
    leases.retain(|lease| lease.reader == Reader::Tapdisk);
    for lease in &leases {
        let before = repo.host.wanted_one(lease.vdi).during(|| wanted_of(lease.vdi))?;
        if before.as_ref().is_none_or(|wanted| wanted.starting) {
            let remote = before.and_then(|wanted| wanted.remote);
            let wanted = Wanted::starting(repo.uuid, lease.vdi, lease.read_only).started();
            let wanted = Wanted { remote, ..wanted };
            repo.host.want(&wanted).during(|| wanted_of(lease.vdi))?;
        }
    }
    for wanted in repo.host.wanted().during(|| "run folder".into())? {
        if wanted.starting && leases.iter().all(|lease| lease.vdi != wanted.vdi) {
            repo.host.unwant(wanted.vdi).during(|| wanted_of(wanted.vdi))?;
        }
    }
    Ok(())
}

/// Who attaches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum For {
    /// Somebody who asked.
    Person,
    /// Nobody, a dead tapdisk is being replaced: only while it is wanted.
    Caretaker,
}

enum Leased {
    Already(Endpoint),
    Fresh(Box<dyn LeaseHold>),
}

fn lease(repo: &Repo, vdi: Uuid, how: &How, whom: For) -> Result<Leased> {
    let read_only = how.read_only;
    let twins = twins(repo)?;
    let locked = super::lock(repo, &[vdi])?;
    if let Some(lease) = locked.lease(vdi) {
        if lease.pid == 0 {
            return Err(Error::Busy { reason: format!("VDI {vdi} is being attached") });
        }
        same_way(vdi, lease.read_only, read_only)?;
        same_place(repo, vdi, how.remote.as_ref())?;
        return Ok(Leased::Already(repo.host.endpoint(lease)));
    }
    let before = repo.host.wanted_one(vdi).during(|| wanted_of(vdi))?;
    match (&before, whom) {
        (None, For::Caretaker) => return Err(Error::NotFound { what: format!("attach of VDI {vdi}") }),
        (None, For::Person) => {}
        (Some(wanted), _) => {
            same_way(vdi, wanted.read_only, read_only)?;
            same_place(repo, vdi, how.remote.as_ref())?;
        }
    }
    let mut links = super::visible_chain(repo, vdi)?;
    if let Some(twin) = links.iter().find_map(|link| twins.iter().find(|(name, _)| *name == link.volume)) {
        let reason = format!("{} carries the same footer uuid", twin.1);
        return Err(Error::BadImage { volume: twin.0.clone(), reason });
    }
    locked.no_operation_on(&links[0])?;
    if !read_only {
        locked.nobody_copies(vdi, &links[0])?;
        identity::forget(repo, vdi)?;
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
    if whom == For::Person {
        // One whose tapdisk died comes back where its clients look for it.
        let otherwise = || before.map_or_else(|| how.offer.clone(), |before| before.remote);
        let remote = how.remote.clone().or_else(otherwise);
        let wanted = Wanted { remote, ..Wanted::starting(repo.uuid, vdi, read_only) };
        repo.host.want(&wanted).during(|| wanted_of(vdi))?;
    }
    let hold = repo.host.make_lease(&lease).during(|| format!("lease of VDI {vdi}"))?;
    Ok(Leased::Fresh(hold))
}

/// Images that share their footer's uuid with another: a pending record, a
/// lease or a child could mean either. Seen without the lock, as no operation
/// of ours makes such a pair.
fn twins(repo: &Repo) -> Result<Vec<(VolumeName, VolumeName)>> {
    let nodes = crate::scan::scan(repo)?.tree.nodes;
    let twin = |node: crate::tree::Node| match node.state {
        NodeState::Broken(Broken::SharedFooter { other }) => Some((node.volume, other)),
        _ => None,
    };
    Ok(nodes.into_iter().filter_map(twin).collect())
}

/// Refuses an attach that wants it served elsewhere than it is.
fn same_place(repo: &Repo, vdi: Uuid, asked: Option<&Remote>) -> Result<()> {
    let Some(asked) = asked else { return Ok(()) };
    let wanted = repo.host.wanted_one(vdi).during(|| wanted_of(vdi))?;
    match wanted.and_then(|wanted| wanted.remote) {
        Some(served) if served.serves(asked) => Ok(()),
        served => {
            let where_to = served.map_or("this host only".to_owned(), |served| served.listen.to_string());
            let reason = format!("it is attached and listens on {where_to}: detach it first");
            Err(Error::InUse { what: format!("VDI {vdi}"), reason })
        }
    }
}

/// Refuses an attach the other way.
fn same_way(vdi: Uuid, is_read_only: bool, read_only: bool) -> Result<()> {
    if is_read_only == read_only {
        return Ok(());
    }
    let how = if is_read_only { "reading only" } else { "writing" };
    Err(Error::InUse { what: format!("VDI {vdi}"), reason: format!("it is attached for {how}") })
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
/// ```text
///   under the SR lock:
///   1. not wanted any more     crash: it is served on; the next smd notes it
///                              as wanted again
///   after it:
///   2. the tapdisk settles its images and ends, and with it the lease
/// ```
/// If it is killed meanwhile the lease ends too, nobody brings it back, and
/// whoever opens the image next replays its record.
///
/// # Errors
/// [`Error::Held`] while clients are connected, unless `force`;
/// [`Error::Busy`] while an operation is under way, also within the tapdisk;
/// [`Error::NotRunning`] when the tapdisk lives but does not answer.
pub fn detach(repo: &Repo, vdi: Uuid, force: bool) -> Result<bool> {
    let locked = super::lock(repo, &[vdi])?;
    let wanted = repo.host.wanted_one(vdi).during(|| wanted_of(vdi))?;
    let Some(lease) = locked.lease(vdi) else {
        if wanted.is_none() {
            chain::leaf_volume(repo, vdi)?;
        }
        repo.host.unwant(vdi).during(|| wanted_of(vdi))?;
        return Ok(wanted.is_some());
    };
    if lease.pid == 0 {
        return Err(Error::Busy { reason: format!("VDI {vdi} is being attached") });
    }
    locked.no_operation_on(&chain::read(repo, vdi)?[0])?;
    repo.host.unwant(vdi).during(|| wanted_of(vdi))?;
    drop(locked);
    if let Err(error) = stop(repo, vdi, force) {
        want_again(repo, wanted.as_ref());
        return Err(error);
    }
    let detail = if force { "forced" } else { "" }.to_owned();
    repo.labels.note(&Event { at_s: repo.ids.now_s(), operation: "detach", vdi, detail })?;
    Ok(true)
}

/// Has a tapdisk end, and waits until it is gone.
fn stop(repo: &Repo, vdi: Uuid, force: bool) -> Result<()> {
    let lost = |reason: String| Error::NotRunning { what: format!("the tapdisk of VDI {vdi}"), reason };
    let Some(mut tap) = repo.host.tap(vdi).map_err(|e| lost(e.to_string()))? else {
        return Ok(());
    };
    match tap.call(Request::Stop { force }) {
        Ok(_) => {}
        Err(ClientError::Refused(Refusal::InUse { detail })) => {
            let next = "disconnect its clients, or detach it with --force";
            return Err(Error::Held { what: format!("VDI {vdi}"), reason: detail, next });
        }
        // The collector has it refresh its map, say: over in a moment.
        Err(ClientError::Refused(Refusal::Busy { detail })) => {
            return Err(Error::Busy { reason: format!("the tapdisk of VDI {vdi}: {detail}") });
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
    Ok(())
}

/// A detach that was refused leaves the VDI attached, so wanted. If its
/// tapdisk died in between, it is brought back.
fn want_again(repo: &Repo, wanted: Option<&Wanted>) {
    let Some(wanted) = wanted else {
        return;
    };
    let again = || -> Result<()> {
        let _locked = super::lock(repo, &[])?;
        repo.host.want(wanted).during(|| wanted_of(wanted.vdi))
    };
    if let Err(error) = again() {
        tracing::warn!(sr = %repo.uuid, vdi = %wanted.vdi, %error, "not noted as attached");
    }
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
