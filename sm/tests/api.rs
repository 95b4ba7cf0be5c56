//! smd as a process: its API over the socket, its locks, a tapdisk that dies.

#![allow(clippy::unwrap_used, reason = "a helper of tests fails by panicking")]

#[path = "support/socket.rs"]
mod socket;

use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use socket::{LIMIT, ask};

/// Says that it serves, and lives until it is killed.
const FAKE_TAPDISK: &str = "#!/bin/sh\necho '{\"ready\": true}'\nexec sleep 600\n";
const DEAD_TAPDISK: &str = "#!/bin/sh\necho '{\"ready\": false, \"error\": \"no luck\"}'\nexit 1\n";

struct Smd {
    child: Child,
    folder: PathBuf,
}

fn command(folder: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_smd"));
    command.arg("--state").arg(folder.join("state")).arg("--run").arg(folder.join("run"));
    command.arg("--tapdisk").arg(folder.join("tapdisk")).stderr(Stdio::null());
    command
}

fn tapdisk(folder: &Path, script: &str) {
    let path = folder.join("tapdisk");
    std::fs::write(&path, script).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
}

fn wait(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !done() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

impl Smd {
    fn start(folder: &Path) -> Self {
        let child = command(folder).spawn().unwrap();
        let smd = Self { child, folder: folder.to_owned() };
        wait("smd listens", || UnixStream::connect(smd.socket()).is_ok());
        smd
    }

    fn socket(&self) -> PathBuf {
        self.folder.join("run/smd.sock")
    }

    fn ask(&self, method: &str, path: &str, body: &Value) -> (u16, String) {
        ask(&self.socket(), method, path, body)
    }

    fn ok(&self, method: &str, path: &str, body: Value) -> Value {
        let (status, answer) = self.ask(method, path, &body);
        assert_eq!(status, 200, "{method} {path}: {answer}");
        serde_json::from_str(&answer).unwrap()
    }

    fn code(&self, method: &str, path: &str, body: Value) -> String {
        let (status, answer) = self.ask(method, path, &body);
        assert!(status >= 400, "{method} {path}: {answer}");
        let answer: Value = serde_json::from_str(&answer).unwrap();
        answer["error"]["code"].as_str().unwrap().to_owned()
    }

    fn end(mut self) {
        kill(Pid::from_raw(self.child.id() as i32), Signal::SIGTERM).unwrap();
        assert!(self.child.wait().unwrap().success());
    }
}

impl Drop for Smd {
    fn drop(&mut self) {
        // Ended already unless a test has failed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn with_sr(smd: &Smd) -> Value {
    let path = smd.folder.join("sr");
    smd.ok("POST", "/srs", json!({ "name": "one", "type": "file", "path": path }))
}

#[test]
fn the_life_of_disks_and_of_an_sr() {
    let folder = tempfile::tempdir().unwrap();
    let smd = Smd::start(folder.path());
    let sr = with_sr(&smd);
    assert_eq!((&sr["attached"], &sr["type"]), (&json!(true), &json!("file")));
    let disk = json!({ "sr": "one", "name": "web", "virtual_size": 1 });
    let vdi = smd.ok("POST", "/vdis", disk.clone());
    assert_eq!((&vdi["kind"], &vdi["virtual_size"]), (&json!("leaf"), &json!(2 << 20)));
    let made = smd.ok("POST", "/vdis/snapshot", json!({ "vdis": ["web"], "name": "s" }));
    assert_eq!(made["vdis"][0]["snapshot_of"], vdi["uuid"]);
    assert_eq!(made["vdis"][0]["kind"], "snapshot");
    let clone = smd.ok("POST", "/vdis/web/clone", json!({}));
    assert_eq!((&clone["name"], &clone["read_only"]), (&json!("web clone"), &json!(false)));
    smd.ok("POST", "/vdis/s/rename", json!({ "name": "monday" }));
    assert_eq!(smd.ok("GET", "/vdis?sr=one", Value::Null)["vdis"].as_array().unwrap().len(), 3);
    assert_eq!(smd.ok("GET", "/srs/one/tree", Value::Null)["roots"].as_array().unwrap().len(), 3);
    assert_eq!(smd.ok("GET", "/vdis/monday/stat", Value::Null)["own_bytes"], 0);

    // A second disk of the name: only uuids do.
    smd.ok("POST", "/vdis", disk);
    assert_eq!(smd.code("GET", "/vdis/web", Value::Null), "AMBIGUOUS");
    assert_eq!(smd.code("GET", "/vdis/nobody", Value::Null), "NOT_FOUND");
    assert_eq!(smd.code("POST", "/vdis", json!({ "sr": "one" })), "BAD_REQUEST");
    assert_eq!(smd.code("PUT", "/vdis", Value::Null), "BAD_REQUEST");
    // More than a socket holds: it is refused while it is still being sent.
    let long = json!({ "sr": "x".repeat(sm::limits::BODY_BYTES_MAX + (1 << 20)) });
    assert_eq!(smd.code("POST", "/vdis", long), "BAD_REQUEST");
    assert_eq!(smd.code("GET", "/srs/one/history?rows=many", Value::Null), "BAD_REQUEST");
    assert_eq!(smd.code("GET", "/nothing", Value::Null), "NOT_FOUND");
    assert_eq!(smd.code("POST", "/srs/one/nonsense", Value::Null), "NOT_FOUND");
    assert_eq!(smd.code("POST", "/vdis/monday/attach", Value::Null), "READ_ONLY");
    assert_eq!(smd.code("POST", "/srs/one/destroy", Value::Null), "IN_USE");
    assert_eq!(smd.code("POST", "/srs/one/forget", Value::Null), "IN_USE");

    smd.ok("POST", "/srs/one/detach", Value::Null);
    assert_eq!(smd.code("GET", "/srs/one/tree", Value::Null), "SR_DETACHED");
    smd.ok("POST", "/srs/one/forget", Value::Null);
    let path = folder.path().join("sr");
    let again = json!({ "name": "two", "type": "file", "path": path, "introduce": true });
    assert_eq!(smd.code("POST", "/srs", json!({ "name": "x", "type": "file", "path": path })), "EXISTS");
    let back = smd.ok("POST", "/srs", again);
    assert_eq!((&back["uuid"], &back["vdis"]), (&sr["uuid"], &json!(4)));
    assert_eq!(smd.ok("GET", "/vdis/monday", Value::Null)["kind"], "snapshot");

    let vdis = smd.ok("GET", "/vdis", Value::Null);
    for vdi in vdis["vdis"].as_array().unwrap() {
        smd.ok("DELETE", &format!("/vdis/{}", vdi["uuid"].as_str().unwrap()), Value::Null);
    }
    smd.ok("POST", "/srs/two/destroy", Value::Null);
    assert_eq!(std::fs::read_dir(&path).unwrap().count(), 0);
    assert!(smd.ok("GET", "/openapi.json", Value::Null)["paths"]["/vdis"].is_object());
    assert!(smd.ask("GET", "/metrics", &Value::Null).1.contains("coppice_smd_requests_total"));
    smd.end();
}

#[test]
fn a_state_folder_has_one_smd_and_an_sr_one_host() {
    let folder = tempfile::tempdir().unwrap();
    let smd = Smd::start(folder.path());
    with_sr(&smd);
    let second = command(folder.path()).status().unwrap();
    assert_eq!(second.code(), Some(1), "a second smd is refused");

    // Another state folder is another host.
    let elsewhere = tempfile::tempdir().unwrap();
    let other = Smd::start(elsewhere.path());
    let path = folder.path().join("sr");
    let same = json!({ "name": "one", "type": "file", "path": path, "introduce": true });
    assert_eq!(other.code("POST", "/srs", same.clone()), "SR_IN_USE");
    smd.ok("POST", "/srs/one/detach", Value::Null);
    other.ok("POST", "/srs", same);
    assert_eq!(smd.code("POST", "/srs/one/attach", Value::Null), "SR_IN_USE");
    other.end();

    // With the other gone it is ours again, and so after a restart.
    smd.ok("POST", "/srs/one/attach", Value::Null);
    smd.end();
    let smd = Smd::start(folder.path());
    assert_eq!(smd.ok("GET", "/srs/one", Value::Null)["attached"], true);
    smd.end();
}

#[test]
fn a_tapdisk_outlives_smd_and_its_death_is_noticed() {
    let folder = tempfile::tempdir().unwrap();
    tapdisk(folder.path(), DEAD_TAPDISK);
    let smd = Smd::start(folder.path());
    with_sr(&smd);
    smd.ok("POST", "/vdis", json!({ "sr": "one", "name": "web", "virtual_size": 1 }));
    let (_, refused) = smd.ask("POST", "/vdis/web/attach", &Value::Null);
    assert!(refused.contains("NOT_RUNNING") && refused.contains("no luck"), "{refused}");
    assert_eq!(smd.ok("GET", "/vdis/web", Value::Null)["attached"], false);

    tapdisk(folder.path(), FAKE_TAPDISK);
    let vdi = smd.ok("POST", "/vdis/web/attach", Value::Null);
    let pid = vdi["pid"].as_i64().unwrap();
    assert!(vdi["nbd"].as_str().unwrap().starts_with("nbd+unix:///"));
    assert_eq!(smd.ok("POST", "/vdis/web/attach", Value::Null)["pid"], pid);
    assert_eq!(smd.code("DELETE", "/vdis/web", Value::Null), "IN_USE");
    assert_eq!(smd.code("POST", "/srs/one/detach", Value::Null), "IN_USE");
    smd.end();

    let smd = Smd::start(folder.path());
    let vdi = smd.ok("GET", "/vdis/web", Value::Null);
    assert_eq!((&vdi["attached"], &vdi["pid"]), (&json!(true), &json!(pid)));
    kill(Pid::from_raw(i32::try_from(pid).unwrap()), Signal::SIGKILL).unwrap();
    let mut vdi = Value::Null;
    wait("another one takes its place", || {
        vdi = smd.ok("GET", "/vdis/web", Value::Null);
        vdi["pid"].as_i64().is_some_and(|now| now != pid)
    });
    assert_eq!(vdi["attached"], true);

    tapdisk(folder.path(), DEAD_TAPDISK);
    let pid = i32::try_from(vdi["pid"].as_i64().unwrap()).unwrap();
    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
    wait("attempts that fail are counted", || {
        vdi = smd.ok("GET", "/vdis/web", Value::Null);
        vdi["down"]["attempts"].as_u64() >= Some(2)
    });
    assert!(vdi["down"]["error"].as_str().unwrap().contains("no luck"), "{vdi}");
    assert_eq!((&vdi["attached"], &vdi["pid"]), (&json!(true), &Value::Null));
    assert_eq!(smd.code("DELETE", "/vdis/web", Value::Null), "IN_USE");
    assert_eq!(smd.code("POST", "/vdis/web/attach", json!({ "read_only": true })), "IN_USE");
    assert_eq!(smd.ok("GET", "/status", Value::Null)["down"][0]["name"], "web");
    let metrics = smd.ask("GET", "/metrics", &Value::Null).1;
    assert!(metrics.contains("coppice_tapdisks{state=\"down\"} 1"), "{metrics}");
    smd.ok("POST", "/vdis/web/detach", Value::Null);
    assert_eq!(smd.ok("GET", "/status", Value::Null)["down"], json!([]));
    smd.end();
}
