//! New words for a VDI. Labels only: no image is touched.

use uuid::Uuid;

use crate::catalog::{Event, Label};
use crate::error::Result;
use crate::repo::Repo;

/// Sets the name, the description, or both.
///
/// # Errors
/// [`crate::Error::NotFound`], [`crate::Error::BadRequest`] for words no
/// table could show, catalog errors.
pub fn rename(repo: &Repo, vdi: Uuid, name: Option<&str>, description: Option<&str>) -> Result<()> {
    let leaf = super::visible_chain(repo, vdi)?.swap_remove(0);
    let mut label =
        repo.labels.get(vdi)?.unwrap_or(Label { created_s: leaf.head.created_s, ..Label::default() });
    if let Some(name) = name {
        super::check_label(name)?;
        name.clone_into(&mut label.name);
    }
    if let Some(description) = description {
        super::check_label(description)?;
        description.clone_into(&mut label.description);
    }
    repo.labels.put(vdi, &label)?;
    let detail = label.name;
    repo.labels.note(&Event { at_s: repo.ids.now_s(), operation: "rename", vdi, detail })
}
