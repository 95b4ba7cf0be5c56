//! Everything at once, for as long as one likes: a guest that checks all it
//! reads, fio with verify and trims beside it, while snapshots are taken,
//! checked, and deleted, chains merge down to the live leaf, and tapdisks are
//! killed (invariants 1 and 3).
//!
//! `COPPICE_SOAK_SECONDS` says how long (a minute where nothing is said),
//! `COPPICE_SEED` repeats a run's choices, though not its timing,
//! `COPPICE_SOAK_RECEIPTS` how often merges are watched by content receipts.

use std::process::Command;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::kills::number;
use crate::support::host::{Attached, Host, LIMIT};
use crate::support::programs::{have, output};
use crate::support::receipts::Receipts;
use crate::support::sectors::Sectors;
use crate::support::verifier::{Tally, Verifier, check_all};

/// How long where nothing is said.
const SECONDS: u64 = 60;
/// The guest's disk.
const DISK: (&str, u64) = ("32MiB", 32 << 20);
/// Snapshots kept at once.
const SNAPSHOTS_MAX: usize = 6;
/// Longest pause between two kills.
const BETWEEN_KILLS_MS_MAX: u64 = 1500;

/// How long receipts are asked for, or not.
const RECEIPTS_TURN: Duration = Duration::from_secs(10);

/// What a command may be refused with while a tapdisk dies or a merge runs.
/// Snapshots may outrun the collector on a slow machine; it must catch up.
const IN_THE_WAY: [&str; 4] = ["BUSY", "IN_USE", "NOT_RUNNING", "CHAIN_TOO_LONG"];

/// What the guest's thread is told.
enum Mark {
    /// A snapshot will be asked for once this is answered.
    Opens(Sender<()>),
    /// It was answered; what it may hold.
    Closes(Sender<Sectors>),
}

/// What happened, for the report.
#[derive(Debug, Default)]
struct Seen {
    snapshots: u64,
    /// Refused or cut off by a kill.
    refused: u64,
    checks: u64,
    deletes: u64,
    kills: u64,
    fio: FioSeen,
}

/// What fio went through.
#[derive(Debug, Default)]
struct FioSeen {
    runs: u64,
    kills: u64,
}

#[test]
fn nothing_is_lost_or_changed_while_everything_happens() {
    let seed = number("COPPICE_SEED").unwrap_or_else(|| uuid::Uuid::new_v4().as_u64_pair().0);
    let seconds = number("COPPICE_SOAK_SECONDS").unwrap_or(SECONDS);
    eprintln!("COPPICE_SEED={seed} COPPICE_SOAK_SECONDS={seconds}");
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut seeds = || SmallRng::seed_from_u64(rng.random());
    let host = Host::new();
    host.sr("store");
    let vdi = host.disk("store", "d", DISK.0);
    let fio = host.disk("store", "f", "64MiB");
    let (at, fio_at) = (host.attach(&vdi), host.attach(&fio));
    let end = Instant::now() + Duration::from_secs(seconds);
    let (marks, heard) = channel();
    let (mut seen, mut guest) = (Seen::default(), Verifier::new(DISK.1, seeds().random()));
    let (snapshots, kills, fios, verifies) = (seeds(), seeds(), seeds(), seeds());
    let mut receipts = Receipts::new("store");
    std::thread::scope(|scope| {
        // Dropped with this scope, also by a panic: it ends the guest.
        let marks = marks;
        let (guest, at) = (&mut guest, &at);
        let guest = scope.spawn(move || live(guest, at, &heard, end));
        let killer = scope.spawn(|| kill(&host, &vdi, kills, end));
        let fio = scope.spawn(|| fio_runs(&host, &fio, &fio_at, verifies, end));
        let second = scope.spawn(|| churn(&host, fios, end));
        let watcher = scope.spawn(|| watch_merges(&host, &mut receipts, end));
        shoot_pictures(&host, snapshots, &marks, &mut seen, end);
        drop(marks);
        seen.kills = killer.join().unwrap();
        seen.fio = fio.join().unwrap();
        second.join().unwrap();
        watcher.join().unwrap();
        guest.join().unwrap();
    });
    receipts.of_the_end(&host);
    merge_down(&host, &vdi);
    receipts.check(&host);
    until_served(|| guest.check(&at));
    persist(&host, &["vdi", "detach", &vdi]);
    assert!(guest.check(&host.attach_read_only(&vdi)));
    let Tally { reads, writes, zeroes, trims, flushes } = guest.tally;
    eprintln!("{seen:?}; {reads} reads, {writes} writes, {zeroes} zeroes, {trims} trims, {flushes} flushes");
    eprintln!("{:?}", receipts.report());
    assert!(seen.snapshots > 0 && seen.checks > 0 && seen.kills > 0 && guest.tally.all() > 1000, "{seen:?}");
    if seconds >= SECONDS {
        // On a slow machine few, but of each kind some.
        let Seen { deletes, fio: FioSeen { runs, kills }, .. } = seen;
        assert!(deletes > 0 && trims > 0 && zeroes > 0 && flushes > 0, "{seen:?}");
        assert!(!have("fio") || (runs > 1 && kills > 0), "{seen:?}");
    }
}

/// Tries until the disk lives through it.
fn until_served(mut attempt: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !attempt() {
        assert!(Instant::now() < deadline, "the disk does not come back");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The guest works and reconnects; after each death it reads everything.
fn live(guest: &mut Verifier, at: &Attached, marks: &Receiver<Mark>, end: Instant) {
    while Instant::now() < end {
        let lived = guest.work(at, |guest| {
            hear(guest, marks);
            Instant::now() >= end
        });
        if !lived {
            until_served(|| {
                hear(guest, marks);
                guest.check(at)
            });
        }
    }
    // Until nobody asks any more.
    while let Ok(mark) = marks.recv() {
        obey(guest, mark);
    }
}

fn hear(guest: &mut Verifier, marks: &Receiver<Mark>) {
    if let Ok(mark) = marks.try_recv() {
        obey(guest, mark);
    }
}

fn obey(guest: &mut Verifier, mark: Mark) {
    // Whoever asked may have failed meanwhile, and says so itself.
    match mark {
        Mark::Opens(answer) => {
            guest.window_opens();
            let _ = answer.send(());
        }
        Mark::Closes(answer) => {
            let _ = answer.send(guest.window_closes());
        }
    }
}

fn ask<T>(marks: &Sender<Mark>, mark: impl FnOnce(Sender<T>) -> Mark) -> T {
    let (answer, answered) = channel();
    marks.send(mark(answer)).unwrap();
    answered.recv_timeout(2 * LIMIT).expect("the guest is gone")
}

/// Kills the tapdisk again and again, wherever it is. smd brings it back, but
/// not one that keeps dying: for that one the disk is attached by hand.
fn kill(host: &Host, vdi: &str, mut rng: SmallRng, end: Instant) -> u64 {
    let mut kills = 0;
    loop {
        std::thread::sleep(Duration::from_millis(rng.random_range(0..BETWEEN_KILLS_MS_MAX)));
        if Instant::now() >= end {
            return kills;
        }
        let shown = host.ok(&["vdi", "show", vdi]);
        // The last kill may not have been noticed when the disk was attached
        // by hand: then it is down now, and is attached again.
        if !shown["nbd"].is_null() {
            Attached::of(&shown).kill();
            kills += 1;
        }
        attach_again(host, vdi);
    }
}

fn attach_again(host: &Host, vdi: &str) {
    until_served(|| {
        let said = host.cli(&["vdi", "attach", vdi]);
        assert!(said.status == 0 || IN_THE_WAY.contains(&said.code()), "{said:?}");
        said.status == 0
    });
}

/// Takes snapshots under load, looks at them again and again, deletes them.
fn shoot_pictures(host: &Host, mut rng: SmallRng, marks: &Sender<Mark>, seen: &mut Seen, end: Instant) {
    let mut kept: Vec<(String, Sectors)> = Vec::new();
    for n in 0.. {
        if Instant::now() >= end {
            break;
        }
        if kept.len() < SNAPSHOTS_MAX && rng.random_ratio(1, 2) {
            let name = format!("d-{n}");
            ask(marks, Mark::Opens);
            let said = host.cli(&["vdi", "snapshot", "d", "--name", &name]);
            let model = ask(marks, Mark::Closes);
            if said.status == 0 {
                seen.snapshots += 1;
            } else {
                // A kill came in between; it may exist all the same.
                assert!(!said.code().is_empty(), "{said:?}");
                seen.refused += 1;
            }
            if exists(host, &name) {
                kept.push((name, model));
            }
        } else if !kept.is_empty() {
            let at = rng.random_range(0..kept.len());
            look(host, &kept[at].0.clone(), &mut kept[at].1, seen);
            if rng.random_ratio(1, 2) {
                let (name, _) = kept.swap_remove(at);
                persist(host, &["vdi", "delete", &name]);
                seen.deletes += 1;
                host.cli(&["gc", "run"]);
            }
        }
    }
    for (name, mut model) in kept {
        look(host, &name, &mut model, seen);
    }
}

fn exists(host: &Host, name: &str) -> bool {
    host.ok(&["vdi", "list"]).as_array().unwrap().iter().any(|vdi| vdi["name"] == name)
}

/// A snapshot never changes: what it held once it holds for ever.
fn look(host: &Host, name: &str, model: &mut Sectors, seen: &mut Seen) {
    persist(host, &["vdi", "attach", "--read-only", name]);
    let at = host.attach_read_only(name);
    until_served(|| check_all(model, &at));
    persist(host, &["vdi", "detach", name]);
    seen.checks += 1;
}

/// Repeats a command that a dying tapdisk may get in the way of.
fn persist(host: &Host, args: &[&str]) {
    let deadline = Instant::now() + LIMIT;
    loop {
        let said = host.cli(args);
        if said.status == 0 {
            return;
        }
        assert!(IN_THE_WAY.contains(&said.code()), "{args:?}: {said:?}");
        assert!(Instant::now() < deadline, "{args:?}: {said:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Snapshots of fio's disk come and go.
fn churn(host: &Host, mut rng: SmallRng, end: Instant) {
    let mut kept = std::collections::VecDeque::new();
    for n in 0.. {
        std::thread::sleep(Duration::from_millis(rng.random_range(0..1500)));
        if Instant::now() >= end {
            return;
        }
        let name = format!("f-{n}");
        let said = host.cli(&["vdi", "snapshot", "f", "--name", &name]);
        // A kill came in between; it may exist all the same.
        assert!(said.status == 0 || IN_THE_WAY.contains(&said.code()), "{said:?}");
        if exists(host, &name) {
            kept.push_back(name);
        }
        while kept.len() > rng.random_range(1..4) {
            let Some(name) = kept.pop_front() else { break };
            persist(host, &["vdi", "delete", &name]);
        }
    }
}

/// fio trims and writes blocks of all sizes and verifies, again and again;
/// every other time its tapdisk is killed between the two, so that what it
/// verifies is what was acknowledged before.
fn fio_runs(host: &Host, vdi: &str, at: &Attached, mut rng: SmallRng, end: Instant) -> FioSeen {
    let mut seen = FioSeen::default();
    if !have("fio") {
        return seen;
    }
    while Instant::now() < end {
        let seed = rng.random();
        if seen.runs % 2 == 1 {
            fio(at, seed, &["--do_verify=1"]);
        } else {
            fio(at, seed, &["--do_verify=0"]);
            let shown = host.ok(&["vdi", "show", vdi]);
            if !shown["nbd"].is_null() {
                Attached::of(&shown).kill();
                seen.kills += 1;
            }
            attach_again(host, vdi);
            fio(at, seed, &["--do_verify=1", "--verify_only"]);
        }
        seen.runs += 1;
    }
    seen
}

/// One pass over a disk. Each block holds the seed and its offset: what another
/// pass wrote is not taken for what this one did.
fn fio(at: &Attached, seed: u32, what: &[&str]) {
    let mut fio = Command::new("fio");
    // Each block is trimmed, then written; the two must not be in flight at
    // once, for then either may come last.
    fio.args(["--name=v", "--ioengine=nbd", "--rw=randtrimwrite", "--bsrange=4k-128k", "--iodepth=8"])
        .args(["--serialize_overlap=1", "--size=48m", "--verify_state_save=0"])
        .args(["--verify=pattern", "--verify_fatal=1"])
        .arg(format!("--verify_pattern=0x{seed:08x}%o"))
        .arg(format!("--randseed={seed}"))
        .arg(format!("--uri={}", at.uri))
        .args(what);
    let said = output(&mut fio);
    assert!(said.status.success(), "{what:?}: {}", String::from_utf8_lossy(&said.stderr));
}

/// Looks whether a merge changed what a disk reads; now and then nobody asks.
fn watch_merges(host: &Host, receipts: &mut Receipts, end: Instant) {
    while Instant::now() < end {
        receipts.turn(host);
        std::thread::sleep(RECEIPTS_TURN.min(end.saturating_duration_since(Instant::now())));
        receipts.check(host);
    }
}

/// Deletes all snapshots and merges until the disk is one image.
fn merge_down(host: &Host, vdi: &str) {
    for each in host.ok(&["vdi", "list"]).as_array().unwrap() {
        if each["kind"] == "snapshot" {
            persist(host, &["vdi", "delete", each["uuid"].as_str().unwrap()]);
        }
    }
    until_served(|| {
        host.cli(&["gc", "run", "--wait"]);
        host.ok(&["vdi", "show", vdi])["depth"] == 1
    });
}
