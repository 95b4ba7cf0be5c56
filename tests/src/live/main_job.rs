//! The main job, step by step, with the clients people use.

use std::path::Path;
use std::process::Command;

use serde_json::Value;
use sha2::{Digest, Sha256};

use super::contract::{RUN, SR, VDI, has};
use crate::support::host::{Attached, Host, wait_until};
use crate::support::programs::{have, run};

/// Writes a pattern with qemu-io.
fn qemu_write(at: &Attached, commands: &[&str]) {
    let mut command = Command::new("qemu-io");
    command.args(["-f", "raw", "-t", "none"]);
    for each in commands {
        command.args(["-c", each]);
    }
    run(command.arg(&at.uri));
}

/// The whole disk as others read it.
fn content(at: &Attached, host: &Host) -> Vec<u8> {
    let raw = host.data().join("content.raw");
    run(Command::new("nbdcopy").arg(&at.uri).arg(&raw));
    std::fs::read(raw).unwrap()
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn tree(host: &Host, sr: &str) -> Value {
    host.ok(&["sr", "tree", sr])
}

#[test]
fn snapshots_keep_their_content_and_merge_away() {
    if !have("qemu-io") || !have("nbdcopy") || !have("qemu-img") {
        return;
    }
    let host = Host::new();
    let folder = host.sr("store");
    let vdi = host.disk("store", "web", "64MiB");
    let at = host.attach(&vdi);
    qemu_write(&at, &["write -P 0x11 0 8M", "write -P 0x12 33M 5k"]);
    let first = content(&at, &host);
    let snapshot = host.ok(&["vdi", "snapshot", "web", "--name", "web@1"]);
    let snapshot = snapshot["uuid"].as_str().unwrap().to_owned();
    qemu_write(&at, &["write -P 0x21 1M 64k", "write -P 0x22 60M 1M"]);
    let second = content(&at, &host);
    assert_ne!(sha256(&first), sha256(&second));

    let snap = host.attach_read_only(&snapshot);
    assert_eq!(sha256(&content(&snap, &host)), sha256(&first), "the snapshot's content");
    host.ok(&["vdi", "detach", &snapshot]);
    let before = tree(&host, "store");
    assert_eq!(before["roots"][0]["kind"], "hidden");
    assert_eq!(before["roots"][0]["children"].as_array().unwrap().len(), 2);

    host.ok(&["vdi", "delete", "web@1"]);
    host.ok(&["gc", "run", "store", "--wait"]);
    wait_until("the chain to be one image", || {
        tree(&host, "store")["roots"][0]["depth"] == 1 && tree(&host, "store")["roots"][0]["kind"] == "leaf"
    });
    assert_eq!(sha256(&content(&at, &host)), sha256(&second), "the disk after the merge");

    host.ok(&["vdi", "detach", "web"]);
    let image = folder.join(format!("{vdi}.vhd"));
    assert_eq!(sha256(&as_qemu_reads(&image, &host, 64 << 20)), sha256(&second), "as qemu reads it");
}

/// The content of an image without a parent, by qemu-img.
fn as_qemu_reads(image: &Path, host: &Host, bytes: usize) -> Vec<u8> {
    let raw = host.data().join("qemu.raw");
    let mut command = Command::new("qemu-img");
    run(command.args(["convert", "-f", "vpc", "-O", "raw"]).arg(image).arg(&raw));
    let mut content = std::fs::read(raw).unwrap();
    // qemu goes by the geometry, which may round the size up.
    assert!(content.len() >= bytes, "{} of {bytes}", content.len());
    content.truncate(bytes);
    content
}

#[test]
fn a_clone_is_written_apart_from_its_origin() {
    if !have("qemu-io") || !have("nbdcopy") {
        return;
    }
    let host = Host::new();
    host.sr("store");
    let origin = host.disk("store", "origin", "16MiB");
    let at = host.attach(&origin);
    qemu_write(&at, &["write -P 0x31 0 4M"]);
    let clone = host.ok(&["vdi", "clone", "origin", "--name", "copy"]);
    let other = host.attach(clone["uuid"].as_str().unwrap());
    qemu_write(&other, &["write -P 0x32 1M 1M"]);
    let (one, two) = (content(&at, &host), content(&other, &host));
    assert!(one[..4 << 20].iter().all(|byte| *byte == 0x31));
    assert!(two[1 << 20..2 << 20].iter().all(|byte| *byte == 0x32));
    assert_eq!(one[2 << 20..], two[2 << 20..]);
}

#[test]
fn fio_finds_what_it_wrote_under_snapshots() {
    if !have("fio") {
        return;
    }
    let host = Host::new();
    host.sr("store");
    let vdi = host.disk("store", "busy", "128MiB");
    let at = host.attach(&vdi);
    let mut fio = Command::new("fio");
    fio.args(["--name=v", "--ioengine=nbd", "--rw=randwrite", "--bs=4k", "--iodepth=16"])
        .args(["--size=96m", "--verify=crc32c", "--do_verify=1", "--verify_fatal=1", "--verify_state_save=0"])
        .arg(format!("--uri={}", at.uri));
    let fio = std::thread::spawn(move || run(&mut fio));
    let mut taken = 0;
    while !fio.is_finished() && taken < 6 {
        taken += 1;
        host.ok(&["vdi", "snapshot", "busy", "--name", &format!("s{taken}")]);
        if taken % 2 == 0 {
            host.ok(&["vdi", "delete", &format!("s{}", taken - 1)]);
        }
    }
    fio.join().unwrap();
}

#[test]
fn several_disks_are_snapshot_as_one() {
    let host = Host::new();
    host.sr("store");
    for name in ["data", "log"] {
        let vdi = host.disk("store", name, "8MiB");
        host.attach(&vdi);
    }
    let made = host.ok(&["vdi", "snapshot", "data", "log", "--name", "both"]);
    assert_eq!(made.as_array().unwrap().len(), 2);
    assert!(made.as_array().unwrap().iter().all(|s| s["kind"] == "snapshot"), "{made}");
}

#[test]
fn every_object_has_the_promised_fields() {
    let host = Host::new();
    host.sr("store");
    host.disk("store", "a", "8MiB");
    has(&host.ok(&["vdi", "show", "a"]), VDI);
    has(&host.ok(&["sr", "show", "store"]), SR);
    let run = host.ok(&["gc", "run", "--wait"]);
    has(&run, RUN);
    has(&run, &["predicted"]);
    host.ok(&["vdi", "rename", "a", "b"]);
    host.refused(&["vdi", "show", "a"], "NOT_FOUND");
    host.ok(&["status"]);
    host.ok(&["gc", "pause"]);
    host.ok(&["gc", "resume"]);
    host.ok(&["sr", "scan", "store"]);
    assert_eq!(host.cli(&["vdi", "frobnicate"]).status, 2);
}
