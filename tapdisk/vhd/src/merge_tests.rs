//! Tables, and random generations against a byte model that is crashed
//! after every step.

use std::collections::BTreeMap;

use super::*;
use crate::units::Slot;

/// An image as the merge sees it, one value per sector instead of 512 bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Model {
    blocks: BTreeMap<u32, (SectorBitmap, Vec<u32>)>,
}

impl Model {
    fn write(&mut self, block: u32, run: SectorRun, value: u32) {
        let (bitmap, data) = self.blocks.entry(block).or_insert_with(|| (SectorBitmap::EMPTY, vec![0; 4096]));
        bitmap.set(run);
        data[run.first as usize..run.end() as usize].fill(value);
    }

    fn sector(&self, block: u32, sector: u32) -> Option<u32> {
        let (bitmap, data) = self.blocks.get(&block)?;
        bitmap.get(sector).then(|| data[sector as usize])
    }
}

struct Stack {
    sources: Vec<Model>,
    parent: Model,
    blocks: u32,
    /// Bitmaps "in memory"; only these are given out.
    loaded: std::cell::RefCell<Vec<(usize, BlockNo)>>,
}

impl Tables for Stack {
    fn sources(&self) -> usize {
        self.sources.len()
    }
    fn blocks(&self) -> u32 {
        self.blocks
    }
    fn presence(&self, source: usize, block: BlockNo) -> Presence {
        match self.sources[source].blocks.get(&block.0) {
            None => Presence::Absent,
            Some((bitmap, _)) if bitmap.is_full() => Presence::Whole(Slot(block.0)),
            Some(_) => Presence::Partial(Slot(block.0)),
        }
    }
    fn bitmap(&self, source: usize, block: BlockNo) -> Option<SectorBitmap> {
        let loaded = self.loaded.borrow().contains(&(source, block));
        loaded.then(|| self.sources[source].blocks[&block.0].0.clone())
    }
    fn below(&self, block: BlockNo) -> bool {
        self.parent.blocks.contains_key(&block.0)
    }
    fn in_parent(&self, block: BlockNo) -> bool {
        self.below(block)
    }
}

impl Stack {
    fn new(sources: Vec<Model>, parent: Model, blocks: u32) -> Self {
        Self { sources, parent, blocks, loaded: std::cell::RefCell::default() }
    }

    /// What a child of source 0 reads. Block by block, newest first.
    fn view(&self) -> Vec<u32> {
        let read = |block, sector| {
            let levels = self.sources.iter().chain([&self.parent]);
            levels.filter_map(|level| level.sector(block, sector)).next().unwrap_or(0)
        };
        (0..self.blocks)
            .flat_map(|b| (0..4096).step_by(16).map(move |s| (b, s)))
            .map(|(b, s)| read(b, s))
            .collect()
    }

    fn apply(&mut self, step: &Step) {
        match step {
            Step::Copy(copy) => {
                for piece in &copy.pieces {
                    for sector in piece.run.first..piece.run.end() {
                        let value = self.sources[piece.source].sector(copy.block.0, sector).unwrap();
                        self.parent.write(copy.block.0, SectorRun { first: sector, count: 1 }, value);
                    }
                }
            }
            Step::Clear { source, blocks } => {
                for block in blocks {
                    assert!(self.sources[*source].blocks.remove(&block.0).is_some());
                }
            }
            Step::CommitParent | Step::Release { .. } => {}
        }
    }

    /// Runs windows until done or `windows_max`; after every step the view
    /// must stand. Returns bytes copied per block.
    fn run(&mut self, merge: &mut Merge, windows_max: usize, limits: WindowLimits) -> BTreeMap<u32, u64> {
        let view = self.view();
        let mut copied = BTreeMap::new();
        for _ in 0..windows_max {
            let window = match self.next(merge) {
                Some(window) => window,
                None => break,
            };
            assert!(window.copies.len() <= limits.blocks_max as usize);
            assert!(window.bytes() <= limits.bytes_max || window.copies.len() == 1);
            let mut committed = window.copies.is_empty();
            for step in window.steps() {
                match &step {
                    Step::Copy(copy) => *copied.entry(copy.block.0).or_default() += copy.bytes(),
                    Step::CommitParent => committed = true,
                    Step::Clear { .. } | Step::Release { .. } => assert!(committed),
                }
                self.apply(&step);
                assert!(self.view() == view, "{step:?} changed what a child reads");
            }
        }
        copied
    }

    fn next(&self, merge: &mut Merge) -> Option<Window> {
        loop {
            match merge.next(self) {
                Next::Done => return None,
                Next::Window(window) => return Some(window),
                Next::NeedBitmap { source, block } => {
                    let mut loaded = self.loaded.borrow_mut();
                    assert!(!loaded.contains(&(source, block)), "asked twice");
                    loaded.push((source, block));
                }
            }
        }
    }
}

const LIMITS: WindowLimits = WindowLimits { bytes_max: 3 * BLOCK_BYTES, blocks_max: 4, gained_max: 4 };

fn run(first: u32, count: u32) -> SectorRun {
    SectorRun { first, count }
}

fn image(writes: &[(u32, SectorRun, u32)]) -> Model {
    let mut model = Model::default();
    for (block, run, value) in writes {
        model.write(*block, *run, *value);
    }
    model
}

fn piece(source: usize, first: u32, count: u32) -> Piece {
    Piece { source, run: run(first, count) }
}

#[test]
fn the_newest_source_provides_a_sector_and_only_it() {
    let n1 = image(&[(0, run(10, 10), 1)]);
    let n2 = image(&[(0, run(15, 10), 2), (2, SectorRun::BLOCK, 2)]);
    let n3 = image(&[(0, run(0, 4096), 3)]);
    let stack = Stack::new(vec![n1, n2, n3], image(&[(0, run(0, 1), 9)]), 4);
    let window = stack.next(&mut Merge::new(Mode::Empty, LIMITS, BlockNo(0))).unwrap();
    let pieces = vec![piece(2, 0, 10), piece(0, 10, 10), piece(1, 20, 5), piece(2, 25, 4071)];
    assert_eq!(
        window.copies,
        [
            BlockCopy { block: BlockNo(0), pieces, below: true },
            BlockCopy { block: BlockNo(2), pieces: vec![piece(1, 0, 4096)], below: false },
        ]
    );
    // Oldest source first, or an older value would come to the light.
    let clears = [(2, vec![BlockNo(0)]), (1, vec![BlockNo(0), BlockNo(2)]), (0, vec![BlockNo(0)])];
    assert_eq!(window.clears, clears);
    assert_eq!((window.first, window.end), (BlockNo(0), BlockNo(4)));
}

#[test]
fn a_bitmap_that_adds_nothing_is_not_asked_for() {
    let stack = Stack::new(
        vec![image(&[(1, SectorRun::BLOCK, 1)]), image(&[(1, run(0, 1), 2)])],
        Model::default(),
        2,
    );
    let window = stack.next(&mut Merge::new(Mode::Shadow, LIMITS, BlockNo(0))).unwrap();
    assert!(stack.loaded.borrow().is_empty());
    assert_eq!(window.copies.len(), 1);
    assert!(window.clears.is_empty());
}

#[test]
fn a_block_without_sectors_is_cleared_but_not_copied() {
    let mut n = Model::default();
    n.blocks.insert(3, (SectorBitmap::EMPTY, vec![0; 4096]));
    let stack = Stack::new(vec![n], Model::default(), 4);
    let mut merge = Merge::new(Mode::Empty, LIMITS, BlockNo(0));
    let steps: Vec<_> = stack.next(&mut merge).unwrap().steps().collect();
    let blocks = vec![BlockNo(3)];
    assert_eq!(
        steps,
        [Step::Clear { source: 0, blocks: blocks.clone() }, Step::Release { source: 0, blocks }]
    );
    assert_eq!(stack.next(&mut merge), None);
}

#[test]
fn windows_keep_their_bounds() {
    let n = image(&(0..10).map(|b| (b, SectorRun::BLOCK, 7)).collect::<Vec<_>>());
    for (bytes_max, blocks_max, want) in [
        (u64::MAX, 4, vec![4, 4, 2]),
        (3 * BLOCK_BYTES, 100, vec![3, 3, 3, 1]),
        (0, 100, vec![1; 10]),
        (u64::MAX, 0, vec![1; 10]),
    ] {
        let stack = Stack::new(vec![n.clone()], Model::default(), 10);
        let mut merge = Merge::new(
            Mode::Shadow,
            WindowLimits { bytes_max, blocks_max, gained_max: u32::MAX },
            BlockNo(0),
        );
        let sizes: Vec<_> =
            std::iter::from_fn(|| stack.next(&mut merge)).map(|window| window.copies.len()).collect();
        assert_eq!(sizes, want);
        assert_eq!(merge.position(), BlockNo(10));
    }
}

#[test]
fn the_forecast_counts_what_the_tables_say() {
    let n1 = image(&[(0, run(0, 1), 1), (1, run(0, 1), 1)]);
    let n2 = image(&[(1, run(0, 1), 1), (2, run(0, 1), 1)]);
    let stack = Stack::new(vec![n1, n2], image(&[(2, run(0, 1), 1)]), 3);
    let got = forecast(&stack, |block| stack.parent.blocks.contains_key(&block.0));
    assert_eq!(got, Forecast { blocks: 3, blocks_freed: 2, blocks_gained: 2, bytes_max: 3 * BLOCK_BYTES });
}

/// A small generator, so that a failure is repeated by its seed alone.
struct Random(u64);

impl Random {
    fn below(&mut self, n: u32) -> u32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        ((self.0 >> 33) % u64::from(n)) as u32
    }

    fn image(&mut self, blocks: u32, tag: u32) -> Model {
        let mut model = Model::default();
        for i in 0..self.below(12) {
            let first = self.below(256) * 16;
            let count = (1 + self.below(256) * 16).min(4096 - first);
            let whole = self.below(3) == 0;
            let run = if whole { SectorRun::BLOCK } else { SectorRun { first, count } };
            model.write(self.below(blocks), run, tag * 100 + i + 1);
        }
        model
    }
}

#[test]
fn any_generations_merge_without_a_child_noticing() {
    for seed in 1..200_u64 {
        let mut random = Random(0x9E37_79B9_7F4A_7C15 ^ (seed << 20));
        let blocks = 1 + random.below(6);
        let sources: Vec<_> = (0..=random.below(3)).map(|i| random.image(blocks, i + 1)).collect();
        let parent = random.image(blocks, 9);
        let limits = WindowLimits {
            bytes_max: u64::from(1 + random.below(8)) << 20,
            blocks_max: 1 + random.below(4),
            gained_max: 1 + random.below(4),
        };
        let mode = if random.below(2) == 0 { Mode::Shadow } else { Mode::Empty };
        let mut stack = Stack::new(sources, parent, blocks);
        let view = stack.view();
        let expected = forecast(&stack, |block| stack.parent.blocks.contains_key(&block.0));
        let before = stack.sources.iter().chain([&stack.parent]).map(|m| m.blocks.len()).sum::<usize>();

        // Stopped and begun anew at 0 after a few windows, then to the end.
        let cut = random.below(4) as usize;
        stack.run(&mut Merge::new(mode, limits, BlockNo(0)), cut, limits);
        let copied = stack.run(&mut Merge::new(mode, limits, BlockNo(0)), usize::MAX, limits);
        assert!(copied.values().all(|bytes| *bytes <= BLOCK_BYTES), "seed {seed}: a byte twice");

        if mode == Mode::Empty {
            assert!(stack.sources.iter().all(|s| s.blocks.is_empty()), "seed {seed}");
        }
        stack.sources.clear();
        assert!(stack.view() == view, "seed {seed}: the parent alone reads differently");
        let freed = before - stack.parent.blocks.len();
        // Blocks without a sector in them are not made here.
        assert_eq!(freed as u64, expected.blocks_freed, "seed {seed}");
    }
}
