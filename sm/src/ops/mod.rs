//! VDI operations, one file each.
//!
//! All are blocking functions over a [`Repo`]: no process, socket, clock or
//! file is touched but through it, so that the crash simulator runs them
//! whole. Each begins by recovering what an earlier one left half done on the
//! same tree.

mod attach;
mod changed;
mod copy;
mod create;
mod delete;
mod export;
mod import;
mod import_whole;
mod map;
mod rename;
mod resize;
mod revert;
mod snapshot;
mod snapshot_steps;
mod stat;
mod unstick;

pub(crate) use attach::relink;
pub use attach::{Attached, How, adopt, attach, attach_as, detach, revive, settle_all};
pub use changed::{Changed, ChangedRange, changed};
pub use copy::copy;
pub use create::{VIRTUAL_BYTES_MIN, create};
pub use delete::{Deleted, delete};
pub use export::{Format, export};
pub use import::{Wanted as ImportWanted, import};
pub use map::{Map, MapExtent, map};
pub use rename::rename;
pub(crate) use resize::recover as recover_resize;
pub use resize::resize;
pub(crate) use revert::recover as recover_revert;
pub use revert::revert;
pub(crate) use snapshot::Filled;
pub use snapshot::{Wanted, snapshot, snapshot_watched};
pub(crate) use snapshot_steps::{Decision, decide, finish, swap_begun, take_back};
pub use stat::{Stat, stat};
pub use unstick::unstick;

use uuid::Uuid;

use crate::chain::{self, Link};
use crate::error::{Error, IoContext, Result};
use crate::host::Guard;
use crate::journal::{self, Intent, LeafMergeIntent, Stored};
use crate::lease::{Lease, Reader};
use crate::limits::LABEL_BYTES_MAX;
use crate::recover;
use crate::repo::Repo;
use crate::scan;

/// Times somebody who reads for a purpose that can wait is asked to leave.
const ROOM_ATTEMPTS_MAX: u32 = 3;

/// The SR, locked, with everything half done on some VDIs' trees recovered.
pub(crate) struct Locked {
    /// The SR lock; dropped last.
    _guard: Guard,
    /// Live leases.
    pub leases: Vec<Lease>,
    /// What is still half done: operations under way, and the collector's.
    pub intents: Vec<Stored>,
}

impl Locked {
    /// The lease of the tapdisk that serves a VDI.
    pub fn lease(&self, vdi: Uuid) -> Option<&Lease> {
        self.leases.iter().find(|lease| lease.serves(vdi))
    }

    /// Refuses with [`Error::Busy`] between the death of a VDI's tapdisk and
    /// its return: guests still have the disk, as it was.
    pub fn no_revival(&self, repo: &Repo, vdi: Uuid) -> Result<()> {
        let wanted = repo.host.wanted_one(vdi).during(|| format!("run folder of VDI {vdi}"))?;
        if wanted.is_some() && self.lease(vdi).is_none() {
            let reason = format!("the tapdisk of VDI {vdi} died and is being brought back");
            return Err(Error::Busy { reason });
        }
        Ok(())
    }

    /// Refuses with [`Error::Held`] while the VDI's leaf is being copied: it
    /// must not change then.
    pub fn nobody_copies(&self, vdi: Uuid, leaf: &Link) -> Result<()> {
        let copies = |lease: &&Lease| {
            let top = lease.chain.first();
            lease.reader != Reader::Tapdisk && top.is_some_and(|top| top.footer == leaf.head.footer)
        };
        match self.leases.iter().find(copies) {
            Some(lease) => {
                let reason = format!("it is being copied or exported, process {}", lease.pid);
                Err(Error::Held {
                    what: format!("VDI {vdi}"),
                    reason,
                    next: "wait until the copy or export has ended, or cancel it",
                })
            }
            None => Ok(()),
        }
    }

    /// Refuses with [`Error::Busy`] when an operation that names the VDI's
    /// leaf is under way; merges are another matter.
    pub fn no_operation_on(&self, leaf: &Link) -> Result<()> {
        let names = |stored: &&Stored| {
            !stored.intent.is_merge() && stored.intent.names(&leaf.volume, leaf.head.footer)
        };
        match self.intents.iter().find(names) {
            Some(stored) => {
                let (what, id) = (stored.intent.word(), stored.name.id);
                Err(Error::Busy { reason: format!("{what} ({id}) is under way") })
            }
            None => Ok(()),
        }
    }

    /// The merge of this leaf into its parent, if there is one.
    pub fn leaf_merge(&self, leaf: &Link) -> Option<&LeafMergeIntent> {
        self.intents.iter().find_map(|stored| match &stored.intent {
            Intent::LeafMerge(merge) if stored.intent.names(&leaf.volume, leaf.head.footer) => Some(merge),
            _ => None,
        })
    }
}

/// Does what is refused while somebody reads the VDI, once those have left who
/// read it for a purpose that can wait. One who comes between is asked anew.
pub(crate) fn with_room<T>(repo: &Repo, vdi: Uuid, work: impl Fn() -> Result<T>) -> Result<T> {
    for _ in 0..ROOM_ATTEMPTS_MAX {
        match work() {
            Err(Error::Held { .. })
                if repo.host.ask_to_leave(vdi).during(|| format!("readers of VDI {vdi}"))? => {}
            other => return other,
        }
    }
    work()
}

/// Takes the SR lock and recovers what concerns `vdis`.
pub(crate) fn lock(repo: &Repo, vdis: &[Uuid]) -> Result<Locked> {
    let guard = repo.host.lock_sr().during(|| format!("lock of SR {}", repo.name))?;
    recover::recover(repo, recover::Scope::Vdis(vdis))?;
    let leases = repo.host.leases().during(|| "leases".into())?;
    let intents = journal::load(repo.volumes.as_ref())?;
    Ok(Locked { _guard: guard, leases, intents })
}

/// The chain of a VDI that guests may see.
pub(crate) fn visible_chain(repo: &Repo, vdi: Uuid) -> Result<Vec<Link>> {
    let chain = chain::read(repo, vdi)?;
    if chain[0].head.hidden {
        return Err(Error::NotFound { what: format!("VDI {vdi}: it is a hidden node") });
    }
    Ok(chain)
}

/// Refuses with [`Error::Held`] if other images stand on that of a VDI:
/// trees of others' making. Seen without the lock, as none of our operations
/// gives a visible node children.
pub(crate) fn no_children(repo: &Repo, vdis: &[Uuid]) -> Result<()> {
    let tree = scan::scan(repo)?.tree;
    for vdi in vdis {
        if tree.by_uuid(*vdi).is_some_and(|ix| !tree.nodes[ix].children.is_empty()) {
            let reason = "other disks stand on its image".into();
            return Err(Error::Held {
                what: format!("VDI {vdi}"),
                reason,
                next: "delete those disks first, or work on a clone of this one",
            });
        }
    }
    Ok(())
}

/// Refuses a label no table could show.
pub(crate) fn check_label(text: &str) -> Result<()> {
    if text.len() > LABEL_BYTES_MAX || text.chars().any(char::is_control) {
        let reason = format!("a name has at most {LABEL_BYTES_MAX} bytes and no control characters");
        return Err(Error::BadRequest { reason });
    }
    Ok(())
}
