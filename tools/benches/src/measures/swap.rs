//! The stall a guest sees when its leaf is swapped for a snapshot: drain and
//! swap under a load of 32 requests in flight, at depth 1 and 30.
//!
//! The storage daemon's part of a snapshot is played here, in its order:
//! second name and new leaf, record, Prepare, Pause, decision, Resume. Each
//! swap has a leaf of its own, so the depth is what the row says.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tapdisk_control::{ImageRef, IntentNames, Reply, Request};
use vhd::storage::{VolumeName, Volumes};

use crate::bench::{Bench, DEEP, LEVELS, SMALL, warm};
use crate::images::{Fill, Image};
use crate::nbd::{Answered, Connection, Job, Kind};
use crate::offsets;
use crate::procs::Server;
use crate::report::{Floor, Report, Row, Series};
use crate::stats::percentile;

/// Load before the swap and after it.
const MARGIN: Duration = Duration::from_millis(100);
/// Lease of a pause.
const PAUSE_MS_MAX: u64 = 5_000;

/// What one swap cost, in milliseconds.
struct Stall {
    /// Longest wait of a request that met the swap.
    guest: f64,
    /// From the order to pause until requests are served again, as the
    /// tapdisk says.
    told: f64,
}

pub fn run(bench: &Bench, report: &mut Report) -> Result<()> {
    let levels = (0..LEVELS - 1).map(Fill::Level);
    let chain = bench.images.chain("swap", bench.size_bytes, None, levels)?;
    for (depth, below) in [(1, None), (LEVELS, chain.last())] {
        let stalls = (0..bench.swaps).map(|n| one(bench, below, n)).collect::<Result<Vec<_>>>()?;
        let worst = |what: fn(&Stall) -> f64| {
            let all: Vec<f64> = stalls.iter().map(what).collect();
            Series { name: "tapdisk".to_owned(), rounds: percentile(&all, 0.99).into_iter().collect() }
        };
        let measure = format!("longest wait of a request that meets a swap, QD 32, depth {depth}, p99");
        report.rows.push(Row::absolute(&measure, "ms", worst(|stall| stall.guest), Floor::AtMost(10.0)));
        let measure = format!("drain and swap as the tapdisk times them, depth {depth}, p99");
        report.rows.push(Row::absolute(&measure, "ms", worst(|stall| stall.told), Floor::AtMost(10.0)));
    }
    chain.iter().try_for_each(|image| bench.images.remove(image))
}

fn one(bench: &Bench, below: Option<&Image>, n: u32) -> Result<Stall> {
    let leaf = bench.images.image("swap-leaf.vhd", bench.size_bytes, Fill::Empty, below)?;
    let server = bench.tapdisk(&leaf)?;
    warm(&server)?;
    let mut stall = None;
    let over = AtomicBool::new(false);
    // Half of them read, half of them write.
    let (answered, window) = std::thread::scope(|scope| {
        let guests: Vec<_> = [Kind::Read, Kind::Write]
            .into_iter()
            .zip([server.connect()?, server.connect()?])
            .map(|(kind, connection)| {
                let over = &over;
                scope.spawn(move || guest(connection, kind, u64::from(n), over))
            })
            .collect();
        std::thread::sleep(MARGIN);
        let window = swap(bench, &server, &leaf);
        std::thread::sleep(MARGIN);
        over.store(true, Ordering::Relaxed);
        let mut answered = Vec::new();
        for guest in guests {
            answered.extend(guest.join().map_err(|_| anyhow::anyhow!("a guest panicked"))??);
        }
        anyhow::Ok((answered, window?))
    })?;
    let met = answered.iter().filter(|one| one.sent <= window.1 && window.0 <= one.at);
    let longest = met.map(|one| one.at - one.sent).max().context("no request met the swap")?;
    if let Reply::Stats(stats) = server.control()?.call(Request::Stats)? {
        stall = Some(Stall { guest: longest.as_secs_f64() * 1e3, told: stats.last_pause_us as f64 / 1e3 });
    }
    drop(server);
    for volume in [leaf.volume, base_name()?] {
        bench.images.volumes().delete(&volume)?;
    }
    bench.images.volumes().delete_record(&intent().decided, "bench")?;
    stall.context("no counters")
}

/// A load until it is over.
fn guest(mut connection: Connection, kind: Kind, seed: u64, over: &AtomicBool) -> Result<Vec<Answered>> {
    let size = connection.size_bytes();
    let job = Job { kind, request_bytes: SMALL, depth: DEEP / 2, time: None };
    let mut all = Vec::new();
    let mut offsets = offsets::random(size, SMALL, seed).take_while(|_| !over.load(Ordering::Relaxed));
    connection.run(&job, &mut offsets, |answered| all.push(answered))?;
    Ok(all)
}

/// Swaps the leaf for an empty child; when the pause began and ended.
fn swap(bench: &Bench, server: &Server, leaf: &Image) -> Result<(Instant, Instant)> {
    let volumes = bench.images.volumes();
    let base = Image { volume: base_name()?, ..leaf.clone() };
    volumes.lay_aside(&leaf.volume, &base.volume)?;
    let child = bench.images.image("swap-child.vhd", bench.size_bytes, Fill::Empty, Some(&base))?;
    let intent = intent();
    volumes.put_record(&intent.pending, b"{}", "bench")?;
    let mut control = server.control()?;
    let prepare = Request::Prepare {
        intent: intent.clone(),
        leaf: reference(leaf),
        child: Some(reference(&child)),
        base: None,
    };
    control.call(prepare)?;
    let began = Instant::now();
    control.call(Request::Pause { intent: intent.clone(), limit_ms: PAUSE_MS_MAX })?;
    ensure!(volumes.rename_record(&intent.pending, &intent.decided)?, "the pause ended by itself");
    control.call(Request::Resume { intent, swap: true })?;
    Ok((began, Instant::now()))
}

fn reference(image: &Image) -> ImageRef {
    ImageRef { volume: image.volume.as_str().to_owned(), footer: image.footer }
}

fn base_name() -> Result<VolumeName> {
    VolumeName::new("swap-base.vhd").context("a volume name")
}

fn intent() -> IntentNames {
    let name = |state| format!("bench.{state}");
    IntentNames { pending: name("pending"), decided: name("decided"), void: name("void") }
}
