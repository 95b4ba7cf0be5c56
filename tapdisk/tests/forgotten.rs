//! A write into a block whose bitmap is forgotten while the write is under
//! way, for the sake of others: what the block had before must stay.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use tapdisk::engine::{
    Completion, Engine, FileId, Image, Lower, Op, OpId, Output, Request, RequestId, RequestKind,
};
use uuid::Uuid;
use vhd::bat::Layout;
use vhd::bitmap::SectorBitmap;
use vhd::record::{Owner, PendingRecord, RECORD_WORDS, Words};
use vhd::rw::RwImage;
use vhd::slots::Slots;
use vhd::storage::VolumeName;
use vhd::units::{BLOCK_BYTES, SectorRun};

/// More blocks than have scattered bitmaps in memory at one time.
const BLOCKS: u32 = 40_000;
const FILE: FileId = FileId(3);

#[derive(Debug)]
struct Memory(Vec<u64>);

impl Words for Memory {
    fn load(&self, index: usize) -> u64 {
        self.0[index]
    }

    fn store(&mut self, index: usize, value: u64) {
        self.0[index] = value;
    }
}

/// What every block has on the file: every other sector, from the second on.
fn scattered() -> SectorBitmap {
    SectorBitmap::from_bytes(&[0b0101_0101; 512])
}

struct Disk {
    engine: Engine,
    flying: Vec<(OpId, Op)>,
    done: Vec<RequestId>,
    written: Vec<SectorBitmap>,
}

impl Disk {
    fn new() -> Self {
        let layout = Layout {
            table_offset: 1536,
            max_entries: BLOCKS,
            entries: BLOCKS,
            batmap_header: None,
            batmap_bits: None,
            data_start: 1 << 20,
            block_sectors: 4096,
        };
        // As the reference places them, one behind the other.
        let bat: Vec<u32> = (0..BLOCKS).map(|block| 2055 + block * 4104).collect();
        let (slots, _) = Slots::survey(&bat, layout.data_start);
        let rw = RwImage::new(layout, bat, |_| false, slots);
        let footer = Uuid::from_u128(1);
        let owner = Owner { boot: Uuid::nil(), footer, epoch: 1 };
        let record = PendingRecord::format(Box::new(Memory(vec![0; RECORD_WORDS])), owner);
        let bytes = u64::from(BLOCKS) * BLOCK_BYTES;
        let image = Image::new(FILE, VolumeName::vhd(footer), footer, bytes, rw, record);
        let engine = Engine::new(bytes, Some(image), Lower::default());
        Self { engine, flying: Vec::new(), done: Vec::new(), written: Vec::new() }
    }

    fn submit(&mut self, kind: RequestKind, block: u32) -> RequestId {
        let id = RequestId(u64::from(block) << 8 | u64::from(kind == RequestKind::Flush));
        let range = if kind == RequestKind::Flush { (0, 0) } else { (u64::from(block) * BLOCK_BYTES, 512) };
        self.engine.submit(0, Request { id, kind, offset: range.0, len: range.1 });
        self.take();
        id
    }

    fn take(&mut self) {
        while let Some(output) = self.engine.next_output() {
            match output {
                Output::Start(op, what) => self.flying.push((op, what)),
                Output::Done(id, result) => {
                    assert_eq!(result, Ok(()));
                    self.done.push(id);
                }
                Output::ZeroFill(_) => {}
                other => panic!("{other:?}"),
            }
        }
    }

    /// Ends every operation but writes of guests, until there are none.
    fn land_all_but_writes(&mut self) {
        while let Some(at) = self.flying.iter().position(|(_, op)| !matches!(op, Op::WriteGuest { .. })) {
            let (op, what) = self.flying.swap_remove(at);
            let completion = match what {
                Op::ReadMeta { .. } => Completion::Bytes(scattered().to_bytes().to_vec()),
                Op::WriteMeta { parts, .. } => {
                    let bitmaps = parts.iter().map(|(_, bytes)| <&[u8; 512]>::try_from(&**bytes).unwrap());
                    self.written.extend(bitmaps.map(SectorBitmap::from_bytes));
                    Completion::Done
                }
                _ => Completion::Done,
            };
            self.engine.complete(0, op, completion);
            self.take();
        }
    }
}

#[test]
fn a_write_whose_bitmap_was_forgotten_meanwhile_keeps_what_the_block_had() {
    let mut disk = Disk::new();
    let write = disk.submit(RequestKind::Write { fua: false }, 0);
    disk.land_all_but_writes();
    let [(op, Op::WriteGuest { .. })] = disk.flying[..] else { panic!("{:?}", disk.flying) };
    // Each of these remembers a bitmap, until the first is gone.
    for block in 1..BLOCKS {
        disk.submit(RequestKind::Read, block);
        disk.land_all_but_writes();
    }
    disk.done.clear();
    disk.flying.clear();
    disk.engine.complete(0, op, Completion::Done);
    disk.take();
    disk.land_all_but_writes();
    let flush = disk.submit(RequestKind::Flush, 0);
    disk.land_all_but_writes();
    assert_eq!(disk.done, [write, flush]);
    let mut wanted = scattered();
    wanted.set(SectorRun { first: 0, count: 1 });
    assert_eq!(disk.written, [wanted]);
}
