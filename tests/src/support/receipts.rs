//! Content receipts beside a soak: whatever guests, people and fate do to a
//! disk, no merge may change what it reads (invariant 3).
//!
//! `COPPICE_SOAK_RECEIPTS` says how often they are asked for: `some` (where
//! nothing is said: every other time, because who reads every disk before and
//! after each merge merges less often), `all`, or `off`.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use super::host::{Daemon, Host};

/// Lines of history looked at each time; a soak adds far fewer in between.
const ROWS: u32 = 2_000;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wanted {
    Off,
    EveryOther,
    All,
}

/// The receipts of one repository.
#[derive(Debug)]
pub struct Receipts {
    sr: &'static str,
    wanted: Wanted,
    on: bool,
    /// Jobs that were counted.
    jobs: BTreeSet<String>,
    /// Merges, and what came of their disks, for the report.
    tally: BTreeMap<String, u64>,
}

impl Receipts {
    /// None asked for so far.
    pub fn new(sr: &'static str) -> Self {
        let wanted = match std::env::var("COPPICE_SOAK_RECEIPTS").as_deref() {
            Err(_) | Ok("some") => Wanted::EveryOther,
            Ok("all") => Wanted::All,
            Ok("off") => Wanted::Off,
            Ok(other) => panic!("COPPICE_SOAK_RECEIPTS={other}"),
        };
        Self { sr, wanted, on: false, jobs: BTreeSet::new(), tally: BTreeMap::new() }
    }

    /// From now on they are asked for, or not any more.
    pub fn turn(&mut self, host: &Host) {
        self.ask(host, self.wanted == Wanted::All || !self.on);
    }

    /// The last merges, which nothing disturbs, have receipts for certain.
    pub fn of_the_end(&mut self, host: &Host) {
        self.ask(host, true);
    }

    fn ask(&mut self, host: &Host, on: bool) {
        let on = on && self.wanted != Wanted::Off;
        if on != self.on {
            host.ok(&["gc", "set", self.sr, "--receipts", if on { "on" } else { "off" }]);
            self.on = on;
        }
    }

    /// No merge so far changed what a disk reads.
    pub fn check(&mut self, host: &Host) {
        let history = host.get(Daemon::Smd, &format!("/srs/{}/history?rows={ROWS}", self.sr));
        let history: Value = serde_json::from_str(&history).unwrap();
        for line in history["history"].as_array().unwrap() {
            if let Ok(job) = serde_json::from_str::<Value>(line["detail"].as_str().unwrap()) {
                self.count(&job);
            }
        }
        let status = host.ok(&["gc", "status", self.sr]);
        assert_eq!(status["srs"][0]["alarms"], Value::Null, "{status}");
    }

    fn count(&mut self, job: &Value) {
        let (Some(id), Some(kind)) = (job["job"].as_str(), job["kind"].as_str()) else { return };
        if !self.jobs.insert(id.to_owned()) {
            return;
        }
        let mut saw = |what: String| *self.tally.entry(what).or_default() += 1;
        saw(format!("{kind}{}", if job["error"].is_null() { "" } else { " ended early" }));
        if job["receipt"]["void"].is_string() {
            saw("receipt void".to_owned());
        }
        for disk in job["receipt"]["disks"].as_array().into_iter().flatten() {
            let verdict = disk["verdict"].as_str().unwrap();
            assert!(["same", "void"].contains(&verdict), "{job}");
            let attached = if disk["attached"] == true { " of a busy disk" } else { "" };
            saw(format!("{verdict}{attached}"));
        }
    }

    /// What was seen. There must have been something where it was asked for.
    pub fn report(&self) -> &BTreeMap<String, u64> {
        let compared = ["same", "same of a busy disk"].iter().any(|what| self.tally.contains_key(*what));
        assert!(compared || self.wanted == Wanted::Off, "no receipt compares anything: {:?}", self.tally);
        &self.tally
    }
}
