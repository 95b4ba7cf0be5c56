//! Content receipts of merges of detached trees on real files: what they say
//! when all is well, when somebody was there in between, and when a merge was
//! followed by damage.

#![allow(clippy::unwrap_used, reason = "helpers of tests are not test functions")]

mod support;

use std::fmt;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use gc::collector::{Collector, Scope};
use gc::plan::Settings;
use gc::progress::{Done, Kind};
use gc::receipt::{DiskReceipt, Found, Verdict};
use gc::report::Report;
use sm::Repo;
use vhd::chain::{Chain, Owner};
use vhd::storage::via::{Delegate, Via};
use vhd::storage::{VolumeName, Volumes};
use vhd::units::{BLOCK_BYTES, BlockNo, SectorRun};

use support::{Sr, id, run};

type Act = Box<dyn FnOnce() + Send>;

/// Volumes on which something happens once a merge has cleared its record:
/// between the two readings of its receipt.
struct Between {
    inner: Arc<dyn Volumes>,
    act: Mutex<Option<Act>>,
}

impl fmt::Debug for Between {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Between")
    }
}

impl Delegate for Between {
    fn inner(&self) -> &dyn Volumes {
        self.inner.as_ref()
    }

    fn record_deleted(&self, _name: &str) {
        let act = self.act.lock().unwrap().take();
        act.into_iter().for_each(|act| act());
    }
}

/// The repository, and what happens in it after the first merge.
fn between(sr: &Sr, act: impl FnOnce() + Send + 'static) -> Repo {
    let act = Mutex::new(Some(Box::new(act) as Act));
    let volumes = Arc::new(Via(Between { inner: sr.repo.volumes.clone(), act }));
    Repo { volumes, ..sr.repo.clone() }
}

/// 1 - 2 -+- 3 (leaf)
///        +- 4 (leaf)     Inner merge of 2 into 1; nothing else to do.
fn forked() -> Sr {
    let sr = Sr::new();
    for (n, parent, hidden) in [(1, 0, true), (2, 1, true), (3, 2, false), (4, 2, false)] {
        sr.image(n, parent, hidden, 6);
    }
    sr.write(1, &[(0, SectorRun::BLOCK, 1), (1, run(8, 8), 1), (4, SectorRun::BLOCK, 0)]);
    sr.write(2, &[(1, run(0, 16), 2), (5, run(0, 4096), 2)]);
    sr.write(3, &[(2, run(5, 1), 3)]);
    sr
}

fn collector(repo: Repo) -> Arc<Collector> {
    let collector = Collector::new(repo, Settings::default(), 0);
    collector.state().settings.receipts = true;
    collector
}

/// Collects everything; the report and the merges.
fn collect(sr: &Sr, repo: Repo) -> (Report, Vec<Done>, Arc<Collector>) {
    let collector = collector(repo);
    let report = sr.collect_with(&collector, Scope::Sr);
    let done = collector.state().done.iter().filter(|done| done.kind != Kind::Delete).cloned().collect();
    (report, done, collector)
}

fn disk(done: &Done, n: u128) -> DiskReceipt {
    let receipt = done.receipt.as_ref().unwrap();
    receipt.disks.iter().find(|disk| disk.vdi == id(n)).unwrap().clone()
}

fn same(done: &Done, n: u128) -> Found {
    match disk(done, n).verdict {
        Verdict::Same(found) => found,
        other => panic!("{n}: {other:?}"),
    }
}

fn void(done: &Done, n: u128) -> String {
    match disk(done, n).verdict {
        Verdict::Void { reason } => reason,
        other => panic!("{n}: {other:?}"),
    }
}

/// Changes one byte of a block as a disk reads it, in whatever file it lies.
fn damage(volumes: &dyn Volumes, folder: PathBuf, n: u128, block: u32) {
    let chain = Chain::open(volumes, &VolumeName::vhd(id(n))).unwrap();
    let (run, node, slot) = chain
        .owners(BlockNo(block))
        .unwrap()
        .into_iter()
        .find_map(|part| match part.owner {
            Owner::Node { node, slot } => Some((part.run, node, slot)),
            Owner::Zero => None,
        })
        .unwrap();
    let node = chain.map().node(node).unwrap();
    let at = node.data_offset(BlockNo(block), slot, run.first) + 77;
    let file = std::fs::File::options().read(true).write(true).open(folder.join(node.name.as_str())).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
}

#[test]
fn every_disk_on_a_merge_has_its_receipt_and_its_hashes_are_kept() {
    let sr = Sr::new();
    for (n, parent, hidden) in [(1, 0, true), (2, 1, true), (3, 2, false)] {
        sr.image(n, parent, hidden, 6);
    }
    sr.write(1, &[(0, SectorRun::BLOCK, 1), (4, SectorRun::BLOCK, 0)]);
    sr.write(2, &[(5, run(0, 4096), 2)]);
    sr.write(3, &[(5, run(7, 9), 3)]);
    let (report, done, collector) = collect(&sr, sr.repo.clone());
    assert_eq!((&report.failed, sr.volumes()), (&vec![], 1));
    let predicted = report.predicted.unwrap().receipt_bytes_read;
    assert!(report.receipt_bytes_read > 0 && report.receipt_bytes_read <= predicted, "{predicted}");
    let kinds: Vec<Kind> = done.iter().map(|done| done.kind).collect();
    assert_eq!(kinds, [Kind::Inner, Kind::Leaf]);
    let mut sums = Vec::new();
    for job in &done {
        let found = same(job, 3);
        assert_eq!((found.blocks, found.matched, found.written, found.different), (6, 6, 0, 0));
        let receipt = job.receipt.as_ref().unwrap();
        // Blocks 0, 4 and 5, twice; what is nowhere is not read.
        assert!(
            receipt.bytes_read <= 6 * BLOCK_BYTES && receipt.bytes_read >= 5 * BLOCK_BYTES,
            "{receipt:?}"
        );
        let [before, after] = disk(job, 3).sha256.unwrap();
        assert_eq!(before, after);
        sums.push(before);
        let papers = sr.repo.labels.papers(&job.job).unwrap();
        let paper: serde_json::Value = serde_json::from_str(&papers[0]).unwrap();
        assert_eq!((papers.len(), &paper["hash"]), (1, &"sha256".into()), "{paper}");
        let blocks: Vec<u64> =
            paper["before"].as_array().unwrap().iter().map(|entry| entry[0].as_u64().unwrap()).collect();
        assert_eq!(blocks, [0, 5], "zeros that are stored are zeros");
        assert_eq!(paper["unequal_after"], serde_json::json!([]));
    }
    assert_eq!(sums[0], sums[1], "the same disk before either merge");
    let totals = collector.state().receipt_totals;
    assert_eq!((totals.matched, totals.different, totals.void), (12, 0, 0));
}

#[test]
fn without_receipts_nothing_is_read() {
    let sr = forked();
    let collector = Collector::new(sr.repo.clone(), Settings::default(), 0);
    sr.collect_with(&collector, Scope::Sr);
    assert!(collector.state().done.iter().all(|done| done.receipt.is_none()));
}

#[test]
fn a_changed_byte_is_an_alarm_and_the_tree_waits_for_a_person() {
    let sr = Sr::new();
    // 1 - 2 - 3 (leaf): an inner merge, then a leaf merge.
    for (n, parent, hidden) in [(1, 0, true), (2, 1, true), (3, 2, false)] {
        sr.image(n, parent, hidden, 6);
    }
    sr.write(1, &[(0, SectorRun::BLOCK, 1), (2, run(8, 8), 1)]);
    sr.write(2, &[(1, run(0, 16), 2)]);
    let (volumes, folder) = (sr.repo.volumes.clone(), sr.path().to_owned());
    let repo = between(&sr, move || damage(volumes.as_ref(), folder, 3, 2));
    let (report, done, first) = collect(&sr, repo);
    let [job] = &done[..] else { panic!("{done:?}") };
    let Verdict::Different(found) = disk(job, 3).verdict else { panic!("{job:?}") };
    assert_eq!((found.matched, found.different, found.different_blocks), (5, 1, vec![2]));
    let error = job.error.as_deref().unwrap();
    assert!(error.contains(&id(3).to_string()) && error.contains("1 of 6 blocks"), "{error}");
    assert!(error.contains("gc acknowledge"), "{error}");
    assert!(report.failed.iter().any(|failed| failed.uuid == id(3)), "{report:?}");
    assert_eq!(sr.depth(3), 2, "the leaf merge waits");
    assert_eq!(first.state().receipt_totals.different, 1);
    let waits = first.state().waits.get(&id(3)).unwrap().clone();
    assert!(waits.is_blocked() && waits.to_string().contains(&job.job), "{waits}");

    // Neither asking again nor another collector forgets it; other trees go on.
    sr.image(21, 0, true, 6);
    sr.image(22, 21, false, 6);
    sr.write(22, &[(1, run(0, 16), 2)]);
    let (report, done, second) = collect(&sr, sr.repo.clone());
    assert_eq!((sr.depth(3), sr.depth(22), done.len()), (2, 1, 1), "{report:?}");
    assert!(second.predict(Scope::Sr).unwrap().leaf_coalesced == 0);
    assert_eq!(second.acknowledge(Some("another")).unwrap(), Vec::<String>::new());
    assert_eq!(second.acknowledge(None).unwrap(), std::slice::from_ref(&job.job));
    assert_eq!(sr.repo.labels.alarms().unwrap(), []);

    // A person has said so: it is collected, and compared with what it is now.
    let (report, done, _) = collect(&sr, sr.repo.clone());
    assert_eq!((report.failed, sr.depth(3)), (vec![], 1));
    assert_eq!(same(&done[0], 3).matched, 6);
}

#[test]
fn damage_to_what_one_of_two_disks_reads_names_that_one() {
    let sr = forked();
    let (volumes, folder) = (sr.repo.volumes.clone(), sr.path().to_owned());
    let repo = between(&sr, move || damage(volumes.as_ref(), folder, 3, 2));
    let (report, done, _) = collect(&sr, repo);
    let Verdict::Different(found) = disk(&done[0], 3).verdict else { panic!("{done:?}") };
    assert_eq!(found.different_blocks, [2]);
    assert_eq!(same(&done[0], 4).matched, 6);
    let named: Vec<_> = report.failed.iter().map(|failed| failed.uuid).collect();
    assert_eq!(named, [id(3)]);
}

#[test]
fn a_disk_that_cannot_be_read_any_more_is_an_alarm_too() {
    let sr = forked();
    let base = sr.path().join(format!("{}.vhd", id(1)));
    let (_, done, collector) = collect(&sr, between(&sr, move || std::fs::remove_file(base).unwrap()));
    for n in [3, 4] {
        assert!(matches!(disk(&done[0], n).verdict, Verdict::Unreadable { .. }), "{done:?}");
    }
    assert!(done[0].error.as_deref().unwrap().contains("cannot be read any more"), "{done:?}");
    assert_eq!(collector.state().alarms.len(), 1);
}

#[test]
fn what_could_be_written_or_is_gone_in_between_is_void_and_alarms_nobody() {
    // As every attach for writing, resize and revert does first. The byte
    // stands for what a guest may have written then.
    let sr = forked();
    let (repo, folder) = (sr.repo.clone(), sr.path().to_owned());
    let act = move || {
        sm::identity::forget(&repo, id(3)).unwrap();
        damage(repo.volumes.as_ref(), folder, 3, 2);
    };
    let (report, done, _) = collect(&sr, between(&sr, act));
    assert!(void(&done[0], 3).contains("between the readings"), "{done:?}");
    assert_eq!((same(&done[0], 4).matched, done[0].error.clone(), report.failed), (6, None, vec![]));

    let sr = forked();
    let repo = sr.repo.clone();
    let act = move || {
        sm::ops::delete(&repo, id(3)).unwrap();
    };
    let (_, done, _) = collect(&sr, between(&sr, act));
    assert!(void(&done[0], 3).contains(&id(3).to_string()), "{done:?}");

    let sr = forked();
    let repo = sr.repo.clone();
    let act = move || {
        sm::ops::resize(&repo, id(3), 20 * BLOCK_BYTES).unwrap();
    };
    let (_, done, _) = collect(&sr, between(&sr, act));
    assert!(void(&done[0], 3).contains("resized"), "{done:?}");
    assert_eq!(same(&done[0], 4).matched, 6);
}
