//! gcd: one collector per attached SR, and an API over them.
//!
//! The SRs are those smd says are attached, in `<run>/sr/`; nothing else is
//! shared with smd, but that its list of all SRs tells one that is detached
//! from none. An SR that is not attached any more loses its collector,
//! and with it our share of the host's ownership.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use sm::attached::AttachedSr;
use sm::state::{read_json, write_json};
use uuid::Uuid;

use crate::collector::Collector;
use crate::limits;
use crate::plan::Settings;

/// What an operator set for an SR; survives restarts.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Wishes {
    /// Bytes per second of all merges together; 0 is no limit.
    pub rate: u64,
    /// Merges at one time; 0 is the default.
    pub parallel: usize,
    /// How much slower than calm an attached disk may get before merges step
    /// back; 0 is never, none is the default.
    pub latency_factor: Option<f64>,
    /// Whether collecting is paused.
    pub paused: bool,
    /// Whether the disks on each merge are read before and after it.
    pub receipts: bool,
    /// Disks whose leaves are left alone.
    pub off: BTreeSet<Uuid>,
}

impl Wishes {
    fn latency_factor(&self) -> f64 {
        self.latency_factor.unwrap_or(limits::LATENCY_FACTOR).clamp(0.0, limits::LATENCY_FACTOR_MAX)
    }

    fn settings(&self) -> Settings {
        let parallel = match self.parallel {
            0 => limits::PARALLEL,
            n => n.min(limits::PARALLEL_MAX),
        };
        Settings { parallel, receipts: self.receipts, ..Settings::default() }
    }
}

/// An SR being collected.
#[derive(Debug)]
struct Attended {
    sr: AttachedSr,
    collector: Arc<Collector>,
    /// The one that works and the one that watches latencies.
    threads: [JoinHandle<()>; 2],
}

#[derive(Debug, Default)]
struct Attending {
    srs: BTreeMap<Uuid, Attended>,
    /// SRs that could not be opened, and why.
    refused: BTreeMap<Uuid, String>,
    wishes: BTreeMap<Uuid, Wishes>,
    look: bool,
    closing: bool,
}

/// All collectors of this host.
#[derive(Debug)]
pub struct Service {
    run: PathBuf,
    state: PathBuf,
    wishes_file: PathBuf,
    look_every: Duration,
    attending: Mutex<Attending>,
    changed: Condvar,
}

impl Service {
    /// For the SRs attached in `run`, each looked at so often though nobody
    /// kicks; wishes are kept in `state`.
    ///
    /// # Errors
    /// The wishes cannot be read.
    pub fn new(state: &Path, run: &Path, look_every: Duration) -> std::io::Result<Arc<Self>> {
        let wishes_file = state.join("gc.json");
        let wishes = read_json(&wishes_file)?.unwrap_or_default();
        let attending = Mutex::new(Attending { wishes, ..Attending::default() });
        Ok(Arc::new(Self {
            run: run.into(),
            state: state.into(),
            wishes_file,
            look_every,
            attending,
            changed: Condvar::new(),
        }))
    }

    fn attending(&self) -> MutexGuard<'_, Attending> {
        self.attending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks for SRs that came or went, now and ever again, until
    /// [`Self::close`].
    pub fn attend(&self) {
        loop {
            if let Err(error) = self.reconcile() {
                tracing::warn!(%error, "attached SRs cannot be read");
            }
            let mut attending = self.attending();
            while !attending.closing && !attending.look {
                let waited = self.changed.wait_timeout(attending, limits::ATTEND_EVERY);
                let (guard, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
                attending = guard;
                if timeout.timed_out() {
                    break;
                }
            }
            attending.look = false;
            if attending.closing {
                let srs = std::mem::take(&mut attending.srs);
                drop(attending);
                end(srs.into_values().collect());
                return;
            }
        }
    }

    /// Ends all merges and [`Self::attend`].
    pub fn close(&self) {
        self.attending().closing = true;
        self.changed.notify_all();
    }

    fn reconcile(&self) -> std::io::Result<()> {
        let now = AttachedSr::list(&self.run)?;
        let gone = {
            let mut attending = self.attending();
            let stale: Vec<Uuid> = attending
                .srs
                .iter()
                .filter(|(_, attended)| !now.contains(&attended.sr))
                .map(|(uuid, _)| *uuid)
                .collect();
            attending.refused.retain(|uuid, _| now.iter().any(|sr| sr.uuid == *uuid));
            stale.iter().filter_map(|uuid| attending.srs.remove(uuid)).collect::<Vec<_>>()
        };
        end(gone);
        for sr in now {
            if self.attending().srs.contains_key(&sr.uuid) {
                continue;
            }
            if let Err(reason) = self.take_on(&sr) {
                let before = self.attending().refused.insert(sr.uuid, reason.clone());
                if before.as_ref() != Some(&reason) {
                    tracing::warn!(sr = %sr.uuid, %reason, "SR not collected");
                }
            }
        }
        Ok(())
    }

    fn take_on(&self, sr: &AttachedSr) -> Result<(), String> {
        let open = sr.open(&self.run).map_err(|error| error.to_string())?;
        let mut attending = self.attending();
        let wishes = attending.wishes.get(&sr.uuid).cloned().unwrap_or_default();
        let collector = Collector::new(open.repo, wishes.settings(), wishes.rate);
        {
            let mut state = collector.state();
            state.paused = wishes.paused;
            state.off.clone_from(&wishes.off);
            state.look_every = self.look_every;
            state.latency_factor = wishes.latency_factor();
        }
        let spawn = |what: &str, body: fn(&Arc<Collector>)| {
            let collector = collector.clone();
            std::thread::Builder::new()
                .name(format!("{what}-{}", &sr.uuid.to_string()[..8]))
                .spawn(move || body(&collector))
                .map_err(|error| error.to_string())
        };
        let threads = [spawn("lat", |c| c.watch_latency())?, spawn("gc", |c| c.work())?];
        tracing::info!(sr = %sr.uuid, "collecting");
        attending.refused.remove(&sr.uuid);
        attending.srs.insert(sr.uuid, Attended { sr: sr.clone(), collector, threads });
        Ok(())
    }

    /// Has everything looked at now: SRs that came, and `sr` or all.
    pub fn kick(&self, sr: Option<Uuid>) {
        self.attending().look = true;
        self.changed.notify_all();
        for (_, collector) in self.collectors(sr) {
            collector.kick();
        }
    }

    /// The collectors of `sr` or of all SRs, with the SRs' names.
    #[must_use]
    pub fn collectors(&self, sr: Option<Uuid>) -> Vec<(String, Arc<Collector>)> {
        let attending = self.attending();
        let wanted = attending.srs.iter().filter(|(uuid, _)| sr.is_none_or(|sr| sr == **uuid));
        wanted.map(|(_, attended)| (attended.sr.name.clone(), attended.collector.clone())).collect()
    }

    /// As [`Self::collectors`], but looks for an SR that was attached just
    /// now before it says that there is none.
    ///
    /// # Errors
    /// The attached SRs cannot be read.
    pub fn collectors_now(&self, sr: Option<Uuid>) -> std::io::Result<Vec<(String, Arc<Collector>)>> {
        let found = self.collectors(sr);
        if !found.is_empty() {
            return Ok(found);
        }
        self.reconcile()?;
        Ok(self.collectors(sr))
    }

    /// SRs that are attached but cannot be collected, and why.
    #[must_use]
    pub fn refused(&self) -> BTreeMap<Uuid, String> {
        self.attending().refused.clone()
    }

    /// What an SR is called that this host knows, attached or not.
    ///
    /// # Errors
    /// The list of SRs cannot be read.
    pub fn known(&self, sr: Uuid) -> sm::Result<Option<String>> {
        let known = sm::state::known(&self.state)?;
        Ok(known.into_iter().find(|known| known.uuid == sr).map(|known| known.name))
    }

    /// What is wished for an SR.
    #[must_use]
    pub fn wishes(&self, sr: Uuid) -> Wishes {
        self.attending().wishes.get(&sr).cloned().unwrap_or_default()
    }

    /// Changes what is wished for `sr` or for all attached SRs, at once and
    /// for later.
    ///
    /// # Errors
    /// It cannot be kept for later; it is in force all the same.
    pub fn wish(&self, sr: Option<Uuid>, change: impl Fn(&mut Wishes)) -> std::io::Result<()> {
        let kept = {
            let mut attending = self.attending();
            let known: Vec<Uuid> = attending.srs.keys().copied().collect();
            for uuid in known.into_iter().filter(|uuid| sr.is_none_or(|sr| sr == *uuid)) {
                change(attending.wishes.entry(uuid).or_default());
            }
            attending.wishes.clone()
        };
        for (_, collector) in self.collectors(sr) {
            let wishes = kept.get(&collector.repo().uuid).cloned().unwrap_or_default();
            collector.apply(|state, now| {
                state.settings = wishes.settings();
                state.latency_factor = wishes.latency_factor();
                state.rate = wishes.rate;
                state.apply_rate(now);
            });
            collector.switch_off(wishes.off);
        }
        write_json(&self.wishes_file, &kept)
    }

    /// Pauses `sr` or all attached SRs, or lets them go on: at once, also where
    /// all merges were aborted a moment ago.
    ///
    /// # Errors
    /// As [`Self::wish`].
    pub fn pause(&self, sr: Option<Uuid>, paused: bool) -> std::io::Result<()> {
        let kept = self.wish(sr, |wishes| wishes.paused = paused);
        for (_, collector) in self.collectors(sr) {
            collector.pause(paused);
        }
        kept
    }
}

/// Ends collectors, all of them told before the first is waited for.
fn end(attended: Vec<Attended>) {
    for one in &attended {
        one.collector.close();
    }
    for one in attended {
        for thread in one.threads {
            if thread.join().is_err() {
                tracing::error!(sr = %one.sr.uuid, "its collector panicked");
            }
        }
        tracing::info!(sr = %one.sr.uuid, "not collecting any more");
    }
}
