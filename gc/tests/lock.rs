//! What is read while the SR lock is held, which everybody waits for.

#![allow(clippy::unwrap_used, reason = "helpers of tests are not test functions")]

mod support;

use std::fs::{File, TryLockError};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use gc::collector::Scope;
use sm::heads::Heads;
use support::{Sr, id, run};
use vhd::storage::via::{Delegate, Via};
use vhd::storage::{VolumeName, Volumes};

/// Counts images opened, and those of them under the SR lock.
#[derive(Debug)]
struct Counting {
    inner: Arc<dyn Volumes>,
    lock: PathBuf,
    opened: AtomicU64,
    locked: AtomicU64,
}

impl Delegate for Counting {
    fn inner(&self) -> &dyn Volumes {
        self.inner.as_ref()
    }
    fn opening(&self, _name: &VolumeName) {
        self.opened.fetch_add(1, Ordering::Relaxed);
        let held =
            File::open(&self.lock).is_ok_and(|lock| matches!(lock.try_lock(), Err(TryLockError::WouldBlock)));
        self.locked.fetch_add(u64::from(held), Ordering::Relaxed);
    }
}

/// Bystanders: images that no merge concerns.
const OTHERS: u128 = 300;

#[test]
fn a_merge_begins_without_reading_every_header_under_the_lock() {
    let mut sr = Sr::new();
    for (n, parent, hidden) in [(1, 0, true), (2, 1, true), (3, 2, false), (4, 2, false)] {
        sr.image(n, parent, hidden, 2);
    }
    sr.write(2, &[(0, run(0, 8), 2)]);
    for n in 0..OTHERS {
        sr.image(1000 + n, 0, false, 1);
    }
    // Longer than a stamp must be old to be trusted.
    std::thread::sleep(Duration::from_millis(1300));
    // As a collector that has just been started: nothing is known.
    sr.repo.heads = Arc::new(Heads::default());
    let lock = sr.run.join("sr").join(format!("{}.lock", sr.repo.uuid));
    let inner = Arc::clone(&sr.repo.volumes);
    let counting =
        Arc::new(Via(Counting { inner, lock, opened: AtomicU64::new(0), locked: AtomicU64::new(0) }));
    sr.repo.volumes = counting.clone();
    let merge = gc::candidates::Merge::Inner { sources: vec![id(2)], parent: id(1) };
    let watch = gc::watch::Unhurried::default();
    let (job, _) = gc::job::Job::begin(&sr.repo, &watch, &merge).unwrap();
    drop(job);
    let (opened, locked) =
        (counting.0.opened.load(Ordering::Relaxed), counting.0.locked.load(Ordering::Relaxed));
    assert!(opened >= OTHERS as u64, "the headers were read: {opened}");
    assert_eq!(locked, 0, "none of them under the lock");
    // And a whole run: only what merges changed is read again there.
    let report = sr.collect(Scope::Sr);
    let locked = counting.0.locked.load(Ordering::Relaxed);
    assert_eq!(report.coalesced, 1, "{report:?}");
    assert!(locked < OTHERS as u64 / 4, "{locked} images were opened under the lock");
}
