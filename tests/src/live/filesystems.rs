//! A repository on each filesystem that the file backend is for, through its
//! whole life: what is reported of it, and that everything works there.
//!
//! XFS and btrfs are made on loop devices. `COPPICE_FS_DIRS` names folders on
//! others to try, parted by colons: a network mount, say.

use std::path::{Path, PathBuf};
use std::time::Duration;

use coppice::nbd_client::Client;
use serde_json::Value;

use crate::support::guest::Guest;
use crate::support::host::{Attached, Host, wait_until};
use crate::support::small_fs::Mounted;

const DISK: &str = "32MiB";
const DISK_BYTES: u64 = 32 << 20;
/// Blocks the guest fills before it scatters.
const FILLED_BLOCKS: u32 = 6;
/// Acknowledged writes of each stretch.
const WRITES: u64 = 150;
/// Longest wait for an answer of a disk.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);

/// A repository on the filesystem, and a disk in it that is in use.
struct Life<'a> {
    host: &'a Host,
    guest: Guest,
    at: Attached,
}

impl Life<'_> {
    fn write(&mut self) {
        assert!(self.guest.write(&self.at, |acked| acked >= WRITES) >= WRITES);
    }

    fn snapshot(&self, name: &str) {
        self.host.ok(&["vdi", "snapshot", "web", "--name", name]);
    }

    /// What a snapshot must hold; the disk goes on.
    fn is_held_by(&self, guest: &Guest, vdi: &str) {
        let to = self.host.data().join(format!("{vdi}.raw"));
        self.host.ok(&["vdi", "export", vdi, "--format", "raw", to.to_str().unwrap()]);
        guest.clone().check_bytes(&std::fs::read(&to).unwrap());
        std::fs::remove_file(&to).unwrap();
    }
}

/// Space of what a guest no longer needs comes back.
fn trims(host: &Host) {
    let at = host.attach(&host.disk("store", "room", "8MiB"));
    let physical = || host.ok(&["vdi", "show", "room"])["physical_size"].as_u64().unwrap();
    let mut client = Client::connect(&at.socket, &at.export).unwrap();
    let did = |client: &mut Client| client.next(ANSWER_LIMIT).unwrap().outcome.unwrap();
    for piece in 0..64 {
        client.write(piece << 16, &[0x5a; 64 << 10], false).unwrap();
        did(&mut client);
    }
    client.flush().unwrap();
    did(&mut client);
    let before = physical();
    for piece in 0..4 {
        client.trim(piece << 20, 1 << 20).unwrap();
        did(&mut client);
    }
    client.flush().unwrap();
    did(&mut client);
    client.close();
    wait_until("space to come back", || physical() + (3 << 20) < before);
    host.ok(&["vdi", "detach", "room", "--force"]);
    host.ok(&["vdi", "delete", "room"]);
}

fn sr(host: &Host) -> Value {
    host.ok(&["sr", "show", "store"])
}

/// Everything on one filesystem.
fn lives_on(host: &Host, folder: &Path) {
    host.ok(&["sr", "create", "store", "--type", "file", "--path", folder.to_str().unwrap()]);
    eprintln!("{}: {}", folder.display(), sr(host));
    let vdi = host.disk("store", "web", DISK);
    let mut life = Life { host, guest: Guest::new(DISK_BYTES, 5), at: host.attach(&vdi) };
    // Merged below the live leaf, twice, and kept apart once.
    life.guest.fill(&life.at, 0..FILLED_BLOCKS);
    life.snapshot("one");
    life.write();
    life.snapshot("two");
    let two = life.guest.clone();
    life.write();
    life.snapshot("three");
    life.write();
    host.ok(&["vdi", "clone", "two", "--name", "twin"]);
    ["one", "three"].iter().for_each(|name| drop(host.ok(&["vdi", "delete", name])));
    let ran = host.ok(&["gc", "run", "store", "--wait"]);
    assert_eq!(ran["failed"].as_array().map(Vec::len), Some(0), "{ran}");
    let merged = ["coalesced", "leaf_coalesced"].map(|what| ran[what].as_u64().unwrap());
    assert!(merged.iter().sum::<u64>() >= 2, "{ran}");
    if sr(host)["reflink"] == true {
        assert!(ran["bytes_cloned"].as_u64().unwrap() > 0, "nothing was shared: {ran}");
    }
    life.guest.check(&life.at);
    life.is_held_by(&two, "two");
    life.is_held_by(&two, "twin");
    if sr(host)["punch_hole"] == true {
        trims(host);
    }
    // Killed, and brought back on the same socket with what was acknowledged.
    life.write();
    life.at.kill();
    wait_until("the disk to be back", || life.at.answers());
    life.at = Attached::of(&host.ok(&["vdi", "show", "web"]));
    life.guest.check(&life.at);
    host.ok(&["vdi", "detach", "web"]);
    host.ok(&["vdi", "copy", "web", "--to", "store", "--name", "copied"]);
    life.is_held_by(&life.guest, "copied");
    host.ok(&["vdi", "revert", "web", "--to", "two"]);
    life.is_held_by(&two, "web");
}

/// It is checked, goes away, comes back, and is emptied.
fn comes_back(host: &Host, folder: &Path) {
    let report = host.ok(&["sr", "check", "store"]);
    assert_eq!(report["sound"], true, "{report}");
    ["detach", "attach"].iter().for_each(|verb| drop(host.ok(&["sr", verb, "store"])));
    let vdis = host.ok(&["vdi", "list", "store"]);
    assert_eq!(vdis.as_array().unwrap().len(), 4, "{vdis}");
    for vdi in vdis.as_array().unwrap() {
        host.ok(&["vdi", "delete", vdi["uuid"].as_str().unwrap()]);
    }
    host.ok(&["gc", "run", "store", "--wait"]);
    host.ok(&["sr", "destroy", "store"]);
    let left = std::fs::read_dir(folder).unwrap().flatten().map(|file| file.file_name());
    // What a filesystem's maker puts there is not ours.
    let left: Vec<_> = left.filter(|name| name != "lost+found").collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn a_repository_lives_on_xfs_and_shares_extents_there() {
    let host = Host::new();
    let Some(mounted) = Mounted::xfs(&host) else { return };
    lives_on(&host, &mounted.folder);
    let sr = sr(&host);
    assert_eq!((&sr["filesystem"], &sr["network"]), (&"xfs".into(), &false.into()));
    assert_eq!((&sr["reflink"], &sr["punch_hole"]), (&true.into(), &true.into()));
    comes_back(&host, &mounted.folder);
}

#[test]
fn a_repository_lives_on_btrfs_and_shares_extents_there() {
    let host = Host::new();
    let Some(mounted) = Mounted::btrfs(&host) else { return };
    lives_on(&host, &mounted.folder);
    let sr = sr(&host);
    assert_eq!((&sr["filesystem"], &sr["network"]), (&"btrfs".into(), &false.into()));
    assert_eq!((&sr["reflink"], &sr["punch_hole"]), (&true.into(), &true.into()));
    comes_back(&host, &mounted.folder);
}

#[test]
fn a_repository_lives_on_ext4_and_shares_nothing_there() {
    let host = Host::new();
    let Some(mounted) = Mounted::ext4(&host, 512) else { return };
    lives_on(&host, &mounted.folder);
    let sr = sr(&host);
    assert_eq!((&sr["filesystem"], &sr["network"]), (&"ext4".into(), &false.into()));
    assert_eq!((&sr["reflink"], &sr["punch_hole"]), (&false.into(), &true.into()));
    comes_back(&host, &mounted.folder);
}

#[test]
#[ignore = "needs COPPICE_FS_DIRS, folders on further filesystems"]
fn a_repository_lives_on_any_filesystem_that_is_named() {
    let named = std::env::var_os("COPPICE_FS_DIRS").expect("COPPICE_FS_DIRS names folders");
    for folder in std::env::split_paths(&named) {
        let host = Host::new();
        let folder: PathBuf = folder.join(uuid::Uuid::new_v4().to_string());
        std::fs::create_dir(&folder).unwrap();
        lives_on(&host, &folder);
        comes_back(&host, &folder);
        std::fs::remove_dir(&folder).unwrap();
    }
}
