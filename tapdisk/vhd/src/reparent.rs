//! Giving a differencing image another parent.

use uuid::Uuid;

use crate::error::{Error, Result};
use crate::footer::DiskType;
use crate::header::DynHeader;
use crate::locator::{Code, LocatorEntry, encode, volume_of};
use crate::meta::{Meta, ParentRef};
use crate::storage::{Volume, VolumeName};

/// The parent an image is linked to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParentLink {
    /// Its footer uuid; nil: it is raw.
    pub uuid: Uuid,
    /// Its volume, in the same repository.
    pub volume: VolumeName,
    /// Its modification time, seconds since 2000. Never enforced.
    pub timestamp_s: u32,
}

/// Changes the parent, durably and so that a crash at any write leaves an
/// image that names the old parent or the new one:
///
/// 0. Where an earlier change was cut off before its step 3, that is done
///    first: else step 1 would overwrite the only locators that lead to the
///    parent the header names.
/// 1. Every locator but the first is given the new text; flush. A crash: the
///    header names the old uuid, and the first locator leads there. (A reader
///    takes the first locator whose image carries the header's uuid.)
/// 2. The header's first sector, which holds uuid, name, time and checksum,
///    is written; one sector, so whole or not at all; flush. A crash: the
///    header names the new uuid; the first locator's image does not carry it,
///    the second's does.
/// 3. The first locator is given the new text; flush.
///
/// For this the header's second sector, with the locators' lengths, must not
/// change: a shorter path is padded (`././name`), and a longer one is refused
/// here. Between volumes called `<uuid>.vhd` the length never changes.
///
/// # Errors
/// [`Error::Unsupported`] for a path that does not fit, or what writing said.
pub fn set_parent(volume: &dyn Volume, meta: &mut Meta, parent: &ParentLink) -> Result<()> {
    let Some(header) = meta.header.as_ref().filter(|_| meta.disk_type() == DiskType::Differencing) else {
        return Err(Error::Unsupported { what: "a parent for an image that is not differencing" });
    };
    let already = header.parent_uuid == parent.uuid
        && meta
            .parent
            .as_ref()
            .is_some_and(|own| own.candidates().is_ok_and(|names| names == [parent.volume.clone()]));
    if already {
        return Ok(());
    }
    let mut new = header.clone();
    new.parent_uuid = parent.uuid;
    new.parent_timestamp = parent.timestamp_s;
    parent.volume.as_str().clone_into(&mut new.parent_name);
    let (old_bytes, new_bytes) = (header.to_bytes()?, new.to_bytes()?);
    if old_bytes[512..] != new_bytes[512..] {
        return Err(Error::Unsupported {
            what: "a parent whose name takes more than the header's first sector",
        });
    }
    let used = |locator: &&LocatorEntry| !matches!(locator.code, Code::Other(_)) && locator.len > 0;
    let texts = header
        .locators
        .iter()
        .filter(used)
        .map(|locator| Ok((*locator, fitted(locator, parent.volume.as_str())?)));
    let texts: Vec<(LocatorEntry, Vec<u8>)> = texts.collect::<Result<_>>()?;
    let Some((first, rest)) = texts.split_first().filter(|(_, rest)| !rest.is_empty()) else {
        return Err(Error::Unsupported { what: "changing the parent of an image with a single locator" });
    };
    finish_earlier(volume, header, &first.0, rest)?;
    for (locator, text) in rest {
        volume.write_at(text, locator.offset)?;
    }
    volume.flush("reparent: further locators before the header")?;
    volume.write_at(&new_bytes[..512], meta.footer.data_offset)?;
    volume.flush("reparent: the header before the first locator")?;
    volume.write_at(&first.1, first.0.offset)?;
    volume.flush("reparent: the first locator")?;
    let path = format!("./{}", parent.volume);
    meta.parent =
        Some(ParentRef { uuid: parent.uuid, name: new.parent_name.clone(), paths: vec![path; texts.len()] });
    meta.header = Some(new);
    Ok(())
}

/// Step 0 of [`set_parent`]: the first locator is led to the parent the
/// header names, if only others lead there.
fn finish_earlier(
    volume: &dyn Volume,
    header: &DynHeader,
    first: &LocatorEntry,
    rest: &[(LocatorEntry, Vec<u8>)],
) -> Result<()> {
    let leads = |locator: &LocatorEntry| {
        let path = locator.read(volume).ok().flatten();
        path.and_then(|path| volume_of(&path).ok()).is_some_and(|name| name.as_str() == header.parent_name)
    };
    if leads(first) || !rest.iter().any(|(locator, _)| leads(locator)) {
        return Ok(());
    }
    volume.write_at(&fitted(first, &header.parent_name)?, first.offset)?;
    volume.flush("reparent: the first locator of an earlier change")?;
    Ok(())
}

/// The locator's text for a parent, padded to just the length it has.
fn fitted(locator: &LocatorEntry, name: &str) -> Result<Vec<u8>> {
    let mut path = format!("./{name}");
    loop {
        let text = encode(locator.code, &path);
        match (text.len(), locator.len as usize) {
            (have, want) if have == want => return Ok(text),
            (have, want) if have < want => path.insert(1, '/'),
            _ => {
                return Err(Error::Unsupported {
                    what: "a parent whose path is longer than the locators' room",
                });
            }
        }
    }
}
