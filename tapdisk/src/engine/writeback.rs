//! Write-back: what waits in an image's record becomes durable metadata, and
//! the guest's FLUSH, which waits for it.
//!
//! The order of the steps and their crash argument: [`vhd::rw`].

use std::sync::Arc;

use vhd::bitmap::SectorBitmap;
use vhd::rw::Captured;
use vhd::units::Slot;

use super::image::Purpose;
use super::merge::{LEAF, PARENT};
use super::relief::Held;
use super::{
    Barrier, CleanWaiter, CommandError, CommandReply, Engine, FileId, Op, RequestId, Token, WriteBackWaiter,
};
use crate::limits::{CLOSE_TIME_MAX_US, META_PARTS_MAX, ZERO_SLOTS_MAX};

/// The last flush of a cycle.
const METADATA: vhd::storage::Why = "writeback: metadata before its record is dropped";

/// Where an image's write-back stands.
#[derive(Debug)]
pub(super) struct WriteBack {
    /// Cycles completed since the image was opened.
    done: u64,
    pub(super) state: State,
}

#[derive(Debug)]
pub(super) enum State {
    Idle,
    Running(Cycle),
    /// A metadata write failed (no space, say). The record keeps everything;
    /// the same capture is written again when somebody asks.
    Failed(Captured, i32),
    /// It waits for so many slots that were given up to give their space back.
    Relieved {
        held: Held,
        left: usize,
    },
}

#[derive(Debug)]
pub(super) struct Cycle {
    pub(super) captured: Captured,
    pub(super) stage: Stage,
    /// Operations of the stage in flight.
    pub(super) left: usize,
    pub(super) error: Option<i32>,
    /// A capture that failed, for which this one makes room.
    pub(super) held: Option<Held>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    /// Bitmaps of slots that no BAT on the file names are written.
    NewBitmaps,
    /// Data, length and those bitmaps become durable.
    Data,
    /// The other bitmaps are written.
    Bitmaps,
    /// BAT entries are written.
    Entries,
    /// Those bitmaps and BAT entries become durable.
    MetadataFlush,
}

impl Default for WriteBack {
    fn default() -> Self {
        Self { done: 0, state: State::Idle }
    }
}

impl WriteBack {
    pub(super) fn is_idle(&self) -> bool {
        matches!(self.state, State::Idle)
    }

    /// The errno with which a metadata write failed and was not yet repeated.
    fn failure(&self) -> Option<i32> {
        match self.state {
            State::Failed(_, errno) => Some(errno),
            State::Idle | State::Running(_) | State::Relieved { .. } => None,
        }
    }

    pub(super) fn done(&self) -> u64 {
        self.done
    }
}

/// A request that is answered once these cycles have completed.
#[derive(Debug)]
pub(super) struct FlushTicket {
    request: RequestId,
    needs: Vec<(FileId, u64)>,
}

impl Engine {
    /// Starts a cycle unless one runs or nothing waits.
    pub(super) fn start_writeback(&mut self, index: usize) {
        if self.stack[index].poisoned || self.relieve(index) {
            return;
        }
        let image = &mut self.stack[index];
        let mut fresh = false;
        let nothing_written = !image.unflushed;
        let captured = match std::mem::replace(&mut image.writeback.state, State::Idle) {
            state @ (State::Running(_) | State::Relieved { .. }) => {
                image.writeback.state = state;
                return;
            }
            State::Failed(captured, _) => captured,
            State::Idle if !image.rw.is_dirty() && !image.unflushed => return,
            State::Idle => {
                // The other half is empty: every capture was dropped.
                let captured = image.record.capture();
                debug_assert!(captured, "a half of the record is still held");
                fresh = true;
                image.rw.capture()
            }
        };
        // Data written from here on is for the next cycle.
        image.unflushed = false;
        let (file, number) = (image.file, image.writeback.done + 1);
        let cycle = Cycle { captured, stage: Stage::NewBitmaps, left: 0, error: None, held: None };
        if fresh && nothing_written && cycle.captured.only_frees() {
            self.write_entries(index, cycle);
        } else {
            let (new, _) = bitmap_writes(file, &cycle.captured);
            match new.is_empty() {
                true => self.next_stage(index, cycle),
                false => self.cycle_ops(index, cycle, new),
            }
        }
        if fresh && index == PARENT && self.merging() {
            self.parent_captured(number);
        }
    }

    /// The cycle after which everything written so far is durable, started if
    /// need be.
    pub(super) fn covering_cycle(&mut self, index: usize) -> u64 {
        self.start_writeback(index);
        let image = &self.stack[index];
        let later = u64::from(image.rw.is_dirty() || image.unflushed);
        match image.writeback.state {
            State::Idle => image.writeback.done + later,
            State::Running(_) | State::Failed(..) | State::Relieved { .. } => {
                image.writeback.done + 1 + later
            }
        }
    }

    /// An operation of a cycle ended.
    pub(super) fn writeback_step(&mut self, file: FileId, result: Result<(), i32>) {
        let Some(index) = self.index_of(file) else { return };
        let image = &mut self.stack[index];
        let State::Running(mut cycle) = std::mem::replace(&mut image.writeback.state, State::Idle) else {
            return;
        };
        cycle.left -= 1;
        if let Err(errno) = result {
            cycle.error.get_or_insert(errno);
        }
        if cycle.left > 0 {
            image.writeback.state = State::Running(cycle);
        } else if let Some(errno) = cycle.error {
            self.cycle_failed(index, cycle, errno);
        } else {
            self.next_stage(index, cycle);
        }
    }

    fn next_stage(&mut self, index: usize, mut cycle: Cycle) {
        let file = self.stack[index].file;
        let (stage, ops) = match cycle.stage {
            Stage::NewBitmaps => (Stage::Data, vec![flush(file, "writeback: data before metadata")]),
            Stage::Data if cycle.captured.is_empty() => return self.cycle_done(index, cycle),
            Stage::Data => (Stage::Bitmaps, bitmap_writes(file, &cycle.captured).1),
            Stage::Bitmaps if cycle.captured.changes_bat() => return self.write_entries(index, cycle),
            Stage::Bitmaps => (Stage::MetadataFlush, vec![flush(file, METADATA)]),
            Stage::Entries => {
                self.stack[index].rw.bat_written(&cycle.captured);
                let why = match cycle.held {
                    None => METADATA,
                    Some(_) => "relief: BAT before freed slots are reused",
                };
                (Stage::MetadataFlush, vec![flush(file, why)])
            }
            Stage::MetadataFlush => return self.cycle_done(index, cycle),
        };
        if ops.is_empty() {
            cycle.stage = stage;
            return self.next_stage(index, cycle);
        }
        cycle.stage = stage;
        self.cycle_ops(index, cycle, ops);
    }

    pub(super) fn write_entries(&mut self, index: usize, mut cycle: Cycle) {
        let image = &self.stack[index];
        let (file, sectors) = (image.file, image.rw.bat_sectors(&cycle.captured));
        let sectors = sectors.into_iter().map(|(offset, bytes)| (offset, bytes.as_slice().into()));
        cycle.stage = Stage::Entries;
        self.cycle_ops(index, cycle, meta_writes(file, "writeback: BAT", sectors));
    }

    fn cycle_ops(&mut self, index: usize, mut cycle: Cycle, ops: Vec<Op>) {
        let file = self.stack[index].file;
        cycle.left = ops.len();
        self.stack[index].writeback.state = State::Running(cycle);
        for op in ops {
            self.start(op, Purpose::WriteBack(file));
        }
    }

    fn cycle_done(&mut self, index: usize, cycle: Cycle) {
        if let Some(held) = cycle.held {
            return self.relieved(index, cycle.captured, held);
        }
        let image = &mut self.stack[index];
        image.record.drop_captured();
        let file = image.file;
        let freed = image.rw.durable(cycle.captured);
        image.writeback.state = State::Idle;
        image.writeback.done += 1;
        if !freed.is_empty() {
            self.after_all_so_far(Barrier::Release(file, freed));
        }
        // Writes that found the record full have room now.
        let waiting = std::mem::take(&mut self.stack[index].unrecorded);
        for part in waiting {
            self.data_written(part, Ok(()));
        }
    }

    fn cycle_failed(&mut self, index: usize, cycle: Cycle, errno: i32) {
        let image = &mut self.stack[index];
        let file = image.file;
        if matches!(cycle.stage, Stage::Data | Stage::MetadataFlush) {
            // After a failed flush nobody knows what the page cache lost.
            image.poisoned = true;
            image.record.poison();
        }
        let cycle_number = image.writeback.done + 1;
        let captured = match cycle.held {
            None => cycle.captured,
            Some(mut held) => {
                held.captured.take_back(cycle.captured);
                held.captured
            }
        };
        image.writeback.state = State::Failed(captured, errno);
        let poisoned = image.poisoned;
        // Those that wait for a later cycle wait for this one too; left alone
        // they would have it tried again at once, for ever.
        let failed = |ticket: &FlushTicket| {
            ticket.needs.iter().any(|(f, n)| *f == file && (poisoned || *n >= cycle_number))
        };
        let (failed, rest): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.tickets).into_iter().partition(failed);
        self.tickets = rest;
        for ticket in failed {
            self.finish(ticket.request, Err(errno));
        }
        if poisoned {
            for part in std::mem::take(&mut self.stack[index].unrecorded) {
                self.data_written(part, Err(libc::EIO));
            }
        }
        self.merge_writeback_failed(index, errno);
    }

    /// Slots nobody can read any more are zeroed, then free; those side by side
    /// by one operation, with what lies between them, which is nobody's. On a
    /// device, where nobody takes a slot to be zero, they are free at once.
    pub(super) fn zero_released(&mut self, file: FileId, mut slots: Vec<Slot>) {
        let Some(index) = self.index_of(file) else { return };
        if self.stack[index].rw.on_device() {
            return self.zeroed(file, &slots, Ok(()));
        }
        slots.sort_unstable();
        let runs = slots.chunk_by(|one, next| vhd::slots::follows(*one, *next));
        for run in runs.flat_map(|run| run.chunks(ZERO_SLOTS_MAX)) {
            self.stack[index].to_zero.push_back(run.to_vec());
        }
        self.zero_next(index);
    }

    /// Zeroes what is due of an image's freed slots: all, but of the leaf of a
    /// merge see [`Self::zero_in_merge`].
    pub(super) fn zero_next(&mut self, index: usize) {
        if self.stack[index].to_zero.is_empty() {
            return;
        }
        let due = match self.merging() && index == LEAF {
            true => self.zero_in_merge(),
            false => std::mem::take(&mut self.stack[index].to_zero),
        };
        let file = self.stack[index].file;
        for slots in due {
            let (Some(first), Some(last)) = (slots.first(), slots.last()) else { continue };
            let (offset, last) = (first.bitmap_offset(), vhd::slots::slot_bytes(*last));
            let len = last.offset + last.len - offset;
            let op = Op::Zero { file, offset, len, keep: false, why: "freed slot: zero before reuse" };
            self.stack[index].zeroing += 1;
            self.start(op, Purpose::Released { file, slots });
        }
    }

    /// They were zeroed, or need not be, or could not be: then they are simply
    /// not used again.
    pub(super) fn zeroed(&mut self, file: FileId, slots: &[Slot], result: Result<(), i32>) {
        if let Some(index) = self.index_of(file) {
            self.stack[index].zeroing = self.stack[index].zeroing.saturating_sub(1);
            if result.is_ok() {
                slots.iter().for_each(|slot| self.stack[index].rw.slots().put(*slot));
            }
        }
        self.merge_released(file, slots);
        slots.iter().for_each(|_| self.slot_released(file));
    }

    /// Answers a request once everything acknowledged so far is durable, in
    /// every image of the stack.
    pub(super) fn flush_for(&mut self, request: RequestId) {
        if self.stack.iter().any(|image| image.poisoned) {
            return self.finish(request, Err(libc::EIO));
        }
        let mut needs = Vec::new();
        for index in 0..self.stack.len() {
            let cycle = self.covering_cycle(index);
            if cycle > self.stack[index].writeback.done {
                needs.push((self.stack[index].file, cycle));
            }
        }
        self.tickets.push(FlushTicket { request, needs });
    }

    pub(super) fn progress_tickets(&mut self) {
        let mut wanted = Vec::new();
        let stack = &self.stack;
        for ticket in &mut self.tickets {
            // An image that left the stack was clean when it did.
            ticket.needs.retain(|(file, cycle)| {
                let image = stack.iter().find(|image| image.file == *file);
                image.is_some_and(|image| image.writeback.done < *cycle)
            });
            wanted.extend(ticket.needs.iter().map(|(file, _)| *file));
        }
        for file in wanted {
            if let Some(index) = self.index_of(file) {
                self.start_writeback(index);
            }
        }
        let ready = |ticket: &FlushTicket| ticket.needs.is_empty();
        if !self.tickets.iter().any(ready) {
            return;
        }
        if self.names_owed && !self.names_syncing {
            self.names_owed = false;
            self.names_syncing = true;
            self.start(Op::SyncNames { why: "flush: the name of the last swap" }, Purpose::Names);
        }
        if !self.names_syncing {
            let (done, rest): (Vec<_>, Vec<_>) =
                std::mem::take(&mut self.tickets).into_iter().partition(ready);
            self.tickets = rest;
            for ticket in done {
                self.finish(ticket.request, Ok(()));
            }
        }
    }

    pub(super) fn names_synced(&mut self, result: Result<(), i32>) {
        self.names_syncing = false;
        if let Err(errno) = result {
            self.names_owed = true;
            let ready = |ticket: &FlushTicket| ticket.needs.is_empty();
            let (failed, rest): (Vec<_>, Vec<_>) =
                std::mem::take(&mut self.tickets).into_iter().partition(ready);
            self.tickets = rest;
            for ticket in failed {
                self.finish(ticket.request, Err(errno));
            }
        }
    }

    /// Waits for what makes everything acknowledged so far durable.
    pub(super) fn write_back_for(&mut self, token: Token) {
        let needs = (0..self.stack.len()).map(|index| (self.stack[index].file, self.covering_cycle(index)));
        let needs = needs.collect();
        self.written_back.push(WriteBackWaiter { token, needs });
    }

    /// Answers those whose write-backs have ended, and begins what the others
    /// wait for.
    fn progress_written_back(&mut self) {
        for mut waiter in std::mem::take(&mut self.written_back) {
            // An image that left the stack was clean when it did.
            let open = |file: FileId| self.stack.iter().position(|image| image.file == file);
            let waits = |(file, cycle): &(FileId, u64)| {
                open(*file).is_some_and(|index| self.stack[index].writeback.done < *cycle)
            };
            waiter.needs.retain(waits);
            let indexes: Vec<usize> = waiter.needs.iter().filter_map(|(file, _)| open(*file)).collect();
            if let Some(poisoned) = indexes.iter().find(|index| self.stack[**index].poisoned) {
                let detail = format!("a flush of {} failed", self.stack[*poisoned].name);
                self.answer(waiter.token, Err(CommandError::Failed(detail)));
            } else if indexes.is_empty() {
                self.answer(waiter.token, Ok(CommandReply::Done));
            } else {
                for index in indexes {
                    // A failed cycle is tried again by the tick.
                    if self.stack[index].writeback.is_idle() {
                        self.start_writeback(index);
                    }
                }
                self.written_back.push(waiter);
            }
        }
    }

    /// Answers those who wait for images without anything to write back.
    pub(super) fn progress_clean(&mut self) {
        self.progress_written_back();
        let waiters = std::mem::take(&mut self.clean);
        for waiter in waiters {
            let indexes: Vec<usize> = (0..self.stack.len())
                .filter(|index| waiter.file.is_none_or(|file| self.stack[*index].file == file))
                .collect();
            if let Some(poisoned) = indexes.iter().find(|index| self.stack[**index].poisoned) {
                let detail = format!("a flush of {} failed", self.stack[*poisoned].name);
                self.answer(waiter.token, Err(CommandError::Failed(detail)));
            } else if indexes.iter().all(|index| self.stack[*index].is_clean())
                && (!waiter.quiet || self.ops.is_empty() && self.barriers.is_empty())
            {
                let plans = indexes.iter().map(|index| self.settle_plan(*index)).collect();
                self.answer(waiter.token, Ok(CommandReply::Clean(plans)));
            } else if let Some(error) = self.given_up(&waiter, &indexes) {
                self.release();
                self.answer(waiter.token, Err(error));
            } else {
                for index in indexes {
                    // A failed cycle is tried again by the tick.
                    if self.stack[index].writeback.is_idle() {
                        self.start_writeback(index);
                    }
                }
                self.clean.push(waiter);
            }
        }
    }

    /// Why a process that is to end does not, when metadata cannot be written
    /// for so long: nothing is lost, but only here is it known.
    fn given_up(&self, waiter: &CleanWaiter, indexes: &[usize]) -> Option<CommandError> {
        if !waiter.quiet || self.now_us < waiter.since_us + CLOSE_TIME_MAX_US {
            return None;
        }
        let failed = |index: &usize| {
            let image = &self.stack[*index];
            let error = std::io::Error::from_raw_os_error(image.writeback.failure()?);
            Some(format!("metadata of {} cannot be written: {error}", image.name))
        };
        indexes.iter().find_map(failed).map(CommandError::Unsettled)
    }

    /// Tries failed cycles again.
    pub(super) fn retry_failed(&mut self) {
        for index in 0..self.stack.len() {
            if matches!(self.stack[index].writeback.state, State::Failed(..)) {
                self.start_writeback(index);
            }
        }
    }
}

/// The bitmaps of slots that no BAT on the file names, and the others.
fn bitmap_writes(file: FileId, captured: &Captured) -> (Vec<Op>, Vec<Op>) {
    let bytes = |(slot, bitmap): &(Slot, SectorBitmap)| {
        (slot.bitmap_offset(), Arc::from(bitmap.to_bytes().as_slice()))
    };
    let writes = |bitmaps: Vec<_>| meta_writes(file, "writeback: bitmap", bitmaps.into_iter().map(bytes));
    let new = captured.new_slots();
    let (new, known): (Vec<_>, Vec<_>) = captured.bitmaps.iter().partition(|(slot, _)| new.contains(slot));
    (writes(new), writes(known))
}

/// Many in each operation: a file takes one write through the page cache at a
/// time, so more threads would only wait for each other, and for guests.
fn meta_writes(file: FileId, why: &'static str, parts: impl Iterator<Item = (u64, Arc<[u8]>)>) -> Vec<Op> {
    let parts: Vec<_> = parts.collect();
    let ops = parts.chunks(META_PARTS_MAX);
    ops.map(|parts| Op::WriteMeta { file, parts: parts.to_vec(), why }).collect()
}

fn flush(file: FileId, why: &'static str) -> Op {
    Op::Flush { file, why }
}
