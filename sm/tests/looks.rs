//! Map, changed and stat, over a folder on disk.

#![allow(clippy::unwrap_used, reason = "a helper of tests fails by panicking")]

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use sm::journal::SiblingKind;
use sm::ops::{self, ChangedRange, MapExtent, Wanted};
use sm::{Repo, image};
use support::folder::{Sr, sr};
use support::{FakeHost, fill, repo};
use uuid::Uuid;
use vhd::storage::sim::SimDisk;
use vhd::storage::via::{Delegate, Via};
use vhd::storage::{VolumeName, Volumes};
use vhd::units::BLOCK_BYTES;

fn disk(sr: &Sr, blocks: u64) -> Uuid {
    ops::create(&sr.repo, "disk", blocks * BLOCK_BYTES).unwrap()
}

fn sibling(sr: &Sr, kind: SiblingKind, vdi: Uuid) -> Uuid {
    ops::snapshot(&sr.repo, kind, &[Wanted { vdi, name: "sibling".into() }]).unwrap()[0]
}

fn changed(sr: &Sr, vdi: Uuid, since: Uuid) -> Vec<(u64, u64)> {
    let mut all: Vec<ChangedRange> = Vec::new();
    let mut from = Some(0);
    while let Some(at) = from {
        let part = ops::changed(&sr.repo, vdi, since, at).unwrap();
        all.extend(part.ranges);
        from = part.next;
    }
    all.into_iter().map(|range| (range.offset, range.length)).collect()
}

fn mapped(sr: &Sr, vdi: Uuid) -> Vec<MapExtent> {
    let mut all = Vec::new();
    let mut from = Some(0);
    while let Some(at) = from {
        let part = ops::map(&sr.repo, vdi, at, None).unwrap();
        all.extend(part.extents);
        from = part.next;
    }
    all
}

/// What [`fill`] writes over an ancestor's data.
const WRITTEN: u64 = 4096;

#[test]
fn siblings_differ_in_what_either_has_and_are_told_so_attached_too() {
    for attached in [false, true] {
        let sr = sr();
        let vdi = disk(&sr, 4);
        for block in 0..3 {
            fill(&sr.repo, vdi, block, 0x11);
        }
        let clone = sibling(&sr, SiblingKind::Clone, vdi);
        let snapshot = sibling(&sr, SiblingKind::Snapshot, vdi);
        assert_eq!(changed(&sr, vdi, clone), []);
        fill(&sr.repo, vdi, 0, 0x22);
        fill(&sr.repo, clone, 1, 0x33);
        if attached {
            ops::attach(&sr.repo, vdi, false).unwrap();
            ops::attach(&sr.repo, clone, false).unwrap();
        }
        let (first, second) = ((0, WRITTEN), (BLOCK_BYTES, WRITTEN));
        assert_eq!(changed(&sr, vdi, clone), [first, second], "{attached}");
        assert_eq!(changed(&sr, clone, vdi), [first, second]);
        assert_eq!(changed(&sr, vdi, snapshot), [first]);
        assert_eq!(changed(&sr, vdi, vdi), []);
        let heard = sr.host.heard.lock().unwrap().iter().any(|word| *word == "Extents");
        assert_eq!(heard, attached, "an attached leaf is only asked for");
        let readers = sr.host.leases.lock().unwrap().len();
        assert_eq!(readers, if attached { 2 } else { 0 }, "leases end with the answer");
    }
}

#[test]
fn what_a_disk_has_grown_by_counts_against_zeros() {
    let sr = sr();
    let vdi = disk(&sr, 2);
    fill(&sr.repo, vdi, 0, 0x11);
    let snapshot = sibling(&sr, SiblingKind::Snapshot, vdi);
    ops::resize(&sr.repo, vdi, 4 * BLOCK_BYTES).unwrap();
    assert_eq!(changed(&sr, vdi, snapshot), []);
    fill(&sr.repo, vdi, 3, 0x22);
    assert_eq!(changed(&sr, vdi, snapshot), [(3 * BLOCK_BYTES, WRITTEN)]);
    ops::attach(&sr.repo, vdi, false).unwrap();
    assert_eq!(changed(&sr, vdi, snapshot), [(3 * BLOCK_BYTES, WRITTEN)]);
    assert_eq!(changed(&sr, snapshot, vdi), [], "past its own end nothing is listed");
}

#[test]
fn a_map_names_the_node_and_the_place_of_every_byte() {
    for attached in [false, true] {
        let sr = sr();
        let vdi = disk(&sr, 3);
        fill(&sr.repo, vdi, 0, 0x11);
        sibling(&sr, SiblingKind::Snapshot, vdi);
        fill(&sr.repo, vdi, 0, 0x22);
        fill(&sr.repo, vdi, 2, 0x33);
        if attached {
            ops::attach(&sr.repo, vdi, false).unwrap();
        }
        let map = mapped(&sr, vdi);
        let base = sm::chain::read(&sr.repo, vdi).unwrap()[1].volume.clone();
        let brief = |e: &MapExtent| (e.offset, e.length, e.depth, e.node);
        assert_eq!(
            map.iter().map(brief).collect::<Vec<_>>(),
            [
                (0, WRITTEN, 1, Some(vdi)),
                (WRITTEN, BLOCK_BYTES - WRITTEN, 2, base.uuid()),
                (BLOCK_BYTES, BLOCK_BYTES, 0, None),
                (2 * BLOCK_BYTES, WRITTEN, 1, Some(vdi)),
                (2 * BLOCK_BYTES + WRITTEN, BLOCK_BYTES - WRITTEN, 0, None),
            ]
        );
        for (extent, byte) in [(&map[0], 0x22), (&map[3], 0x33)] {
            let name = VolumeName::new(extent.volume.as_ref().unwrap()).unwrap();
            let volume = image::open(&sr.repo, &name, vhd::storage::Access::Read).unwrap();
            let mut read = [0; 512];
            volume.read_at(&mut read, extent.file_offset.unwrap()).unwrap();
            assert_eq!(read, [byte; 512]);
        }
        let part = ops::map(&sr.repo, vdi, WRITTEN + 100, Some(1000)).unwrap();
        assert_eq!(part.next, None);
        assert_eq!(brief(&part.extents[0]), (WRITTEN + 100, 1000, 2, base.uuid()));
        let whole = map[1].file_offset.unwrap();
        assert_eq!(part.extents[0].file_offset, Some(whole + 100));
        for (offset, length) in [(3 * BLOCK_BYTES, None), (0, Some(4 * BLOCK_BYTES)), (1, Some(u64::MAX))] {
            let refused = ops::map(&sr.repo, vdi, offset, length).unwrap_err();
            assert_eq!(refused.code(), "BAD_SIZE", "{offset} {length:?}");
        }
        let hidden = base.uuid().unwrap();
        assert_eq!(ops::map(&sr.repo, hidden, 0, None).unwrap().extents[0].node, Some(hidden));
    }
}

#[test]
fn a_stat_tells_what_is_shared_and_what_would_come_free() {
    for attached in [false, true] {
        let sr = sr();
        let vdi = disk(&sr, 8);
        for block in 0..3 {
            fill(&sr.repo, vdi, block, 0x11);
        }
        let snapshot = sibling(&sr, SiblingKind::Snapshot, vdi);
        for block in 2..5 {
            fill(&sr.repo, vdi, block, 0x22);
        }
        if attached {
            ops::attach(&sr.repo, vdi, false).unwrap();
        }
        let mib2 = |blocks: u64| blocks * BLOCK_BYTES;
        let stat = ops::stat(&sr.repo, vdi).unwrap();
        assert_eq!((stat.own_bytes, stat.shared_bytes, stat.chain_bytes), (mib2(3), mib2(3), mib2(6)));
        assert_eq!((stat.freed_if_deleted_bytes, stat.reclaimable_bytes), (mib2(3), 0));
        let of_snapshot = ops::stat(&sr.repo, snapshot).unwrap();
        assert_eq!(of_snapshot.freed_if_deleted_bytes, 0);
        // The leaf has block 2 again, so one of the two goes when it merges.
        assert_eq!(of_snapshot.freed_by_merge_then_bytes, mib2(1));
        ops::delete(&sr.repo, snapshot).unwrap();
        let stat = ops::stat(&sr.repo, vdi).unwrap();
        assert_eq!((stat.shared_bytes, stat.reclaimable_bytes), (0, mib2(1)));
        assert_eq!(stat.freed_if_deleted_bytes, mib2(6));
        assert_eq!(stat.chain.iter().map(|node| node.children).collect::<Vec<_>>(), [0, 1]);
        assert_eq!(ops::stat(&sr.repo, Uuid::from_u128(77)).unwrap_err().code(), "NOT_FOUND");
    }
}

/// A disk with a snapshot, on volumes a test can stand in front of.
struct Simulated {
    host: FakeHost,
    inner: Arc<dyn Volumes>,
    plain: Repo,
    vdi: Uuid,
    sibling: Uuid,
}

impl Simulated {
    fn new() -> Self {
        let disk = SimDisk::new();
        let host = FakeHost::new(disk.new_process().volumes());
        let inner = disk.new_process().volumes();
        let plain = repo(Arc::clone(&inner), &host, 1);
        let vdi = ops::create(&plain, "disk", 4 * BLOCK_BYTES).unwrap();
        fill(&plain, vdi, 0, 1);
        let wanted = [Wanted { vdi, name: "sibling".into() }];
        let sibling = ops::snapshot(&plain, SiblingKind::Snapshot, &wanted).unwrap()[0];
        Self { host, inner, plain, vdi, sibling }
    }
}

/// Takes an image away as it is being opened.
#[derive(Debug)]
struct MergedAway {
    inner: Arc<dyn Volumes>,
    name: VolumeName,
    /// How often it was opened.
    opened: Arc<AtomicU32>,
    /// At which opening it goes.
    at: Arc<AtomicU32>,
}

impl Delegate for MergedAway {
    fn inner(&self) -> &dyn Volumes {
        self.inner.as_ref()
    }
    fn opening(&self, name: &VolumeName) {
        if *name == self.name
            && self.opened.fetch_add(1, Ordering::Relaxed) + 1 == self.at.load(Ordering::Relaxed)
        {
            self.inner.delete(name).unwrap();
        }
    }
}

#[test]
fn an_image_merged_away_meanwhile_only_begins_the_figures_anew() {
    let Simulated { host, inner, plain: _, vdi, sibling } = Simulated::new();
    let (opened, at) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicU32::new(u32::MAX)));
    let away = MergedAway {
        inner,
        name: VolumeName::vhd(sibling),
        opened: Arc::clone(&opened),
        at: Arc::clone(&at),
    };
    let over = repo(Arc::new(Via(away)), &host, 2);
    let with_sibling = ops::stat(&over, vdi).unwrap();
    // The last opening is that of the figures, after the scan's.
    let openings = opened.swap(0, Ordering::Relaxed);
    assert!(openings >= 2, "{openings}");
    at.store(openings, Ordering::Relaxed);
    let without = ops::stat(&over, vdi).unwrap();
    assert_eq!((with_sibling.chain[1].children, without.chain[1].children), (2, 1));
}

/// Gives the parent the leaf's name as soon as somebody looks for the parent.
#[derive(Debug)]
struct Committed {
    inner: Arc<dyn Volumes>,
    parent: VolumeName,
    leaf: VolumeName,
}

impl Delegate for Committed {
    fn inner(&self) -> &dyn Volumes {
        self.inner.as_ref()
    }
    fn opening(&self, name: &VolumeName) {
        let there = || self.inner.list().unwrap().contains(&self.parent);
        if *name == self.parent && there() {
            self.inner.rename(&self.parent, &self.leaf).unwrap();
        }
    }
}

#[test]
fn a_leaf_merged_while_its_chain_is_read_is_busy_not_broken() {
    let Simulated { host, inner, plain, vdi, sibling: _ } = Simulated::new();
    let parent = sm::chain::read(&plain, vdi).unwrap()[1].volume.clone();
    let leaf = VolumeName::vhd(vdi);
    let over = repo(Arc::new(Via(Committed { inner, parent: parent.clone(), leaf })), &host, 2);
    let busy = sm::chain::read(&over, vdi).unwrap_err();
    assert!(busy.is_busy(), "{busy}");
    assert_eq!(sm::chain::read(&over, vdi).unwrap().len(), 1, "read again it is the parent");
}
