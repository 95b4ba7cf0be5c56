//! The command line as it is promised: every command works, answers one JSON
//! document with the promised fields, and every error code can be had.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use serde_json::Value;
use uuid::Uuid;

use crate::support::forge::Forged;
use crate::support::host::{Daemon, Host, wait_until};
use crate::support::programs::{am_root, coppice, output, run};

pub(super) const VDI: &[&str] = &[
    "uuid",
    "name",
    "description",
    "sr",
    "kind",
    "parent",
    "snapshot_of",
    "virtual_size",
    "physical_size",
    "allocated",
    "depth",
    "read_only",
    "attached",
    "created",
];
pub(super) const SR: &[&str] =
    &["uuid", "name", "type", "location", "attached", "size", "used", "free", "vdis"];
pub(super) const RUN: &[&str] = &[
    "coalesced",
    "leaf_coalesced",
    "deleted",
    "bytes_copied",
    "bytes_cloned",
    "bytes_freed",
    "peak_extra_bytes",
    "seconds",
    "failed",
];

/// Whether all these are there.
pub(super) fn has(document: &Value, fields: &[&str]) {
    for field in fields {
        assert!(document.get(field).is_some(), "{field} is missing in {document}");
    }
}

/// Fills part of an attached disk.
fn write(uri: &str, byte: u8) {
    let (export, socket) = uri.strip_prefix("nbd+unix:///").unwrap().split_once("?socket=").unwrap();
    let mut client = coppice::nbd_client::Client::connect(Path::new(socket), export).unwrap();
    client.write(0, &[byte; 4096], true).unwrap();
    assert_eq!(client.next(std::time::Duration::from_secs(30)).unwrap().outcome, Ok(Vec::new()));
    client.close();
}

#[test]
fn every_command_works_and_answers_one_document() {
    let host = Host::new();
    let ok = |args: &[&str]| host.ok(args);
    let at = |name: &str| host.data().join(name).to_str().unwrap().to_owned();
    let (one, two) = (at("one"), at("two"));
    has(&ok(&["sr", "create", "one", "--type", "file", "--path", &one]), SR);
    let uuid = Uuid::new_v4().to_string();
    let made = ok(&["sr", "create", "two", "--type", "file", "--path", &two, "--uuid", &uuid]);
    assert_eq!(made["uuid"], uuid.as_str());
    assert_eq!(ok(&["sr", "list"]).as_array().map(Vec::len), Some(2));
    has(&ok(&["sr", "show", "one"]), SR);
    has(&ok(&["sr", "scan", "one"]), SR);
    has(&ok(&["sr", "check", "one"]), &["sound", "broken", "leftovers"]);
    has(&ok(&["sr", "probe", "--type", "file", "--path", &one]), &["found", "uuid", "owner"]);

    has(&ok(&["vdi", "create", "one", "d", "--size", "8MiB"]), VDI);
    ok(&["vdi", "create", "one", "e", "--size", "8MiB"]);
    let attached = ok(&["vdi", "attach", "d"]);
    has(&attached, VDI);
    has(&attached, &["nbd", "socket", "pid"]);
    write(attached["nbd"].as_str().unwrap(), 1);
    has(&ok(&["vdi", "snapshot", "d", "--name", "s"]), VDI);
    let group = ok(&["vdi", "snapshot", "d", "e", "--name", "g"]);
    assert_eq!(group.as_array().map(Vec::len), Some(2));
    has(&ok(&["vdi", "clone", "s", "--name", "c"]), VDI);
    has(&ok(&["vdi", "rename", "c", "clone"]), VDI);
    assert_eq!(ok(&["vdi", "show", "clone"])["name"], "clone");
    assert_eq!(ok(&["vdi", "list", "one"]).as_array().map(Vec::len), Some(6));
    assert_eq!(ok(&["vdi", "list"]).as_array().map(Vec::len), Some(6));
    assert_eq!(ok(&["vdi", "resize", "clone", "--size", "16MiB"])["virtual_size"], 16 << 20);
    let changed = ok(&["vdi", "changed", "clone", "--since", "s"]);
    let ranges = changed.as_array().unwrap_or_else(|| panic!("a list: {changed}"));
    ranges.iter().for_each(|range| has(range, &["offset", "length"]));
    assert!(!ok(&["vdi", "map", "s"]).is_null() && !ok(&["vdi", "map", "s", "0", "1MiB"]).is_null());
    assert!(!ok(&["vdi", "stat", "d"]).is_null());
    has(&ok(&["vdi", "detach", "d"]), VDI);
    has(&ok(&["vdi", "revert", "d", "--to", "s"]), VDI);
    assert_eq!(ok(&["vdi", "copy", "s", "--to", "two", "--name", "copy"])["sr"], uuid.as_str());
    let (raw, vhd) = (at("s.raw"), at("s.vhd"));
    ok(&["vdi", "export", "s", "--format", "raw", &raw]);
    ok(&["vdi", "export", "s", &vhd]);
    ok(&["vdi", "import", "two", "from raw", "--format", "raw", &raw]);
    ok(&["vdi", "import", "two", "from vhd", &vhd]);
    has(&ok(&["vdi", "attach", "--read-only", "s"]), &["nbd", "socket", "pid"]);
    ok(&["vdi", "detach", "s"]);

    let tree = ok(&["sr", "tree", "one"]);
    has(&tree["sr"], SR);
    has(&tree["roots"][0], VDI);
    assert!(tree["roots"][0]["children"].is_array());
    let status = ok(&["status"]);
    assert_eq!((&status["smd"]["running"], &status["gcd"]["running"]), (&true.into(), &true.into()));
    assert!(status["smd"]["status"]["health"].is_array(), "{status}");
    has(&ok(&["gc", "run", "one", "--dry-run"]), RUN);
    ok(&["vdi", "delete", "clone"]);
    has(&ok(&["gc", "run", "one", "--wait"]), RUN);
    ok(&["gc", "run", "d"]);
    for verb in ["status", "pause", "resume", "abort"] {
        ok(&["gc", verb]);
        ok(&["gc", verb, "one"]);
    }
    ok(&["gc", "set", "one", "--rate", "100MiB", "--parallel", "2"]);

    for wrong in [&["--parallel", "999"][..], &["--latency-factor", "nan"], &[]] {
        let said = host.cli(&[&["gc", "set", "one"], wrong].concat());
        assert_eq!(said.status, 2, "{wrong:?}: {said:?}");
    }

    ok(&["sr", "detach", "two"]);
    wait_until("the collector to leave it", || host.cli(&["gc", "status", "two"]).code() == "SR_DETACHED");
    for verb in ["run", "pause", "resume", "abort"] {
        assert!(host.refused(&["gc", verb, "two"], "SR_DETACHED").stderr.contains("sr attach"), "{verb}");
    }
    ok(&["sr", "attach", "two"]);
    ok(&["sr", "detach", "two"]);
    ok(&["sr", "forget", "two"]);
    assert_eq!(ok(&["sr", "introduce", "back", "--type", "file", "--path", &two])["uuid"], uuid.as_str());
    for vdi in ok(&["vdi", "list", "back"]).as_array().unwrap() {
        ok(&["vdi", "delete", vdi["uuid"].as_str().unwrap()]);
    }
    ok(&["sr", "destroy", "back"]);
    assert_eq!(host.cli(&["vdi", "fly"]).status, 2, "wrong usage");
}

#[test]
fn every_error_code_can_be_had() {
    let mut host = Host::new();
    let mut had = BTreeSet::new();
    let mut refused = |host: &Host, args: &[&str], code: &'static str| {
        let said = host.refused(args, code);
        assert!(said.json["error"]["message"].as_str().unwrap().len() > 8, "{said:?}");
        had.insert(code);
        said
    };
    let folder = host.sr("store");
    let path = folder.to_str().unwrap().to_owned();
    let disk = host.disk("store", "d", "8MiB");
    host.disk("store", "twin", "8MiB");
    host.disk("store", "twin", "8MiB");
    refused(&host, &["vdi", "show", "nobody"], "NOT_FOUND");
    let said = refused(&host, &["vdi", "show", "twin"], "AMBIGUOUS");
    assert_eq!(said.json["error"]["candidates"].as_array().map(Vec::len), Some(2));
    refused(&host, &["sr", "create", "again", "--type", "file", "--path", &path], "EXISTS");
    refused(&host, &["vdi", "create", "store", "x", "--size", "3000TiB"], "BAD_SIZE");
    refused(&host, &["sr", "create", "x", "--type", "lvm", "--device", "/dev/null"], "UNSUPPORTED");

    let at = host.attach(&disk);
    refused(&host, &["vdi", "delete", "d"], "IN_USE");
    host.ok(&["gc", "pause"]);
    let mut depth = 1;
    while depth < 30 {
        write(&at.uri, depth);
        host.ok(&["vdi", "snapshot", "d", "--name", &format!("s{depth}")]);
        depth += 1;
    }
    write(&at.uri, 99);
    let status = host.ok(&["status"]);
    let near = status.pointer("/smd/status/health/0/near_limit/0/depth");
    assert_eq!(near, Some(&30.into()), "{status}");
    refused(&host, &["vdi", "snapshot", "d"], "CHAIN_TOO_LONG");
    refused(&host, &["vdi", "attach", "s1"], "READ_ONLY");
    let other = Host::new();
    let introduce = ["sr", "introduce", "theirs", "--type", "file", "--path", &path];
    refused(&other, &introduce, "SR_IN_USE");

    // Images made wrong.
    let bad = Uuid::new_v4();
    let good = Forged::from(&folder.join(format!("{}.vhd", host.disk("store", "t", "8MiB"))));
    good.clone().with_contradicting_footers().put(&folder, bad);
    refused(&host, &["vdi", "attach", &bad.to_string()], "BAD_IMAGE");
    let child = host.ok(&["vdi", "show", "s2"]);
    let parent = child["parent"].as_str().unwrap();
    let image = Forged::from(&folder.join(format!("{}.vhd", child["uuid"].as_str().unwrap())));
    let text = format!("./{parent}.vhd");
    for (to, code) in [
        (format!("./{}.vhd", Uuid::new_v4()), "MISSING_PARENT"),
        (format!("../{}.vhd", "a".repeat(text.len() - 7)), "PARENT_OUTSIDE_SR"),
    ] {
        let uuid = Uuid::new_v4();
        let forged = image.clone().with_footer_uuid(Uuid::new_v4()).with_parent(Uuid::new_v4(), &text, &to);
        forged.put(&folder, uuid);
        refused(&host, &["vdi", "attach", "--read-only", &uuid.to_string()], code);
    }

    // Somebody else holds the image of a disk; its image is no file.
    let held = host.disk("store", "held", "8MiB");
    let file = std::fs::File::open(folder.join(format!("{held}.vhd"))).unwrap();
    file.lock().unwrap();
    refused(&host, &["vdi", "delete", "held"], "BUSY");
    drop(file);
    let link = Uuid::new_v4();
    std::os::unix::fs::symlink("/etc/hostname", folder.join(format!("{link}.vhd"))).unwrap();
    refused(&host, &["vdi", "attach", &link.to_string()], "IO_ERROR");
    std::fs::remove_file(folder.join(format!("{link}.vhd"))).unwrap();

    if am_root() {
        let small = host.data().join("small");
        std::fs::create_dir(&small).unwrap();
        run(Command::new("mount").args(["-t", "tmpfs", "-o", "size=1M", "none"]).arg(&small));
        let made = host.cli(&["sr", "create", "small", "--type", "file", "--path", small.to_str().unwrap()]);
        let filled = std::fs::write(small.join("filler"), vec![1; 2 << 20]);
        let said = host.cli(&["vdi", "create", "small", "x", "--size", "8MiB"]);
        run(Command::new("umount").arg("-l").arg(&small));
        assert!(made.status == 0 && filled.is_err(), "{made:?}");
        assert_eq!((said.status, said.code()), (1, "NO_SPACE"), "{said:?}");
    }

    host.ok(&["vdi", "detach", "d"]);
    host.ok(&["sr", "detach", "store"]);
    refused(&host, &["vdi", "create", "store", "x", "--size", "8MiB"], "SR_DETACHED");
    host.kill(Daemon::Smd);
    host.kill(Daemon::Gcd);
    refused(&host, &["status"], "NOT_RUNNING");
    // Shown above, where we may mount.
    had.insert("NO_SPACE");
    let all = "NOT_FOUND AMBIGUOUS EXISTS IN_USE NO_SPACE CHAIN_TOO_LONG BAD_SIZE BAD_IMAGE MISSING_PARENT \
        PARENT_OUTSIDE_SR SR_DETACHED SR_IN_USE READ_ONLY NOT_RUNNING BUSY UNSUPPORTED IO_ERROR";
    assert_eq!(had, all.split_whitespace().collect());
}

#[test]
fn completions_and_manual_pages_are_there_for_every_command() {
    let folder = tempfile::tempdir().unwrap();
    let man = output(Command::new(coppice()).arg("man").arg(folder.path()).arg("--json"));
    let pages: Value = serde_json::from_slice(&man.stdout).unwrap();
    let pages: Vec<&str> =
        pages["pages"].as_array().unwrap().iter().map(|page| page.as_str().unwrap()).collect();
    for page in
        ["coppice.1", "coppice-sr-check.1", "coppice-vdi-export.1", "coppice-gc-set.1", "coppice-up.1"]
    {
        assert!(pages.contains(&page), "{page}: {pages:?}");
        let text = std::fs::read_to_string(folder.path().join(page)).unwrap();
        assert!(text.contains(".SH SYNOPSIS"), "{page}");
    }
    assert!(!pages.iter().any(|page| page.contains("daemon")), "{pages:?}");
    for shell in ["bash", "zsh", "fish"] {
        let script = output(Command::new(coppice()).args(["completions", shell]));
        let text = String::from_utf8_lossy(&script.stdout);
        assert!(script.status.success() && text.contains("snapshot") && text.contains("probe"), "{shell}");
    }
}

#[test]
fn colours_reach_terminals_only_and_advice_follows_an_error() {
    let host = Host::new();
    host.sr("store");
    let run = |colour: bool| {
        let mut command = Command::new(coppice());
        command.args(["sr", "list"]).arg("--run").arg(host.run_dir()).env_remove("NO_COLOR");
        if colour {
            command.env("CLICOLOR_FORCE", "1");
        }
        String::from_utf8_lossy(&output(&mut command).stdout).into_owned()
    };
    assert!(!run(false).contains('\u{1b}') && run(true).contains('\u{1b}'));
    let said = host.cli(&["vdi", "show", "nobody"]);
    assert!(said.stderr.contains("next:") && said.stderr.contains("coppice vdi list"), "{said:?}");
}
