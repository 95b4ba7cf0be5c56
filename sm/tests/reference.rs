//! SR folders as the reference storage manager leaves them when it dies: each
//! is taken over without a byte of any disk changing, twice as well as once.

#![allow(clippy::unwrap_used, reason = "a helper of tests fails by panicking")]

mod support;

use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sm::journal::{self, Intent, JobState, SiblingKind};
use sm::ops::{self, Wanted};
use sm::reference::{Repaired, repair};
use sm::tree::NodeState;
use sm::{Repo, image, scan};
use support::{FakeHost, assert_clean, byte, fill, repo};
use uuid::Uuid;
use vhd::storage::{FileVolumes, PosixFs, VolumeName};
use vhd::units::BLOCK_BYTES;

struct Sr {
    repo: Repo,
    folder: tempfile::TempDir,
}

/// A hidden parent with a disk on it: blocks 0 and 1 in the parent, 1 and 2 in
/// the disk.
struct Pair {
    sr: Sr,
    leaf: Uuid,
    parent: Uuid,
}

fn sr() -> Sr {
    let folder = tempfile::tempdir().unwrap();
    let open = || Arc::new(FileVolumes::new(Arc::new(PosixFs::new(folder.path().to_owned()))));
    let host = FakeHost::new(open());
    Sr { repo: repo(open(), &host, 1), folder }
}

fn snapshot(repo: &Repo, vdi: Uuid) -> Uuid {
    let wanted = [Wanted { vdi, name: "s".into() }];
    ops::snapshot(repo, SiblingKind::Snapshot, &wanted).unwrap()[0]
}

fn parent_of(repo: &Repo, vdi: Uuid) -> Uuid {
    let tree = scan::scan(repo).unwrap().tree;
    tree.nodes[tree.nodes[tree.by_uuid(vdi).unwrap()].parent.unwrap()].uuid
}

fn pair() -> Pair {
    let sr = sr();
    let leaf = ops::create(&sr.repo, "disk", 4 * BLOCK_BYTES).unwrap();
    fill(&sr.repo, leaf, 0, 0x10);
    fill(&sr.repo, leaf, 1, 0x11);
    let s = snapshot(&sr.repo, leaf);
    fill(&sr.repo, leaf, 1, 0x21);
    fill(&sr.repo, leaf, 2, 0x22);
    ops::delete(&sr.repo, s).unwrap();
    let parent = parent_of(&sr.repo, leaf);
    Pair { sr, leaf, parent }
}

fn content(repo: &Repo, vdi: Uuid) -> [u8; 4] {
    [0, 1, 2, 3].map(|block| byte(repo, vdi, block))
}

impl Pair {
    fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.sr.folder.path().join(name)
    }

    fn vhd(&self, uuid: Uuid) -> PathBuf {
        self.path(format!("{uuid}.vhd"))
    }

    fn old(&self) -> PathBuf {
        self.path(format!("OLD_{}.vhd", self.leaf))
    }

    /// As after `merged` of the two blocks went into the parent.
    fn merging(&self, merged: usize) {
        std::fs::write(self.path(format!("leaf_{}", self.leaf)), format!("{}\n", self.parent)).unwrap();
        for (block, byte) in [(1, 0x21), (2, 0x22)].into_iter().take(merged) {
            fill(&self.sr.repo, self.parent, block, byte);
        }
        image::set_hidden(&self.sr.repo, &VolumeName::vhd(self.parent), false).unwrap();
    }

    fn repair(&self) -> Vec<Repaired> {
        repair(&self.sr.repo, &PosixFs::new(self.sr.folder.path().to_owned())).unwrap()
    }

    /// Nothing is left to do, the disk is what it was, and so is the tree.
    fn assert_taken_back(&self) {
        assert_eq!(self.repair(), []);
        let repo = &self.sr.repo;
        assert_eq!(content(repo, self.leaf), [0x10, 0x21, 0x22, 0]);
        let tree = scan::scan(repo).unwrap().tree;
        assert_eq!(tree.nodes.len(), 2);
        assert_eq!(tree.nodes[tree.by_uuid(self.leaf).unwrap()].state, NodeState::Visible);
        assert_eq!(tree.nodes[tree.by_uuid(self.parent).unwrap()].state, NodeState::Hidden);
        assert_clean(repo);
    }
}

#[test]
fn a_leaf_merge_stopped_before_its_renames_is_taken_back() {
    for merged in 0..=2 {
        let pair = pair();
        pair.merging(merged);
        assert_eq!(pair.repair()[0].outcome, Ok("the merge was taken back"));
        pair.assert_taken_back();
    }
}

#[test]
fn a_leaf_merge_stopped_at_any_rename_is_taken_back() {
    for both in [false, true] {
        for empty_journal in [false, true] {
            let pair = pair();
            pair.merging(2);
            std::fs::rename(pair.vhd(pair.leaf), pair.old()).unwrap();
            if both {
                std::fs::rename(pair.vhd(pair.parent), pair.vhd(pair.leaf)).unwrap();
                let old = VolumeName::new(&format!("OLD_{}.vhd", pair.leaf)).unwrap();
                image::set_hidden(&pair.sr.repo, &old, true).unwrap();
            }
            if empty_journal {
                std::fs::write(pair.path(format!("leaf_{}", pair.leaf)), "").unwrap();
            }
            assert_eq!(pair.repair()[0].outcome, Ok("the merge was taken back"), "{both} {empty_journal}");
            pair.assert_taken_back();
        }
    }
}

#[test]
fn a_leaf_merge_that_is_done_loses_its_emptied_leaf() {
    let pair = pair();
    pair.merging(2);
    std::fs::remove_file(pair.path(format!("leaf_{}", pair.leaf))).unwrap();
    std::fs::rename(pair.vhd(pair.leaf), pair.old()).unwrap();
    std::fs::rename(pair.vhd(pair.parent), pair.vhd(pair.leaf)).unwrap();
    let old = VolumeName::new(&format!("OLD_{}.vhd", pair.leaf)).unwrap();
    // Not hidden yet: it may be anything, and stays.
    assert!(pair.repair()[0].outcome.is_err());
    image::set_hidden(&pair.sr.repo, &old, true).unwrap();
    assert!(pair.repair()[0].outcome.is_ok());
    assert!(!pair.old().exists());
    assert_eq!(content(&pair.sr.repo, pair.leaf), [0x10, 0x21, 0x22, 0]);
    assert_clean(&pair.sr.repo);
}

#[test]
fn what_is_unclear_stays_and_keeps_nobody_else_waiting() {
    let pair = pair();
    let journal = pair.path(format!("leaf_{}", pair.leaf));
    std::fs::write(&journal, Uuid::from_u128(5).to_string()).unwrap();
    std::fs::write(pair.path(format!("coalesce_{}", pair.parent)), "1").unwrap();
    std::fs::write(pair.path("leaf_a_b"), "x").unwrap();
    std::fs::rename(pair.vhd(pair.leaf), pair.old()).unwrap();
    let done = pair.repair();
    assert_eq!(done.len(), 3, "{done:?}");
    assert!(done.iter().filter(|one| one.outcome.is_err()).count() == 2, "{done:?}");
    assert!(journal.exists() && pair.old().exists() && pair.path("leaf_a_b").exists());
    assert!(!pair.path(format!("coalesce_{}", pair.parent)).exists());
}

/// An inner node N on P, with the disks A and B on N.
#[test]
fn a_relink_that_had_begun_becomes_a_record_of_ours() {
    for moved in [false, true] {
        let sr = sr();
        let repo = &sr.repo;
        let a = ops::create(repo, "a", 4 * BLOCK_BYTES).unwrap();
        fill(repo, a, 0, 0x10);
        let first = snapshot(repo, a);
        fill(repo, a, 1, 0x21);
        let wanted = [Wanted { vdi: a, name: "b".into() }];
        let b = ops::snapshot(repo, SiblingKind::Clone, &wanted).unwrap()[0];
        ops::delete(repo, first).unwrap();
        let n = parent_of(repo, a);
        let p = parent_of(repo, n);
        // The merge: N's block into P. Then A moves, or not.
        fill(repo, p, 1, 0x21);
        let footer = image::meta(repo, &VolumeName::vhd(p)).unwrap().uuid();
        if moved {
            image::set_parent(repo, &VolumeName::vhd(a), &VolumeName::vhd(p), footer).unwrap();
        }
        let journal = sr.folder.path().join(format!("relink_{n}"));
        std::fs::write(&journal, "1").unwrap();
        let fs = PosixFs::new(sr.folder.path().to_owned());
        assert!(repair(repo, &fs).unwrap()[0].outcome.is_ok());
        assert!(!journal.exists());
        // A crash before the journal went: no second record.
        std::fs::write(&journal, "1").unwrap();
        repair(repo, &fs).unwrap();
        let records = journal::load(repo.volumes.as_ref()).unwrap();
        assert_eq!(records.len(), usize::from(moved));
        if let Some(stored) = records.first() {
            let Intent::Inner(inner) = &stored.intent else { panic!("{stored:?}") };
            let JobState::Relinking { children } = &inner.state else { panic!("{inner:?}") };
            assert_eq!(inner.nodes[0].volume, format!("{n}.vhd"));
            assert_eq!(inner.parent.volume, format!("{p}.vhd"));
            assert_eq!(children.iter().map(|c| c.volume.clone()).collect::<Vec<_>>(), [format!("{b}.vhd")]);
        }
        for disk in [a, b] {
            assert_eq!(content(repo, disk), [0x10, 0x21, 0, 0]);
        }
    }
}

#[test]
fn a_snapshot_stopped_after_its_link_is_taken_back() {
    let pair = pair();
    let base = Uuid::from_u128(77);
    std::fs::hard_link(pair.vhd(pair.leaf), pair.vhd(base)).unwrap();
    // The prepared child, named `.new`, stands on the base.
    let repo = &pair.sr.repo;
    let footer = image::meta(repo, &VolumeName::vhd(pair.leaf)).unwrap().uuid();
    let child = VolumeName::vhd(Uuid::from_u128(78));
    let new = image::NewVhd {
        volume: &child,
        footer: Uuid::from_u128(79),
        virtual_bytes: 4 * BLOCK_BYTES,
        parent: Some((&VolumeName::vhd(base), footer)),
    };
    drop(image::create(repo, &new).unwrap());
    std::fs::rename(pair.path(child.as_str()), pair.path(format!("{}.vhd.new", pair.leaf))).unwrap();
    assert_eq!(pair.repair()[0].outcome, Ok("the snapshot was taken back"));
    pair.assert_taken_back();
}

#[test]
fn a_resize_that_was_interrupted_is_reverted_by_its_journal() {
    let fixture = |name: &str| {
        let path = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../tapdisk/vhd/tests/fixtures/vhd")
            .join(format!("{name}.xz"));
        let mut bytes = Vec::new();
        xz2::read::XzDecoder::new(std::fs::File::open(path).unwrap()).read_to_end(&mut bytes).unwrap();
        bytes
    };
    let sr = sr();
    let vdi = Uuid::from_u128(5);
    let path = |name: String| sr.folder.path().join(name);
    std::fs::write(path(format!("{vdi}.vhd")), fixture("resize-crashed.vhd")).unwrap();
    std::fs::write(path(format!(".journal-{vdi}")), fixture("resize-crashed.journal")).unwrap();
    let broken = scan::scan(&sr.repo).unwrap().tree;
    assert!(broken.nodes[0].broken().is_some());
    let fs = PosixFs::new(sr.folder.path().to_owned());
    assert_eq!(repair(&sr.repo, &fs).unwrap()[0].outcome, Ok("the resize was taken back"));
    assert_eq!(std::fs::read(path(format!("{vdi}.vhd"))).unwrap(), fixture("resize-before.vhd"));
    assert!(!path(format!(".journal-{vdi}")).exists());
    assert_eq!(scan::scan(&sr.repo).unwrap().tree.nodes[0].state, NodeState::Visible);
}

/// A copy of an image by `cp`: a record or a child could mean either.
#[test]
fn two_images_of_one_footer_are_not_attached() {
    let sr = sr();
    let vdi = ops::create(&sr.repo, "disk", 4 * BLOCK_BYTES).unwrap();
    let other = ops::create(&sr.repo, "other", 4 * BLOCK_BYTES).unwrap();
    let twin = Uuid::from_u128(42);
    let path = |vdi: Uuid| sr.folder.path().join(format!("{vdi}.vhd"));
    std::fs::copy(path(vdi), path(twin)).unwrap();
    for (one, named) in [(vdi, twin), (twin, vdi)] {
        let refused = ops::attach(&sr.repo, one, false).unwrap_err();
        assert_eq!(refused.code(), "BAD_IMAGE");
        assert!(refused.to_string().contains(&named.to_string()), "{refused}");
    }
    ops::attach(&sr.repo, other, false).unwrap();
    std::fs::remove_file(path(twin)).unwrap();
    ops::attach(&sr.repo, vdi, false).unwrap();
}
