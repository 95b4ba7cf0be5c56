//! Operations that fail while something else is under way: whoever waits is
//! answered all the same.

use sm::Error;
use sm::journal::{Intent, JobState, SiblingKind};
use sm::ops::{self, Wanted};
use sm::recover::{Scope, recover};
use tapdisk::driver::PeerId;
use tapdisk_control::{ImageRef, Refusal, Reply, Request};
use vhd::footer::DiskType;
use vhd::meta::FooterState;
use vhd::storage::VolumeName;
use vhd::storage::sim::{Fault, OpClass};

use super::collecting::SHORT_OF_SPACE;
use super::guest::Guest;
use super::scenarios::{Play, collect_garbage, emptied_leaf};
use super::world::{BLOCKS, Backend, locked};

/// The caller of a commit, for its answer.
const CALLER: PeerId = PeerId(1 << 40);
/// ENOSPC.
const NO_SPACE: i32 = 28;
/// Steps of a tapdisk that has nothing to do: each is a tick, so these are
/// minutes.
const IDLE_STEPS: usize = 10_000;

/// Whether a commit is answered when the nth write from its start on fails,
/// be it its own or one of the parent's write-back.
fn commit_is_answered(seed: u64, nth: u64) -> bool {
    let (world, guest, intent) = emptied_leaf(seed);
    let mut guest = locked(&guest);
    // A block that is freed and placed anew: bitmap and BAT for the parent to
    // write back meanwhile.
    guest.replace_block_then_flush();
    let image = |image: &ImageRef| image.clone();
    let commit =
        Request::MergeCommit { leaf: image(&intent.leaf), parent: image(&intent.parent), aside: None };
    guest.tap.call(CALLER, 1, commit);
    world.disk.inject(Fault { class: Some(OpClass::Write), after: nth, times: 1, errno: NO_SPACE });
    (0..5_000).any(|_| {
        guest.tap.step();
        guest.tap.take_answer(CALLER).is_some()
    })
}

#[test]
fn a_commit_is_answered_whatever_write_fails_meanwhile() {
    for seed in 0..4 {
        for nth in 0..8 {
            assert!(commit_is_answered(seed, nth), "seed {seed}, write {nth}: no answer");
        }
    }
}

/// A commit whose names cannot be synced: the parent has the leaf's name, and is
/// what the tapdisk serves and settles.
#[test]
fn a_commit_whose_names_are_not_synced_leaves_the_parent_what_it_is() {
    for seed in 0..4 {
        let (world, guest, intent) = emptied_leaf(seed);
        let mut guest = locked(&guest);
        let (leaf, parent) = (intent.leaf.clone(), intent.parent.clone());
        let footer = parent.footer;
        world.disk.inject(Fault { class: Some(OpClass::SyncNames), after: 0, times: 1, errno: NO_SPACE });
        answer(&mut guest, 1, Request::MergeCommit { leaf: leaf.clone(), parent, aside: None }).ok();
        world.disk.clear_faults();
        guest.run(20);
        assert!(guest.failures.is_empty(), "{:?}", guest.failures);
        answer(&mut guest, 2, Request::Stop { force: true }).expect("settled");
        let meta = sm::image::meta(&world.repo, &VolumeName::new(&leaf.volume).unwrap()).expect("an image");
        assert_eq!((meta.uuid(), meta.disk_type()), (footer, DiskType::Dynamic), "seed {seed}");
    }
}

/// What comes of an order.
fn answer(guest: &mut Guest, id: u64, order: Request) -> Result<Reply, Refusal> {
    guest.tap.call(CALLER, id, order);
    let answered = (0..5_000).find_map(|_| {
        guest.tap.step();
        guest.tap.take_answer(CALLER)
    });
    answered.expect("an answer").outcome
}

/// A stopped merge whose parent cannot be settled: whoever asks again has it
/// settled, and is not told so before.
#[test]
fn a_merge_is_stopped_once_its_parent_is_settled() {
    let (world, guest, intent) = emptied_leaf(1);
    let mut guest = locked(&guest);
    let state = || {
        let name = VolumeName::new(&intent.parent.volume).unwrap();
        sm::image::meta(&world.repo, &name).expect("an image").footer_state
    };
    world.disk.inject(Fault { class: Some(OpClass::Write), after: 0, times: u64::MAX, errno: NO_SPACE });
    for id in 1..3 {
        answer(&mut guest, id, Request::MergeStop).expect_err("nothing can be written");
        assert_ne!(state(), FooterState::Settled);
    }
    world.disk.clear_faults();
    answer(&mut guest, 3, Request::MergeStop).expect("stopped");
    assert_eq!(state(), FooterState::Settled);
    guest.run(20);
    assert!(guest.failures.is_empty(), "{:?}", guest.failures);
}

/// A snapshot of an attached disk, taken after the nth write failed while hidden
/// nodes below it were merged. Returns whether its leaf was about to be moved to
/// another parent.
fn snapshot_while_a_merge_rests(nth: u64) -> bool {
    let mut play = Play::new(Backend::Files, nth, None);
    play.attach();
    play.traffic(10);
    let first = play.snapshot();
    play.traffic(10);
    let second = play.snapshot();
    play.traffic(10);
    play.delete(first);
    play.delete(second);
    let disk = play.world.disk.clone();
    disk.inject(Fault { class: Some(OpClass::Write), after: nth, times: 1, errno: NO_SPACE });
    let _ = collect_garbage(&play.world);
    disk.clear_faults();
    let journal = sm::journal::load(play.world.repo.volumes.as_ref()).expect("a journal");
    let moving = journal.iter().any(|stored| match &stored.intent {
        Intent::Inner(inner) => matches!(inner.state, JobState::Relinking { .. }),
        _ => false,
    });
    play.snapshot();
    play.traffic(10);
    play.collect();
    play.traffic(10);
    play.detach();
    assert!(play.failures.is_empty(), "write {nth}: {:?}", play.failures);
    moving
}

#[test]
fn a_snapshot_of_a_leaf_that_is_to_be_moved_holds_no_merge_up() {
    let moving = (0..40).filter(|nth| snapshot_while_a_merge_rests(*nth)).count();
    assert!(moving > 0, "no write was that of a leaf's header");
}

/// A merge in slices during which the SR lock cannot be had once: the reader of a
/// snapshot goes on reading what it read. Returns whether the lock was asked for
/// so often.
fn reads_on_though_the_lock_is_busy(nth: u64) -> bool {
    let mut play = Play::new(Backend::Files, 1, None);
    play.attach();
    let guest = play.guest.clone();
    let write = |block| guest.iter().for_each(|guest| locked(guest).write_block(block));
    write(0);
    let first = play.snapshot();
    (1..BLOCKS).for_each(write);
    let second = play.snapshot();
    play.traffic(25);
    let third = play.snapshot();
    let of = play.guest.as_ref().map(|guest| locked(guest).oracle.clone()).unwrap_or_default();
    let read = &play.snapshots[third];
    let reader = play.world.attach_reader(read.vdi, of, read.instant);
    play.delete(first);
    play.delete(second);
    play.world.disk.set_free_bytes(Some(SHORT_OF_SPACE));
    play.world.host.set_busy_lock(Some(nth));
    let _ = collect_garbage(&play.world);
    let asked = !play.world.host.set_busy_lock(None);
    locked(&reader).run(200);
    play.failures.append(&mut locked(&reader).failures);
    play.collect();
    locked(&reader).run(200);
    play.failures.append(&mut locked(&reader).failures);
    assert!(play.failures.is_empty(), "lock {nth}: {:?}", play.failures);
    asked
}

#[test]
fn a_disk_reads_on_whenever_the_collector_finds_the_lock_busy() {
    let asked = (0..120).take_while(|nth| reads_on_though_the_lock_is_busy(*nth)).count();
    assert!(asked > 8, "the lock was asked for {asked} times");
}

/// A merge of a detached leaf in which the nth operation of a kind fails: it goes
/// through, or it fails, and the disk is what it was.
fn merges_detached(class: OpClass, nth: u64) {
    let mut play = Play::new(Backend::Files, nth, None);
    play.attach();
    play.traffic(15);
    let snapshot = play.snapshot();
    play.traffic(15);
    play.detach();
    play.delete(snapshot);
    let disk = play.world.disk.clone();
    disk.inject(Fault { class: Some(class), after: nth, times: 1, errno: NO_SPACE });
    let _ = collect_garbage(&play.world);
    disk.clear_faults();
    play.collect();
    play.attach();
    play.traffic(20);
    play.detach();
    assert!(play.failures.is_empty(), "{class:?} {nth}: {:?}", play.failures);
}

#[test]
fn a_detached_leaf_is_whole_whatever_fails_while_it_is_merged() {
    for class in [OpClass::Write, OpClass::Flush, OpClass::SetLen, OpClass::Zero, OpClass::Copy] {
        (0..40).for_each(|nth| merges_detached(class, nth));
    }
}

/// A detach while metadata cannot be written: refused with what to do, and the
/// disk goes on; once there is room again, it ends.
#[test]
fn a_disk_that_cannot_be_settled_stays_attached() {
    let (world, guest, _) = emptied_leaf(1);
    let mut guest = locked(&guest);
    guest.drain();
    let stop = |guest: &mut Guest, id: u64| answer(guest, id, Request::Stop { force: true });
    guest.replace_block();
    world.disk.inject(Fault { class: Some(OpClass::Write), after: 0, times: u64::MAX, errno: NO_SPACE });
    let refused = stop(&mut guest, 1).expect_err("metadata cannot be written");
    assert!(refused.to_string().contains("make room"), "{refused}");
    assert!(!guest.tap.exited());
    world.disk.clear_faults();
    guest.run(20);
    assert!(guest.failures.is_empty(), "{:?}", guest.failures);
    stop(&mut guest, 2).expect("settled");
    assert!(guest.tap.exited());
}

/// A snapshot of a busy disk during which the nth change of names fails three
/// times: it is taken or it is not, and the disk goes on.
fn goes_on(backend: Backend, nth: u64) {
    let mut play = Play::new(backend, nth, None);
    play.attach();
    play.traffic(10);
    play.meanwhile(20);
    let disk = play.world.disk.clone();
    disk.inject(Fault { class: Some(OpClass::Name), after: nth, times: 3, errno: NO_SPACE });
    let wanted = Wanted { vdi: play.vdi, name: "snap".to_owned() };
    let _ = ops::snapshot(&play.world.repo, SiblingKind::Snapshot, &[wanted]);
    disk.clear_faults();
    recover(&play.world.repo, Scope::All).expect("recovery");
    play.traffic(20);
    play.snapshot();
    play.detach();
    assert!(play.failures.is_empty(), "{backend:?}, change {nth}: {:?}", play.failures);
}

#[test]
fn a_disk_goes_on_whatever_change_of_names_fails() {
    for backend in Backend::ALL {
        (0..14).for_each(|nth| goes_on(backend, nth));
    }
}

/// The same when all changes of names fail from the nth on, for longer than
/// the tapdisk tries by itself. Returns whether the disk was left standing
/// still, with its snapshot decided.
fn goes_on_when_asked(backend: Backend, nth: u64) -> bool {
    let mut play = Play::new(backend, nth, None);
    play.attach();
    play.traffic(10);
    play.meanwhile(20);
    let (disk, repo, vdi) = (play.world.disk.clone(), play.world.repo.clone(), play.vdi);
    disk.inject(Fault { class: Some(OpClass::Name), after: nth, times: u64::MAX, errno: NO_SPACE });
    let snapshot = || ops::snapshot(&repo, SiblingKind::Snapshot, &[Wanted { vdi, name: "snap".to_owned() }]);
    let stuck = matches!(snapshot(), Err(Error::Stuck { .. }));
    if stuck {
        let idle = || locked(play.guest.as_ref().expect("attached")).idle(IDLE_STEPS);
        idle();
        assert!(matches!(ops::unstick(&repo, vdi), Err(Error::Stuck { .. })));
        disk.clear_faults();
        // It has given up: without a question nothing happens.
        idle();
        assert!(snapshot().is_err_and(|refused| refused.is_busy()));
        ops::unstick(&repo, vdi).expect("it goes on");
    }
    disk.clear_faults();
    recover(&repo, Scope::All).expect("recovery");
    play.traffic(20);
    play.snapshot();
    play.detach();
    assert!(play.failures.is_empty(), "{backend:?}, change {nth}: {:?}", play.failures);
    stuck
}

#[test]
fn a_disk_that_stands_still_goes_on_when_it_is_asked() {
    for backend in Backend::ALL {
        let stuck = (0..14).filter(|nth| goes_on_when_asked(backend, *nth)).count();
        assert!(stuck > 0, "{backend:?}: no change was the swap");
    }
}
