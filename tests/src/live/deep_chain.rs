//! A chain as long as chains may be, its snapshots deleted, merged away: what
//! the run says of itself against what was predicted, and against what the
//! images and the file system show.
//!
//! Where the leaf holds the whole disk before anything is predicted, a guest's
//! writes change no block table: every bound that holds for a quiet tree
//! holds under this guest too, bytes freed being exact. Under a guest whose
//! leaf still gains blocks, what hidden nodes cost and the peak do.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use coppice::client::Daemon;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use serde_json::Value;
use vhd::bat::{BAT_FREE, read_bat};
use vhd::bitmap::SectorBitmap;
use vhd::meta::Meta;
use vhd::storage::{Access, FileVolumes, PosixFs, VolumeName, Volumes};
use vhd::units::Slot;

use crate::support::guest::Guest;
use crate::support::host::{Attached, Host};
use crate::support::small_fs::{Mounted, free_bytes, leave_free};

/// Longest chain by default.
const LEVELS: u64 = 30;
/// Blocks of the disk.
const BLOCKS: u32 = 96;
/// Blocks that every level writes whole; others in part.
const WHOLE_BLOCKS: usize = 3;
/// Writes of some 4 KiB units each that every level sees besides.
const SCATTERED: u64 = 40;
/// Room of what files need beyond data blocks: bitmaps, extents, footers.
const METADATA_BYTES: u64 = 4 << 20;
const MIB: u64 = 1 << 20;

/// What a run is to show beyond its bounds.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Room {
    Enough,
    /// Only so much is free, so hidden nodes go in slices.
    Short(u64),
}

/// What the leaf has before anything is predicted.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Leaf {
    /// The whole disk.
    Full,
    /// Some blocks; the guest adds others while the chain is merged.
    Gains,
}

/// A disk at the end of a chain of [`LEVELS`] images, nothing but the disk
/// visible, and the collector paused.
struct Deep {
    vdi: String,
    at: Attached,
    guest: Guest,
}

impl Deep {
    fn new(host: &Host, folder: &Path, leaf: Leaf) -> Self {
        let path = folder.to_str().unwrap();
        host.ok(&["sr", "create", "store", "--type", "file", "--path", path]);
        host.ok(&["gc", "pause", "store"]);
        let vdi = host.disk("store", "deep", &format!("{}MiB", BLOCKS * 2));
        let at = host.attach(&vdi);
        let bytes = u64::from(BLOCKS) * 2 * MIB;
        let (mut guest, mut rng) = (Guest::new(bytes, 7), SmallRng::seed_from_u64(8));
        guest.fill(&at, 0..8);
        for level in 1..LEVELS {
            host.ok(&["vdi", "snapshot", "deep", "--name", &format!("s{level}")]);
            for _ in 0..WHOLE_BLOCKS {
                let block = rng.random_range(0..BLOCKS);
                guest.fill(&at, block..block + 1);
            }
            assert_eq!(guest.write(&at, |acked| acked == SCATTERED) / SCATTERED, 1);
        }
        guest.fill(&at, 0..if leaf == Leaf::Full { BLOCKS } else { BLOCKS / 8 });
        assert_eq!(host.ok(&["vdi", "show", &vdi])["depth"], LEVELS);
        for level in 1..LEVELS {
            host.ok(&["vdi", "delete", &format!("s{level}")]);
        }
        Self { vdi, at, guest }
    }
}

/// Bytes that the hidden nodes above the lowest have, those that several have
/// counted once: what one pass may copy.
fn bytes_of_hidden(host: &Host, vdi: &str, folder: &Path) -> u64 {
    let chain = host.ok(&["vdi", "stat", vdi])["chain"].clone();
    let hidden: Vec<&Value> =
        chain.as_array().unwrap().iter().filter(|node| node["hidden"] == true).collect();
    assert_eq!(hidden.len() as u64, LEVELS - 1);
    let volumes = FileVolumes::new(Arc::new(PosixFs::new(folder.to_owned())));
    let mut has: BTreeMap<usize, SectorBitmap> = BTreeMap::new();
    for node in &hidden[..hidden.len() - 1] {
        let name = VolumeName::new(&format!("{}.vhd", node["uuid"].as_str().unwrap())).unwrap();
        let volume = volumes.open(&name, Access::Read).unwrap();
        let meta = Meta::read(volume.as_ref()).unwrap();
        let bat = read_bat(volume.as_ref(), meta.layout.as_ref().unwrap()).unwrap();
        for (block, slot) in bat.iter().enumerate().filter(|(_, slot)| **slot != BAT_FREE) {
            let mut bytes = [0; 512];
            volume.read_at(&mut bytes, Slot(*slot).bitmap_offset()).unwrap();
            has.entry(block).or_insert(SectorBitmap::EMPTY).union(&SectorBitmap::from_bytes(&bytes));
        }
    }
    has.values().flat_map(|bitmap| bitmap.present().map(|run| run.bytes())).sum()
}

fn number(of: &Value, name: &str) -> u64 {
    of[name].as_u64().unwrap_or_else(|| panic!("{name}: {of}"))
}

/// The SR's history has the job as its status had it, prediction included.
fn kept_in_history(host: &Host, job: &Value) {
    let sr = host.ok(&["sr", "show", "store"])["uuid"].as_str().unwrap().to_owned();
    let answer = Daemon::smd(host.run_dir()).get(&format!("/srs/{sr}/history")).ok().unwrap();
    let lines = answer["history"].as_array().unwrap();
    let line = lines.iter().find(|line| line["operation"] == "coalesce").expect("no job in the history");
    let kept: Value = serde_json::from_str(line["detail"].as_str().unwrap()).unwrap();
    assert_eq!(&kept, job);
}

/// Runs `body` and says how little was free meanwhile.
fn least_free<T>(folder: &Path, body: impl FnOnce() -> T) -> (u64, T) {
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let watch = scope.spawn(|| {
            let mut least = free_bytes(folder);
            while !over.load(Ordering::Relaxed) {
                least = least.min(free_bytes(folder));
                std::thread::sleep(Duration::from_millis(2));
            }
            least
        });
        let done = body();
        over.store(true, Ordering::Relaxed);
        (watch.join().unwrap(), done)
    })
}

/// The jobs of a kind that ended without an error.
fn jobs(host: &Host, kind: &str) -> Vec<Value> {
    let status = host.ok(&["gc", "status", "store"]);
    let done = status["done"].as_array().unwrap();
    done.iter().filter(|job| job["kind"] == kind && job["error"].is_null()).cloned().collect()
}

/// Merges the chain away under a guest that writes, and compares.
fn merge_away(host: &Host, folder: &Path, room: Room, leaf_has: Leaf) {
    let mut deep = Deep::new(host, folder, leaf_has);
    if let Room::Short(left) = room {
        leave_free(folder, "filler", left);
    }
    let predicted = host.ok(&["gc", "run", "store", "--dry-run"]);
    let hidden = bytes_of_hidden(host, &deep.vdi, folder);
    let leaf = u64::from(BLOCKS) * 2 * MIB;
    let free = free_bytes(folder);

    let over = AtomicBool::new(false);
    let (least, (did, acked)) = std::thread::scope(|scope| {
        let (guest, at) = (&mut deep.guest, &deep.at);
        let busy = scope.spawn(|| guest.write(at, |_| over.load(Ordering::Relaxed)));
        least_free(folder, || {
            host.ok(&["gc", "resume", "store"]);
            let did = host.ok(&["gc", "run", "store", "--wait"]);
            assert!(!busy.is_finished(), "the guest lost its disk");
            over.store(true, Ordering::Relaxed);
            (did, busy.join().unwrap())
        })
    });
    println!("hidden {hidden}, leaf {leaf}, free {free}, least free {least}, {acked} writes");
    println!("predicted {predicted}\ndid       {did}");

    assert_eq!(did["failed"], serde_json::json!([]));
    assert_eq!(host.ok(&["vdi", "show", &deep.vdi])["depth"], 1);
    assert!(acked > 0, "the guest was stopped");
    for name in ["coalesced", "leaf_coalesced", "deleted"] {
        assert_eq!(did[name], predicted[name], "{name}");
    }
    if leaf_has == Leaf::Full {
        assert_eq!(did["bytes_freed"], predicted["bytes_freed"]);
        for name in ["bytes_copied", "bytes_cloned", "peak_extra_bytes"] {
            assert!(number(&did, name) <= number(&predicted, name), "{name}");
        }
    }
    let (inner, merged) = (jobs(host, "inner"), jobs(host, "leaf"));
    assert_eq!((inner.len(), merged.len()), (1, 1), "one pass each");
    let moved = |job: &Value| number(job, "bytes_copied") + number(job, "bytes_cloned");
    // Each byte once per pass, and none is left out.
    assert_eq!(moved(&inner[0]), hidden);
    match leaf_has {
        Leaf::Full => assert_eq!(moved(&merged[0]), leaf),
        Leaf::Gains => assert!(moved(&merged[0]) <= leaf, "{}", merged[0]),
    }
    assert_eq!(moved(&did), hidden + moved(&merged[0]));
    // A leaf that gains blocks has more to be moved than it had when its merge
    // was chosen.
    let bound = inner.iter().chain(merged.iter().filter(|_| leaf_has == Leaf::Full));
    for job in bound {
        let expected = &job["predicted"];
        assert!(moved(job) <= number(expected, "bytes_copied"), "{job}");
        assert!(number(job, "peak_extra_bytes") <= number(expected, "peak_extra_bytes"), "{job}");
        assert!(number(job, "bytes_freed") >= number(expected, "bytes_freed"), "{job}");
    }
    kept_in_history(host, &inner[0]);
    let slices = number(&inner[0], "slices");
    match room {
        Room::Enough => assert_eq!(slices, 0, "there was room"),
        Room::Short(_) => {
            assert!(slices > 1, "it was to go in slices: {}", inner[0]);
            // Nobody else uses this file system.
            let extra = free.saturating_sub(least);
            let most = number(&predicted, "peak_extra_bytes") + METADATA_BYTES;
            assert!(extra <= most, "{extra} bytes of the file system were taken, {predicted}");
        }
    }
    deep.guest.check(&deep.at);
}

#[test]
fn a_chain_of_thirty_merges_away_under_a_busy_guest() {
    let host = Host::new();
    let folder = host.data().join("store");
    std::fs::create_dir(&folder).unwrap();
    merge_away(&host, &folder, Room::Enough, Leaf::Full);
}

#[test]
fn a_chain_of_thirty_merges_away_under_a_guest_whose_leaf_gains_blocks() {
    let host = Host::new();
    let folder = host.data().join("store");
    std::fs::create_dir(&folder).unwrap();
    merge_away(&host, &folder, Room::Enough, Leaf::Gains);
}

#[test]
fn a_chain_of_thirty_merges_away_in_slices_where_64_mib_are_free() {
    let host = Host::new();
    let Some(small) = Mounted::ext4(&host, 5632) else { return };
    // Less than an eighth: images take the space they need and no more.
    leave_free(&small.folder, "other", 640 * MIB);
    merge_away(&host, &small.folder, Room::Short(64 * MIB), Leaf::Full);
}
