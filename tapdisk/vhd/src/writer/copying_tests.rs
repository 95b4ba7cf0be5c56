use super::*;
use crate::check::{Options, check};
use crate::create::{NewImage, NewKind, create};
use crate::placed::tests::{NoRecords, Tree};
use crate::slots::{BITMAP_PAGE_BYTES, is_full_bitmap_page};
use crate::storage::{Access, Volumes};
use crate::units::SectorRun;

const BLOCKS: u64 = 8;

fn empty(tree: &Tree, node: usize) {
    let new = NewImage {
        uuid: uuid::Uuid::from_u128(node as u128 + 101),
        virtual_bytes: BLOCKS * BLOCK_BYTES,
        kind: NewKind::Dynamic,
        bat_entries_max: None,
        hidden: false,
        timestamp_s: 0,
    };
    create(tree.volumes.create(&Tree::name(node)).unwrap().as_ref(), &new).unwrap();
}

fn open(tree: &Tree, node: usize) -> Writer {
    Writer::open(&tree.volumes, &Tree::name(node), &NoRecords).unwrap()
}

fn slot_of(writer: &Writer, block: BlockNo) -> Slot {
    match writer.presence(block) {
        Presence::Whole(slot) => slot,
        other => panic!("{block:?} is {other:?}"),
    }
}

/// A source whose blocks 0, 1, 2 and 5, 4, 6 lie in this order, and the
/// blocks as they are asked for.
fn source(tree: &Tree) -> Vec<WholeBlock> {
    empty(tree, 0);
    let mut writer = open(tree, 0);
    for block in [0, 1, 2, 5, 4, 6] {
        let data = vec![block as u8 + 1; BLOCK_BYTES as usize];
        writer.write(BlockNo(block), SectorRun::BLOCK, &data, false).unwrap();
    }
    writer.settle(None).unwrap();
    let whole = |block| WholeBlock { block, source_slot: slot_of(&writer, block) };
    [0, 1, 2, 4, 5, 6].map(BlockNo).map(whole).to_vec()
}

#[test]
fn whole_blocks_arrive_with_full_bitmaps_whatever_their_order() {
    let tree = Tree::new();
    let blocks = source(&tree);
    empty(&tree, 1);
    let from = tree.volumes.open(&Tree::name(0), Access::Read).unwrap();
    let mut writer = open(&tree, 1);
    // Something of its own first, so that places differ in the two.
    writer.write(BlockNo(7), SectorRun { first: 9, count: 1 }, &[9; 512], true).unwrap();
    let (shared, copied) = writer.copy_whole(from.as_ref(), &blocks).unwrap();
    assert_eq!(shared + copied, 6 * BLOCK_BYTES);
    writer.commit().unwrap();
    drop(writer);
    // As it is found by whoever comes next, before it was settled.
    let mut writer = open(&tree, 1);
    let mut byte = [0; 512];
    for block in &blocks {
        assert!(writer.bitmap(block.block).unwrap().is_full(), "{:?}", block.block);
        let slot = slot_of(&writer, block.block);
        let mut page = vec![0; BITMAP_PAGE_BYTES as usize];
        writer.volume().read_at(&mut page, slot.data_offset(0) - BITMAP_PAGE_BYTES).unwrap();
        assert!(is_full_bitmap_page(&page), "{:?}", block.block);
        for sector in [0, BLOCK_SECTORS - 1] {
            writer.volume().read_at(&mut byte, slot.data_offset(sector)).unwrap();
            assert_eq!(byte, [block.block.0 as u8 + 1; 512]);
        }
    }
    assert_eq!(writer.bitmap(BlockNo(7)).unwrap().present().count(), 1);
    assert_eq!(writer.presence(BlockNo(3)), Presence::Absent);
    writer.settle(None).unwrap();
    drop(writer);
    let volume = tree.volumes.open(&Tree::name(1), Access::Read).unwrap();
    assert!(check(volume.as_ref(), &Options::default()).unwrap().is_sound());
}

#[test]
fn what_was_copied_and_not_committed_is_not_there() {
    let tree = Tree::new();
    let blocks = source(&tree);
    empty(&tree, 1);
    let from = tree.volumes.open(&Tree::name(0), Access::Read).unwrap();
    let mut writer = open(&tree, 1);
    writer.copy_whole(from.as_ref(), &blocks).unwrap();
    assert!(writer.open.rw.is_dirty());
    drop(writer);
    assert_eq!(open(&tree, 1).blocks(), []);
}

#[test]
fn a_source_that_ends_too_soon_leaves_the_image_as_it_was() {
    let tree = Tree::new();
    let mut blocks = source(&tree);
    let last = blocks.last().unwrap().source_slot;
    blocks.push(WholeBlock { block: BlockNo(7), source_slot: Slot(last.0 + 4104) });
    empty(&tree, 1);
    let from = tree.volumes.open(&Tree::name(0), Access::Read).unwrap();
    let mut writer = open(&tree, 1);
    assert!(writer.copy_whole(from.as_ref(), &blocks).is_err());
    writer.settle(None).unwrap();
    assert!(!writer.blocks().contains(&BlockNo(7)));
    drop(writer);
    let volume = tree.volumes.open(&Tree::name(1), Access::Read).unwrap();
    assert!(check(volume.as_ref(), &Options::default()).unwrap().is_sound());
}
