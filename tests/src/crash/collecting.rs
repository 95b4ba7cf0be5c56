//! Scenarios of the collector: garbage, merges of hidden nodes in one pass
//! and in slices, leaf merges stopped and taken up again.

use std::sync::atomic::Ordering;

use tapdisk_control::Request;
use vhd::bat::{BAT_FREE, read_bat};
use vhd::chain::Chain;
use vhd::meta::Meta;
use vhd::storage::{Access, VolumeName};
use vhd::units::Slot;

use super::guest::Guest;
use super::scenarios::{Play, Scenario, begin_leaf_merge, begin_leaf_merge_with, collect_garbage};
use super::world::{BLOCKS, Backend, locked};

/// All of them.
pub(super) const ALL: [Scenario; 8] = [
    Scenario { name: "garbage", go: garbage },
    Scenario { name: "blocks side by side", go: side_by_side },
    Scenario { name: "attached side by side", go: attached_side_by_side },
    Scenario { name: "one generation", go: one_generation },
    Scenario { name: "slices", go: slices },
    Scenario { name: "inner merge aborted", go: inner_aborted },
    Scenario { name: "offline merge aborted", go: offline_aborted },
    Scenario { name: "leaf merge stopped", go: leaf_stopped },
];

/// Free bytes at which a merge goes in slices: the collector's reserve and
/// one block, where two are gained.
pub const SHORT_OF_SPACE: u64 = (64 << 20) + (2 << 20);

/// Two disks; all of one goes, several generations of hidden nodes with it,
/// while the other is written.
fn garbage(play: &mut Play) {
    play.attach();
    play.traffic(10);
    let mut doomed = play.another("doomed");
    for _ in 0..2 {
        doomed.attach();
        doomed.traffic(10);
        doomed.detach();
        doomed.snapshot();
    }
    doomed.attach();
    doomed.traffic(5);
    doomed.detach();
    // The oldest last: its parent is garbage only when all others are.
    doomed.delete_disk();
    doomed.delete(1);
    doomed.delete(0);
    play.meanwhile(20);
    play.collect();
    play.joined(doomed);
    play.traffic(5);
}

/// One hidden node goes into its parent, below an attached leaf and a
/// snapshot.
fn one_generation(play: &mut Play) {
    let first = two_snapshots(play);
    play.delete(first);
    play.meanwhile(30);
    play.collect();
    play.traffic(5);
}

/// A hidden node goes into its parent with blocks that lie side by side, which
/// are shared by one copy, the bitmap between them included.
fn side_by_side(play: &mut Play) {
    let first = neighbours(play);
    play.traffic(10);
    play.delete(first);
    play.meanwhile(20);
    play.collect();
    play.traffic(5);
}

/// The leaf goes into its parent, run by its tapdisk, with blocks that lie side
/// by side (on files, where new space is zeros). With room for one block the
/// first goes alone; then it is known that extents are shared.
fn attached_side_by_side(play: &mut Play) {
    play.attach();
    // The parent has one block, beyond those that the guest knows, and no other.
    play.resize((BLOCKS + 1) << 21);
    let guest = play.guest.clone();
    let with = |go: &dyn Fn(&mut Guest)| guest.iter().for_each(|guest| go(&mut locked(guest)));
    with(&|guest| guest.take_block(BLOCKS));
    let first = play.snapshot();
    with(&|guest| (0..BLOCKS).for_each(|block| guest.write_block(block)));
    play.delete(first);
    // No guest is busy when it begins; in half of the plays one is later.
    with(&|guest| guest.idle(50));
    let _ = begin_leaf_merge_with(play, 1);
    if play.world.host.seed.is_multiple_of(2) {
        play.meanwhile(20);
    }
    play.collect();
    play.traffic(5);
}

/// The first of two snapshots: its image has the first block alone, the next
/// one every block, whole (on files, where new space is zeros).
fn neighbours(play: &mut Play) -> usize {
    play.attach();
    let guest = play.guest.clone();
    let with = |go: &dyn Fn(&mut Guest)| guest.iter().for_each(|guest| go(&mut locked(guest)));
    with(&|guest| guest.write_block(0));
    let first = play.snapshot();
    with(&|guest| guest.replace_block());
    with(&|guest| (1..BLOCKS).for_each(|block| guest.write_block(block)));
    play.snapshot();
    first
}

/// The first of two snapshots of a disk that is being written.
fn two_snapshots(play: &mut Play) -> usize {
    play.attach();
    play.traffic(15);
    let first = play.snapshot();
    play.traffic(15);
    play.snapshot();
    play.traffic(10);
    first
}

/// Several generations go into their parent slice by slice, as there is not
/// room for more, while a snapshot of them is read.
fn slices(play: &mut Play) {
    play.attach();
    let guest = play.guest.clone();
    let write = |block| guest.iter().for_each(|guest| locked(guest).write_block(block));
    // The parent has one block and gains the others.
    write(0);
    let first = play.snapshot();
    (1..BLOCKS).for_each(write);
    play.traffic(20);
    let second = play.snapshot();
    play.traffic(25);
    let third = play.snapshot();
    play.traffic(10);
    let of = play.guest.as_ref().map(|guest| locked(guest).oracle.clone()).unwrap_or_default();
    let read = &play.snapshots[third];
    let reader = play.world.attach_reader(read.vdi, of, read.instant);
    locked(&reader).budget = 100;
    play.delete(first);
    play.delete(second);
    play.meanwhile(30);
    play.world.disk.set_free_bytes(Some(SHORT_OF_SPACE));
    play.collect();
    play.world.disk.set_free_bytes(None);
    locked(&reader).run(20);
    play.failures.append(&mut locked(&reader).failures);
    if let Err(error) = sm::ops::detach(&play.world.repo, play.snapshots[third].vdi, true) {
        play.failures.push(format!("detach the reader: {error}"));
    }
}

/// A merge of hidden nodes is aborted before its window, a snapshot is taken,
/// and it is begun again.
fn inner_aborted(play: &mut Play) {
    let first = two_snapshots(play);
    play.delete(first);
    play.meanwhile(20);
    aborted(play);
    play.snapshot();
    play.traffic(5);
    play.meanwhile(20);
    play.collect();
}

/// A merge of a leaf nobody uses is aborted; the disk is used, and it is begun
/// again.
fn offline_aborted(play: &mut Play) {
    play.attach();
    play.traffic(15);
    let first = play.snapshot();
    play.traffic(15);
    play.detach();
    play.delete(first);
    aborted(play);
    play.attach();
    play.traffic(10);
    play.detach();
    play.collect();
}

/// Collects until the first window is due.
fn aborted(play: &Play) {
    play.world.patience.store(0, Ordering::Relaxed);
    // It ends early, as it was told to.
    let _ = collect_garbage(&play.world);
    play.world.patience.store(u32::MAX, Ordering::Relaxed);
}

/// A leaf merge is stopped half way and begun again, under writes.
fn leaf_stopped(play: &mut Play) {
    play.attach();
    play.traffic(20);
    let snapshot = play.snapshot();
    play.traffic(20);
    play.delete(snapshot);
    play.meanwhile(60);
    let Some(intent) = begin_leaf_merge(play) else { return };
    let mut tap = play.world.repo.host.tap(intent.vdi).expect("tap").expect("a live tapdisk");
    if let Err(error) = tap.call(Request::MergeStop) {
        play.failures.push(format!("merge stop: {error}"));
    }
    drop(tap);
    play.traffic(10);
    play.meanwhile(30);
    play.collect();
    play.traffic(5);
}

/// Bytes between two blocks' slots: nobody's.
const GAP_BYTES: u64 = 3584;

/// The image of a chain that has so many blocks, and where its last one is.
fn image_with(play: &Play, blocks: u64) -> (VolumeName, Slot) {
    let volumes = play.world.repo.volumes.as_ref();
    let chain = Chain::open(volumes, &VolumeName::vhd(play.vdi)).unwrap();
    let slots = |name: &VolumeName| {
        let volume = volumes.open(name, Access::Read).unwrap();
        let meta = Meta::read(volume.as_ref()).unwrap();
        let bat = read_bat(volume.as_ref(), meta.layout.as_ref().unwrap()).unwrap();
        bat.into_iter().filter(|entry| *entry != BAT_FREE).collect::<Vec<u32>>()
    };
    let found = chain.nodes().map(|node| (node.name.clone(), slots(&node.name)));
    let (name, slots) = found.into_iter().find(|(_, slots)| slots.len() as u64 == blocks).unwrap();
    (name, Slot(*slots.last().unwrap()))
}

#[test]
fn what_lies_in_the_gap_before_a_bitmap_is_not_taken_along() {
    for garbage in [None, Some(0), Some(GAP_BYTES - 8)] {
        let mut play = Play::new(Backend::Files, 3, None);
        let first = neighbours(&mut play);
        play.detach();
        let (source, slot) = image_with(&play, BLOCKS);
        let repo = play.world.repo.clone();
        if let Some(at) = garbage {
            let volume = repo.volumes.open(&source, Access::Write).unwrap();
            volume.write_at(b"conectix", slot.bitmap_offset() - GAP_BYTES + at).unwrap();
            volume.flush("scenario: damage").unwrap();
        }
        let disk = VolumeName::vhd(play.vdi);
        let read = || {
            let chain = Chain::open(repo.volumes.as_ref(), &disk).unwrap();
            let mut bytes = vec![0; (BLOCKS << 21) as usize];
            chain.read_at(&mut bytes, 0).unwrap();
            bytes
        };
        let before = read();
        play.delete(first);
        play.collect();
        assert!(play.failures.is_empty(), "{:?}", play.failures);
        // Its parent has it all now, and goes by another name.
        let (parent, slot) = image_with(&play, BLOCKS);
        assert_ne!(parent, source);
        let volume = repo.volumes.open(&parent, Access::Read).unwrap();
        let mut gap = vec![0; GAP_BYTES as usize];
        volume.read_at(&mut gap, slot.bitmap_offset() - GAP_BYTES).unwrap();
        assert!(gap.iter().all(|byte| *byte == 0), "{garbage:?}");
        assert!(read() == before, "{garbage:?}");
    }
}
