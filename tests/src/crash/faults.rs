//! Operations that fail while something else is under way: whoever waits is
//! answered all the same.

use sm::Error;
use sm::journal::SiblingKind;
use sm::ops::{self, Wanted};
use sm::recover::{Scope, recover};
use tapdisk::driver::PeerId;
use tapdisk_control::{ImageRef, Request};
use vhd::storage::sim::{Fault, OpClass};

use super::scenarios::{Play, emptied_leaf};
use super::world::{Backend, locked};

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

/// A detach while metadata cannot be written: refused with what to do, and the
/// disk goes on; once there is room again, it ends.
#[test]
fn a_disk_that_cannot_be_settled_stays_attached() {
    let (world, guest, _) = emptied_leaf(1);
    let mut guest = locked(&guest);
    guest.drain();
    let answer = |guest: &mut super::guest::Guest, id: u64| {
        guest.tap.call(CALLER, id, Request::Stop { force: true });
        let answered = (0..5_000).find_map(|_| {
            guest.tap.step();
            guest.tap.take_answer(CALLER)
        });
        answered.expect("an answer").outcome
    };
    guest.replace_block();
    world.disk.inject(Fault { class: Some(OpClass::Write), after: 0, times: u64::MAX, errno: NO_SPACE });
    let refused = answer(&mut guest, 1).expect_err("metadata cannot be written");
    assert!(refused.to_string().contains("make room"), "{refused}");
    assert!(!guest.tap.exited());
    world.disk.clear_faults();
    guest.run(20);
    assert!(guest.failures.is_empty(), "{:?}", guest.failures);
    answer(&mut guest, 2).expect("settled");
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
