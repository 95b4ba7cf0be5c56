//! BAT, BATmap bits and bitmaps.

use super::{Options, Problem, Report, overlap};
use crate::bat::{BAT_FREE, Layout};
use crate::batmap::read_batmap;
use crate::bitmap::SectorBitmap;
use crate::error::Result;
use crate::meta::Meta;
use crate::storage::Volume;
use crate::units::{SECTOR_BYTES, SectorRun};

pub(super) fn check(
    volume: &dyn Volume,
    meta: &Meta,
    layout: &Layout,
    bat: &[u32],
    options: &Options<'_>,
    report: &mut Report,
) -> Result<()> {
    if !options.allow_overlaps
        && let Some((block, other)) = overlap(bat, layout)
    {
        let place = |block: u32| bat.get(block as usize).copied().unwrap_or(BAT_FREE);
        report.add(Problem::Overlap { block, sector: place(block), other, other_sector: place(other) });
    }
    let whole = read_batmap(volume, meta).unwrap_or_default();
    let is_whole =
        |block: u32| whole.get(block as usize / 8).is_some_and(|byte| byte & (0x80 >> (block % 8)) != 0);
    let all = SectorRun { first: 0, count: layout.block_sectors };
    for (block, &entry) in (0_u32..).zip(bat) {
        if report.is_full() {
            break;
        }
        if entry == BAT_FREE {
            if is_whole(block) {
                report.add(Problem::BatmapUnallocated { block });
            }
            continue;
        }
        let mut bytes = [0; 512];
        volume.read_at(&mut bytes, u64::from(entry) * SECTOR_BYTES)?;
        let mut bitmap = SectorBitmap::from_bytes(&bytes);
        if all.count < SectorRun::BLOCK.count {
            bitmap.clear(SectorRun { first: all.count, count: SectorRun::BLOCK.count - all.count });
        }
        report.blocks += 1;
        report.sectors += u64::from(bitmap.count());
        if is_whole(block) && !bitmap.has_all(all) {
            report.add(Problem::BatmapLies { block, missing: all.count - bitmap.count() });
        }
        if options.read_data
            && let Some(sector) = stray(volume, meta, layout, entry, &bitmap)?
        {
            report.add(Problem::StrayData { block, sector });
        }
    }
    Ok(())
}

/// The first sector with data that the bitmap does not show.
fn stray(
    volume: &dyn Volume,
    meta: &Meta,
    layout: &Layout,
    entry: u32,
    bitmap: &SectorBitmap,
) -> Result<Option<u32>> {
    let data = (u64::from(entry) + u64::from(layout.bitmap_sectors())) * SECTOR_BYTES;
    let inside = meta.file_len.saturating_sub(data) / SECTOR_BYTES;
    let count = layout.block_sectors.min(u32::try_from(inside).unwrap_or(u32::MAX));
    if count == 0 {
        return Ok(None);
    }
    let mut bytes = vec![0; count as usize * 512];
    volume.read_at(&mut bytes, data)?;
    let sectors = (0_u32..).zip(bytes.as_chunks::<512>().0);
    Ok(sectors
        .filter(|(sector, _)| !bitmap.get(*sector))
        .find(|(_, data)| data.iter().any(|b| *b != 0))
        .map(|(s, _)| s))
}
