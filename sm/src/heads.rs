//! What is known of images without reading them again.
//!
//! ```text
//!   scan ── stamp of each name ──> same as when its headers were read: known
//!                                  else: read, several at a time, and remembered
//! ```
//!
//! A stamp is what the filesystem says of a file (see [`Stamp`]): every write
//! changes it, so a scan costs one look at each name and a read of what has
//! changed. Clocks of filesystems tick in steps, so what changed just before
//! it was read is read again next time.
//!
//! Decisions stay exact: what this answers is what reading would answer. A
//! backend without stamps is read every time.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use uuid::Uuid;
use vhd::storage::{Stamp, VolumeName};

use crate::error::{IoContext, Result};
use crate::image;
use crate::journal;
use crate::limits::{KNOWN_IMAGES_MAX, NOTED_PER_LOCK_MAX, STAMP_SETTLES_NS};
use crate::repo::Repo;
use crate::tree::Image;
use crate::verified::Verified;

/// One image as it was read.
#[derive(Debug, Clone)]
struct Known {
    stamp: Stamp,
    image: Image,
    /// Bytes of its data blocks, once somebody asked.
    data_bytes: Option<u64>,
    /// Its parents stand in the verified record as they were read.
    noted: bool,
}

/// The images of one SR, as this process knows them.
#[derive(Debug, Default)]
pub struct Heads {
    known: Mutex<HashMap<VolumeName, Known>>,
    verified: Option<Verified>,
}

impl Heads {
    /// With the last verified parents of each image, kept on the SR.
    #[must_use]
    pub fn with(verified: Verified) -> Self {
        Self { known: Mutex::default(), verified: Some(verified) }
    }

    fn known(&self) -> MutexGuard<'_, HashMap<VolumeName, Known>> {
        // Entries are whole between any two calls.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One image; `None` if it is gone.
    pub fn image(&self, repo: &Repo, name: &VolumeName) -> Option<Image> {
        let stamp = repo.volumes.stamp(name).ok().flatten();
        if let Some(stamp) = &stamp
            && let Some(known) = self.known().get(name).filter(|known| known.stamp == *stamp)
        {
            return Some(known.image.clone());
        }
        let mut image = image::look(repo, name)?;
        if image.head.is_err() {
            image.may_stand_on = self.last_parents(stamp.as_ref());
            return Some(image);
        }
        if let Some(stamp) = stamp.filter(is_settled) {
            let known = Known { stamp, image: image.clone(), data_bytes: None, noted: false };
            let mut all = self.known();
            if all.len() < KNOWN_IMAGES_MAX || all.contains_key(name) {
                all.insert(name.clone(), known);
            }
        }
        Some(image)
    }

    /// All these images, in order; what is gone is left out. Others are
    /// forgotten.
    pub fn images(&self, repo: &Repo, names: &[VolumeName]) -> Vec<Image> {
        let found = in_parallel(repo.limits.scan_threads, names, |name| self.image(repo, name));
        let mut known = self.known();
        if known.len() > names.len() {
            known.retain(|name, _| names.binary_search(name).is_ok());
        }
        found.into_iter().flatten().collect()
    }

    /// Bytes of data blocks an image has of its own; see
    /// [`image::allocated_bytes`].
    ///
    /// # Errors
    /// As there.
    pub fn data_bytes(&self, repo: &Repo, name: &VolumeName) -> Result<u64> {
        let stamp = repo.volumes.stamp(name).ok().flatten();
        let same = |known: &Known| stamp.as_ref() == Some(&known.stamp);
        if let Some(bytes) = self.known().get(name).filter(|k| same(k)).and_then(|k| k.data_bytes) {
            return Ok(bytes);
        }
        let bytes = image::allocated_bytes(repo, name)?;
        if let Some(known) = self.known().get_mut(name).filter(|k| same(k)) {
            known.data_bytes = Some(bytes);
        }
        Ok(bytes)
    }

    /// Footer uuids of what an unreadable image may stand on, by its last
    /// verified record; `None`: nobody knows.
    fn last_parents(&self, stamp: Option<&Stamp>) -> Option<Vec<Uuid>> {
        let parents = self.verified.as_ref()?.get(&stamp?.identity);
        parents.unwrap_or_else(|error| {
            tracing::warn!(%error, "last verified parents");
            None
        })
    }

    /// Writes the parents of images read since the last time to the record on
    /// the SR. Takes the SR lock, a few milliseconds at a time: an image that
    /// an intent names may be changing its parent and is left out, and so is
    /// one that has changed since it was read. So whatever rewrites a parent
    /// ([`Heads::expect`]) is never contradicted by an older reading.
    ///
    /// # Errors
    /// The record cannot be written; it then knows less, which only makes
    /// merges wait.
    pub fn note(&self, repo: &Repo) -> Result<()> {
        let Some(verified) = &self.verified else {
            return Ok(());
        };
        let fresh: Vec<VolumeName> =
            self.known().iter().filter(|(_, known)| !known.noted).map(|(name, _)| name.clone()).collect();
        for names in fresh.chunks(NOTED_PER_LOCK_MAX) {
            let _sr = repo.host.lock_sr().during(|| format!("lock of SR {}", repo.name))?;
            let intents = journal::load(repo.volumes.as_ref())?;
            let mut rows = Vec::new();
            for name in names {
                let Some(Known { stamp, image, .. }) = self.known().get(name).cloned() else {
                    continue;
                };
                let Ok(head) = image.head else { continue };
                let named = intents.iter().any(|stored| stored.intent.names(name, head.footer));
                if named || repo.volumes.stamp(name).ok().flatten().as_ref() != Some(&stamp) {
                    continue;
                }
                let parents = head.parent.iter().map(|parent| parent.footer).collect();
                rows.push((name, stamp.identity, parents));
            }
            verified.put(rows.iter().map(|(_, identity, parents)| (identity.as_str(), parents)))?;
            for (name, ..) in rows {
                if let Some(known) = self.known().get_mut(name) {
                    known.noted = true;
                }
            }
        }
        Ok(())
    }

    /// An image's header is about to name another parent: from here on, until
    /// it is read and noted again, its record names the old and the new one.
    /// Durable when this returns. The caller holds the SR lock, or has an
    /// intent that names the image.
    ///
    /// # Errors
    /// The record cannot be written: the header must not be either.
    pub fn expect(&self, repo: &Repo, name: &VolumeName, parent: Uuid) -> Result<()> {
        let Some(verified) = &self.verified else {
            return Ok(());
        };
        let stamp = repo.volumes.stamp(name).during(|| format!("look at {name}"))?;
        let Some(identity) = stamp.map(|stamp| stamp.identity) else {
            return Ok(());
        };
        if let Some(mut parents) = verified.get(&identity)?
            && !parents.contains(&parent)
        {
            parents.push(parent);
            verified.put([(identity.as_str(), &parents)])?;
        }
        Ok(())
    }

    /// Forgets every record: the SR leaves this host's hands.
    ///
    /// # Errors
    /// The record cannot be written.
    pub fn void(&self) -> Result<()> {
        self.known().clear();
        self.verified.as_ref().map_or(Ok(()), Verified::void)
    }
}

/// Whether a later change will show in the stamp.
fn is_settled(stamp: &Stamp) -> bool {
    let now_ns = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos());
    let now_ns = i128::try_from(now_ns).unwrap_or(i128::MAX);
    stamp.changed_ns.saturating_add(STAMP_SETTLES_NS) < now_ns
}

/// Does `work` on every item with a few threads; the results in order.
pub fn in_parallel<T: Sync, R: Send>(threads: usize, items: &[T], work: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let threads = threads.min(items.len());
    if threads <= 1 {
        return items.iter().map(work).collect();
    }
    let next = AtomicUsize::new(0);
    let done = Mutex::new(Vec::with_capacity(items.len()));
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                let mut mine = Vec::new();
                loop {
                    let at = next.fetch_add(1, Ordering::Relaxed);
                    let Some(item) = items.get(at) else { break };
                    mine.push((at, work(item)));
                }
                done.lock().unwrap_or_else(PoisonError::into_inner).append(&mut mine);
            });
        }
    });
    let mut done = done.into_inner().unwrap_or_else(PoisonError::into_inner);
    done.sort_unstable_by_key(|(at, _)| *at);
    done.into_iter().map(|(_, result)| result).collect()
}
