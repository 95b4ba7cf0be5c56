//! The merge of a leaf, operation by operation: when it begins, how much room
//! its parent takes meanwhile, and which blocks come along with each other.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use std::collections::VecDeque;
use std::sync::Arc;

use tapdisk::datapath::DataPath;
use tapdisk::disk::{Files, Opener};
use tapdisk::driver::exec::{Tables, prepare};
use tapdisk::driver::{Core, Effect, PeerId};
use tapdisk::engine::{Command, Completion, Engine, MergeBounds, Op, OpId, Output, Token};
use tapdisk::service::Service;
use tapdisk_control::{Call, ImageRef, MERGE_EXTRA_BLOCKS_MAX, MergePhase, Refusal, Request, Stats};
use uuid::Uuid;
use vhd::bat::{BAT_FREE, read_bat};
use vhd::create::{NewImage, NewKind, create};
use vhd::meta::Meta;
use vhd::record::TmpfsRecords;
use vhd::reparent::ParentLink;
use vhd::slots::{BITMAP_PAGE_BYTES, is_full_bitmap_page};
use vhd::storage::{Access, CopyRange, FileVolumes, PosixFs, VolumeName, Volumes};
use vhd::units::{BLOCK_BYTES, BlockNo, SectorRun, Slot};
use vhd::writer::Writer;

const PARENT: Uuid = Uuid::from_u128(1);
const LEAF: Uuid = Uuid::from_u128(2);
/// Long after any guest asked for anything, in microseconds.
const NOW_US: u64 = 10_000_000;
/// Most operations of any merge here.
const OPS_MAX: usize = 10_000;

/// A disk of two images whose operations end one after the other, no time
/// passing and no tick coming.
struct Disk {
    _folder: tempfile::TempDir,
    opener: Opener,
    volumes: Arc<dyn Volumes>,
    flying: VecDeque<(OpId, Op)>,
    /// Whether the filesystem is to seem to share extents.
    shares: bool,
    /// Of each copy.
    copies: Vec<Vec<CopyRange>>,
    /// Blocks copied whose space the leaf has not given back, and the most ever.
    extra: (u64, u64),
}

impl Disk {
    /// The leaf has its first `blocks`, whole, in that order.
    fn new(blocks: u32, shares: bool) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = |name| folder.path().join(name);
        std::fs::create_dir(path("sr")).unwrap();
        std::fs::create_dir(path("records")).unwrap();
        let volumes: Arc<dyn Volumes> = Arc::new(FileVolumes::new(Arc::new(PosixFs::new(path("sr")))));
        let opener = Opener {
            volumes: Arc::clone(&volumes),
            records: Arc::new(TmpfsRecords::new(path("records"), Uuid::nil(), 1)),
            files: Arc::new(Files::default()),
        };
        let link = ParentLink { uuid: PARENT, volume: VolumeName::vhd(PARENT), timestamp_s: 0 };
        for (uuid, kind) in [(PARENT, NewKind::Dynamic), (LEAF, NewKind::Child { parent: link })] {
            let new = NewImage {
                uuid,
                virtual_bytes: u64::from(blocks) * BLOCK_BYTES,
                kind,
                bat_entries_max: None,
                hidden: uuid == PARENT,
                timestamp_s: 0,
            };
            create(volumes.create(&VolumeName::vhd(uuid)).unwrap().as_ref(), &new).unwrap();
        }
        let records = opener.records.as_ref();
        let mut leaf = Writer::open(volumes.as_ref(), &VolumeName::vhd(LEAF), records).unwrap();
        for block in 0..blocks {
            let run = SectorRun { first: 0, count: 1 };
            leaf.write(BlockNo(block), run, &[block as u8 + 1; 512], false).unwrap();
        }
        leaf.settle(None).unwrap();
        drop(leaf);
        let (flying, copies) = (VecDeque::new(), Vec::new());
        Self { _folder: folder, opener, volumes, flying, shares, copies, extra: (0, 0) }
    }

    /// Merges, until the leaf is empty.
    fn merge(&mut self, extra_blocks: usize) {
        let (mut engine, _) = self.opener.open(&VolumeName::vhd(LEAF), false).unwrap();
        let parent = self.opener.image(&VolumeName::vhd(PARENT)).unwrap();
        let below = self.opener.below(&VolumeName::vhd(PARENT), &parent.meta, Vec::new()).unwrap();
        let bounds = MergeBounds { rate_bytes_per_s: 0, extra_blocks };
        let (parent, below) = (Box::new(parent.image), Box::new(below));
        engine.command(NOW_US, Token(1), Command::MergeStart { parent, below, bounds });
        self.take(&mut engine);
        assert!(!self.flying.is_empty(), "it waits for a tick");
        for _ in 0..OPS_MAX {
            let Some((op, what)) = self.flying.pop_front() else { break };
            let completion = self.carry_out(what);
            engine.complete(NOW_US, op, completion);
            self.take(&mut engine);
        }
        let (phase, figures) = engine.merge_status();
        assert_eq!((phase, figures.error), (MergePhase::Empty, None));
        assert_eq!(figures.blocks_done, figures.blocks_total);
        assert_eq!(figures.bytes_copied, figures.blocks_total * BLOCK_BYTES);
        assert_eq!(figures.bytes_cloned, if self.shares { figures.bytes_copied } else { 0 });
    }

    fn take(&mut self, engine: &mut Engine) {
        while let Some(output) = engine.next_output() {
            match output {
                Output::Start(op, what) => {
                    if let Op::Copy { ranges, .. } = &what {
                        self.copies.push(ranges.to_vec());
                        self.extra.0 += ranges.iter().map(|range| range.len_bytes / BLOCK_BYTES).sum::<u64>();
                        self.extra.1 = self.extra.0.max(self.extra.1);
                    }
                    self.flying.push_back((op, what));
                }
                Output::Answer(_, answer) => drop(answer.unwrap()),
                Output::Close(_) => {}
                other => panic!("{other:?}"),
            }
        }
    }

    fn carry_out(&mut self, what: Op) -> Completion {
        let bytes = match &what {
            Op::Copy { ranges, .. } => ranges.iter().map(|range| range.len_bytes).sum(),
            _ => 0,
        };
        if let Op::Zero { len, .. } = &what {
            self.extra.0 -= len / BLOCK_BYTES;
        }
        let tables = Tables { files: &self.opener.files, volumes: &self.volumes };
        match prepare(what, &tables, |_| None).unwrap().run().unwrap() {
            Completion::Copied { .. } => {
                Completion::Copied { shared_bytes: if self.shares { bytes } else { 0 } }
            }
            other => other,
        }
    }

    /// The page before each block of the parent, and its first sector.
    fn parent(&self) -> Vec<(Vec<u8>, Vec<u8>)> {
        let volume = self.volumes.open(&VolumeName::vhd(PARENT), Access::Read).unwrap();
        let meta = Meta::read(volume.as_ref()).unwrap();
        let read = |slot: u32| {
            assert_ne!(slot, BAT_FREE);
            let data = Slot(slot).data_offset(0);
            let (mut page, mut sector) = (vec![0; BITMAP_PAGE_BYTES as usize], vec![0; 512]);
            volume.read_at(&mut page, data - BITMAP_PAGE_BYTES).unwrap();
            volume.read_at(&mut sector, data).unwrap();
            (page, sector)
        };
        read_bat(volume.as_ref(), meta.layout.as_ref().unwrap()).unwrap().into_iter().map(read).collect()
    }

    fn check_parent(&self) {
        for (block, (page, sector)) in self.parent().iter().enumerate() {
            // Before the first slot lie the headers.
            let full = page.ends_with(&[0xff; 512]) && (block == 0 || is_full_bitmap_page(page));
            assert!(full, "block {block}");
            assert_eq!(sector, &[block as u8 + 1; 512], "block {block}");
        }
    }
}

#[test]
fn the_parent_takes_no_more_room_than_it_may() {
    for extra_blocks in [1, 2, 3, 7, 40] {
        let mut disk = Disk::new(24, false);
        disk.merge(extra_blocks);
        let most = disk.extra.1;
        assert!(most <= extra_blocks as u64, "{most} extra blocks instead of {extra_blocks}");
        assert!(most > 1 || extra_blocks == 1, "{most} extra blocks of {extra_blocks}");
        disk.check_parent();
    }
}

#[test]
fn blocks_side_by_side_are_shared_together_and_their_bitmaps_come_along() {
    let mut disk = Disk::new(40, true);
    disk.merge(16);
    // The first two show that extents are shared; all others are neighbours.
    let ranges: Vec<usize> = disk.copies.iter().map(Vec::len).collect();
    assert_eq!(ranges[0], 2);
    assert!(ranges.len() > 2 && ranges[1..].iter().all(|ranges| *ranges == 1), "{ranges:?}");
    let longest = disk.copies.iter().flatten().map(|range| range.len_bytes / BLOCK_BYTES).max();
    assert!(longest >= Some(8), "{longest:?} blocks");
    disk.check_parent();
}

#[test]
fn a_page_with_something_else_in_it_is_left_behind() {
    let mut disk = Disk::new(12, true);
    let odd = [5, 9];
    let volume = disk.volumes.open(&VolumeName::vhd(LEAF), Access::Write).unwrap();
    let meta = Meta::read(volume.as_ref()).unwrap();
    let bat = read_bat(volume.as_ref(), meta.layout.as_ref().unwrap()).unwrap();
    for block in odd {
        volume.write_at(b"conectix", Slot(bat[block]).data_offset(0) - BITMAP_PAGE_BYTES).unwrap();
    }
    drop(volume);
    disk.merge(16);
    let begins = |block: usize| {
        let at = Slot(bat[block]).data_offset(0);
        disk.copies.iter().flatten().any(|range| range.from == at)
    };
    assert!(odd.iter().all(|block| begins(*block)));
    disk.check_parent();
}

#[test]
fn blocks_that_are_copied_do_not_take_their_bitmaps_along() {
    let mut disk = Disk::new(12, false);
    disk.merge(16);
    assert!(disk.copies.iter().flatten().all(|range| range.len_bytes == BLOCK_BYTES));
    disk.check_parent();
}

#[test]
fn room_for_no_block_or_for_too_many_is_refused() {
    let disk = Disk::new(2, false);
    let (engine, meta) = disk.opener.open(&VolumeName::vhd(LEAF), false).unwrap();
    let leaf = meta.map(|meta| (VolumeName::vhd(LEAF), meta));
    let mut core = DataPath::new(engine, Service::new(disk.opener.clone(), leaf));
    let image = |footer: Uuid| ImageRef { volume: VolumeName::vhd(footer).as_str().to_owned(), footer };
    for (extra_blocks_max, refused) in
        [(0, true), (MERGE_EXTRA_BLOCKS_MAX + 1, true), (u32::MAX, true), (MERGE_EXTRA_BLOCKS_MAX, false)]
    {
        let (leaf, parent) = (image(LEAF), image(PARENT));
        let request = Request::MergeStart { leaf, parent, rate_bytes_per_s: 0, extra_blocks_max };
        core.call(NOW_US, PeerId(1), Call { id: 1, request }, &Stats::default());
        match core.next_effect() {
            Some(Effect::Answer(_, answer)) => {
                assert!(refused && matches!(answer.outcome, Err(Refusal::Bad { .. })), "{answer:?}");
            }
            other => assert!(!refused && matches!(other, Some(Effect::Run(_))), "{extra_blocks_max}"),
        }
    }
}
