//! A new, empty VDI.

use uuid::Uuid;
use vhd::storage::VolumeName;
use vhd::units::{BLOCK_BYTES, VIRTUAL_BYTES_MAX, round_up};

use crate::catalog::{Event, Label};
use crate::error::{Error, IoContext, Result};
use crate::image::{self, NewVhd};
use crate::repo::Repo;

/// Smallest disk: one block.
pub const VIRTUAL_BYTES_MIN: u64 = BLOCK_BYTES;

/// Creates a VDI of at least `virtual_bytes`, rounded up to whole blocks.
///
/// ```text
///   1. image under a temporary name, flushed   crash: swept by recovery, as
///                                              no intent names it
///   2. label                                   crash: one of nothing, which the
///                                              next scan drops
///   3. rename to <uuid>.vhd, names synced      crash: the VDI is there or not
/// ```
/// The SR lock is held throughout, and the image's lock through step 3, so
/// that nobody sweeps the temporary as a leftover.
///
/// # Errors
/// [`Error::BadSize`], [`Error::NoSpace`], I/O errors.
pub fn create(repo: &Repo, name: &str, virtual_bytes: u64) -> Result<Uuid> {
    super::check_label(name)?;
    let virtual_bytes = checked_size(virtual_bytes)?;
    let vdi = repo.ids.uuid();
    let temporary = VolumeName::temporary(repo.ids.uuid(), 0);
    let volume = VolumeName::vhd(vdi);
    let locked = super::lock(repo, &[])?;
    let new = NewVhd { volume: &temporary, footer: repo.ids.uuid(), virtual_bytes, parent: None };
    let created_s = repo.ids.now_s();
    let made = image::create(repo, &new).and_then(|opened| {
        // First: a VDI without its name would be nobody's.
        repo.labels.put(vdi, &Label { name: name.to_owned(), created_s, ..Label::default() })?;
        repo.volumes.rename(&temporary, &volume).during(|| format!("name {volume}"))?;
        drop(opened);
        repo.volumes.sync("create: name durable").during(|| format!("name {volume}"))
    });
    if let Err(error) = made {
        // Best effort: recovery sweeps what stays.
        let _ = repo.volumes.delete(&temporary);
        if matches!(image::footer_of(repo, &volume), Ok(None)) {
            let _ = repo.labels.remove(vdi);
        }
        return Err(error);
    }
    drop(locked);
    let detail = format!("{virtual_bytes} bytes");
    repo.labels.note(&Event { at_s: created_s, operation: "create", vdi, detail })?;
    Ok(vdi)
}

pub(super) fn checked_size(virtual_bytes: u64) -> Result<u64> {
    let rounded = round_up(virtual_bytes.max(1), BLOCK_BYTES);
    if virtual_bytes == 0 || rounded > VIRTUAL_BYTES_MAX {
        let reason =
            format!("{virtual_bytes} bytes; a disk has {VIRTUAL_BYTES_MIN} to {VIRTUAL_BYTES_MAX} bytes");
        return Err(Error::BadSize { reason });
    }
    Ok(rounded)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_rounded_up_to_blocks_and_bounded() {
        assert_eq!(checked_size(1).unwrap(), BLOCK_BYTES);
        assert_eq!(checked_size(BLOCK_BYTES + 1).unwrap(), 2 * BLOCK_BYTES);
        assert_eq!(checked_size(VIRTUAL_BYTES_MAX).unwrap(), VIRTUAL_BYTES_MAX);
        for bad in [0, VIRTUAL_BYTES_MAX + 1, u64::MAX] {
            assert_eq!(checked_size(bad).unwrap_err().code(), "BAD_SIZE");
        }
    }
}
