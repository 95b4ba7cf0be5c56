//! What happens before the crash: real operations under guest traffic.

use std::ops::Range;
use std::sync::Arc;

use gc::candidates::candidates;
use gc::forest::Role;
use gc::job::Job;
use gc::{garbage, survey};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use sm::journal::{LeafMergeIntent, SiblingKind};
use sm::ops::{self, Wanted};
use tapdisk_control::{MergePhase, Reply, Request};
use uuid::Uuid;
use vhd::meta::Meta;
use vhd::resize::grow;
use vhd::storage::sim::{Sabotage, SimDisk};
use vhd::storage::{Access, VolumeName};
use vhd::units::{BlockNo, SectorRun};
use vhd::writer::Writer;

use super::finished::nothing_left;
use super::oracle::{At, Instant, Oracle, stamp};
use super::world::{BLOCKS, Backend, SharedGuest, World, locked};

/// A visible disk and what it may hold.
pub enum Expected {
    /// Writable, with everything that was written to it.
    Disk {
        vdi: Uuid,
        oracle: Oracle,
        /// From here on it exists, and from here on it may be gone.
        lives: (At, Option<At>),
    },
    /// A snapshot or clone nobody wrote to.
    Snapshot {
        vdi: Uuid,
        of: Oracle,
        /// When it was made.
        instant: Instant,
        /// Of when what it holds is.
        taken: Instant,
        /// From here on it may be gone.
        deleted: Option<At>,
    },
    /// Another disk, made meanwhile and written to.
    Made { vdi: Uuid, oracle: Oracle, instant: Instant },
}

/// A size that the disk was given.
pub struct Resized {
    pub virtual_bytes: u64,
    pub when: Instant,
}

/// A scenario that ran to its end.
pub struct Ran {
    pub disk: SimDisk,
    /// From here on crashes are tried: the first disk exists.
    pub from: At,
    pub expected: Vec<Expected>,
    /// Sizes of the disk, growing.
    pub sizes: Vec<Resized>,
    /// What went wrong without any crash.
    pub failures: Vec<String>,
}

/// A scenario: what it is called, and how it goes.
#[derive(Clone, Copy)]
pub struct Scenario {
    pub name: &'static str,
    pub(super) go: fn(&mut Play),
}

/// All that can happen there, or the one that `COPPICE_CRASH_SCENARIO` names.
///
/// A device has the space its metadata needs: only files can be without.
pub fn all(backend: Backend) -> impl Iterator<Item = Scenario> {
    let only = std::env::var("COPPICE_CRASH_SCENARIO").ok();
    let all = USE.into_iter().chain(super::scenarios_io::ALL).chain(super::scenarios_ops::ALL);
    let full = (backend == Backend::Files).then_some(super::scenarios_full::ALL);
    let all = all.chain(super::collecting::ALL).chain(full.into_iter().flatten());
    all.filter(move |scenario| only.as_deref().is_none_or(|name| name == scenario.name))
}

/// What people do; collecting on its own is in [`super::collecting`], whole
/// disks in [`super::scenarios_ops`].
const USE: [Scenario; 8] = [
    Scenario { name: "writes", go: writes },
    Scenario { name: "snapshots", go: snapshots },
    Scenario { name: "offline", go: offline },
    Scenario { name: "leaf merge", go: leaf_merge },
    Scenario { name: "merge stopped", go: merge_stopped },
    Scenario { name: "inner merge", go: inner_merge },
    Scenario { name: "writer", go: writer },
    Scenario { name: "growth", go: growth },
];

impl Scenario {
    /// Plays it, perhaps with a step left out.
    pub fn play(&self, backend: Backend, seed: u64, sabotage: Option<Sabotage>) -> Ran {
        let mut play = Play::new(backend, seed, sabotage);
        (self.go)(&mut play);
        play.end()
    }
}

pub(super) struct Snapshot {
    pub vdi: Uuid,
    pub instant: Instant,
    pub taken: Instant,
    pub deleted: Option<At>,
}

/// A disk, its guest, and what was done to it.
pub(super) struct Play {
    pub world: World,
    pub vdi: Uuid,
    pub guest: Option<SharedGuest>,
    pub oracle: Oracle,
    from: At,
    pub snapshots: Vec<Snapshot>,
    deleted: Option<At>,
    /// Disks of plays that ended, and others.
    pub others: Vec<Expected>,
    pub sizes: Vec<Resized>,
    pub failures: Vec<String>,
}

impl Play {
    /// A machine with one disk on it, not attached.
    pub fn new(backend: Backend, seed: u64, sabotage: Option<Sabotage>) -> Self {
        let disk = backend.machine(seed);
        if let Some(sabotage) = sabotage {
            disk.sabotage(sabotage);
        }
        let world = World::over(disk.clone(), seed);
        let vdi = ops::create(&world.repo, "disk", BLOCKS << 21).expect("create");
        Play {
            from: disk.log_len(),
            world,
            vdi,
            guest: None,
            oracle: Oracle::default(),
            snapshots: Vec::new(),
            deleted: None,
            others: Vec::new(),
            sizes: Vec::new(),
            failures: Vec::new(),
        }
    }

    /// Another disk on the same machine, to be given to [`Self::joined`].
    pub fn another(&self, name: &str) -> Self {
        let vdi = ops::create(&self.world.repo, name, BLOCKS << 21).expect("create");
        Play {
            world: self.world.clone(),
            vdi,
            guest: None,
            oracle: Oracle::default(),
            from: self.world.disk.log_len(),
            snapshots: Vec::new(),
            deleted: None,
            others: Vec::new(),
            sizes: Vec::new(),
            failures: Vec::new(),
        }
    }

    /// The play of another disk ends; its disks are expected too.
    pub fn joined(&mut self, other: Self) {
        let mut ran = other.end();
        self.others.append(&mut ran.expected);
        self.failures.append(&mut ran.failures);
    }

    /// Deletes the disk itself, which nobody uses.
    pub fn delete_disk(&mut self) {
        self.deleted = Some(self.world.disk.log_len());
        if let Err(error) = ops::delete(&self.world.repo, self.vdi) {
            self.failures.push(format!("delete: {error}"));
        }
    }

    pub fn attach(&mut self) {
        let oracle = std::mem::take(&mut self.oracle);
        self.guest = Some(self.world.attach(self.vdi, oracle));
    }

    pub fn traffic(&mut self, requests: u32) {
        if let Some(guest) = &self.guest {
            locked(guest).run(requests);
        }
    }

    /// Allows so many requests while operations run.
    pub fn meanwhile(&mut self, requests: u32) {
        if let Some(guest) = &self.guest {
            locked(guest).budget = requests;
        }
    }

    pub fn detach(&mut self) {
        let Some(guest) = self.guest.take() else { return };
        locked(&guest).drain();
        if let Err(error) = ops::detach(&self.world.repo, self.vdi, true) {
            self.failures.push(format!("detach: {error}"));
        }
        let mut guest = locked(&guest);
        self.failures.append(&mut guest.failures);
        self.oracle = std::mem::take(&mut guest.oracle);
    }

    pub fn snapshot(&mut self) -> usize {
        let began = self.world.disk.log_len();
        let wanted = Wanted { vdi: self.vdi, name: "snap".to_owned() };
        match ops::snapshot(&self.world.repo, SiblingKind::Snapshot, &[wanted]) {
            Ok(siblings) => {
                let instant = Instant { began, ended: self.world.disk.log_len() };
                self.snapshots.extend(siblings.into_iter().map(|vdi| Snapshot {
                    vdi,
                    instant,
                    taken: instant,
                    deleted: None,
                }));
            }
            Err(error) => self.failures.push(format!("snapshot: {error}")),
        }
        self.snapshots.len() - 1
    }

    pub fn delete(&mut self, snapshot: usize) {
        self.snapshots[snapshot].deleted = Some(self.world.disk.log_len());
        if let Err(error) = ops::delete(&self.world.repo, self.snapshots[snapshot].vdi) {
            self.failures.push(format!("delete: {error}"));
        }
    }

    pub fn collect(&mut self) {
        if let Err(error) = collect_garbage(&self.world) {
            self.failures.push(error);
        }
    }

    fn end(mut self) -> Ran {
        self.detach();
        let snapshots = self.snapshots.into_iter().map(|snapshot| Expected::Snapshot {
            vdi: snapshot.vdi,
            of: self.oracle.clone(),
            instant: snapshot.instant,
            taken: snapshot.taken,
            deleted: snapshot.deleted,
        });
        let expected = snapshots.collect::<Vec<_>>();
        let disk = Expected::Disk { vdi: self.vdi, oracle: self.oracle, lives: (self.from, self.deleted) };
        Ran {
            disk: self.world.disk.clone(),
            from: self.from,
            expected: expected.into_iter().chain([disk]).chain(self.others).collect(),
            sizes: self.sizes,
            failures: self.failures,
        }
    }
}

/// Deletes and merges until nothing is left to do, and that is what it leaves.
pub fn collect_garbage(world: &World) -> Result<(), String> {
    let repo = &world.repo;
    for stored in sm::journal::load(repo.volumes.as_ref()).map_err(|e| e.to_string())? {
        let taken = Job::take_over(repo, world, stored.name.id).map_err(|e| e.to_string())?;
        if let Some((job, intent)) = taken {
            job.carry_on(intent).map_err(|e| format!("carrying on: {e}"))?;
        }
    }
    for _ in 0..50 {
        let forest = survey::glance(repo).map_err(|e| e.to_string())?;
        let hidden = |node: &&gc::forest::Node| node.role == Role::Hidden;
        let childless = |node: &&gc::forest::Node| forest.children(node.uuid).next().is_none();
        let dead: Vec<Uuid> = forest.nodes().filter(hidden).filter(childless).map(|node| node.uuid).collect();
        if !dead.is_empty() {
            garbage::delete(repo, world, &dead).map_err(|e| e.to_string())?;
            continue;
        }
        let merge = candidates(&forest).into_iter().find(|(_, against)| against.is_none());
        let Some((merge, _)) = merge else { return nothing_left(world) };
        let (job, intent) = Job::begin(repo, world, &merge).map_err(|e| format!("{merge:?}: {e}"))?;
        job.carry_on(intent).map_err(|e| format!("{merge:?}: {e}"))?;
    }
    Err("collecting does not end".to_owned())
}

/// Writes, zeros, trims and flushes; attached twice.
fn writes(play: &mut Play) {
    play.attach();
    play.traffic(60);
    play.detach();
    play.attach();
    play.traffic(30);
}

/// Snapshots under writes.
fn snapshots(play: &mut Play) {
    play.attach();
    play.traffic(15);
    play.meanwhile(40);
    play.snapshot();
    play.traffic(10);
    play.meanwhile(40);
    play.snapshot();
    play.traffic(10);
}

/// Snapshots and merges of a disk nobody uses.
fn offline(play: &mut Play) {
    play.attach();
    play.traffic(15);
    play.detach();
    let first = play.snapshot();
    play.attach();
    play.traffic(15);
    play.detach();
    let second = play.snapshot();
    play.attach();
    play.traffic(10);
    play.detach();
    play.delete(first);
    play.delete(second);
    play.collect();
}

/// A leaf merged into its parent while it is written.
fn leaf_merge(play: &mut Play) {
    play.attach();
    play.traffic(20);
    let snapshot = play.snapshot();
    play.traffic(20);
    play.delete(snapshot);
    play.meanwhile(60);
    play.collect();
    play.traffic(10);
}

/// A snapshot that arrives while the leaf is being merged.
fn merge_stopped(play: &mut Play) {
    play.attach();
    play.traffic(20);
    let snapshot = play.snapshot();
    play.traffic(20);
    play.delete(snapshot);
    play.meanwhile(40);
    let _ = begin_leaf_merge(play);
    play.snapshot();
    play.traffic(10);
}

/// Starts a leaf merge and leaves it running, as if the collector died.
pub(super) fn begin_leaf_merge(play: &mut Play) -> Option<LeafMergeIntent> {
    // From one block, so a flush for each, to more than the disk has.
    let extra_blocks = (play.world.host.seed % (BLOCKS + 1)) as u32 + 1;
    begin_leaf_merge_with(play, extra_blocks)
}

/// The same with so much extra room, in blocks.
pub(super) fn begin_leaf_merge_with(play: &mut Play, extra_blocks_max: u32) -> Option<LeafMergeIntent> {
    let repo = play.world.repo.clone();
    let forest = survey::glance(&repo).expect("survey");
    let Some((merge, _)) = candidates(&forest).into_iter().find(|(_, against)| against.is_none()) else {
        play.failures.push("no leaf to merge".to_owned());
        return None;
    };
    let begun = Job::begin(&repo, &play.world, &merge);
    let Ok((_, sm::journal::Intent::LeafMerge(intent))) = begun else {
        play.failures.push("the leaf merge did not begin".to_owned());
        return None;
    };
    let mut tap = repo.host.tap(intent.vdi).expect("tap").expect("a live tapdisk");
    let (leaf, parent) = (intent.leaf.clone(), intent.parent.clone());
    if let Err(error) = tap.call(Request::MergeStart { leaf, parent, rate_bytes_per_s: 0, extra_blocks_max })
    {
        play.failures.push(format!("merge start: {error}"));
    }
    let guest = play.guest.as_ref().map(Arc::clone);
    for _ in 0..30 {
        guest.iter().for_each(|guest| locked(guest).pump());
    }
    Some(intent)
}

/// A leaf merge whose leaf is empty, ready to be committed.
pub fn emptied_leaf(seed: u64) -> (World, SharedGuest, LeafMergeIntent) {
    let mut play = Play::new(Backend::Files, seed, None);
    play.attach();
    play.traffic(20);
    let snapshot = play.snapshot();
    play.traffic(20);
    play.delete(snapshot);
    let intent = begin_leaf_merge(&mut play).expect("a leaf merge");
    let guest = play.guest.take().expect("a guest");
    let mut tap = play.world.repo.host.tap(intent.vdi).expect("tap").expect("a live tapdisk");
    for _ in 0..10_000 {
        match tap.call(Request::MergeStatus) {
            Ok(Reply::Merge(status)) if status.phase == MergePhase::Empty => break,
            _ => locked(&guest).pump(),
        }
    }
    (play.world, guest, intent)
}

/// Hidden nodes merged below an attached leaf and an attached snapshot.
fn inner_merge(play: &mut Play) {
    play.attach();
    play.traffic(15);
    let first = play.snapshot();
    play.traffic(15);
    let second = play.snapshot();
    play.traffic(15);
    let third = play.snapshot();
    play.traffic(10);
    let of = play.guest.as_ref().map(|guest| locked(guest).oracle.clone()).unwrap_or_default();
    let read = &play.snapshots[third];
    let reader = play.world.attach_reader(read.vdi, of, read.instant);
    locked(&reader).budget = 200;
    play.delete(first);
    play.delete(second);
    play.meanwhile(40);
    play.collect();
    play.traffic(5);
    locked(&reader).run(60);
    play.failures.append(&mut locked(&reader).failures);
    if let Err(error) = ops::detach(&play.world.repo, play.snapshots[third].vdi, true) {
        play.failures.push(format!("detach the reader: {error}"));
    }
}

/// The blocking writer on a disk nobody serves, new blocks over its parents'
/// and then old ones, in an image whose front was damaged before.
fn writer(play: &mut Play) {
    play.attach();
    play.traffic(12);
    play.snapshot();
    play.traffic(6);
    play.detach();
    play.snapshot();
    let name = VolumeName::vhd(play.vdi);
    let repo = play.world.repo.clone();
    damage_front(&repo, &name);
    let mut rng = SmallRng::seed_from_u64(play.world.disk.log_len() as u64);
    for round in 0..4 {
        let opened = Writer::open(repo.volumes.as_ref(), &name, repo.host.records());
        let mut writer = opened.expect("open for writing");
        let written = |n: u64| write_some(play, &mut writer, &mut rng, (round * 10 + n + 1) << 40);
        let written: Vec<_> = (0..6).map(written).collect();
        // Nothing is promised before this returns, and everything after.
        writer.commit().expect("commit");
        let now = play.world.disk.log_len();
        for (sectors, value, began) in written {
            play.oracle.answered(sectors, value, began, now);
        }
        play.oracle.flushed(now, now);
        if round % 2 == 0 {
            writer.settle(None).expect("settle");
        }
    }
}

fn write_some(play: &mut Play, writer: &mut Writer, rng: &mut SmallRng, value: u64) -> (Range<u64>, u64, At) {
    let block = rng.random_range(0..BLOCKS);
    let first = [0, 2044, 4088][rng.random_range(0..3)] + rng.random_range(0..4);
    let run = SectorRun { first, count: rng.random_range(1..5) };
    let sectors = block * 4096 + u64::from(first)..block * 4096 + u64::from(run.end());
    let bytes: Vec<u8> = sectors.clone().flat_map(|sector| stamp(value, sector)).collect();
    let began = play.world.disk.log_len();
    play.oracle.began(sectors.clone(), value, began, false);
    let block = BlockNo(u32::try_from(block).expect("few blocks"));
    writer.write(block, run, &bytes, true).expect("write");
    (sectors, value, began)
}

/// An image grows until its BAT has to move, then is written again.
fn growth(play: &mut Play) {
    play.attach();
    play.traffic(15);
    play.snapshot();
    play.traffic(10);
    play.detach();
    let name = VolumeName::vhd(play.vdi);
    for virtual_bytes in [64 << 20, 600 << 20, 2000 << 20] {
        let volume = play.world.repo.volumes.open(&name, Access::Write).expect("open");
        let mut meta = Meta::read(volume.as_ref()).expect("headers");
        let began = play.world.disk.log_len();
        if let Err(error) = grow(volume.as_ref(), &mut meta, virtual_bytes) {
            play.failures.push(format!("grow to {virtual_bytes}: {error}"));
        }
        let when = Instant { began, ended: play.world.disk.log_len() };
        play.sizes.push(Resized { virtual_bytes, when });
    }
    play.attach();
    play.traffic(10);
}

/// The footer's copy at the front is lost, long before any crash.
fn damage_front(repo: &sm::Repo, name: &VolumeName) {
    let volume = repo.volumes.open(name, Access::Write).expect("open");
    volume.write_at(&[0; 512], 0).expect("damage");
    volume.flush("scenario: damage").expect("flush");
}
