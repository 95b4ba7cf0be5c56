//! Making an image smaller, where nothing is lost.

use super::{blocks_of, drop_batmap, finish, front_footer, resizable};
use crate::bat::{BAT_FREE, Layout, read_bat};
use crate::bitmap::SectorBitmap;
use crate::create::checked_size;
use crate::error::{Error, Result};
use crate::footer::DiskType;
use crate::meta::Meta;
use crate::storage::Volume;
use crate::units::{SectorRun, Slot};

/// Sectors looked at together.
const SCAN_SECTORS: u32 = 256;

/// Shrinks a settled image without a parent, that the caller holds the lock
/// of, to a size that is rounded up to whole blocks. Blocks past the new end
/// must hold nothing but zeros.
///
/// Crash argument; every state reads the same within its size:
/// 1. The BATmap is zeroed, flush: no bit may outlive its block.
/// 2. Entries past the new end, whose blocks hold zeros, are made free,
///    flush. A crash: the image has its old size and reads as before.
/// 3. The footers: see [`crate::writer::settle_files`]. The file is cut at
///    a sector that was zeroed before.
///
/// # Errors
/// [`Error::BadSize`] when data would be lost, [`Error::Unsupported`], what
/// reading and writing said.
pub fn shrink(volume: &dyn Volume, meta: &mut Meta, new_virtual_bytes: u64) -> Result<()> {
    let new_bytes = checked_size(new_virtual_bytes)?;
    if new_bytes >= meta.virtual_bytes() {
        return Ok(());
    }
    let layout = resizable(meta)?.clone();
    if meta.disk_type() == DiskType::Differencing {
        // Its end would hide what the parent has there, and growing back
        // would show it again.
        return Err(Error::Unsupported { what: "shrinking an image that has a parent" });
    }
    let first = blocks_of(new_bytes);
    let bat = read_bat(volume, &layout)?;
    let mut past: Vec<(u32, Slot)> = Vec::new();
    for (block, &entry) in (0_u32..).zip(&bat).skip(first as usize) {
        if entry != BAT_FREE {
            if !is_zero(volume, &layout, Slot(entry))? {
                return Err(Error::BadSize { reason: "data past the new end would be lost" });
            }
            past.push((block, Slot(entry)));
        }
    }
    front_footer(volume, meta)?;
    if !past.is_empty() {
        drop_batmap(volume, meta)?;
        for (block, _) in past {
            volume.write_at(&BAT_FREE.to_be_bytes(), layout.table_offset + u64::from(block) * 4)?;
        }
        volume.flush("shrink: entries past the end before the footers")?;
    }
    finish(volume, meta, new_bytes)
}

/// Whether every sector a block has is zero.
fn is_zero(volume: &dyn Volume, layout: &Layout, slot: Slot) -> Result<bool> {
    debug_assert_eq!(layout.bitmap_sectors(), 1);
    let mut bytes = [0; 512];
    volume.read_at(&mut bytes, slot.bitmap_offset())?;
    let mut data = vec![0; SCAN_SECTORS as usize * 512];
    for run in SectorBitmap::from_bytes(&bytes).present() {
        let mut at = run.first;
        while at < run.end() {
            let part = SectorRun { first: at, count: (run.end() - at).min(SCAN_SECTORS) };
            let Some(buffer) = data.get_mut(..part.count as usize * 512) else {
                break;
            };
            volume.read_at(buffer, slot.data_offset(part.first))?;
            if buffer.iter().any(|byte| *byte != 0) {
                return Ok(false);
            }
            at += part.count;
        }
    }
    Ok(true)
}
