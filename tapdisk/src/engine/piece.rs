//! Guest requests, cut into pieces of one block each.

use vhd::chain::Owner;
use vhd::record::Entry;
use vhd::rw::Presence;
use vhd::units::{BLOCK_BYTES, BLOCK_SECTORS, BlockNo, SECTOR_BYTES, SectorRun, Slot};

use super::image::Purpose;
use super::lower::Below;
use super::status::StatusRun;
use super::{BufferRange, Engine, FileId, Op, Output, Request, RequestId, RequestKind, Wait};

/// A guest request in flight.
#[derive(Debug)]
pub(super) struct Active {
    kind: RequestKind,
    /// Pieces and operations not finished.
    left: usize,
    error: Option<i32>,
    /// Runs found by a block-status request, by block.
    pub(super) extents: Vec<(BlockNo, Vec<StatusRun>)>,
}

/// The part of a request that lies in one block.
#[derive(Debug, Clone, Copy)]
pub(super) struct Piece {
    pub(super) request: RequestId,
    pub(super) block: BlockNo,
    pub(super) run: SectorRun,
    /// Where the run's first sector lies in the request's buffer.
    pub(super) at: u32,
    action: Action,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Action {
    Read,
    Write,
    Zero {
        keep: bool,
    },
    /// As zeroing, where that costs no space and no writing over what lies
    /// below.
    Trim,
    Status,
    Cache,
}

/// Stands where a part belongs to no guest request.
const NO_REQUEST: RequestId = RequestId(u64::MAX);

/// Data on its way into a slot; done when its record entries are valid.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Part {
    request: RequestId,
    file: FileId,
    pub(super) block: BlockNo,
    slot: Slot,
    run: SectorRun,
    /// All of a block that was just given its slot, its full bitmap included.
    with_bitmap: bool,
}

/// Where sectors of a block come from, topmost first.
#[derive(Debug, Clone, Copy)]
pub(super) enum Source {
    /// An image of the stack.
    Stack { index: usize, slot: Slot },
    /// A level of the lower part.
    Lower { node: u8, slot: Slot },
    /// Nobody.
    Zero,
}

impl Piece {
    fn zeros(&self) -> bool {
        matches!(self.action, Action::Zero { .. } | Action::Trim)
    }

    /// The buffer bytes of a part of the piece's run.
    fn buffer(&self, run: SectorRun) -> BufferRange {
        let sector = u32::try_from(SECTOR_BYTES).unwrap_or(512);
        BufferRange {
            request: self.request,
            at: self.at + (run.first - self.run.first) * sector,
            len: run.count * sector,
        }
    }
}

impl Engine {
    /// Starts a request.
    pub(super) fn begin(&mut self, request: Request) {
        use RequestKind::{BlockStatus, Cache, Flush, Read};
        let writes = !matches!(request.kind, Read | Flush | BlockStatus | Cache);
        let end = request.offset.checked_add(u64::from(request.len));
        let aligned = request.offset.is_multiple_of(SECTOR_BYTES)
            && u64::from(request.len).is_multiple_of(SECTOR_BYTES);
        let refusal = if !aligned || end.is_none_or(|end| end > self.virtual_bytes) {
            Some(libc::EINVAL)
        } else if writes && self.stack.is_empty() {
            Some(libc::EROFS)
        } else if self.stack.iter().any(|image| writes && image.poisoned || image.unmapped) {
            Some(libc::EIO)
        } else {
            None
        };
        if let Some(errno) = refusal {
            if self.lookups.contains_key(&request.id) {
                return self.lookup_done(request.id, None, Err(errno));
            }
            self.out.push_back(Output::Done(request.id, Err(errno)));
            return;
        }
        let active = Active { kind: request.kind, left: 1, error: None, extents: Vec::new() };
        let same = self.active.insert(request.id, active);
        debug_assert!(same.is_none(), "two requests have one id");
        match request.kind {
            RequestKind::Read => self.cut(request, Action::Read),
            RequestKind::Write { .. } => self.cut(request, Action::Write),
            RequestKind::WriteZeroes { no_hole, .. } => self.cut(request, Action::Zero { keep: no_hole }),
            RequestKind::Trim { .. } => self.cut(request, Action::Trim),
            RequestKind::BlockStatus => {
                let len = self.resolvable(&request);
                self.cut(Request { len, ..request }, Action::Status);
            }
            RequestKind::Cache => {
                let len = self.resolvable(&request);
                self.cut(Request { len, ..request }, Action::Cache);
            }
            RequestKind::Flush => {}
        }
        // The one held for the cutting itself.
        self.part_done(request.id, Ok(()));
    }

    fn cut(&mut self, request: Request, action: Action) {
        let end = request.offset + u64::from(request.len);
        let mut at = request.offset;
        while at < end {
            let block = BlockNo::of_byte(at);
            let stop = end.min(block.first_byte() + BLOCK_BYTES);
            let sectors = |bytes: u64| u32::try_from(bytes / SECTOR_BYTES).unwrap_or(BLOCK_SECTORS);
            let run = SectorRun { first: sectors(at - block.first_byte()), count: sectors(stop - at) };
            let offset = u32::try_from(at - request.offset).unwrap_or(u32::MAX);
            self.one_more(request.id);
            self.plan(Piece { request: request.id, block, run, at: offset, action });
            at = stop;
        }
    }

    fn one_more(&mut self, request: RequestId) {
        if let Some(active) = self.active.get_mut(&request) {
            active.left += 1;
        }
    }

    /// Decides what a piece needs and starts it, or parks it. Always from the
    /// start, on the maps as they are now.
    pub(super) fn plan(&mut self, piece: Piece) {
        match piece.action {
            Action::Read => self.plan_read(piece),
            Action::Status => self.plan_status(piece),
            Action::Cache => self.plan_cache(piece),
            Action::Write => self.plan_write(piece),
            Action::Zero { .. } | Action::Trim => self.plan_zero(piece),
        }
    }

    /// Who has which sectors of a run, or `None` once something is being read
    /// and the piece is parked for it.
    pub(super) fn sources(&mut self, piece: Piece) -> Option<Vec<(SectorRun, Source)>> {
        let mut open = vec![piece.run];
        let mut found = Vec::new();
        let mut missing = None;
        for index in 0..self.stack.len() {
            if open.is_empty() {
                break;
            }
            match self.stack[index].rw.presence(piece.block) {
                Presence::Absent => {}
                Presence::Whole(slot) => {
                    found.extend(open.drain(..).map(|run| (run, Source::Stack { index, slot })));
                }
                Presence::Partial(slot) => match self.stack[index].rw.bitmap(piece.block) {
                    Some(bitmap) => {
                        let parts = open.iter().flat_map(|run| bitmap.runs(*run));
                        let (present, absent): (Vec<_>, Vec<_>) = parts.partition(|part| part.present);
                        found.extend(present.iter().map(|part| (part.run, Source::Stack { index, slot })));
                        open = absent.iter().map(|part| part.run).collect();
                    }
                    None => {
                        self.load_bitmap(index, piece.block, slot);
                        missing.get_or_insert(Wait::Bitmap(self.stack[index].file, piece.block));
                    }
                },
            }
        }
        // Asked even when a bitmap of the stack is missing: the levels' reads
        // then run at the same time.
        if !open.is_empty() {
            match self.below(piece.block) {
                None => {
                    missing.get_or_insert(Wait::Owners(piece.block));
                }
                Some(below) => found.extend(open.into_iter().flat_map(|run| below_runs(&below, run))),
            }
        }
        if let Some(wait) = missing {
            self.park(wait, piece);
            return None;
        }
        found.sort_unstable_by_key(|(run, _)| run.first);
        Some(found)
    }

    fn plan_read(&mut self, piece: Piece) {
        let Some(sources) = self.sources(piece) else { return };
        for (run, source) in sources {
            let into = piece.buffer(run);
            let place = match source {
                Source::Zero => None,
                // The file is still being made longer for the block's first
                // write: nothing can be there yet but zeros.
                Source::Stack { index, slot }
                    if self.stack[index].rw.slots().extension_for(slot).is_some() =>
                {
                    None
                }
                Source::Stack { index, slot } => Some((self.stack[index].file, slot.data_offset(run.first))),
                Source::Lower { node, slot } => self.lower.locate(node, piece.block, slot, run.first),
            };
            match place {
                None => self.out.push_back(Output::ZeroFill(into)),
                Some((file, offset)) => {
                    self.one_more(piece.request);
                    self.start(Op::ReadGuest { file, offset, into }, Purpose::Read(piece.request));
                }
            }
        }
        self.part_done(piece.request, Ok(()));
    }

    /// Which image of the stack takes which part of a written run; `None` if
    /// parked. Outside a merge that is the leaf. In a merge: what the leaf
    /// has is written in the leaf, all else in the parent alone.
    fn targets(&mut self, piece: Piece) -> Option<Vec<(usize, SectorRun)>> {
        if !self.merging() {
            return Some(vec![(0, piece.run)]);
        }
        if self.in_window(piece.block) {
            self.park(Wait::Window(piece.block), piece);
            return None;
        }
        let mut targets: Vec<(usize, SectorRun)> = match self.stack[0].rw.presence(piece.block) {
            Presence::Absent => vec![(1, piece.run)],
            Presence::Whole(_) => vec![(0, piece.run)],
            Presence::Partial(slot) => {
                let Some(bitmap) = self.stack[0].rw.bitmap(piece.block) else {
                    self.load_bitmap(0, piece.block, slot);
                    self.park(Wait::Bitmap(self.stack[0].file, piece.block), piece);
                    return None;
                };
                bitmap.runs(piece.run).map(|part| (usize::from(!part.present), part.run)).collect()
            }
        };
        let in_leaf: Vec<SectorRun> = targets.iter().filter(|(i, _)| *i == 0).map(|(_, run)| *run).collect();
        if in_leaf.is_empty() {
            return Some(targets);
        }
        let Some(mirrored) = self.mirrored(piece.block, piece.run, piece.zeros()) else {
            self.park(Wait::Window(piece.block), piece);
            return None;
        };
        if mirrored {
            targets.extend(in_leaf.into_iter().map(|run| (1, run)));
        }
        if piece.zeros() && !self.has_below(0, piece.block) {
            // Nobody has the rest of the block: it is zeros already.
            targets.retain(|(index, _)| *index == 0);
        }
        Some(targets)
    }

    fn plan_write(&mut self, piece: Piece) {
        let Some(targets) = self.targets(piece) else { return };
        // First everything that may park, then everything at once.
        let mut slots = Vec::with_capacity(targets.len());
        for &(index, _) in &targets {
            match self.slot_for_write(index, piece) {
                Some(slot) => slots.push(slot),
                None => return,
            }
        }
        let given_up = matches!(piece.action, Action::Zero { keep: false } | Action::Trim);
        let trimmed = given_up && piece.run == SectorRun::BLOCK;
        self.note_content(piece.block, piece.zeros(), trimmed);
        self.note_change(piece.block);
        for ((index, run), slot) in targets.into_iter().zip(slots) {
            let file = self.stack[index].file;
            let part =
                Part { request: piece.request, file, block: piece.block, slot, run, with_bitmap: false };
            let offset = slot.data_offset(run.first);
            let op = if piece.zeros() {
                let keep = piece.action == (Action::Zero { keep: true });
                Op::Zero { file, offset, len: run.bytes(), keep, why: "guest: zeros" }
            } else {
                Op::WriteGuest { file, offset, from: piece.buffer(run) }
            };
            self.one_more(piece.request);
            self.write_started(piece.block, run);
            self.start(op, Purpose::Write(part));
        }
        self.part_done(piece.request, Ok(()));
    }

    /// The slot of the block in an image that is to be written: allocated if
    /// need be, its bitmap in memory, the file long enough. `None` if the
    /// piece was parked or failed.
    fn slot_for_write(&mut self, index: usize, piece: Piece) -> Option<Slot> {
        let block = piece.block;
        let presence = self.stack[index].rw.presence(block);
        let slot = match presence {
            Presence::Whole(slot) => slot,
            Presence::Partial(slot) => {
                if self.stack[index].rw.bitmap(block).is_none() {
                    self.load_bitmap(index, block, slot);
                    self.park(Wait::Bitmap(self.stack[index].file, block), piece);
                    return None;
                }
                slot
            }
            Presence::Absent => {
                // What lies above the image (the leaf, in a merge) shadows
                // its own sectors and does not count.
                let whole = !self.has_below(index, block);
                match self.stack[index].rw.allocate(block, whole) {
                    Ok(slot) => slot,
                    Err(_) => {
                        self.part_done(piece.request, Err(libc::ENOSPC));
                        return None;
                    }
                }
            }
        };
        let long_enough = self.ensure_length(index, slot);
        // A merge that cannot make its parent longer ends.
        if presence == Presence::Absent && !self.merging() {
            self.extend_ahead(index);
        }
        if !long_enough {
            self.park(Wait::Length(self.stack[index].file), piece);
            return None;
        }
        Some(slot)
    }

    /// Whether anything below a stack image has the block.
    pub(super) fn has_below(&self, index: usize, block: BlockNo) -> bool {
        self.stack.iter().skip(index + 1).any(|image| image.rw.presence(block) != Presence::Absent)
            || self.lower.has(block)
    }

    /// Zeros: where nobody below has the block, a whole block leaves the
    /// image, and what is not there needs nothing, unless the guest wants to
    /// keep the space; all else is a write of zeros. But a trim over data that
    /// lies below, which a VHD cannot hide without a block of zeros, does
    /// nothing on a device: it would take space there, and the guest cares not.
    fn plan_zero(&mut self, piece: Piece) {
        let whole_block = piece.run == SectorRun::BLOCK;
        let merging = self.merging();
        let target = usize::from(merging);
        // In a merge's leaf it stays a block of zeros until its turn comes.
        let in_leaf = merging && self.stack[0].rw.presence(piece.block) != Presence::Absent;
        if self.has_below(target, piece.block) || in_leaf {
            if piece.action == Action::Trim && self.stack[target].rw.on_device() {
                return self.part_done(piece.request, Ok(()));
            }
            return self.plan_write(piece);
        }
        match self.stack[target].rw.presence(piece.block) {
            Presence::Absent if piece.action == (Action::Zero { keep: true }) => self.plan_write(piece),
            Presence::Absent => self.part_done(piece.request, Ok(())),
            Presence::Whole(_) | Presence::Partial(_)
                if whole_block && piece.action != (Action::Zero { keep: true }) =>
            {
                self.free_block(target, piece);
            }
            Presence::Whole(_) | Presence::Partial(_) => self.plan_write(piece),
        }
    }

    fn free_block(&mut self, index: usize, piece: Piece) {
        self.note_change(piece.block);
        let image = &mut self.stack[index];
        if image.record.push(Entry::Freed { block: piece.block }).is_err() {
            // No room to promise it: zeros by way of a write, which waits.
            return self.plan_write(piece);
        }
        image.rw.free(piece.block);
        self.part_done(piece.request, Ok(()));
    }

    /// Data reached the file: make its record entries valid, then it counts.
    pub(super) fn data_written(&mut self, part: Part, result: Result<(), i32>) {
        if let Err(errno) = result {
            return self.part_landed(part, Err(errno));
        }
        let Some(index) = self.index_of(part.file) else {
            return self.part_landed(part, Err(libc::EIO));
        };
        self.stack[index].unflushed = true;
        if self.has_forgotten(index, part) {
            self.stack[index].unrecorded.push(part);
            self.load_bitmap(index, part.block, part.slot);
        } else if !self.record_part(index, part) {
            if self.stack[index].poisoned {
                // Nothing is written back any more that would make room.
                return self.part_landed(part, Err(libc::EIO));
            }
            self.stack[index].unrecorded.push(part);
            self.start_writeback(index);
        }
    }

    /// Whether the bitmap that a write's bits go into was forgotten for others
    /// since the write began. Without it nobody knows what else the block has.
    fn has_forgotten(&mut self, index: usize, part: Part) -> bool {
        let rw = &mut self.stack[index].rw;
        let partial = rw.presence(part.block) == Presence::Partial(part.slot);
        partial && !part.with_bitmap && rw.bitmap(part.block).is_none()
    }

    /// Makes a completed write's entries valid and answers it; false if the
    /// record has no room.
    pub(super) fn record_part(&mut self, index: usize, part: Part) -> bool {
        let image = &mut self.stack[index];
        let entries = image.rw.entries_for(part.block, part.slot, part.run);
        if entries.len() > image.record.room() {
            return false;
        }
        for entry in entries {
            if image.record.push(entry).is_err() {
                return false;
            }
        }
        match part.with_bitmap {
            true => image.rw.written_whole(part.block, part.slot),
            false => image.rw.written(part.block, part.slot, part.run),
        }
        if image.record.room() < vhd::record::HALF_ENTRIES / 2 {
            self.start_writeback(index);
        }
        self.part_landed(part, Ok(()));
        true
    }

    /// A part's data and entries are in place, or it failed.
    fn part_landed(&mut self, part: Part, result: Result<(), i32>) {
        if part.request == NO_REQUEST {
            return self.copy_recorded(part.block, result);
        }
        self.write_ended(part.block, part.run, result);
        self.part_done(part.request, result);
    }

    /// As [`Self::data_written`] for a copy into a merge's parent.
    pub(super) fn record_copy(&mut self, block: BlockNo, slot: Slot, run: SectorRun, with_bitmap: bool) {
        if let Some(parent) = self.stack.get(1) {
            let part = Part { request: NO_REQUEST, file: parent.file, block, slot, run, with_bitmap };
            self.data_written(part, Ok(()));
        }
    }

    /// One piece or operation of a request ended; the last one answers it.
    pub(super) fn part_done(&mut self, request: RequestId, result: Result<(), i32>) {
        let Some(active) = self.active.get_mut(&request) else { return };
        active.left -= 1;
        if let Err(errno) = result {
            active.error.get_or_insert(errno);
        }
        if active.left > 0 {
            return;
        }
        let flush = match active.kind {
            RequestKind::Flush => true,
            RequestKind::Write { fua } | RequestKind::WriteZeroes { fua, .. } | RequestKind::Trim { fua } => {
                fua
            }
            RequestKind::Read | RequestKind::BlockStatus | RequestKind::Cache => false,
        };
        let error = active.error;
        match error {
            None if flush && !self.stack.is_empty() => self.flush_for(request),
            _ => self.finish(request, error.map_or(Ok(()), Err)),
        }
    }

    /// Answers a request.
    pub(super) fn finish(&mut self, request: RequestId, result: Result<(), i32>) {
        if let Some(active) = self.active.remove(&request) {
            if self.lookups.contains_key(&request) {
                return self.lookup_done(request, Some(active), result);
            }
            if active.kind == RequestKind::BlockStatus && result.is_ok() {
                self.answer_status(request, active);
            }
            self.out.push_back(Output::Done(request, result));
        }
    }
}

fn below_runs(below: &Below, run: SectorRun) -> Vec<(SectorRun, Source)> {
    match below {
        Below::Nothing => vec![(run, Source::Zero)],
        Below::Whole(place) => vec![(run, Source::Lower { node: place.node, slot: place.slot })],
        Below::Owners(owners) => owners
            .within(run)
            .map(|part| match part.owner {
                Owner::Zero => (part.run, Source::Zero),
                Owner::Node { node, slot } => (part.run, Source::Lower { node, slot }),
            })
            .collect(),
    }
}
