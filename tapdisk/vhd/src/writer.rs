//! An image open for writing, with blocking I/O: for merges of images nobody
//! serves, imports, and for settling what a dead process left.
//!
//! The steps of opening and settling are the same for the data path, which
//! uses [`open_rw`] and [`settle_files`] too.

mod copying;

use std::sync::Arc;

use crate::bat::{BAT_FREE, Layout, read_bat};
use crate::batmap::{batmap_has_bits, is_whole, read_batmap, write_batmap};
use crate::bitmap::SectorBitmap;
use crate::check::overlap;
use crate::error::{Error, Result};
use crate::footer::DiskType;
use crate::meta::{FooterState, Meta};
use crate::record::RecordStore;
use crate::replay::replay;
use crate::rw::{Captured, Presence, RwImage};
pub use crate::settle::{Settled, settle_files};
use crate::slots::{GUARD_BYTES, Slots, slot_bytes};
use crate::storage::{Access, Volume, VolumeName, Volumes};
use crate::units::{BLOCK_BYTES, BLOCK_SECTORS, BlockNo, SECTOR_BYTES, SectorRun, Slot};
pub use copying::{CopyIn, WholeBlock};

/// An image opened, locked and made ready for writing.
#[derive(Debug)]
pub struct OpenRw {
    /// Locked by this very description (invariant 4).
    pub volume: Arc<dyn Volume>,
    /// Footer, header, layout.
    pub meta: Meta,
    /// Where blocks lie.
    pub rw: RwImage,
}

/// Locks an image and makes it ready for writing.
///
/// Crash argument; recovery is to run this again, every step being
/// idempotent:
/// 1. Whoever holds the lock first replays what a killed holder left in its
///    record (see [`replay`]), and only then removes the record.
/// 2. If the copy of the footer at the front is bad it is rewritten from the
///    end.
/// 3. A flush: that copy must be durable before the end is cut, and what the
///    BAT says now before space it does not name is given away (a killed
///    holder may have cleared an entry that a power cut would bring back).
/// 4. The tail is cut behind the last block (see `cut`), gaps are zeroed and
///    the BATmap is zeroed as a whole: what the BAT does not name is never
///    trusted to read as zeros (invariant 6), and no BATmap bit may outlive a
///    block that is freed later (invariant 7). No flush follows here: the first
///    metadata anybody writes is written after a flush of data, which covers
///    this too. On a device, whose free space is anything and stays so, only
///    the footer at the end is zeroed: as on a file that was cut, the copy at
///    the front alone counts from here until the image is settled.
///
/// # Errors
/// Whatever is wrong with the image, naming it; `WouldBlock` inside
/// [`Error::Io`] if somebody else holds it.
pub fn open_rw(volumes: &dyn Volumes, name: &VolumeName, records: &dyn RecordStore) -> Result<OpenRw> {
    let inner = || {
        let volume = volumes.open(name, Access::Write)?;
        let mut meta = writable_meta(volume.as_ref())?;
        let footer = meta.uuid();
        if let Some(record) = records.existing(footer)? {
            replay(volume.as_ref(), layout(&meta)?, &record)?;
        }
        records.remove(footer)?;
        let rw = ready(volume.as_ref(), &mut meta)?;
        Ok(OpenRw { volume, meta, rw })
    };
    inner().map_err(|e: Error| e.of(name))
}

/// Makes an image ready for writing once more that the caller has locked and
/// has changed behind the back of its [`RwImage`], as growth does. Its record
/// must be empty and nothing in flight.
///
/// # Errors
/// As [`open_rw`].
pub fn reopen(volume: &dyn Volume) -> Result<(Meta, RwImage)> {
    let mut meta = writable_meta(volume)?;
    let rw = ready(volume, &mut meta)?;
    Ok((meta, rw))
}

/// Steps 2 to 4 of [`open_rw`].
fn ready(volume: &dyn Volume, meta: &mut Meta) -> Result<RwImage> {
    if meta.footer_state != FooterState::Settled && meta.footer_state != FooterState::EndMissing {
        volume.write_at(&meta.footer.to_bytes(), 0)?;
        meta.footer_state = FooterState::EndMissing;
    }
    prepare(volume, meta)
}

fn writable_meta(volume: &dyn Volume) -> Result<Meta> {
    let meta = Meta::read(volume)?;
    if meta.disk_type() == DiskType::Fixed {
        return Err(Error::Unsupported { what: "writing a fixed image" });
    }
    if layout(&meta)?.block_sectors != BLOCK_SECTORS {
        return Err(Error::Unsupported { what: "writing an image whose blocks are not 2 MiB" });
    }
    Ok(meta)
}

fn layout(meta: &Meta) -> Result<&Layout> {
    meta.layout.as_ref().ok_or(Error::BadHeader { reason: "no header" })
}

/// Steps 3 and 4 of [`open_rw`].
fn prepare(volume: &dyn Volume, meta: &Meta) -> Result<RwImage> {
    let layout = layout(meta)?;
    volume.flush("open: footer copy and BAT as found before space is given away")?;
    let bat = read_bat(volume, layout)?;
    if let Some((block, other)) = overlap(&bat, layout) {
        let block = block.max(other);
        let sector = bat.get(block as usize).copied().unwrap_or(BAT_FREE);
        return Err(Error::BadBat { block, sector, reason: "it overlaps another block" });
    }
    let (slots, gaps) = Slots::survey(&bat, layout.data_start);
    let slots = if volume.is_device() {
        let len = volume.len()?;
        volume.zero(len.saturating_sub(SECTOR_BYTES), SECTOR_BYTES)?;
        slots.on_device(len)
    } else {
        cut(volume, &slots)?;
        for gap in gaps {
            volume.zero(gap.offset, gap.len)?;
        }
        slots
    };
    let whole = read_batmap(volume, meta);
    if batmap_has_bits(volume, meta) {
        write_batmap(volume, meta, &[])?;
    }
    let is_whole = |block: BlockNo| is_whole(whole.as_deref(), block.0);
    Ok(RwImage::new(layout.clone(), bat, is_whole, slots))
}

/// Has a file end with the guard behind its last slot. What lies there now may
/// be anything, an older footer too: it becomes zeros first, and durably so
/// where the file is longer. So at no moment does it end with what a guest
/// wrote, or with that footer.
fn cut(volume: &dyn Volume, slots: &Slots) -> Result<()> {
    volume.write_at(&[0; GUARD_BYTES as usize], slots.end_bytes())?;
    if volume.len()? > slots.len_bytes() {
        volume.flush("open: the guard before the file ends with it")?;
        volume.set_len(slots.len_bytes())?;
    }
    Ok(())
}

/// Settles an image that a dead process may have left unsettled, so that it
/// can be read. Whoever finds such an image does this first.
///
/// # Errors
/// As [`open_rw`].
pub fn settle(volumes: &dyn Volumes, name: &VolumeName, records: &dyn RecordStore) -> Result<()> {
    let mut writer = Writer::open(volumes, name, records)?;
    writer.settle(None)
}

/// See the module.
#[derive(Debug)]
pub struct Writer {
    name: VolumeName,
    open: OpenRw,
    unflushed: bool,
}

impl Writer {
    /// Opens an image: see [`open_rw`].
    ///
    /// # Errors
    /// As [`open_rw`].
    pub fn open(volumes: &dyn Volumes, name: &VolumeName, records: &dyn RecordStore) -> Result<Self> {
        Ok(Self { name: name.clone(), open: open_rw(volumes, name, records)?, unflushed: false })
    }

    /// Footer, header, layout.
    #[must_use]
    pub fn meta(&self) -> &Meta {
        &self.open.meta
    }

    /// The open volume.
    #[must_use]
    pub fn volume(&self) -> &dyn Volume {
        self.open.volume.as_ref()
    }

    /// What the image has of a block.
    #[must_use]
    pub fn presence(&self, block: BlockNo) -> Presence {
        self.open.rw.presence(block)
    }

    /// Blocks the image has, in order.
    #[must_use]
    pub fn blocks(&self) -> Vec<BlockNo> {
        self.open.rw.blocks_held().collect()
    }

    /// The sectors the image has of a block.
    ///
    /// # Errors
    /// The bitmap could not be read.
    pub fn bitmap(&mut self, block: BlockNo) -> Result<SectorBitmap> {
        let slot = match self.open.rw.presence(block) {
            Presence::Absent => return Ok(SectorBitmap::EMPTY),
            Presence::Whole(_) => return Ok(SectorBitmap::FULL),
            Presence::Partial(slot) => slot,
        };
        if let Some(bitmap) = self.open.rw.bitmap(block) {
            return Ok(bitmap.into_owned());
        }
        let mut bytes = [0; 512];
        self.open
            .volume
            .read_at(&mut bytes, slot.bitmap_offset())
            .map_err(|e| Error::from(e).of(&self.name))?;
        let bitmap = SectorBitmap::from_bytes(&bytes);
        self.open.rw.bitmap_read(block, slot, bitmap.clone());
        Ok(bitmap)
    }

    /// Writes whole sectors of a block. `below`: whether an image below has
    /// the block, so that what is not written stays absent. Durable after
    /// [`Self::commit`].
    ///
    /// # Errors
    /// What the volume said; nothing of the block's old content is lost.
    pub fn write(&mut self, block: BlockNo, run: SectorRun, data: &[u8], below: bool) -> Result<()> {
        debug_assert_eq!(data.len() as u64, run.bytes());
        let slot = self.place(block, below)?;
        self.open
            .volume
            .write_at(data, slot.data_offset(run.first))
            .map_err(|e| Error::from(e).of(&self.name))?;
        self.landed(block, slot, run);
        Ok(())
    }

    fn landed(&mut self, block: BlockNo, slot: Slot, run: SectorRun) {
        self.unflushed = true;
        self.open.rw.written(block, slot, run);
    }

    fn place(&mut self, block: BlockNo, below: bool) -> Result<Slot> {
        self.bitmap(block)?;
        let rw = &mut self.open.rw;
        let slot = match rw.presence(block) {
            Presence::Whole(slot) | Presence::Partial(slot) => slot,
            Presence::Absent => rw
                .allocate(block, !below)
                .map_err(|full| Error::Unsupported { what: full.what() }.of(&self.name))?,
        };
        if let Some(len) = rw.slots().extension_for(slot) {
            self.open.volume.extend(len).map_err(|e| Error::from(e).of(&self.name))?;
            rw.slots().extended(len);
        }
        Ok(slot)
    }

    /// Makes everything written durable, metadata included: the write-back
    /// of [`crate::rw`], new bitmaps first.
    ///
    /// # Errors
    /// What the volume said. The image's durable metadata still names durable
    /// data only; drop the writer and open it anew.
    pub fn commit(&mut self) -> Result<()> {
        let freed = self.commit_held()?;
        self.release(freed)
    }

    /// As [`Self::commit`], but the slots that became free are handed out
    /// instead of being given back.
    fn commit_held(&mut self) -> Result<Vec<Slot>> {
        if !self.open.rw.is_dirty() && !self.unflushed {
            return Ok(Vec::new());
        }
        let captured = self.open.rw.capture();
        let freed = self.write_back(captured).map_err(|e| Error::from(e).of(&self.name))?;
        self.unflushed = false;
        Ok(freed)
    }

    /// Gives back the space of blocks that [`Self::clear_blocks_held`]
    /// cleared, once nobody reads through an older map.
    ///
    /// # Errors
    /// What the volume said; the space is then given back by whoever opens
    /// the image next.
    pub fn release(&mut self, slots: Vec<Slot>) -> Result<()> {
        for slot in slots {
            if self.open.rw.slots().fresh_is_zero() {
                let gap = slot_bytes(slot);
                self.open.volume.zero(gap.offset, gap.len).map_err(|e| Error::from(e).of(&self.name))?;
            }
            self.open.rw.slots().put(slot);
        }
        Ok(())
    }

    fn write_back(&mut self, captured: Captured) -> std::io::Result<Vec<Slot>> {
        let (volume, rw) = (&self.open.volume, &mut self.open.rw);
        let new = captured.new_slots();
        let (new, known): (Vec<_>, Vec<_>) =
            captured.bitmaps.iter().partition(|(slot, _)| new.contains(slot));
        let write =
            |(slot, bitmap): &(Slot, SectorBitmap)| volume.write_at(&bitmap.to_bytes(), slot.bitmap_offset());
        new.into_iter().try_for_each(write)?;
        volume.flush("commit: data and new bitmaps before what names them")?;
        known.into_iter().try_for_each(write)?;
        if captured.changes_bat() {
            for (offset, sector) in rw.bat_sectors(&captured) {
                volume.write_at(&sector, offset)?;
            }
            rw.bat_written(&captured);
        }
        if !captured.is_empty() {
            volume.flush("commit: metadata")?;
        }
        Ok(rw.durable(captured))
    }

    /// Blocks leave the image, durably. Their space stays as it is: somebody
    /// may still read through an older map, until [`Self::release`]. The
    /// image must not be settled or dropped in between.
    ///
    /// # Errors
    /// As [`Self::commit`].
    pub fn clear_blocks_held(&mut self, blocks: &[BlockNo]) -> Result<Vec<Slot>> {
        for block in blocks {
            self.open.rw.free(*block);
        }
        self.commit_held()
    }

    /// Blocks leave the image, durably; their space is then given back.
    ///
    /// # Errors
    /// As [`Self::commit`].
    pub fn clear_blocks(&mut self, blocks: &[BlockNo]) -> Result<()> {
        for block in blocks {
            self.open.rw.free(*block);
        }
        self.commit()
    }

    /// Bytes of data of the blocks the image has.
    #[must_use]
    pub fn allocated_bytes(&self) -> u64 {
        u64::from(self.open.rw.allocated_blocks()) * BLOCK_BYTES
    }

    /// Commits and settles the image, setting its hidden flag if asked.
    ///
    /// # Errors
    /// As [`Self::commit`] and [`settle_files`].
    pub fn settle(&mut self, hidden: Option<bool>) -> Result<()> {
        self.commit()?;
        self.open.rw.drop_unwritten();
        let rw = &self.open.rw;
        let settled = Settled::new(rw.blocks(), rw.whole_blocks(), rw.data_end());
        settle_files(self.open.volume.as_ref(), &mut self.open.meta, &settled, hidden)
            .map_err(|e| e.of(&self.name))
    }
}
