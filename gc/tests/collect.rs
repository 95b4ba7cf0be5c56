//! Whole collections of detached trees on real files: what every VDI reads
//! stays, the forest becomes minimal, and predictions come true.

#![allow(clippy::unwrap_used, reason = "helpers of tests are not test functions")]

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::Arc;

use gc::collector::{Collector, Scope};
use gc::plan::Settings;
use sm::attached::AttachedSr;
use sm::image;
use vhd::storage::via::{Delegate, Via};
use vhd::storage::{Space, VolumeName, Volumes};
use vhd::units::{BLOCK_BYTES, SectorRun};

use support::{Sr, id, run};

#[test]
fn a_chain_becomes_one_image_and_reads_the_same() {
    let sr = Sr::new();
    sr.image(1, 0, true, 4);
    sr.image(2, 1, true, 4);
    sr.image(3, 2, true, 4);
    sr.image(4, 3, false, 4);
    sr.write(1, &[(0, run(0, 4096), 1), (1, run(8, 8), 1)]);
    sr.write(2, &[(0, run(100, 50), 2), (2, run(0, 1), 2)]);
    sr.write(3, &[(0, run(120, 50), 3), (2, run(0, 4096), 3)]);
    sr.write(4, &[(1, run(0, 16), 4), (3, run(4095, 1), 4)]);
    let before = sr.read(4);
    let report = sr.collect(Scope::Sr);
    assert!(sr.read(4) == before);
    assert_eq!((sr.volumes(), sr.depth(4)), (1, 1));
    assert_eq!((report.coalesced, report.leaf_coalesced, report.deleted), (2, 1, 0));
    assert_eq!(report.failed, []);
    // 7 blocks were held, 4 are left.
    assert_eq!(report.bytes_freed, 4 * BLOCK_BYTES);
    let bytes = report.bytes_copied + report.bytes_cloned;
    let sectors = 70 + 4096 + 16 + 1;
    assert_eq!(bytes, sectors * 512, "each byte once, the newest one");
}

#[test]
fn forks_stay_and_what_lies_between_them_goes() {
    let sr = Sr::new();
    // 1 - 2 - 3 -+- 4 (leaf)         9: garbage over garbage
    //            +- 5 - 6 (leaf)     8 - 9
    for (n, parent, hidden) in [
        (1, 0, true),
        (2, 1, true),
        (3, 2, true),
        (4, 3, false),
        (5, 3, true),
        (6, 5, false),
        (8, 0, true),
        (9, 8, true),
    ] {
        sr.image(n, parent, hidden, 3);
        sr.write(n, &[(n as u32 % 3, run(n as u32 * 10, 100), n as u8)]);
    }
    let before = [sr.read(4), sr.read(6)];
    let report = sr.collect(Scope::Sr);
    assert_eq!([sr.read(4), sr.read(6)], before);
    assert_eq!((report.coalesced, report.leaf_coalesced, report.deleted), (2, 1, 2));
    assert_eq!((sr.volumes(), sr.depth(4), sr.depth(6)), (3, 2, 2));
}

#[test]
fn a_parent_grows_with_what_goes_into_it() {
    let sr = Sr::new();
    sr.image(1, 0, true, 2);
    sr.image(2, 1, true, 300);
    sr.image(3, 2, false, 300);
    sr.write(1, &[(0, run(0, 4096), 1), (1, run(0, 4096), 1)]);
    sr.write(2, &[(299, run(0, 9), 2)]);
    sr.write(3, &[(150, run(7, 9), 3)]);
    let before = sr.read(3);
    sr.collect(Scope::Sr);
    assert!(sr.read(3) == before);
    assert_eq!(sr.volumes(), 1);
}

#[test]
fn zeros_over_nothing_are_not_kept() {
    let sr = Sr::new();
    sr.image(1, 0, true, 4);
    sr.image(2, 1, false, 4);
    sr.write(1, &[(0, run(0, 4096), 1)]);
    sr.write(2, &[(0, run(0, 4096), 0), (1, run(0, 4096), 0), (2, run(0, 8), 2)]);
    let before = sr.read(2);
    let report = sr.collect(Scope::Sr);
    assert!(sr.read(2) == before);
    assert_eq!(report.bytes_freed, 2 * BLOCK_BYTES);
    assert_eq!(sr.allocated(), 2 * BLOCK_BYTES);
}

#[test]
fn one_vdi_alone_and_a_broken_neighbour() {
    let sr = Sr::new();
    for tree in [10, 20, 30] {
        sr.image(tree, 0, true, 1);
        sr.image(tree + 1, tree, false, 1);
        sr.write(tree + 1, &[(0, run(0, 1), 7)]);
    }
    // A missing parent blocks only its own tree.
    std::fs::remove_file(sr.path().join(format!("{}.vhd", id(20)))).unwrap();
    let report = sr.collect(Scope::Vdi(id(11)));
    assert_eq!((report.leaf_coalesced, sr.depth(11)), (1, 1));
    let report = sr.collect(Scope::Sr);
    assert_eq!(sr.depth(31), 1);
    assert_eq!(report.failed, [], "a leaf alone is nothing to merge");
}

#[test]
fn a_disk_that_is_switched_off_keeps_its_leaf_until_it_is_switched_on() {
    let sr = Sr::new();
    sr.image(1, 0, true, 1);
    sr.image(2, 1, true, 1);
    sr.image(3, 2, false, 1);
    sr.image(11, 0, true, 1);
    sr.image(12, 11, false, 1);
    for leaf in [3, 12] {
        sr.write(leaf, &[(0, run(0, 1), 7)]);
    }
    let collector = Collector::new(sr.repo.clone(), Settings::default(), 0);
    collector.switch_off(BTreeSet::from([id(3)]));
    let predicted = collector.predict(Scope::Sr).unwrap();
    assert_eq!((predicted.coalesced, predicted.leaf_coalesced), (1, 1));
    let report = sr.collect_with(&collector, Scope::Sr);
    assert_eq!((report.coalesced, report.leaf_coalesced), (1, 1));
    assert_eq!((sr.depth(3), sr.depth(12)), (2, 1));
    let [failed] = report.failed.as_slice() else { panic!("{report:?}") };
    assert!(failed.uuid == id(3) && failed.reason.contains("gc resume"), "{failed:?}");

    let collector = Collector::new(sr.repo.clone(), Settings::default(), 0);
    assert_eq!(sr.collect_with(&collector, Scope::Sr).leaf_coalesced, 1);
    assert_eq!(sr.depth(3), 1);
}

#[test]
fn an_unreadable_image_stops_deletions_and_merges_with_its_reason() {
    let sr = Sr::new();
    sr.image(1, 0, true, 1);
    sr.image(2, 1, false, 1);
    std::fs::write(sr.path().join(format!("{}.vhd", id(9))), [7; 4096]).unwrap();
    let report = sr.collect(Scope::Sr);
    assert_eq!((report.leaf_coalesced, sr.depth(2)), (0, 2));
    assert_eq!(report.failed.len(), 1);
    assert!(report.failed[0].reason.contains(&id(9).to_string()), "{report:?}");
}

#[test]
fn an_unreadable_image_whose_parents_are_recorded_stops_only_its_tree() {
    let sr = Sr::new();
    for tree in [10, 20] {
        sr.image(tree, 0, true, 1);
        sr.image(tree + 1, tree, false, 1);
        sr.write(tree + 1, &[(0, run(0, 1), 7)]);
    }
    // A second child: the base is nobody's only parent.
    sr.image(12, 10, false, 1);
    // Older than the clock of any filesystem takes to tick.
    std::thread::sleep(std::time::Duration::from_millis(1300));
    sm::scan::scan(&sr.repo).unwrap();
    sr.repo.heads.note(&sr.repo).unwrap();
    // In place, as a disk rots: the file stays the same one.
    std::fs::write(sr.path().join(format!("{}.vhd", id(12))), [7; 4096]).unwrap();
    let report = sr.collect(Scope::Sr);
    assert_eq!((sr.depth(21), sr.depth(11)), (1, 2), "{report:?}");
    assert_eq!(report.leaf_coalesced, 1);
    assert!(sr.path().join(format!("{}.vhd", id(10))).exists());
}

/// A repository that says how much room it has.
#[derive(Debug)]
struct Tight(Arc<dyn Volumes>, u64);

impl Delegate for Tight {
    fn inner(&self) -> &dyn Volumes {
        self.0.as_ref()
    }
    fn space(&self) -> io::Result<Space> {
        Ok(Space { total: 1 << 40, free: self.1 })
    }
}

#[test]
fn short_of_space_it_goes_in_slices() {
    for free in [40 << 20, 1 << 20] {
        let mut sr = Sr::new();
        for (n, parent, hidden) in [(1, 0, true), (2, 1, true), (3, 2, true), (4, 3, false), (5, 3, false)] {
            sr.image(n, parent, hidden, 60);
        }
        let all = |first: u32, step: usize, value: u8| -> Vec<_> {
            (first..60).step_by(step).map(|block| (block, SectorRun::BLOCK, value)).collect()
        };
        sr.write(1, &all(0, 7, 1));
        sr.write(2, &all(0, 2, 2));
        sr.write(3, &all(1, 3, 3));
        sr.repo.volumes = Arc::new(Via(Tight(sr.repo.volumes.clone(), free)));
        let before = [sr.read(4), sr.read(5)];
        let report = sr.collect(Scope::Sr);
        assert!([sr.read(4), sr.read(5)] == before);
        if free > 32 << 20 {
            assert_eq!((report.coalesced, sr.volumes()), (2, 3));
            assert!(report.peak_extra_bytes <= 32 << 20, "{report:?}");
        } else {
            assert!(report.failed[0].reason.contains("no space"), "{report:?}");
        }
    }
}

/// A small generator, so that a failure is repeated by its seed alone.
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 33) % n
    }
}

#[test]
fn any_forest_reads_the_same_and_the_prediction_comes_true() {
    for seed in 1..8_u64 {
        let mut random = Random(0x9E37_79B9_7F4A_7C15 ^ (seed << 20));
        let sr = Sr::new();
        let count = 3 + random.below(10);
        let mut sizes: BTreeMap<u128, u64> = BTreeMap::new();
        let parents: Vec<u128> = (1..=count).map(|n| u128::from(random.below(n))).collect();
        for (n, parent) in (1..).zip(&parents) {
            let blocks = sizes.get(parent).copied().unwrap_or(3) + random.below(2);
            sizes.insert(n, blocks);
            let hidden = parents.contains(&n) || random.below(4) == 0;
            sr.image(n, *parent, hidden, blocks);
            let writes: Vec<_> = (0..random.below(5))
                .map(|_| {
                    let first = random.below(256) as u32 * 16;
                    let sectors = (1 + random.below(64) as u32 * 8).min(4096 - first);
                    let run = if random.below(3) == 0 { SectorRun::BLOCK } else { run(first, sectors) };
                    (random.below(blocks) as u32, run, random.below(3) as u8)
                })
                .collect();
            sr.write(n, &writes);
        }
        let visible: Vec<u128> = (1..=u128::from(count))
            .filter(|n| !image::meta(&sr.repo, &VolumeName::vhd(id(*n))).unwrap().hidden())
            .collect();
        let before: Vec<_> = visible.iter().map(|n| sr.read(*n)).collect();
        let report = sr.collect(Scope::Sr);
        for (n, bytes) in visible.iter().zip(&before) {
            assert!(sr.read(*n) == *bytes, "seed {seed}: {n} reads differently");
        }
        assert_eq!(report.failed, [], "seed {seed}");
        let again = sr.collect(Scope::Sr);
        assert_eq!((again.coalesced, again.leaf_coalesced, again.deleted), (0, 0, 0), "seed {seed}");
    }
}

#[test]
fn the_service_follows_attached_srs_and_answers() {
    let sr = Sr::new();
    sr.image(1, 0, true, 1);
    sr.image(2, 1, false, 1);
    let record = AttachedSr::file(&sr.run, sr.attached.uuid);
    sm::state::write_json(&record, &sr.attached).unwrap();
    let service =
        gc::service::Service::new(sr.run.parent().unwrap(), &sr.run, gc::limits::LOOK_EVERY).unwrap();
    let attending = Arc::clone(&service);
    let thread = std::thread::spawn(move || attending.attend());
    let found = service.collectors_now(Some(sr.attached.uuid)).unwrap();
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].1.collect(Scope::Sr).unwrap().failed, []);
    assert_eq!(sr.depth(2), 1);
    drop(found);

    std::fs::remove_file(&record).unwrap();
    service.kick(None);
    let begun = std::time::Instant::now();
    while !service.collectors(None).is_empty() {
        assert!(begun.elapsed().as_secs() < 20, "the detached SR keeps its collector");
        std::thread::yield_now();
    }
    service.close();
    thread.join().unwrap();
}
