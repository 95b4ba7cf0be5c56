//! The list of blocks that guests change: every change is in it before it can
//! be seen, what was under way when it began included, and nothing else is.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use std::sync::Arc;

use tapdisk::disk::{Files, Opener};
use tapdisk::engine::{
    Command, CommandError, CommandReply, Completion, Engine, Op, OpId, Output, Request, RequestId,
    RequestKind, Token,
};
use uuid::Uuid;
use vhd::create::{NewImage, NewKind, create};
use vhd::record::TmpfsRecords;
use vhd::storage::{FileVolumes, PosixFs, VolumeName};
use vhd::units::BLOCK_BYTES;

const BLOCKS: u64 = 200;
const LIST: Uuid = Uuid::from_u128(7);

/// A disk whose operations end when the test says so.
struct Disk {
    _folder: tempfile::TempDir,
    engine: Engine,
    files: Arc<Files>,
    flying: Vec<(OpId, Op)>,
    done: Vec<RequestId>,
    next: u64,
}

impl Disk {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = |name| folder.path().join(name);
        std::fs::create_dir(path("sr")).unwrap();
        std::fs::create_dir(path("records")).unwrap();
        let opener = Opener {
            volumes: Arc::new(FileVolumes::new(Arc::new(PosixFs::new(path("sr"))))),
            records: Arc::new(TmpfsRecords::new(path("records"), Uuid::nil(), 1)),
            files: Arc::new(Files::default()),
        };
        let new = NewImage {
            uuid: Uuid::from_u128(1),
            virtual_bytes: BLOCKS * BLOCK_BYTES,
            kind: NewKind::Dynamic,
            bat_entries_max: None,
            hidden: false,
            timestamp_s: 0,
        };
        let name = VolumeName::vhd(new.uuid);
        create(opener.volumes.create(&name).unwrap().as_ref(), &new).unwrap();
        let (engine, _) = opener.open(&name, false).unwrap();
        let (flying, done) = (Vec::new(), Vec::new());
        Self { _folder: folder, engine, files: opener.files, flying, done, next: 0 }
    }

    /// Hands in a request of one sector, or of a whole block.
    fn submit(&mut self, kind: RequestKind, block: u64, whole: bool) -> RequestId {
        let id = RequestId(self.next);
        self.next += 1;
        let len = if whole { BLOCK_BYTES as u32 } else { 512 };
        self.engine.submit(0, Request { id, kind, offset: block * BLOCK_BYTES, len });
        self.take();
        id
    }

    /// What the engine said since.
    fn take(&mut self) -> Vec<Result<CommandReply, CommandError>> {
        let mut answers = Vec::new();
        while let Some(output) = self.engine.next_output() {
            match output {
                Output::Start(op, what) => self.flying.push((op, what)),
                Output::Done(id, result) => {
                    assert_eq!(result, Ok(()));
                    self.done.push(id);
                }
                Output::Answer(_, answer) => answers.push(answer),
                Output::ZeroFill(_) => {}
                other => panic!("{other:?}"),
            }
        }
        answers
    }

    /// Ends operations until there are none.
    fn land(&mut self) {
        while !self.flying.is_empty() {
            let (op, what) = self.flying.remove(0);
            let completion = match what {
                Op::ReadMeta { file, offset, len } => {
                    let mut bytes = vec![0; len as usize];
                    self.files.get(file).unwrap().read_at(&mut bytes, offset).unwrap();
                    Completion::Bytes(bytes)
                }
                Op::Extend { file, len } => {
                    self.files.get(file).unwrap().extend(len).unwrap();
                    Completion::Done
                }
                _ => Completion::Done,
            };
            self.engine.complete(0, op, completion);
            self.take();
        }
    }

    fn write(&mut self, block: u64) {
        let id = self.submit(RequestKind::Write { fua: false }, block, false);
        self.land();
        assert!(self.done.contains(&id));
    }

    fn ask(&mut self, command: Command) -> Result<CommandReply, CommandError> {
        self.engine.command(0, Token(1), command);
        self.take().pop().unwrap()
    }

    fn track(&mut self) {
        assert_eq!(self.ask(Command::Track { id: LIST }), Ok(CommandReply::Done));
    }

    fn tracked(&mut self) -> Vec<(u32, u32)> {
        match self.ask(Command::Tracked { id: LIST, from: 0 }) {
            Ok(CommandReply::Blocks { runs, next: None }) => runs,
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn every_kind_of_change_is_in_the_list_and_reads_are_not() {
    let mut disk = Disk::new();
    for block in [1, 2, 3, 4, 9] {
        disk.write(block);
    }
    disk.track();
    disk.write(3);
    disk.submit(RequestKind::Read, 1, false);
    disk.submit(RequestKind::Flush, 0, false);
    disk.land();
    disk.submit(RequestKind::Trim { fua: false }, 4, true);
    disk.land();
    disk.submit(RequestKind::WriteZeroes { fua: false, no_hole: true }, 9, false);
    disk.land();
    // A block that is not there reads as zeros before and after.
    disk.submit(RequestKind::Trim { fua: false }, 150, true);
    disk.land();
    // A new one, and the disk's last.
    disk.write(20);
    disk.write(BLOCKS - 1);
    assert_eq!(disk.tracked(), [(3, 2), (9, 1), (20, 1), (BLOCKS as u32 - 1, 1)]);
}

#[test]
fn what_was_under_way_when_it_began_is_in_it() {
    let mut disk = Disk::new();
    disk.write(5);
    // Over what is there: it can be seen as soon as it lands.
    let over = disk.submit(RequestKind::Write { fua: false }, 5, false);
    // Into a new block, which first takes a longer file: parked.
    let fresh = disk.submit(RequestKind::Write { fua: false }, 60, false);
    assert!(disk.flying.iter().any(|(_, op)| matches!(op, Op::WriteGuest { .. })), "{:?}", disk.flying);
    assert!(disk.done.iter().all(|id| ![over, fresh].contains(id)));
    disk.track();
    disk.land();
    assert!([over, fresh].iter().all(|id| disk.done.contains(id)));
    assert_eq!(disk.tracked(), [(5, 1), (60, 1)]);
}

#[test]
fn a_write_is_in_it_before_its_data_moves() {
    let mut disk = Disk::new();
    disk.write(5);
    disk.track();
    disk.submit(RequestKind::Write { fua: false }, 5, false);
    assert!(!disk.flying.is_empty(), "nothing has landed");
    assert_eq!(disk.tracked(), [(5, 1)]);
}

#[test]
fn a_list_ends_when_it_is_handed_out_and_strange_lists_are_refused() {
    let mut disk = Disk::new();
    assert_eq!(disk.ask(Command::Tracked { id: LIST, from: 0 }), Err(CommandError::Unknown));
    disk.track();
    disk.write(1);
    assert_eq!(disk.tracked(), [(1, 1)]);
    disk.write(2);
    assert_eq!(disk.tracked(), [(1, 1)], "what comes later is not in it");
    let other = Uuid::from_u128(8);
    assert_eq!(disk.ask(Command::Track { id: other }), Ok(CommandReply::Done));
    assert_eq!(disk.ask(Command::Tracked { id: LIST, from: 0 }), Err(CommandError::Unknown));
    assert_eq!(disk.ask(Command::TrackEnd { id: LIST }), Ok(CommandReply::Done));
    let empty = CommandReply::Blocks { runs: Vec::new(), next: None };
    assert_eq!(disk.ask(Command::Tracked { id: other, from: 0 }), Ok(empty));
    assert_eq!(disk.ask(Command::TrackEnd { id: other }), Ok(CommandReply::Done));
    assert_eq!(disk.ask(Command::Tracked { id: other, from: 0 }), Err(CommandError::Unknown));
}
