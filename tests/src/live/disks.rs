//! Resize, revert, copy, changed, map and stat, on real processes and with
//! clients of others.

use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::Value;

use crate::support::guest::Guest;
use crate::support::host::{Attached, Host};
use crate::support::programs::{have, run};

const MIB: u64 = 1 << 20;

fn qemu(at: &Attached, commands: &[&str]) {
    let mut command = Command::new("qemu-io");
    command.args(["-f", "raw", "-t", "none"]);
    for each in commands {
        command.args(["-c", each]);
    }
    let said = run(command.arg(&at.uri));
    // It tells of a pattern that is not there, and succeeds all the same.
    assert!(!said.contains("verification failed"), "{commands:?}: {said}");
}

fn size(at: &Attached) -> u64 {
    run(Command::new("nbdinfo").arg("--size").arg(&at.uri)).trim().parse().unwrap()
}

fn tools() -> bool {
    have("qemu-io") && have("nbdinfo")
}

/// A disk called `web` that is in use, where the clients are there.
fn web(size: &str) -> Option<(Host, String, Attached)> {
    if !tools() {
        return None;
    }
    let host = Host::new();
    host.sr("store");
    let vdi = host.disk("store", "web", size);
    let at = host.attach(&vdi);
    Some((host, vdi, at))
}

#[test]
fn a_disk_grows_while_a_guest_writes_it() {
    let Some((host, vdi, at)) = web("16MiB") else { return };
    let mut guest = Guest::new(16 * MIB, 7);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let guest = &mut guest;
        let (written, done) = (&at, &done);
        let writer = scope.spawn(move || guest.write(written, |_| done.load(Ordering::Relaxed)));
        // Room in the table, then room where blocks are, twice.
        for target in ["64MiB", "2GiB", "100GiB"] {
            let shown = host.ok(&["vdi", "resize", "web", "--size", target]);
            assert_eq!(shown["uuid"], vdi);
        }
        done.store(true, Ordering::Relaxed);
        assert!(writer.join().unwrap() > 0);
    });
    assert_eq!(host.ok(&["vdi", "show", "web"])["virtual_size"], 100u64 << 30);
    assert_eq!(size(&at), 100 << 30, "a client that connects learns it");
    guest.check(&at);
    let far = ["write -P 0x77 102399M 1M", "flush", "read -P 0x77 102399M 1M", "read -P 0 50G 1M"];
    qemu(&at, &far);
    host.refused(&["vdi", "resize", "web", "--size", "1GiB"], "BAD_SIZE");
    host.refused(&["vdi", "resize", "web", "--size", "3TiB"], "BAD_SIZE");
    // Kill -9: the record belongs to the image as it is now.
    at.kill();
    let at = host.attach(&vdi);
    guest.check(&at);
    qemu(&at, &["read -P 0x77 102399M 1M"]);
    let snapshot = host.ok(&["vdi", "snapshot", "web", "--name", "web@1"]);
    assert_eq!(snapshot["virtual_size"], 100u64 << 30);
    host.refused(&["vdi", "resize", "web@1", "--size", "200GiB"], "READ_ONLY");
    host.refused(&["vdi", "resize", "nobody", "--size", "1GiB"], "NOT_FOUND");
    host.ok(&["vdi", "detach", "web"]);
    host.ok(&["vdi", "resize", "web", "--size", "200GiB"]);
    host.attach_read_only(&vdi);
    host.refused(&["vdi", "resize", "web", "--size", "300GiB"], "IN_USE");
}

#[test]
fn a_disk_goes_back_and_its_former_image_is_collected() {
    let Some((host, vdi, at)) = web("16MiB") else { return };
    qemu(&at, &["write -P 0x11 0 2M"]);
    host.ok(&["vdi", "snapshot", "web", "--name", "web@1"]);
    qemu(&at, &["write -P 0x22 0 4M"]);
    host.refused(&["vdi", "revert", "web", "--to", "web@1"], "IN_USE");
    host.disk("store", "other", "16MiB");
    host.refused(&["vdi", "revert", "other", "--to", "web@1"], "BAD_REQUEST");
    host.refused(&["vdi", "revert", "web", "--to", "nothing"], "NOT_FOUND");
    host.ok(&["vdi", "detach", "web"]);
    host.refused(&["vdi", "revert", "web@1", "--to", "web@1"], "READ_ONLY");
    let reverted = host.ok(&["vdi", "revert", "web", "--to", "web@1"]);
    assert_eq!((reverted["uuid"].as_str(), reverted["kind"].as_str()), (Some(vdi.as_str()), Some("leaf")));
    let at = host.attach(&vdi);
    qemu(&at, &["read -P 0x11 0 2M", "read -P 0 2M 2M", "write -P 0x33 1M 64k"]);
    let ran = host.ok(&["gc", "run", "--wait"]);
    assert_eq!(ran["failed"].as_array().map(Vec::len), Some(0), "{ran}");
    let tree = host.ok(&["sr", "tree", "store"]);
    let garbage = |node: &&Value| node["kind"] == "hidden" && node["children"].as_array().unwrap().is_empty();
    let mut nodes: Vec<&Value> = tree["roots"].as_array().unwrap().iter().collect();
    let mut at_node = 0;
    while let Some(node) = nodes.get(at_node).copied() {
        nodes.extend(node["children"].as_array().unwrap());
        at_node += 1;
    }
    assert_eq!(nodes.into_iter().find(garbage), None, "the former image is gone");
}

#[test]
fn copies_hold_the_same_without_a_parent() {
    let Some((host, _, at)) = web("64MiB") else { return };
    let there = host.sr("there");
    qemu(&at, &["write -P 0x11 0 6M", "write -P 0 20M 4M"]);
    host.ok(&["vdi", "snapshot", "web", "--name", "web@1"]);
    qemu(&at, &["write -P 0x22 1M 64k"]);
    let refused = host.refused(&["vdi", "copy", "web", "--to", "there"], "IN_USE");
    assert!(refused.stderr.contains("snapshot"), "it says what to do: {}", refused.stderr);
    host.refused(&["vdi", "copy", "web@1", "--to", "nowhere"], "NOT_FOUND");
    let copy = host.ok(&["vdi", "copy", "web@1", "--to", "there", "--name", "web2"]);
    assert_eq!((copy["name"].as_str(), copy["depth"].as_u64()), (Some("web2"), Some(1)));
    assert_eq!(copy["parent"], Value::Null);
    let here = host.ok(&["vdi", "copy", "web@1", "--to", "store"]);
    assert_eq!(here["name"], "web@1 copy");
    for made in [&copy, &here] {
        let read = host.attach(made["uuid"].as_str().unwrap());
        qemu(&read, &["read -P 0x11 0 6M", "read -P 0 6M 58M"]);
        host.ok(&["vdi", "detach", made["uuid"].as_str().unwrap()]);
    }
    let image = there.join(format!("{}.vhd", copy["uuid"].as_str().unwrap()));
    assert!(image.metadata().unwrap().len() < 8 * MIB, "zeros take no room");
    let left = std::fs::read_dir(&there).unwrap().flatten();
    assert_eq!(left.filter(|file| file.file_name().to_string_lossy().starts_with("tmp-")).count(), 0);
}

#[test]
fn changes_and_places_are_told_of_an_attached_disk() {
    let Some((host, vdi, at)) = web("64MiB") else { return };
    qemu(&at, &["write -P 0x11 0 6M"]);
    host.ok(&["vdi", "snapshot", "web", "--name", "web@1"]);
    let clone = host.ok(&["vdi", "clone", "web@1", "--name", "fork"]);
    let other = host.attach(clone["uuid"].as_str().unwrap());
    // Not flushed: the tables on disk know nothing of it yet.
    qemu(&at, &["write -P 0x21 1M 64k"]);
    qemu(&other, &["write -P 0x22 2M 8k"]);
    let range = |offset: u64, length: u64| serde_json::json!({"offset": offset, "length": length});
    let changed = |vdi: &str, since: &str| host.ok(&["vdi", "changed", vdi, "--since", since]);
    assert_eq!(changed("web", "web@1"), serde_json::json!([range(MIB, 64 << 10)]));
    let both = serde_json::json!([range(MIB, 64 << 10), range(2 * MIB, 8 << 10)]);
    assert_eq!(changed("web", "fork"), both);
    assert_eq!(changed("fork", "web"), both);
    assert_eq!(changed("web", "web"), serde_json::json!([]));
    host.refused(&["vdi", "changed", "web", "--since", "nothing"], "NOT_FOUND");

    let map = host.ok(&["vdi", "map", "web"]);
    let extents = map.as_array().unwrap();
    let sum: u64 = extents.iter().map(|extent| extent["length"].as_u64().unwrap()).sum();
    assert_eq!(sum, 64 * MIB, "every byte once");
    let own = extents.iter().find(|extent| extent["node"] == vdi.as_str()).unwrap();
    assert_eq!((own["offset"].as_u64(), own["length"].as_u64()), (Some(MIB), Some(64 << 10)));
    let part = host.ok(&["vdi", "map", "web", "1MiB", "4KiB"]);
    assert_eq!(part.as_array().map(Vec::len), Some(1));
    assert_eq!((part[0]["length"].as_u64(), part[0]["depth"].as_u64()), (Some(4096), Some(1)));
    host.refused(&["vdi", "map", "web", "64MiB"], "BAD_SIZE");

    let stat = host.ok(&["vdi", "stat", "web"]);
    assert_eq!(stat["own_bytes"], 2 * MIB);
    assert_eq!(
        (stat["shared_bytes"].as_u64(), stat["freed_if_deleted_bytes"].as_u64()),
        (Some(6 * MIB), Some(2 * MIB))
    );
    assert_eq!(stat["chain"].as_array().map(Vec::len), Some(2));
    // The tables for people say the same; the disk was not disturbed.
    qemu(&at, &["read -P 0x21 1M 64k", "read -P 0x11 0 1M"]);
}
