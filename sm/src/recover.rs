//! Finishing or undoing what a dead process left half done.
//!
//! Runs under the SR lock: when an SR is attached, and before each operation
//! for what concerns its VDIs. It needs only what is on the SR, and the
//! pending records after the death of a process alone (invariant 9). Running
//! it twice, or dying inside it, changes nothing: every step is idempotent
//! and a record goes last.
//!
//! An intent that somebody alive works on is left to him.
//!
//! Absent on purpose: inner merges. They never stand between a VDI and its
//! service (an attach writes the recorded parent itself, see
//! [`crate::ops::attach`]), so they wait for the collector.

use uuid::Uuid;
use vhd::storage::VolumeName;

use crate::error::{Error, IoContext, Result};
use crate::image;
use crate::journal::{
    self, Intent, LeafMergeIntent, LeafMergeState, RecordName, RecordState, SnapshotIntent, Stored, volume_of,
};
use crate::making;
use crate::naming::{Found, NameSwap};
use crate::ops::{self, Decision};
use crate::repo::Repo;

/// What is to be recovered.
#[derive(Debug, Clone, Copy)]
pub enum Scope<'a> {
    /// The whole SR. What fails is logged and stays: one broken image blocks
    /// only its own tree (invariant 11).
    All,
    /// What concerns these VDIs must succeed; the rest is tried.
    Vdis(&'a [Uuid]),
}

/// Recovers, as far as nobody alive works on it. The caller holds the SR lock.
///
/// # Errors
/// [`Error::Journal`] for a record that cannot be read, and what went wrong
/// with an intent that concerns a VDI of the scope.
pub fn recover(repo: &Repo, scope: Scope<'_>) -> Result<()> {
    let found = journal::load(repo.volumes.as_ref())?;
    if !found.is_empty() {
        // What is acted on must outlive a power cut that comes after: its
        // writer may have died between a rename and the sync of it.
        repo.volumes.sync_records("recover: records that were found").during(|| "journal: sync".into())?;
    }
    for stored in found {
        let Err(error) = recover_one(repo, &stored) else {
            continue;
        };
        if concerns(&stored.intent, scope) {
            return Err(error);
        }
        tracing::warn!(sr = %repo.uuid, job = %stored.name.id, %error, "recovery waits");
    }
    Ok(())
}

/// Removes prepared images that no intent names: left by an operation that
/// died before or after its record stood. The caller holds the SR lock, under
/// which all of them are made.
///
/// # Errors
/// The SR cannot be listed or its journal not be read.
pub fn sweep(repo: &Repo) -> Result<u32> {
    let intents = journal::load(repo.volumes.as_ref())?;
    let mut swept = 0;
    for volume in repo.volumes.list().during(|| format!("list SR {}", repo.name))? {
        let Some(id) = volume.temporary_of() else {
            continue;
        };
        if intents.iter().any(|stored| stored.name.id == id) {
            continue;
        }
        match repo.volumes.delete(&volume) {
            Ok(()) => swept += 1,
            Err(error) => tracing::warn!(sr = %repo.uuid, %volume, %error, "leftover stays"),
        }
    }
    Ok(swept)
}

fn concerns(intent: &Intent, scope: Scope<'_>) -> bool {
    let Scope::Vdis(vdis) = scope else {
        return false;
    };
    match intent {
        Intent::Snapshot(snapshot) => snapshot
            .members
            .iter()
            .any(|member| vdis.contains(&member.vdi) || vdis.contains(&member.sibling.vdi)),
        Intent::LeafMerge(merge) => vdis.contains(&merge.vdi),
        Intent::Make(make) => vdis.contains(&make.vdi),
        Intent::Resize(resize) => vdis.contains(&resize.vdi),
        Intent::Revert(revert) => revert.swaps.iter().any(|swap| vdis.contains(&swap.vdi)),
        Intent::Inner(_) => false,
    }
}

fn recover_one(repo: &Repo, stored: &Stored) -> Result<()> {
    let id = stored.name.id;
    let recover: &dyn Fn() -> Result<()> = match &stored.intent {
        Intent::Inner(_) => return Ok(()),
        Intent::Snapshot(intent) => &|| snapshot(repo, intent, stored.name.state),
        Intent::LeafMerge(merge) => &|| leaf_merge(repo, merge),
        Intent::Make(intent) => &|| making::recover(repo, intent),
        Intent::Resize(intent) => &|| ops::recover_resize(repo, intent),
        Intent::Revert(intent) => &|| ops::recover_revert(repo, intent),
    };
    let Some(_held) = repo.host.hold_intent(id).during(|| format!("hold intent {id}"))? else {
        return Ok(());
    };
    tracing::info!(sr = %repo.uuid, job = %stored.name, "recovering");
    recover()
}

/// ```text
///   record    a swap found?   then
///   pending   yes             power was lost after the decision: forward
///   pending   no              void it; whoever was faster decides
///   decided   -               forward
///   void      -               take back
///   job       -               no snapshot has this state
/// ```
fn snapshot(repo: &Repo, intent: &SnapshotIntent, state: RecordState) -> Result<()> {
    let decision = match state {
        RecordState::Pending => {
            let mut found = false;
            for member in &intent.members {
                found |= ops::swap_begun(repo, member)?;
            }
            let wish = if found { Decision::Swap } else { Decision::Void };
            ops::decide(repo, intent.id, wish)?
        }
        RecordState::Decided => Decision::Swap,
        RecordState::Void => Decision::Void,
        RecordState::Job => return Ok(()),
    };
    match decision {
        Decision::Swap => ops::finish(repo, intent),
        Decision::Void => ops::take_back(repo, intent),
    }
}

/// Leaf over parent is right at every instant of a merge, so one whose leaf
/// nobody serves is simply ended; the collector starts it again. One that was
/// being committed is finished: its leaf was durably empty.
///
/// ```text
///   leaf's name leads to     state        then
///   the parent               -            done but for the record
///   the leaf                 Merging      settle both; the intent goes
///   the leaf                 Committing   unhide the parent, give it the name
///   nothing                  Committing   give the parent the name
/// ```
/// What stepped aside for the parent is empty, and goes.
fn leaf_merge(repo: &Repo, merge: &LeafMergeIntent) -> Result<()> {
    let tap = repo.host.tap(merge.vdi).during(|| format!("tapdisk of VDI {}", merge.vdi))?;
    if tap.is_some() {
        // It serves the leaf and goes on merging or committing by itself.
        return Ok(());
    }
    let (leaf, parent) = (volume_of(&merge.leaf)?, volume_of(&merge.parent)?);
    let swap = merge.name_swap()?;
    match (swap.found(repo)?, merge.state) {
        (Found::Before, state) => {
            if image::footer_of(repo, &leaf)? == Some(merge.leaf.footer) {
                image::settle(repo, &leaf)?;
                image::settle(repo, &parent)?;
                if state == LeafMergeState::Committing {
                    take_name(repo, &leaf, &parent, &swap)?;
                }
            }
        }
        (Found::Between, LeafMergeState::Committing) => {
            named(repo, &swap)?;
            image::settle(repo, &leaf)?;
        }
        (Found::Done, _) => {
            repo.volumes.sync("leaf merge: name").during(|| format!("name {leaf}"))?;
            image::settle(repo, &leaf)?;
        }
        // It was deleted.
        (Found::Between, LeafMergeState::Merging) => {}
    }
    swap.drop_aside(repo)?;
    let name = RecordName { id: merge.id, state: RecordState::Job };
    journal::remove(repo.volumes.as_ref(), name, "leaf merge: record cleared")
}

fn take_name(repo: &Repo, leaf: &VolumeName, parent: &VolumeName, swap: &NameSwap) -> Result<()> {
    if image::allocated_bytes(repo, leaf)? != 0 {
        let reason = "its merge was being committed, but it is not empty".into();
        return Err(Error::BadImage { volume: leaf.clone(), reason });
    }
    image::set_hidden(repo, parent, false)?;
    named(repo, swap)
}

fn named(repo: &Repo, swap: &NameSwap) -> Result<()> {
    swap.carry_out(repo)?;
    repo.volumes.sync("leaf merge: name").during(|| format!("name {}", swap.over))
}
