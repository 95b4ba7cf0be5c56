//! What names the exact content of a VDI, for deltas that leave one
//! repository and enter another.
//!
//! A delta applies to one content and no other. Footer uuids do not name
//! contents: a leaf keeps its uuid while it is written, a hidden node while
//! others merge into it, and a leaf merge gives a snapshot another image. So
//! an exported stream carries a *content id* where a VHD has its footer uuid:
//!
//! ```text
//!   snapshot        its VDI's uuid: its content never changes
//!   any other VDI   an id made when it is first exported or imported, kept in
//!                   the catalog, and forgotten before the VDI can change:
//!                   attached for writing, resized, reverted
//!   hidden node     none; a delta over one names its footer, and applies to
//!                   that very node
//! ```
//!
//! A snapshot or clone inherits the id of what it was made of. Losing the
//! catalog loses ids: a delta is then refused, never applied to the wrong
//! content.

use uuid::Uuid;

use crate::error::Result;
use crate::repo::Repo;

/// The content id of a visible VDI, if it has one.
///
/// # Errors
/// The catalog cannot be read.
pub fn of(repo: &Repo, vdi: Uuid) -> Result<Option<Uuid>> {
    if let Some(id) = repo.labels.content_id(vdi)? {
        return Ok(Some(id));
    }
    let snapshot = repo.labels.get(vdi)?.is_some_and(|label| label.read_only && label.snapshot_of.is_some());
    Ok(snapshot.then_some(vdi))
}

/// The content id of a visible VDI, a new one if need be. The caller holds a
/// lease that keeps the VDI from changing.
///
/// # Errors
/// The catalog cannot be read or written.
pub fn of_or_new(repo: &Repo, vdi: Uuid) -> Result<Uuid> {
    if let Some(id) = of(repo, vdi)? {
        return Ok(id);
    }
    let id = repo.ids.uuid();
    repo.labels.set_content_id(vdi, Some(id))?;
    Ok(id)
}

/// The VDI may change from here on. The caller holds the SR lock and has seen
/// that nobody exports it.
///
/// # Errors
/// The catalog cannot be written; then nothing may change.
pub fn forget(repo: &Repo, vdi: Uuid) -> Result<()> {
    match repo.labels.content_id(vdi)? {
        Some(_) => repo.labels.set_content_id(vdi, None),
        None => Ok(()),
    }
}

/// `new` holds what `of` holds.
///
/// # Errors
/// The catalog cannot be read or written.
pub fn inherit(repo: &Repo, from: Uuid, new: Uuid) -> Result<()> {
    match of(repo, from)? {
        Some(id) => repo.labels.set_content_id(new, Some(id)),
        None => Ok(()),
    }
}
