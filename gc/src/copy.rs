//! The windows of a merge with blocking I/O: for hidden nodes and for leaves
//! nobody has attached.

use std::collections::BTreeMap;

use sm::{Repo, image};
use vhd::merge::{BlockCopy, Merge, Mode, Piece, Step, Tables, Window, WindowLimits};
use vhd::meta::FooterState;
use vhd::rw::Presence;
use vhd::slots::{BITMAP_PAGE_BYTES, is_full_bitmap_page};
use vhd::storage::{CopyKind, VolumeName};
use vhd::units::{BLOCK_BYTES, BLOCK_SECTORS, BlockNo, SectorRun, Slot};
use vhd::writer::{CopyIn, WholeBlock, Writer};

use crate::job::{Result, Stop};
use crate::limits;
use crate::sources::Sources;
use crate::watch::{Event, Watch};

/// Bytes looked at in one go when a block may be all zeros.
const ZERO_CHECK_BYTES: u64 = 64 << 10;
/// And at first: most blocks that hold something begin with it.
const ZERO_LOOK_BYTES: u64 = 4 << 10;

/// A copy under way. The parent is open for writing and locked by us.
pub(crate) struct Copying<'a> {
    watch: &'a dyn Watch,
    windows: WindowLimits,
    sources: Sources,
    parent: Writer,
    /// The sources, open for writing, when they are emptied on the way; same
    /// order as `sources`.
    emptied: Vec<Writer>,
    /// Has every reader of the sources drop the map it has.
    tell_readers: &'a dyn Fn() -> Result<()>,
    /// Whether the filesystem shares what is copied, as far as was seen.
    shares: Option<bool>,
    unflushed: Unflushed,
    /// Runs of this window that are copied all at once, by source.
    batch: BTreeMap<usize, Vec<CopyIn>>,
    /// Their bytes.
    batched_bytes: u64,
    /// Blocks of this window that are shared as wholes, by source.
    shared: BTreeMap<usize, Vec<WholeBlock>>,
}

/// What the parent took in since it was flushed.
#[derive(Debug, Default)]
struct Unflushed {
    bytes: u64,
    blocks: u32,
}

impl<'a> Copying<'a> {
    /// Copies `sources` into `parent`, window by window; those in `emptied` lose
    /// what it has.
    pub fn new(
        watch: &'a dyn Watch,
        windows: WindowLimits,
        sources: Sources,
        parent: Writer,
        emptied: Vec<Writer>,
        tell_readers: &'a dyn Fn() -> Result<()>,
    ) -> Self {
        Self {
            watch,
            windows,
            sources,
            parent,
            emptied,
            tell_readers,
            shares: None,
            unflushed: Unflushed::default(),
            batch: BTreeMap::new(),
            batched_bytes: 0,
            shared: BTreeMap::new(),
        }
    }

    /// Runs all windows. Crash argument: see [`vhd::merge`]; each step here
    /// is one of its steps, done completely before the next.
    ///
    /// # Errors
    /// [`Stop::Aborted`] between two blocks; then everything copied so far is
    /// durable, or will be after [`Self::settle`], and what the window has not
    /// got to yet is in its source as before.
    pub fn run(&mut self) -> Result<()> {
        let mut merge = Merge::new(self.mode(), self.windows, BlockNo(0));
        while let Some(window) = self.sources.next(&mut merge)? {
            self.fetch(&window);
            self.window(&window)?;
        }
        Ok(())
    }

    fn mode(&self) -> Mode {
        if self.emptied.is_empty() { Mode::Shadow } else { Mode::Empty }
    }

    /// Whether a run is copied with many others at once: short ones, and all
    /// where nothing is shared. Short ones that go into a new block are not:
    /// the page cache finds room for them together.
    fn is_batched(&self, run: SectorRun, gained: bool) -> bool {
        if run.bytes() <= limits::SHORT_RUN_BYTES_MAX { !gained } else { self.shares == Some(false) }
    }

    /// Has the storage read ahead what is looked at of a window before it is
    /// copied, all of it at once: reads one after the other would each wait for
    /// the disk. What is copied is read by who copies it.
    fn fetch(&self, window: &Window) {
        for copy in &window.copies {
            self.parent.will_look_at(copy.block);
            if self.shares != Some(false)
                && let Some((source, slot)) = self.whole(copy)
                && let Some(volume) = self.sources.volume(source)
            {
                let (offset, len_bytes) = looked_at(slot);
                volume.will_read(offset, len_bytes);
            } else if !copy.below
                && let Some(Piece { source, run }) = copy.pieces.first()
                && let Some((volume, offset)) = self.sources.place(*source, copy.block, run.first)
            {
                volume.will_read(offset, run.bytes().min(ZERO_LOOK_BYTES));
            }
        }
    }

    /// The source and slot of a block that one source has whole, as its BATmap
    /// or its bitmap says, and the parent not at all.
    fn whole(&self, copy: &BlockCopy) -> Option<(usize, Slot)> {
        let [Piece { source, run: SectorRun { first: 0, count: BLOCK_SECTORS } }] = copy.pieces.as_slice()
        else {
            return None;
        };
        let absent = self.parent.presence(copy.block) == Presence::Absent;
        match self.sources.presence(*source, copy.block) {
            Presence::Whole(slot) | Presence::Partial(slot) if absent => Some((*source, slot)),
            Presence::Whole(_) | Presence::Partial(_) | Presence::Absent => None,
        }
    }

    /// Whether a block can be shared as a whole, its bitmap included, with
    /// its neighbours; then that is put off until all of the window can be.
    fn put_off(&mut self, copy: &BlockCopy) -> Result<bool> {
        if self.shares != Some(true) {
            return Ok(false);
        }
        let Some((source, source_slot)) = self.whole(copy) else { return Ok(false) };
        let Some(volume) = self.sources.volume(source) else { return Ok(false) };
        let mut look = [0; (BITMAP_PAGE_BYTES + ZERO_LOOK_BYTES) as usize];
        let (offset, _) = looked_at(source_slot);
        volume.read_at(&mut look, offset).map_err(|e| sm::Error::io("read a source", e))?;
        let (page, data) = look.split_at(BITMAP_PAGE_BYTES as usize);
        let may_be_zero = !copy.below && data.iter().all(|byte| *byte == 0);
        let sound = is_full_bitmap_page(page) && !may_be_zero;
        if sound {
            let block = WholeBlock { block: copy.block, source_slot };
            self.shared.entry(source).or_default().push(block);
        }
        Ok(sound)
    }

    /// All steps of a window. Once a clear was begun, readers are told even
    /// if something fails: nobody may open a source for writing, and so give
    /// its free space away, while a map still names that space.
    fn window(&mut self, window: &Window) -> Result<()> {
        let mut held = Vec::new();
        let outcome = self.move_blocks(window, &mut held);
        if held.is_empty() {
            return outcome;
        }
        (self.tell_readers)()?;
        self.watch.note(Event::Slice);
        for (source, slots) in held {
            if let Some(writer) = self.emptied.get_mut(source) {
                writer.release(slots).map_err(format)?;
            }
        }
        outcome
    }

    fn move_blocks(&mut self, window: &Window, held: &mut Vec<(usize, Vec<vhd::units::Slot>)>) -> Result<()> {
        for step in window.steps() {
            match step {
                Step::Copy(copy) => {
                    self.watch.allow(copy.bytes())?;
                    self.block(&copy)?;
                    if self.batched_bytes >= limits::BATCH_BYTES_MAX {
                        self.copy_batch()?;
                    }
                }
                Step::CommitParent => self.commit_parent()?,
                Step::Clear { source, blocks } => {
                    let Some(writer) = self.emptied.get_mut(source) else {
                        continue;
                    };
                    let cleared = writer.clear_blocks_held(&blocks).map_err(format);
                    // Also when it failed: it may have reached the disk.
                    held.push((source, Vec::new()));
                    let slots = cleared?;
                    if let Some((_, last)) = held.last_mut() {
                        *last = slots;
                    }
                    self.sources.cleared(source, &blocks);
                    let bytes = blocks.len() as u64 * BLOCK_BYTES;
                    self.watch.note(Event::Freed(bytes));
                }
                // By the caller, once readers were told.
                Step::Release { .. } => {}
            }
        }
        Ok(())
    }

    /// Makes the parent durable. A merge that clears nothing may put it off:
    /// until then its sources have everything.
    fn commit_parent(&mut self) -> Result<()> {
        self.copy_batch()?;
        self.share_batch()?;
        let Unflushed { bytes, blocks } = self.unflushed;
        let soon = bytes < limits::UNFLUSHED_BYTES_MAX && blocks < limits::UNFLUSHED_BLOCKS_MAX;
        if self.mode() == Mode::Shadow && soon {
            return Ok(());
        }
        self.unflushed = Unflushed::default();
        self.parent.commit().map_err(format)?;
        self.watch.note(Event::Durable);
        Ok(())
    }

    fn block(&mut self, copy: &BlockCopy) -> Result<()> {
        if self.put_off(copy)? {
            return Ok(());
        }
        if !copy.below && is_zero(&self.sources, copy)? {
            self.watch.note(Event::Dropped(copy.bytes()));
            return Ok(());
        }
        let gained = self.parent.presence(copy.block) == Presence::Absent;
        let below = self.sources.under_parent(copy.block);
        let (mut copied, mut cloned) = (0, 0);
        for Piece { source, run } in &copy.pieces {
            let Some((volume, offset)) = self.sources.place(*source, copy.block, run.first) else {
                continue;
            };
            if self.is_batched(*run, gained) {
                let piece = CopyIn { block: copy.block, run: *run, source_offset: offset, below };
                self.batch.entry(*source).or_default().push(piece);
                self.batched_bytes += run.bytes();
                continue;
            }
            match self.parent.copy_in(copy.block, *run, volume, offset, below).map_err(format)? {
                CopyKind::Cloned => cloned += run.bytes(),
                CopyKind::Copied => copied += run.bytes(),
            }
        }
        self.unflushed.bytes += copied;
        self.unflushed.blocks += 1;
        if copied + cloned > limits::SHORT_RUN_BYTES_MAX {
            self.shares = Some(cloned > copied);
        }
        if copied > 0 {
            self.parent.begin_write_out(copy.block);
        }
        self.note_copied(copied, cloned);
        if gained {
            self.watch.note(Event::Gained(BLOCK_BYTES));
        }
        Ok(())
    }

    fn note_copied(&self, copied: u64, cloned: u64) {
        for (bytes, cloned) in [(copied, false), (cloned, true)] {
            if bytes > 0 {
                self.watch.note(Event::Copied { bytes, cloned });
            }
        }
    }

    /// Shares what was put off for it.
    fn share_batch(&mut self) -> Result<()> {
        for (source, blocks) in std::mem::take(&mut self.shared) {
            let Some(volume) = self.sources.volume(source) else {
                continue;
            };
            let (cloned, copied) = self.parent.copy_whole(volume, &blocks).map_err(format)?;
            self.shares = Some(cloned > copied);
            self.unflushed.bytes += copied;
            self.unflushed.blocks += u32::try_from(blocks.len()).unwrap_or(u32::MAX);
            self.note_copied(copied, cloned);
            self.watch.note(Event::Gained(blocks.len() as u64 * BLOCK_BYTES));
        }
        Ok(())
    }

    /// Copies what was put off for it.
    fn copy_batch(&mut self) -> Result<()> {
        self.batched_bytes = 0;
        for (source, copies) in std::mem::take(&mut self.batch) {
            let Some(volume) = self.sources.volume(source) else {
                continue;
            };
            self.parent.copy_in_many(volume, &copies).map_err(format)?;
            let bytes = copies.iter().map(|copy| copy.run.bytes()).sum();
            self.unflushed.bytes += bytes;
            self.watch.note(Event::Copied { bytes, cloned: false });
        }
        Ok(())
    }

    /// Settles everything that is open for writing.
    ///
    /// # Errors
    /// What writing said; the images then wait for whoever opens them next.
    pub fn settle(&mut self) -> Result<()> {
        self.parent.settle(None).map_err(format)?;
        self.watch.note(Event::Durable);
        for writer in &mut self.emptied {
            writer.settle(None).map_err(format)?;
        }
        Ok(())
    }
}

/// Windows of a merge that clears nothing.
pub(crate) const WINDOW: WindowLimits = WindowLimits {
    bytes_max: limits::WINDOW_BYTES_MAX,
    blocks_max: limits::WINDOW_BLOCKS_MAX,
    gained_max: u32::MAX,
};

/// Windows of one that gives space back on the way, as there is not enough.
pub(crate) const SLICE: WindowLimits = WindowLimits {
    bytes_max: limits::SLICE_BYTES_MAX,
    blocks_max: limits::WINDOW_BLOCKS_MAX,
    gained_max: limits::SLICE_GAINED_MAX,
};

/// Windows of one that gives space back although there is enough.
pub(crate) const ROOMY_SLICE: WindowLimits = WindowLimits {
    bytes_max: limits::ROOMY_SLICE_BYTES_MAX,
    blocks_max: limits::WINDOW_BLOCKS_MAX,
    gained_max: limits::ROOMY_SLICE_GAINED_MAX,
};

/// How a leaf is emptied where `free_bytes` are free, and the bytes its parent
/// gains at most before space comes back. What an attached leaf's parent gains
/// is not known: `gained_bytes` is all that the leaf has then. There must be room
/// for as many merges as run at the same time, unless more are asked for.
pub(crate) fn leaf_slice(free_bytes: u64, gained_bytes: u64) -> (WindowLimits, u64) {
    let roomy = gained_bytes.min(limits::ROOMY_SLICE_BYTES_MAX);
    if (limits::PARALLEL as u64 * roomy).saturating_add(limits::RESERVE_BYTES) <= free_bytes {
        (ROOMY_SLICE, roomy)
    } else {
        (SLICE, gained_bytes.min(limits::SLICE_BYTES_MAX))
    }
}

/// What is looked at of a block before it is shared as a whole: offset and
/// bytes of its bitmap, what lies before that, and the beginning of its data.
fn looked_at(slot: Slot) -> (u64, u64) {
    let data = slot.data_offset(0);
    (data.saturating_sub(BITMAP_PAGE_BYTES), BITMAP_PAGE_BYTES + ZERO_LOOK_BYTES)
}

/// Whether every piece of a block reads as zeros. Ends at the first byte
/// that is not, so data costs one small read.
pub(crate) fn is_zero(sources: &Sources, copy: &BlockCopy) -> Result<bool> {
    let mut buf = vec![0; usize::try_from(ZERO_CHECK_BYTES).unwrap_or(usize::MAX)];
    for Piece { source, run } in &copy.pieces {
        let Some((volume, offset)) = sources.place(*source, copy.block, run.first) else {
            continue;
        };
        let mut at = 0;
        while at < run.bytes() {
            let step = if at == 0 { ZERO_LOOK_BYTES } else { ZERO_CHECK_BYTES };
            let len = (run.bytes() - at).min(step);
            let part = buf.get_mut(..usize::try_from(len).unwrap_or(0)).unwrap_or_default();
            volume.read_at(part, offset + at).map_err(|e| sm::Error::io("read a source", e))?;
            if part.iter().any(|byte| *byte != 0) {
                return Ok(false);
            }
            at += len;
        }
    }
    Ok(true)
}

/// An error of the format crate, which names the image itself.
pub(crate) fn format(error: vhd::error::Error) -> Stop {
    let what = error.to_string();
    match error {
        vhd::error::Error::Of { source, image } => match *source {
            vhd::error::Error::Io(source) => Stop::Failed(sm::Error::io(image, source)),
            _ => Stop::Later(what),
        },
        vhd::error::Error::Io(source) => Stop::Failed(sm::Error::io("merge", source)),
        _ => Stop::Later(what),
    }
}

/// Settles an image unless it is settled already: a killed holder may have
/// left it so, and then nobody else may read it.
pub(crate) fn settle_if_needed(repo: &Repo, name: &VolumeName) -> Result<()> {
    let meta = image::meta(repo, name)?;
    let record = repo
        .host
        .records()
        .existing(meta.uuid())
        .map_err(|e| sm::Error::io(format!("pending record of {name}"), e))?;
    if meta.footer_state != FooterState::Settled || record.is_some() {
        drop(record);
        image::settle(repo, name)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn a_leaf_goes_in_large_slices_only_where_there_is_room_for_all_merges() {
        let roomy = limits::PARALLEL as u64 * limits::ROOMY_SLICE_BYTES_MAX + limits::RESERVE_BYTES;
        // Free, what the parent gains; blocks at a time, room at the peak.
        for (free, gained, blocks, peak) in [
            (roomy, 1024 * MIB, 128, 256 * MIB),
            (roomy - 1, 1024 * MIB, 16, 32 * MIB),
            (64 * MIB, 1024 * MIB, 16, 32 * MIB),
            (64 * MIB, 10 * MIB, 16, 10 * MIB),
            // Little is gained: there is room for it.
            (104 * MIB, 20 * MIB, 128, 20 * MIB),
            (0, 20 * MIB, 16, 20 * MIB),
            (u64::MAX, u64::MAX, 128, 256 * MIB),
        ] {
            let (windows, most) = leaf_slice(free, gained);
            assert_eq!((windows.gained_max, most), (blocks, peak), "{free} free, {gained} gained");
        }
    }
}
