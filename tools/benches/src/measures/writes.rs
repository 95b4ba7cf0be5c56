//! 4 KiB random writes: into whole blocks, into a fresh disk, over an
//! ancestor's data; and the first write to a block.

use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::bench::{Bench, Contender, DEEP, QEMU_RAW, Results, Round, SMALL, compare, have, load};
use crate::images::{Fill, Image};
use crate::nbd::{Job, Kind};
use crate::offsets;
use crate::procs::{Aio, FioJob, Server, Tool, fio_raw};
use crate::report::{Floor, Report, Row, Series};

pub fn run(bench: &Bench, report: &mut Report) -> Result<()> {
    let whole = bench.images.image("whole.vhd", bench.size_bytes, Fill::Level(0), None)?;
    let base = bench.images.image("base.vhd", bench.size_bytes, Fill::Level(0), None)?;
    let ours = bench.tapdisk(&whole)?;
    let qemu = bench.qemu_raw(report, &bench.raw_file()?)?;
    let size_bytes = bench.size_bytes;
    let mut contenders = vec![
        bench.random("whole blocks", &ours, Kind::Write, DEEP)?,
        anew(bench, "allocating", None, random_job(bench)),
        anew(bench, "over an ancestor", Some(&base), random_job(bench)),
        anew(bench, "every write allocates", None, each_block_job(DEEP)),
    ];
    for (name, server) in &qemu {
        contenders.push(bench.random(name, server, Kind::Write, DEEP)?);
    }
    if have(report, "the raw file", &[Tool::Fio]) {
        let (written, sparse) = (bench.raw_file()?, bench.images.path("sparse.raw"));
        contenders.push(by_fio(bench, RAW[0], written, |_| Ok(())));
        contenders.push(by_fio(bench, RAW[1], sparse, move |sparse| {
            Ok(File::create(sparse)?.set_len(size_bytes)?)
        }));
    }
    rows(report, &bench.interleave(contenders)?);
    drop((ours, qemu));
    first_write(bench, report)?;
    for image in [whole, base] {
        bench.images.remove(&image)?;
    }
    Ok(())
}

fn rows(report: &mut Report, results: &Results) {
    let k_iops = |name: &str| results.of(name).map(|rounds| rounds.k_iops());
    let peer = || results.best(&QEMU_RAW).map(|rounds| rounds.k_iops());
    let mut row = |measure: &str, ours: &str, peer, floor| {
        compare(report, measure, "kIOPS", k_iops(ours), peer, floor);
    };
    let measure = "4 KiB random write, QD 32: whole blocks to qemu-nbd raw";
    row(measure, "whole blocks", peer(), Floor::AtLeast(1.2));
    let measure = "4 KiB random write, QD 32: fresh disk to qemu-nbd preallocated raw";
    row(measure, "allocating", peer(), Floor::AtLeast(0.7));
    let measure = "4 KiB random write, QD 32: each into another new block, to qemu-nbd raw";
    row(measure, "every write allocates", peer(), Floor::None);
    let measure = "4 KiB random write, QD 32: over an ancestor's data to whole blocks";
    row(measure, "over an ancestor", k_iops("whole blocks"), Floor::AtLeast(0.7));
    // How much of its speed a file keeps here while it has holes, whoever
    // writes it.
    let measure = "4 KiB random write, QD 32: raw file full of holes to written before, by fio";
    row(measure, RAW[1], k_iops(RAW[0]), Floor::None);
    let measure = "4 KiB random write, QD 32: over an ancestor's data to a raw file full of holes, by fio";
    row(measure, "over an ancestor", k_iops(RAW[1]), Floor::None);
    let cpu = |name: &str| results.of(name).map(|rounds| rounds.cpu_us());
    let peer = results.best(&QEMU_RAW).map(|rounds| rounds.cpu_us());
    let measure = "CPU time per 4 KiB write, QD 32: whole blocks to qemu-nbd raw";
    compare(report, measure, "us", cpu("whole blocks"), peer, Floor::None);
}

/// Names of the contenders without a server.
const RAW: [&str; 2] = ["fio raw written", "fio raw sparse"];

/// fio on a file that `before` makes anew for each round.
pub fn by_fio<'a>(
    bench: &Bench,
    name: &'static str,
    file: PathBuf,
    before: impl Fn(&Path) -> Result<()> + 'a,
) -> Contender<'a> {
    let job = FioJob { rw: "randwrite", request_bytes: SMALL, depth: DEEP, time: bench.time };
    Contender::new(name, move |_| {
        before(&file)?;
        Ok(Round { rate: fio_raw(&file, Aio::Uring, &job)?, ..Round::default() })
    })
}

fn random_job(bench: &Bench) -> Job {
    Job { kind: Kind::Write, request_bytes: SMALL, depth: DEEP, time: Some(bench.time) }
}

/// One write per block: ends when each block had one.
fn each_block_job(depth: usize) -> Job {
    Job { kind: Kind::Write, request_bytes: SMALL, depth, time: None }
}

/// A contender that gets a new empty leaf for every round.
fn anew<'a>(bench: &'a Bench, name: &'static str, base: Option<&'a Image>, job: Job) -> Contender<'a> {
    Contender::new(name, move |round| {
        with_new_leaf(bench, bench.size_bytes, base, |server| {
            let mut connection = server.connect()?;
            let (size, seed) = (connection.size_bytes(), u64::from(round));
            let mut offsets: Box<dyn Iterator<Item = u64>> = match job.time {
                Some(_) => Box::new(offsets::random(size, SMALL, seed)),
                None => Box::new(offsets::each_block(size, SMALL, seed)),
            };
            load(server, &mut connection, &job, &mut offsets)
        })
    })
}

/// Serves a new empty leaf for as long as `run` takes.
///
/// # Errors
/// What `run` said, or the disk.
pub fn with_new_leaf<T>(
    bench: &Bench,
    size_bytes: u64,
    base: Option<&Image>,
    run: impl FnOnce(&Server) -> Result<T>,
) -> Result<T> {
    let leaf = bench.images.image("new-leaf.vhd", size_bytes, Fill::Empty, base)?;
    let server = bench.tapdisk(&leaf)?;
    let came_to = run(&server);
    drop(server);
    bench.images.remove(&leaf)?;
    came_to
}

/// The first write to each block of a fresh disk, one at a time, and then
/// another write to each.
fn first_write(bench: &Bench, report: &mut Report) -> Result<()> {
    let (mut first, mut again) = (Vec::new(), Vec::new());
    let job = each_block_job(1);
    for round in 0..u64::from(bench.runs) {
        with_new_leaf(bench, bench.size_bytes, None, |server| {
            let mut connection = server.connect()?;
            for (into, seed) in [(&mut first, 2 * round), (&mut again, 2 * round + 1)] {
                let mut offsets = offsets::each_block(bench.size_bytes, SMALL, seed);
                let round = load(server, &mut connection, &job, &mut offsets).context("first write")?;
                into.push(round.latencies.percentile_us(0.5));
            }
            Ok(())
        })?;
    }
    let series = |name: &str, rounds| Series { name: name.to_owned(), rounds };
    report.rows.push(Row::ratio(
        "first write to a block, QD 1: to a write to a present block, median",
        "us",
        series("first write", first),
        series("present block", again),
        Floor::AtMost(3.0),
    ));
    Ok(())
}
