//! Deleting a VDI.

use uuid::Uuid;

use crate::catalog::Event;
use crate::error::{Error, IoContext, Result};
use crate::image;
use crate::journal::Intent;
use crate::repo::Repo;
use crate::scan;

/// What a delete did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Deleted {
    /// The image is gone.
    Gone,
    /// Somebody still reads it: it is hidden, and the collector deletes it
    /// when the last of them is gone.
    Hidden,
}

/// Deletes a leaf, snapshots included. A node that others stand on, or that
/// somebody reads, is hidden instead.
///
/// One step either way (a name removed and synced, or a flag set durably), so
/// there is no intent: a crash leaves the VDI or not. The label goes last; a
/// crash before that leaves a label of nothing, which the next scan drops.
///
/// Who has children is taken from a scan made before the lock: only an
/// operation of ours gives a node children, and it gives none to a visible
/// one without an intent, which is looked for under the lock.
///
/// # Errors
/// [`Error::InUse`] while attached, [`Error::Busy`] while an operation or a
/// merge works on it, [`Error::NotFound`] for a hidden node.
pub fn delete(repo: &Repo, vdi: Uuid) -> Result<Deleted> {
    let scan = scan::scan(repo)?;
    let has_children = scan.tree.by_uuid(vdi).is_some_and(|ix| !scan.tree.nodes[ix].children.is_empty());
    let locked = super::lock(repo, &[vdi])?;
    let volume = crate::chain::leaf_volume(repo, vdi)?;
    // A broken image can be deleted too: its headers are not asked for much.
    let head = image::look(repo, &volume).and_then(|seen| seen.head.ok());
    let footer = head.as_ref().map_or(Uuid::nil(), |head| head.footer);
    if head.as_ref().is_some_and(|head| head.hidden) {
        return Err(Error::NotFound { what: format!("VDI {vdi}: it is a hidden node") });
    }
    if let Some(lease) = locked.lease(vdi) {
        let reason = format!("it is attached, process {}", lease.pid);
        return Err(Error::InUse { what: format!("VDI {vdi}"), reason });
    }
    if repo.host.wanted_one(vdi).during(|| format!("run folder of VDI {vdi}"))?.is_some() {
        let reason = "it is attached, and its tapdisk is being brought back".into();
        return Err(Error::InUse { what: format!("VDI {vdi}"), reason });
    }
    let claim = |intent: &Intent| intent.names(&volume, if footer.is_nil() { vdi } else { footer });
    if let Some(stored) = locked.intents.iter().find(|stored| claim(&stored.intent)) {
        return Err(Error::Busy { reason: format!("job {} works on VDI {vdi}", stored.name.id) });
    }
    let read = locked.leases.iter().any(|lease| lease.names(&volume, footer));
    let deleted = if has_children || read {
        if volume.is_raw() {
            let reason = "it has children, and a raw volume cannot be hidden".into();
            return Err(Error::Held {
                what: format!("VDI {vdi}"),
                reason,
                next: "delete the disks that stand on it first",
            });
        }
        image::settle(repo, &volume)?;
        image::set_hidden(repo, &volume, true)?;
        Deleted::Hidden
    } else {
        // Locked first: somebody outside may have it open for writing.
        let lock = image::open(repo, &volume, vhd::storage::Access::Write)?;
        repo.volumes.delete(&volume).during(|| format!("delete {volume}"))?;
        repo.volumes.sync("delete: name gone").during(|| format!("delete {volume}"))?;
        drop(lock);
        if !footer.is_nil() {
            repo.host.records().remove(footer).during(|| format!("pending record of {volume}"))?;
        }
        Deleted::Gone
    };
    drop(locked);
    repo.labels.remove(vdi)?;
    let detail = format!("{deleted:?}").to_lowercase();
    repo.labels.note(&Event { at_s: repo.ids.now_s(), operation: "delete", vdi, detail })?;
    Ok(deleted)
}
