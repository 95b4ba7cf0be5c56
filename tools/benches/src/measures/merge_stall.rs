//! What a guest that never stops writing notices of the merge of its leaf: in
//! the windows in which blocks move, and at the commit, in which the parent
//! takes the leaf's place.
//!
//! Leaf and parent have every block whole; the guest writes anywhere. The
//! merge is ordered here, at full speed: the collector's stepping back from
//! guests that suffer is not counted on.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::{Context, Result};

use crate::bench::{Bench, DEEP, SMALL, warm};
use crate::images::{Fill, Images};
use crate::merges::{self, Content, Phases};
use crate::nbd::{Answered, Connection, Job, Kind};
use crate::offsets;
use crate::procs::Server;
use crate::report::{Floor, Report, Row, Series};
use crate::stats::Latencies;

/// Longest any request may wait, in milliseconds.
const STALL_MS_MAX: f64 = 50.0;
/// What of its rate a guest keeps.
const RATE_KEPT_MIN: f64 = 0.5;

/// What all rounds came to.
#[derive(Default)]
struct Found {
    in_windows: Latencies,
    at_commit: Latencies,
    /// Thousands of writes per second, by round.
    before: Vec<f64>,
    during: Vec<f64>,
}

pub fn run(bench: &Bench, report: &mut Report) -> Result<()> {
    let mut found = Found::default();
    for round in 0..bench.runs {
        one(bench, u64::from(round), &mut found)?;
    }
    let periods =
        [("in the windows of a leaf merge", &found.in_windows), ("at the commit of one", &found.at_commit)];
    for (when, latencies) in periods {
        for (name, share, floor) in [
            ("p50", 0.5, Floor::None),
            ("p99", 0.99, Floor::None),
            ("p99.9", 0.999, Floor::None),
            ("longest", 1.0, Floor::AtMost(STALL_MS_MAX)),
        ] {
            let measure = format!("wait of a 4 KiB write {when}, QD 32, {name}");
            let ms = series("tapdisk", vec![latencies.percentile_us(share) / 1e3]);
            report.rows.push(Row::absolute(&measure, "ms", ms, floor));
        }
    }
    let measure = "4 KiB random writes during a leaf merge: to before";
    let (during, before) = (series("during", found.during), series("before", found.before));
    report.rows.push(Row::ratio(measure, "kIOPS", during, before, Floor::AtLeast(RATE_KEPT_MIN)));
    Ok(())
}

fn series(name: &str, rounds: Vec<f64>) -> Series {
    Series { name: name.to_owned(), rounds }
}

fn one(bench: &Bench, seed: u64, found: &mut Found) -> Result<()> {
    let images = Images::new(&bench.images.path(""))?;
    let whole = Fill::Level(0);
    let content = Content { virtual_bytes: bench.size_bytes, parent: whole, source: whole };
    let (leaf, parent) = merges::leaf_and_parent(&images, &content)?;
    let server = Server::tapdisk(&bench.tap, &images, &leaf, &[])?;
    warm(&server)?;
    let connection = server.connect()?;
    let over = AtomicBool::new(false);
    let (answered, phases) = std::thread::scope(|scope| {
        let guest = scope.spawn(|| guest(connection, seed, &over));
        std::thread::sleep(bench.time);
        let phases = merges::of_served(&server, &leaf, &parent);
        over.store(true, Ordering::Relaxed);
        let answered = guest.join().map_err(|_| anyhow::anyhow!("the guest panicked"))??;
        anyhow::Ok((answered, phases?))
    })?;
    found.take(&answered, phases)
}

/// Writes until it is over.
fn guest(mut connection: Connection, seed: u64, over: &AtomicBool) -> Result<Vec<Answered>> {
    let size = connection.size_bytes();
    let job = Job { kind: Kind::Write, request_bytes: SMALL, depth: DEEP, time: None };
    let mut all = Vec::new();
    let mut offsets = offsets::random(size, SMALL, seed).take_while(|_| !over.load(Ordering::Relaxed));
    connection.run(&job, &mut offsets, |answered| all.push(answered))?;
    Ok(all)
}

impl Found {
    /// A request counts where it was under way: one that the commit held and
    /// that was sent in a window counts for both.
    fn take(&mut self, answered: &[Answered], phases: Phases) -> Result<()> {
        let first = answered.first().context("the guest wrote nothing")?.sent;
        self.before.push(rate(answered, first, phases.began));
        self.during.push(rate(answered, phases.began, phases.committed));
        for one in answered {
            let met = |from: Instant, to: Instant| one.sent <= to && from <= one.at;
            if met(phases.began, phases.empty) {
                self.in_windows.record(one.at - one.sent);
            }
            if met(phases.empty, phases.committed) {
                self.at_commit.record(one.at - one.sent);
            }
        }
        Ok(())
    }
}

/// Thousands of answers per second between two moments.
fn rate(answered: &[Answered], from: Instant, to: Instant) -> f64 {
    let count = answered.iter().filter(|one| from <= one.at && one.at < to).count();
    count as f64 / 1e3 / (to - from).as_secs_f64().max(1e-6)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn what_the_commit_held_counts_for_it_though_it_was_sent_before() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let request = |sent, answered| Answered { sent: at(sent), at: at(answered) };
        let phases = Phases { began: at(100), empty: at(200), committed: at(300) };
        let mut found = Found::default();
        let answered = [request(0, 1), request(50, 99), request(150, 160), request(190, 250)];
        found.take(&answered, phases).unwrap();
        assert_eq!((found.in_windows.count(), found.at_commit.count()), (2, 1));
        assert!((found.at_commit.percentile_us(1.0) - 60_000.0).abs() < 1.0);
        let is = |rates: &[f64], rate: f64| rates.len() == 1 && (rates[0] - rate).abs() < 1e-6;
        assert!(is(&found.before, 0.02) && is(&found.during, 0.01), "{:?} {:?}", found.before, found.during);
    }
}
