//! What every group of measures shares: the conditions, contenders run in
//! turn, and rows made from what they came to.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::images::{Fill, Image, Images};
use crate::nbd::{Connection, Job, Kind};
use crate::procs::{Aio, Server, TapProgram, Tool};
use crate::report::{Floor, Missing, Report, Row, Series};
use crate::stats::Latencies;
use crate::{offsets, sets};

/// Bytes of a small request.
pub const SMALL: u32 = 4096;
/// Requests in flight where many are.
pub const DEEP: usize = 32;
/// Length of long chains.
pub const LEVELS: u32 = 30;

/// The conditions of a run.
#[derive(Debug)]
pub struct Bench {
    /// Images and sockets.
    pub images: Images,
    /// Size of the disks.
    pub size_bytes: u64,
    /// Rounds of each contender.
    pub runs: u32,
    /// Length of a round.
    pub time: Duration,
    /// Swaps per depth.
    pub swaps: u32,
    /// How a tapdisk is started.
    pub tap: TapProgram,
}

/// What one round of one contender came to.
#[derive(Debug, Clone, Default)]
pub struct Round {
    /// Requests per second.
    pub rate: f64,
    /// CPU time of the server per request, in microseconds.
    pub cpu_us: f64,
    /// Of each request; empty where another program was the client.
    pub latencies: Latencies,
}

/// All rounds of one contender.
#[derive(Debug, Clone)]
pub struct Rounds {
    name: String,
    rounds: Vec<Round>,
}

impl Rounds {
    fn series(&self, figure: impl Fn(&Round) -> f64) -> Series {
        Series { name: self.name.clone(), rounds: self.rounds.iter().map(figure).collect() }
    }

    /// Thousands of requests per second.
    #[must_use]
    pub fn k_iops(&self) -> Series {
        self.series(|round| round.rate / 1e3)
    }

    /// MiB per second with requests of so many bytes.
    #[must_use]
    pub fn mib_s(&self, request_bytes: u32) -> Series {
        self.series(|round| round.rate * f64::from(request_bytes) / f64::from(1 << 20))
    }

    /// CPU time of the server per request, in microseconds.
    #[must_use]
    pub fn cpu_us(&self) -> Series {
        self.series(|round| round.cpu_us)
    }

    /// A percentile of the latency, in microseconds.
    #[must_use]
    pub fn latency_us(&self, share: f64) -> Series {
        self.series(|round| round.latencies.percentile_us(share))
    }
}

/// One side of a comparison.
pub struct Contender<'a> {
    name: &'static str,
    run: Box<dyn FnMut(u32) -> Result<Round> + 'a>,
}

impl<'a> Contender<'a> {
    /// `run` is told the number of the round.
    pub fn new(name: &'static str, run: impl FnMut(u32) -> Result<Round> + 'a) -> Self {
        Self { name, run: Box::new(run) }
    }
}

/// What all contenders came to, by name.
#[derive(Debug, Clone)]
pub struct Results(Vec<Rounds>);

impl Results {
    /// One of them; `None` if it did not take part.
    #[must_use]
    pub fn of(&self, name: &str) -> Option<&Rounds> {
        self.0.iter().find(|rounds| rounds.name == name)
    }

    /// The one of several with the highest rate.
    #[must_use]
    pub fn best(&self, names: &[&str]) -> Option<&Rounds> {
        let rate = |rounds: &&Rounds| rounds.k_iops().median();
        names.iter().filter_map(|name| self.of(name)).max_by(|a, b| rate(a).total_cmp(&rate(b)))
    }
}

impl Bench {
    /// Runs contenders in turn, each round beginning with another one, so
    /// that no contender always runs behind the same other.
    ///
    /// # Errors
    /// A contender failed; which one is named.
    pub fn interleave(&self, mut contenders: Vec<Contender<'_>>) -> Result<Results> {
        let mut all: Vec<Rounds> =
            contenders.iter().map(|c| Rounds { name: c.name.to_owned(), rounds: Vec::new() }).collect();
        for round in 0..self.runs {
            for turn in 0..contenders.len() {
                let at = (turn + round as usize) % contenders.len();
                let contender = &mut contenders[at];
                let came_to = (contender.run)(round).with_context(|| contender.name)?;
                all[at].rounds.push(came_to);
            }
        }
        Ok(Results(all))
    }

    /// The images that make a chain of `LEVELS` out of its bottom.
    ///
    /// # Errors
    /// What the disk said.
    pub fn chain(&self, name: &str, bottom: &Image, above: impl Fn(u32) -> Fill) -> Result<Vec<Image>> {
        self.images.chain(name, self.size_bytes, Some(bottom), (1..LEVELS).map(above))
    }

    /// A tapdisk.
    ///
    /// # Errors
    /// It does not come up.
    pub fn tapdisk(&self, leaf: &Image) -> Result<Server> {
        Server::tapdisk(&self.tap, &self.images, leaf, &[])
    }

    /// A qemu-nbd on a raw file for each way of reading it, by contender
    /// name. One that cannot be had is missing from the report's rows.
    ///
    /// # Errors
    /// None could be started.
    pub fn qemu_raw(&self, report: &mut Report, file: &Path) -> Result<Vec<(&'static str, Server)>> {
        if !have(report, "qemu-nbd on a raw file", &[Tool::QemuNbd]) {
            return Ok(Vec::new());
        }
        self.qemu_each(report, file, "raw", QEMU_RAW)
    }

    /// The raw file that peers write to, made when first asked for.
    ///
    /// # Errors
    /// What the disk said.
    pub fn raw_file(&self) -> Result<PathBuf> {
        let path = self.images.path("disk.raw");
        if path.exists() { Ok(path) } else { self.images.raw("disk.raw", self.size_bytes) }
    }

    /// A qemu-nbd for each way of reading `file`.
    ///
    /// # Errors
    /// None could be started.
    pub fn qemu_each(
        &self,
        report: &mut Report,
        file: &Path,
        format: &str,
        names: [&'static str; 2],
    ) -> Result<Vec<(&'static str, Server)>> {
        let mut servers = Vec::new();
        for (aio, name) in Aio::BOTH.into_iter().zip(names) {
            match Server::qemu_nbd(&self.images, file, format, aio) {
                Ok(server) => servers.push((name, server)),
                Err(error) => miss(report, name, format!("{error:#}")),
            }
        }
        Ok(servers)
    }

    /// A contender that reads or writes at random places for one round.
    ///
    /// # Errors
    /// The server cannot be reached.
    pub fn random<'a>(
        &self,
        name: &'static str,
        server: &'a Server,
        kind: Kind,
        depth: usize,
    ) -> Result<Contender<'a>> {
        let mut connection = server.connect()?;
        let job = Job { kind, request_bytes: SMALL, depth, time: Some(self.time) };
        let size = connection.size_bytes();
        Ok(Contender::new(name, move |round| {
            load(server, &mut connection, &job, &mut offsets::random(size, SMALL, u64::from(round)))
        }))
    }
}

/// Names of the contenders of [`Bench::qemu_raw`].
pub const QEMU_RAW: [&str; 2] = ["qemu-nbd raw io_uring", "qemu-nbd raw native"];

/// Runs one round of a load.
///
/// # Errors
/// As [`Connection::run`].
pub fn load(
    server: &Server,
    connection: &mut Connection,
    job: &Job,
    offsets: &mut dyn Iterator<Item = u64>,
) -> Result<Round> {
    let mut latencies = Latencies::default();
    let (cpu, began) = (server.cpu_us()?, Instant::now());
    connection.run(job, offsets, |answered| latencies.record(answered.at - answered.sent))?;
    let seconds = began.elapsed().as_secs_f64();
    let requests = (latencies.count() as f64).max(1.0);
    Ok(Round {
        rate: latencies.count() as f64 / seconds,
        cpu_us: (server.cpu_us()? - cpu) / requests,
        latencies,
    })
}

/// One small read in every block, so that whatever is remembered per block is.
///
/// # Errors
/// As [`Connection::run`].
pub fn warm(server: &Server) -> Result<()> {
    let mut connection = server.connect()?;
    let job = Job { kind: Kind::Read, request_bytes: SMALL, depth: DEEP, time: None };
    let size = connection.size_bytes();
    Ok(connection.run(&job, &mut offsets::each_block(size, SMALL, 0), |_| {})?)
}

/// Whether programs are there; if not, the report says what to install.
pub fn have(report: &mut Report, measure: &str, tools: &[Tool]) -> bool {
    let Some(tool) = tools.iter().find(|tool| !tool.is_there()) else { return true };
    let reason = format!("{} is not in PATH (package {})", tool.program(), tool.package());
    miss(report, measure, reason);
    false
}

/// Adds to what could not be measured.
pub fn miss(report: &mut Report, measure: &str, reason: String) {
    report.missing.push(Missing { measure: measure.to_owned(), reason });
}

/// Adds a ratio, or says what is missing for it.
pub fn compare(
    report: &mut Report,
    measure: &str,
    unit: &'static str,
    ours: Option<Series>,
    peer: Option<Series>,
    floor: Floor,
) {
    match (ours, peer) {
        (Some(ours), Some(peer)) => report.rows.push(Row::ratio(measure, unit, ours, peer, floor)),
        _ => miss(report, measure, "the peer is missing".to_owned()),
    }
}

/// Blocks of a disk.
///
/// # Errors
/// More than a VHD can have.
pub fn blocks(size_bytes: u64) -> Result<u32> {
    Ok(u32::try_from(size_bytes / sets::BLOCK_BYTES)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_is_the_one_with_the_highest_median_rate() {
        let rounds = |name: &str, rates: &[f64]| Rounds {
            name: name.to_owned(),
            rounds: rates.iter().map(|rate| Round { rate: *rate, ..Round::default() }).collect(),
        };
        let results = Results(vec![rounds("a", &[1.0, 9.0, 1.0]), rounds("b", &[2.0, 2.0, 2.0])]);
        assert_eq!(results.best(&["a", "b", "c"]).unwrap().name, "b");
        assert!(results.best(&["c"]).is_none());
    }
}
