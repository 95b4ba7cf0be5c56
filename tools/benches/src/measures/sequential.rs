//! 1 MiB requests one after another, QD 8, reading and writing.

use anyhow::Result;

use crate::bench::{Bench, Contender, QEMU_RAW, Round, compare, have, load};
use crate::images::Fill;
use crate::nbd::{Job, Kind};
use crate::offsets;
use crate::procs::{Aio, FioJob, Server, Tool, fio_raw};
use crate::report::{Floor, Report};

const REQUEST_BYTES: u32 = 1 << 20;
const DEPTH: usize = 8;
const FIO: [&str; 2] = ["fio raw io_uring", "fio raw libaio"];

pub fn run(bench: &Bench, report: &mut Report) -> Result<()> {
    let image = bench.images.image("sequential.vhd", bench.size_bytes, Fill::Level(0), None)?;
    let ours = bench.tapdisk(&image)?;
    let fio = have(report, "the raw file", &[Tool::Fio]);
    let (same, other) = (bench.images.file(&image), bench.raw_file()?);
    for (kind, word, raw) in [(Kind::Read, "read", same), (Kind::Write, "write", other)] {
        let qemu = bench.qemu_raw(report, &raw)?;
        let mut contenders = vec![contender(bench, "S(1)", &ours, kind)?];
        for (name, server) in &qemu {
            contenders.push(contender(bench, name, server, kind)?);
        }
        if fio {
            for (aio, name) in Aio::BOTH.into_iter().zip(FIO) {
                let raw = raw.clone();
                let job = FioJob { rw: word, request_bytes: REQUEST_BYTES, depth: DEPTH, time: bench.time };
                contenders.push(Contender::new(name, move |_| {
                    Ok(Round { rate: fio_raw(&raw, aio, &job)?, ..Round::default() })
                }));
            }
        }
        let results = bench.interleave(contenders)?;
        let ours = || results.of("S(1)").map(|rounds| rounds.mib_s(REQUEST_BYTES));
        let best = |names: &[&str]| results.best(names).map(|rounds| rounds.mib_s(REQUEST_BYTES));
        let measure = format!("sequential {word}, 1 MiB, QD 8: S(1) to qemu-nbd raw");
        compare(report, &measure, "MiB/s", ours(), best(&QEMU_RAW), Floor::AtLeast(1.1));
        let measure = format!("sequential {word}, 1 MiB, QD 8: S(1) to the raw file");
        compare(report, &measure, "MiB/s", ours(), best(&FIO), Floor::AtLeast(0.75));
    }
    bench.images.remove(&image)
}

fn contender<'a>(bench: &Bench, name: &'static str, server: &'a Server, kind: Kind) -> Result<Contender<'a>> {
    let mut connection = server.connect()?;
    let job = Job { kind, request_bytes: REQUEST_BYTES, depth: DEPTH, time: Some(bench.time) };
    let size = connection.size_bytes();
    Ok(Contender::new(name, move |_| {
        load(server, &mut connection, &job, &mut offsets::sequential(size, REQUEST_BYTES))
    }))
}
