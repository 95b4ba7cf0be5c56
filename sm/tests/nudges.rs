//! What the collector hears from smd: a kick after whatever may have made
//! work for it, without having to ask.

#![allow(clippy::unwrap_used, reason = "a helper of tests fails by panicking")]

#[path = "support/socket.rs"]
mod socket;

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use socket::{LIMIT, ask};

/// smd, and in the collector's place somebody who writes down what he is told.
struct Nudged {
    smd: Child,
    folder: tempfile::TempDir,
    heard: Receiver<(String, Value)>,
}

/// Takes one request and answers it as gcd does.
fn answer(stream: UnixStream) -> (String, Value) {
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    let mut reader = BufReader::new(stream);
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        match line.trim_end() {
            "" => break,
            line => lines.push(line.to_owned()),
        }
    }
    let length = lines.iter().find_map(|line| line.strip_prefix("content-length: "));
    let mut body = vec![0; length.unwrap().parse().unwrap()];
    reader.read_exact(&mut body).unwrap();
    let mut stream = reader.into_inner();
    write!(stream, "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{{}}")
        .unwrap();
    (lines[0].clone(), serde_json::from_slice(&body).unwrap())
}

impl Nudged {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let run = folder.path().join("run");
        std::fs::create_dir(&run).unwrap();
        let listener = UnixListener::bind(run.join("gcd.sock")).unwrap();
        let (tell, heard) = channel();
        // Ends with the process: nobody can end an accept.
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                if tell.send(answer(stream.unwrap())).is_err() {
                    break;
                }
            }
        });
        let mut command = Command::new(env!("CARGO_BIN_EXE_smd"));
        command.arg("--state").arg(folder.path().join("state")).arg("--run").arg(&run);
        let smd = command.stderr(Stdio::null()).spawn().unwrap();
        let nudged = Self { smd, folder, heard };
        let deadline = Instant::now() + LIMIT;
        while UnixStream::connect(nudged.socket()).is_err() {
            assert!(Instant::now() < deadline, "smd does not listen");
            std::thread::sleep(Duration::from_millis(10));
        }
        nudged
    }

    fn folder(&self) -> &Path {
        self.folder.path()
    }

    fn socket(&self) -> PathBuf {
        self.folder().join("run/smd.sock")
    }

    fn ok(&self, method: &str, path: &str, body: Value) -> Value {
        let (status, said) = ask(&self.socket(), method, path, &body);
        assert_eq!(status, 200, "{method} {path}: {said}");
        serde_json::from_str(&said).unwrap()
    }

    /// The collector is told to look at `sr`, once, and nothing else.
    fn is_kicked(&self, sr: &Value, after: &str) {
        let told = self.heard.recv_timeout(LIMIT);
        let (request, body) = told.unwrap_or_else(|_| panic!("no kick after {after}"));
        assert_eq!(request, "POST /kick HTTP/1.1", "after {after}");
        assert_eq!(body, json!({ "sr": sr }), "after {after}");
    }

    /// Ends smd, having said all that it had to say.
    fn end(mut self) {
        kill(Pid::from_raw(i32::try_from(self.smd.id()).unwrap()), Signal::SIGTERM).unwrap();
        assert!(self.smd.wait().unwrap().success());
        let more = self.heard.try_recv();
        assert!(more.is_err(), "told again: {more:?}");
    }
}

impl Drop for Nudged {
    fn drop(&mut self) {
        // Ended already unless a test has failed.
        let _ = self.smd.kill();
        let _ = self.smd.wait();
    }
}

#[test]
fn the_collector_is_kicked_when_there_may_be_work() {
    let smd = Nudged::start();
    let path = smd.folder().join("sr");
    let made = smd.ok("POST", "/srs", json!({ "name": "one", "type": "file", "path": path }));
    let sr = &made["uuid"];
    smd.is_kicked(sr, "an SR was made, and attached with that");
    smd.ok("POST", "/srs", json!({ "name": "two", "type": "file", "path": smd.folder().join("other") }));
    smd.is_kicked(&smd.ok("GET", "/srs/two", Value::Null)["uuid"], "another was made");
    smd.ok("POST", "/srs/one/detach", Value::Null);
    smd.is_kicked(sr, "it was detached");
    smd.ok("POST", "/srs/one/attach", Value::Null);
    smd.is_kicked(sr, "it was attached");
    smd.ok("POST", "/srs/one/scan", Value::Null);
    smd.is_kicked(sr, "it was scanned");

    smd.ok("POST", "/vdis", json!({ "sr": "one", "name": "web", "virtual_size": 1 }));
    smd.ok("POST", "/vdis/snapshot", json!({ "vdis": ["web"], "name": "monday" }));
    smd.ok("DELETE", "/vdis/monday", Value::Null);
    // And not before: neither of the two leaves anything to collect.
    smd.is_kicked(sr, "a snapshot was deleted");
    smd.ok("DELETE", "/vdis/web", Value::Null);
    smd.is_kicked(sr, "a disk was deleted");
    smd.end();
}
