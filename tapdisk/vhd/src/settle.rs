//! What makes an image settled, and where it ends.

use crate::batmap::write_batmap;
use crate::error::Result;
use crate::footer::Footer;
use crate::meta::{FooterState, Meta};
use crate::storage::Volume;
use crate::units::{BlockNo, SECTOR_BYTES};

/// What settling an image needs to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settled {
    /// BATmap: bit 0x80 of byte 0 is block 0.
    pub batmap: Vec<u8>,
    /// One past the last byte of data: the footer goes there.
    pub data_end: u64,
}

impl Settled {
    /// From the blocks that are whole.
    #[must_use]
    pub fn new(blocks: u32, whole: impl IntoIterator<Item = BlockNo>, data_end: u64) -> Self {
        let mut batmap = vec![0; (blocks as usize).div_ceil(8)];
        for block in whole {
            if let Some(byte) = batmap.get_mut(block.index() / 8) {
                *byte |= 0x80 >> (block.0 % 8);
            }
        }
        Self { batmap, data_end }
    }
}

/// Writes what makes an image settled: BATmap, length, both footers. Its
/// data, bitmaps and BAT must be durable, its record empty. With `hidden`
/// the flag is set to that.
///
/// A crash anywhere leaves an image that opens: a torn BATmap is ignored and
/// rebuilt, and until the footer at the end is whole the copy at the front
/// serves. The sector at `data_end` is the guard no slot takes, so at no
/// length does the guest choose the last sector; what else may lie there, see
/// [`cover`]. A device is made shorter last:
/// until that one change its end has what it had, be it zeros or the footer of
/// before, and after it the new footer, which is durable by then.
///
/// # Errors
/// What writing said.
pub fn settle_files(
    volume: &dyn Volume,
    meta: &mut Meta,
    settled: &Settled,
    hidden: Option<bool>,
) -> Result<()> {
    write_batmap(volume, meta, &settled.batmap)?;
    if let Some(hidden) = hidden {
        meta.footer.hidden = hidden;
    }
    let footer = meta.footer.to_bytes();
    let end = footer_place(volume, settled.data_end)?;
    if !volume.is_device() {
        cover(volume, &footer, end)?;
        volume.set_len(end + SECTOR_BYTES)?;
    }
    volume.write_at(&footer, end)?;
    volume.write_at(&footer, 0)?;
    volume.flush("settle: BATmap and footers")?;
    give_back(volume, end)?;
    meta.footer_state = FooterState::Settled;
    Ok(())
}

/// Where a file is to be cut, an image that grew may have left its footer of
/// before, with the size and the flags of then. A crash between the cut and the
/// new footer would bring it back: so the new one is durable there first. Until
/// the file is cut, nobody looks there.
fn cover(volume: &dyn Volume, footer: &[u8; 512], end: u64) -> Result<()> {
    if volume.len()? <= end + SECTOR_BYTES {
        return Ok(());
    }
    let mut there = [0; 512];
    volume.read_at(&mut there, end)?;
    if there != *footer && Footer::parse(&there).is_ok() {
        volume.write_at(footer, end)?;
        volume.flush("settle: the footer before the file ends with it")?;
    }
    Ok(())
}

/// Where the footer goes in a volume that is to end behind `data_end`, a
/// device being given the space that it lacks. Afterwards see [`give_back`].
pub(crate) fn footer_place(volume: &dyn Volume, data_end: u64) -> Result<u64> {
    if !volume.is_device() {
        return Ok(data_end);
    }
    volume.extend(data_end + SECTOR_BYTES)?;
    Ok(volume.reduced_len(data_end + SECTOR_BYTES)? - SECTOR_BYTES)
}

/// Takes from a device what lies past its footer, once that is durable. A
/// file was cut before.
pub(crate) fn give_back(volume: &dyn Volume, footer_at: u64) -> Result<()> {
    if volume.is_device() {
        volume.reduce(footer_at + SECTOR_BYTES)?;
    }
    Ok(())
}
