//! Tests of the simulator itself: each property it promises.

use rand::SeedableRng;
use rand::rngs::SmallRng;

use super::super::{Access, Fs, Volume};
use super::{CrashKind, Fault, OpClass, Sabotage, SimDisk, SimDone, SimFile, SimOp, SimRequest};
use super::{Step, Strategy};
use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::sync::Arc;

use CrashKind::{Kill, PowerCut};
use Strategy::{AllKept, AllLost, OnlyKept, OnlyLost, RandomPerOp, RandomPerSector};

fn rng() -> SmallRng {
    SmallRng::seed_from_u64(7)
}

fn crash(disk: &SimDisk, kind: CrashKind, strategy: Strategy) -> SimDisk {
    disk.crash(disk.log_len(), kind, &mut rng(), strategy)
}

/// A file of `sectors` sectors of `byte`, durable and so is its name.
fn file(disk: &SimDisk, name: &str, sectors: usize, byte: u8) -> Arc<dyn Volume> {
    let file = disk.create(name).unwrap();
    file.write_at(&vec![byte; sectors * 512], 0).unwrap();
    file.flush("set up").unwrap();
    disk.sync_names("", "set up").unwrap();
    file
}

fn bytes(disk: &SimDisk, name: &str) -> Vec<u8> {
    let file = disk.open(name, Access::Read).unwrap();
    let mut bytes = vec![0; usize::try_from(file.len().unwrap()).unwrap()];
    file.read_at(&mut bytes, 0).unwrap();
    bytes
}

/// The first byte of each sector.
fn sectors(disk: &SimDisk, name: &str) -> Vec<u8> {
    bytes(disk, name)
        .chunks(512)
        .map(|sector| sector[0])
        .collect()
}

/// All outcomes that many random crashes leave of a file.
fn outcomes(disk: &SimDisk, kind: CrashKind, strategy: Strategy) -> BTreeSet<Vec<u8>> {
    let mut rng = rng();
    let end = disk.log_len();
    (0..400)
        .map(|_| sectors(&disk.crash(end, kind, &mut rng, strategy), "a"))
        .collect()
}

fn write(disk: &SimDisk, file: &dyn Volume, at: u64, byte: u8, count: usize) -> SimOp {
    let request = SimRequest::Write {
        file: SimFile::of(file).unwrap(),
        offset: at * 512,
        bytes: vec![byte; count * 512].into(),
    };
    disk.begin(request, "guest write").unwrap()
}

fn flush(disk: &SimDisk, file: &dyn Volume) -> SimOp {
    disk.begin(
        SimRequest::Flush {
            file: SimFile::of(file).unwrap(),
        },
        "guest flush",
    )
    .unwrap()
}

#[test]
fn an_unflushed_write_is_lost_or_kept_by_a_power_cut_and_kept_by_a_kill() {
    let disk = SimDisk::new();
    let a = file(&disk, "a", 2, 1);
    a.write_at(&[2; 512], 512).unwrap();
    assert_eq!(sectors(&crash(&disk, PowerCut, AllLost), "a"), [1, 1]);
    assert_eq!(sectors(&crash(&disk, PowerCut, AllKept), "a"), [1, 2]);
    assert_eq!(sectors(&crash(&disk, Kill, AllLost), "a"), [1, 2]);
    a.flush("it").unwrap();
    assert_eq!(sectors(&crash(&disk, PowerCut, AllLost), "a"), [1, 2]);
}

#[test]
fn a_kill_followed_by_a_power_cut_can_lose_what_the_kill_kept() {
    let disk = SimDisk::new();
    let a = file(&disk, "a", 1, 1);
    a.write_at(&[2; 512], 0).unwrap();
    let killed = crash(&disk, Kill, AllLost);
    assert_eq!(sectors(&killed, "a"), [2]);
    assert_eq!(sectors(&crash(&killed, PowerCut, AllLost), "a"), [1]);
    // And a recovery's flush makes it certain.
    killed
        .open("a", Access::Write)
        .unwrap()
        .flush("recovery")
        .unwrap();
    assert_eq!(sectors(&crash(&killed, PowerCut, AllLost), "a"), [2]);
}

#[test]
fn writes_since_the_last_flush_can_be_torn_and_reordered_by_sector() {
    let disk = SimDisk::new();
    let a = file(&disk, "a", 2, 1);
    a.write_at(&[2; 1024], 0).unwrap();
    a.write_at(&[3; 1024], 0).unwrap();
    let seen = outcomes(&disk, PowerCut, RandomPerSector);
    assert_eq!(seen.len(), 9, "each sector any of three values: {seen:?}");
    let seen = outcomes(&disk, PowerCut, RandomPerOp);
    assert_eq!(seen, BTreeSet::from([vec![1, 1], vec![2, 2], vec![3, 3]]));
}

#[test]
fn a_write_in_flight_is_torn_by_a_kill_and_seen_by_nobody_before() {
    let disk = SimDisk::new();
    let a = file(&disk, "a", 2, 1);
    let op = write(&disk, &*a, 0, 2, 2);
    assert_eq!(sectors(&disk, "a"), [1, 1]);
    assert_eq!(sectors(&crash(&disk, Kill, AllLost), "a"), [1, 1]);
    assert_eq!(outcomes(&disk, Kill, RandomPerSector).len(), 4);
    assert_eq!(disk.complete(op).unwrap(), SimDone::Done);
    assert_eq!(
        outcomes(&disk, Kill, RandomPerSector),
        BTreeSet::from([vec![2, 2]])
    );
}

#[test]
fn a_flush_covers_what_completed_before_it_began_and_nothing_else() {
    let disk = SimDisk::new();
    let a = file(&disk, "a", 3, 1);
    let early = write(&disk, &*a, 0, 2, 1);
    let late = write(&disk, &*a, 1, 2, 1);
    disk.complete(early).unwrap();
    let flushing = flush(&disk, &*a);
    disk.complete(late).unwrap();
    disk.complete(write(&disk, &*a, 2, 2, 1)).unwrap();
    assert_eq!(sectors(&crash(&disk, PowerCut, AllLost), "a"), [1, 1, 1]);
    disk.complete(flushing).unwrap();
    assert_eq!(sectors(&crash(&disk, PowerCut, AllLost), "a"), [2, 1, 1]);
}

#[test]
fn flushes_in_flight_together_cover_each_its_own() {
    let disk = SimDisk::new();
    let a = file(&disk, "a", 2, 1);
    disk.complete(write(&disk, &*a, 0, 2, 1)).unwrap();
    let first = flush(&disk, &*a);
    disk.complete(write(&disk, &*a, 1, 2, 1)).unwrap();
    let second = flush(&disk, &*a);
    disk.complete(second).unwrap();
    assert_eq!(sectors(&crash(&disk, PowerCut, AllLost), "a"), [2, 2]);
    disk.complete(first).unwrap();
    assert_eq!(sectors(&crash(&disk, PowerCut, AllLost), "a"), [2, 2]);
}

#[test]
fn lengths_and_bytes_are_lost_independently() {
    let disk = SimDisk::new();
    let a = file(&disk, "a", 1, 1);
    a.write_at(&[2; 512], 512).unwrap();
    // Units: the length, then the bytes.
    assert_eq!(disk.units(disk.log_len(), PowerCut), 2);
    assert_eq!(sectors(&crash(&disk, PowerCut, OnlyKept(0)), "a"), [1, 0]);
    assert_eq!(sectors(&crash(&disk, PowerCut, OnlyKept(1)), "a"), [1]);
    // Bytes that were kept past a lost length are not there after growing.
    let after = crash(&disk, PowerCut, OnlyKept(1));
    after
        .open("a", Access::Write)
        .unwrap()
        .set_len(1024)
        .unwrap();
    assert_eq!(sectors(&after, "a"), [1, 0]);
}

#[test]
fn a_lost_cut_takes_later_growth_with_it() {
    let disk = SimDisk::new();
    let a = file(&disk, "a", 2, 1);
    a.set_len(512).unwrap();
    a.set_len(1536).unwrap();
    assert_eq!(sectors(&disk, "a"), [1, 0, 0]);
    assert_eq!(sectors(&crash(&disk, PowerCut, OnlyLost(0)), "a"), [1, 1]);
    assert_eq!(sectors(&crash(&disk, PowerCut, OnlyLost(1)), "a"), [1]);
    assert_eq!(
        sectors(&crash(&disk, PowerCut, OnlyKept(1)), "a"),
        [1, 0, 0]
    );
}

#[test]
fn a_zeroed_range_is_lost_apart_from_the_write_after_it() {
    let disk = SimDisk::new();
    let a = file(&disk, "a", 3, 1);
    a.zero(0, 1536).unwrap();
    a.write_at(&[2; 512], 512).unwrap();
    assert_eq!(sectors(&disk, "a"), [0, 2, 0]);
    assert_eq!(
        sectors(&crash(&disk, PowerCut, OnlyLost(0)), "a"),
        [1, 2, 1]
    );
    assert_eq!(
        sectors(&crash(&disk, PowerCut, OnlyLost(1)), "a"),
        [0, 0, 0]
    );
    assert!(outcomes(&disk, PowerCut, RandomPerSector).contains(&vec![0, 1, 1]));
}

#[test]
fn names_need_their_own_sync_and_bytes_theirs() {
    let disk = SimDisk::new();
    let b = disk.create("b").unwrap();
    b.write_at(&[2; 512], 0).unwrap();
    b.flush("bytes").unwrap();
    assert!(crash(&disk, PowerCut, AllLost).list("").unwrap().is_empty());
    let c = disk.create("c").unwrap();
    c.write_at(&[3; 512], 0).unwrap();
    disk.sync_names("", "names").unwrap();
    let after = crash(&disk, PowerCut, AllLost);
    assert_eq!(after.list("").unwrap(), ["b", "c"]);
    assert_eq!(
        (sectors(&after, "b"), sectors(&after, "c")),
        (vec![2], vec![])
    );
}

#[test]
fn an_unsynced_rename_is_old_or_new_and_never_between() {
    let disk = SimDisk::new();
    drop(file(&disk, "a", 1, 1));
    drop(file(&disk, "b", 1, 2));
    disk.rename("b", "a").unwrap();
    for (strategy, names, byte) in [(AllLost, vec!["a", "b"], 1), (AllKept, vec!["a"], 2)] {
        let after = crash(&disk, PowerCut, strategy);
        assert_eq!(after.list("").unwrap(), names);
        assert_eq!(sectors(&after, "a"), [byte]);
    }
    disk.sync_names("", "swap").unwrap();
    assert_eq!(sectors(&crash(&disk, PowerCut, AllLost), "a"), [2]);
}

#[test]
fn name_changes_are_lost_with_what_they_build_on() {
    let disk = SimDisk::new();
    drop(file(&disk, "a", 1, 1));
    disk.link("a", "b").unwrap(); // unit 0
    drop(disk.create("t").unwrap()); // unit 1
    disk.rename("t", "a").unwrap(); // unit 2
    drop(disk.create("z").unwrap()); // unit 3
    let names = |strategy| crash(&disk, PowerCut, strategy).list("").unwrap();
    // The rename over `a` needs neither be seen without the link of `a` ...
    assert_eq!(names(OnlyLost(0)), ["a", "t", "z"]);
    // ... nor without the name it takes away.
    assert_eq!(names(OnlyLost(1)), ["a", "b", "z"]);
    assert_eq!(names(OnlyKept(2)), ["a", "b"]);
    assert_eq!(names(OnlyKept(3)), ["a", "z"]);
    let after = crash(&disk, PowerCut, OnlyLost(0));
    assert_eq!(sectors(&after, "a"), [1]);
}

#[test]
fn syncing_one_folder_leaves_another_uncertain() {
    let disk = SimDisk::new();
    disk.make_folder("x/y").unwrap();
    drop(disk.create("x/y/r").unwrap());
    drop(disk.create("a").unwrap());
    disk.sync_names("x/y", "records").unwrap();
    let after = crash(&disk, PowerCut, AllLost);
    assert_eq!(after.list("x/y").unwrap(), ["r"]);
    assert!(after.list("").unwrap().is_empty());
    assert_eq!(
        disk.list("nowhere").unwrap_err().kind(),
        ErrorKind::NotFound
    );
}

#[test]
fn a_name_sync_in_flight_covers_earlier_completions_only() {
    let disk = SimDisk::new();
    drop(disk.create("a").unwrap());
    let sync = disk
        .begin(
            SimRequest::SyncNames {
                folder: String::new(),
            },
            "sync",
        )
        .unwrap();
    drop(disk.create("b").unwrap());
    let rename = SimRequest::Rename {
        from: "a".into(),
        over: "c".into(),
    };
    let rename = disk.begin(rename, "swap").unwrap();
    disk.complete(sync).unwrap();
    assert_eq!(crash(&disk, PowerCut, AllLost).list("").unwrap(), ["a"]);
    assert_eq!(crash(&disk, Kill, AllKept).list("").unwrap(), ["b", "c"]);
    disk.complete(rename).unwrap();
    assert_eq!(disk.list("").unwrap(), ["b", "c"]);
}

#[test]
fn prefixes_can_be_asked_for_in_any_order() {
    let disk = SimDisk::new();
    let a = file(&disk, "a", 1, 0);
    let start = disk.log_len();
    for n in 1..=200_u8 {
        a.write_at(&[n; 512], 0).unwrap();
    }
    let at = |n: usize| sectors(&disk.crash(start + 2 * n, Kill, &mut rng(), AllLost), "a")[0];
    let forwards: Vec<u8> = (0..=200).map(at).collect();
    let backwards: Vec<u8> = (0..=200).rev().map(at).rev().collect();
    assert_eq!(forwards, (0..=200).collect::<Vec<u8>>());
    assert_eq!(forwards, backwards);
}

#[test]
fn a_create_in_flight_that_happened_takes_its_number() {
    let disk = SimDisk::new();
    drop(disk.create("a").unwrap());
    let killed = disk.crash(1, Kill, &mut rng(), AllKept);
    assert_eq!(killed.list("").unwrap(), ["a"]);
    killed.create("b").unwrap().write_at(&[1], 0).unwrap();
    assert_eq!(
        (bytes(&killed, "a"), bytes(&killed, "b")),
        (vec![], vec![1])
    );
}

#[test]
fn a_skipped_flush_or_sync_makes_nothing_durable_and_is_listed() {
    let disk = SimDisk::new();
    let a = file(&disk, "a", 1, 1);
    disk.sabotage(Sabotage::SkipFlush("left out"));
    disk.sabotage(Sabotage::SkipSyncNames("left out too"));
    a.write_at(&[2; 512], 0).unwrap();
    a.flush("left out").unwrap();
    disk.rename("a", "b").unwrap();
    disk.sync_names("", "left out too").unwrap();
    let after = crash(&disk, PowerCut, AllLost);
    assert_eq!(sectors(&after, "a"), [1]);
    // What is made from it has the same step left out.
    let a = after.open("a", Access::Write).unwrap();
    a.write_at(&[3; 512], 0).unwrap();
    a.flush("left out").unwrap();
    assert_eq!(sectors(&crash(&after, PowerCut, AllLost), "a"), [1]);
    a.flush("seen in a recovery").unwrap();
    assert_eq!(sectors(&crash(&after, PowerCut, AllLost), "a"), [3]);
    let whys = disk.whys();
    for step in [
        (Step::Flush, "left out"),
        (Step::SyncNames, "left out too"),
        (Step::Flush, "seen in a recovery"),
    ] {
        assert!(whys.contains(&step), "{step:?}");
    }
}

#[test]
fn a_skipped_record_is_neither_written_nor_deleted() {
    let disk = SimDisk::new();
    let volumes = disk.volumes();
    volumes.put_record("kept", b"1", "write").unwrap();
    disk.sabotage(Sabotage::of(Step::Record, "left out"));
    volumes.put_record("lost", b"1", "left out").unwrap();
    volumes.delete_record("kept", "left out").unwrap();
    assert_eq!(volumes.records().unwrap(), ["kept"]);
    assert!(disk.whys().contains(&(Step::Record, "left out")));
    assert!(disk.whys().contains(&(Step::Flush, "write")));
}

#[test]
fn an_early_completion_leaves_the_effect_in_flight() {
    let disk = SimDisk::new();
    let a = file(&disk, "a", 1, 1);
    assert!(!write(&disk, &*a, 0, 1, 1).early());
    disk.sabotage(Sabotage::EarlyCompletion("guest write"));
    let op = write(&disk, &*a, 0, 2, 1);
    assert!(op.early());
    assert_eq!(op.early_answer(), SimDone::Done);
    assert_eq!(sectors(&crash(&disk, Kill, AllLost), "a"), [1]);
    disk.complete(op).unwrap();
    assert_eq!(sectors(&crash(&disk, Kill, AllLost), "a"), [2]);
    assert!(disk.whys().contains(&(Step::Wait, "guest write")));
}

#[test]
fn equal_states_hash_equal_and_others_do_not() {
    let (one, two) = (SimDisk::new(), SimDisk::new());
    drop(file(&one, "a", 3, 1));
    drop(file(&one, "b", 1, 2));
    drop(file(&two, "b", 1, 9));
    let b = two.open("b", Access::Write).unwrap();
    b.zero(0, 512).unwrap();
    b.write_at(&[2; 512], 0).unwrap();
    drop(file(&two, "x", 3, 1));
    assert_ne!(one.state_hash(), two.state_hash());
    two.rename("x", "a").unwrap();
    assert_eq!(one.state_hash(), two.state_hash());
    // A hole and written zeros read the same; a length does not.
    let a = two.open("a", Access::Write).unwrap();
    a.write_at(&[0; 512], 512).unwrap();
    one.open("a", Access::Write)
        .unwrap()
        .zero(512, 512)
        .unwrap();
    assert_eq!(one.state_hash(), two.state_hash());
    a.set_len(1537).unwrap();
    assert_ne!(one.state_hash(), two.state_hash());
    a.set_len(1536).unwrap();
    assert_eq!(one.state_hash(), two.state_hash());
    // Two names of a file are not two files.
    one.link("b", "c").unwrap();
    two.create("c").unwrap().write_at(&[2; 512], 0).unwrap();
    assert_eq!(bytes(&one, "c"), bytes(&two, "c"));
    assert_ne!(one.state_hash(), two.state_hash());
}

#[test]
fn sectors_that_change_places_change_the_hash() {
    let (one, two) = (SimDisk::new(), SimDisk::new());
    for (disk, at) in [(&one, 0), (&two, 512)] {
        let a = file(disk, "a", 2, 1);
        a.write_at(&[2; 512], at).unwrap();
    }
    assert_ne!(one.state_hash(), two.state_hash());
}

#[test]
fn the_run_folder_survives_a_kill_with_exactly_its_stores_and_no_power_cut() {
    let disk = SimDisk::new();
    let run = disk.run();
    let buffer = run.buffer("rec", 20).unwrap();
    assert_eq!(buffer.words(), 3);
    buffer.store(0, 5);
    let between = disk.log_len();
    buffer.store(1, 6);
    run.write_file("lease", b"held").unwrap();
    let load = |disk: &SimDisk| disk.run().existing("rec").map(|b| (b.load(0), b.load(1)));
    assert_eq!(
        load(&disk.crash(between, Kill, &mut rng(), AllLost)),
        Some((5, 0))
    );
    let killed = crash(&disk, Kill, AllLost);
    assert_eq!(load(&killed), Some((5, 6)));
    assert_eq!(
        killed.run().read_file("lease").as_deref(),
        Some(&b"held"[..])
    );
    assert_eq!(killed.run().list(), ["lease", "rec"]);
    assert_ne!(
        killed.state_hash(),
        crash(&disk, PowerCut, AllKept).state_hash()
    );
    assert_eq!(load(&crash(&disk, PowerCut, AllKept)), None);
    assert!(!crash(&killed, PowerCut, AllKept).run().exists("lease"));
    // Whoever has a removed buffer goes on using it unseen.
    run.remove("rec").unwrap();
    buffer.store(2, 7);
    assert_eq!((buffer.load(2), run.exists("rec")), (7, false));
    assert_eq!(run.buffer("rec", 8).unwrap().load(0), 0);
}

#[test]
fn locks_are_exclusive_and_die_with_handle_process_and_crash() {
    let disk = SimDisk::new();
    let a = file(&disk, "a", 1, 1);
    disk.link("a", "b").unwrap();
    let busy = |disk: &SimDisk| disk.open("b", Access::Write).err().map(|e| e.kind());
    assert_eq!(busy(&disk), Some(ErrorKind::WouldBlock));
    assert!(disk.open("a", Access::Read).is_ok());
    assert_eq!(busy(&crash(&disk, Kill, AllLost)), None);
    drop(a);
    assert_eq!(busy(&disk), None);
    let other = disk.new_process();
    let held = other.open("a", Access::Write).unwrap();
    assert_eq!(busy(&disk), Some(ErrorKind::WouldBlock));
    other.kill_process();
    let mine = disk.open("b", Access::Write).unwrap();
    drop(held);
    assert_eq!(
        busy(&disk),
        Some(ErrorKind::WouldBlock),
        "a dead process freed our lock"
    );
    drop(mine);
}

#[test]
fn a_process_dies_alone_after_so_many_changes() {
    let disk = SimDisk::new();
    let other = disk.new_process();
    let a = other.create("a").unwrap();
    other.kill_process_after(2);
    a.write_at(&[1; 512], 0).unwrap();
    a.write_at(&[2; 512], 512).unwrap();
    assert_eq!(
        a.write_at(&[3; 512], 0).unwrap_err().kind(),
        ErrorKind::ConnectionAborted
    );
    assert_eq!(
        other.list("").unwrap_err().kind(),
        ErrorKind::ConnectionAborted
    );
    assert_eq!(sectors(&disk, "a"), [1, 2]);
    assert!(disk.open("a", Access::Write).is_ok());
}

#[test]
fn a_handle_for_reading_cannot_change_a_file() {
    let disk = SimDisk::new();
    drop(file(&disk, "a", 1, 1));
    let a = disk.open("a", Access::Read).unwrap();
    assert!(a.write_at(&[2], 0).is_err());
    assert!(a.set_len(0).is_err());
    assert!(a.zero(0, 512).is_err());
    assert_eq!(sectors(&disk, "a"), [1]);
}

#[test]
fn space_runs_out_and_comes_back() {
    let disk = SimDisk::new();
    let a = file(&disk, "a", 4, 1);
    disk.set_free_bytes(Some(1024));
    assert_eq!(disk.space().unwrap().free, 1024);
    let full = a.write_at(&[2; 1536], 2048).unwrap_err();
    assert_eq!(full.raw_os_error(), Some(nix::libc::ENOSPC));
    assert_eq!(a.len().unwrap(), 2048);
    a.write_at(&[2; 2048], 0).unwrap(); // overwriting takes nothing
    a.zero(0, 512).unwrap();
    a.write_at(&[2; 1536], 2048).unwrap();
    assert_eq!(disk.space().unwrap().free, 0);
    // A file without a name keeps its space until it is closed.
    disk.unlink("a").unwrap();
    assert_eq!(disk.space().unwrap().free, 0);
    drop(a);
    assert_eq!(disk.space().unwrap().free, 1024 + 2048);
}

#[test]
fn the_nth_operation_fails_as_set_up() {
    let disk = SimDisk::new();
    let a = file(&disk, "a", 1, 1);
    let errno = nix::libc::EIO;
    disk.inject(Fault {
        class: Some(OpClass::Write),
        after: 1,
        times: 1,
        errno,
    });
    a.write_at(&[2; 512], 0).unwrap();
    a.flush("not a write").unwrap();
    assert_eq!(
        a.write_at(&[3; 512], 0).unwrap_err().raw_os_error(),
        Some(errno)
    );
    a.write_at(&[4; 512], 0).unwrap();
    assert_eq!(sectors(&disk, "a"), [4]);
}

#[test]
fn a_failed_flush_loses_what_it_should_have_covered_for_good() {
    let disk = SimDisk::new();
    let a = file(&disk, "a", 2, 1);
    a.write_at(&[2; 512], 0).unwrap();
    let errno = nix::libc::EIO;
    disk.inject(Fault {
        class: Some(OpClass::Flush),
        after: 0,
        times: 1,
        errno,
    });
    a.flush("fails").unwrap_err();
    a.write_at(&[2; 512], 512).unwrap();
    a.flush("works").unwrap();
    assert_eq!(sectors(&disk, "a"), [2, 2]);
    assert_eq!(sectors(&crash(&disk, PowerCut, AllLost), "a"), [1, 2]);
    a.write_at(&[2; 512], 0).unwrap();
    a.flush("written again").unwrap();
    assert_eq!(sectors(&crash(&disk, PowerCut, AllLost), "a"), [2, 2]);
}

#[test]
fn marks_tell_what_was_acknowledged_before_an_instant() {
    let disk = SimDisk::new();
    disk.mark(1);
    let a = file(&disk, "a", 1, 1);
    let before = disk.log_len();
    disk.mark(2);
    drop(a);
    assert_eq!(disk.marks(), [(0, 1), (before, 2)]);
    assert!(disk.log_text(0..disk.log_len()).contains("create a #0"));
}

#[test]
fn a_copy_takes_the_source_as_it_is_and_keeps_holes() {
    let disk = SimDisk::new();
    let a = file(&disk, "a", 3, 1);
    a.zero(512, 512).unwrap();
    let b = disk.create("b").unwrap();
    b.write_at(&[9; 2048], 0).unwrap();
    b.copy_from(&*a, 0, 512, 1536).unwrap();
    assert_eq!(sectors(&disk, "b"), [9, 1, 0, 1]);
    assert_eq!(b.allocated().unwrap(), 3 * 512);
    b.copy_from(&*a, 1, 2048, 100).unwrap();
    assert_eq!(b.len().unwrap(), 2148);
    let eof = b.copy_from(&*a, 1024, 0, 1024).unwrap_err();
    assert_eq!(eof.kind(), ErrorKind::UnexpectedEof);
}

#[test]
fn unaligned_writes_keep_their_neighbours() {
    let disk = SimDisk::new();
    let a = file(&disk, "a", 3, 1);
    a.write_at(&[2; 600], 500).unwrap();
    a.zero(510, 4).unwrap();
    a.zero(1530, 1000).unwrap();
    let bytes = bytes(&disk, "a");
    assert_eq!(bytes.len(), 1536);
    let want = |at: usize| match at {
        510..514 | 1530..1536 => 0,
        500..1100 => 2,
        _ => 1,
    };
    assert!(bytes.iter().enumerate().all(|(at, byte)| *byte == want(at)));
}
