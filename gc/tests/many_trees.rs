//! Many trees at once: they merge beside each other, and one that is broken
//! inside holds up nobody but itself.

#![allow(clippy::unwrap_used, reason = "helpers of tests are not test functions")]

mod support;

use std::io::{Seek, SeekFrom, Write};

use gc::collector::{Collector, Scope};
use gc::plan::Settings;
use support::{Sr, id, run};

const TREES: u128 = 100;
/// The tree whose base has a block table that cannot be right.
const BROKEN: u128 = 42;

/// base - middle - leaf, and every tenth has garbage on its base.
fn tree(sr: &Sr, n: u128) -> u128 {
    let base = 1000 * n;
    sr.image(base, 0, true, 3);
    sr.image(base + 1, base, true, 3);
    sr.image(base + 2, base + 1, false, 3);
    sr.write(base, &[(0, run(0, 64), 1)]);
    sr.write(base + 1, &[(0, run(32, 64), 2), (1, run(0, 8), 2)]);
    sr.write(base + 2, &[(2, run(0, 8), n as u8)]);
    if n.is_multiple_of(10) {
        sr.image(base + 3, base, true, 3);
    }
    base + 2
}

/// The first entry of an image's block table leads into its headers.
fn break_table(sr: &Sr, n: u128) {
    let path = sr.path().join(format!("{}.vhd", id(n)));
    let bytes = std::fs::read(&path).unwrap();
    let table = u64::from_be_bytes(bytes[512 + 16..512 + 24].try_into().unwrap());
    let mut file = std::fs::File::options().write(true).open(&path).unwrap();
    file.seek(SeekFrom::Start(table)).unwrap();
    file.write_all(&1_u32.to_be_bytes()).unwrap();
}

#[test]
fn a_hundred_trees_merge_around_a_broken_one() {
    let sr = Sr::new();
    let leaves: Vec<u128> = (1..=TREES).map(|n| tree(&sr, n)).collect();
    let before: Vec<Vec<u8>> = leaves.iter().map(|leaf| sr.read(*leaf)).collect();
    break_table(&sr, 1000 * BROKEN);

    let settings = Settings { parallel: 8, ..Settings::default() };
    let collector = Collector::new(sr.repo.clone(), settings, 0);
    let predicted = collector.predict(Scope::Sr).unwrap();
    let report = sr.collect_with(&collector, Scope::Sr);
    let whole = TREES as u64 - 1;
    for figures in [&predicted, &report] {
        assert_eq!((figures.coalesced, figures.leaf_coalesced), (whole, whole), "{figures:?}");
        assert_eq!(figures.deleted, 10, "{figures:?}");
        assert_eq!(figures.failed.len(), 1, "only the broken tree: {:?}", figures.failed);
        let failed = &figures.failed[0];
        assert_eq!(failed.uuid, id(1000 * BROKEN + 1), "{failed:?}");
        assert!(failed.reason.contains("BAT"), "its reason: {failed:?}");
    }
    assert_eq!(predicted.bytes_freed, report.bytes_freed);
    assert!(predicted.bytes_copied >= report.bytes_copied);
    for (leaf, before) in leaves.iter().zip(&before).filter(|(leaf, _)| **leaf / 1000 != BROKEN) {
        assert_eq!(sr.depth(*leaf), 1, "tree {}", leaf / 1000);
        assert!(sr.read(*leaf) == *before, "tree {} reads otherwise", leaf / 1000);
    }
    let done = &collector.state().done;
    let beside = done
        .iter()
        .any(|a| done.iter().any(|b| a.job != b.job && a.began_ms <= b.began_ms && b.began_ms < a.ended_ms));
    assert!(beside, "no two merges ran at one time");
}
