//! Random operations on one SR against a plain model: every visible disk is
//! a vector of sectors, and a snapshot is a copy of one.
//!
//! Sequential, through the real engine, `sm` and `gc` on the simulated
//! machine; what concurrency and crashes do is `crash`'s. A failing run is
//! shrunk: operations are taken out as long as it still fails.

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use sm::journal::SiblingKind;
use sm::ops::{self, Wanted};
use tapdisk::engine::RequestKind;
use uuid::Uuid;
use vhd::chain::Chain;
use vhd::storage::VolumeName;

use crate::crash::oracle::{Oracle, Value, stamp, unstamp};
use crate::crash::scenarios::collect_garbage;
use crate::crash::world::{BLOCKS, Backend, SharedGuest, World, locked};

const SECTORS: u64 = BLOCKS * 4096;
/// Sectors looked at in a full comparison: every one near writes, and some.
const STEP: usize = 1;

#[derive(Debug, Clone, Copy)]
enum Op {
    Write {
        first: u64,
        count: u64,
    },
    Zero {
        first: u64,
        count: u64,
    },
    Trim {
        first: u64,
        count: u64,
    },
    Flush,
    Read {
        first: u64,
        count: u64,
    },
    Snapshot,
    Clone,
    Delete {
        nth: usize,
    },
    Collect,
    Reattach,
    /// The tapdisk is killed; everything acknowledged must be there.
    Kill,
}

fn random_ops(rng: &mut SmallRng, count: usize) -> Vec<Op> {
    let range = |rng: &mut SmallRng| {
        let first = rng.random_range(0..SECTORS);
        let count =
            if rng.random_range(0..4) == 0 { rng.random_range(1..9000) } else { rng.random_range(1..64) };
        (first, count.min(SECTORS - first))
    };
    let one = |rng: &mut SmallRng| match rng.random_range(0..100) {
        0..45 => {
            let (first, count) = range(rng);
            Op::Write { first, count }
        }
        45..52 => {
            let (first, count) = range(rng);
            Op::Zero { first, count }
        }
        52..60 => {
            let (first, count) = range(rng);
            Op::Trim { first, count }
        }
        60..70 => {
            let (first, count) = range(rng);
            Op::Read { first, count }
        }
        70..78 => Op::Flush,
        78..84 => Op::Snapshot,
        84..86 => Op::Clone,
        86..91 => Op::Delete { nth: rng.random_range(0..8) },
        91..94 => Op::Collect,
        94..97 => Op::Reattach,
        _ => Op::Kill,
    };
    (0..count).map(|_| one(rng)).collect()
}

struct Model {
    world: World,
    vdi: Uuid,
    guest: SharedGuest,
    disk: Vec<Value>,
    siblings: Vec<(Uuid, Vec<Value>)>,
    next: Value,
}

impl Model {
    fn new(backend: Backend, seed: u64) -> Self {
        let world = World::over(backend.machine(seed), seed);
        let vdi = ops::create(&world.repo, "disk", BLOCKS << 21).expect("create");
        let guest = world.attach(vdi, Oracle::default());
        Self { world, vdi, guest, disk: vec![0; SECTORS as usize], siblings: Vec::new(), next: 1 }
    }

    fn request(&self, kind: RequestKind, first: u64, count: u64, bytes: Vec<u8>) -> Result<Vec<u8>, String> {
        let mut guest = locked(&self.guest);
        let id = guest.tap.submit(kind, first * 512, (count * 512) as u32, bytes);
        for _ in 0..100_000 {
            while let Some(finished) = guest.tap.take_finished() {
                if finished.id == id {
                    finished.result.map_err(|errno| format!("{kind:?} failed: errno {errno}"))?;
                    return Ok(finished.buffer);
                }
            }
            guest.tap.step();
        }
        Err(format!("{kind:?} was never answered"))
    }

    fn fill(&mut self, first: u64, count: u64, value: Value) {
        self.disk[first as usize..(first + count) as usize].fill(value);
    }

    fn apply(&mut self, op: Op) -> Result<(), String> {
        match op {
            Op::Write { first, count } => {
                self.next += 1;
                let bytes = (first..first + count).flat_map(|sector| stamp(self.next, sector)).collect();
                self.fill(first, count, self.next);
                self.request(RequestKind::Write { fua: false }, first, count, bytes)?;
            }
            Op::Zero { first, count } => {
                self.fill(first, count, 0);
                self.request(
                    RequestKind::WriteZeroes { fua: false, no_hole: false },
                    first,
                    count,
                    Vec::new(),
                )?;
            }
            Op::Trim { first, count } => {
                self.request(RequestKind::Trim { fua: false }, first, count, Vec::new())?;
                if self.world.disk.has_devices() {
                    self.learn_trimmed(first, count)?;
                } else {
                    self.fill(first, count, 0);
                }
            }
            Op::Flush => {
                self.request(RequestKind::Flush, 0, 0, Vec::new())?;
            }
            Op::Read { first, count } => {
                let bytes = self.request(RequestKind::Read, first, count, Vec::new())?;
                for (sector, bytes) in (first..).zip(bytes.chunks(512)) {
                    same(self.disk[sector as usize], bytes, sector)?;
                }
            }
            Op::Snapshot => self.sibling(SiblingKind::Snapshot)?,
            Op::Clone => self.sibling(SiblingKind::Clone)?,
            Op::Delete { nth } if !self.siblings.is_empty() => {
                let (vdi, _) = self.siblings.remove(nth % self.siblings.len());
                ops::delete(&self.world.repo, vdi).map_err(|e| format!("delete: {e}"))?;
            }
            Op::Delete { .. } => {}
            Op::Collect => collect_garbage(&self.world)?,
            Op::Reattach => {
                ops::detach(&self.world.repo, self.vdi, true).map_err(|e| format!("detach: {e}"))?;
                self.guest = self.world.attach(self.vdi, Oracle::default());
            }
            Op::Kill => {
                // What it held is locked by its handles: drop them all.
                self.world.kill(self.vdi);
                self.guest = self.world.attach(self.vdi, Oracle::default());
            }
        }
        Ok(())
    }

    /// A trim on a device makes zeros or does nothing, and stays with that.
    fn learn_trimmed(&mut self, first: u64, count: u64) -> Result<(), String> {
        let bytes = self.request(RequestKind::Read, first, count, Vec::new())?;
        for (sector, bytes) in (first..).zip(bytes.chunks(512)) {
            let before = self.disk[sector as usize];
            if bytes.iter().all(|byte| *byte == 0) {
                self.fill(sector, 1, 0);
            } else {
                same(before, bytes, sector)?;
            }
        }
        Ok(())
    }

    fn sibling(&mut self, kind: SiblingKind) -> Result<(), String> {
        let wanted = Wanted { vdi: self.vdi, name: "sibling".to_owned() };
        match ops::snapshot(&self.world.repo, kind, &[wanted]) {
            Ok(made) => self.siblings.extend(made.into_iter().map(|vdi| (vdi, self.disk.clone()))),
            Err(sm::Error::ChainTooLong { .. }) => {}
            Err(error) => return Err(format!("{kind:?}: {error}")),
        }
        Ok(())
    }

    /// Every disk, whole.
    fn compare(&self) -> Result<(), String> {
        let bytes = self.request(RequestKind::Read, 0, SECTORS, Vec::new())?;
        for (sector, bytes) in (0..).zip(bytes.chunks(512)) {
            same(self.disk[sector as usize], bytes, sector)?;
        }
        for (vdi, content) in &self.siblings {
            let chain = Chain::open(self.world.repo.volumes.as_ref(), &VolumeName::vhd(*vdi))
                .map_err(|e| format!("sibling: {e}"))?;
            let mut bytes = vec![0; (SECTORS * 512) as usize];
            chain.read_at(&mut bytes, 0).map_err(|e| format!("sibling: {e}"))?;
            for (sector, bytes) in (0..).zip(bytes.chunks(512)).step_by(STEP) {
                same(content[sector as usize], bytes, sector).map_err(|e| format!("sibling: {e}"))?;
            }
        }
        Ok(())
    }
}

fn same(want: Value, bytes: &[u8], sector: u64) -> Result<(), String> {
    match unstamp(bytes, sector) {
        Ok(got) if got == want => Ok(()),
        Ok(got) => Err(format!("sector {sector} holds {got}, not {want}")),
        Err(what) => Err(format!("sector {sector} holds {what}, not {want}")),
    }
}

fn run(backend: Backend, seed: u64, ops: &[Op]) -> Result<(), String> {
    let mut model = Model::new(backend, seed);
    for (n, op) in ops.iter().enumerate() {
        model.apply(*op).map_err(|e| format!("operation {n}, {op:?}: {e}"))?;
    }
    model.compare()?;
    collect_garbage(&model.world)?;
    model.compare().map_err(|e| format!("after collecting: {e}"))
}

/// Takes out what is not needed for the failure.
fn shrink(backend: Backend, seed: u64, mut ops: Vec<Op>) -> Vec<Op> {
    let mut chunk = ops.len() / 2;
    while chunk > 0 {
        let mut at = 0;
        while at < ops.len() {
            let mut fewer = ops.clone();
            fewer.drain(at..(at + chunk).min(fewer.len()));
            if run(backend, seed, &fewer).is_err() {
                ops = fewer;
            } else {
                at += chunk;
            }
        }
        chunk /= 2;
    }
    ops
}

fn runs() -> u64 {
    std::env::var("COPPICE_MODEL_RUNS").ok().and_then(|text| text.parse().ok()).unwrap_or(60)
}

#[test]
fn random_operations_agree_with_a_plain_model() {
    agrees(Backend::Files, runs());
}

#[test]
fn random_operations_on_devices_agree_with_a_plain_model() {
    agrees(Backend::Devices, runs() / 4);
}

fn agrees(backend: Backend, runs: u64) {
    for seed in 0..runs {
        let mut rng = SmallRng::seed_from_u64(seed);
        let ops = random_ops(&mut rng, 60);
        if let Err(failure) = run(backend, seed, &ops) {
            let fewer = shrink(backend, seed, ops);
            let now = run(backend, seed, &fewer);
            panic!("seed {seed}: {failure}\nshrunk to {fewer:#?}\nwhich says {now:?}");
        }
    }
}
