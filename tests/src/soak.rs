//! The soak: several disks under verifying guests while everything that can
//! happen to them does, and every process is killed at random.
//!
//! ```text
//!  round:  busy   guests write; gcd, smd and tapdisks are killed; snapshots of
//!                 one and of all disks, exports and collections come and go
//!          quiet  guests check all they ever wrote; snapshots are taken whose
//!                 content is known, checked, reverted to, cloned, deleted
//!  end:    everything deletable is deleted, what is left merges to one image
//!          per disk, and is checked for the last time
//! ```
//!
//! `COPPICE_SOAK_SECONDS` says how long (a minute where nothing is said),
//! `COPPICE_SEED` repeats a run's choices, though not its timing,
//! `COPPICE_SOAK_RECEIPTS` how often merges are watched by content receipts.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::process::Child;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use serde_json::Value;

use crate::support::guest::Guest;
use crate::support::host::{Attached, Daemon, Host, wait_until};
use crate::support::receipts::Receipts;

/// How long where nothing is said.
const SECONDS: u64 = 60;
const DISKS: usize = 3;
const DISK: (&str, u64) = ("32MiB", 32 << 20);
/// Snapshots of known content kept of each disk.
const KEPT_MAX: usize = 4;
/// A round's busy time.
const BUSY: Duration = Duration::from_secs(4);
const BETWEEN_MS_MAX: u64 = 500;

/// A snapshot whose content is known.
struct Kept {
    uuid: String,
    content: Guest,
}

struct Disk {
    uuid: String,
    at: Attached,
    /// Away while its thread writes.
    guest: Option<Guest>,
    kept: Vec<Kept>,
}

struct Soak {
    host: Host,
    rng: SmallRng,
    disks: Vec<Disk>,
    /// What happened how often, for the report.
    seen: BTreeMap<String, u64>,
    receipts: Receipts,
    exports: Vec<(usize, String, PathBuf, Child)>,
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name}={text}")))
}

#[test]
fn nothing_is_lost_while_everything_is_killed() {
    let seed = number("COPPICE_SEED").unwrap_or_else(|| uuid::Uuid::new_v4().as_u64_pair().0);
    let seconds = number("COPPICE_SOAK_SECONDS").unwrap_or(SECONDS);
    eprintln!("COPPICE_SEED={seed} COPPICE_SOAK_SECONDS={seconds}");
    let mut soak = Soak::new(seed);
    let until = Instant::now() + Duration::from_secs(seconds);
    while Instant::now() < until {
        soak.receipts.turn(&soak.host);
        soak.busy();
        soak.quiet();
        soak.receipts.check(&soak.host);
    }
    soak.finish();
    soak.receipts.check(&soak.host);
    eprintln!("{:?}; {:?}", soak.seen, soak.receipts.report());
}

impl Soak {
    fn new(seed: u64) -> Self {
        let mut rng = SmallRng::seed_from_u64(seed);
        let host = Host::new();
        host.sr("store");
        let disks = (0..DISKS).map(|n| {
            let uuid = host.disk("store", &format!("d{n}"), DISK.0);
            let at = host.attach(&uuid);
            Disk { uuid, at, guest: Some(Guest::new(DISK.1, rng.random())), kept: Vec::new() }
        });
        let disks = disks.collect();
        Self {
            host,
            rng,
            disks,
            seen: BTreeMap::new(),
            receipts: Receipts::new("store"),
            exports: Vec::new(),
        }
    }

    fn saw(&mut self, what: &str) {
        *self.seen.entry(what.to_owned()).or_default() += 1;
    }

    /// An operation that may be refused, or cut off by a kill: it is then
    /// whole or not there, which is checked later.
    fn tried(&mut self, what: &str, args: &[&str]) -> Option<Value> {
        let said = self.host.cli(args);
        let outcome = if said.status == 0 { "" } else { " refused" };
        self.saw(&format!("{what}{outcome}"));
        assert!(said.status == 0 || said.status == 1, "{args:?}: {said:?}");
        (said.status == 0).then_some(said.json)
    }

    fn busy(&mut self) {
        let stop = Arc::new(AtomicBool::new(false));
        let mut threads: Vec<Option<JoinHandle<Guest>>> = (0..DISKS).map(|_| None).collect();
        let until = Instant::now() + BUSY;
        while Instant::now() < until {
            for (n, thread) in threads.iter_mut().enumerate() {
                if thread.as_ref().is_none_or(JoinHandle::is_finished) {
                    if let Some(thread) = thread.take() {
                        self.back(n, thread);
                    }
                    *thread = Some(self.writes(n, &stop));
                }
            }
            std::thread::sleep(Duration::from_millis(self.rng.random_range(20..BETWEEN_MS_MAX)));
            self.disturb();
        }
        stop.store(true, Ordering::SeqCst);
        for (n, thread) in threads.into_iter().enumerate() {
            if let Some(thread) = thread {
                self.back(n, thread);
            }
        }
        self.take_in_exports();
    }

    /// Its guest writes until it is told to stop or its disk dies.
    fn writes(&mut self, n: usize, stop: &Arc<AtomicBool>) -> JoinHandle<Guest> {
        let (at, stop) = (self.disks[n].at.clone(), stop.clone());
        let mut guest = self.disks[n].guest.take().unwrap();
        std::thread::spawn(move || {
            guest.write(&at, |_| stop.load(Ordering::SeqCst));
            guest
        })
    }

    /// A guest came back, perhaps because its disk died.
    fn back(&mut self, n: usize, thread: JoinHandle<Guest>) {
        self.disks[n].guest = Some(thread.join().unwrap());
        let at = self.served(n);
        let died = at.pid != self.disks[n].at.pid;
        self.disks[n].at = at;
        if died {
            self.check(n);
        }
    }

    /// Waits until a disk is served, attaching it if nobody does.
    fn served(&self, n: usize) -> Attached {
        let uuid = &self.disks[n].uuid;
        let mut found = None;
        wait_until("a disk to be served", || {
            let shown = self.host.cli(&["vdi", "show", uuid]).json;
            let at = if shown["attached"] == true && shown["nbd"].is_string() {
                Attached::of(&shown)
            } else {
                match self.host.cli(&["vdi", "attach", uuid]) {
                    said if said.status == 0 => Attached::of(&said.json),
                    _ => return false,
                }
            };
            found = at.answers().then_some(at);
            found.is_some()
        });
        found.unwrap()
    }

    fn check(&mut self, n: usize) {
        let disk = &mut self.disks[n];
        disk.guest.as_mut().unwrap().check(&disk.at);
        self.saw("check");
    }

    /// One thing that people or fate do to busy disks.
    fn disturb(&mut self) {
        let n = self.rng.random_range(0..DISKS);
        match self.rng.random_range(0..10) {
            0 | 1 => {
                self.disks[n].at.kill_if_alive();
                self.saw("kill tapdisk");
            }
            2 => self.restart(Daemon::Gcd),
            3 => self.restart(Daemon::Smd),
            4 => {
                let uuid = self.disks[n].uuid.clone();
                self.tried("snapshot", &["vdi", "snapshot", &uuid, "--name", "passing"]);
            }
            5 => {
                let uuids: Vec<String> = self.disks.iter().map(|disk| disk.uuid.clone()).collect();
                let mut args = vec!["vdi", "snapshot"];
                args.extend(uuids.iter().map(String::as_str));
                self.tried("group snapshot", &args);
            }
            6 => self.begin_export(n),
            7 => self.delete_passing(),
            _ => {
                self.tried("gc run", &["gc", "run", "store"]);
            }
        }
    }

    fn restart(&mut self, daemon: Daemon) {
        self.host.kill(daemon);
        self.host.start(daemon);
        self.saw(&format!("kill {daemon:?}"));
    }

    /// Snapshots nobody knows the content of.
    fn delete_passing(&mut self) {
        let known = |uuid: &str| {
            self.disks.iter().any(|d| d.uuid == uuid || d.kept.iter().any(|kept| kept.uuid == uuid))
        };
        let Some(list) = self.host.cli(&["vdi", "list"]).json.as_array().cloned() else { return };
        let uuids = list.iter().filter(|vdi| vdi["kind"] != "hidden").filter_map(|vdi| vdi["uuid"].as_str());
        let passing: Vec<String> = uuids.filter(|uuid| !known(uuid)).map(str::to_owned).collect();
        for uuid in passing {
            self.tried("delete", &["vdi", "delete", &uuid]);
        }
    }

    /// A snapshot is read out while everything goes on.
    fn begin_export(&mut self, n: usize) {
        let Some(kept) = self.disks[n].kept.choose(&mut self.rng) else { return };
        let path = self.host.data().join(format!("export-{}", self.exports.len()));
        let file = path.to_str().unwrap();
        let child = self.host.begin(&["vdi", "export", &kept.uuid, "--format", "raw", file]);
        self.exports.push((n, kept.uuid.clone(), path, child));
    }

    /// An export that ended well is exactly its snapshot.
    fn take_in_exports(&mut self) {
        for (n, uuid, path, mut child) in std::mem::take(&mut self.exports) {
            let ended = child.wait().unwrap();
            let bytes = fs::read(&path).unwrap_or_default();
            fs::remove_file(&path).ok();
            let kept = self.disks[n].kept.iter_mut().find(|kept| kept.uuid == uuid);
            let outcome = match (ended.code(), kept) {
                (Some(0), Some(kept)) => {
                    kept.content.check_bytes(&bytes);
                    "export"
                }
                (Some(2), _) => panic!("no such command: vdi export"),
                _ => "export refused",
            };
            self.saw(outcome);
        }
    }

    /// Nobody writes: what is there is known.
    fn quiet(&mut self) {
        for n in 0..DISKS {
            self.check(n);
            match self.rng.random_range(0..8) {
                0..=3 => self.keep(n),
                4 => self.revert(n),
                5 => self.clone_and_drop(n),
                _ => {}
            }
            while self.disks[n].kept.len() > KEPT_MAX {
                let at = self.rng.random_range(0..self.disks[n].kept.len());
                let uuid = self.disks[n].kept[at].uuid.clone();
                if self.tried("delete", &["vdi", "delete", &uuid]).is_some() {
                    self.disks[n].kept.remove(at);
                }
            }
        }
        let n = self.rng.random_range(0..DISKS);
        for kept in 0..self.disks[n].kept.len() {
            self.check_kept(n, kept);
        }
    }

    fn keep(&mut self, n: usize) {
        let uuid = self.disks[n].uuid.clone();
        let said = self.tried("kept snapshot", &["vdi", "snapshot", &uuid, "--name", "kept"]);
        if let Some(uuid) = said.as_ref().and_then(|vdi| vdi["uuid"].as_str()) {
            let content = self.disks[n].guest.clone().unwrap();
            self.disks[n].kept.push(Kept { uuid: uuid.to_owned(), content });
        }
    }

    fn check_kept(&mut self, n: usize, at: usize) {
        let uuid = self.disks[n].kept[at].uuid.clone();
        let served = self.host.attach_read_only(&uuid);
        self.disks[n].kept[at].content.check(&served);
        self.host.ok(&["vdi", "detach", &uuid]);
        self.saw("check of a snapshot");
    }

    fn revert(&mut self, n: usize) {
        if self.disks[n].kept.is_empty() {
            return;
        }
        let at = self.rng.random_range(0..self.disks[n].kept.len());
        let (uuid, to) = (self.disks[n].uuid.clone(), self.disks[n].kept[at].uuid.clone());
        self.host.ok(&["vdi", "detach", &uuid]);
        if self.tried("revert", &["vdi", "revert", &uuid, "--to", &to]).is_some() {
            // What was uncertain stays so, now in the disk too.
            self.disks[n].guest = Some(self.disks[n].kept[at].content.clone());
        }
        self.disks[n].at = self.host.attach(&uuid);
        self.check(n);
    }

    fn clone_and_drop(&mut self, n: usize) {
        let uuid = self.disks[n].uuid.clone();
        let said = self.tried("clone", &["vdi", "clone", &uuid, "--name", "clone"]);
        let Some(clone) = said.and_then(|vdi| vdi["uuid"].as_str().map(str::to_owned)) else { return };
        let at = self.host.attach(&clone);
        let mut guest = self.disks[n].guest.clone().unwrap();
        guest.check(&at);
        guest.write(&at, |acked| acked == 100);
        guest.check(&at);
        self.host.ok(&["vdi", "detach", &clone]);
        self.tried("delete", &["vdi", "delete", &clone]);
    }

    /// However far the collector got before: the end has a merge in it.
    fn leave_something_to_merge(&mut self) {
        let write = |disk: &mut Disk| disk.guest.as_mut().unwrap().write(&disk.at, |acked| acked == 100);
        write(&mut self.disks[0]);
        let uuid = self.disks[0].uuid.clone();
        // Refused where the chain is too long already.
        self.tried("snapshot", &["vdi", "snapshot", &uuid, "--name", "passing"]);
        write(&mut self.disks[0]);
    }

    /// The minimal tree: one image per disk, with its content.
    fn finish(&mut self) {
        for n in 0..DISKS {
            for kept in 0..self.disks[n].kept.len() {
                self.check_kept(n, kept);
            }
            self.disks[n].kept.clear();
        }
        self.receipts.of_the_end(&self.host);
        self.leave_something_to_merge();
        wait_until("one image per disk", || {
            self.delete_passing();
            self.host.ok(&["gc", "run", "store", "--wait"]);
            let tree = self.host.ok(&["sr", "tree", "store"]);
            let roots = tree["roots"].as_array().unwrap();
            roots.len() == DISKS && roots.iter().all(|root| root["kind"] == "leaf")
        });
        for n in 0..DISKS {
            self.disks[n].at = self.served(n);
            self.check(n);
            let uuid = self.disks[n].uuid.clone();
            self.host.ok(&["vdi", "detach", &uuid]);
            let at = self.host.attach_read_only(&uuid);
            self.disks[n].guest.as_mut().unwrap().check(&at);
        }
        let files = fs::read_dir(self.host.data().join("store")).unwrap().flatten();
        let images = files.filter(|file| file.file_name().to_string_lossy().ends_with(".vhd")).count();
        assert_eq!(images, DISKS, "something was left on the SR");
    }
}
