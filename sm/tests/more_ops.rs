//! Resize, revert and copy, over a folder on disk.

#![allow(clippy::unwrap_used, reason = "a helper of tests fails by panicking")]

mod support;

use sm::journal::{self, Intent, LeafMergeIntent, LeafMergeState, ResizeIntent, SiblingKind};
use sm::ops::{self, Wanted};
use sm::progress::Progress;
use sm::reading::Reading;
use sm::recover::{self, Scope};
use sm::tree::NodeState;
use sm::{Repo, image, scan};
use support::folder::{Sr, sr};
use support::{assert_clean, byte, fill, volumes};
use uuid::Uuid;
use vhd::chain::Chain;
use vhd::storage::VolumeName;
use vhd::units::BLOCK_BYTES;

fn disk(sr: &Sr) -> Uuid {
    ops::create(&sr.repo, "disk", 4 * BLOCK_BYTES).unwrap()
}

fn snapshot(sr: &Sr, vdi: Uuid) -> Uuid {
    let wanted = [Wanted { vdi, name: "snapshot".into() }];
    ops::snapshot(&sr.repo, SiblingKind::Snapshot, &wanted).unwrap()[0]
}

fn size(repo: &Repo, vdi: Uuid) -> u64 {
    image::meta(repo, &VolumeName::vhd(vdi)).unwrap().virtual_bytes()
}

fn hidden(repo: &Repo) -> usize {
    scan::scan(repo).unwrap().tree.nodes.iter().filter(|node| node.state == NodeState::Hidden).count()
}

fn code<T: std::fmt::Debug>(outcome: sm::Result<T>) -> &'static str {
    outcome.unwrap_err().code()
}

#[test]
fn a_disk_grows_attached_and_not_and_keeps_its_content() {
    for attached in [false, true] {
        let sr = sr();
        let vdi = disk(&sr);
        fill(&sr.repo, vdi, 0, 0x11);
        if attached {
            ops::attach(&sr.repo, vdi, false).unwrap();
        }
        // Far enough that the table needs the room of the first block.
        let large = 4000 * BLOCK_BYTES;
        assert_eq!(ops::resize(&sr.repo, vdi, large - 7).unwrap(), large, "rounded up");
        assert_eq!(size(&sr.repo, vdi), large);
        assert_eq!(ops::resize(&sr.repo, vdi, large).unwrap(), large, "nothing to do");
        let asked = sr.host.heard.lock().unwrap().iter().filter(|word| *word == "Grow").count();
        assert_eq!(asked, usize::from(attached));
        if attached {
            ops::detach(&sr.repo, vdi, false).unwrap();
        }
        fill(&sr.repo, vdi, 3999, 0x22);
        assert_eq!((byte(&sr.repo, vdi, 0), byte(&sr.repo, vdi, 3999)), (0x11, 0x22));
        assert_clean(&sr.repo);
    }
}

#[test]
fn a_disk_over_a_snapshot_grows_and_never_shrinks() {
    let sr = sr();
    let vdi = disk(&sr);
    fill(&sr.repo, vdi, 0, 0x11);
    let kept = snapshot(&sr, vdi);
    ops::resize(&sr.repo, vdi, 8 * BLOCK_BYTES).unwrap();
    fill(&sr.repo, vdi, 7, 0x22);
    assert_eq!(
        (byte(&sr.repo, vdi, 0), byte(&sr.repo, vdi, 7), size(&sr.repo, kept)),
        (0x11, 0x22, 4 * BLOCK_BYTES)
    );
    assert_eq!(code(ops::resize(&sr.repo, vdi, 4 * BLOCK_BYTES)), "BAD_SIZE");
    assert_eq!(code(ops::resize(&sr.repo, kept, 8 * BLOCK_BYTES)), "READ_ONLY");
    assert_eq!(code(ops::resize(&sr.repo, vdi, 0)), "BAD_SIZE");
    assert_eq!(code(ops::resize(&sr.repo, vdi, u64::MAX)), "BAD_SIZE");
    assert_eq!(code(ops::resize(&sr.repo, Uuid::from_u128(77), BLOCK_BYTES)), "NOT_FOUND");
    assert_clean(&sr.repo);
}

#[test]
fn a_disk_without_a_parent_shrinks_where_it_holds_zeros() {
    let sr = sr();
    let vdi = disk(&sr);
    fill(&sr.repo, vdi, 1, 0x11);
    assert_eq!(code(ops::resize(&sr.repo, vdi, BLOCK_BYTES)), "BAD_SIZE");
    assert_eq!(size(&sr.repo, vdi), 4 * BLOCK_BYTES);
    assert_clean(&sr.repo);
    assert_eq!(ops::resize(&sr.repo, vdi, 2 * BLOCK_BYTES).unwrap(), 2 * BLOCK_BYTES);
    assert_eq!((size(&sr.repo, vdi), byte(&sr.repo, vdi, 1)), (2 * BLOCK_BYTES, 0x11));
    ops::attach(&sr.repo, vdi, false).unwrap();
    assert_eq!(code(ops::resize(&sr.repo, vdi, BLOCK_BYTES)), "BAD_SIZE");
}

#[test]
fn what_others_read_does_not_grow() {
    let sr = sr();
    let vdi = disk(&sr);
    let reading = Reading::open(&sr.repo, vdi, false).unwrap();
    assert_eq!(code(ops::resize(&sr.repo, vdi, 8 * BLOCK_BYTES)), "IN_USE");
    drop(reading);
    ops::attach(&sr.repo, vdi, true).unwrap();
    assert_eq!(code(ops::resize(&sr.repo, vdi, 8 * BLOCK_BYTES)), "IN_USE");
    assert_clean(&sr.repo);
}

#[test]
fn a_merge_is_stopped_before_its_leaf_grows() {
    let sr = sr();
    let vdi = disk(&sr);
    fill(&sr.repo, vdi, 0, 0x11);
    snapshot(&sr, vdi);
    ops::attach(&sr.repo, vdi, false).unwrap();
    let chain = sm::chain::read(&sr.repo, vdi).unwrap();
    let merge = LeafMergeIntent {
        id: Uuid::from_u128(900),
        vdi,
        leaf: chain[0].image_ref(),
        parent: chain[1].image_ref(),
        state: LeafMergeState::Merging,
    };
    journal::put(sr.repo.volumes.as_ref(), &Intent::LeafMerge(merge), "test").unwrap();
    ops::resize(&sr.repo, vdi, 8 * BLOCK_BYTES).unwrap();
    let heard = sr.host.heard.lock().unwrap().clone();
    let at = |word: &str| heard.iter().position(|heard| heard == word).unwrap();
    assert!(at("MergeStop") < at("Grow"), "{heard:?}");
    assert_eq!(size(&sr.repo, vdi), 8 * BLOCK_BYTES);
    assert_clean(&sr.repo);
}

#[test]
fn a_growth_that_a_dead_process_began_keeps_nobody_out() {
    let sr = sr();
    let vdi = disk(&sr);
    let image = sm::chain::read(&sr.repo, vdi).unwrap()[0].image_ref();
    let left = ResizeIntent { id: Uuid::from_u128(900), vdi, image, virtual_bytes: 8 * BLOCK_BYTES };
    journal::put(sr.repo.volumes.as_ref(), &Intent::Resize(left), "test").unwrap();
    recover::recover(&sr.repo, Scope::All).unwrap();
    assert_clean(&sr.repo);
    assert_eq!(size(&sr.repo, vdi), 4 * BLOCK_BYTES);
}

#[test]
fn a_disk_goes_back_to_its_snapshot() {
    let sr = sr();
    let vdi = disk(&sr);
    fill(&sr.repo, vdi, 0, 0x11);
    let kept = snapshot(&sr, vdi);
    fill(&sr.repo, vdi, 0, 0x22);
    let later = snapshot(&sr, vdi);
    ops::resize(&sr.repo, vdi, 8 * BLOCK_BYTES).unwrap();
    fill(&sr.repo, vdi, 1, 0x33);
    let before = hidden(&sr.repo);
    ops::revert(&sr.repo, vdi, kept).unwrap();
    assert_eq!((byte(&sr.repo, vdi, 0), byte(&sr.repo, vdi, 1)), (0x11, 0));
    assert_eq!((byte(&sr.repo, kept, 0), byte(&sr.repo, later, 0)), (0x11, 0x22));
    assert_eq!(size(&sr.repo, vdi), 4 * BLOCK_BYTES, "the size goes back too");
    assert_eq!(hidden(&sr.repo), before + 1, "the former leaf is garbage");
    let label = sr.repo.labels.get(vdi).unwrap().unwrap();
    assert_eq!((label.name.as_str(), label.snapshot_of), ("disk", None));
    assert_eq!(sr.repo.labels.get(kept).unwrap().unwrap().snapshot_of, Some(vdi));
    assert_clean(&sr.repo);
    // And forth again.
    fill(&sr.repo, vdi, 2, 0x44);
    ops::revert(&sr.repo, vdi, later).unwrap();
    assert_eq!((byte(&sr.repo, vdi, 0), byte(&sr.repo, vdi, 2)), (0x22, 0));
    assert_clean(&sr.repo);
}

#[test]
fn a_snapshot_that_holds_data_becomes_a_base() {
    let mut sr = sr();
    let vdi = disk(&sr);
    fill(&sr.repo, vdi, 0, 0x11);
    let kept = snapshot(&sr, vdi);
    // As another program may have left it.
    fill(&sr.repo, kept, 1, 0x22);
    sr.repo.limits.chain_max = 2;
    let before = volumes(&sr.repo);
    assert_eq!(code(ops::revert(&sr.repo, vdi, kept)), "CHAIN_TOO_LONG");
    assert_eq!(volumes(&sr.repo), before);
    sr.repo.limits.chain_max = 30;
    ops::attach(&sr.repo, kept, true).unwrap();
    assert_eq!(code(ops::revert(&sr.repo, vdi, kept)), "IN_USE");
    ops::detach(&sr.repo, kept, false).unwrap();
    ops::revert(&sr.repo, vdi, kept).unwrap();
    for disk in [vdi, kept] {
        assert_eq!((byte(&sr.repo, disk, 0), byte(&sr.repo, disk, 1)), (0x11, 0x22));
    }
    let tree = scan::scan(&sr.repo).unwrap().tree;
    let depth = |vdi| tree.nodes[tree.by_uuid(vdi).unwrap()].depth;
    assert_eq!((depth(vdi), depth(kept)), (3, 3));
    fill(&sr.repo, vdi, 1, 0x33);
    assert_eq!((byte(&sr.repo, vdi, 1), byte(&sr.repo, kept, 1)), (0x33, 0x22));
    assert_clean(&sr.repo);
}

#[test]
fn only_a_detached_disk_goes_back_and_only_to_its_own_snapshot() {
    let sr = sr();
    let (vdi, other) = (disk(&sr), disk(&sr));
    fill(&sr.repo, vdi, 0, 0x11);
    let kept = snapshot(&sr, vdi);
    let before = volumes(&sr.repo);
    assert_eq!(code(ops::revert(&sr.repo, other, kept)), "BAD_REQUEST");
    assert_eq!(code(ops::revert(&sr.repo, vdi, other)), "BAD_REQUEST");
    assert_eq!(code(ops::revert(&sr.repo, kept, kept)), "READ_ONLY");
    assert_eq!(code(ops::revert(&sr.repo, vdi, Uuid::from_u128(77))), "NOT_FOUND");
    ops::attach(&sr.repo, vdi, false).unwrap();
    assert_eq!(code(ops::revert(&sr.repo, vdi, kept)), "IN_USE");
    assert_eq!(volumes(&sr.repo), before);
    assert_clean(&sr.repo);
    // A snapshot somebody reads is no hindrance, as it stays what it is.
    ops::detach(&sr.repo, vdi, false).unwrap();
    ops::attach(&sr.repo, kept, true).unwrap();
    ops::revert(&sr.repo, vdi, kept).unwrap();
    assert_eq!(byte(&sr.repo, vdi, 0), 0x11);
}

fn content(repo: &Repo, vdi: Uuid) -> Vec<u8> {
    let chain = Chain::open(repo.volumes.as_ref(), &VolumeName::vhd(vdi)).unwrap();
    let mut bytes = vec![0; chain.virtual_bytes() as usize];
    chain.read_at(&mut bytes, 0).unwrap();
    bytes
}

#[test]
fn a_copy_holds_the_same_in_one_image_here_and_elsewhere() {
    let (here, there) = (sr(), sr());
    let there = Repo { uuid: Uuid::from_u128(100), ..there.repo.clone() };
    let vdi = disk(&here);
    fill(&here.repo, vdi, 0, 0x11);
    snapshot(&here, vdi);
    fill(&here.repo, vdi, 1, 0x22);
    // What holds zeros takes no room.
    fill(&here.repo, vdi, 2, 0);
    for to in [&here.repo, &there] {
        let progress = Progress::default();
        let mut guarded = false;
        let copy = ops::copy(&here.repo, vdi, to, "copy", &progress, || guarded = true).unwrap();
        assert!(guarded);
        assert_eq!(content(to, copy), content(&here.repo, vdi));
        assert_eq!(sm::chain::read(to, copy).unwrap().len(), 1);
        assert_eq!(image::allocated_bytes(to, &VolumeName::vhd(copy)).unwrap(), 2 * BLOCK_BYTES);
        assert_eq!(Some(progress.done_bytes()), progress.total_bytes());
        let label = to.labels.get(copy).unwrap().unwrap();
        assert_eq!((label.name.as_str(), label.snapshot_of, label.read_only), ("copy", None, false));
        assert_clean(to);
    }
    assert_eq!(*here.host.leases.lock().unwrap(), [], "the lease ended with the copy");
}

#[test]
fn a_copy_that_is_stopped_or_refused_leaves_nothing() {
    let sr = sr();
    let vdi = disk(&sr);
    fill(&sr.repo, vdi, 0, 0x11);
    let before = volumes(&sr.repo);
    let progress = Progress::default();
    progress.cancel();
    assert_eq!(code(ops::copy(&sr.repo, vdi, &sr.repo, "c", &progress, || ())), "CANCELLED");
    let progress = Progress::default();
    assert_eq!(code(ops::copy(&sr.repo, vdi, &sr.repo, "c\n", &progress, || ())), "BAD_REQUEST");
    ops::attach(&sr.repo, vdi, false).unwrap();
    let refused = ops::copy(&sr.repo, vdi, &sr.repo, "c", &progress, || ()).unwrap_err();
    assert_eq!(refused.code(), "IN_USE");
    assert!(refused.to_string().contains("snapshot"), "{refused}");
    assert_eq!(volumes(&sr.repo), before);
    assert_clean(&sr.repo);
    ops::detach(&sr.repo, vdi, false).unwrap();
    ops::attach(&sr.repo, vdi, true).unwrap();
    ops::copy(&sr.repo, vdi, &sr.repo, "c", &progress, || ()).unwrap();
}

#[test]
fn nobody_sweeps_a_copy_or_attaches_a_disk_that_is_being_resized() {
    let sr = sr();
    let vdi = disk(&sr);
    fill(&sr.repo, vdi, 0, 0x11);
    let sweeping = || assert_eq!(recover::sweep(&sr.repo).unwrap(), 0);
    let copy = ops::copy(&sr.repo, vdi, &sr.repo, "copy", &Progress::default(), sweeping).unwrap();
    assert_eq!(byte(&sr.repo, copy, 0), 0x11);

    let image = sm::chain::read(&sr.repo, vdi).unwrap()[0].image_ref();
    let resize = ResizeIntent { id: Uuid::from_u128(900), vdi, image, virtual_bytes: 8 * BLOCK_BYTES };
    journal::put(sr.repo.volumes.as_ref(), &Intent::Resize(resize), "test").unwrap();
    // Somebody alive works on it.
    let held = sr.repo.host.hold_intent(Uuid::from_u128(900)).unwrap().unwrap();
    assert_eq!(code(ops::attach(&sr.repo, vdi, false)), "BUSY");
    assert_eq!(code(ops::delete(&sr.repo, vdi)), "BUSY");
    assert_eq!(code(ops::resize(&sr.repo, vdi, 16 * BLOCK_BYTES)), "BUSY");
    assert_eq!(code(Reading::open(&sr.repo, vdi, false).map(|_| ())), "BUSY");
    assert_eq!(
        code(ops::snapshot(&sr.repo, SiblingKind::Snapshot, &[Wanted { vdi, name: "s".into() }])),
        "BUSY"
    );
    drop(held);
    ops::attach(&sr.repo, vdi, false).unwrap();
    assert_clean(&sr.repo);
}
