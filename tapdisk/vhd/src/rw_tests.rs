use super::*;

fn image(blocks: u32) -> RwImage {
    let layout = Layout {
        table_offset: 1536,
        max_entries: blocks,
        entries: blocks,
        batmap_header: None,
        batmap_bits: None,
        data_start: 3072,
        block_sectors: 4096,
    };
    let bat = vec![BAT_FREE; blocks as usize];
    let (slots, _) = Slots::survey(&bat, layout.data_start);
    RwImage::new(layout, bat, |_| false, slots)
}

fn entry_on_file(image: &RwImage, captured: &Captured, block: u32) -> u32 {
    let (_, sector) = image.bat_sectors(captured)[0];
    u32::from_be_bytes(sector.as_chunks::<4>().0[block as usize])
}

const RUN: SectorRun = SectorRun { first: 3, count: 2 };

#[test]
fn a_neighbour_without_data_is_never_carried_along() {
    let mut image = image(4);
    let first = image.allocate(BlockNo(0), true).unwrap();
    image.allocate(BlockNo(1), true).unwrap();
    image.written(BlockNo(0), first, RUN);
    let captured = image.capture();
    assert_eq!(entry_on_file(&image, &captured, 0), first.0);
    assert_eq!(entry_on_file(&image, &captured, 1), BAT_FREE);
}

#[test]
fn a_freed_block_with_a_new_empty_slot_is_written_as_free() {
    let mut image = image(4);
    let block = BlockNo(2);
    let old = image.allocate(block, true).unwrap();
    image.written(block, old, RUN);
    let captured = image.capture();
    image.bat_written(&captured);
    assert!(image.durable(captured).is_empty());

    image.free(block);
    let new = image.allocate(block, true).unwrap();
    assert_ne!(old, new, "the old slot is not free before the entry is durably clear");
    let captured = image.capture();
    assert_eq!(entry_on_file(&image, &captured, 2), BAT_FREE);
    image.bat_written(&captured);
    assert_eq!(image.durable(captured), [old]);

    image.written(block, new, RUN);
    let captured = image.capture();
    assert_eq!(entry_on_file(&image, &captured, 2), new.0);
}

#[test]
fn a_write_that_was_overtaken_by_a_free_adds_nothing() {
    let mut image = image(4);
    let block = BlockNo(0);
    let old = image.allocate(block, false).unwrap();
    image.free(block);
    let new = image.allocate(block, false).unwrap();
    assert!(image.entries_for(block, old, RUN).is_empty());
    image.written(block, old, RUN);
    assert!(!image.bitmap(block).unwrap().has_any(SectorRun::BLOCK));
    assert_eq!(image.entries_for(block, new, RUN).len(), 2);
}

#[test]
fn what_is_given_up_while_a_capture_waits_for_space_goes_first_and_is_never_named_again() {
    let mut image = image(8);
    let written = |image: &mut RwImage, block: u32| {
        let slot = image.allocate(BlockNo(block), true).unwrap();
        image.written(BlockNo(block), slot, RUN);
        slot
    };
    // Three that are durable; one of them is freed, and comes back.
    let old: Vec<Slot> = (0..3).map(|block| written(&mut image, block)).collect();
    let captured = image.capture();
    image.bat_written(&captured);
    image.durable(captured);
    image.free(BlockNo(0));
    let again = written(&mut image, 0);
    image.free(BlockNo(1));
    let fresh = written(&mut image, 3);
    let mut held = image.capture();
    // It cannot be written. Meanwhile two more are freed.
    image.free(BlockNo(2));
    image.free(BlockNo(3));
    let relief = image.relief(&mut held).unwrap();
    assert!(relief.bitmaps.is_empty());
    for (block, entry) in [(0, old[0].0), (1, BAT_FREE), (2, BAT_FREE), (3, BAT_FREE)] {
        assert_eq!(entry_on_file(&image, &relief, block), entry, "block {block}");
    }
    image.bat_written(&relief);
    assert_eq!(BTreeSet::from_iter(image.durable(relief)), BTreeSet::from([old[1], old[2], fresh]));
    // Only the one that came back is left to write, and its former slot.
    assert_eq!(held.bitmaps.iter().map(|(slot, _)| *slot).collect::<Vec<_>>(), [again]);
    assert!(image.relief(&mut held).is_none());
    for (block, entry) in [(0, again.0), (1, BAT_FREE), (2, BAT_FREE), (3, BAT_FREE)] {
        assert_eq!(entry_on_file(&image, &held, block), entry, "block {block}");
    }
    image.bat_written(&held);
    assert_eq!(image.durable(held), [old[0]]);
    assert!(image.is_dirty(), "the record still says what was freed");
}

#[test]
fn only_bitmaps_of_slots_nobody_knows_may_go_first() {
    let mut image = image(4);
    let (known, new) = (BlockNo(0), BlockNo(1));
    let known_slot = image.allocate(known, false).unwrap();
    image.written(known, known_slot, RUN);
    let captured = image.capture();
    assert_eq!(captured.new_slots(), [known_slot].into());
    image.bat_written(&captured);
    image.durable(captured);

    let new_slot = image.allocate(new, false).unwrap();
    image.written(new, new_slot, RUN);
    image.written(known, known_slot, SectorRun { first: 100, count: 1 });
    let captured = image.capture();
    assert_eq!(captured.new_slots(), [new_slot].into());
    assert_eq!(captured.bitmaps.len(), 2);
    // One that goes makes no slot known.
    image.free(known);
    assert_eq!(image.capture().new_slots(), [].into());
}

#[test]
fn a_block_whose_bitmap_is_there_needs_only_its_entry() {
    for alone in [true, false] {
        let mut image = image(4);
        let slot = image.allocate(BlockNo(1), alone).unwrap();
        image.written_whole(BlockNo(1), slot);
        assert_eq!(image.presence(BlockNo(1)), Presence::Whole(slot));
        let captured = image.capture();
        assert!(captured.bitmaps.is_empty());
        assert_eq!(entry_on_file(&image, &captured, 1), slot.0);
        image.bat_written(&captured);
        assert!(image.durable(captured).is_empty());
        assert!(!image.is_dirty());
    }
}

#[test]
fn writing_again_what_is_there_keeps_no_bitmap_from_being_forgotten() {
    let mut image = image(4);
    let block = BlockNo(1);
    let slot = image.allocate(block, false).unwrap();
    image.written(block, slot, RUN);
    let captured = image.capture();
    image.bat_written(&captured);
    image.durable(captured);
    assert!(image.pinned.is_empty() && image.bitmap(block).is_some());
    image.written(block, slot, RUN);
    assert!(image.pinned.is_empty(), "its bitmap is held for nothing");
    assert!(!image.is_dirty());
    image.written(block, slot, SectorRun { first: 2000, count: 1 });
    assert!(image.is_dirty() && image.bitmap(block).is_some_and(|bitmap| bitmap.has_all(RUN)));
}
