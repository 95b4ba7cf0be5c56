//! Operations on whole SRs.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use uuid::Uuid;
use vhd::storage::PosixFs;

use super::{Entry, Manager, find};
use crate::attached::{AttachedSr, OpenSr};
use crate::catalog::SqliteLabels;
use crate::error::{Error, IoContext, Result};
use crate::journal;
use crate::lease::Reader;
use crate::ops;
use crate::owner::{OWNER_FILE, Owner};
use crate::recover::{self, Scope};
use crate::reference;
use crate::relabel::label_images;
use crate::repo::Repo;
use crate::scan;
use crate::state::{KnownSr, SrType, write_json};
use crate::tree::NodeState;
use crate::verified::Verified;

/// An SR to be created or introduced.
#[derive(Debug, Clone, Deserialize)]
pub struct NewSr {
    /// Its name.
    pub name: String,
    /// What it is.
    #[serde(rename = "type")]
    pub kind: SrType,
    /// Where it lies or shall lie, an absolute path.
    #[serde(default)]
    pub path: Option<PathBuf>,
    /// Its uuid; a fresh one, or the one it has, if none is given.
    #[serde(default)]
    pub uuid: Option<Uuid>,
    /// Whether it exists already.
    #[serde(default)]
    pub introduce: bool,
}

impl Manager {
    fn changing(&self) -> std::sync::MutexGuard<'_, ()> {
        self.changing.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Creates an SR in a folder without images, or introduces one that has
    /// them (ours or the reference's); then attaches it.
    ///
    /// # Errors
    /// [`Error::Exists`], [`Error::NotFound`] for a folder that is not there,
    /// [`Error::SrInUse`], I/O errors.
    pub fn add_sr(&self, new: &NewSr) -> Result<Uuid> {
        let _changing = self.changing();
        ops::check_label(&new.name)?;
        check_kind(new.kind)?;
        let wanted = new.path.as_deref().filter(|path| path.is_absolute() && !new.name.is_empty());
        let Some(wanted) = wanted else {
            let reason = "an SR needs a name and an absolute path".into();
            return Err(Error::BadRequest { reason });
        };
        let what = || format!("SR folder {}", wanted.display());
        if !new.introduce {
            fs::create_dir_all(wanted).during(what)?;
        } else if !wanted.is_dir() {
            return Err(Error::NotFound { what: what() });
        }
        let path = fs::canonicalize(wanted).during(what)?;
        let uuid = self.uuid_of(new, &path)?;
        let known = self.known();
        if known.iter().any(|sr| sr.uuid == uuid || sr.path == path) {
            return Err(Error::Exists { what: format!("SR {} at {}", new.name, path.display()) });
        }
        if !new.introduce && has_images(&path).during(what)? {
            let what = format!("an SR at {} (introduce it)", path.display());
            return Err(Error::Exists { what });
        }
        let name = new.name.clone();
        let known = KnownSr { uuid, name, kind: new.kind, path, attached: false };
        self.entries().push(Entry { known, open: None, features: None });
        if let Err(error) = self.attach_locked(uuid).and_then(|open| open.labels.set_sr(uuid, &new.name)) {
            self.entries().retain(|entry| entry.known.uuid != uuid);
            self.note()?;
            return Err(error);
        }
        Ok(uuid)
    }

    /// The uuid given, else the one the SR's catalog has, else a fresh one.
    fn uuid_of(&self, new: &NewSr, path: &Path) -> Result<Uuid> {
        if let Some(uuid) = new.uuid {
            return Ok(uuid);
        }
        let dot = path.join(".coppice");
        if new.introduce && dot.join("catalog.db").exists() {
            let _owner = Owner::acquire(path, self.id)?;
            if let Some((uuid, _)) = SqliteLabels::open(&dot)?.sr()? {
                return Ok(uuid);
            }
        }
        Ok(Uuid::new_v4())
    }

    /// Attaches a known SR; fine if it is attached.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::SrInUse`], I/O errors.
    pub fn attach_sr(&self, sr: Uuid) -> Result<()> {
        let _changing = self.changing();
        self.attach_locked(sr).map(drop)
    }

    /// ```text
    ///   1. owner lock        nobody else uses the SR; a new epoch voids
    ///                        records of another life
    ///   2. recovery, sweep   what a dead process left is finished or undone
    ///   3. labels            of images nobody has labelled
    ///   4. run folder        gcd may work on it from here on
    ///   5. state folder      it is attached again after a restart
    /// ```
    /// A crash anywhere leaves an SR that the next attach takes the same way.
    fn attach_locked(&self, sr: Uuid) -> Result<OpenSr> {
        let known = {
            let entries = self.entries();
            let entry = find(&entries, sr)?;
            if let Some(open) = &entry.open {
                return Ok(open.clone());
            }
            entry.known.clone()
        };
        let what = || format!("SR folder {}", known.path.display());
        fs::metadata(&known.path).during(what)?;
        let owner = Owner::acquire(&known.path, self.id)?;
        if owner.elsewhere {
            Verified::void_at(&known.path.join(".coppice"))?;
        }
        let attached = AttachedSr {
            uuid: sr,
            name: known.name.clone(),
            kind: known.kind,
            path: known.path.clone(),
            epoch: owner.epoch,
            id: self.id,
        };
        let open = attached.open_owned(&self.run, owner, Some(self.tapdisk.clone()))?;
        {
            let _sr = open.repo.host.lock_sr().during(|| format!("lock of SR {}", known.name))?;
            recover::recover(&open.repo, Scope::All)?;
            recover::sweep(&open.repo)?;
            ops::adopt(&open.repo)?;
            if open.repo.host.leases().during(|| "leases".into())?.is_empty() {
                reference::repair(&open.repo, &PosixFs::new(known.path.clone()))?;
            }
        }
        label_images(&open.repo)?;
        write_json(&AttachedSr::file(&self.run, sr), &attached).during(|| "run folder".into())?;
        // Only said: no decision waits for it.
        let features = PosixFs::new(known.path.clone()).features().ok();
        open.repo.heads.note(&open.repo)?;
        self.set(sr, Some(open.clone()));
        self.entries().iter_mut().filter(|entry| entry.known.uuid == sr).for_each(|entry| {
            entry.features = features.clone().map(Into::into);
        });
        self.note()?;
        tracing::info!(%sr, name = known.name, epoch = attached.epoch, "SR attached");
        self.kick(sr);
        Ok(open)
    }

    /// Detaches an SR: every image settled, nothing of ours half done but
    /// merges, which stop at any point. Fine if it is detached.
    ///
    /// # Errors
    /// [`Error::Held`] while VDIs are attached, [`Error::Busy`] while
    /// somebody works on an intent, what keeps an image from being settled.
    pub fn detach_sr(&self, sr: Uuid) -> Result<()> {
        let _changing = self.changing();
        let open = match self.open_sr(sr) {
            Ok(open) => open,
            Err(Error::SrDetached { .. }) => return Ok(()),
            Err(error) => return Err(error),
        };
        {
            let repo = &open.repo;
            let _sr = repo.host.lock_sr().during(|| format!("lock of SR {}", repo.name))?;
            let (waiting, leases): (Vec<_>, Vec<_>) = (repo.host.leases().during(|| "leases".into())?)
                .into_iter()
                .partition(|lease| lease.reader == Reader::Yielding);
            if !leases.is_empty() {
                let reason = format!("{} VDIs are attached or being copied", leases.len());
                return Err(Error::Held {
                    what: format!("SR {}", repo.name),
                    reason,
                    next: "detach its disks (`coppice vdi detach`) and let copies end",
                });
            }
            if let Some(reader) = waiting.first() {
                self.make_way(sr, None);
                return Err(Error::Busy { reason: format!("the collector reads VDI {}", reader.vdi) });
            }
            if let Some(down) = repo.host.wanted().during(|| "run folder".into())?.first() {
                let reason =
                    format!("VDI {} is attached, its tapdisk died and is being brought back", down.vdi);
                return Err(Error::InUse { what: format!("SR {}", repo.name), reason });
            }
            nobody_works(repo).inspect_err(|_| self.make_way(sr, None))?;
            recover::recover(repo, Scope::All)?;
            recover::sweep(repo)?;
            ops::settle_all(repo)?;
            // What happens to the images from here on we do not see.
            repo.heads.void()?;
            remove(&AttachedSr::file(&self.run, sr)).during(|| "run folder".into())?;
        }
        self.set(sr, None);
        self.note()?;
        tracing::info!(%sr, "SR detached");
        self.kick(sr);
        Ok(())
    }

    /// Forgets a detached SR; its images and labels stay where they are.
    ///
    /// # Errors
    /// [`Error::Held`] while attached, [`Error::NotFound`].
    pub fn forget_sr(&self, sr: Uuid) -> Result<()> {
        let _changing = self.changing();
        {
            let mut entries = self.entries();
            let entry = find(&entries, sr)?;
            if entry.open.is_some() {
                let what = format!("SR {}", entry.known.name);
                return Err(Error::Held {
                    what,
                    reason: "it is attached".into(),
                    next: "detach it first: `coppice sr detach`",
                });
            }
            entries.retain(|entry| entry.known.uuid != sr);
        }
        self.note()
    }

    /// Destroys an attached SR that has no VDIs: hidden nodes nobody reads
    /// and the dot folder go, the folder itself stays.
    ///
    /// # Errors
    /// [`Error::Held`] while it has VDIs, or broken images that may be some;
    /// else as [`Manager::detach_sr`].
    pub fn destroy_sr(&self, sr: Uuid) -> Result<()> {
        let open = self.open_sr(sr)?;
        let tree = scan::scan(&open.repo)?.tree;
        let mut kept = tree.nodes.iter().filter(|node| node.state != NodeState::Hidden);
        if let Some(node) = kept.next() {
            let what = format!("SR {}", open.repo.name);
            let reason = format!("it has {} VDIs, such as {}", 1 + kept.count(), node.uuid);
            return Err(Error::Held { what, reason, next: "delete its disks first: `coppice vdi delete`" });
        }
        let path = find(&self.entries(), sr)?.known.path.clone();
        self.detach_sr(sr)?;
        // From here on nobody of this host uses it, and the owner lock below
        // keeps others away.
        drop(open);
        let what = || format!("destroy SR folder {}", path.display());
        let owner = Owner::acquire(&path, self.id)?;
        for node in &tree.nodes {
            remove(&path.join(node.volume.as_str())).during(what)?;
        }
        remove_dot_folder(&path.join(".coppice"), owner).during(what)?;
        self.forget_sr(sr)
    }

    /// Recovers, sweeps, brings the labels up to date and nudges the
    /// collector.
    ///
    /// # Errors
    /// The SR or its journal cannot be read.
    pub fn scan_sr(&self, sr: Uuid) -> Result<()> {
        let open = self.open_sr(sr)?;
        {
            let repo = &open.repo;
            let _sr = repo.host.lock_sr().during(|| format!("lock of SR {}", repo.name))?;
            recover::recover(repo, Scope::All)?;
            recover::sweep(repo)?;
        }
        label_images(&open.repo)?;
        open.repo.heads.note(&open.repo)?;
        self.kick(sr);
        Ok(())
    }

    fn set(&self, sr: Uuid, open: Option<OpenSr>) {
        for entry in self.entries().iter_mut().filter(|entry| entry.known.uuid == sr) {
            entry.known.attached = open.is_some();
            entry.open.clone_from(&open);
        }
    }

    fn note(&self) -> Result<()> {
        self.state.save(&self.known())
    }
}

/// Refuses what is not built.
pub(super) fn check_kind(kind: SrType) -> Result<()> {
    match kind {
        SrType::File => Ok(()),
        SrType::Lvm => {
            let what = "repositories of type lvm: use type file on a folder of a filesystem".into();
            Err(Error::Unsupported { what })
        }
    }
}

fn nobody_works(repo: &Repo) -> Result<()> {
    for stored in journal::load(repo.volumes.as_ref())? {
        let id = stored.name.id;
        let held = repo.host.hold_intent(id).during(|| format!("hold intent {id}"))?;
        if held.is_none() {
            let who = stored.intent.word();
            let reason = format!("{who} ({id}) is under way in SR {}", repo.name);
            return Err(Error::Busy { reason });
        }
    }
    Ok(())
}

fn has_images(path: &Path) -> io::Result<bool> {
    for entry in fs::read_dir(path)? {
        let name = entry?.file_name();
        let name = name.to_string_lossy();
        if name.ends_with(".vhd") || name.ends_with(".raw") {
            return Ok(true);
        }
    }
    Ok(false)
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Removes our folder of an SR that is destroyed. The owner's file goes last,
/// under its lock. On NFS a file that is removed while it is open stays, under
/// another name, until it is closed: so the folder goes after that.
fn remove_dot_folder(dot: &Path, owner: Owner) -> io::Result<()> {
    for entry in fs::read_dir(dot)? {
        let entry = entry?;
        if entry.file_name() == OWNER_FILE {
            continue;
        }
        if entry.file_type()?.is_dir() {
            fs::remove_dir_all(entry.path())?;
        } else {
            remove(&entry.path())?;
        }
    }
    remove(&dot.join(OWNER_FILE))?;
    drop(owner);
    fs::remove_dir(dot)
}
