//! The data path as a state machine without I/O.
//!
//! ```text
//!   guest requests --submit-->  +--------+  --next_output--> operations, answers
//!   completions  --complete-->  | Engine |
//!   orders       --command-->   +--------+
//!
//!   stack[0]   the leaf: written                        image.rs, writeback.rs
//!   stack[1]   sometimes one more image held open:      Second::Frozen, ::Parent
//!              the former leaf until it is settled, or
//!              the parent a leaf merge moves into       merge.rs, moves.rs
//!   lower      everything below: an immutable map       lower.rs
//! ```
//!
//! A request is cut into pieces, one per block ([`piece`]). A piece is
//! planned whole or not at all: if something it needs is not in memory (a
//! bitmap, the owners of a block, longer file, the end of a merge window) it
//! parks under that [`Wait`] and is planned anew, from the start, when the
//! wait is over. So no plan ever outlives the map it was made from.
//!
//! Absent on purpose: I/O, clocks (`now_us` comes in), NBD, guest data.

mod api;
mod command;
mod commit;
mod copies;
mod growth;
mod image;
mod lookup;
mod lower;
mod merge;
mod moves;
mod neighbours;
mod owner_cache;
mod pace;
mod piece;
mod quiesce;
mod relief;
mod status;
mod swap;
mod track;
mod under_way;
mod writeback;

use std::collections::{BTreeMap, HashMap, VecDeque};

use rustc_hash::FxHashMap;
use vhd::units::BlockNo;

pub use api::*;
pub use command::{Command, CommandError, CommandReply, NewLeaf, Token};
pub use image::{Image, SettlePlan};
pub use lower::{Known, Lower};
pub use merge::{MergeBounds, MergeFigures};
pub use quiesce::Holds;

use crate::limits;
use image::Purpose;
use merge::Merge;
use piece::{Active, Piece};
use quiesce::State;
use writeback::FlushTicket;

/// What a parked piece waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Wait {
    /// The bitmap of a block of a stack image.
    Bitmap(FileId, BlockNo),
    /// The owners of a block below the stack.
    Owners(BlockNo),
    /// A longer file.
    Length(FileId),
    /// A merge copies the block, or an overlapping write goes to two images.
    Window(BlockNo),
}

/// What the second image of the stack is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Second {
    /// Only read: a former leaf, or the parent of a stopped merge, until it
    /// is settled and folded into `lower`.
    Frozen,
    /// The parent of a leaf merge: per sector, what the leaf has is read and
    /// written there, all else here.
    Parent,
}

/// The data path of one virtual disk. See the module.
#[derive(Debug)]
pub struct Engine {
    pub(crate) now_us: u64,
    virtual_bytes: u64,
    next_op: u64,
    /// Operations in flight, oldest first.
    ops: BTreeMap<OpId, Purpose>,
    out: VecDeque<Output>,
    active: FxHashMap<RequestId, Active>,
    /// Requests that arrived while nothing may run.
    queue: VecDeque<Request>,
    parked: HashMap<Wait, Vec<Piece>>,
    state: State,
    holds: Holds,
    stack: Vec<Image>,
    second: Second,
    lower: Lower,
    merge: Merge,
    tickets: Vec<FlushTicket>,
    /// A rename that no flush has covered yet.
    names_owed: bool,
    names_syncing: bool,
    /// Commands answered once every operation before the barrier completed.
    barriers: Vec<(OpId, Barrier)>,
    /// Who asked where a range lies.
    lookups: HashMap<RequestId, Token>,
    /// Blocks that guests change, while somebody wants to know.
    tracked: Option<track::Tracked>,
    clean: Vec<CleanWaiter>,
    written_back: Vec<WriteBackWaiter>,
    last_activity_us: u64,
}

/// What happens when every operation started before a barrier completed.
#[derive(Debug)]
enum Barrier {
    /// Answer a command.
    Answer(Token, CommandReply),
    /// Nothing reads these slots any more: zero them.
    Release(FileId, Vec<vhd::units::Slot>),
    /// Nothing uses these files any more.
    Close(Vec<FileId>),
}

/// Somebody waits for these write-backs, by image and number.
#[derive(Debug)]
struct WriteBackWaiter {
    token: Token,
    needs: Vec<(FileId, u64)>,
}

/// Somebody waits until an image has nothing left to write back.
#[derive(Debug)]
struct CleanWaiter {
    token: Token,
    file: Option<FileId>,
    /// Also until no operation is in flight: the process ends then, and what
    /// it still had in flight (the zeroing of a freed slot, say) would land in
    /// the next holder's image.
    quiet: bool,
    since_us: u64,
}

impl Engine {
    /// An engine for a disk of `virtual_bytes`: `leaf` open for writing
    /// (`None`: read-only, everything is in `lower`).
    #[must_use]
    pub fn new(virtual_bytes: u64, leaf: Option<Image>, lower: Lower) -> Self {
        Self {
            now_us: 0,
            virtual_bytes,
            next_op: 1,
            ops: BTreeMap::new(),
            out: VecDeque::new(),
            active: FxHashMap::default(),
            queue: VecDeque::new(),
            parked: HashMap::new(),
            state: State::Running,
            holds: Holds::default(),
            stack: leaf.into_iter().collect(),
            second: Second::Frozen,
            lower,
            merge: Merge::default(),
            tickets: Vec::new(),
            names_owed: false,
            names_syncing: false,
            barriers: Vec::new(),
            lookups: HashMap::new(),
            tracked: None,
            clean: Vec::new(),
            written_back: Vec::new(),
            last_activity_us: 0,
        }
    }

    /// Size of the disk in bytes.
    #[must_use]
    pub fn virtual_bytes(&self) -> u64 {
        self.virtual_bytes
    }

    /// Takes a guest request. Its id must not be in flight.
    pub fn submit(&mut self, now_us: u64, request: Request) {
        self.now_us = now_us;
        self.last_activity_us = now_us;
        if self.state.runs() {
            self.begin(request);
        } else {
            self.queue.push_back(request);
        }
    }

    /// Takes the completion of an operation.
    pub fn complete(&mut self, now_us: u64, op: OpId, completion: Completion) {
        self.now_us = now_us;
        if let Some(purpose) = self.ops.remove(&op) {
            self.completed(purpose, completion);
        }
        self.pass_barriers();
        self.progress();
    }

    /// To be called now and then, at least every [`limits::TICK_US`].
    pub fn tick(&mut self, now_us: u64) {
        self.now_us = now_us;
        if now_us.saturating_sub(self.last_activity_us) >= limits::IDLE_WRITEBACK_US {
            for index in 0..self.stack.len() {
                if self.stack[index].rw.is_dirty() {
                    self.start_writeback(index);
                }
            }
        }
        self.retry_failed();
        self.swap_when_due();
        self.progress();
    }

    /// The next thing to do, until there is nothing.
    pub fn next_output(&mut self) -> Option<Output> {
        self.out.pop_front()
    }

    /// Starts an operation.
    fn start(&mut self, op: Op, purpose: Purpose) {
        let id = OpId(self.next_op);
        self.next_op += 1;
        self.ops.insert(id, purpose);
        self.out.push_back(Output::Start(id, op));
    }

    /// Runs `barrier` once every operation started so far has completed.
    fn after_all_so_far(&mut self, barrier: Barrier) {
        self.barriers.push((OpId(self.next_op), barrier));
    }

    fn pass_barriers(&mut self) {
        let oldest = self.ops.keys().next().copied().unwrap_or(OpId(u64::MAX));
        let mut at = 0;
        while at < self.barriers.len() {
            if self.barriers[at].0 > oldest {
                at += 1;
                continue;
            }
            match self.barriers.remove(at).1 {
                Barrier::Answer(token, reply) => self.answer(token, Ok(reply)),
                Barrier::Release(file, slots) => self.zero_released(file, slots),
                Barrier::Close(files) => self.out.extend(files.into_iter().map(Output::Close)),
            }
        }
    }

    /// Everything that may have become possible after any event.
    fn progress(&mut self) {
        self.progress_merge();
        (0..self.stack.len()).for_each(|index| self.zero_next(index));
        self.progress_tickets();
        self.progress_clean();
        self.progress_quiesce();
        self.pass_barriers();
    }

    fn answer(&mut self, token: Token, reply: Result<CommandReply, CommandError>) {
        self.out.push_back(Output::Answer(token, reply));
    }

    fn park(&mut self, wait: Wait, piece: Piece) {
        self.parked.entry(wait).or_default().push(piece);
    }

    fn wake(&mut self, wait: Wait) {
        for piece in self.parked.remove(&wait).unwrap_or_default() {
            self.plan(piece);
        }
    }

    fn fail_parked(&mut self, wait: Wait, errno: i32) {
        for piece in self.parked.remove(&wait).unwrap_or_default() {
            self.part_done(piece.request, Err(errno));
        }
    }

    /// Index in the stack of an image open for writing.
    fn index_of(&self, file: FileId) -> Option<usize> {
        self.stack.iter().position(|image| image.file == file)
    }
}
