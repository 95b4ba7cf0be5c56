//! Reads the headers of a whole SR.
//!
//! Headers are read without the SR lock, several at a time; the result is a
//! picture that may be stale the moment it exists. Whoever acts on it takes
//! the lock and looks again at what it is about to change.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use vhd::storage::VolumeName;

use crate::error::{IoContext, Result};
use crate::image;
use crate::journal::{self, Stored};
use crate::repo::Repo;
use crate::tree::{Image, VdiTree};

/// What a scan found.
#[derive(Debug, Clone)]
pub struct Scan {
    /// All trees.
    pub tree: VdiTree,
    /// What is half done.
    pub intents: Vec<Stored>,
}

/// Scans the SR.
///
/// The journal is read before and after the headers: an operation that began
/// or ended meanwhile is then known from one of the two readings, so its
/// temporaries and half-made names do not show up as VDIs.
///
/// # Errors
/// The SR cannot be listed or its journal not be read. A broken image is no
/// error but a broken node.
pub fn scan(repo: &Repo) -> Result<Scan> {
    let mut known = journal::load(repo.volumes.as_ref())?;
    let names = repo.volumes.list().during(|| format!("list SR {}", repo.name))?;
    let images = look_at_all(repo, &names);
    let intents = journal::load(repo.volumes.as_ref())?;
    known.retain(|old| intents.iter().all(|new| new.name.id != old.name.id));
    known.extend(intents.iter().cloned());
    Ok(Scan { tree: VdiTree::build(images, &known), intents })
}

/// Looks at every volume with a few threads; in order.
fn look_at_all(repo: &Repo, names: &[VolumeName]) -> Vec<Image> {
    let threads = repo.limits.scan_threads.min(names.len());
    if threads <= 1 {
        return names.iter().filter_map(|name| image::look(repo, name)).collect();
    }
    let next = AtomicUsize::new(0);
    let seen = Mutex::new(Vec::with_capacity(names.len()));
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                let mut mine = Vec::new();
                while let Some(name) = names.get(next.fetch_add(1, Ordering::Relaxed)) {
                    mine.extend(image::look(repo, name));
                }
                seen.lock().unwrap_or_else(std::sync::PoisonError::into_inner).append(&mut mine);
            });
        }
    });
    let mut seen = seen.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    seen.sort_unstable_by(|a, b| a.volume.cmp(&b.volume));
    seen
}
