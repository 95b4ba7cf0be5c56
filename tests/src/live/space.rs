//! Folders that are full, or cannot be written.

use std::path::Path;
use std::process::Command;

use crate::support::host::{Attached, Host, wait_until};
use crate::support::programs::{have, output, run};
use crate::support::small_fs::{Mounted, leave_free};

fn create(path: &Path) -> [&str; 7] {
    ["sr", "create", "store", "--type", "file", "--path", path.to_str().unwrap()]
}

#[test]
fn a_folder_that_cannot_be_written_is_refused() {
    let host = Host::new();
    let Some(small) = Mounted::ext4(&host, 16) else { return };
    small.remount("ro");
    let said = host.refused(&create(&small.folder), "READ_ONLY");
    assert!(said.stderr.contains(small.folder.to_str().unwrap()), "{said:?}");
    assert_eq!(host.ok(&["sr", "list"]).as_array().map(Vec::len), Some(0));
    small.remount("rw");
    host.ok(&create(&small.folder));
}

#[test]
fn a_missing_folder_is_not_introduced() {
    let host = Host::new();
    let folder = host.data().join("missing");
    let path = folder.to_str().unwrap();
    let introduce = ["sr", "introduce", "store", "--type", "file", "--path", path];
    let said = host.refused(&introduce, "NOT_FOUND");
    assert!(said.stderr.contains(path), "{said:?}");
    assert!(!folder.exists());
}

#[test]
fn a_full_folder_says_so_and_heals() {
    let host = Host::new();
    let Some(small) = Mounted::ext4(&host, 16) else { return };
    host.ok(&create(&small.folder));
    let vdi = host.disk("store", "d", "64MiB");
    let filler = small.folder.join("filler");
    fill(&filler);
    let before = listing(&small.folder);
    host.refused(&["vdi", "create", "store", "e", "--size", "1TiB"], "NO_SPACE");
    assert_eq!(listing(&small.folder), before, "nothing is left behind");
    host.ok(&["vdi", "show", &vdi]);
    std::fs::remove_file(&filler).unwrap();
    host.disk("store", "e", "64MiB");
}

/// A disk in use that is larger than the filesystem it lies on.
fn on_small() -> Option<(Host, Mounted, Attached)> {
    if !have("qemu-io") {
        return None;
    }
    let host = Host::new();
    let small = Mounted::ext4(&host, 32)?;
    host.ok(&create(&small.folder));
    let at = host.attach(&host.disk("store", "d", "64MiB"));
    Some((host, small, at))
}

#[test]
fn a_disk_on_a_full_folder_reports_errors_and_goes_on() {
    let Some((host, small, at)) = on_small() else { return };
    let io = |what: &str| {
        let mut command = Command::new("qemu-io");
        output(command.args(["-f", "raw", "-t", "none", "-c", what]).arg(&at.uri))
    };
    assert!(io("write -P 1 0 1M").status.success());
    let filler = small.folder.join("filler");
    fill(&filler);
    let full = io("write -P 2 40M 8M");
    assert!(!full.status.success(), "{full:?}");
    assert!(io("read -P 1 0 1M").status.success(), "what was there stays readable");
    std::fs::remove_file(&filler).unwrap();
    let healed = io("write -P 3 40M 8M");
    assert!(healed.status.success(), "{healed:?}");
    assert!(io("read -P 3 40M 8M").status.success());
    host.ok(&["vdi", "detach", "d"]);
}

#[test]
fn a_trim_makes_room_on_a_full_folder_though_nothing_else_does() {
    let Some((host, small, mut at)) = on_small() else { return };
    let write = ["-f", "raw", "-t", "none", "-c", "write -P 1 0 8M", "-c", "flush"];
    run(Command::new("qemu-io").args(write).arg(&at.uri));
    // Gives back the space it took ahead.
    host.ok(&["vdi", "detach", "d"]);
    at = host.attach("d");
    let io = |what: &[&str]| {
        let mut command = Command::new("qemu-io");
        command.args(["-f", "raw", "-t", "none", "-d", "unmap"]);
        for what in what {
            command.args(["-c", what]);
        }
        output(command.arg(&at.uri))
    };
    // Data takes the last room, and its metadata finds none.
    let filler = small.folder.join("filler");
    fill(&filler);
    let len = filler.metadata().unwrap().len();
    std::fs::File::options().write(true).open(&filler).unwrap().set_len(len - (64 << 10)).unwrap();
    let writes: Vec<String> = (0..32).map(|n| format!("write -P 2 {}k 4k", (16 << 10) + 4 * n)).collect();
    io(&writes.iter().map(String::as_str).collect::<Vec<_>>());
    assert!(!io(&["flush"]).status.success(), "there is room all the same");
    // The first blocks are given up, and nothing but that happens.
    assert!(io(&["discard 2M 6M"]).status.success());
    wait_until("a flush to go through", || io(&["flush"]).status.success());
    let again = io(&["write -P 3 32M 2M", "flush", "read -P 3 32M 2M", "read -P 1 0 2M", "read -P 0 2M 6M"]);
    let said = String::from_utf8_lossy(&again.stdout).into_owned();
    assert!(again.status.success() && !said.contains("failed"), "{said}");
    host.ok(&["vdi", "detach", "d"]);
}

#[test]
fn what_nobody_wrote_is_given_back_when_space_runs_short() {
    const BLOCKS: u64 = 40;
    if !have("qemu-io") {
        return;
    }
    let host = Host::new();
    let Some(small) = Mounted::ext4(&host, 256) else { return };
    host.ok(&create(&small.folder));
    let at = host.attach(&host.disk("store", "d", "128MiB"));
    let io = |what: &dyn Fn(u64) -> Vec<String>| {
        let mut command = Command::new("qemu-io");
        command.args(["-f", "raw", "-t", "none"]);
        for what in (0..BLOCKS).flat_map(what) {
            command.args(["-c", &what]);
        }
        let said = output(command.arg(&at.uri));
        let text = String::from_utf8_lossy(&said.stdout).into_owned();
        assert!(said.status.success() && !text.contains("failed"), "{text}");
    };
    io(&|n| vec![format!("write -P {} {}k 4k", n + 1, 2048 * n + 64)]);
    host.ok(&["vdi", "snapshot", "d", "--name", "s"]);
    let taken = || -> u64 {
        use std::os::unix::fs::MetadataExt;
        let images = std::fs::read_dir(&small.folder).unwrap().map(|file| file.unwrap());
        let images = images.filter(|file| file.file_name().to_string_lossy().ends_with(".vhd"));
        images.map(|file| file.metadata().unwrap().blocks() * 512).sum()
    };
    assert!(taken() >= BLOCKS * (2 << 20), "{} bytes are taken: whole blocks are not", taken());
    leave_free(&small.folder, "filler", 40 << 20);
    host.ok(&["gc", "run", "store"]);
    wait_until("space that nobody wrote to be given back", || taken() < 4 << 20);
    io(&|n| {
        let (block, written) = (2048 * n, 2048 * n + 64);
        vec![
            format!("read -P 0 {block}k 64k"),
            format!("read -P {} {written}k 4k", n + 1),
            format!("read -P 0 {}k 1980k", written + 4),
        ]
    });
    host.ok(&["vdi", "detach", "d"]);
}

/// Fills the file system to the last byte.
fn fill(path: &Path) {
    use std::io::Write;
    let mut file = std::fs::File::create(path).unwrap();
    for size in [1 << 20, 4096, 512] {
        let data = vec![1; size];
        while file.write_all(&data).is_ok() {}
    }
    // Not everything that was written may lie on the disk yet.
    let _ = file.sync_all();
}

/// Names in a folder.
fn listing(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    let mut names: Vec<_> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_copy_that_finds_no_room_leaves_nothing() {
    if !have("qemu-io") {
        return;
    }
    let host = Host::new();
    let Some(small) = Mounted::ext4(&host, 16) else { return };
    host.ok(&create(&small.folder));
    host.sr("big");
    let vdi = host.disk("big", "web", "64MiB");
    let at = host.attach(&vdi);
    run(Command::new("qemu-io").args(["-f", "raw", "-t", "none", "-c", "write -P 0x11 0 40M"]).arg(&at.uri));
    host.ok(&["vdi", "detach", "web"]);
    let before = listing(&small.folder);
    host.refused(&["vdi", "copy", "web", "--to", "store"], "NO_SPACE");
    assert_eq!(listing(&small.folder), before);
    assert_eq!(host.ok(&["vdi", "list", "store"]).as_array().map(Vec::len), Some(0));
    // There is room for another one.
    host.disk("store", "small", "4MiB");
}
