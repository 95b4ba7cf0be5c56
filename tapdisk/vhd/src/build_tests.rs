use super::*;
use crate::chain::Chain;
use crate::check::{Options, check};
use crate::create::NewKind;
use crate::meta::FooterState;
use crate::placed::tests::Tree;
use crate::storage::{Access, Volumes};

fn image(blocks: u64) -> NewImage {
    NewImage {
        uuid: uuid::Uuid::from_u128(7),
        virtual_bytes: blocks * BLOCK_BYTES,
        kind: NewKind::Dynamic,
        bat_entries_max: None,
        hidden: false,
        timestamp_s: 0,
    }
}

#[test]
fn an_image_is_settled_and_sound_whatever_size_it_turns_out_to_have() {
    for blocks_max in [3, 1 << 20] {
        let tree = Tree::new();
        let mut builder = Builder::new(tree.volumes.create(&Tree::name(0)).unwrap(), blocks_max);
        builder.put(BlockNo(2), &SectorBitmap::FULL, &vec![2; BLOCK_BYTES as usize]).unwrap();
        builder.put(BlockNo(0), &SectorBitmap::FULL, &vec![1; BLOCK_BYTES as usize]).unwrap();
        let twice = builder.put(BlockNo(0), &SectorBitmap::FULL, &vec![1; BLOCK_BYTES as usize]);
        assert!(matches!(twice, Err(Error::BadBat { block: 0, .. })), "{twice:?}");
        let meta = builder.finish(&image(3)).unwrap();
        assert_eq!(meta.footer_state, FooterState::Settled);
        let volume = tree.volumes.open(&Tree::name(0), Access::Read).unwrap();
        assert!(check(volume.as_ref(), &Options::default()).unwrap().is_sound());
        let chain = Chain::open(&tree.volumes, &Tree::name(0)).unwrap();
        let mut byte = [0; 512];
        for (block, value) in [(0, 1), (1, 0), (2, 2)] {
            chain.read_at(&mut byte, block * BLOCK_BYTES + BLOCK_BYTES - 512).unwrap();
            assert_eq!(byte, [value; 512]);
        }
    }
}

#[test]
fn blocks_past_the_end_are_refused() {
    let tree = Tree::new();
    let mut builder = Builder::new(tree.volumes.create(&Tree::name(0)).unwrap(), 8);
    builder.put(BlockNo(3), &SectorBitmap::FULL, &vec![2; BLOCK_BYTES as usize]).unwrap();
    assert!(matches!(builder.finish(&image(3)), Err(Error::BadSize { .. })));
}
