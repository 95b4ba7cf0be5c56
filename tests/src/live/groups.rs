//! Snapshots of several disks at one instant: what the instant is, what a
//! failure leaves, and what a pause does when who asked for it is dead.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use coppice::nbd_client::Client;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::support::host::{Attached, Daemon, Host, wait_until};
use crate::support::programs::coppice;

const DISKS: usize = 8;
/// Longest wait for an answer of a disk.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);
/// How soon a disk must go on whose pauser is dead.
const GO_ON: Duration = Duration::from_secs(1);
/// Tries to meet the moment between two members' pauses.
const TRIES_MAX: usize = 40;

struct Group {
    host: Host,
    names: Vec<String>,
    at: Vec<Attached>,
}

impl Group {
    fn new() -> Self {
        let host = Host::new();
        host.sr("store");
        let names: Vec<String> = (0..DISKS).map(|n| format!("d{n}")).collect();
        names.iter().for_each(|name| drop(host.disk("store", name, "8MiB")));
        let at = names.iter().map(|name| host.attach(name)).collect();
        Self { host, names, at }
    }

    fn snapshot<'a>(&'a self, name: &'a str) -> Vec<&'a str> {
        let mut args = vec!["vdi", "snapshot"];
        args.extend(self.names.iter().map(String::as_str));
        args.extend(["--name", name]);
        args
    }

    fn snapshots(&self) -> usize {
        let all = self.host.ok(&["vdi", "list"]);
        all.as_array().unwrap().iter().filter(|vdi| vdi["kind"] == "snapshot").count()
    }

    /// The counter as a snapshot holds it.
    fn counter(&self, vdi: &str) -> u64 {
        let to = self.host.data().join("counter.raw");
        self.host.ok(&["vdi", "export", vdi, to.to_str().unwrap()]);
        let mut bytes = [0; 8];
        File::open(to).unwrap().read_exact(&mut bytes).unwrap();
        u64::from_le_bytes(bytes)
    }
}

fn write(client: &mut Client, value: u64) {
    let mut bytes = [0; 4096];
    bytes[..8].copy_from_slice(&value.to_le_bytes());
    client.write(0, &bytes, false).unwrap();
    client.next(ANSWER_LIMIT).unwrap().outcome.unwrap();
}

fn connect(at: &Attached) -> Client {
    let mut client = None;
    // A tapdisk that is stopped when smd dies gets the kernel's hangup; smd
    // brings it back.
    wait_until("the disk to be served", || {
        client = Client::connect(&at.socket, &at.export).ok();
        client.is_some()
    });
    client.unwrap()
}

#[test]
fn a_group_of_eight_disks_is_one_instant() {
    let group = Group::new();
    let (stop, acked) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        // One counter, written across the disks in order: at any instant an
        // earlier disk is at most one step ahead of a later one.
        scope.spawn(|| {
            let mut clients: Vec<Client> = group.at.iter().map(connect).collect();
            for value in 1.. {
                clients.iter_mut().for_each(|client| write(client, value));
                acked.store(value, Ordering::SeqCst);
                if stop.load(Ordering::SeqCst) {
                    break;
                }
            }
        });
        for round in 0..4 {
            wait_until("the counter to move", || acked.load(Ordering::SeqCst) > 20 * round);
            let name = format!("g{round}");
            let before = acked.load(Ordering::SeqCst);
            let taken = group.host.ok(&group.snapshot(&name));
            let after = acked.load(Ordering::SeqCst) + 1;
            let taken = taken.as_array().unwrap();
            assert_eq!(taken.len(), DISKS);
            let values: Vec<u64> =
                taken.iter().map(|vdi| group.counter(vdi["uuid"].as_str().unwrap())).collect();
            assert!(values.windows(2).all(|two| two[0] >= two[1]), "in order: {values:?}");
            assert!(values[0] <= values[DISKS - 1] + 1, "one instant: {values:?}");
            assert!(values[DISKS - 1] >= before && values[0] <= after, "{before} {values:?} {after}");
            eprintln!("between {before} and {after}: {values:?}");
        }
        stop.store(true, Ordering::SeqCst);
    });
}

#[test]
fn hooks_run_around_the_instant_and_the_second_always() {
    let group = Group::new();
    let log = group.host.data().join("hooks.log");
    let note = |word: &str| format!("echo {word} $(echo $COPPICE_VDIS | wc -w) >> {}", log.display());
    let said = || std::fs::read_to_string(&log).unwrap_or_default();
    let with = |before: &str, after: &str, more: &[&str]| {
        let mut args = group.snapshot("hooked");
        args.extend(["--before", before, "--after", after]);
        args.extend(more);
        group.host.cli(&args)
    };
    let done = with(&note("before"), &note("after"), &[]);
    assert_eq!((done.status, done.json.as_array().map(Vec::len)), (0, Some(DISKS)), "{done:?}");
    assert_eq!(said(), "before 8\nafter 8\n");
    assert_eq!(group.snapshots(), DISKS);
    // The first one fails: nothing is taken, and the second one runs.
    let failed = with("exit 3", &note("thawed"), &[]);
    assert_eq!((failed.status, failed.code()), (1, "HOOK_FAILED"), "{failed:?}");
    let hung = with("sleep 100", &note("thawed"), &["--hook-limit", "1"]);
    assert_eq!((hung.status, hung.code()), (1, "HOOK_FAILED"), "{hung:?}");
    assert_eq!(said(), "before 8\nafter 8\nthawed 8\nthawed 8\n");
    assert_eq!(group.snapshots(), DISKS);
    // The second one fails: the snapshots are there, and named.
    let failed = with("true", "exit 4", &[]);
    assert_eq!((failed.status, failed.code()), (1, "HOOK_FAILED"), "{failed:?}");
    assert_eq!(failed.json["error"]["vdis"].as_array().unwrap().len(), DISKS);
    assert_eq!(group.snapshots(), 2 * DISKS);
}

#[test]
fn a_member_that_does_not_answer_costs_nobody_a_snapshot_or_a_thaw() {
    let group = Group::new();
    let log = group.host.data().join("hooks.log");
    let stuck = Pid::from_raw(group.at[DISKS - 1].pid);
    kill(stuck, Signal::SIGSTOP).unwrap();
    let thaw = format!("echo thawed >> {}", log.display());
    let mut args = group.snapshot("stuck");
    args.extend(["--before", "true", "--after", &thaw, "--hook-limit", "2"]);
    let begun = Instant::now();
    let said = group.host.cli(&args);
    assert_eq!(said.status, 1, "{said:?}");
    assert!(begun.elapsed() < Duration::from_secs(40), "{:?}", begun.elapsed());
    assert_eq!(std::fs::read_to_string(&log).unwrap(), "thawed\n");
    write(&mut connect(&group.at[0]), 1);
    kill(stuck, Signal::SIGCONT).unwrap();
    wait_until("the job to end", || group.host.cli(&["vdi", "rename", "d0", "d0"]).status == 0);
    assert_eq!(group.snapshots(), 0);
    group.at.iter().for_each(|at| write(&mut connect(at), 2));
    let done = group.snapshot("after");
    assert_eq!(group.host.ok(&done).as_array().unwrap().len(), DISKS);
}

/// Whether a tapdisk has its prepared leaf open.
fn is_prepared(pid: i32) -> bool {
    let Ok(files) = std::fs::read_dir(format!("/proc/{pid}/fd")) else { return false };
    files
        .flatten()
        .filter_map(|file| std::fs::read_link(file.path()).ok())
        .any(|path| Path::file_name(&path).is_some_and(|name| name.to_string_lossy().starts_with("tmp-")))
}

/// Kills smd while the first disk is paused and the second cannot be. Returns
/// how long the first one stood still after that; nothing if the moment was
/// missed.
fn kill_inside_a_pause(group: &mut Group) -> Option<Duration> {
    let second = Attached::of(&group.host.ok(&["vdi", "show", "d1"])).pid;
    let mut args: Vec<String> = group.snapshot("killed").iter().map(|arg| (*arg).to_owned()).collect();
    args.extend(["--run".to_owned(), group.host.run_dir().to_str().unwrap().to_owned()]);
    let mut asked =
        Command::new(coppice()).args(&args).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    while !is_prepared(second) {
        // Too fast for us.
        if asked.try_wait().unwrap().is_some() {
            return None;
        }
    }
    kill(Pid::from_raw(second), Signal::SIGSTOP).unwrap();
    let mut first = connect(&group.at[0]);
    // A disk that is paused answers nothing; one that is not, at once.
    std::thread::sleep(Duration::from_millis(200));
    first.write(0, &[7; 4096], false).unwrap();
    let paused = first.next(Duration::from_millis(300)).is_err();
    group.host.kill(Daemon::Smd);
    let killed = Instant::now();
    let stood = paused.then(|| {
        let mut again = connect(&group.at[0]);
        write(&mut again, 8);
        killed.elapsed()
    });
    // It may have died of the kernel's hangup.
    let _ = kill(Pid::from_raw(second), Signal::SIGCONT);
    asked.wait().unwrap();
    group.host.start(Daemon::Smd);
    stood
}

#[test]
fn disks_go_on_by_themselves_when_smd_is_killed_inside_their_pause() {
    let mut group = Group::new();
    // Empty ones would get no new leaf to prepare.
    group.at.iter().for_each(|at| write(&mut connect(at), 3));
    let mut met = 0;
    for _ in 0..TRIES_MAX {
        let before = group.snapshots();
        let stood = kill_inside_a_pause(&mut group);
        group.at.iter().for_each(|at| write(&mut connect(at), 3));
        wait_until("every disk to be shown as attached", || {
            let all = group.host.ok(&["vdi", "list"]);
            all.as_array().unwrap().iter().filter(|vdi| vdi["attached"] == true).count() == DISKS
        });
        group.host.ok(&["sr", "scan", "store"]);
        let now = group.snapshots();
        assert!(now == before || now == before + DISKS, "{before} snapshots, then {now}");
        if let Some(stood) = stood {
            eprintln!("went on after {stood:?}");
            assert!(stood <= GO_ON, "it stood for {stood:?}");
            met += 1;
        }
        if met == 3 {
            break;
        }
    }
    assert!(met > 0, "the moment between two pauses was never met");
    let left = group.host.ok(&["vdi", "list"]);
    for vdi in left.as_array().unwrap().iter().filter(|vdi| vdi["kind"] == "snapshot") {
        group.host.ok(&["vdi", "delete", vdi["uuid"].as_str().unwrap()]);
    }
    group.host.ok(&group.snapshot("last"));
    assert_eq!(group.snapshots(), DISKS);
}
