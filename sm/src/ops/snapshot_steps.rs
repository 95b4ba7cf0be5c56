//! The steps of a snapshot after its decision, and of taking one back.
//!
//! Each is idempotent: the operation runs them once, recovery as often as it
//! takes. The argument for their order is in [`super::snapshot`].

use tapdisk_control::Request;
use uuid::Uuid;
use vhd::storage::VolumeName;

use super::Locked;
use crate::catalog::{Event, Label};
use crate::chain::{self, Link};
use crate::error::{Error, IoContext, Result};
use crate::host::Tap;
use crate::identity;
use crate::image;
use crate::journal::{
    self, ImageRef, LeafMergeState, Member, RecordName, RecordState, Shape, SiblingKind, SnapshotIntent,
    volume_of,
};
use crate::naming::Found;
use crate::repo::Repo;

/// What became of a pending snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Decision {
    /// All members swap.
    Swap,
    /// None does.
    Void,
}

/// Tries to decide a pending snapshot; returns what was decided, by us or by
/// whoever was faster.
pub(crate) fn decide(repo: &Repo, id: Uuid, wish: Decision) -> Result<Decision> {
    let names = RecordName::of_snapshot(id);
    let to = match wish {
        Decision::Swap => &names.decided,
        Decision::Void => &names.void,
    };
    let what = || format!("decide snapshot {id}");
    if repo.volumes.rename_record(&names.pending, to).during(what)? {
        return Ok(wish);
    }
    let decided = repo.volumes.record(&names.decided).during(what)?.is_some();
    Ok(if decided { Decision::Swap } else { Decision::Void })
}

/// Makes the swaps durable that tapdisks have done, and then the decision.
/// Both come before anything that shows: the base's hidden flag and the
/// sibling's name.
pub(crate) fn make_decision_durable(repo: &Repo) -> Result<()> {
    repo.volumes.sync("snapshot: swaps").during(|| "swap of a snapshot".into())?;
    repo.volumes.sync_records("snapshot: decision").during(|| "decision of a snapshot".into())
}

/// Finishes a decided snapshot; the caller holds the SR lock. The record is
/// removed last, so a crash anywhere leaves work for the next call.
pub(crate) fn finish(repo: &Repo, intent: &SnapshotIntent) -> Result<()> {
    for member in &intent.members {
        swap(repo, member)?;
    }
    make_decision_durable(repo)?;
    for member in &intent.members {
        settle_base(repo, member)?;
        name_sibling(repo, member)?;
    }
    repo.volumes.sync("snapshot: siblings' names").during(|| "names of siblings".into())?;
    for member in &intent.members {
        label(repo, intent.kind, member)?;
        refresh_lease(repo, member)?;
    }
    for state in [RecordState::Pending, RecordState::Decided] {
        let name = RecordName { id: intent.id, state };
        journal::remove(repo.volumes.as_ref(), name, "snapshot: record cleared")?;
    }
    Ok(())
}

/// Whether the member's swap has happened, or has begun.
pub(crate) fn swap_begun(repo: &Repo, member: &Member) -> Result<bool> {
    match member.name_swap()? {
        Some(swap) => Ok(swap.found(repo)? != Found::Before),
        None => Ok(false),
    }
}

/// Only a tapdisk swaps the leaf it serves; for any other it is done here,
/// under the image's lock.
fn swap(repo: &Repo, member: &Member) -> Result<()> {
    let Some(swap) = member.name_swap()? else {
        return Ok(());
    };
    if swap.found(repo)? == Found::Done {
        return Ok(());
    }
    if live_tap(repo, member.vdi)?.is_some() {
        let reason = format!("the tapdisk of VDI {} has not swapped its leaf yet", member.vdi);
        return Err(Error::Busy { reason });
    }
    let _lock = swap.lock_former(repo)?;
    swap.carry_out(repo)
}

/// Step 9 for a member whose tapdisk lives.
pub(crate) fn settle_base_live(repo: &Repo, member: &Member, tap: &mut dyn Tap) -> Result<()> {
    let Shape::Divide { base, .. } = &member.shape else {
        return Ok(());
    };
    let volume = VolumeName::vhd(*base);
    if image::is_base(repo, &volume)? {
        return Ok(());
    }
    let base = ImageRef { volume: volume.as_str().to_owned(), footer: member.leaf_footer };
    tap.call(Request::SettleBase { base }).map(drop).map_err(|error| Error::NotRunning {
        what: format!("settling of {volume}"),
        reason: error.to_string(),
    })
}

fn settle_base(repo: &Repo, member: &Member) -> Result<()> {
    let Shape::Divide { base, .. } = &member.shape else {
        return Ok(());
    };
    let base = VolumeName::vhd(*base);
    if image::is_base(repo, &base)? {
        return Ok(());
    }
    if let Some(mut tap) = live_tap(repo, member.vdi)? {
        return settle_base_live(repo, member, tap.as_mut());
    }
    image::settle(repo, &base)?;
    image::set_hidden(repo, &base, true)
}

fn name_sibling(repo: &Repo, member: &Member) -> Result<()> {
    let name = VolumeName::vhd(member.sibling.vdi);
    if image::footer_of(repo, &name)? == Some(member.sibling.image.footer) {
        return Ok(());
    }
    repo.volumes
        .rename(&volume_of(&member.sibling.image)?, &name)
        .during(|| format!("name of sibling {}", member.sibling.vdi))
}

fn label(repo: &Repo, kind: SiblingKind, member: &Member) -> Result<()> {
    let source = repo.labels.get(member.vdi)?.unwrap_or_default();
    let snapshot = kind == SiblingKind::Snapshot;
    let at_s = repo.ids.now_s();
    let label = Label {
        name: member.sibling.name.clone(),
        description: source.description,
        snapshot_of: snapshot.then_some(member.vdi),
        created_s: at_s,
        read_only: snapshot,
    };
    repo.labels.put(member.sibling.vdi, &label)?;
    if member.sibling.filled {
        // The making that filled it notes what it is.
        return Ok(());
    }
    identity::inherit(repo, member.vdi, member.sibling.vdi)?;
    let operation = if snapshot { "snapshot" } else { "clone" };
    let detail = member.sibling.vdi.to_string();
    repo.labels.note(&Event { at_s, operation, vdi: member.vdi, detail })
}

/// The lease of an attached member names its chain as it is now.
fn refresh_lease(repo: &Repo, member: &Member) -> Result<()> {
    if matches!(member.shape, Shape::Empty) {
        return Ok(());
    }
    let leases = repo.host.leases().during(|| "leases".into())?;
    if !leases.iter().any(|lease| lease.serves(member.vdi)) {
        return Ok(());
    }
    let links = chain::read(repo, member.vdi)?;
    let chain: Vec<ImageRef> = links.iter().map(Link::image_ref).collect();
    repo.host.update_lease(member.vdi, &chain).during(|| format!("lease of VDI {}", member.vdi))
}

/// Takes back a void snapshot; the caller holds the SR lock.
pub(crate) fn take_back(repo: &Repo, intent: &SnapshotIntent) -> Result<()> {
    for member in &intent.members {
        let sibling = volume_of(&member.sibling.image)?;
        repo.volumes.delete(&sibling).during(|| format!("take back {sibling}"))?;
        if let Some(swap) = member.name_swap()? {
            swap.take_back(repo)?;
        }
    }
    repo.volumes.sync("snapshot: taken back").during(|| "taking a snapshot back".into())?;
    for state in [RecordState::Pending, RecordState::Void] {
        let name = RecordName { id: intent.id, state };
        journal::remove(repo.volumes.as_ref(), name, "snapshot: void record cleared")?;
    }
    Ok(())
}

/// Ends a merge of this leaf into its parent before the tree below it
/// changes: the tapdisk settles the parent, and then the intent goes.
pub(crate) fn stop_leaf_merge(
    repo: &Repo,
    locked: &Locked,
    leaf: &Link,
    tap: Option<&mut Box<dyn Tap>>,
) -> Result<()> {
    let Some(merge) = locked.leaf_merge(leaf) else {
        return Ok(());
    };
    let busy = |reason: &str| Error::Busy { reason: format!("merge of {}: {reason}", merge.vdi) };
    if merge.state == LeafMergeState::Committing {
        return Err(busy("it is being committed"));
    }
    let Some(tap) = tap else {
        return Err(busy("the collector works on it"));
    };
    tap.call(Request::MergeStop).map_err(|error| busy(&error.to_string()))?;
    let name = RecordName { id: merge.id, state: RecordState::Job };
    journal::remove(repo.volumes.as_ref(), name, "leaf merge: stopped for a snapshot")
}

fn live_tap(repo: &Repo, vdi: Uuid) -> Result<Option<Box<dyn Tap>>> {
    repo.host.tap(vdi).map_err(|error| Error::NotRunning {
        what: format!("the tapdisk of VDI {vdi}"),
        reason: error.to_string(),
    })
}
