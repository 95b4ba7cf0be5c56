//! Another size for a VDI.
//!
//! ```text
//!   attached for writing   its tapdisk grows the leaf while it serves it; a
//!                          merge of the leaf is stopped and settled before
//!   not attached           [SR lock] record, [image lock] grow or shrink,
//!                          record cleared
//! ```
//!
//! Only a disk without a parent shrinks, not attached, and only where what
//! goes holds nothing but zeros: past the end of a differencing image its
//! parent's data would come back with the next growth. An image that came to
//! us on a larger one does not grow, either.
//!
//! Crash argument. Every state between the two sizes is a sound image of one
//! of them (see [`vhd::resize`]). So the record protects nothing from a
//! crash: while we work without the SR lock it keeps others from the image,
//! and recovery settles the image at the size it has and clears it. Whoever
//! got no answer finds the old size or the new one.

use tapdisk_control::{ClientError, Refusal, Request};
use uuid::Uuid;
use vhd::meta::Meta;
use vhd::storage::Access;

use super::{Locked, create, snapshot_steps};
use crate::catalog::Event;
use crate::chain::Link;
use crate::error::{Error, IoContext, Result};
use crate::host::Guard;
use crate::identity;
use crate::image;
use crate::journal::{self, Intent, RecordName, RecordState, ResizeIntent, volume_of};
use crate::repo::Repo;

/// Who is to do it, once it is clear that it may be done.
enum Way {
    /// The disk has that size.
    Nothing,
    /// Its tapdisk.
    Live,
    /// We; the intent stands.
    Offline(ResizeIntent, Guard),
}

/// Gives a VDI at least `virtual_bytes`, rounded up to whole blocks; returns
/// the size it has now.
///
/// # Errors
/// [`Error::BadSize`] for a size no disk can have, for shrinking a disk that
/// has a parent or that is attached, and where data would be lost or come
/// back;
/// [`Error::ReadOnly`] for a snapshot; [`Error::InUse`] while others read the
/// image; [`Error::NoSpace`]; [`Error::Busy`] while an operation works on it.
pub fn resize(repo: &Repo, vdi: Uuid, virtual_bytes: u64) -> Result<u64> {
    let new_bytes = create::checked_size(virtual_bytes)?;
    super::no_children(repo, &[vdi])?;
    match super::with_room(repo, vdi, || plan(repo, vdi, new_bytes))? {
        Way::Nothing => return Ok(new_bytes),
        Way::Live => live(repo, vdi, new_bytes)?,
        Way::Offline(intent, held) => {
            let outcome = offline(repo, &intent);
            let _sr = repo.host.lock_sr().during(|| format!("lock of SR {}", repo.name))?;
            // At whatever size it has: where it could not be done, the old one.
            recover(repo, &intent)?;
            drop(held);
            outcome?;
        }
    }
    let detail = format!("{new_bytes} bytes");
    repo.labels.note(&Event { at_s: repo.ids.now_s(), operation: "resize", vdi, detail })?;
    Ok(new_bytes)
}

fn plan(repo: &Repo, vdi: Uuid, new_bytes: u64) -> Result<Way> {
    let locked = super::lock(repo, &[vdi])?;
    let chain = super::visible_chain(repo, vdi)?;
    let leaf = &chain[0];
    if repo.labels.get(vdi)?.is_some_and(|label| label.read_only) {
        return Err(Error::ReadOnly { what: format!("snapshot {vdi}") });
    }
    if leaf.volume.is_raw() {
        return Err(Error::Unsupported { what: format!("another size for raw VDI {vdi}") });
    }
    locked.no_operation_on(leaf)?;
    locked.no_revival(repo, vdi)?;
    if new_bytes == leaf.head.virtual_bytes {
        return Ok(Way::Nothing);
    }
    identity::forget(repo, vdi)?;
    let lease = locked.lease(vdi);
    if new_bytes < leaf.head.virtual_bytes {
        may_shrink(leaf, lease.is_some())?;
    } else {
        may_grow(&chain)?;
    }
    match lease {
        Some(lease) if lease.read_only => {
            let reason = format!("it is attached read-only, process {}; detach it first", lease.pid);
            Err(Error::InUse { what: format!("VDI {vdi}"), reason })
        }
        Some(_) => {
            let mut tap = repo.host.tap(vdi).map_err(|e| lost(vdi, &e))?;
            snapshot_steps::stop_leaf_merge(repo, &locked, leaf, tap.as_mut())?;
            Ok(Way::Live)
        }
        None => begin_offline(repo, vdi, &locked, leaf, new_bytes),
    }
}

fn may_shrink(leaf: &Link, attached: bool) -> Result<()> {
    let reason = if leaf.head.parent.is_some() {
        "a disk with a parent never shrinks; copy it and shrink the copy"
    } else if attached {
        "an attached disk does not shrink; detach it first"
    } else {
        return Ok(());
    };
    let now = leaf.head.virtual_bytes;
    Err(Error::BadSize { reason: format!("{}: it has {now} bytes, and {reason}", leaf.volume) })
}

/// No operation of ours puts an image on a larger one; others may have.
fn may_grow(chain: &[Link]) -> Result<()> {
    let Some(leaf) = chain.first() else { return Ok(()) };
    match chain.iter().find(|link| link.head.virtual_bytes > leaf.head.virtual_bytes) {
        None => Ok(()),
        Some(larger) => {
            let (leaf, larger) = (&leaf.volume, &larger.volume);
            let reason = format!(
                "{leaf} stands on {larger}, which is larger: what that has past the disk's end would come \
                 back; copy the disk and grow the copy"
            );
            Err(Error::BadSize { reason })
        }
    }
}

fn begin_offline(repo: &Repo, vdi: Uuid, locked: &Locked, leaf: &Link, new_bytes: u64) -> Result<Way> {
    locked.nobody_copies(vdi, leaf)?;
    // Only those who read it as a base are left, through maps of old places.
    if locked.leases.iter().any(|lease| lease.names(&leaf.volume, leaf.head.footer)) {
        let reason = "somebody reads its image".into();
        return Err(Error::Held {
            what: format!("VDI {vdi}"),
            reason,
            next: "wait until the copy or export has ended, or cancel it",
        });
    }
    snapshot_steps::stop_leaf_merge(repo, locked, leaf, None)?;
    image::settle(repo, &leaf.volume)?;
    let id = repo.ids.uuid();
    let held = repo.host.hold_intent(id).during(|| format!("hold intent {id}"))?;
    let held = held.ok_or_else(|| Error::Busy { reason: format!("intent {id} is taken") })?;
    let intent = ResizeIntent { id, vdi, image: leaf.image_ref(), virtual_bytes: new_bytes };
    journal::put(repo.volumes.as_ref(), &Intent::Resize(intent.clone()), "resize: record")?;
    Ok(Way::Offline(intent, held))
}

fn offline(repo: &Repo, intent: &ResizeIntent) -> Result<()> {
    let name = volume_of(&intent.image)?;
    let volume = image::open(repo, &name, Access::Write)?;
    let mut meta = Meta::read(volume.as_ref()).map_err(|e| image::bad(&name, e))?;
    let change =
        if intent.virtual_bytes < meta.virtual_bytes() { vhd::resize::shrink } else { vhd::resize::grow };
    change(volume.as_ref(), &mut meta, intent.virtual_bytes).map_err(|e| image::bad(&name, e))
}

/// Settles the image at the size it has and clears the record. The caller
/// holds the SR lock and the intent.
///
/// # Errors
/// What settling said; the record then stays, and the image with it.
pub(crate) fn recover(repo: &Repo, intent: &ResizeIntent) -> Result<()> {
    image::settle(repo, &volume_of(&intent.image)?)?;
    let name = RecordName { id: intent.id, state: RecordState::Job };
    journal::remove(repo.volumes.as_ref(), name, "resize: record cleared")
}

/// Has the tapdisk grow its leaf. No record: what half a growth leaves is
/// sound, and the tapdisk ends it without us.
fn live(repo: &Repo, vdi: Uuid, new_bytes: u64) -> Result<()> {
    let leaf = crate::chain::read(repo, vdi)?.swap_remove(0);
    let detached = || Error::Busy { reason: format!("VDI {vdi} is just being detached") };
    let mut tap = repo.host.tap(vdi).map_err(|e| lost(vdi, &e))?.ok_or_else(detached)?;
    let request = Request::Grow { leaf: leaf.image_ref(), virtual_bytes: new_bytes };
    match tap.call(request) {
        Ok(_) => Ok(()),
        Err(ClientError::Refused(Refusal::NoSpace { detail })) => Err(Error::NoSpace { what: detail }),
        Err(ClientError::Refused(Refusal::Busy { detail } | Refusal::Stale { detail })) => {
            Err(Error::Busy { reason: detail })
        }
        Err(error) => Err(lost(vdi, &error)),
    }
}

fn lost(vdi: Uuid, error: &dyn std::fmt::Display) -> Error {
    Error::NotRunning { what: format!("the tapdisk of VDI {vdi}"), reason: error.to_string() }
}
