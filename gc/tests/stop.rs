//! A merge that is told to stop does so at the next block, whatever its window
//! is, and nothing is lost by it.

#![allow(clippy::unwrap_used, reason = "helpers of tests are not test functions")]

mod support;

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use gc::candidates::Merge;
use gc::collector::{Collector, Scope};
use gc::job::{Job, Stop};
use gc::plan::Settings;
use gc::watch::{Aborted, Event, Unhurried, Watch};
use vhd::units::BLOCK_BYTES;

use support::{Sr, id, run};

const BLOCKS: u32 = 64;

/// Is told to stop after so many looks.
struct Patience {
    left: AtomicU64,
    events: Unhurried,
}

impl Watch for Patience {
    fn now(&self) -> Duration {
        self.events.now()
    }

    fn sleep(&self, time: Duration) -> Result<(), Aborted> {
        self.events.sleep(time)
    }

    fn allow(&self, _bytes: u64) -> Result<(), Aborted> {
        let take = |left: u64| left.checked_sub(1);
        self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).map(drop).map_err(|_| Aborted)
    }

    fn note(&self, event: Event) {
        self.events.note(event);
    }

    fn rate(&self) -> u64 {
        0
    }
}

/// Hidden 1 under 2, under leaf 3 if 2 is hidden too.
fn stopped_after(blocks: u64, merge: &Merge) {
    let sr = Sr::new();
    let inner = matches!(merge, Merge::Inner { .. });
    sr.image(1, 0, true, u64::from(BLOCKS));
    sr.image(2, 1, inner, u64::from(BLOCKS));
    if inner {
        sr.image(3, 2, false, u64::from(BLOCKS));
    }
    let leaf = if inner { 3 } else { 2 };
    let all: Vec<_> = (0..BLOCKS).map(|block| (block, run(0, 4096), block as u8 + 1)).collect();
    sr.write(2, &all);
    let reads = sr.read(leaf);

    let watch = Patience { left: AtomicU64::new(blocks), events: Unhurried::default() };
    let (job, intent) = Job::begin(&sr.repo, &watch, merge).unwrap();
    let stopped = job.carry_on(intent);
    assert!(matches!(stopped, Err(Stop::Aborted)), "{stopped:?}");
    let copied = watch.events.ledger.lock().unwrap().copied;
    assert!(copied <= blocks * BLOCK_BYTES, "{copied} bytes");
    drop(job);
    assert_eq!(sr.read(leaf), reads);

    let collector = Collector::new(sr.repo.clone(), Settings::default(), 0);
    sr.collect_with(&collector, Scope::Sr);
    assert_eq!((sr.read(leaf), sr.depth(leaf)), (reads, 1));
}

#[test]
fn a_merge_of_hidden_nodes_stops_at_the_next_block() {
    for blocks in [0, 1, 20, 63] {
        stopped_after(blocks, &Merge::Inner { sources: vec![id(2)], parent: id(1) });
    }
}

#[test]
fn a_merge_of_a_detached_leaf_stops_at_the_next_block() {
    for blocks in [0, 1, 20, 63] {
        stopped_after(blocks, &Merge::Leaf { vdi: id(2), parent: id(1), attached: false });
    }
}
