//! How long a first touch takes, in rounds of disk reads one after another:
//! whatever the depth, all bitmaps a block depends on are read at the same
//! time, and then the data.
//!
//! The engine runs alone: a round carries out everything it has started, then
//! hands in all completions together.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use std::sync::Arc;

use tapdisk::disk::{Files, Opener};
use tapdisk::engine::{BufferRange, Completion, Engine, Op, OpId, Output, Request, RequestId, RequestKind};
use uuid::Uuid;
use vhd::create::{NewImage, NewKind, ParentLink, create};
use vhd::record::TmpfsRecords;
use vhd::storage::{FileVolumes, PosixFs, VolumeName};
use vhd::units::{BLOCK_BYTES, BlockNo, SECTOR_BYTES, SectorRun};
use vhd::writer::Writer;

const BLOCKS: u32 = 4;
const LEVELS: u32 = 30;
/// Sectors of the one write that each level has in each block.
const PATCH: u32 = 128;
const READ_BYTES: u32 = 4096;

/// A chain: full at the bottom, then what `patch` says per level and block.
struct Chain {
    folder: tempfile::TempDir,
    leaf: VolumeName,
}

impl Chain {
    fn new(patch: impl Fn(u32, u32) -> Option<SectorRun>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("sr")).unwrap();
        std::fs::create_dir(folder.path().join("records")).unwrap();
        let mut chain = Self { folder, leaf: VolumeName::vhd(Uuid::nil()) };
        let opener = chain.opener();
        for level in 0..LEVELS {
            let kind = match level {
                0 => NewKind::Dynamic,
                n => NewKind::Child {
                    parent: ParentLink {
                        uuid: Uuid::from_u128(u128::from(n)),
                        volume: chain.leaf.clone(),
                        timestamp_s: 0,
                    },
                },
            };
            let uuid = Uuid::from_u128(u128::from(level) + 1);
            let virtual_bytes = u64::from(BLOCKS) * BLOCK_BYTES;
            let new =
                NewImage { uuid, virtual_bytes, kind, bat_entries_max: None, hidden: false, timestamp_s: 0 };
            chain.leaf = VolumeName::vhd(uuid);
            create(opener.volumes.create(&chain.leaf).unwrap().as_ref(), &new).unwrap();
            let mut writer =
                Writer::open(opener.volumes.as_ref(), &chain.leaf, opener.records.as_ref()).unwrap();
            for block in 0..BLOCKS {
                let run = if level == 0 { Some(SectorRun::BLOCK) } else { patch(level, block) };
                let Some(run) = run else { continue };
                let data = vec![level as u8 + 1; run.bytes() as usize];
                writer.write(BlockNo(block), run, &data, level > 0).unwrap();
            }
            writer.settle(None).unwrap();
        }
        chain
    }

    fn opener(&self) -> Opener {
        let path = |name| self.folder.path().join(name);
        Opener {
            volumes: Arc::new(FileVolumes::new(Arc::new(PosixFs::new(path("sr"))))),
            records: Arc::new(TmpfsRecords::new(path("records"), Uuid::nil(), 1)),
            files: Arc::new(Files::default()),
        }
    }
}

/// The engine with the plainest of drivers.
struct Rounds {
    engine: Engine,
    files: Arc<Files>,
    next: u64,
}

impl Rounds {
    fn open(chain: &Chain) -> Self {
        let opener = chain.opener();
        let (engine, _) = opener.open(&chain.leaf, false).unwrap();
        Self { engine, files: opener.files, next: 0 }
    }

    /// Reads; the bytes, and after how many rounds they were there.
    fn read(&mut self, offset: u64) -> (Vec<u8>, u32) {
        let id = RequestId(self.next);
        self.next += 1;
        let (mut buffer, mut rounds) = (vec![0xEE; READ_BYTES as usize], 0);
        self.engine.submit(0, Request { id, kind: RequestKind::Read, offset, len: READ_BYTES });
        loop {
            let mut started = Vec::new();
            while let Some(output) = self.engine.next_output() {
                match output {
                    Output::Start(op, what) => started.push((op, what)),
                    Output::ZeroFill(BufferRange { at, len, .. }) => {
                        buffer[at as usize..][..len as usize].fill(0);
                    }
                    Output::Done(done, result) => {
                        assert_eq!((done, result), (id, Ok(())));
                        return (buffer, rounds);
                    }
                    other => panic!("{other:?}"),
                }
            }
            assert!(!started.is_empty(), "it waits for nothing");
            rounds += 1;
            let done: Vec<(OpId, Completion)> =
                started.into_iter().map(|(op, what)| (op, self.carry_out(what, &mut buffer))).collect();
            for (op, completion) in done {
                self.engine.complete(0, op, completion);
            }
        }
    }

    fn carry_out(&self, op: Op, buffer: &mut [u8]) -> Completion {
        match op {
            Op::ReadGuest { file, offset, into } => {
                let target = &mut buffer[into.at as usize..][..into.len as usize];
                self.files.get(file).unwrap().read_at(target, offset).unwrap();
                Completion::Done
            }
            Op::ReadMeta { file, offset, len } => {
                let mut bytes = vec![0; len as usize];
                self.files.get(file).unwrap().read_at(&mut bytes, offset).unwrap();
                Completion::Bytes(bytes)
            }
            other => panic!("a read does {other:?}"),
        }
    }
}

/// Where level `level` of S(30) writes in `block`.
fn patch(level: u32, block: u32) -> SectorRun {
    SectorRun { first: (level * 7 + block * 13) % 32 * PATCH, count: PATCH }
}

/// Which level's bytes a sector holds.
fn owner(block: u32, sector: u32) -> u8 {
    let has = |level: &u32| {
        let run = patch(*level, block);
        (run.first..run.end()).contains(&sector)
    };
    (1..LEVELS).rev().find(has).unwrap_or(0) as u8 + 1
}

#[test]
fn a_first_touch_at_depth_30_takes_two_rounds_and_the_next_one() {
    let chain = Chain::new(|level, block| Some(patch(level, block)));
    let last = BLOCK_BYTES - u64::from(READ_BYTES);
    for inside in (0..32).map(|patch| patch * u64::from(PATCH) * SECTOR_BYTES + 8192).chain([0, last]) {
        for block in 0..BLOCKS {
            // A new process: nothing is known yet.
            let mut cold = Rounds::open(&chain);
            let offset = u64::from(block) * BLOCK_BYTES + inside;
            let (bytes, rounds) = cold.read(offset);
            let sector = u32::try_from(inside / SECTOR_BYTES).unwrap();
            assert!(bytes.iter().all(|byte| *byte == owner(block, sector)), "block {block} at {inside}");
            assert!(rounds <= 2, "{rounds} rounds for block {block} at {inside}");
            assert_eq!(cold.read(offset).1, 1, "warm");
            let elsewhere = u64::from(block) * BLOCK_BYTES + (inside + BLOCK_BYTES / 2) % BLOCK_BYTES;
            assert_eq!(cold.read(elsewhere).1, 1, "the whole block is known by now");
        }
    }
}

#[test]
fn a_whole_block_takes_one_round_through_any_number_of_empty_levels() {
    let chain = Chain::new(|_, _| None);
    for block in 0..BLOCKS {
        let (bytes, rounds) = Rounds::open(&chain).read(u64::from(block) * BLOCK_BYTES + 4096);
        assert!(bytes.iter().all(|byte| *byte == 1));
        assert_eq!(rounds, 1);
    }
}
