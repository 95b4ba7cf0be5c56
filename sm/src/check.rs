//! Reads all metadata of an SR and says what is wrong, changing nothing.
//!
//! ```text
//!   broken      cannot be used, each with its exact reasons and the disks it
//!               takes with it
//!   unsettled   its writer died: whole again once it is attached
//!   in use      written right now; only its headers were looked at
//!   orphans     nothing stands on them; the collector deletes them
//!   leftovers   other files: of the reference, of ours, of strangers
//!   half_done   records in the journal
//! ```
//!
//! Images are read without a lock. One that seems wrong is looked at again:
//! if an operation has taken hold of it meanwhile it is in use, not broken.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde::Serialize;
use uuid::Uuid;
use vhd::check::Options;
use vhd::meta::{FooterState, Meta};
use vhd::storage::{Access, Fs, VolumeName};

use crate::error::{IoContext, Result};
use crate::journal::{self, Intent, JobState, RecordState, Stored};
use crate::lease::Lease;
use crate::reference::Leftover;
use crate::repo::Repo;
use crate::scan;
use crate::tree::{Broken, Node, NodeIx, VdiTree};

/// What a check found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct CheckReport {
    /// Nothing is broken.
    pub sound: bool,
    /// Images looked at.
    pub images: usize,
    /// Images that cannot be used.
    pub broken: Vec<BrokenImage>,
    /// Volumes whose writer died.
    pub unsettled: Vec<String>,
    /// Volumes that are written right now.
    pub in_use: Vec<Remark>,
    /// Hidden images on which nothing stands.
    pub orphans: Vec<Remark>,
    /// Files that are no images of a tree.
    pub leftovers: Vec<Remark>,
    /// Records in the journal.
    pub half_done: Vec<Remark>,
}

/// An image that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct BrokenImage {
    /// Its volume.
    pub volume: String,
    /// The VDI or hidden node.
    pub uuid: Uuid,
    /// Its name, if it has one.
    pub name: String,
    /// Exactly why, the first thing first.
    pub reasons: Vec<String>,
    /// Disks and snapshots that stand on it, and so cannot be used either.
    pub takes_with_it: Vec<Uuid>,
}

/// Something, and what it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Remark {
    /// A volume, a file or a record.
    pub what: String,
    /// What it is, and what becomes of it.
    pub why: String,
}

fn remark(what: impl ToString, why: impl Into<String>) -> Remark {
    Remark { what: what.to_string(), why: why.into() }
}

/// Checks the SR in the folder `fs`.
///
/// # Errors
/// The SR or its journal cannot be read. Broken images are no error.
pub fn check(repo: &Repo, fs: &dyn Fs) -> Result<CheckReport> {
    let found = scan::scan(repo)?;
    let labels = repo.labels.all()?;
    let busy = Busy::now(repo)?;
    let nodes: Vec<&Node> = found.tree.nodes.iter().filter(|node| !node.volume.is_raw()).collect();
    let looks = look_at_all(repo, &nodes, &busy);
    let still_busy = Busy::now(repo)?;
    let mut report = CheckReport { images: found.tree.nodes.len(), ..CheckReport::default() };
    for (node, look) in nodes.into_iter().zip(looks) {
        let busy = busy.reason(node).or_else(|| still_busy.reason(node));
        if let Some(reason) = busy {
            report.in_use.push(remark(&node.volume, reason));
        } else if look.unsettled && node.broken().is_none() && look.problems.is_empty() {
            report.unsettled.push(node.volume.to_string());
        }
        let reasons = reasons(node, &look, busy.is_some());
        if !reasons.is_empty() {
            let name = labels.get(&node.uuid).map(|label| label.name.clone()).unwrap_or_default();
            let takes_with_it = standing_on(&found.tree, node);
            let volume = node.volume.to_string();
            report.broken.push(BrokenImage { volume, uuid: node.uuid, name, reasons, takes_with_it });
        }
    }
    report.sound = report.broken.is_empty();
    report.orphans = orphans(&found.tree);
    report.half_done = found.intents.iter().map(half_done).collect();
    report.leftovers = leftovers(repo, fs, &found.tree, &found.intents)?;
    let gone = labels.keys().filter(|vdi| found.tree.by_uuid(**vdi).is_none());
    report.leftovers.extend(
        gone.map(|vdi| remark(vdi, "a name in the catalog without an image: the next scan drops it")),
    );
    Ok(report)
}

/// What is held by somebody who may write it.
struct Busy {
    leases: Vec<Lease>,
    intents: Vec<Stored>,
}

impl Busy {
    fn now(repo: &Repo) -> Result<Self> {
        // Read without the lock: one that is being made counts at the second
        // look.
        let leases = repo.host.leases().during(|| "leases".into())?;
        Ok(Self { leases, intents: journal::load(repo.volumes.as_ref())? })
    }

    fn reason(&self, node: &Node) -> Option<&'static str> {
        let key = if node.footer.is_nil() { node.uuid } else { node.footer };
        let writes = |lease: &Lease| {
            !lease.read_only && lease.chain.first().is_some_and(|leaf| leaf.footer == node.footer)
        };
        if self.leases.iter().any(writes) {
            return Some("attached: its tapdisk writes it");
        }
        let claimed = self.intents.iter().any(|stored| stored.intent.names(&node.volume, key));
        claimed.then_some("an operation or a merge works on it")
    }
}

/// What one image showed.
#[derive(Debug, Default)]
struct Seen {
    problems: Vec<String>,
    unsettled: bool,
}

fn look_at_all(repo: &Repo, nodes: &[&Node], busy: &Busy) -> Vec<Seen> {
    let next = AtomicUsize::new(0);
    let seen: Mutex<BTreeMap<usize, Seen>> = Mutex::default();
    std::thread::scope(|scope| {
        for _ in 0..repo.limits.scan_threads.clamp(1, nodes.len().max(1)) {
            scope.spawn(|| {
                loop {
                    let at = next.fetch_add(1, Ordering::Relaxed);
                    let Some(node) = nodes.get(at) else { break };
                    let look = if busy.reason(node).is_some() { Seen::default() } else { look(repo, node) };
                    seen.lock().unwrap_or_else(std::sync::PoisonError::into_inner).insert(at, look);
                }
            });
        }
    });
    seen.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner).into_values().collect()
}

fn look(repo: &Repo, node: &Node) -> Seen {
    let opened = match repo.volumes.open(&node.volume, Access::Read) {
        Ok(opened) => opened,
        // Deleted meanwhile.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Seen::default(),
        Err(error) => return Seen { problems: vec![error.to_string()], unsettled: false },
    };
    let options = Options { allow_bad_end: true, ..Options::default() };
    let problems = match vhd::check::check(opened.as_ref(), &options) {
        Ok(report) => report.problems.iter().map(ToString::to_string).collect(),
        Err(error) => vec![error.to_string()],
    };
    let meta = Meta::read(opened.as_ref());
    let unsettled = meta.is_ok_and(|meta| meta.footer_state != FooterState::Settled);
    // Without its last footer an image may well lack its whole BATmap.
    Seen { problems: if unsettled { Vec::new() } else { problems }, unsettled }
}

fn reasons(node: &Node, look: &Seen, busy: bool) -> Vec<String> {
    let mut reasons = Vec::new();
    match node.broken() {
        // Named at its ancestor.
        Some(Broken::OnBroken { .. }) | None => {}
        Some(broken) => reasons.push(broken.to_string()),
    }
    if !busy {
        reasons.extend(
            look.problems.iter().filter(|problem| !reasons.contains(problem)).cloned().collect::<Vec<_>>(),
        );
    }
    reasons
}

fn standing_on(tree: &VdiTree, node: &Node) -> Vec<Uuid> {
    let mut found = Vec::new();
    let mut seen: BTreeSet<NodeIx> = BTreeSet::new();
    let mut waiting = node.children.clone();
    while let Some(ix) = waiting.pop() {
        if !seen.insert(ix) {
            continue;
        }
        let child = &tree.nodes[ix];
        if !child.is_hidden() {
            found.push(child.uuid);
        }
        waiting.extend(&child.children);
    }
    found.sort_unstable();
    found
}

fn orphans(tree: &VdiTree) -> Vec<Remark> {
    let garbage = tree.nodes.iter().filter(|node| {
        node.is_hidden() && node.children.is_empty() && tree.prepared_on(node).next().is_none()
    });
    let waits = tree.parents_unknown().next().map(|(volume, _)| volume.clone());
    garbage
        .map(|node| match &waits {
            None => remark(&node.volume, "hidden, and nothing stands on it: the collector deletes it"),
            Some(broken) => {
                let why = format!("hidden, and nothing readable stands on it; {broken} might, so it stays");
                remark(&node.volume, why)
            }
        })
        .collect()
}

fn half_done(stored: &Stored) -> Remark {
    let why = match (&stored.intent, stored.name.state) {
        (Intent::Snapshot(intent), RecordState::Decided) => {
            format!("a snapshot of {} disks that is decided: it is finished", intent.members.len())
        }
        (Intent::Snapshot(intent), _) => {
            format!("a snapshot of {} disks: it is taken back unless it was decided", intent.members.len())
        }
        (Intent::Inner(intent), _) => {
            let state = match intent.state {
                JobState::Copying => "copying",
                JobState::Relinking { .. } => "relinking",
                JobState::Refreshing => "waiting for readers",
                JobState::Deleting => "deleting what was merged",
            };
            format!("a merge into {}, {state}: the collector goes on", intent.parent.volume)
        }
        (Intent::LeafMerge(intent), _) => {
            format!("a merge of the disk {} into its parent: it goes on or is ended", intent.vdi)
        }
        (Intent::Make(_), _) => "a disk being filled: it is taken back unless it was complete".to_owned(),
        (Intent::Resize(_), _) => "a resize: it is finished".to_owned(),
        (Intent::Revert(_), _) => "a revert: it is finished or taken back".to_owned(),
    };
    remark(stored.name, why)
}

fn leftovers(repo: &Repo, fs: &dyn Fs, tree: &VdiTree, intents: &[Stored]) -> Result<Vec<Remark>> {
    let names = fs.list("").during(|| format!("list SR {}", repo.name))?;
    let mut remarks = Vec::new();
    for name in names {
        if let Some(leftover) = Leftover::of(&name) {
            remarks.push(remark(&name, leftover.explain()));
            continue;
        }
        let volume = VolumeName::new(&name);
        if volume.as_ref().is_some_and(|volume| tree.by_volume(volume).is_some()) {
            continue;
        }
        match volume.as_ref().and_then(VolumeName::temporary_of) {
            Some(id) if intents.iter().any(|stored| stored.name.id == id) => {}
            Some(_) => remarks
                .push(remark(&name, "a temporary of ours that no record names: the next scan deletes it")),
            None if tree.prepared.iter().any(|image| Some(&image.volume) == volume.as_ref()) => {}
            None => remarks.push(remark(&name, "not ours: never touched")),
        }
    }
    Ok(remarks)
}
