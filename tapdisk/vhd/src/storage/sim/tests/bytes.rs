//! What a crash leaves of a file.

use super::*;

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
    killed.open("a", Access::Write).unwrap().flush("recovery").unwrap();
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
    assert_eq!(outcomes(&disk, Kill, RandomPerSector), BTreeSet::from([vec![2, 2]]));
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
    after.open("a", Access::Write).unwrap().set_len(1024).unwrap();
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
    assert_eq!(sectors(&crash(&disk, PowerCut, OnlyKept(1)), "a"), [1, 0, 0]);
}

#[test]
fn a_zeroed_range_is_lost_apart_from_the_write_after_it() {
    let disk = SimDisk::new();
    let a = file(&disk, "a", 3, 1);
    a.zero(0, 1536).unwrap();
    a.write_at(&[2; 512], 512).unwrap();
    assert_eq!(sectors(&disk, "a"), [0, 2, 0]);
    assert_eq!(sectors(&crash(&disk, PowerCut, OnlyLost(0)), "a"), [1, 2, 1]);
    assert_eq!(sectors(&crash(&disk, PowerCut, OnlyLost(1)), "a"), [0, 0, 0]);
    assert!(outcomes(&disk, PowerCut, RandomPerSector).contains(&vec![0, 1, 1]));
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

#[test]
fn of_two_growing_writes_in_flight_the_longer_sets_the_length() {
    let disk = SimDisk::new();
    let a = file(&disk, "a", 1, 1);
    let (long, short) = (write(&disk, &*a, 2, 2, 1), write(&disk, &*a, 1, 3, 1));
    assert_eq!(sectors(&crash(&disk, Kill, AllKept), "a"), [1, 3, 2]);
    assert_eq!(sectors(&crash(&disk, PowerCut, AllKept), "a"), [1, 3, 2]);
    disk.complete(long).unwrap();
    disk.complete(short).unwrap();
    assert_eq!(sectors(&disk, "a"), [1, 3, 2]);
}
