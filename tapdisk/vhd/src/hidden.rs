//! The hidden flag: a byte in the footers.

use crate::error::Result;
use crate::footer::DiskType;
use crate::meta::{FooterState, Meta};
use crate::storage::Volume;
use crate::units::SECTOR_BYTES;

/// Sets or clears the hidden flag in every footer, durably. Doing it again
/// changes nothing.
///
/// Each footer is one sector, so a crash leaves each with the old or the new
/// flag; where they differ the one at the end counts, and doing it again
/// mends the other. An image whose end is missing (unsettled) gets only its
/// copy at the front changed.
///
/// # Errors
/// What writing said.
pub fn set_hidden(volume: &dyn Volume, meta: &mut Meta, hidden: bool) -> Result<()> {
    if meta.footer.hidden == hidden && meta.footer_state == FooterState::Settled {
        return Ok(());
    }
    meta.footer.hidden = hidden;
    let footer = meta.footer.to_bytes();
    if meta.footer_state != FooterState::EndMissing {
        let len = volume.len()?;
        let at = len - SECTOR_BYTES.min(len);
        let short = len % SECTOR_BYTES == 511;
        volume.write_at(&footer, if short { len - 511 } else { at })?;
    }
    if meta.disk_type() != DiskType::Fixed {
        volume.write_at(&footer, 0)?;
    }
    volume.flush("hidden: both footers")?;
    if meta.footer_state != FooterState::EndMissing {
        meta.footer_state = FooterState::Settled;
    }
    Ok(())
}
