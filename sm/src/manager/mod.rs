//! What smd holds between requests: the SRs of this host.
//!
//! ```text
//!   Manager ── State (srs.json, host-id, lock)
//!      └── Entry per known SR ── OpenSr while attached ── Repo for operations
//! ```
//!
//! Changes of SRs are one at a time; operations on VDIs only borrow a
//! [`Repo`] and run side by side.
//!
//! A tapdisk that died is brought back by [`crate::caretaker`].

mod look;
mod sr;

use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use uuid::Uuid;

use crate::attached::OpenSr;
use crate::caretaker;
use crate::chain;
use crate::error::{Error, IoContext, Result};
use crate::nudge::Nudge;
use crate::offer::Offer;
use crate::owner::HostId;
use crate::probe::FeaturesView;
use crate::remote::Remote;
use crate::repo::Repo;
use crate::run_folder::make_folder;
use crate::spawn::TapProgram;
use crate::state::{KnownSr, State};
use crate::views::{self, Look, SrView, TreeView};

pub use sr::NewSr;

/// How a manager is set up.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The state folder.
    pub state: PathBuf,
    /// The run folder.
    pub run: PathBuf,
    /// How tapdisks are started.
    pub tapdisk: TapProgram,
    /// Where the collector listens.
    pub gcd_socket: PathBuf,
    /// Where disks are served whose attach names no address.
    pub offer: Option<Remote>,
}

#[derive(Debug)]
struct Entry {
    known: KnownSr,
    open: Option<OpenSr>,
    /// What its filesystem can do, found out when it was attached.
    features: Option<FeaturesView>,
}

/// All SRs of this host.
#[derive(Debug)]
pub struct Manager {
    state: State,
    run: PathBuf,
    id: HostId,
    tapdisk: TapProgram,
    nudge: Nudge,
    offer: Option<Offer>,
    /// Tapdisks that died and came back.
    pub(crate) tap_counters: caretaker::Counters,
    entries: Mutex<Vec<Entry>>,
    /// Held through a change of SRs; `entries` only to look and to note.
    changing: Mutex<()>,
}

impl Manager {
    /// Takes the state folder and attaches the SRs that were attached when
    /// its last holder ended. One that cannot be is logged and stays
    /// detached.
    ///
    /// # Errors
    /// [`Error::Held`] when another smd holds the folder, I/O errors.
    pub fn open(settings: Settings) -> Result<Self> {
        let state = State::open(&settings.state)?;
        let id = HostId::of_this_boot(state.host()).during(|| "boot id".into())?;
        make_folder(&settings.run).during(|| settings.run.display().to_string())?;
        let entries =
            state.load()?.into_iter().map(|known| Entry { known, open: None, features: None }).collect();
        let manager = Self {
            state,
            run: settings.run,
            id,
            tapdisk: settings.tapdisk,
            nudge: Nudge::new(settings.gcd_socket),
            offer: settings.offer.map(Offer::new),
            tap_counters: caretaker::Counters::default(),
            entries: Mutex::new(entries),
            changing: Mutex::new(()),
        };
        for known in manager.known() {
            if known.attached
                && let Err(error) = manager.attach_sr(known.uuid)
            {
                tracing::error!(sr = %known.uuid, name = known.name, %error, "SR stays detached");
            }
        }
        Ok(manager)
    }

    /// The run folder.
    #[must_use]
    pub fn run(&self) -> &std::path::Path {
        &self.run
    }

    /// Where all disks are offered.
    pub(crate) fn offer(&self) -> Option<&Offer> {
        self.offer.as_ref()
    }

    /// Tells the collector that an SR has changed.
    pub fn kick(&self, sr: Uuid) {
        self.nudge.kick(sr);
    }

    /// Asks the collector to let an operation go first.
    pub(crate) fn make_way(&self, sr: Uuid, vdi: Option<Uuid>) {
        self.nudge.make_way(sr, vdi);
    }

    /// All known SRs.
    pub fn known(&self) -> Vec<KnownSr> {
        self.entries().iter().map(|entry| entry.known.clone()).collect()
    }

    /// The uuid of an SR given by uuid or by a name that is unique.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::Ambiguous`].
    pub fn sr_uuid(&self, text: &str) -> Result<Uuid> {
        let known = self.known();
        let wanted = Uuid::try_parse(text).ok();
        if let Some(sr) = known.iter().find(|sr| Some(sr.uuid) == wanted) {
            return Ok(sr.uuid);
        }
        let mut named = known.iter().filter(|sr| sr.name == text);
        match (named.next(), named.next()) {
            (Some(sr), None) => Ok(sr.uuid),
            (None, _) => Err(Error::NotFound { what: format!("SR {text:?}") }),
            (Some(_), Some(_)) => Err(Error::Ambiguous { what: format!("SR {text:?}") }),
        }
    }

    /// An attached SR.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::SrDetached`].
    pub fn open_sr(&self, sr: Uuid) -> Result<OpenSr> {
        let entries = self.entries();
        let entry = find(&entries, sr)?;
        entry.open.clone().ok_or_else(|| Error::SrDetached { sr: entry.known.name.clone() })
    }

    /// The attached SR that has a VDI given by uuid or by a name that is
    /// unique, and the VDI's uuid.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::Ambiguous`].
    pub fn find_vdi(&self, text: &str) -> Result<(Repo, Uuid)> {
        let open: Vec<OpenSr> = self.entries().iter().filter_map(|entry| entry.open.clone()).collect();
        let not_found = || Error::NotFound { what: format!("VDI {text:?} in any attached SR") };
        if let Ok(vdi) = Uuid::try_parse(text) {
            // One SR that cannot be looked at hides no disk of another.
            let mut failed = None;
            for sr in open {
                match chain::leaf_volume(&sr.repo, vdi) {
                    // Busy: it is getting another image this moment.
                    Ok(_) | Err(Error::Busy { .. }) => return Ok((sr.repo, vdi)),
                    // Attached, and its image went away: it can be detached.
                    Err(Error::NotFound { .. }) if attached(&sr.repo, vdi)? => return Ok((sr.repo, vdi)),
                    Err(Error::NotFound { .. }) => {}
                    Err(error) => failed = failed.or(Some(error)),
                }
            }
            return Err(failed.unwrap_or_else(not_found));
        }
        let mut found = Vec::new();
        for sr in &open {
            found.extend(sr.repo.labels.named(text)?.into_iter().map(|vdi| (sr.repo.clone(), vdi)));
        }
        match (found.pop(), found.is_empty()) {
            (Some(one), true) => Ok(one),
            (Some(_), false) => Err(Error::Ambiguous { what: format!("VDI {text:?}") }),
            (None, _) => Err(not_found()),
        }
    }

    /// One SR.
    ///
    /// # Errors
    /// [`Error::NotFound`], and what keeps an attached one from being read.
    pub fn view_sr(&self, sr: Uuid) -> Result<SrView> {
        let (known, open) = {
            let entries = self.entries();
            let entry = find(&entries, sr)?;
            (entry.known.clone(), entry.open.clone().map(|open| (open, entry.features.clone())))
        };
        match open {
            Some((open, features)) => Ok(SrView { features, ..Look::at(&open.repo)?.sr(&known)? }),
            None => Ok(views::detached_sr(&known)),
        }
    }

    /// All trees of an attached SR.
    ///
    /// # Errors
    /// As [`Manager::open_sr`], and what keeps it from being read.
    pub fn view_tree(&self, sr: Uuid) -> Result<TreeView> {
        let open = self.open_sr(sr)?;
        let known = find(&self.entries(), sr)?.known.clone();
        let look = Look::at(&open.repo)?;
        Ok(TreeView { sr: look.sr(&known)?, roots: look.roots() })
    }

    fn entries(&self) -> MutexGuard<'_, Vec<Entry>> {
        // Every holder leaves the list whole, so a panic elsewhere does not
        // matter here.
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn attached(repo: &Repo, vdi: Uuid) -> Result<bool> {
    let wanted = repo.host.wanted_one(vdi).during(|| format!("run folder of VDI {vdi}"))?;
    Ok(wanted.is_some())
}

fn find(entries: &[Entry], sr: Uuid) -> Result<&Entry> {
    entries
        .iter()
        .find(|entry| entry.known.uuid == sr)
        .ok_or_else(|| Error::NotFound { what: format!("SR {sr}") })
}
