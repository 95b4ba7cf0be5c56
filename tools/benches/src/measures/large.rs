//! A 100 GiB disk, its data left as holes: whether what is remembered per
//! block still pays when not all of it fits, and writes over an ancestor's
//! data that hardly ever meet a block twice.

use std::fs::File;

use anyhow::Result;

use super::writes::{by_fio, with_new_leaf};
use crate::bench::{Bench, Contender, DEEP, LEVELS, SMALL, compare, have, load, warm};
use crate::images::Fill;
use crate::nbd::{Job, Kind};
use crate::offsets;
use crate::procs::Tool;
use crate::report::{Floor, Report};

const DISK_BYTES: u64 = 100 << 30;
/// Names of the contenders that write.
const OVER: &str = "over an ancestor";
const WHOLE: &str = "whole blocks";
const SPARSE: &str = "fio raw sparse";

/// Reads over 30 levels, each block partly written in all of them.
pub fn reads(bench: &Bench, report: &mut Report) -> Result<()> {
    let levels = (0..LEVELS).map(|level| if level == 0 { Fill::Holes } else { Fill::LevelHoles(level) });
    let chain = bench.images.chain("large", DISK_BYTES, None, levels)?;
    let Some(leaf) = chain.last() else { return Ok(()) };
    let whole = bench.images.image("large-whole.vhd", DISK_BYTES, Fill::Holes, None)?;
    let (s1, s30) = (bench.tapdisk(&whole)?, bench.tapdisk(leaf)?);
    warm(&s1)?;
    warm(&s30)?;
    let results = bench.interleave(vec![
        bench.random("S(1)", &s1, Kind::Read, DEEP)?,
        bench.random("S(30)", &s30, Kind::Read, DEEP)?,
    ])?;
    let k_iops = |name: &str| results.of(name).map(|rounds| rounds.k_iops());
    let measure = "100 GiB, 4 KiB random read, QD 32: S(30) to S(1), warm";
    compare(report, measure, "kIOPS", k_iops("S(30)"), k_iops("S(1)"), Floor::AtLeast(0.90));
    drop((s1, s30));
    for image in chain.iter().chain([&whole]) {
        bench.images.remove(image)?;
    }
    Ok(())
}

/// Writes into an empty leaf over whole blocks.
pub fn writes(bench: &Bench, report: &mut Report) -> Result<()> {
    let base = bench.images.image("large-base.vhd", DISK_BYTES, Fill::Holes, None)?;
    let over = Contender::new(OVER, |round| {
        with_new_leaf(bench, DISK_BYTES, Some(&base), |server| {
            let job = Job { kind: Kind::Write, request_bytes: SMALL, depth: DEEP, time: Some(bench.time) };
            let mut offsets = offsets::random(DISK_BYTES, SMALL, u64::from(round));
            load(server, &mut server.connect()?, &job, &mut offsets)
        })
    });
    // Whole blocks of the size that other rows have: on 100 GiB of holes it
    // would be the filesystem that is measured.
    let small = bench.images.image("large-peer.vhd", bench.size_bytes, Fill::Level(0), None)?;
    let peer = bench.tapdisk(&small)?;
    let mut contenders = vec![bench.random(WHOLE, &peer, Kind::Write, DEEP)?, over];
    if have(report, "a sparse raw file", &[Tool::Fio]) {
        let file = bench.images.path("large-sparse.raw");
        contenders.push(by_fio(bench, SPARSE, file, |sparse| Ok(File::create(sparse)?.set_len(DISK_BYTES)?)));
    }
    let results = bench.interleave(contenders)?;
    let k_iops = |name: &str| results.of(name).map(|rounds| rounds.k_iops());
    let measure = "100 GiB, 4 KiB random write, QD 32: over an ancestor's data to whole blocks";
    compare(report, measure, "kIOPS", k_iops(OVER), k_iops(WHOLE), Floor::AtLeast(0.4));
    // How much of its speed a file keeps here while nearly each write is the
    // first to its place, whoever writes it.
    let measure = "100 GiB, 4 KiB random write, QD 32: over an ancestor's data to a sparse raw file, by fio";
    compare(report, measure, "kIOPS", k_iops(OVER), k_iops(SPARSE), Floor::None);
    drop(peer);
    for image in [base, small] {
        bench.images.remove(&image)?;
    }
    Ok(())
}
