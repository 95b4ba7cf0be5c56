//! Locks, processes, memory, marks, hashes.

use super::*;

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
    one.open("a", Access::Write).unwrap().zero(512, 512).unwrap();
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
    assert_eq!(load(&disk.crash(between, Kill, &mut rng(), AllLost)), Some((5, 0)));
    let killed = crash(&disk, Kill, AllLost);
    assert_eq!(load(&killed), Some((5, 6)));
    assert_eq!(killed.run().read_file("lease").as_deref(), Some(&b"held"[..]));
    assert_eq!(killed.run().list(), ["lease", "rec"]);
    assert_ne!(killed.state_hash(), crash(&disk, PowerCut, AllKept).state_hash());
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
    assert_eq!(busy(&disk), Some(ErrorKind::WouldBlock), "a dead process freed our lock");
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
    assert_eq!(a.write_at(&[3; 512], 0).unwrap_err().kind(), ErrorKind::ConnectionAborted);
    assert_eq!(other.list("").unwrap_err().kind(), ErrorKind::ConnectionAborted);
    assert!(!other.is_alive() && disk.is_alive());
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
fn a_device_keeps_its_length_and_starts_as_garbage() {
    let disk = SimDisk::new();
    disk.create_device("lv.vhd", 4096).unwrap();
    let lv = disk.open("lv.vhd", Access::Write).unwrap();
    assert!(lv.is_device());
    assert_eq!(&bytes(&disk, "lv.vhd")[..8], b"conectix");
    assert_eq!(lv.set_len(8192).unwrap_err().kind(), ErrorKind::Unsupported);
    let past = lv.write_at(&[1; 1024], 3584).unwrap_err();
    assert_eq!(past.raw_os_error(), Some(nix::libc::ENOSPC));
    lv.zero(0, 1024).unwrap();
    lv.flush("zeros").unwrap();
    lv.write_at(&[7; 512], 512).unwrap();
    disk.resize_device("lv.vhd", 8192).unwrap();
    let after = crash(&disk, PowerCut, AllLost);
    assert_eq!(sectors(&after, "lv.vhd")[..2], [0, 0]);
    let grown = sectors(&after, "lv.vhd");
    assert!(grown[2..15].iter().all(|byte| *byte != 0));
    assert_eq!(grown[15..], [0]);
    assert_eq!(sectors(&crash(&disk, Kill, AllLost), "lv.vhd")[..2], [0, 7]);
    assert!(after.open("lv.vhd", Access::Read).unwrap().is_device());
    assert_eq!(lv.allocated().unwrap(), 8192);
}
