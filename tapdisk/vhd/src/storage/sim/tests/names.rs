//! What a crash leaves of names.

use super::*;

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
    assert_eq!((sectors(&after, "b"), sectors(&after, "c")), (vec![2], vec![]));
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
    assert_eq!(disk.list("nowhere").unwrap_err().kind(), ErrorKind::NotFound);
}

#[test]
fn a_name_sync_in_flight_covers_earlier_completions_only() {
    let disk = SimDisk::new();
    drop(disk.create("a").unwrap());
    let sync = disk.begin(SimRequest::SyncNames { folder: String::new() }, "sync").unwrap();
    drop(disk.create("b").unwrap());
    let rename = SimRequest::Rename { from: "a".into(), over: "c".into() };
    let rename = disk.begin(rename, "swap").unwrap();
    disk.complete(sync).unwrap();
    assert_eq!(crash(&disk, PowerCut, AllLost).list("").unwrap(), ["a"]);
    assert_eq!(crash(&disk, Kill, AllKept).list("").unwrap(), ["b", "c"]);
    disk.complete(rename).unwrap();
    assert_eq!(disk.list("").unwrap(), ["b", "c"]);
}

#[test]
fn a_create_in_flight_that_happened_takes_its_number() {
    let disk = SimDisk::new();
    drop(disk.create("a").unwrap());
    let killed = disk.crash(1, Kill, &mut rng(), AllKept);
    assert_eq!(killed.list("").unwrap(), ["a"]);
    killed.create("b").unwrap().write_at(&[1], 0).unwrap();
    assert_eq!((bytes(&killed, "a"), bytes(&killed, "b")), (vec![], vec![1]));
}
