//! Volumes that take each other's names in two steps: between them nothing
//! has a disk's name. It is there all the same, and whoever asks for it is
//! told to wait, not that there is no such disk.

#![allow(clippy::unwrap_used, reason = "a helper of tests fails by panicking")]

mod support;

use std::sync::Arc;

use sm::catalog::Labels;
use sm::host::Host;
use sm::journal::{self, SiblingKind};
use sm::ops::{self, Wanted};
use sm::views::Look;
use sm::{Error, Repo, scan};
use support::{FakeHost, assert_clean, byte, fill, repo};
use uuid::Uuid;
use vhd::storage::sim::SimDisk;
use vhd::storage::{Access, VolumeName};
use vhd::units::BLOCK_BYTES;

struct World {
    disk: SimDisk,
    host: FakeHost,
    labels: Arc<dyn Labels>,
    vdi: Uuid,
    snapshot: Uuid,
}

impl World {
    /// A disk that holds 2, and a snapshot of it that holds 1.
    fn new() -> Self {
        let disk = SimDisk::with_devices(7, &[]);
        let host = FakeHost::new(disk.new_process().volumes());
        let repo = repo(disk.new_process().volumes(), &host, 1);
        let vdi = ops::create(&repo, "disk", 2 * BLOCK_BYTES).unwrap();
        fill(&repo, vdi, 0, 1);
        let snapshot = take(&repo, SiblingKind::Snapshot, vdi).unwrap();
        fill(&repo, vdi, 0, 2);
        Self { disk, host, labels: repo.labels, vdi, snapshot }
    }

    /// The SR as another process has it.
    fn repo(&self, process: &SimDisk, number: u64) -> Repo {
        Repo { labels: self.labels.clone(), ..repo(process.volumes(), &self.host, number) }
    }
}

fn take(repo: &Repo, kind: SiblingKind, vdi: Uuid) -> sm::Result<Uuid> {
    Ok(ops::snapshot(repo, kind, &[Wanted { vdi, name: "s".into() }])?[0])
}

type Operation = fn(&Repo, &World) -> sm::Result<()>;

const SWAPPING: [Operation; 3] = [
    |repo, world| take(repo, SiblingKind::Snapshot, world.vdi).map(drop),
    |repo, world| take(repo, SiblingKind::Clone, world.vdi).map(drop),
    |repo, world| ops::revert(repo, world.vdi, world.snapshot),
];

/// Everything one may ask of a disk.
const ASKING: [(&str, Operation); 8] = [
    ("snapshot", |repo, world| take(repo, SiblingKind::Snapshot, world.vdi).map(drop)),
    ("rename", |repo, world| ops::rename(repo, world.vdi, Some("new"), None)),
    ("delete", |repo, world| ops::delete(repo, world.vdi).map(drop)),
    ("resize", |repo, world| ops::resize(repo, world.vdi, 4 * BLOCK_BYTES).map(drop)),
    ("revert", |repo, world| ops::revert(repo, world.vdi, world.snapshot)),
    ("attach", |repo, world| ops::attach(repo, world.vdi, false).map(drop)),
    ("map", |repo, world| ops::map(repo, world.vdi, 0, None).map(drop)),
    ("changed", |repo, world| ops::changed(repo, world.vdi, world.snapshot, 0).map(drop)),
];

/// A world in which whoever did `operation` stands between the two steps, and
/// a repository of another process.
fn between(operation: Operation) -> (World, Repo) {
    for changes in 0..1000 {
        let world = World::new();
        let first = world.disk.new_process();
        first.kill_process_after(changes);
        let _ = operation(&world.repo(&first, 2), &world);
        assert!(!first.is_alive(), "it was never between the two");
        let other = world.repo(&world.disk.new_process(), 3);
        let name = VolumeName::vhd(world.vdi);
        if other.volumes.open(&name, Access::Read).is_err() {
            return (world, other);
        }
    }
    panic!("it does not end");
}

#[test]
fn a_disk_without_a_name_for_a_moment_is_busy_and_not_unknown() {
    for operation in SWAPPING {
        for (word, asking) in ASKING {
            let (world, repo) = between(operation);
            let id = journal::load(repo.volumes.as_ref()).unwrap()[0].name.id;
            // Whoever does it lives, and only takes his time.
            let held = world.host.hold_intent(id).unwrap();
            assert!(held.is_some());
            let refused = asking(&repo, &world).unwrap_err();
            assert!(matches!(refused, Error::Busy { .. }), "{word}: {refused}");
            assert!(refused.to_string().contains(&id.to_string()), "{word}: {refused}");
        }
    }
}

#[test]
fn a_disk_without_a_name_for_a_moment_is_shown() {
    for operation in SWAPPING {
        let (world, repo) = between(operation);
        let shown = Look::of(&repo, world.vdi).unwrap().one(world.vdi).unwrap();
        assert_eq!((shown.broken, shown.virtual_size), (None, 2 * BLOCK_BYTES));
        assert!(Look::at(&repo).unwrap().vdis(false).iter().any(|vdi| vdi.uuid == world.vdi));
        let tree = scan::scan(&repo).unwrap().tree;
        assert!(tree.nodes.iter().all(|node| node.broken().is_none()), "{tree:?}");
        let roots: Vec<&VolumeName> = tree.roots.iter().map(|ix| &tree.nodes[*ix].volume).collect();
        assert_eq!(roots.len(), 1, "{roots:?}");
    }
}

#[test]
fn a_disk_whose_swap_died_between_the_two_steps_is_recovered_by_the_next_operation() {
    for (nth, operation) in SWAPPING.into_iter().enumerate() {
        let (world, repo) = between(operation);
        take(&repo, SiblingKind::Snapshot, world.vdi).unwrap();
        assert_eq!(byte(&repo, world.vdi, 0), if nth == 2 { 1 } else { 2 });
        assert_clean(&repo);
    }
}
