//! An SR as the reference leaves it when its merges are interrupted, each way
//! there is: explained without changing a byte, then put right and collected.

#![allow(clippy::unwrap_used, reason = "helpers of tests are not test functions")]

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use gc::collector::Scope;
use uuid::Uuid;
use vhd::storage::{Fs, PosixFs};
use vhd::units::SectorRun;

use support::{Sr, id, run};

/// Every file with its bytes, the dot folder's too.
fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut all = BTreeMap::new();
    for entry in std::fs::read_dir(folder).unwrap().flatten() {
        let name = entry.file_name().into_string().unwrap();
        if entry.file_type().unwrap().is_dir() {
            let within = files(&entry.path());
            all.extend(within.into_iter().map(|(inner, bytes)| (format!("{name}/{inner}"), bytes)));
        } else {
            all.insert(name, std::fs::read(entry.path()).unwrap());
        }
    }
    all
}

const ALL: SectorRun = SectorRun { first: 0, count: 4096 };

/// A hidden node with a leaf on it, each with something of its own.
fn pair(sr: &Sr, parent: u128, leaf: u128) {
    sr.image(parent, 0, true, 3);
    sr.image(leaf, parent, false, 3);
    sr.write(parent, &[(0, ALL, parent as u8), (1, run(8, 16), parent as u8)]);
    sr.write(leaf, &[(1, run(0, 12), leaf as u8), (2, run(5, 5), leaf as u8)]);
}

/// A hidden node between: P - N - leaf.
fn three(sr: &Sr, p: u128, n: u128, leaf: u128) {
    sr.image(p, 0, true, 3);
    sr.image(n, p, true, 3);
    sr.image(leaf, n, false, 3);
    sr.write(p, &[(0, ALL, p as u8)]);
    sr.write(n, &[(1, run(0, 99), n as u8)]);
    sr.write(leaf, &[(2, run(7, 7), leaf as u8)]);
}

struct Folder<'a>(&'a Path);

impl Folder<'_> {
    fn image(&self, n: u128) -> std::path::PathBuf {
        self.0.join(format!("{}.vhd", id(n)))
    }

    fn old(&self, n: u128) -> std::path::PathBuf {
        self.0.join(format!("OLD_{}.vhd", id(n)))
    }

    fn note(&self, name: String, text: &str) {
        std::fs::write(self.0.join(name), text).unwrap();
    }
}

/// Makes every leftover of the crash table; returns the disks.
fn forge(sr: &Sr) -> Vec<u128> {
    let folder = Folder(sr.path());
    // During an inner merge.
    three(sr, 10, 11, 12);
    folder.note(format!("coalesce_{}", id(11)), "1");
    // Merged, and one of two children moved.
    three(sr, 20, 21, 22);
    sr.write(20, &[(1, run(0, 99), 21)]);
    sr.image(23, 20, false, 3);
    folder.note(format!("relink_{}", id(21)), "1");
    // All children moved.
    sr.image(30, 0, true, 3);
    sr.image(31, 30, true, 3);
    sr.image(32, 30, false, 3);
    sr.write(30, &[(0, ALL, 30)]);
    sr.write(31, &[(0, run(0, 9), 30)]);
    folder.note(format!("relink_{}", id(31)), "1");
    // A leaf merge before its renames, between them, and after both.
    pair(sr, 40, 41);
    folder.note(format!("leaf_{}", id(41)), &id(40).to_string());
    pair(sr, 50, 51);
    folder.note(format!("leaf_{}", id(51)), &id(50).to_string());
    std::fs::rename(folder.image(51), folder.old(51)).unwrap();
    pair(sr, 60, 61);
    folder.note(format!("leaf_{}", id(61)), &id(60).to_string());
    std::fs::rename(folder.image(61), folder.old(61)).unwrap();
    std::fs::rename(folder.image(60), folder.image(61)).unwrap();
    // Done, but for its old leaf.
    sr.image(70, 0, false, 3);
    sr.image(71, 70, true, 3);
    sr.write(70, &[(0, ALL, 70)]);
    std::fs::rename(folder.image(71), folder.old(71)).unwrap();
    std::fs::rename(folder.image(70), folder.image(71)).unwrap();
    // A journal that its crash left empty.
    pair(sr, 80, 81);
    folder.note(format!("leaf_{}", id(81)), "");
    // A resize that had not begun, and what is none of our business.
    sr.image(100, 0, false, 3);
    folder.note(format!(".journal-{}", id(100)), "");
    folder.note(format!("{}.cbtlog", id(100)), "log");
    vec![12, 22, 23, 32, 41, 51, 61, 71, 81, 100]
}

/// What each disk reads, its images under the names they had before.
fn contents(sr: &Sr, disks: &[u128]) -> BTreeMap<u128, Vec<u8>> {
    disks.iter().map(|n| (*n, sr.read(*n))).collect()
}

#[test]
fn interrupted_merges_are_explained_then_put_right() {
    // The same without leftovers tells what every disk must read.
    let whole = Sr::new();
    for (p, n, leaf) in [(10, 11, 12), (20, 21, 22)] {
        three(&whole, p, n, leaf);
    }
    let sr = Sr::new();
    let disks = forge(&sr);
    let before = files(sr.path());

    let looked = sm::offline::look(sr.path(), sr.repo.uuid, "theirs");
    let fs = PosixFs::new(sr.path().to_owned());
    let report = sm::check::check(&looked, &fs).unwrap();
    let explained: BTreeSet<&str> = report.leftovers.iter().map(|remark| remark.what.as_str()).collect();
    let forged =
        before.keys().filter(|name| !name.contains('/') && { sm::reference::Leftover::of(name).is_some() });
    assert!(forged.clone().count() >= 11);
    for name in forged {
        assert!(explained.contains(name.as_str()), "{name} is not explained: {explained:?}");
    }
    let predicted = gc::offline::predict(sr.path(), sr.repo.uuid, "theirs").unwrap();
    assert!(files(sr.path()) == before, "looking changed something");
    let named: BTreeSet<Uuid> = predicted.failed.iter().map(|failed| failed.uuid).collect();
    for n in [21, 31, 41, 51, 61, 71, 81, 100] {
        let failed = predicted.failed.iter().find(|failed| failed.uuid == id(n));
        assert!(failed.is_some_and(|failed| failed.reason.contains(&id(n).to_string())), "{n}: {named:?}");
    }
    // Only the merge that had merely begun is as good as any other; nothing
    // that something half done is about is counted.
    assert_eq!((predicted.coalesced, predicted.leaf_coalesced, predicted.deleted), (1, 1, 0));

    for repaired in sm::reference::repair(&sr.repo, &fs).unwrap() {
        assert!(repaired.outcome.is_ok(), "{repaired:?}");
    }
    let held = contents(&sr, &disks);
    assert!(held[&12] == whole.read(12) && held[&22] == whole.read(22), "a repair changed a disk");
    for n in [41, 51, 61, 81] {
        let other = Sr::new();
        pair(&other, n - 1, n);
        assert!(held[&n] == other.read(n), "{n} is not what it was before its merge");
    }
    let collector = gc::collector::Collector::new(sr.repo.clone(), gc::plan::Settings::default(), 0);
    let report = sr.collect_with(&collector, Scope::Sr);
    assert_eq!(report.failed, []);
    assert!(contents(&sr, &disks) == held, "collecting changed a disk");
    for n in [12, 32, 41, 51, 61, 71, 81, 100] {
        assert_eq!(sr.depth(n), 1, "{n}");
    }
    let left: Vec<String> = fs.list("").unwrap().into_iter().filter(|name| !name.ends_with(".vhd")).collect();
    assert_eq!(left, [format!("{}.cbtlog", id(100))]);
}
