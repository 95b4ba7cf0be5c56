//! A disk whose decided swap fails: what is said of it, and how it goes on.

#![allow(clippy::unwrap_used, reason = "a helper of tests fails by panicking")]

mod support;

use sm::Error;
use sm::journal::SiblingKind;
use sm::ops::{self, Wanted};
use support::{FakeHost, Mood, assert_clean, byte, fill, repo};
use uuid::Uuid;
use vhd::storage::sim::SimDisk;
use vhd::units::BLOCK_BYTES;

fn snapshot(repo: &sm::Repo, vdi: Uuid) -> sm::Result<Vec<Uuid>> {
    ops::snapshot(repo, SiblingKind::Snapshot, &[Wanted { vdi, name: "s".into() }])
}

#[test]
fn a_disk_that_cannot_swap_says_so_and_goes_on_when_it_is_asked_again() {
    let disk = SimDisk::new();
    let host = FakeHost::new(disk.new_process().volumes());
    let repo = repo(disk.new_process().volumes(), &host, 1);
    let vdi = ops::create(&repo, "disk", 2 * BLOCK_BYTES).unwrap();
    fill(&repo, vdi, 0, 7);
    ops::attach(&repo, vdi, false).unwrap();
    *host.mood.lock().unwrap() = Mood::Stuck;
    // It is decided, and will happen: whoever asked must not ask for another.
    let refused = snapshot(&repo, vdi).unwrap_err();
    assert!(!refused.is_busy());
    assert_eq!(refused.code(), "IO_ERROR");
    let text = refused.to_string();
    assert!(text.contains(&vdi.to_string()) && text.contains("no space"), "{text}");
    assert!(refused.next().unwrap().contains("make room"));
    // Others wait for it, and may have it tried again.
    assert!(snapshot(&repo, vdi).unwrap_err().is_busy());
    assert!(matches!(ops::unstick(&repo, vdi), Err(Error::Stuck { .. })));
    let elsewhere = ops::create(&repo, "other", 2 * BLOCK_BYTES).unwrap();
    snapshot(&repo, elsewhere).unwrap();
    ops::unstick(&repo, elsewhere).unwrap();

    *host.mood.lock().unwrap() = Mood::Willing;
    ops::unstick(&repo, vdi).unwrap();
    let second = snapshot(&repo, vdi).unwrap();
    assert_eq!(byte(&repo, vdi, 0), 7);
    ops::detach(&repo, vdi, false).unwrap();
    let tree = sm::scan::scan(&repo).unwrap().tree;
    let is_of_disk =
        |uuid: &Uuid| repo.labels.get(*uuid).unwrap().is_some_and(|l| l.snapshot_of == Some(vdi));
    let snapshots: Vec<Uuid> = tree.nodes.iter().map(|node| node.uuid).filter(is_of_disk).collect();
    assert_eq!(snapshots.len(), 2);
    assert!(snapshots.contains(&second[0]));
    snapshots.iter().for_each(|snapshot| assert_eq!(byte(&repo, *snapshot, 0), 7));
    assert_clean(&repo);
}
