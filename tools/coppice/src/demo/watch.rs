//! What the collector did, as it says itself, set against what the guest
//! felt meanwhile.

use std::collections::HashSet;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::Deserialize;

use super::report::{MergeReport, Report, us};
use super::tally::Tally;
use crate::client::Daemon;
use crate::failure::{Failure, Outcome};
use crate::output::say;
use crate::view::read;

/// A finished job of the collector. Sizes in bytes.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
struct Done {
    job: String,
    vdi: String,
    kind: String,
    began_ms: u64,
    ended_ms: u64,
    bytes_copied: u64,
    bytes_cloned: u64,
    bytes_freed: u64,
    error: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Status {
    srs: Vec<Sr>,
    done: Vec<Done>,
}

/// How busy it is with one storage repository.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Sr {
    running: u64,
}

/// Follows the collector from one moment on.
#[derive(Debug)]
pub struct Watch<'a> {
    gcd: &'a Daemon,
    seen: HashSet<String>,
    done: Vec<Done>,
}

impl<'a> Watch<'a> {
    /// From now on: what was done before is none of ours.
    pub fn start(gcd: &'a Daemon) -> Outcome<Self> {
        let mut watch = Self { gcd, seen: HashSet::new(), done: Vec::new() };
        watch.look()?;
        watch.done.clear();
        Ok(watch)
    }

    /// Takes in what was finished since the last look; whether nothing runs.
    pub fn look(&mut self) -> Outcome<bool> {
        let status: Status = read(&self.gcd.get("/status")?)?;
        let idle = status.srs.iter().all(|sr| sr.running == 0);
        for done in status.done {
            if !self.seen.insert(done.job.clone()) {
                continue;
            }
            if let Some(error) = &done.error {
                // Tried again by the next pass; worth saying all the same.
                say(&format!("coppice: {} {} stopped: {error}", done.kind, done.vdi));
            } else if done.kind != "delete" {
                let copied = crate::size::human(done.bytes_copied);
                say(&format!("coppice: {} {} merged, {copied} copied", done.kind, done.vdi));
            }
            self.done.push(done);
        }
        Ok(idle)
    }

    /// Writes everything seen into the report.
    pub fn finish(mut self, tally: &Tally, report: &mut Report) -> Outcome<()> {
        self.look()?;
        let clocks = Clocks::now();
        for done in self.done.iter().filter(|done| done.error.is_none()) {
            report.bytes_copied += done.bytes_copied;
            report.bytes_cloned += done.bytes_cloned;
            report.bytes_freed += done.bytes_freed;
            if done.kind == "delete" {
                continue;
            }
            let (began, ended) = (clocks.instant(done.began_ms), clocks.instant(done.ended_ms));
            let (writes_acked, stall) = tally.between(began, ended);
            report.merges.push(MergeReport {
                kind: done.kind.clone(),
                uuid: done.vdi.clone(),
                seconds: (ended - began).as_secs_f64(),
                writes_acked,
                longest_stall_us: us(stall),
                bytes_copied: done.bytes_copied,
                bytes_cloned: done.bytes_cloned,
                bytes_freed: done.bytes_freed,
            });
        }
        for kind in ["inner", "leaf"] {
            let of_kind = report.merges.iter().filter(|merge| merge.kind == kind);
            if of_kind.map(|merge| merge.writes_acked).sum::<u64>() == 0 {
                let message = format!("no write was acknowledged during a merge of kind {kind}");
                return Err(Failure::new("DEMO_FAILED", message));
            }
        }
        Ok(())
    }
}

/// The same moment on the wall and on our own clock.
struct Clocks {
    instant: Instant,
    unix: Duration,
}

impl Clocks {
    fn now() -> Self {
        let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self { instant: Instant::now(), unix }
    }

    /// A moment of the past, given on the wall clock.
    fn instant(&self, unix_ms: u64) -> Instant {
        let ago = self.unix.saturating_sub(Duration::from_millis(unix_ms));
        self.instant.checked_sub(ago).unwrap_or(self.instant)
    }
}
