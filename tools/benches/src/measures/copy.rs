//! How fast a merge copies: whole blocks against `cp` of the same bytes,
//! scattered sectors against one run at a time.
//!
//! Every side ends with its data durable, and begins with its source out of
//! the page cache. As a copy gives nothing back, a merge counts here until
//! its parent has everything; a tapdisk's moves block by block and cannot be
//! told apart so: its rows count what it gives back and its commit, too.

use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::bench::{Bench, Contender, Round, compare, miss};
use crate::images::{Fill, drop_from_cache};
use crate::merges::{self, Content, Way};
use crate::report::{Floor, Report};
use crate::sets::{self, BLOCK_BYTES, RUN_BYTES};
use crate::xfs::Xfs;

/// Disk of the scattered leaf.
const SCATTERED_DISK_BYTES: u64 = 256 << 20;
/// Its runs, of 4 KiB each: a fraction of it on the small disks of a smoke run.
const SCATTERED_RUNS: u32 = 8192;
/// Bytes of a bitmap.
const BITMAP_BYTES: usize = 512;
/// Bytes of a block in an image: a page with the bitmap, then its data.
const STRIDE_BYTES: u64 = BLOCK_BYTES + 4096;
/// A disk this small is that of a smoke run.
const SMOKE_BYTES: u64 = 64 << 20;

const WAYS: [(Way, &str); 3] = [
    (Way::Inner, "hidden node"),
    (Way::Detached, "detached leaf"),
    (Way::Attached, "attached leaf, space given back"),
];

pub fn run(bench: &Bench, report: &mut Report) -> Result<()> {
    let dir = bench.images.path("");
    whole(bench, report, &dir, "same filesystem", "auto", Floor::AtLeast(0.8))?;
    scattered(bench, report, &dir)?;
    match Xfs::mount(&dir, 4 * bench.size_bytes) {
        Ok(xfs) => whole(bench, report, &xfs.folder, "XFS, reflink", "never", Floor::AtLeast(20.0)),
        Err(error) => {
            miss(report, "merge to cp --reflink=never, XFS, reflink", format!("{error:#}"));
            Ok(())
        }
    }
}

/// Bytes per second.
fn rate(bytes: u64, took: Duration) -> Round {
    Round { rate: bytes as f64 / took.as_secs_f64(), ..Round::default() }
}

/// Whole blocks into a parent that has none, against `cp --reflink=…`.
fn whole(
    bench: &Bench,
    report: &mut Report,
    dir: &Path,
    place: &str,
    reflink: &'static str,
    floor: Floor,
) -> Result<()> {
    let bytes = bench.size_bytes;
    let content = Content { virtual_bytes: bytes, parent: Fill::Empty, source: Fill::Level(0) };
    let file = dir.join("cp.raw");
    write_raw(&file, bytes)?;
    let mut contenders = merging(bench, dir, &content, bytes);
    contenders.push(Contender::new("cp", |_| Ok(rate(bytes, cp(&file, reflink)?))));
    let results = bench.interleave(contenders)?;
    let mib_s = |name: &str| results.of(name).map(|rounds| rounds.mib_s(1));
    for (_, name) in WAYS {
        let measure = format!("merge of whole blocks, {name}: to cp --reflink={reflink}, {place}");
        compare(report, &measure, "MiB/s", mib_s(name), mib_s("cp"), floor);
    }
    Ok(std::fs::remove_file(&file)?)
}

fn write_raw(path: &Path, bytes: u64) -> Result<()> {
    let file = std::fs::File::create(path)?;
    let mut buf = vec![0; BLOCK_BYTES as usize];
    for offset in (0..bytes).step_by(BLOCK_BYTES as usize) {
        sets::content(0, offset, &mut buf);
        file.write_all_at(&buf, offset)?;
    }
    drop_from_cache(path)
}

/// Copies a file with `cp` and waits until the copy is durable.
fn cp(file: &Path, reflink: &str) -> Result<Duration> {
    drop_from_cache(file)?;
    let to = file.with_extension("copy");
    let began = Instant::now();
    let status = Command::new("cp").arg(format!("--reflink={reflink}")).arg(file).arg(&to).status()?;
    if !status.success() {
        bail!("cp: {status}");
    }
    std::fs::File::open(&to)?.sync_all()?;
    let took = began.elapsed();
    std::fs::remove_file(&to)?;
    Ok(took)
}

/// Each way of merging `content`, of which `bytes` are copied.
fn merging<'a>(bench: &'a Bench, dir: &'a Path, content: &'a Content, bytes: u64) -> Vec<Contender<'a>> {
    let contender = |(way, name): &'a (Way, &'static str)| {
        Contender::new(name, move |_| Ok(rate(bytes, merges::time(bench, dir, content, *way)?)))
    };
    WAYS.iter().map(contender).collect()
}

/// Sectors all over the disk into a parent that has all of it, against a loop
/// that reads the source block by block, then writes the data, reads the
/// bitmap and writes the bitmap of one run after the other, past the page
/// cache. That loop makes nothing durable before the end.
fn scattered(bench: &Bench, report: &mut Report, dir: &Path) -> Result<()> {
    let smoke = bench.size_bytes <= SMOKE_BYTES;
    let disk = if smoke { bench.size_bytes } else { SCATTERED_DISK_BYTES };
    let runs = if smoke { SCATTERED_RUNS / 64 } else { SCATTERED_RUNS };
    let content = Content { virtual_bytes: disk, parent: Fill::Level(0), source: Fill::Scattered(runs) };
    let bytes = u64::from(runs) * RUN_BYTES;
    let (source, file) = (dir.join("scattered.raw"), dir.join("one-by-one.raw"));
    write_scattered(&source, disk, runs)?;
    write_raw(&file, (disk / BLOCK_BYTES * STRIDE_BYTES).next_multiple_of(BLOCK_BYTES))?;
    let mut contenders = merging(bench, dir, &content, bytes);
    contenders
        .push(Contender::new("run by run", |_| Ok(rate(bytes, run_by_run(&source, &file, disk, runs)?))));
    let results = bench.interleave(contenders)?;
    let mib_s = |name: &str| results.of(name).map(|rounds| rounds.mib_s(1));
    for (_, name) in WAYS {
        let measure = format!("merge of {runs} scattered 4 KiB runs, {name}: to one run at a time");
        compare(report, &measure, "MiB/s", mib_s(name), mib_s("run by run"), Floor::AtLeast(10.0));
    }
    Ok(std::fs::remove_file(&file)?)
}

fn run_by_run(source: &Path, path: &Path, disk: u64, runs: u32) -> Result<Duration> {
    drop_from_cache(source)?;
    drop_from_cache(path)?;
    let mut options = std::fs::File::options();
    options.read(true).write(true).custom_flags(nix::libc::O_DIRECT);
    let (source, file) = (options.open(source)?, options.open(path)?);
    let page = RUN_BYTES as usize;
    let mut memory = vec![0; BLOCK_BYTES as usize + 2 * page];
    let skip = memory.as_ptr().align_offset(page);
    let (block_data, bitmap) =
        memory.get_mut(skip..).context("aligned memory")?.split_at_mut(BLOCK_BYTES as usize);
    let bitmap = bitmap.get_mut(..BITMAP_BYTES).context("a bitmap")?;
    let mut places = sets::scattered(disk, runs);
    places.sort_unstable();
    let mut read = None;
    let began = Instant::now();
    for at in places {
        let (block, within) = (at / BLOCK_BYTES, (at % BLOCK_BYTES) as usize);
        let start = block * STRIDE_BYTES;
        if read != Some(block) {
            source.read_exact_at(block_data, block * BLOCK_BYTES)?;
            read = Some(block);
        }
        let data = block_data.get(within..within + page).context("a run")?;
        file.write_all_at(data, start + STRIDE_BYTES - BLOCK_BYTES + within as u64)?;
        file.read_exact_at(bitmap, start)?;
        bitmap[within / 512 / 8] = 0xff;
        file.write_all_at(bitmap, start)?;
    }
    file.sync_data()?;
    Ok(began.elapsed())
}

/// A file with just the scattered runs, the rest of it holes.
fn write_scattered(path: &Path, disk: u64, runs: u32) -> Result<()> {
    let file = std::fs::File::create(path)?;
    file.set_len(disk)?;
    let mut data = [0; RUN_BYTES as usize];
    for at in sets::scattered(disk, runs) {
        sets::content(1, at, &mut data);
        file.write_all_at(&data, at)?;
    }
    drop_from_cache(path)
}
