//! Making an image whole again: footers, length, BATmap.

use uuid::Uuid;

use crate::bat::{BAT_FREE, Layout, data_end, read_bat};
use crate::batmap::read_batmap;
use crate::bitmap::SectorBitmap;
use crate::check::overlap;
use crate::error::{Error, Result};
use crate::footer::DiskType;
use crate::meta::{FooterState, Meta};
use crate::storage::Volume;
use crate::units::{SECTOR_BYTES, SectorRun};
use crate::writer::{Settled, settle_files};

/// What a repair found wrong and put right.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Repaired {
    /// The footer at the end was missing, damaged, short, or not behind the
    /// last block.
    EndFooter,
    /// The copy of the footer at the front was damaged or differed.
    FrontFooter,
    /// The image had no uuid.
    Uuid,
    /// The BATmap was torn, or did not say what the bitmaps say.
    Batmap,
}

/// Rewrites both footers behind the last block and rebuilds the BATmap from
/// the bitmaps. The caller holds the image's lock; its pending record, if it
/// has one, was replayed. `fresh` becomes the image's uuid if it has none.
///
/// Crash argument; recovery is to repair again, and no step changes what the
/// image reads:
/// 1. The copy at the front is made sound, flush: the end is about to go.
/// 2. The sector behind the last block is zeroed, flush; the file can now be
///    cut there without showing a footer that a guest chose.
/// 3. BATmap, length and footers: see [`settle_files`].
///
/// # Errors
/// What makes the image unreadable, or what writing said. A poisoned image
/// needs its journal: see [`crate::resize::revert`].
pub fn repair(volume: &dyn Volume, fresh: Uuid) -> Result<Vec<Repaired>> {
    let mut meta = Meta::read(volume)?;
    let mut done = Vec::new();
    if meta.uuid().is_nil() {
        meta.footer.uuid = fresh;
        done.push(Repaired::Uuid);
    }
    if meta.disk_type() == DiskType::Fixed {
        return repair_fixed(volume, &meta, done);
    }
    let layout = meta.layout.clone().ok_or(Error::BadHeader { reason: "no header" })?;
    let bat = read_bat(volume, &layout)?;
    if let Some((block, other)) = overlap(&bat, &layout) {
        let sector = bat.get(other as usize).copied().unwrap_or(BAT_FREE);
        return Err(Error::BadBat { block: block.min(other), sector, reason: "it overlaps another block" });
    }
    let settled = Settled { batmap: rebuilt(volume, &layout, &bat)?, data_end: data_end(&bat, &layout) };
    if layout.batmap_bits.is_some() && !same_map(volume, &meta, &settled.batmap) {
        done.push(Repaired::Batmap);
    }
    let end = settled.data_end + SECTOR_BYTES;
    let end_bad =
        meta.footer_state == FooterState::EndMissing || (!volume.is_device() && volume.len()? != end);
    if end_bad {
        done.push(Repaired::EndFooter);
    }
    if matches!(meta.footer_state, FooterState::CopyBad | FooterState::CopyDiffers) {
        done.push(Repaired::FrontFooter);
    }
    if done.is_empty() {
        return Ok(done);
    }
    volume.write_at(&meta.footer.to_bytes(), 0)?;
    volume.flush("repair: the copy at the front before the end")?;
    if end_bad && !volume.is_device() {
        volume.zero(settled.data_end, SECTOR_BYTES)?;
        volume.flush("repair: a zero sector behind the last block before the file is cut there")?;
    }
    settle_files(volume, &mut meta, &settled, None)?;
    Ok(done)
}

fn repair_fixed(volume: &dyn Volume, meta: &Meta, mut done: Vec<Repaired>) -> Result<Vec<Repaired>> {
    let len = volume.len()?;
    let short = !len.is_multiple_of(SECTOR_BYTES);
    if short {
        done.push(Repaired::EndFooter);
    }
    if !done.is_empty() {
        let end = len.next_multiple_of(SECTOR_BYTES).saturating_sub(SECTOR_BYTES);
        volume.write_at(&meta.footer.to_bytes(), end)?;
        volume.flush("repair: the footer of a fixed image")?;
    }
    Ok(done)
}

/// The BATmap the bitmaps make. Reads a sector per allocated block.
fn rebuilt(volume: &dyn Volume, layout: &Layout, bat: &[u32]) -> Result<Vec<u8>> {
    let mut map = vec![0; bat.len().div_ceil(8)];
    let whole = SectorRun { first: 0, count: layout.block_sectors };
    for (block, &entry) in bat.iter().enumerate().filter(|(_, entry)| **entry != BAT_FREE) {
        let mut bytes = [0; 512];
        volume.read_at(&mut bytes, u64::from(entry) * SECTOR_BYTES)?;
        if SectorBitmap::from_bytes(&bytes).has_all(whole)
            && let Some(byte) = map.get_mut(block / 8)
        {
            *byte |= 0x80 >> (block % 8);
        }
    }
    Ok(map)
}

/// Whether the file's BATmap is sound and claims nothing the bitmaps deny.
/// Clear bits are always safe.
fn same_map(volume: &dyn Volume, meta: &Meta, rebuilt: &[u8]) -> bool {
    read_batmap(volume, meta).is_some_and(|map| {
        map.iter().enumerate().all(|(i, byte)| byte & !rebuilt.get(i).copied().unwrap_or(0) == 0)
    })
}
