//! A table, and random trees compared with what their disks hold.

use std::sync::Arc;

use super::*;
use crate::create::{NewImage, NewKind, ParentLink, create};
use crate::record::{PendingRecord, RecordStore};
use crate::storage::{FileVolumes, PosixFs, VolumeName, Volumes};
use crate::units::SectorRun;
use crate::writer::Writer;

fn run(offset: u64, len: u64, at: Option<(u128, u64)>) -> Placed {
    Placed { offset, len, at: at.map(|(image, offset)| At { image: Uuid::from_u128(image), offset }) }
}

#[test]
fn only_the_same_place_of_the_same_image_is_equal() {
    let a = [run(0, 10, Some((1, 100))), run(10, 10, None), run(20, 10, Some((2, 0)))];
    let b = [run(0, 4, Some((1, 100))), run(4, 6, Some((3, 104))), run(10, 15, None)];
    assert_eq!(differing(&a, &b), [4..10, 20..30]);
    assert_eq!(differing(&a, &a), [] as [Range<u64>; 0]);
    // The same image, but elsewhere in it.
    assert_eq!(
        differing(&[run(0, 8, Some((1, 0)))], &[run(0, 8, Some((1, 8)))]),
        std::slice::from_ref(&Range { start: 0, end: 8 })
    );
    assert_eq!(differing(&a, &[]), [0..10, 20..30]);
    assert_eq!(differing(&[], &[]), [] as [Range<u64>; 0]);
}

#[test]
fn runs_join_where_they_continue_on_disk_and_in_the_image() {
    let mut list = Vec::new();
    for next in [run(0, 5, Some((1, 50))), run(5, 5, Some((1, 55))), run(10, 5, Some((1, 50)))] {
        push(&mut list, next);
    }
    assert_eq!(list, [run(0, 10, Some((1, 50))), run(10, 5, Some((1, 50)))]);
}

#[derive(Debug)]
pub(crate) struct NoRecords;

impl RecordStore for NoRecords {
    fn existing(&self, _footer: Uuid) -> std::io::Result<Option<PendingRecord>> {
        Ok(None)
    }
    fn create(&self, _footer: Uuid) -> std::io::Result<PendingRecord> {
        Err(std::io::ErrorKind::Unsupported.into())
    }
    fn remove(&self, _footer: Uuid) -> std::io::Result<()> {
        Ok(())
    }
}

pub(crate) struct Random(pub u64);

impl Random {
    pub fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % n
    }
}

const BLOCKS: u64 = 4;

/// A tree of images, each written to a little when it is made.
pub(crate) struct Tree {
    pub volumes: FileVolumes,
    pub parents: Vec<Option<usize>>,
    sizes: Vec<u64>,
    _folder: tempfile::TempDir,
}

impl Tree {
    pub fn name(node: usize) -> VolumeName {
        VolumeName::vhd(Uuid::from_u128(node as u128 + 1))
    }

    pub fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let volumes = FileVolumes::new(Arc::new(PosixFs::new(folder.path().to_owned())));
        Self { volumes, parents: Vec::new(), sizes: Vec::new(), _folder: folder }
    }

    /// One more image; a disk is mostly as large as what it stands on.
    pub fn grow(&mut self, random: &mut Random, parent: Option<usize>) {
        let blocks = parent.map_or(2, |parent| self.sizes[parent]) + random.below(2);
        self.add(random, parent, blocks.min(BLOCKS));
    }

    fn add(&mut self, random: &mut Random, parent: Option<usize>, blocks: u64) {
        let node = self.parents.len();
        let volume = self.volumes.create(&Self::name(node)).unwrap();
        let kind = match parent {
            None => NewKind::Dynamic,
            Some(parent) => NewKind::Child {
                parent: ParentLink {
                    uuid: Uuid::from_u128(parent as u128 + 101),
                    volume: Self::name(parent),
                    timestamp_s: 0,
                },
            },
        };
        let new = NewImage {
            uuid: Uuid::from_u128(node as u128 + 101),
            virtual_bytes: blocks * BLOCK_BYTES,
            kind,
            bat_entries_max: None,
            hidden: false,
            timestamp_s: 0,
        };
        create(volume.as_ref(), &new).unwrap();
        drop(volume);
        self.parents.push(parent);
        self.sizes.push(blocks);
        self.write(random, node);
    }

    fn write(&self, random: &mut Random, node: usize) {
        let below: Option<Chain> = self.parents[node].map(|parent| self.chain(parent));
        let mut writer = Writer::open(&self.volumes, &Self::name(node), &NoRecords).unwrap();
        for _ in 0..random.below(6) {
            let block = BlockNo(random.below(self.sizes[node]) as u32);
            let first = [0, 7, 100, 4000][random.below(4) as usize];
            let run = match random.below(5) {
                0 => SectorRun::BLOCK,
                n => SectorRun { first, count: (n * 17) as u32 },
            };
            let value = 1 + random.below(250) as u8;
            let over = below.as_ref().is_some_and(|chain| chain.map().has(block));
            writer.write(block, run, &vec![value; run.bytes() as usize], over).unwrap();
        }
        writer.settle(None).unwrap();
    }

    pub fn chain(&self, node: usize) -> Chain {
        Chain::open(&self.volumes, &Self::name(node)).unwrap()
    }

    fn ancestry(&self, node: usize) -> Vec<usize> {
        std::iter::successors(Some(node), |node| self.parents[*node]).collect()
    }

    /// Blocks of the nodes above the two's nearest common ancestor.
    fn own_blocks(&self, a: usize, b: usize) -> Vec<BlockNo> {
        let (of_a, of_b) = (self.ancestry(a), self.ancestry(b));
        let apart =
            of_a.iter().filter(|n| !of_b.contains(n)).chain(of_b.iter().filter(|n| !of_a.contains(n)));
        let names: Vec<VolumeName> = apart.map(|node| Self::name(*node)).collect();
        let has = |block: &BlockNo| {
            [a, b].into_iter().any(|top| {
                let chain = self.chain(top);
                let map = chain.map();
                map.places(*block).any(|place| names.contains(&map.node(place.node).unwrap().name))
            })
        };
        (0..BLOCKS as u32).map(BlockNo).filter(has).collect()
    }
}

pub(crate) fn content(chain: &Chain) -> Vec<u8> {
    let mut bytes = vec![0; chain.virtual_bytes() as usize];
    chain.read_at(&mut bytes, 0).unwrap();
    bytes
}

fn check(tree: &Tree, a: usize, b: usize, seed: u64) {
    let (disk, since) = (tree.chain(a), tree.chain(b));
    let mut listed: Vec<Range<u64>> = Vec::new();
    for ranges in Changes::new(&disk, &since) {
        ranges.unwrap().into_iter().for_each(|range| push_range(&mut listed, range));
    }
    let (now, mut then) = (content(&disk), content(&since));
    then.resize(now.len(), 0);
    let own = tree.own_blocks(a, b);
    for sector in 0..now.len() / 512 {
        let byte = (sector * 512) as u64;
        let is_listed = listed.iter().any(|range| range.contains(&byte));
        let differs = now[sector * 512..][..512] != then[sector * 512..][..512];
        assert!(is_listed || !differs, "seed {seed}: sector {sector} of {a} since {b} is missing");
        let block = BlockNo::of_byte(byte);
        // Past the end of the other whatever is there counts.
        let owned = own.contains(&block) || (byte >= since.virtual_bytes() && disk.map().has(block));
        assert!(owned || !is_listed, "seed {seed}: sector {sector} of {a} since {b} is of neither");
    }
    assert!(listed.last().is_none_or(|last| last.end <= now.len() as u64));
    assert!(listed.windows(2).all(|two| two[0].end < two[1].start), "joined and in order");
}

#[test]
fn what_differs_is_listed_and_nothing_is_that_neither_has() {
    for seed in 0..12 {
        let mut random = Random(seed);
        let mut tree = Tree::new();
        tree.grow(&mut random, None);
        for _ in 0..5 {
            let parent = random.below(tree.parents.len() as u64) as usize;
            tree.grow(&mut random, Some(parent));
        }
        for _ in 0..8 {
            let (a, b) = (random.below(6) as usize, random.below(6) as usize);
            check(&tree, a, b, seed);
        }
    }
}

#[test]
fn a_disk_is_placed_from_its_first_byte_to_its_last() {
    let mut random = Random(3);
    let mut tree = Tree::new();
    tree.grow(&mut random, None);
    tree.grow(&mut random, Some(0));
    let chain = tree.chain(1);
    let mut list = Vec::new();
    for block in (0..chain.blocks()).map(BlockNo) {
        chain.placed(block).unwrap().into_iter().for_each(|run| push(&mut list, run));
    }
    assert_eq!((list[0].offset, list[list.len() - 1].end()), (0, chain.virtual_bytes()));
    for run in &list {
        let mut read = vec![0; run.len as usize];
        chain.read_at(&mut read, run.offset).unwrap();
        let node = |at: &At| chain.nodes().find(|node| image_id(node) == at.image).unwrap();
        let mut there = vec![0; run.len as usize];
        if let Some(at) = &run.at {
            node(at).volume.read_at(&mut there, at.offset).unwrap();
        }
        assert_eq!(read, there, "{run:?}");
    }
}

/// As others may leave it: no operation of ours does.
#[test]
fn past_the_end_of_a_disk_that_stands_on_a_larger_one_it_counts_as_zeros() {
    for seed in 0..12 {
        let mut random = Random(seed);
        let mut tree = Tree::new();
        tree.add(&mut random, None, BLOCKS);
        tree.add(&mut random, Some(0), 2);
        tree.add(&mut random, Some(0), BLOCKS);
        for (a, b) in [(0, 1), (1, 0), (2, 1), (1, 2)] {
            check(&tree, a, b, seed);
        }
    }
}
