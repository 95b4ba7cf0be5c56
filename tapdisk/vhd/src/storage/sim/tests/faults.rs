//! Steps left out and operations that fail.

use super::*;

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
    for step in
        [(Step::Flush, "left out"), (Step::SyncNames, "left out too"), (Step::Flush, "seen in a recovery")]
    {
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
    disk.inject(Fault { class: Some(OpClass::Write), after: 1, times: 1, errno });
    a.write_at(&[2; 512], 0).unwrap();
    a.flush("not a write").unwrap();
    assert_eq!(a.write_at(&[3; 512], 0).unwrap_err().raw_os_error(), Some(errno));
    a.write_at(&[4; 512], 0).unwrap();
    assert_eq!(sectors(&disk, "a"), [4]);
}

#[test]
fn a_failed_flush_loses_what_it_should_have_covered_for_good() {
    let disk = SimDisk::new();
    let a = file(&disk, "a", 2, 1);
    a.write_at(&[2; 512], 0).unwrap();
    let errno = nix::libc::EIO;
    disk.inject(Fault { class: Some(OpClass::Flush), after: 0, times: 1, errno });
    a.flush("fails").unwrap_err();
    a.write_at(&[2; 512], 512).unwrap();
    a.flush("works").unwrap();
    assert_eq!(sectors(&disk, "a"), [2, 2]);
    assert_eq!(sectors(&crash(&disk, PowerCut, AllLost), "a"), [1, 2]);
    a.write_at(&[2; 512], 0).unwrap();
    a.flush("written again").unwrap();
    assert_eq!(sectors(&crash(&disk, PowerCut, AllLost), "a"), [2, 2]);
}
