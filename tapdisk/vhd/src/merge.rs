//! What of N goes into P, and in which order. No I/O of its own: it looks at
//! block tables and answers with windows of [`Step`]s; gcd, which runs them on
//! hidden and detached images, does the I/O. A tapdisk moves the blocks of its
//! own leaf under guests' writes, which needs another order: see its engine.
//!
//! ```text
//!   sources, newest first            parent
//!   0  N1  [a][ ][c]                 P [ ][x][y]
//!   1  N2  [ ][b][d]      ----->       [a][b][c]      d is hidden by c: not copied
//! ```
//!
//! The newest source that has a sector provides it, so every byte is copied
//! at most once, however many adjacent generations are merged together.
//!
//! Why it may stop anywhere and start again (invariant 3):
//! * Everything written into P is present in a source above it, so nobody
//!   who reads through the sources sees it. P's own content stays visible
//!   only where no source has the sector, and there nothing is written.
//! * [`Mode::Shadow`] changes nothing else. Repeating it writes the same.
//! * [`Mode::Empty`] clears a window's blocks from the sources only after
//!   P is durable, oldest source first, each clear durable before the next:
//!   the parent's copy is what the *newest* source had, so an older source
//!   must not come to the light in between. What is cleared is absent
//!   afterwards, so starting again at block 0 carries on.
//! * Freed space is given back last: after the clear is durable and every
//!   reader dropped the map that named it (invariant 6).
//!
//! Absent on purpose: growing P, relinking children, the commit of a leaf
//! merge. Those are single steps of their owners.

use crate::bitmap::SectorBitmap;
use crate::rw::Presence;
use crate::units::{BLOCK_BYTES, BLOCK_SECTORS, BlockNo, SectorRun};

/// The block tables a merge looks at. They may change between two calls of
/// [`Merge::next`] as long as sources only lose blocks.
pub trait Tables {
    /// How many images are merged; 0 is the newest, the last one lies
    /// directly on the parent.
    fn sources(&self) -> usize;
    /// Blocks of the largest source; no source has a block past it.
    fn blocks(&self) -> u32;
    /// What a source has of a block.
    fn presence(&self, source: usize, block: BlockNo) -> Presence;
    /// The bitmap of a block that is partly present; `None` while it is not
    /// in memory, which [`Merge::next`] answers with [`Next::NeedBitmap`].
    fn bitmap(&self, source: usize, block: BlockNo) -> Option<SectorBitmap>;
    /// Whether the parent, or anything below it, has any of the block.
    fn below(&self, block: BlockNo) -> bool;
    /// Whether the parent itself had the block in the beginning.
    fn in_parent(&self, block: BlockNo) -> bool;
}

/// What happens to the sources.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Nothing: they are deleted as a whole later. Fastest, needs room for
    /// everything the parent lacks.
    Shadow,
    /// They lose each window once the parent has it: needs room for one
    /// window. Leaf merges, and inner merges when space is short.
    Empty,
}

/// Bounds of one window (invariant 12). A window has at least one block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WindowLimits {
    /// Most bytes copied.
    pub bytes_max: u64,
    /// Most blocks looked at, present in any source.
    pub blocks_max: u32,
    /// Most blocks that the parent gains.
    pub gained_max: u32,
}

/// Sectors of a block taken from one source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Which source.
    pub source: usize,
    /// Which sectors.
    pub run: SectorRun,
}

/// Everything of one block that goes into the parent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockCopy {
    /// Which block.
    pub block: BlockNo,
    /// In ascending order of sectors, never overlapping.
    pub pieces: Vec<Piece>,
    /// Whether the parent or anything below it has some of the block. If
    /// not, and every piece is zeros, the block need not be copied at all.
    pub below: bool,
}

impl BlockCopy {
    /// Bytes in all pieces.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.pieces.iter().map(|piece| piece.run.bytes()).sum()
    }
}

/// One thing to do. A step begins only when the one before it is complete,
/// except that copies of one window may overlap each other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Write these sectors into the parent. Not durable yet.
    Copy(BlockCopy),
    /// Make the parent durable: data, then bitmaps, then BAT.
    CommitParent,
    /// Durably clear these blocks' BATmap bits and BAT entries in a source.
    Clear {
        /// Which source.
        source: usize,
        /// Ascending.
        blocks: Vec<BlockNo>,
    },
    /// Give back the space of the blocks just cleared, once no reader's map
    /// names it any more.
    Release {
        /// Which source.
        source: usize,
        /// Ascending.
        blocks: Vec<BlockNo>,
    },
}

/// A bounded piece of a merge, complete in itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Window {
    /// First block looked at.
    pub first: BlockNo,
    /// One past the last block looked at: where to carry on.
    pub end: BlockNo,
    /// What is copied, ascending.
    pub copies: Vec<BlockCopy>,
    /// Source and blocks to clear, oldest source first. Empty in
    /// [`Mode::Shadow`].
    pub clears: Vec<(usize, Vec<BlockNo>)>,
}

impl Window {
    /// The steps in the order they must be done.
    pub fn steps(&self) -> impl Iterator<Item = Step> + '_ {
        let copies = self.copies.iter().cloned().map(Step::Copy);
        let commit = (!self.copies.is_empty()).then_some(Step::CommitParent);
        let clear = |(source, blocks): &(usize, Vec<BlockNo>)| Step::Clear {
            source: *source,
            blocks: blocks.clone(),
        };
        let release = |(source, blocks): &(usize, Vec<BlockNo>)| Step::Release {
            source: *source,
            blocks: blocks.clone(),
        };
        copies.chain(commit).chain(self.clears.iter().map(clear)).chain(self.clears.iter().map(release))
    }

    /// Bytes to copy, before zero blocks are dropped.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.copies.iter().map(BlockCopy::bytes).sum()
    }
}

/// What [`Merge::next`] says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Next {
    /// Have this bitmap ready and ask again; nothing has moved.
    NeedBitmap {
        /// Of which source.
        source: usize,
        /// Of which block.
        block: BlockNo,
    },
    /// Do this, then ask again.
    Window(Window),
    /// Nothing is left at or after the cursor.
    Done,
}

/// A merge under way: only a cursor, so it can be made anew at any time.
#[derive(Debug, Clone)]
pub struct Merge {
    mode: Mode,
    limits: WindowLimits,
    next: BlockNo,
}

impl Merge {
    /// Starts at `from`; block 0 is always right, a later one is right if
    /// everything before it is durable in the parent.
    #[must_use]
    pub fn new(mode: Mode, limits: WindowLimits, from: BlockNo) -> Self {
        Self { mode, limits, next: from }
    }

    /// Where the next window begins.
    #[must_use]
    pub fn position(&self) -> BlockNo {
        self.next
    }

    /// The next window, in ascending order of blocks.
    pub fn next(&mut self, tables: &dyn Tables) -> Next {
        let mut window = Window { first: self.next, end: self.next, copies: Vec::new(), clears: Vec::new() };
        let mut clears = vec![Vec::new(); tables.sources()];
        let mut held = 0;
        let mut gained = 0;
        let mut bytes = 0;
        for block in (self.next.0..tables.blocks()).map(BlockNo) {
            let copy = match block_copy(tables, block) {
                Ok(copy) => copy,
                Err(Missing { source }) => return Next::NeedBitmap { source, block },
            };
            if let Some(copy) = copy {
                if held > 0 && bytes + copy.bytes() > self.limits.bytes_max {
                    break;
                }
                held += 1;
                gained += u32::from(!tables.in_parent(block));
                bytes += copy.bytes();
                for (source, list) in clears.iter_mut().enumerate() {
                    if tables.presence(source, block) != Presence::Absent {
                        list.push(block);
                    }
                }
                if !copy.pieces.is_empty() {
                    window.copies.push(copy);
                }
            }
            window.end = BlockNo(block.0 + 1);
            if held >= self.limits.blocks_max.max(1) || gained >= self.limits.gained_max.max(1) {
                break;
            }
        }
        if held == 0 {
            return Next::Done;
        }
        self.next = window.end;
        if self.mode == Mode::Empty {
            let oldest_first = clears.into_iter().enumerate().rev();
            window.clears = oldest_first.filter(|(_, blocks)| !blocks.is_empty()).collect();
        }
        Next::Window(window)
    }
}

/// A bitmap that is not in memory.
struct Missing {
    source: usize,
}

/// What of one block goes into the parent: newest source first, each sector
/// once. `None` if no source has the block.
fn block_copy(tables: &dyn Tables, block: BlockNo) -> Result<Option<BlockCopy>, Missing> {
    let mut taken = SectorBitmap::EMPTY;
    let mut held = false;
    let mut pieces = Vec::new();
    for source in 0..tables.sources() {
        let mut present = match tables.presence(source, block) {
            Presence::Absent => continue,
            Presence::Whole(_) => SectorBitmap::FULL,
            Presence::Partial(_) => {
                held = true;
                // A bitmap that cannot add anything need not be read.
                if taken.is_full() {
                    continue;
                }
                tables.bitmap(source, block).ok_or(Missing { source })?
            }
        };
        held = true;
        present.subtract(&taken);
        pieces.extend(present.present().map(|run| Piece { source, run }));
        taken.union(&present);
    }
    pieces.sort_unstable_by_key(|piece| piece.run.first);
    Ok(held.then(|| BlockCopy { block, pieces, below: tables.below(block) }))
}

/// What a merge will do, told from the block tables alone.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Forecast {
    /// Blocks any source has.
    pub blocks: u64,
    /// Blocks of all sources together that go away because the parent or a
    /// newer source has them too. Exact, before zero blocks are dropped.
    pub blocks_freed: u64,
    /// Blocks the parent gains.
    pub blocks_gained: u64,
    /// Upper bound of the bytes copied: what is partly present counts whole.
    pub bytes_max: u64,
}

/// Forecasts from tables without reading a bitmap. `parent_has` tells whether
/// the parent itself (not what lies below it) has a block.
pub fn forecast(tables: &dyn Tables, parent_has: impl Fn(BlockNo) -> bool) -> Forecast {
    let mut sum = Forecast::default();
    for block in (0..tables.blocks()).map(BlockNo) {
        let held = (0..tables.sources())
            .filter(|source| tables.presence(*source, block) != Presence::Absent)
            .count() as u64;
        if held == 0 {
            continue;
        }
        sum.blocks += 1;
        sum.bytes_max += BLOCK_BYTES;
        if parent_has(block) {
            sum.blocks_freed += held;
        } else {
            sum.blocks_freed += held - 1;
            sum.blocks_gained += 1;
        }
    }
    sum
}

// A piece never leaves its block: bitmaps hold exactly one block's sectors.
const _: () = assert!(BLOCK_SECTORS == 4096);

#[cfg(test)]
#[path = "merge_tests.rs"]
mod tests;
