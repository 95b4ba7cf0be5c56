use vhd::chain::Storage;
use vhd::storage::{Access, Fs, PosixFs, VolumeName};
use vhd::units::{BLOCK_BYTES, SectorRun};

use super::*;
use crate::engine::{Command, Output, Request, RequestId, RequestKind, Token};

/// A level and, by block, where it has it and whether it is whole.
type Level<'a> = (u128, &'a [(u32, u32, bool)]);

fn lower(levels: &[Level<'_>]) -> Lower {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("x"), b"").unwrap();
    let volume = PosixFs::new(folder.path().to_path_buf()).open("x", Access::Read).unwrap();
    let mut map = ChainMap::default();
    for (uuid, blocks) in levels {
        let node = Node {
            name: VolumeName::vhd(Uuid::from_u128(*uuid)),
            uuid: Uuid::from_u128(*uuid),
            virtual_bytes: 8 * BLOCK_BYTES,
            hidden: true,
            storage: Storage::Blocks,
            volume: Arc::clone(&volume),
        };
        map.push_top(node, blocks.iter().map(|(block, slot, whole)| (BlockNo(*block), Slot(*slot), *whole)));
    }
    let files = (0..u32::try_from(levels.len()).unwrap()).map(FileId).collect();
    Lower::new(map, files)
}

/// Sector 0 belongs to the level, the rest to nobody.
fn first_of(node: u8, slot: u32) -> Vec<OwnerRun> {
    let run = |first, count, owner| OwnerRun { run: SectorRun { first, count }, owner };
    vec![run(0, 1, Owner::Node { node, slot: Slot(slot) }), run(1, 4095, Owner::Zero)]
}

impl Lower {
    fn known_runs(&mut self, block: BlockNo) -> Option<Vec<OwnerRun>> {
        self.owners.get(block).map(|owners| owners.runs().collect())
    }
}

#[test]
fn a_level_on_top_changes_only_its_own_blocks() {
    let lower = lower(&[(1, &[(0, 7, true), (1, 70, false)]), (2, &[(1, 17, false), (2, 27, true)])]);
    let places =
        |block| lower.map.places(BlockNo(block)).map(|p| (p.node, p.slot.0, p.whole)).collect::<Vec<_>>();
    assert_eq!(places(0), [(0, 7, true)]);
    assert_eq!(places(1), [(1, 17, false), (0, 70, false)]);
    assert_eq!(places(2), [(1, 27, true)]);
    assert_eq!(places(3), []);
    assert_eq!((lower.map.levels_above(0), lower.map.levels_above(1)), (1, 0));
}

#[test]
fn what_is_known_outlives_a_refresh_where_nothing_moved() {
    let block_0 = [(0, 7, false)];
    // Level 2 goes: it had block 1, its parent takes it.
    let mut before =
        lower(&[(1, &[(1, 70, false)]), (2, &[(1, 17, false)]), (3, &[(0, 7, false), (2, 99, false)])]);
    before.owners.insert(BlockNo(0), &first_of(2, 7));
    before.owners.insert(BlockNo(1), &first_of(1, 17));
    before.owners.insert(BlockNo(2), &first_of(2, 99));
    let mut after = lower(&[(1, &[(1, 70, false)]), (3, &[block_0[0], (2, 99, true)])]);
    let mut asked = Vec::new();
    after.learn(before.known(), |block| {
        asked.push(block);
        Some(first_of(0, 70))
    });
    assert_eq!(asked, [BlockNo(1)], "what moved is found anew, and only that");
    assert_eq!(after.known_runs(BlockNo(0)), Some(first_of(1, 7)), "renumbered");
    assert_eq!(after.known_runs(BlockNo(1)), Some(first_of(0, 70)));
    assert_eq!(after.known_runs(BlockNo(2)), None, "a whole block needs no owners");
    assert_eq!(after.owners.stats(0, 0).runs, 4);
}

#[test]
fn what_cannot_be_found_anew_is_forgotten() {
    let mut before = lower(&[(1, &[(0, 7, false)])]);
    before.owners.insert(BlockNo(0), &first_of(0, 7));
    let mut after = lower(&[(1, &[(0, 8, false)])]);
    after.learn(before.known(), |_| None);
    let left = after.owners.stats(0, 0);
    assert_eq!((left.blocks, left.runs), (0, 0));
}

#[test]
fn the_topmost_level_has_depth_one() {
    let lower = lower(&[(1, &[(0, 7, true)]), (2, &[(1, 7, true)]), (3, &[(2, 7, true)])]);
    let mut engine = Engine::new(8 * BLOCK_BYTES, None, lower);
    let len = u32::try_from(4 * BLOCK_BYTES).unwrap();
    let (id, kind) = (RequestId(1), RequestKind::BlockStatus);
    engine.submit(0, Request { id, kind, offset: 0, len });
    let Some(Output::Extents(_, extents)) = engine.next_output() else { panic!("no answer") };
    assert_eq!(extents.iter().map(|extent| extent.depth).collect::<Vec<_>>(), [3, 2, 1, 0]);
}

#[test]
fn the_end_of_a_raw_disk_within_a_block_is_read_at_once() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("x"), b"").unwrap();
    let node = Node {
        name: VolumeName::vhd(Uuid::nil()),
        uuid: Uuid::nil(),
        virtual_bytes: BLOCK_BYTES + 512,
        hidden: true,
        storage: Storage::Flat,
        volume: PosixFs::new(folder.path().to_path_buf()).open("x", Access::Read).unwrap(),
    };
    let blocks = [0, 1].map(|block| (BlockNo(block), Slot(0), true));
    let mut map = ChainMap::default();
    map.push_top(node, blocks);
    let mut engine = Engine::new(BLOCK_BYTES + 512, None, Lower::new(map, vec![FileId(0)]));
    let (id, kind) = (RequestId(1), RequestKind::BlockStatus);
    engine.submit(0, Request { id, kind, offset: BLOCK_BYTES, len: 512 });
    assert!(matches!(engine.next_output(), Some(Output::Extents(..))), "nobody answers");
}

/// Parts of unaligned requests have ids of their own, from 2^63 on.
#[test]
fn a_lookup_takes_no_other_requests_id() {
    let mut engine = Engine::new(8 * BLOCK_BYTES, None, lower(&[(1, &[(0, 7, false)])]));
    let (id, kind) = (RequestId(1 << 63 | 1), RequestKind::BlockStatus);
    engine.submit(0, Request { id, kind, offset: 0, len: 512 });
    engine.command(0, Token(1), Command::Lookup { offset: 0, len: 512 });
    let mut answers = (0, 0);
    while let Some(output) = engine.next_output() {
        match output {
            Output::Start(op, Op::ReadMeta { .. }) => engine.complete(0, op, Completion::Bytes(vec![0; 512])),
            Output::Done(..) => answers.0 += 1,
            Output::Answer(..) => answers.1 += 1,
            _ => {}
        }
    }
    assert_eq!(answers, (1, 1), "requests and lookups answered");
}
