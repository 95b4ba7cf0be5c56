//! A 100 GiB disk, its data left as holes: whether what is remembered per
//! block still pays when not all of it fits, and writes over an ancestor's
//! data that hardly ever meet a block twice.

use anyhow::{Context, Result};

use super::writes::with_new_leaf;
use crate::bench::{Bench, Contender, DEEP, LEVELS, SMALL, compare, load, warm};
use crate::images::Fill;
use crate::nbd::{Job, Kind};
use crate::offsets;
use crate::report::{Floor, Report};

const DISK_BYTES: u64 = 100 << 30;

pub fn run(bench: &Bench, report: &mut Report) -> Result<()> {
    let levels = (0..LEVELS).map(|level| if level == 0 { Fill::Holes } else { Fill::LevelHoles(level) });
    let chain = bench.images.chain("large", DISK_BYTES, None, levels)?;
    let [base, .., leaf] = chain.as_slice() else { return Ok(()) };
    let whole = bench.images.image("large-whole.vhd", DISK_BYTES, Fill::Holes, None)?;
    let (s1, s30) = (bench.tapdisk(&whole)?, bench.tapdisk(leaf)?);
    warm(&s1)?;
    warm(&s30)?;
    let over = Contender::new("over an ancestor", |round| {
        with_new_leaf(bench, DISK_BYTES, Some(base), |server| {
            let job = Job { kind: Kind::Write, request_bytes: SMALL, depth: DEEP, time: Some(bench.time) };
            let mut offsets = offsets::random(DISK_BYTES, SMALL, u64::from(round));
            load(server, &mut server.connect()?, &job, &mut offsets)
        })
    });
    // Whole blocks of the size that other rows have: on 100 GiB of holes it
    // would be the filesystem that is measured.
    let small = bench.images.image("large-peer.vhd", bench.size_bytes, Fill::Level(0), None)?;
    let peer = bench.tapdisk(&small)?;
    let results = bench.interleave(vec![
        bench.random("S(1)", &s1, Kind::Read, DEEP)?,
        bench.random("S(30)", &s30, Kind::Read, DEEP)?,
        bench.random("whole blocks", &peer, Kind::Write, DEEP)?,
        over,
    ])?;
    let k_iops = |name: &str| results.of(name).map(|rounds| rounds.k_iops());
    let measure = "100 GiB, 4 KiB random read, QD 32: S(30) to S(1), warm";
    compare(report, measure, "kIOPS", k_iops("S(30)"), k_iops("S(1)"), Floor::AtLeast(0.90));
    let measure = "100 GiB, 4 KiB random write, QD 32: over an ancestor's data to whole blocks";
    let whole_blocks = k_iops("whole blocks").context("it took part")?;
    compare(report, measure, "kIOPS", k_iops("over an ancestor"), Some(whole_blocks), Floor::AtLeast(0.4));
    Ok(())
}
