//! What happens in the demo, step by step.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::load::{BLOCK_UNITS, Load};
use super::oracle::Window;
use super::report::{LoadReport, Report, SnapshotReport, Verification, us};
use super::stage::{Served, Stage};
use super::tally::Tally;
use super::{verify, watch};
use crate::failure::{Failure, Outcome};
use crate::output::say;
use crate::view::{Forest, Node, Vdi, list_of, read};

/// Size of the disk, bytes.
const DISK_BYTES: u64 = 1 << 30;
/// Snapshots taken.
const SNAPSHOTS: usize = 8;
/// Requests in flight at any time, at least.
const IN_FLIGHT_MIN: usize = 8;
/// Writes into each level, at least.
const LEVEL_WRITES: u64 = 3_000;
/// Time spent on each level, at least.
const LEVEL_TIME: Duration = Duration::from_millis(400);
/// Longest wait for a level to be written.
const LEVEL_LIMIT: Duration = Duration::from_secs(30);
/// Longest wait for the chain to be merged.
const MERGE_LIMIT: Duration = Duration::from_secs(100);
/// How often a waiting step looks again.
const POLL: Duration = Duration::from_millis(20);

/// A snapshot and what it may hold.
struct Taken {
    uuid: String,
    window: Window,
}

/// Plays the demo on `stage`.
pub fn play(stage: &Stage, seed: u64) -> Outcome<Report> {
    let mut report = Report { seed, virtual_size: DISK_BYTES, ..Report::default() };
    let body = json!({"name": "demo", "type": "file", "path": stage.store});
    let sr = uuid_in(&stage.smd.post("/srs", &body)?)?;
    let body = json!({"sr": sr, "name": "disk", "virtual_size": DISK_BYTES});
    let vdi = uuid_in(&stage.smd.post("/vdis", &body)?)?;
    report.vdi.clone_from(&vdi);
    let served = stage.attach(&vdi, false)?;
    say(&format!("coppice: a disk of 1 GiB, served on {}", served.socket.display()));
    let load = Load::start(&served.socket, &served.export, seed)?;
    match with_load(stage, &load, &mut report, &sr, &vdi) {
        Ok(()) => {}
        // What went wrong in the load says more than what followed from it.
        Err(failure) => return Err(load.stop().err().map_or(failure, wrong)),
    }
    let (oracle, tally) = load.stop().map_err(wrong)?;
    report.load = load_report(&tally);
    promised(&report)?;
    report.longest_stall_us = us(tally.longest());
    say("coppice: comparing every byte");
    report.verification = last_look(stage, &vdi, &served, oracle.content())?;
    stage.smd.post(&format!("/srs/{sr}/detach"), &json!({}))?;
    Ok(report)
}

/// Everything that happens while the guest writes.
fn with_load(stage: &Stage, load: &Load, report: &mut Report, sr: &str, vdi: &str) -> Outcome<()> {
    let mut taken = Vec::new();
    for i in 1..=SNAPSHOTS {
        write_level(load)?;
        let (snapshot, of) = snapshot(stage, load, vdi, i)?;
        taken.push(snapshot);
        report.snapshots.push(of);
    }
    write_level(load)?;
    report.tree_before = tree(stage, sr)?;
    report.depth_before = depth_of(&report.tree_before, vdi)?;
    for (snapshot, of) in taken.iter().zip(&mut report.snapshots) {
        say(&format!("coppice: comparing {} with its instant", of.name));
        let served = stage.attach(&snapshot.uuid, true)?;
        let compared = verify::snapshot(&served.socket, &served.export, &snapshot.window);
        of.bytes_verified = compared.map_err(|e| wrong(format!("{}: {e}", of.name)))?;
        stage.detach(&snapshot.uuid)?;
    }
    say("coppice: deleting all snapshots and merging the chain under the writes");
    let watch = watch::Watch::start(&stage.gcd)?;
    for snapshot in &taken {
        stage.smd.delete(&format!("/vdis/{}", snapshot.uuid))?;
    }
    drop(taken);
    merge(stage, load, report, (sr, vdi), watch)
}

/// Lets the guest write for a while.
fn write_level(load: &Load) -> Outcome<()> {
    let (began, before) = (Instant::now(), load.tally().writes);
    let deadline = began + LEVEL_LIMIT;
    while load.tally().writes < before + LEVEL_WRITES || began.elapsed() < LEVEL_TIME {
        alive(load)?;
        if Instant::now() > deadline {
            return Err(wrong(format!("{LEVEL_WRITES} writes took longer than {LEVEL_LIMIT:?}")));
        }
        std::thread::sleep(POLL);
    }
    Ok(())
}

fn snapshot(stage: &Stage, load: &Load, vdi: &str, number: usize) -> Outcome<(Taken, SnapshotReport)> {
    let name = format!("snapshot {number}");
    load.oracle().open_window();
    let began = Instant::now();
    let answer = stage.smd.post("/vdis/snapshot", &json!({"vdis": [vdi], "name": name}))?;
    let ended = Instant::now();
    let (window, blocks_partly_written) = load
        .oracle()
        .close_window(BLOCK_UNITS as usize)
        .ok_or_else(|| wrong("the window of the snapshot is gone".to_owned()))?;
    let made: Vec<Vdi> = list_of(&answer, "vdis")?;
    let uuid = match made.as_slice() {
        [one] => one.uuid.clone(),
        _ => {
            return Err(wrong(format!("one snapshot was asked for, not {}", made.len())));
        }
    };
    let (writes_acked, stall) = load.tally().between(began, ended);
    let took_us = us(ended - began);
    let longest_stall_us = us(stall);
    say(&format!("coppice: {name} of {SNAPSHOTS} in {:.1} ms", took_us as f64 / 1e3));
    let of = SnapshotReport {
        name,
        uuid: uuid.clone(),
        took_us,
        longest_stall_us,
        writes_acked,
        blocks_partly_written,
        bytes_verified: 0,
    };
    Ok((Taken { uuid, window }, of))
}

/// Has the collector merge until the chain is one image, and measures each
/// merge.
fn merge(
    stage: &Stage,
    load: &Load,
    report: &mut Report,
    (sr, vdi): (&str, &str),
    mut watch: watch::Watch<'_>,
) -> Outcome<()> {
    let deadline = Instant::now() + MERGE_LIMIT;
    stage.gcd.post("/run", &json!({"sr": sr, "wait": false}))?;
    loop {
        alive(load)?;
        let idle = watch.look()?;
        let now = tree(stage, sr)?;
        if idle && depth_of(&now, vdi)? == 1 && alone(&now, vdi)? {
            report.tree_after = now;
            report.depth_after = 1;
            break;
        }
        if Instant::now() > deadline {
            let message = format!("the chain is not merged after {MERGE_LIMIT:?}");
            return Err(Failure::new("BUSY", message));
        }
        std::thread::sleep(POLL);
    }
    watch.finish(&load.tally(), report)
}

/// What the load was to be like throughout; a demo without it shows nothing.
fn promised(report: &Report) -> Outcome<()> {
    let in_flight = report.load.in_flight_min;
    if in_flight < IN_FLIGHT_MIN {
        return Err(wrong(format!("only {in_flight} requests were in flight at one time")));
    }
    match report.snapshots.iter().find(|snapshot| snapshot.blocks_partly_written == 0) {
        Some(whole) => Err(wrong(format!("no block below {} is partly written", whole.name))),
        None => Ok(()),
    }
}

/// Compares the disk while attached, and again after it was closed and
/// opened anew.
fn last_look(
    stage: &Stage,
    vdi: &str,
    served: &Served,
    content: &[super::stamp::Value],
) -> Outcome<Verification> {
    let hot = verify::disk(&served.socket, &served.export, content).map_err(wrong)?;
    stage.detach(vdi)?;
    let served = stage.attach(vdi, true)?;
    let cold = verify::disk(&served.socket, &served.export, content).map_err(wrong)?;
    stage.detach(vdi)?;
    if hot.disk != hot.model || cold.disk != hot.model {
        return Err(wrong(format!("hashes differ: {hot:?}, reattached {cold:?}")));
    }
    Ok(Verification {
        bytes: hot.bytes,
        sha256: hot.disk,
        sha256_expected: hot.model,
        sha256_reattached: cold.disk,
    })
}

fn load_report(tally: &Tally) -> LoadReport {
    LoadReport {
        writes: tally.writes,
        bytes_written: tally.bytes_written,
        reads_verified: tally.reads,
        flushes: tally.flushes,
        longest_flush_us: us(tally.longest_flush),
        in_flight_min: tally.in_flight_min.unwrap_or(0),
    }
}

fn tree(stage: &Stage, sr: &str) -> Outcome<Value> {
    stage.smd.get(&format!("/srs/{sr}/tree"))
}

/// Length of the chain of `vdi`.
fn depth_of(tree: &Value, vdi: &str) -> Outcome<u64> {
    let forest: Forest = read(tree)?;
    fn find(nodes: &[Node], vdi: &str) -> Option<u64> {
        nodes.iter().find_map(|node| {
            if node.vdi.uuid == vdi { Some(node.vdi.depth) } else { find(&node.children, vdi) }
        })
    }
    find(&forest.roots, vdi).ok_or_else(|| wrong(format!("the tree does not show {vdi}")))
}

/// Whether `vdi` is all there is.
fn alone(tree: &Value, vdi: &str) -> Outcome<bool> {
    let forest: Forest = read(tree)?;
    Ok(matches!(forest.roots.as_slice(),
        [root] if root.vdi.uuid == vdi && root.children.is_empty() && root.vdi.kind == "leaf"))
}

/// The load stops early only when something is wrong; `play` asks it what.
fn alive(load: &Load) -> Outcome<()> {
    if load.has_failed() { Err(wrong("the load stopped".to_owned())) } else { Ok(()) }
}

fn uuid_in(answer: &Value) -> Outcome<String> {
    let uuid = answer.get("uuid").and_then(Value::as_str);
    uuid.map(str::to_owned).ok_or_else(|| wrong(format!("an answer without a uuid: {answer}")))
}

/// A check of the demo that did not hold.
fn wrong(what: String) -> Failure {
    Failure::new("DEMO_FAILED", what)
}
