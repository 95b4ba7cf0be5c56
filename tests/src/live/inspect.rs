//! `sr probe`, `sr check` and `sr show`: what is there, told without changing
//! it; and an SR of the reference that comes here and goes back.

use std::path::Path;

use serde_json::Value;
use uuid::Uuid;
use vhd::check::{Options, check};
use vhd::storage::{Access, FileVolumes, PosixFs, Volumes};

use crate::support::forge::Forged;
use crate::support::host::Host;

fn probe(host: &Host, path: &Path) -> Value {
    host.ok(&["sr", "probe", "--type", "file", "--path", path.to_str().unwrap()])
}

/// Every file below a folder with its bytes, the dot folder left out.
fn files(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let mut all: Vec<(String, Vec<u8>)> = std::fs::read_dir(folder)
        .unwrap()
        .flatten()
        .filter(|entry| entry.file_type().unwrap().is_file())
        .map(|entry| (entry.file_name().into_string().unwrap(), std::fs::read(entry.path()).unwrap()))
        .collect();
    all.sort();
    all
}

#[test]
fn a_probe_tells_what_is_there_and_by_whom_it_is_used() {
    let (one, two) = (Host::new(), Host::new());
    let empty = one.data().join("empty");
    assert_eq!(probe(&one, &empty)["found"], "missing");
    assert!(!empty.exists(), "it is not made");
    std::fs::create_dir(&empty).unwrap();
    assert_eq!(probe(&one, &empty)["found"], "nothing");
    assert_eq!(std::fs::read_dir(&empty).unwrap().count(), 0);

    let folder = one.sr("store");
    one.disk("store", "d", "8MiB");
    let seen = probe(&two, &folder);
    assert_eq!((&seen["found"], &seen["name"], &seen["vdis"]), (&"ours".into(), &"store".into(), &1.into()));
    assert_eq!(seen["uuid"], one.ok(&["sr", "show", "store"])["uuid"]);
    assert_eq!((&seen["owner"]["in_use"], &seen["owner"]["this_host"]), (&true.into(), &false.into()));
    assert_eq!(probe(&one, &folder)["owner"]["this_host"], true);
    one.ok(&["sr", "detach", "store"]);
    assert_eq!(probe(&two, &folder)["owner"]["in_use"], false);
    one.refused(&["sr", "probe", "--type", "lvm", "--device", "/dev/null"], "UNSUPPORTED");
}

#[test]
fn the_space_of_an_sr_is_accounted_for() {
    let host = Host::new();
    host.sr("store");
    host.disk("store", "d", "8MiB");
    host.disk("store", "e", "16MiB");
    let sr = host.ok(&["sr", "show", "store"]);
    let number = |name: &str| sr[name].as_u64().unwrap_or_else(|| panic!("{name}: {sr}"));
    assert_eq!((number("virtual_size"), number("vdis"), number("hidden")), (24 << 20, 2, 0));
    assert!(number("physical_size") > 0 && number("physical_size") <= number("used"));
    assert!(number("used") + number("free") <= number("size"));
    assert!(sr["filesystem"].is_string() && sr["punch_hole"].is_boolean() && sr["reflink"].is_boolean());
}

#[test]
fn a_check_names_what_is_broken_and_what_is_left_over_and_changes_nothing() {
    let host = Host::new();
    let folder = host.sr("store");
    let good = host.disk("store", "good", "8MiB");
    let child = host.disk("store", "child", "8MiB");
    let at = host.attach(&good);
    host.ok(&["vdi", "detach", &good]);
    drop(at);
    let broken = Uuid::new_v4();
    let image = Forged::from(&folder.join(format!("{child}.vhd"))).with_footer_uuid(Uuid::new_v4());
    let name = image.clone().with_every_block_at(3).put(&folder, broken);
    let unread = Uuid::new_v4();
    image.with_contradicting_footers().put(&folder, unread);
    let strange = Uuid::new_v4();
    std::fs::write(folder.join(format!("coalesce_{strange}")), "1").unwrap();
    std::fs::write(folder.join("notes.txt"), "mine").unwrap();

    let before = files(&folder);
    let report = host.ok(&["sr", "check", "store"]);
    assert_eq!(files(&folder), before);
    assert_eq!((&report["sound"], &report["images"]), (&false.into(), &4.into()));
    let all = report["broken"].as_array().unwrap();
    assert_eq!(all.len(), 2, "{report}");
    let of = |uuid: Uuid| all.iter().find(|b| b["uuid"] == uuid.to_string()).unwrap();
    assert_eq!(of(broken)["volume"], name.as_str());
    assert!(of(broken)["reasons"][0].as_str().unwrap().contains("block"), "{report}");
    assert!(of(unread)["reasons"][0].as_str().unwrap().contains("uuid"), "{report}");
    let leftovers: Vec<&str> =
        report["leftovers"].as_array().unwrap().iter().map(|l| l["what"].as_str().unwrap()).collect();
    assert_eq!(leftovers, [format!("coalesce_{strange}").as_str(), "notes.txt"]);
    host.refused(&["sr", "check", "--strict", "store"], "BAD_IMAGE");
    host.ok(&["sr", "detach", "store"]);
    assert_eq!(host.ok(&["sr", "check", "store"])["broken"], report["broken"], "detached as well");
}

#[test]
fn an_sr_of_the_reference_comes_here_and_goes_back() {
    let host = Host::new();
    // Images as the reference leaves them: no dot folder, a leaf merge that
    // was stopped between its two renames, a merge that had only begun.
    let made = host.sr("made");
    let disk = host.disk("made", "d", "8MiB");
    let at = host.attach(&disk);
    write(&at.uri, 0x11);
    host.ok(&["vdi", "snapshot", "d", "--name", "s"]);
    host.ok(&["vdi", "detach", "d"]);
    host.ok(&["gc", "pause", "made"]);
    host.ok(&["vdi", "delete", "s"]);
    let parent = host.ok(&["vdi", "show", "d"])["parent"].as_str().unwrap().to_owned();
    host.ok(&["sr", "detach", "made"]);
    host.ok(&["sr", "forget", "made"]);
    std::fs::remove_dir_all(made.join(".coppice")).unwrap();
    std::fs::write(made.join(format!("leaf_{disk}")), &parent).unwrap();
    std::fs::write(made.join(format!("coalesce_{parent}")), "1").unwrap();
    std::fs::rename(made.join(format!("{disk}.vhd")), made.join(format!("OLD_{disk}.vhd"))).unwrap();

    let before = files(&made);
    let seen = probe(&host, &made);
    assert_eq!((&seen["found"], seen["leftovers"].as_array().unwrap().len()), (&"reference".into(), 3));
    assert_eq!(files(&made), before);

    let path = made.to_str().unwrap();
    host.ok(&["sr", "introduce", "theirs", "--type", "file", "--path", path]);
    let names: Vec<String> = files(&made).into_iter().map(|(name, _)| name).collect();
    assert!(names.iter().all(|name| name.ends_with(".vhd") && !name.starts_with("OLD_")), "{names:?}");
    let at = host.attach(&disk);
    assert!(reads(&at.uri, 0x11), "the disk is what it was");
    host.ok(&["vdi", "snapshot", &disk, "--name", "ours"]);
    host.ok(&["vdi", "detach", &disk]);
    host.ok(&["sr", "detach", "theirs"]);

    // Nothing of ours is left to do, and every image is whole by itself.
    assert_eq!(probe(&host, &made)["half_done"], 0);
    let volumes = FileVolumes::new(std::sync::Arc::new(PosixFs::new(made.clone())));
    for volume in volumes.list().unwrap() {
        let opened = volumes.open(&volume, Access::Read).unwrap();
        let options = Options { parents: Some(&volumes), ..Options::default() };
        assert_eq!(check(opened.as_ref(), &options).unwrap().problems, [], "{volume}");
    }
}

fn client(uri: &str) -> coppice::nbd_client::Client {
    let (export, socket) = uri.strip_prefix("nbd+unix:///").unwrap().split_once("?socket=").unwrap();
    coppice::nbd_client::Client::connect(Path::new(socket), export).unwrap()
}

fn write(uri: &str, byte: u8) {
    let mut client = client(uri);
    client.write(4096, &[byte; 4096], true).unwrap();
    assert_eq!(client.next(std::time::Duration::from_secs(30)).unwrap().outcome, Ok(Vec::new()));
    client.close();
}

fn reads(uri: &str, byte: u8) -> bool {
    let mut client = client(uri);
    client.read(4096, 4096).unwrap();
    let data = client.next(std::time::Duration::from_secs(30)).unwrap().outcome;
    client.close();
    data == Ok(vec![byte; 4096])
}
