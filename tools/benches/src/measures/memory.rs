//! Resident memory of a disk of the largest size at the end of a long chain.

use anyhow::{Context, Result};

use crate::bench::{Bench, DEEP, LEVELS, SMALL, load};
use crate::images::Fill;
use crate::nbd::{Job, Kind};
use crate::offsets;
use crate::report::{Floor, Report, Row, Series};

/// The largest VHD.
const DISK_BYTES: u64 = 2040 << 30;

pub fn run(bench: &Bench, report: &mut Report) -> Result<()> {
    let levels = (0..LEVELS).map(|n| Fill::HolesEvery { n, of: LEVELS });
    let images = bench.images.chain("memory", DISK_BYTES, None, levels)?;
    let server = bench.tapdisk(images.last().context("a chain")?)?;
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let opened = mib(server.resident_bytes()?);
    let mut connection = server.connect()?;
    let job = Job { kind: Kind::Read, request_bytes: SMALL, depth: DEEP, time: Some(bench.time) };
    let mut offsets = offsets::random(DISK_BYTES, SMALL, 1);
    load(&server, &mut connection, &job, &mut offsets)?;
    let used = mib(server.resident_bytes()?);
    let series = |figure| Series { name: "tapdisk".to_owned(), rounds: vec![figure] };
    let measure = "resident memory, 2040 GiB, 30 nodes, each block whole in one, after reads";
    report.rows.push(Row::absolute(measure, "MiB", series(used), Floor::AtMost(64.0)));
    report.rows.push(Row::absolute(
        "resident memory of the same once it is open",
        "MiB",
        series(opened),
        Floor::None,
    ));
    drop(server);
    images.iter().try_for_each(|image| bench.images.remove(image))
}
