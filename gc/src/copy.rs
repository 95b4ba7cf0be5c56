//! The windows of a merge with blocking I/O: for hidden nodes and for leaves
//! nobody has attached.

use sm::{Repo, image};
use vhd::merge::{BlockCopy, Merge, Mode, Piece, Step, Window, WindowLimits};
use vhd::meta::FooterState;
use vhd::rw::Presence;
use vhd::storage::{CopyKind, VolumeName};
use vhd::units::{BLOCK_BYTES, BlockNo};
use vhd::writer::Writer;

use crate::job::{Result, Stop};
use crate::limits;
use crate::sources::Sources;
use crate::watch::{Event, Watch};

/// Bytes looked at in one go when a block may be all zeros.
const ZERO_CHECK_BYTES: u64 = 64 << 10;

/// A copy under way. The parent is open for writing and locked by us.
pub(crate) struct Copying<'a> {
    pub watch: &'a dyn Watch,
    pub sources: Sources,
    pub parent: Writer,
    /// The sources, open for writing, when they are emptied on the way; same
    /// order as `sources`.
    pub emptied: Vec<Writer>,
    /// Has every reader of the sources drop the map it has.
    pub tell_readers: &'a dyn Fn() -> Result<()>,
}

impl Copying<'_> {
    /// Runs all windows. Crash argument: see [`vhd::merge`]; each step here
    /// is one of its steps, done completely before the next.
    ///
    /// # Errors
    /// [`Stop::Aborted`] between two windows; then everything copied so far
    /// is durable, or will be after [`Self::settle`].
    pub fn run(&mut self) -> Result<()> {
        let mode = if self.emptied.is_empty() { Mode::Shadow } else { Mode::Empty };
        let mut merge = Merge::new(mode, window_limits(mode), BlockNo(0));
        while let Some(window) = self.sources.next(&mut merge)? {
            self.watch.allow(window.bytes())?;
            self.window(&window)?;
        }
        Ok(())
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
                Step::Copy(copy) => self.block(&copy)?,
                Step::CommitParent => self.parent.commit().map_err(format)?,
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

    fn block(&mut self, copy: &BlockCopy) -> Result<()> {
        if !copy.below && is_zero(&self.sources, copy)? {
            self.watch.note(Event::Dropped(copy.bytes()));
            return Ok(());
        }
        let gained = self.parent.presence(copy.block) == Presence::Absent;
        let below = self.sources.under_parent(copy.block);
        for Piece { source, run } in &copy.pieces {
            let Some((volume, offset)) = self.sources.place(*source, copy.block, run.first) else {
                continue;
            };
            let kind = self.parent.copy_in(copy.block, *run, volume, offset, below).map_err(format)?;
            self.watch.note(Event::Copied { bytes: run.bytes(), cloned: kind == CopyKind::Cloned });
        }
        if gained {
            self.watch.note(Event::Gained(BLOCK_BYTES));
        }
        Ok(())
    }

    /// Settles everything that is open for writing.
    ///
    /// # Errors
    /// What writing said; the images then wait for whoever opens them next.
    pub fn settle(&mut self) -> Result<()> {
        self.parent.settle(None).map_err(format)?;
        for writer in &mut self.emptied {
            writer.settle(None).map_err(format)?;
        }
        Ok(())
    }
}

fn window_limits(mode: Mode) -> WindowLimits {
    match mode {
        Mode::Shadow => {
            WindowLimits { bytes_max: limits::WINDOW_BYTES_MAX, blocks_max: limits::WINDOW_BLOCKS_MAX }
        }
        Mode::Empty => {
            WindowLimits { bytes_max: limits::SLICE_BYTES_MAX, blocks_max: limits::SLICE_BLOCKS_MAX }
        }
    }
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
            let len = (run.bytes() - at).min(ZERO_CHECK_BYTES);
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
