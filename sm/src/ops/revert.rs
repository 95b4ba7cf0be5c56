//! Taking a VDI back to what a snapshot of it holds.
//!
//! ```text
//!   before               the snapshot holds nothing    it holds data
//!   P <- B <- L          P <- B <- G (hidden)          P <- B <- G (hidden)
//!         \- S                 |- S                          \- S' hidden <- S
//!                              \- L, new and empty                       \- L
//! ```
//!
//! `L` keeps its uuid and gets the snapshot's size; its former image `G` is
//! garbage, which the collector deletes when nobody reads it any more. All of
//! it happens under the SR lock, as it only touches names and headers:
//!
//! ```text
//!   1  record, durable
//!   2  each former image gets its second name (G, S'), where it can have two;
//!      the new images are created under temporary names, flushed
//!   3  names synced
//!   4  the new images take the names of L and S (see `naming`): THE INSTANT is
//!      the first rename
//!   5  names synced
//!   6  former images settled and hidden
//!   7  history, record cleared
//! ```
//!
//! Crash argument. Before 4 nothing that exists has changed; second names and
//! temporaries are garbage, and the record hides them from scans: recovery
//! takes them back. A swap that is found, or half of one, decides: no swap is durable before
//! 3 was, so all that the others need is there, and recovery repeats from 4.
//! A former image is hidden only once the swaps are durable, so a revert that
//! is taken back never hid what became the leaf again.
//!
//! An attached VDI is refused: a running guest has the old content in its
//! caches, and would write it back over the new one.

use uuid::Uuid;
use vhd::storage::VolumeName;

use super::{Locked, snapshot_steps};
use crate::catalog::Event;
use crate::chain::Link;
use crate::error::{Error, IoContext, Result};
use crate::identity;
use crate::image::{self, NewVhd};
use crate::journal::{self, ImageRef, Intent, RecordName, RecordState, RevertIntent, Swap, volume_of};
use crate::naming::Found;
use crate::repo::Repo;

/// A swap with what its new image stands on.
struct Planned {
    swap: Swap,
    parent: Option<(VolumeName, Uuid)>,
}

/// Takes `vdi` back to its snapshot `to`.
///
/// # Errors
/// [`Error::InUse`] while the VDI is attached, or the snapshot is and holds
/// data of its own, or other disks stand on their images; [`Error::BadRequest`] if `to` is no snapshot of it;
/// [`Error::ReadOnly`] for a snapshot as `vdi`; [`Error::ChainTooLong`],
/// [`Error::NoSpace`], [`Error::Busy`], what breaks a chain. Before the first
/// swap an error leaves everything as it was.
pub fn revert(repo: &Repo, vdi: Uuid, to: Uuid) -> Result<()> {
    super::no_children(repo, &[vdi, to])?;
    let id = repo.ids.uuid();
    let held = repo.host.hold_intent(id).during(|| format!("hold intent {id}"))?;
    let _held = held.ok_or_else(|| Error::Busy { reason: format!("intent {id} is taken") })?;
    let locked = super::lock(repo, &[vdi, to])?;
    let planned = plan(repo, id, &locked, vdi, to)?;
    identity::forget(repo, vdi)?;
    let virtual_bytes = planned.1;
    let swaps = planned.0.iter().map(|planned| planned.swap.clone()).collect();
    let intent = RevertIntent { id, vdi, snapshot: to, swaps };
    let made = journal::put(repo.volumes.as_ref(), &Intent::Revert(intent.clone()), "revert: record")
        .and_then(|_| make_images(repo, &planned.0, virtual_bytes));
    if let Err(error) = made {
        take_back(repo, &intent)?;
        return Err(error);
    }
    let done = finish(repo, &intent);
    if done.is_err() && !any_begun(repo, &intent)? {
        take_back(repo, &intent)?;
    }
    done
}

/// Checks everything and says what is to be swapped, and the size. Changes
/// nothing but settling images that a killed holder left.
fn plan(repo: &Repo, id: Uuid, locked: &Locked, vdi: Uuid, to: Uuid) -> Result<(Vec<Planned>, u64)> {
    let disk = super::visible_chain(repo, vdi)?;
    let mut snapshot = super::visible_chain(repo, to)?;
    check_labels(repo, vdi, to)?;
    if let Some(lease) = locked.lease(vdi) {
        let reason = format!("it is attached, process {}; detach it first", lease.pid);
        return Err(Error::InUse { what: format!("VDI {vdi}"), reason });
    }
    locked.no_revival(repo, vdi)?;
    for leaf in [&disk[0], &snapshot[0]] {
        if leaf.volume.is_raw() {
            return Err(Error::Unsupported { what: format!("revert with raw volume {}", leaf.volume) });
        }
        locked.no_operation_on(leaf)?;
        snapshot_steps::stop_leaf_merge(repo, locked, leaf, None)?;
    }
    // The new leaf must not hang on a node that a merge takes away.
    if super::relink(repo, &snapshot, &locked.intents)? {
        snapshot = super::visible_chain(repo, to)?;
    }
    image::settle(repo, &disk[0].volume)?;
    let read = locked.lease(to).is_some();
    if !read {
        image::settle(repo, &snapshot[0].volume)?;
    }
    let new = |n: u32| ImageRef {
        volume: VolumeName::temporary(id, n).as_str().to_owned(),
        footer: repo.ids.uuid(),
    };
    let swap = |vdi: Uuid, leaf: &Link, aside: Uuid, n: u32| Swap {
        vdi,
        former: leaf.head.footer,
        aside,
        new: new(n),
    };
    let virtual_bytes = snapshot[0].head.virtual_bytes;
    let disk = swap(vdi, &disk[0], repo.ids.uuid(), 0);
    if image::allocated_bytes(repo, &snapshot[0].volume)? == 0 {
        let parent = snapshot.get(1).map(|link| (link.volume.clone(), link.head.footer));
        return Ok((vec![Planned { swap: disk, parent }], virtual_bytes));
    }
    if read {
        let reason = "it is attached and holds data of its own; detach it first".into();
        return Err(Error::InUse { what: format!("snapshot {to}"), reason });
    }
    let depth = u32::try_from(snapshot.len()).unwrap_or(u32::MAX);
    if depth >= repo.limits.chain_max {
        return Err(Error::ChainTooLong { vdi: to, depth, depth_max: repo.limits.chain_max });
    }
    let base = repo.ids.uuid();
    let parent = Some((VolumeName::vhd(base), snapshot[0].head.footer));
    let snapshot = swap(to, &snapshot[0], base, 1);
    let planned = [disk, snapshot].map(|swap| Planned { swap, parent: parent.clone() });
    Ok((planned.into(), virtual_bytes))
}

/// What is a snapshot of what only the labels know; going back to another
/// disk's content by mistake cannot be undone.
fn check_labels(repo: &Repo, vdi: Uuid, to: Uuid) -> Result<()> {
    if repo.labels.get(vdi)?.is_some_and(|label| label.read_only) {
        return Err(Error::ReadOnly { what: format!("snapshot {vdi}") });
    }
    if repo.labels.get(to)?.and_then(|label| label.snapshot_of) != Some(vdi) {
        let reason = format!("{to} is no snapshot of VDI {vdi}; clone or copy it instead");
        return Err(Error::BadRequest { reason });
    }
    Ok(())
}

/// Steps 2 and 3.
fn make_images(repo: &Repo, planned: &[Planned], virtual_bytes: u64) -> Result<()> {
    for Planned { swap, .. } in planned {
        swap.name_swap()?.prepare(repo)?;
    }
    for Planned { swap, parent } in planned {
        let volume = volume_of(&swap.new)?;
        let parent = parent.as_ref().map(|(volume, footer)| (volume, *footer));
        image::create(repo, &NewVhd { volume: &volume, footer: swap.new.footer, virtual_bytes, parent })?;
    }
    repo.volumes.sync("revert: new images and second names").during(|| "names of a revert's images".into())
}

fn any_begun(repo: &Repo, intent: &RevertIntent) -> Result<bool> {
    for swap in &intent.swaps {
        if swap.name_swap()?.found(repo)? != Found::Before {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Ends a revert, one way or the other. The caller holds the SR lock and the
/// intent.
///
/// # Errors
/// I/O errors; the record then stays.
pub(crate) fn recover(repo: &Repo, intent: &RevertIntent) -> Result<()> {
    if any_begun(repo, intent)? { finish(repo, intent) } else { take_back(repo, intent) }
}

/// Steps 4 to 7.
fn finish(repo: &Repo, intent: &RevertIntent) -> Result<()> {
    for swap in &intent.swaps {
        let swap = swap.name_swap()?;
        if swap.found(repo)? == Found::Done {
            continue;
        }
        // Somebody without a lease may have it open for writing.
        let lock = swap.lock_former(repo)?;
        swap.carry_out(repo)?;
        drop(lock);
    }
    repo.volumes.sync("revert: swaps").during(|| "swaps of a revert".into())?;
    for swap in &intent.swaps {
        let aside = VolumeName::vhd(swap.aside);
        if !image::is_base(repo, &aside)? {
            image::settle(repo, &aside)?;
            image::set_hidden(repo, &aside, true)?;
        }
    }
    let detail = intent.snapshot.to_string();
    let at_s = repo.ids.now_s();
    repo.labels.note(&Event { at_s, operation: "revert", vdi: intent.vdi, detail })?;
    clear(repo, intent)
}

/// Removes what was prepared.
fn take_back(repo: &Repo, intent: &RevertIntent) -> Result<()> {
    for swap in &intent.swaps {
        swap.name_swap()?.take_back(repo)?;
    }
    repo.volumes.sync("revert: taken back").during(|| "taking a revert back".into())?;
    clear(repo, intent)
}

fn clear(repo: &Repo, intent: &RevertIntent) -> Result<()> {
    let name = RecordName { id: intent.id, state: RecordState::Job };
    journal::remove(repo.volumes.as_ref(), name, "revert: record cleared")
}
