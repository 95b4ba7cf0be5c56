//! Whether the parent is there, and is the one the header names.

use super::{Options, Problem, Report};
use crate::error::{Error, Result};
use crate::meta::Meta;
use crate::storage::{Access, VolumeName, Volumes};

pub(super) fn check(meta: &Meta, options: &Options<'_>, report: &mut Report) {
    let Some(parent) = &meta.parent else { return };
    let found = match options.parents {
        Some(volumes) if options.allow_parent_uuid => any(volumes, meta).map(drop),
        Some(volumes) => find(volumes, meta).map(drop),
        None => Ok(()),
    };
    if let Err(error) = found {
        let reason = match error {
            Error::ParentMismatch { .. } => "invalid parent uuid".to_owned(),
            other => other.to_string(),
        };
        report.add(Problem::Parent { name: parent.name.clone(), reason });
    }
}

/// The first of the locators' volumes that carries the uuid of the header.
pub(super) fn find(volumes: &dyn Volumes, meta: &Meta) -> Result<VolumeName> {
    let Some(parent) = &meta.parent else {
        return Err(Error::ParentMissing { name: String::new() });
    };
    let mut failure = Error::ParentMissing { name: parent.name.clone() };
    for name in parent.candidates()? {
        if name.is_raw() != parent.uuid.is_nil() {
            continue;
        }
        match uuid_of(volumes, &name) {
            Ok(uuid) if uuid == parent.uuid => return Ok(name),
            Ok(_) => failure = Error::ParentMismatch { name: name.to_string() },
            Err(error) if error.is_not_found() => {}
            Err(error) => failure = error,
        }
    }
    Err(failure)
}

/// The first of the locators' volumes that can be read.
fn any(volumes: &dyn Volumes, meta: &Meta) -> Result<VolumeName> {
    let Some(parent) = &meta.parent else {
        return Err(Error::ParentMissing { name: String::new() });
    };
    let missing = || Error::ParentMissing { name: parent.name.clone() };
    let mut candidates = parent.candidates()?.into_iter();
    candidates.find(|name| uuid_of(volumes, name).is_ok()).ok_or_else(missing)
}

fn uuid_of(volumes: &dyn Volumes, name: &VolumeName) -> Result<uuid::Uuid> {
    let volume = volumes.open(name, Access::Read)?;
    if name.is_raw() {
        return Ok(uuid::Uuid::nil());
    }
    Meta::read(volume.as_ref()).map(|meta| meta.uuid())
}
