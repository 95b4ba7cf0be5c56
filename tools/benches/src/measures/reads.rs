//! 4 KiB random reads at depth 1 and 30, against peers; CPU time per request.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};

use crate::bench::{
    Bench, Contender, DEEP, LEVELS, QEMU_RAW, Results, Round, SMALL, blocks, compare, have, load, warm,
};
use crate::images::{Fill, drop_from_cache};
use crate::nbd::{Job, Kind};
use crate::offsets;
use crate::procs::{Aio, FioJob, Server, Tool, fio_nbd, fio_raw, qcow2};
use crate::report::{Floor, Report};
use crate::sets;

const FIO: [&str; 2] = ["fio raw io_uring", "fio raw libaio"];
const QCOW2: [&str; 2] = ["qemu-nbd qcow2 x30 io_uring", "qemu-nbd qcow2 x30 native"];

/// Our servers, all on one bottom; E(1) is S(1) by definition.
struct Ours {
    s1: Server,
    s30: Server,
    e30: Server,
}

pub fn run(bench: &Bench, report: &mut Report) -> Result<()> {
    let s1 = bench.images.image("s1.vhd", bench.size_bytes, Fill::Level(0), None)?;
    let s30 = bench.chain("s30", &s1, Fill::Level)?;
    let e30 = bench.chain("e30", &s1, |_| Fill::Empty)?;
    let raw = bench.images.file(&s1);
    let leaf = |chain: &[_]| chain.last().cloned().context("a chain");
    let ours = Ours {
        s1: bench.tapdisk(&s1)?,
        s30: bench.tapdisk(&leaf(&s30)?)?,
        e30: bench.tapdisk(&leaf(&e30)?)?,
    };
    cold(bench, report, &ours)?;
    for server in [&ours.s1, &ours.s30, &ours.e30] {
        warm(server)?;
    }
    let qemu = bench.qemu_raw(report, &raw)?;
    let chain = qcow2_chain(bench, report, &ours.s30)?;
    let nbdkit = if have(report, "nbdkit", &[Tool::Nbdkit]) {
        Some(Server::nbdkit_file(&bench.images, &raw)?)
    } else {
        None
    };

    let mut contenders = Vec::new();
    for (name, server) in [("S(1)", &ours.s1), ("S(30)", &ours.s30), ("E(30)", &ours.e30)] {
        contenders.push(bench.random(name, server, Kind::Read, DEEP)?);
    }
    for (name, server) in qemu.iter().chain(&chain) {
        contenders.push(bench.random(name, server, Kind::Read, DEEP)?);
    }
    if let Some(nbdkit) = &nbdkit {
        contenders.push(bench.random("nbdkit file", nbdkit, Kind::Read, DEEP)?);
    }
    let fio = have(report, "the raw file", &[Tool::Fio]);
    if fio {
        for (aio, name) in Aio::BOTH.into_iter().zip(FIO) {
            let (raw, job) = (raw.clone(), fio_job(bench));
            contenders.push(Contender::new(name, move |_| rate(fio_raw(&raw, aio, &job)?)));
        }
        contenders.push(by_fio(bench, "S(1) by fio", &ours.s1));
        for (name, server) in &qemu {
            contenders.push(by_fio(
                bench,
                if *name == QEMU_RAW[0] { FIO_QEMU[0] } else { FIO_QEMU[1] },
                server,
            ));
        }
    }
    deep_rows(report, &bench.interleave(contenders)?);
    one_at_a_time(bench, report, &ours, &qemu)
}

const FIO_QEMU: [&str; 2] = ["qemu-nbd raw io_uring by fio", "qemu-nbd raw native by fio"];

/// The same load with fio's NBD client, which shows whether ours flatters
/// anybody.
fn by_fio<'a>(bench: &Bench, name: &'static str, server: &'a Server) -> Contender<'a> {
    let (job, size) = (fio_job(bench), bench.size_bytes);
    Contender::new(name, move |_| rate(fio_nbd(&server.uri(), size, &job)?))
}

fn fio_job(bench: &Bench) -> FioJob<'static> {
    FioJob { rw: "randread", request_bytes: SMALL, depth: DEEP, time: bench.time }
}

fn rate(rate: f64) -> Result<Round> {
    Ok(Round { rate, ..Round::default() })
}

fn deep_rows(report: &mut Report, results: &Results) {
    let k_iops = |name: &str| results.of(name).map(|rounds| rounds.k_iops());
    let best = |names: &[&str]| results.best(names).map(|rounds| rounds.k_iops());
    let mut row = |measure: &str, ours, peer, floor| {
        compare(report, measure, "kIOPS", ours, peer, floor);
    };
    let s1 = || k_iops("S(1)");
    row("4 KiB random read, QD 32: S(30) to S(1), warm", k_iops("S(30)"), s1(), Floor::AtLeast(0.90));
    row("4 KiB random read, QD 32: E(30) to E(1), warm", k_iops("E(30)"), s1(), Floor::AtLeast(0.97));
    row("4 KiB random read, QD 32: S(1) to qemu-nbd raw", s1(), best(&QEMU_RAW), Floor::AtLeast(1.3));
    row("4 KiB random read, QD 32: S(1) to the raw file", s1(), best(&FIO), Floor::AtLeast(0.75));
    let measure = "4 KiB random read, QD 32: S(30) to qemu-nbd on 30 qcow2";
    row(measure, k_iops("S(30)"), best(&QCOW2), Floor::AtLeast(4.0));
    row("4 KiB random read, QD 32: S(1) to nbdkit file (cached)", s1(), k_iops("nbdkit file"), Floor::None);
    let measure = "4 KiB random read, QD 32: S(1) to qemu-nbd raw, fio's client";
    row(measure, k_iops("S(1) by fio"), best(&FIO_QEMU), Floor::None);

    let cpu = |name: &str| results.of(name).map(|rounds| rounds.cpu_us());
    let peer = results.best(&QEMU_RAW).map(|rounds| rounds.cpu_us());
    let measure = "CPU time per 4 KiB read, QD 32: S(1) to qemu-nbd raw";
    compare(report, measure, "us", cpu("S(1)"), peer.clone(), Floor::AtMost(1.0));
    let measure = "CPU time per 4 KiB read, QD 32: S(30) to qemu-nbd raw";
    compare(report, measure, "us", cpu("S(30)"), peer, Floor::None);
}

fn one_at_a_time(
    bench: &Bench,
    report: &mut Report,
    ours: &Ours,
    qemu: &[(&'static str, Server)],
) -> Result<()> {
    let mut contenders = vec![
        bench.random("S(1)", &ours.s1, Kind::Read, 1)?,
        bench.random("S(30)", &ours.s30, Kind::Read, 1)?,
    ];
    for (name, server) in qemu {
        contenders.push(bench.random(name, server, Kind::Read, 1)?);
    }
    let results = bench.interleave(contenders)?;
    let k_iops = |name: &str| results.of(name).map(|rounds| rounds.k_iops());
    let peer = results.best(&QEMU_RAW).map(|rounds| rounds.k_iops());
    let measure = "4 KiB random read, QD 1: S(1) to qemu-nbd raw";
    compare(report, measure, "kIOPS", k_iops("S(1)"), peer, Floor::AtLeast(1.0));
    let measure = "4 KiB random read, QD 1: S(30) to S(1)";
    compare(report, measure, "kIOPS", k_iops("S(30)"), k_iops("S(1)"), Floor::None);
    Ok(())
}

/// First touch of every block of a chain nobody has read from yet. How many
/// rounds of disk reads that takes is counted by a test of the engine; this
/// shows what they cost.
fn cold(bench: &Bench, report: &mut Report, ours: &Ours) -> Result<()> {
    let job = Job { kind: Kind::Read, request_bytes: SMALL, depth: 1, time: None };
    let first = |name: &'static str, server: &Server| -> Result<_> {
        let mut connection = server.connect()?;
        let mut touch = offsets::each_block(bench.size_bytes, SMALL, 1);
        let round = load(server, &mut connection, &job, &mut touch)?;
        let rounds = vec![round.latencies.percentile_us(0.5)];
        Ok(Some(crate::report::Series { name: name.to_owned(), rounds }))
    };
    let (s1, s30) = (first("S(1)", &ours.s1)?, first("S(30)", &ours.s30)?);
    compare(report, "cold first touch of a block, QD 1: S(30) to S(1), median", "us", s30, s1, Floor::None);
    Ok(())
}

/// A chain of as many qcow2 images, written the same way as S(30), which is
/// checked against it.
fn qcow2_chain(bench: &Bench, report: &mut Report, s30: &Server) -> Result<Vec<(&'static str, Server)>> {
    if !have(report, "qemu-nbd on 30 qcow2", &[Tool::QemuImg, Tool::QemuNbd]) {
        return Ok(Vec::new());
    }
    let mut below: Option<PathBuf> = None;
    for level in 0..LEVELS {
        let path = bench.images.path(&format!("q-{level}.qcow2"));
        qcow2(&path, bench.size_bytes, below.as_deref())?;
        let server = Server::qemu_nbd(&bench.images, &path, "qcow2", Aio::Native)?;
        let mut connection = server.connect()?;
        let mut buf = vec![0; sets::BLOCK_BYTES as usize];
        for patch in sets::patches(level, blocks(bench.size_bytes)?) {
            let data = &mut buf[..patch.bytes as usize];
            sets::content(level, patch.offset(), data);
            connection.write_at(patch.offset(), data)?;
        }
        let flush = Job { kind: Kind::Flush, request_bytes: 0, depth: 1, time: None };
        connection.run(&flush, &mut std::iter::once(0), |_| {})?;
        drop(server);
        drop_from_cache(&path)?;
        below = Some(path);
    }
    let top = below.context("a chain")?;
    let servers = bench.qemu_each(report, &top, "qcow2", QCOW2)?;
    for (_, server) in servers.iter().take(1) {
        let (mut theirs, mut ours) = (server.connect()?, s30.connect()?);
        for offset in offsets::each_block(bench.size_bytes, 64 << 10, 5).take(64) {
            let same = theirs.read_at(offset, 64 << 10)? == ours.read_at(offset, 64 << 10)?;
            ensure!(same, "the qcow2 chain and S(30) differ at {offset}");
        }
    }
    Ok(servers)
}
