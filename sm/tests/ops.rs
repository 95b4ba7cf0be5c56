//! Operations on VDIs, over a folder on disk, with tapdisks that only know
//! how to pause, swap and settle.

#![allow(clippy::unwrap_used, reason = "a helper of tests fails by panicking")]

mod support;

use sm::journal::{
    self, ImageRef, InnerIntent, Intent, JobState, LeafMergeIntent, LeafMergeState, SiblingKind,
};
use sm::ops::{self, Deleted, Wanted};
use sm::reading::Reading;
use sm::recover::{self, Scope};
use sm::tree::NodeState;
use sm::{Repo, image, scan};
use support::folder::{Sr, sr};
use support::{Mood, assert_clean, byte, fill, volumes};
use uuid::Uuid;
use vhd::storage::VolumeName;
use vhd::units::BLOCK_BYTES;

fn disk(sr: &Sr) -> Uuid {
    ops::create(&sr.repo, "disk", 4 * BLOCK_BYTES).unwrap()
}

fn one(repo: &Repo, kind: SiblingKind, vdi: Uuid) -> sm::Result<Uuid> {
    let wanted = [Wanted { vdi, name: "sibling".into() }];
    ops::snapshot(repo, kind, &wanted).map(|made| made[0])
}

fn depth(repo: &Repo, vdi: Uuid) -> u32 {
    let tree = scan::scan(repo).unwrap().tree;
    tree.nodes[tree.by_uuid(vdi).unwrap()].depth
}

#[test]
fn a_snapshot_keeps_what_was_and_the_leaf_goes_on() {
    for attached in [false, true] {
        let sr = sr();
        let vdi = disk(&sr);
        fill(&sr.repo, vdi, 0, 0x11);
        if attached {
            ops::attach(&sr.repo, vdi, false).unwrap();
        }
        let snapshot = one(&sr.repo, SiblingKind::Snapshot, vdi).unwrap();
        fill(&sr.repo, vdi, 0, 0x22);
        assert_eq!((byte(&sr.repo, vdi, 0), byte(&sr.repo, snapshot, 0)), (0x22, 0x11));
        assert_eq!((depth(&sr.repo, vdi), depth(&sr.repo, snapshot)), (2, 2));
        let tree = scan::scan(&sr.repo).unwrap().tree;
        let base = tree.nodes.iter().find(|node| node.is_hidden()).unwrap();
        assert!(image::is_base(&sr.repo, &base.volume).unwrap());
        assert_clean(&sr.repo);
        let label = sr.repo.labels.get(snapshot).unwrap().unwrap();
        assert_eq!((label.snapshot_of, label.read_only), (Some(vdi), true));
        let leases = sr.host.leases.lock().unwrap();
        assert_eq!(leases.len(), usize::from(attached));
        for lease in &*leases {
            assert!(lease.names(&base.volume, base.footer), "the lease names the new base");
        }
    }
}

#[test]
fn the_snapshot_of_an_empty_leaf_adds_no_node() {
    for attached in [false, true] {
        let sr = sr();
        let vdi = disk(&sr);
        if attached {
            ops::attach(&sr.repo, vdi, false).unwrap();
        }
        let root = one(&sr.repo, SiblingKind::Clone, vdi).unwrap();
        assert_eq!((depth(&sr.repo, vdi), depth(&sr.repo, root)), (1, 1));
        fill(&sr.repo, vdi, 0, 0x11);
        let first = one(&sr.repo, SiblingKind::Snapshot, vdi).unwrap();
        let second = one(&sr.repo, SiblingKind::Snapshot, vdi).unwrap();
        assert_eq!((depth(&sr.repo, first), depth(&sr.repo, second)), (2, 2));
        assert_eq!(byte(&sr.repo, second, 0), 0x11);
        assert_eq!(volumes(&sr.repo).len(), 5, "disk, clone, base, two snapshots");
        assert_clean(&sr.repo);
    }
}

#[test]
fn a_leaf_written_just_before_the_pause_is_divided() {
    let sr = sr();
    let vdi = disk(&sr);
    ops::attach(&sr.repo, vdi, false).unwrap();
    *sr.host.mood.lock().unwrap() = Mood::WritesFirst;
    let snapshot = one(&sr.repo, SiblingKind::Snapshot, vdi).unwrap();
    assert_eq!((depth(&sr.repo, vdi), byte(&sr.repo, snapshot, 0)), (2, 0xEE));
    assert_clean(&sr.repo);
}

#[test]
fn what_cannot_pause_is_taken_back_whole() {
    for mood in [Mood::Refuses, Mood::TimesOut] {
        let sr = sr();
        let (a, b) = (disk(&sr), disk(&sr));
        for vdi in [a, b] {
            fill(&sr.repo, vdi, 0, 0x11);
        }
        ops::attach(&sr.repo, b, false).unwrap();
        let before = volumes(&sr.repo);
        *sr.host.mood.lock().unwrap() = mood;
        let wanted = [a, b].map(|vdi| Wanted { vdi, name: "s".into() });
        let error = ops::snapshot(&sr.repo, SiblingKind::Snapshot, &wanted).unwrap_err();
        assert_eq!(error.code(), "BUSY", "{error}");
        assert_eq!(volumes(&sr.repo), before);
        assert_clean(&sr.repo);
        *sr.host.mood.lock().unwrap() = Mood::Willing;
        assert_eq!(ops::snapshot(&sr.repo, SiblingKind::Snapshot, &wanted).unwrap().len(), 2);
        assert_clean(&sr.repo);
    }
}

#[test]
fn chains_end_at_the_limit_before_anything_changes() {
    let mut sr = sr();
    sr.repo.limits.chain_max = 3;
    let vdi = disk(&sr);
    for round in 0..2 {
        fill(&sr.repo, vdi, round, 0x11);
        one(&sr.repo, SiblingKind::Snapshot, vdi).unwrap();
    }
    fill(&sr.repo, vdi, 3, 0x11);
    let before = volumes(&sr.repo);
    let error = one(&sr.repo, SiblingKind::Clone, vdi).unwrap_err();
    assert_eq!(error.code(), "CHAIN_TOO_LONG");
    assert_eq!(volumes(&sr.repo), before);
}

#[test]
fn nonsense_is_refused() {
    let sr = sr();
    let vdi = disk(&sr);
    let snapshot = |vdis: &[Uuid]| {
        let wanted: Vec<_> = vdis.iter().map(|&vdi| Wanted { vdi, name: "s".into() }).collect();
        ops::snapshot(&sr.repo, SiblingKind::Snapshot, &wanted).unwrap_err().code()
    };
    assert_eq!(snapshot(&[]), "BAD_REQUEST");
    assert_eq!(snapshot(&[vdi, vdi]), "BAD_REQUEST");
    assert_eq!(snapshot(&[Uuid::from_u128(5)]), "NOT_FOUND");
    assert_eq!(ops::create(&sr.repo, "x", 0).unwrap_err().code(), "BAD_SIZE");
    assert_eq!(ops::create(&sr.repo, "a\nb", 1).unwrap_err().code(), "BAD_REQUEST");
    assert_eq!(ops::delete(&sr.repo, Uuid::from_u128(5)).unwrap_err().code(), "NOT_FOUND");
    assert_clean(&sr.repo);
}

#[test]
fn deleting_takes_leaves_and_nothing_else() {
    let sr = sr();
    let vdi = disk(&sr);
    fill(&sr.repo, vdi, 0, 0x11);
    let snapshot = one(&sr.repo, SiblingKind::Snapshot, vdi).unwrap();
    let tree = scan::scan(&sr.repo).unwrap().tree;
    let base = tree.nodes.iter().find(|node| node.is_hidden()).unwrap().uuid;
    assert_eq!(ops::delete(&sr.repo, base).unwrap_err().code(), "NOT_FOUND");
    ops::attach(&sr.repo, vdi, false).unwrap();
    assert_eq!(ops::delete(&sr.repo, vdi).unwrap_err().code(), "IN_USE");
    assert_eq!(ops::delete(&sr.repo, snapshot).unwrap(), Deleted::Gone);
    assert!(ops::detach(&sr.repo, vdi, false).unwrap());
    assert!(!ops::detach(&sr.repo, vdi, false).unwrap());
    assert_eq!(byte(&sr.repo, vdi, 0), 0x11);
    assert_eq!(ops::delete(&sr.repo, vdi).unwrap(), Deleted::Gone);
    let tree = scan::scan(&sr.repo).unwrap().tree;
    assert_eq!(tree.nodes.len(), 1, "the base waits for the collector");
    assert_eq!(sr.repo.labels.all().unwrap().len(), 0);
}

#[test]
fn snapshots_are_attached_for_reading_only() {
    let sr = sr();
    let vdi = disk(&sr);
    fill(&sr.repo, vdi, 0, 0x11);
    let snapshot = one(&sr.repo, SiblingKind::Snapshot, vdi).unwrap();
    assert_eq!(ops::attach(&sr.repo, snapshot, false).unwrap_err().code(), "READ_ONLY");
    assert!(ops::attach(&sr.repo, snapshot, true).unwrap().fresh);
    assert!(!ops::attach(&sr.repo, snapshot, true).unwrap().fresh);
    // Empty and only read: a clone of it needs no pause.
    let clone = one(&sr.repo, SiblingKind::Clone, snapshot).unwrap();
    assert_eq!((depth(&sr.repo, clone), byte(&sr.repo, clone, 0)), (2, 0x11));
    assert!(ops::attach(&sr.repo, clone, false).unwrap().fresh);
    assert_eq!(ops::attach(&sr.repo, clone, true).unwrap_err().code(), "IN_USE");
}

#[test]
fn stat_tells_own_from_shared() {
    let sr = sr();
    let vdi = disk(&sr);
    fill(&sr.repo, vdi, 0, 0x11);
    let snapshot = one(&sr.repo, SiblingKind::Snapshot, vdi).unwrap();
    fill(&sr.repo, vdi, 1, 0x11);
    let stat = ops::stat(&sr.repo, vdi).unwrap();
    assert_eq!((stat.own_bytes, stat.shared_bytes), (BLOCK_BYTES, BLOCK_BYTES));
    assert_eq!(stat.freed_if_deleted_bytes, BLOCK_BYTES);
    ops::delete(&sr.repo, snapshot).unwrap();
    let stat = ops::stat(&sr.repo, vdi).unwrap();
    assert_eq!((stat.shared_bytes, stat.freed_if_deleted_bytes), (0, 2 * BLOCK_BYTES));
}

#[test]
fn an_attach_writes_the_parent_a_merge_has_recorded() {
    let sr = sr();
    let vdi = disk(&sr);
    for round in 0..2 {
        fill(&sr.repo, vdi, round, 0x11);
        one(&sr.repo, SiblingKind::Snapshot, vdi).unwrap();
    }
    let chain = sm::chain::read(&sr.repo, vdi).unwrap();
    let [leaf, node, parent] = chain.as_slice() else { panic!("{chain:?}") };
    let inner = InnerIntent {
        id: Uuid::from_u128(77),
        nodes: vec![node.image_ref()],
        parent: parent.image_ref(),
        state: JobState::Relinking { children: vec![leaf.image_ref()] },
    };
    journal::put(sr.repo.volumes.as_ref(), &Intent::Inner(inner), "test").unwrap();
    ops::attach(&sr.repo, vdi, false).unwrap();
    let chain = sm::chain::read(&sr.repo, vdi).unwrap();
    assert_eq!(chain.len(), 2);
    assert_eq!(chain[1].volume, parent.volume);
    assert_eq!(sr.host.leases.lock().unwrap()[0].chain.len(), 2);
}

/// A leaf over its only parent, with the intent to merge them.
fn merging(sr: &Sr, state: LeafMergeState, fill_leaf: bool) -> (Uuid, LeafMergeIntent) {
    let vdi = disk(sr);
    fill(&sr.repo, vdi, 0, 0x11);
    let snapshot = one(&sr.repo, SiblingKind::Snapshot, vdi).unwrap();
    ops::delete(&sr.repo, snapshot).unwrap();
    if fill_leaf {
        fill(&sr.repo, vdi, 1, 0x22);
    }
    let chain = sm::chain::read(&sr.repo, vdi).unwrap();
    let (leaf, parent) = (chain[0].image_ref(), chain[1].image_ref());
    let merge = LeafMergeIntent { id: Uuid::from_u128(78), vdi, leaf, parent, state };
    let intent = Intent::LeafMerge(merge.clone());
    journal::put(sr.repo.volumes.as_ref(), &intent, "test").unwrap();
    (vdi, merge)
}

#[test]
fn a_leaf_merge_nobody_works_on_ends_or_is_committed() {
    let name = |image: &ImageRef| VolumeName::new(&image.volume).unwrap();

    let moving = sr();
    let (vdi, _) = merging(&moving, LeafMergeState::Merging, true);
    recover::recover(&moving.repo, Scope::Vdis(&[vdi])).unwrap();
    assert_clean(&moving.repo);
    assert_eq!(depth(&moving.repo, vdi), 2);

    // Committing: nothing done, unhidden, renamed.
    for done in 0..3 {
        let sr = sr();
        let (vdi, merge) = merging(&sr, LeafMergeState::Committing, false);
        if done > 0 {
            image::set_hidden(&sr.repo, &name(&merge.parent), false).unwrap();
            let tree = scan::scan(&sr.repo).unwrap().tree;
            let visible = tree.nodes.iter().filter(|node| node.state == NodeState::Visible);
            assert_eq!(visible.count(), 1, "the parent never shows up as a VDI");
        }
        if done > 1 {
            merge.name_swap().unwrap().carry_out(&sr.repo).unwrap();
        }
        recover::recover(&sr.repo, Scope::Vdis(&[vdi])).unwrap();
        assert_clean(&sr.repo);
        assert_eq!((depth(&sr.repo, vdi), byte(&sr.repo, vdi, 0)), (1, 0x11));
        assert_eq!(volumes(&sr.repo).len(), 1);
    }

    // A leaf that is not empty is never renamed over, whatever the record says.
    let wrong = sr();
    let (vdi, _) = merging(&wrong, LeafMergeState::Committing, true);
    let error = recover::recover(&wrong.repo, Scope::Vdis(&[vdi])).unwrap_err();
    assert_eq!(error.code(), "BAD_IMAGE");
    // It blocks its own tree only.
    recover::recover(&wrong.repo, Scope::All).unwrap();
    let other = disk(&wrong);
    ops::attach(&wrong.repo, other, false).unwrap();
}

#[test]
fn a_record_nobody_understands_stops_every_change() {
    let sr = sr();
    let vdi = disk(&sr);
    sr.repo.volumes.put_record("something.else", b"{}", "test").unwrap();
    assert_eq!(ops::attach(&sr.repo, vdi, false).unwrap_err().code(), "BAD_JOURNAL");
    assert_eq!(one(&sr.repo, SiblingKind::Clone, vdi).unwrap_err().code(), "BAD_JOURNAL");
}

#[test]
fn what_is_being_copied_is_not_written_and_not_deleted() {
    let sr = sr();
    let vdi = disk(&sr);
    fill(&sr.repo, vdi, 0, 0x11);
    let reading = Reading::open(&sr.repo, vdi, false).unwrap();
    let read = |reading: &Reading| {
        let mut bytes = [0; 512];
        reading.chain.read_at(&mut bytes, 0).unwrap();
        bytes[0]
    };
    assert_eq!(ops::attach(&sr.repo, vdi, false).unwrap_err().code(), "IN_USE");
    assert_eq!(ops::delete(&sr.repo, vdi).unwrap(), Deleted::Hidden);
    assert_eq!(read(&reading), 0x11);
    assert_eq!(Reading::open(&sr.repo, vdi, false).unwrap_err().code(), "NOT_FOUND");
    assert_eq!(read(&Reading::open(&sr.repo, vdi, true).unwrap()), 0x11);
    drop(reading);
    assert_eq!(*sr.host.leases.lock().unwrap(), []);
}

#[test]
fn a_snapshot_of_what_is_being_copied_changes_nothing_for_the_reader() {
    let sr = sr();
    let vdi = disk(&sr);
    fill(&sr.repo, vdi, 0, 0x11);
    let reading = Reading::open(&sr.repo, vdi, false).unwrap();
    let snapshot = one(&sr.repo, SiblingKind::Snapshot, vdi).unwrap();
    // Its leaf is a new image, which nobody copies.
    ops::attach(&sr.repo, vdi, false).unwrap();
    assert_eq!(Reading::open(&sr.repo, vdi, false).unwrap_err().code(), "IN_USE");
    let mut bytes = [0; 512];
    reading.chain.read_at(&mut bytes, 0).unwrap();
    assert_eq!(bytes[0], 0x11);
    assert!(Reading::open(&sr.repo, snapshot, false).is_ok());
}

#[test]
fn a_detach_is_busy_while_the_tapdisk_is_at_something_and_held_by_clients() {
    let sr = sr();
    let vdi = disk(&sr);
    ops::attach(&sr.repo, vdi, true).unwrap();
    let detach = |mood, force| {
        *sr.host.mood.lock().unwrap() = mood;
        ops::detach(&sr.repo, vdi, force)
    };
    // Over in a moment: to be tried again, by whoever asked.
    assert!(detach(Mood::Occupied, false).unwrap_err().is_busy());
    let held = detach(Mood::HasClients, false).unwrap_err();
    assert_eq!(held.code(), "IN_USE");
    assert!(held.next().unwrap().contains("--force"), "{held}");
    assert!(detach(Mood::HasClients, true).unwrap());
}
