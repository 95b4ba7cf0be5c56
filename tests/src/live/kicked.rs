//! The collector begins because it is kicked: here it looks once a day of its
//! own, so that whatever it does within a test somebody told it to do.

use std::path::Path;

use crate::support::host::{Host, wait_until};

/// The hidden image below a disk and its snapshot.
fn base(folder: &Path, visible: &[&str]) -> String {
    let names = std::fs::read_dir(folder).unwrap().flatten().map(|file| file.file_name());
    let names = names.filter_map(|name| name.into_string().ok()).filter(|name| name.ends_with(".vhd"));
    let mut hidden = names.filter(|name| !visible.iter().any(|vdi| name.starts_with(vdi)));
    let found = hidden.next().unwrap();
    assert_eq!(hidden.next(), None);
    found
}

#[test]
fn the_collector_begins_because_it_is_kicked() {
    let host = Host::without_rounds();
    let folder = host.sr("store");
    let disk = host.disk("store", "disk", "8MiB");
    let at = host.attach(&disk);
    let mut client = coppice::nbd_client::Client::connect(&at.socket, &at.export).unwrap();
    client.write(0, &[0x5A; 4096], true).unwrap();
    client.next(crate::support::host::LIMIT).unwrap().outcome.unwrap();
    client.close();
    let snapshot = host.ok(&["vdi", "snapshot", "disk", "--name", "snap"]);
    let snapshot = snapshot["uuid"].as_str().unwrap();
    let base = folder.join(base(&folder, &[&disk, snapshot]));
    let kept = host.data().join("kept");
    std::fs::copy(&base, &kept).unwrap();
    // Every kick of before is answered after this, and its own look is far off.
    host.ok(&["gc", "run", "store", "--wait"]);

    host.ok(&["vdi", "delete", "snap"]);
    wait_until("the disk to be merged after the deletion", || !base.exists());
    wait_until("that merge to end", || host.ok(&["gc", "status", "store"])["srs"][0]["running"] == 0);
    host.ok(&["vdi", "detach", "disk"]);
    host.ok(&["vdi", "delete", "disk"]);
    host.ok(&["gc", "run", "store", "--wait"]);

    // Garbage that somebody else brings: nobody but a scan says so.
    std::fs::copy(&kept, &base).unwrap();
    host.ok(&["sr", "scan", "store"]);
    wait_until("the garbage that a scan found to be deleted", || !base.exists());
}
