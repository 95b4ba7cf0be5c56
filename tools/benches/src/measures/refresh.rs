//! Latency while the chain below the leaf is re-read again and again.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use tapdisk_control::{ImageRef, Request};

use crate::bench::{Bench, Contender, DEEP, Round, SMALL, compare, warm};
use crate::images::{Fill, Image};
use crate::nbd::{Answered, Connection, Job, Kind};
use crate::offsets;
use crate::procs::Server;
use crate::report::{Floor, Report};
use crate::stats::Latencies;

/// From the end of one refresh to the next.
const BETWEEN: Duration = Duration::from_millis(20);

pub fn run(bench: &Bench, report: &mut Report) -> Result<()> {
    let bottom = bench.images.image("refresh.vhd", bench.size_bytes, Fill::Level(0), None)?;
    let chain = bench.chain("refresh", &bottom, Fill::Level)?;
    let leaf = chain.last().context("a chain")?;
    let server = bench.tapdisk(leaf)?;
    warm(&server)?;
    let mut connections = [server.connect()?, server.connect()?];
    let [with, without] = &mut connections;
    let contenders = vec![
        Contender::new("refreshing", |round| during(bench, &server, leaf, with, round)),
        Contender::new("not refreshing", |round| {
            let answered = answers(bench, without, round)?;
            Ok(as_round(bench, &answered))
        }),
    ];
    let results = bench.interleave(contenders)?;
    let latency = |name: &str, share| results.of(name).map(|rounds| rounds.latency_us(share));
    let k_iops = |name: &str| results.of(name).map(|rounds| rounds.k_iops());
    let [with, without] = ["refreshing", "not refreshing"];
    let measure = "latency of a 4 KiB read during refresh, QD 32, S(30), p99.9: to without";
    compare(report, measure, "us", latency(with, 0.999), latency(without, 0.999), Floor::AtMost(2.0));
    // A drain would show here as a wait of all.
    let measure = "the same, longest";
    compare(report, measure, "us", latency(with, 1.0), latency(without, 1.0), Floor::None);
    let measure = "4 KiB reads with a refresh every 20 ms: to without";
    compare(report, measure, "kIOPS", k_iops(with), k_iops(without), Floor::None);
    drop(server);
    chain.iter().chain([&bottom]).try_for_each(|image| bench.images.remove(image))
}

fn answers(bench: &Bench, connection: &mut Connection, round: u32) -> Result<Vec<Answered>> {
    let job = Job { kind: Kind::Read, request_bytes: SMALL, depth: DEEP, time: Some(bench.time) };
    let mut offsets = offsets::random(bench.size_bytes, SMALL, u64::from(round));
    let mut all = Vec::new();
    connection.run(&job, &mut offsets, |answered| all.push(answered))?;
    Ok(all)
}

fn as_round<'a>(bench: &Bench, answered: impl IntoIterator<Item = &'a Answered>) -> Round {
    let mut latencies = Latencies::default();
    for one in answered {
        latencies.record(one.at - one.sent);
    }
    let rate = latencies.count() as f64 / bench.time.as_secs_f64();
    Round { rate, latencies, ..Round::default() }
}

/// A load with refreshes going on; the latencies are those of requests that
/// met one, the rate is that of all.
fn during(
    bench: &Bench,
    server: &Server,
    leaf: &Image,
    connection: &mut Connection,
    round: u32,
) -> Result<Round> {
    let over = AtomicBool::new(false);
    let (answered, windows) = std::thread::scope(|scope| {
        let refreshing = scope.spawn(|| refreshes(server, leaf, &over));
        let answered = answers(bench, connection, round);
        over.store(true, Ordering::Relaxed);
        let windows = refreshing.join().map_err(|_| anyhow::anyhow!("the refresher panicked"))?;
        anyhow::Ok((answered?, windows?))
    })?;
    let met = |one: &&Answered| windows.iter().any(|(from, to)| one.sent <= *to && *from <= one.at);
    let rate = as_round(bench, &answered).rate;
    Ok(Round { rate, ..as_round(bench, answered.iter().filter(met)) })
}

/// When each refresh began and was drained.
fn refreshes(server: &Server, leaf: &Image, over: &AtomicBool) -> Result<Vec<(Instant, Instant)>> {
    let mut control = server.control()?;
    let leaf = ImageRef { volume: leaf.volume.as_str().to_owned(), footer: leaf.footer };
    let mut windows = Vec::new();
    while !over.load(Ordering::Relaxed) {
        let began = Instant::now();
        // Answers twice; `call` returns the last one.
        control.call(Request::Refresh { leaf: leaf.clone(), parent: None })?;
        windows.push((began, Instant::now()));
        std::thread::sleep(BETWEEN);
    }
    Ok(windows)
}
