//! An image of the stack, open for writing, and what operations are for.

use std::collections::VecDeque;

use vhd::bitmap::SectorBitmap;
use vhd::record::PendingRecord;
use vhd::rw::RwImage;
use vhd::storage::VolumeName;
use vhd::units::{BlockNo, Slot};

use super::copies::CopyBatch;
use super::piece::Part;
use super::writeback::WriteBack;
use super::{Engine, FileId, Op, Wait};
use crate::engine::{Completion, RequestId};

/// An image open for writing.
#[derive(Debug)]
pub struct Image {
    /// In the driver's table.
    pub file: FileId,
    /// Its volume.
    pub name: VolumeName,
    /// Its footer uuid.
    pub footer: uuid::Uuid,
    /// Its virtual size in bytes.
    pub virtual_bytes: u64,
    /// Where blocks lie and what waits for a flush.
    pub rw: RwImage,
    /// What waits, where it survives this process.
    pub record: PendingRecord,
    pub(super) writeback: WriteBack,
    /// Data was written since the last flush began.
    pub(super) unflushed: bool,
    /// A flush failed: nothing more is promised until it was reopened.
    pub(super) poisoned: bool,
    /// Its tables were changed and could not be read since: nothing of it can
    /// be found until it was reopened.
    pub(super) unmapped: bool,
    /// Length being set.
    pub(super) extending_to: Option<u64>,
    /// Writes that completed but found the record full, or the bitmap of their
    /// block forgotten: it is being read again.
    pub(super) unrecorded: Vec<Part>,
    /// Freed slots that are to be zeroed, side by side ones together.
    pub(super) to_zero: VecDeque<Vec<Slot>>,
    /// Operations that zero such slots, in flight.
    pub(super) zeroing: usize,
}

impl Image {
    /// An image just opened, nothing in flight.
    #[must_use]
    pub fn new(
        file: FileId,
        name: VolumeName,
        footer: uuid::Uuid,
        virtual_bytes: u64,
        rw: RwImage,
        record: PendingRecord,
    ) -> Self {
        Self {
            file,
            name,
            footer,
            virtual_bytes,
            rw,
            record,
            writeback: WriteBack::default(),
            unflushed: false,
            poisoned: false,
            unmapped: false,
            extending_to: None,
            unrecorded: Vec::new(),
            to_zero: VecDeque::new(),
            zeroing: 0,
        }
    }

    /// Nothing waits for a flush, in memory or in flight.
    pub(super) fn is_clean(&self) -> bool {
        !self.rw.is_dirty() && !self.unflushed && self.writeback.is_idle() && self.unrecorded.is_empty()
    }
}

/// What it takes to settle an image whose metadata is durable: its BATmap and
/// where its data ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SettlePlan {
    /// Which image.
    pub file: FileId,
    /// Blocks that are whole.
    pub whole: Vec<BlockNo>,
    /// One past the last byte of data: where the footer goes.
    pub data_end: u64,
    /// Blocks the image has.
    pub blocks: u32,
}

/// What an operation in flight is for.
#[derive(Debug)]
pub(crate) enum Purpose {
    /// Part of a guest read.
    Read(RequestId),
    /// Part of a guest write or zeroing.
    Write(Part),
    /// A bitmap of a stack image.
    Bitmap { file: FileId, block: BlockNo, slot: Slot },
    /// A bitmap of a lower level, for resolving a block's owners.
    Owners { generation: u64, block: BlockNo, level: usize },
    /// A longer volume.
    Extend { file: FileId, len: u64 },
    /// A step of a write-back.
    WriteBack(FileId),
    /// Released slots were zeroed.
    Released { file: FileId, slots: Vec<Slot> },
    /// What lies before the data of these blocks of a merge's leaf.
    Pages(Vec<BlockNo>),
    /// A batch of a merge.
    Copy(CopyBatch),
    /// A step of a merge's commit.
    Commit,
    /// The rename of a swap.
    Swap,
    /// Names became durable.
    Names,
}

impl Engine {
    pub(super) fn completed(&mut self, purpose: Purpose, completion: Completion) {
        match purpose {
            Purpose::Read(request) => self.part_done(request, result(&completion)),
            Purpose::Write(part) => self.data_written(part, result(&completion)),
            Purpose::Bitmap { file, block, slot } => self.bitmap_read(file, block, slot, completion),
            Purpose::Owners { generation, block, level } => {
                self.owners_read(generation, block, level, completion);
            }
            Purpose::Extend { file, len } => self.extended(file, len, result(&completion)),
            Purpose::WriteBack(file) => self.writeback_step(file, result(&completion)),
            Purpose::Released { file, slots } => self.zeroed(file, &slots, result(&completion)),
            Purpose::Pages(blocks) => self.pages_read(&blocks, &completion),
            Purpose::Copy(batch) => self.copied(batch, &completion),
            Purpose::Commit => self.commit_step(result(&completion)),
            Purpose::Swap => self.swapped(result(&completion)),
            Purpose::Names => self.names_synced(result(&completion)),
        }
    }

    /// Starts reading the bitmap of a partial block of a stack image, unless
    /// that is under way.
    pub(super) fn load_bitmap(&mut self, index: usize, block: BlockNo, slot: Slot) {
        let file = self.stack[index].file;
        let under_way = self.ops.values().any(|purpose| {
            matches!(purpose, Purpose::Bitmap { file: f, block: b, .. } if *f == file && *b == block)
        });
        if !under_way {
            let op = Op::ReadMeta { file, offset: slot.bitmap_offset(), len: 512 };
            self.start(op, Purpose::Bitmap { file, block, slot });
        }
    }

    fn bitmap_read(&mut self, file: FileId, block: BlockNo, slot: Slot, completion: Completion) {
        let wait = Wait::Bitmap(file, block);
        match bitmap_of(completion) {
            Ok(bitmap) => {
                if let Some(index) = self.index_of(file) {
                    // Refused when the block changed meanwhile; whoever waits
                    // looks again either way.
                    self.stack[index].rw.bitmap_read(block, slot, bitmap);
                }
                self.unrecorded_again(file, block, Ok(()));
                self.wake(wait);
            }
            Err(errno) => {
                self.unrecorded_again(file, block, Err(errno));
                self.fail_parked(wait, errno);
                self.merge_read_failed(file, block, errno);
            }
        }
    }

    /// Looks again at writes into a block that completed and could not be
    /// recorded.
    fn unrecorded_again(&mut self, file: FileId, block: BlockNo, result: Result<(), i32>) {
        let Some(index) = self.index_of(file) else { return };
        let unrecorded = std::mem::take(&mut self.stack[index].unrecorded);
        let (again, rest): (Vec<_>, _) = unrecorded.into_iter().partition(|part| part.block == block);
        self.stack[index].unrecorded = rest;
        for part in again {
            self.data_written(part, result);
        }
    }

    /// Makes the file long enough for `slot`; true if it is.
    pub(super) fn ensure_length(&mut self, index: usize, slot: Slot) -> bool {
        let image = &mut self.stack[index];
        let Some(len) = image.rw.slots().extension_for(slot) else { return true };
        self.extend(index, len);
        false
    }

    /// After a slot was taken: makes the file longer while nobody waits for
    /// it. A file being written to can be made longer only between two writes
    /// that need space, so each wait for that is a long one.
    pub(super) fn extend_ahead(&mut self, index: usize) {
        let rw = &mut self.stack[index].rw;
        let left = u64::from(rw.blocks().saturating_sub(rw.allocated_blocks()));
        if let Some(len) = rw.slots().extension_ahead(left) {
            self.extend(index, len);
        }
    }

    fn extend(&mut self, index: usize, len: u64) {
        let image = &mut self.stack[index];
        if image.extending_to.is_none() {
            image.extending_to = Some(len);
            let file = image.file;
            self.start(Op::Extend { file, len }, Purpose::Extend { file, len });
        }
    }

    fn extended(&mut self, file: FileId, len: u64, result: Result<(), i32>) {
        let Some(index) = self.index_of(file) else { return };
        self.stack[index].extending_to = None;
        match result {
            Ok(()) => {
                self.stack[index].rw.slots().extended(len);
                self.wake(Wait::Length(file));
            }
            Err(errno) => {
                self.fail_parked(Wait::Length(file), errno);
                self.merge_length_failed(file, errno);
            }
        }
    }

    pub(super) fn settle_plan(&self, index: usize) -> SettlePlan {
        let image = &self.stack[index];
        SettlePlan {
            file: image.file,
            whole: image.rw.whole_blocks().collect(),
            data_end: image.rw.data_end(),
            blocks: image.rw.allocated_blocks(),
        }
    }
}

/// Success or errno.
pub(super) fn result(completion: &Completion) -> Result<(), i32> {
    match completion {
        Completion::Failed(errno) => Err(*errno),
        Completion::Done | Completion::Bytes(_) | Completion::Copied { .. } => Ok(()),
    }
}

/// The bitmap a metadata read brought.
pub(super) fn bitmap_of(completion: Completion) -> Result<SectorBitmap, i32> {
    match completion {
        Completion::Bytes(bytes) => match <&[u8; 512]>::try_from(bytes.as_slice()) {
            Ok(bytes) => Ok(SectorBitmap::from_bytes(bytes)),
            Err(_) => Err(libc::EIO),
        },
        Completion::Failed(errno) => Err(errno),
        Completion::Done | Completion::Copied { .. } => Err(libc::EIO),
    }
}
