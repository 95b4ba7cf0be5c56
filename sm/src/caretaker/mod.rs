//! Brings back tapdisks that died.
//!
//! ```text
//!   caretaker thread ──asks──> Host::wanted of every attached SR, once a second
//!        │  plan.rs says what is due (pure)
//!        ├── watch thread per served VDI: sleeps in the lock of its lease,
//!        │                                wakes at the tapdisk's death
//!        └── start thread per attempt:    ops::revive
//! ```
//!
//! The new tapdisk gets the same run folder, so its sockets have the same
//! paths: a client that reconnects goes on where it was. It replays the
//! pending record of the dead one, so no acknowledged write is missing
//! (invariant 1).
//!
//! The end of a tapdisk is its death only if the VDI is wanted and nobody
//! serves it: by the time it is looked at the VDI may have been detached, and
//! attached again. Then it is the new tapdisk that is watched.
//!
//! What smd knows of it is also written beside the lease, for `coppice
//! status` and for a next smd. A restarted smd finds running tapdisks by
//! their leases and watches them like its own.

mod plan;

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use uuid::Uuid;

use self::plan::Ward;
use crate::error::{Error, IoContext, Result};
use crate::limits::{CARETAKER_LOOK_MS, REVIVES_AT_ONCE_MAX};
use crate::manager::Manager;
use crate::ops;
use crate::repo::Repo;
use crate::wanted::{Down, Wanted};

/// What happened since smd started, for `/metrics`.
#[derive(Debug, Default)]
pub struct Counters {
    /// Tapdisks that died while they were wanted.
    pub deaths: AtomicU64,
    /// Tapdisks brought back.
    pub revived: AtomicU64,
    /// Attempts that failed.
    pub failed: AtomicU64,
}

/// A VDI of an SR.
type Key = (Uuid, Uuid);

enum Event {
    /// A tapdisk is gone; which watch says so.
    Gone(Key, u64),
    /// An attempt ended.
    Tried(Key, Result<bool>),
}

/// What the end of a tapdisk was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// Its VDI was detached.
    Detached,
    /// That of an earlier attach: another one serves the VDI by now.
    Replaced,
    /// Its death.
    Death,
}

/// Starts the caretaker; it ends when the manager is dropped.
///
/// # Errors
/// The thread cannot be started.
pub fn start(manager: &Arc<Manager>) -> io::Result<()> {
    let (events, incoming) = mpsc::channel();
    let caretaker = Caretaker {
        manager: Arc::downgrade(manager),
        events,
        wards: BTreeMap::new(),
        watches: BTreeMap::new(),
        watches_begun: 0,
        began: Instant::now(),
    };
    std::thread::Builder::new().name("caretaker".into()).spawn(move || caretaker.run(&incoming)).map(drop)
}

struct Caretaker {
    /// Weak, so that it does not keep smd's locks alive.
    manager: Weak<Manager>,
    events: Sender<Event>,
    /// One per wanted VDI of an attached SR.
    wards: BTreeMap<Key, Ward>,
    /// The newest watch of each; older ones speak of tapdisks that are known
    /// to be gone.
    watches: BTreeMap<Key, u64>,
    watches_begun: u64,
    began: Instant,
}

impl Caretaker {
    fn run(mut self, incoming: &Receiver<Event>) {
        let look = Duration::from_millis(CARETAKER_LOOK_MS);
        let mut looked: Option<Instant> = None;
        loop {
            let Some(manager) = self.manager.upgrade() else {
                return;
            };
            if looked.is_none_or(|at| at.elapsed() >= look) {
                self.look(&manager);
                looked = Some(Instant::now());
            }
            self.start_due(&manager);
            drop(manager);
            let due = self.next_due().unwrap_or(look).min(look);
            match incoming.recv_timeout(due) {
                Ok(event) => self.take(event),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn next_due(&self) -> Option<Duration> {
        let now_ms = self.now_ms();
        let due = self.wards.values().filter_map(|ward| match ward {
            Ward::Down { due_ms, .. } => Some(due_ms.saturating_sub(now_ms)),
            _ => None,
        });
        // At the limit of attempts at once the end of one wakes us.
        due.min().map(|ms| Duration::from_millis(ms.max(5)))
    }

    /// Compares what is wanted with what is watched.
    fn look(&mut self, manager: &Manager) {
        let mut seen: BTreeMap<Key, ()> = BTreeMap::new();
        for known in manager.known().iter().filter(|known| known.attached) {
            let Ok(open) = manager.open_sr(known.uuid) else {
                continue;
            };
            let wanted = match open.repo.host.wanted() {
                Ok(wanted) => wanted,
                Err(error) => {
                    tracing::warn!(sr = %known.uuid, %error, "what is attached cannot be told");
                    self.wards.keys().filter(|key| key.0 == known.uuid).for_each(|key| {
                        seen.insert(*key, ());
                    });
                    continue;
                }
            };
            for one in wanted.into_iter().filter(|one| !one.starting) {
                let key = (known.uuid, one.vdi);
                seen.insert(key, ());
                self.meet(&open.repo, key, &one);
            }
        }
        // Detached since: whatever sleeps in its lease wakes by itself.
        self.wards.retain(|key, _| seen.contains_key(key));
        self.watches.retain(|key, _| seen.contains_key(key));
    }

    /// Watches a VDI that is not watched yet. One that was given up is
    /// watched again once somebody has attached it.
    fn meet(&mut self, repo: &Repo, key: Key, wanted: &Wanted) {
        let given_up = wanted.down.as_ref().is_some_and(|down| down.given_up);
        match self.wards.get(&key) {
            None if given_up => {
                self.wards.insert(key, Ward::GivenUp);
                return;
            }
            None => {}
            Some(Ward::GivenUp) if !given_up => {}
            Some(_) => return,
        }
        self.wards.insert(key, Ward::Served { since_ms: self.now_ms(), attempts: 0 });
        self.watch(repo, key);
    }

    fn watch(&mut self, repo: &Repo, key: Key) {
        let (host, events) = (repo.host.clone(), self.events.clone());
        self.watches_begun += 1;
        let number = self.watches_begun;
        self.watches.insert(key, number);
        let watch = move || {
            if let Err(error) = host.until_gone(key.1) {
                tracing::warn!(sr = %key.0, vdi = %key.1, %error, "its tapdisk cannot be watched");
                // If it lives it is watched again, and not over and over at once.
                std::thread::sleep(Duration::from_millis(CARETAKER_LOOK_MS));
            }
            // Nobody listens any more when smd ends.
            let _ = events.send(Event::Gone(key, number));
        };
        let started = std::thread::Builder::new().name("tapdisk-watch".into()).spawn(watch);
        if let Err(error) = started {
            tracing::warn!(sr = %key.0, vdi = %key.1, %error, "its tapdisk is not watched yet");
            self.wards.remove(&key);
        }
    }

    fn take(&mut self, event: Event) {
        let Some(manager) = self.manager.upgrade() else {
            return;
        };
        let key = match &event {
            Event::Gone(key, _) | Event::Tried(key, _) => *key,
        };
        let Ok(open) = manager.open_sr(key.0) else {
            return;
        };
        let taken = match event {
            Event::Gone(_, watch) if self.watches.get(&key) != Some(&watch) => Ok(()),
            // What could not be told now is looked at anew.
            Event::Gone(..) => self.gone(&manager, &open.repo, key).inspect_err(|_| {
                self.wards.remove(&key);
            }),
            Event::Tried(_, outcome) => self.tried(&manager, &open.repo, key, outcome),
        };
        if let Err(error) = taken {
            tracing::warn!(sr = %key.0, vdi = %key.1, %error, "its state is not noted");
        }
    }

    fn gone(&mut self, manager: &Manager, repo: &Repo, key: Key) -> Result<()> {
        let (sr, vdi) = key;
        let Some(ward @ Ward::Served { .. }) = self.wards.get(&key).copied() else {
            return Ok(());
        };
        let ward = ward.died(self.now_ms());
        let end = ended(repo, vdi, |wanted| {
            wanted.deaths += 1;
            let given_up = ward == Ward::GivenUp;
            let error = given_up.then(|| "it died over and over".to_owned());
            let attempts = ward.attempts();
            wanted.down = Some(Down { since_s: now_s(), attempts, given_up, error });
        })?;
        match end {
            End::Detached => {
                self.wards.remove(&key);
                return Ok(());
            }
            End::Replaced => {
                self.wards.insert(key, Ward::Served { since_ms: self.now_ms(), attempts: 0 });
                self.watch(repo, key);
                return Ok(());
            }
            End::Death => {}
        }
        manager.tap_counters.deaths.fetch_add(1, Ordering::Relaxed);
        if ward == Ward::GivenUp {
            tracing::error!(%sr, %vdi, "tapdisk died over and over: attach the disk by hand");
        } else {
            tracing::error!(%sr, %vdi, "tapdisk died: it is brought back");
        }
        self.wards.insert(key, ward);
        Ok(())
    }

    fn start_due(&mut self, manager: &Manager) {
        let now_ms = self.now_ms();
        let running = self.wards.values().filter(|ward| matches!(ward, Ward::Starting { .. })).count();
        let mut slots = REVIVES_AT_ONCE_MAX.saturating_sub(running);
        for (key, ward) in &mut self.wards {
            let Some(started) = ward.start(now_ms).filter(|_| slots > 0) else {
                continue;
            };
            let Ok(open) = manager.open_sr(key.0) else {
                continue;
            };
            let (key, events, repo) = (*key, self.events.clone(), open.repo);
            let attempt = move || {
                let span = tracing::info_span!("revive", sr = %key.0, vdi = %key.1);
                let outcome = span.in_scope(|| ops::revive(&repo, key.1));
                let _ = events.send(Event::Tried(key, outcome));
            };
            let thread = std::thread::Builder::new().name("tapdisk-revive".into()).spawn(attempt);
            // Out of threads: due again at the next look.
            if thread.is_ok() {
                *ward = started;
                slots -= 1;
            }
        }
    }

    fn tried(&mut self, manager: &Manager, repo: &Repo, key: Key, outcome: Result<bool>) -> Result<()> {
        let (sr, vdi) = key;
        let Some(ward) = self.wards.get(&key).copied() else {
            return Ok(());
        };
        let error = match outcome {
            Ok(false) => {
                self.wards.remove(&key);
                return Ok(());
            }
            Ok(true) => {
                tracing::info!(%sr, %vdi, attempts = ward.attempts(), "tapdisk is back");
                manager.tap_counters.revived.fetch_add(1, Ordering::Relaxed);
                self.wards.insert(key, ward.alive(self.now_ms()));
                self.watch(repo, key);
                return note(repo, vdi, |wanted| wanted.down = None).map(drop);
            }
            Err(error) => error,
        };
        if error.is_busy() {
            manager.make_way(sr, Some(vdi));
        }
        let ward = ward.failed(self.now_ms());
        self.wards.insert(key, ward);
        manager.tap_counters.failed.fetch_add(1, Ordering::Relaxed);
        let given_up = ward == Ward::GivenUp;
        let attempts = ward.attempts();
        if given_up {
            tracing::error!(%sr, %vdi, attempts, %error, "tapdisk stays dead: attach the disk by hand");
        } else {
            tracing::warn!(%sr, %vdi, attempts, %error, "tapdisk is not back yet");
        }
        self.say_why(repo, vdi, attempts, given_up, &error)
    }

    fn say_why(&self, repo: &Repo, vdi: Uuid, attempts: u32, given_up: bool, error: &Error) -> Result<()> {
        let set = |wanted: &mut Wanted| {
            let since_s = wanted.down.as_ref().map_or_else(now_s, |down| down.since_s);
            wanted.down = Some(Down { since_s, attempts, given_up, error: Some(error.to_string()) });
        };
        note(repo, vdi, set).map(drop)
    }
}

/// Tells what the end of a tapdisk was, and has `death` note it if it died.
fn ended(repo: &Repo, vdi: Uuid, death: impl FnOnce(&mut Wanted)) -> Result<End> {
    let _sr = repo.host.lock_sr().during(|| format!("lock of SR {}", repo.name))?;
    if repo.host.is_served(vdi).during(|| run_folder_of(vdi))? {
        return Ok(End::Replaced);
    }
    let wanted = change(repo, vdi, death)?;
    Ok(if wanted { End::Death } else { End::Detached })
}

/// Changes what is written of a wanted VDI. Returns false if it is not wanted
/// any more.
fn note(repo: &Repo, vdi: Uuid, set: impl FnOnce(&mut Wanted)) -> Result<bool> {
    let _sr = repo.host.lock_sr().during(|| format!("lock of SR {}", repo.name))?;
    change(repo, vdi, set)
}

/// As [`note`], under the SR lock.
fn change(repo: &Repo, vdi: Uuid, set: impl FnOnce(&mut Wanted)) -> Result<bool> {
    let Some(mut wanted) = repo.host.wanted_one(vdi).during(|| run_folder_of(vdi))? else {
        return Ok(false);
    };
    set(&mut wanted);
    repo.host.want(&wanted).during(|| run_folder_of(vdi))?;
    Ok(true)
}

fn run_folder_of(vdi: Uuid) -> String {
    format!("run folder of VDI {vdi}")
}

fn now_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
