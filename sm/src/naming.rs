//! A prepared image takes the name of another, which lives on under a third.
//!
//! What it takes is the backend's business ([`vhd::storage::Volumes::swap`]):
//! one rename over a second name made before, or two renames. The record of
//! the operation stands before the first of them, so what a crash leaves is
//! told by the names and the footers alone:
//!
//! ```text
//!   `over` leads to     found      one step   two steps   then
//!   the former image    Before     yes        yes         swap, or take back
//!   nothing             Between    never      yes         swap: goes on
//!   the new image       Done       yes        yes         nothing
//! ```
//!
//! A swap that has begun is never taken back: all it needs was durable before.

use std::sync::Arc;

use uuid::Uuid;
use vhd::storage::{Access, Volume, VolumeName};

use crate::error::{Error, IoContext, Result};
use crate::image;
use crate::repo::Repo;

/// How far a swap is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// Nothing has happened.
    Before,
    /// The former image has its other name, the new one still has its own.
    Between,
    /// It happened.
    Done,
}

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NameSwap {
    /// The new image's name before.
    pub new: VolumeName,
    /// Its footer uuid.
    pub footer: Uuid,
    /// The name it takes.
    pub over: VolumeName,
    /// What the former image is called afterwards.
    pub aside: VolumeName,
}

impl NameSwap {
    /// How far it is.
    ///
    /// # Errors
    /// The image that has the name cannot be read.
    pub fn found(&self, repo: &Repo) -> Result<Found> {
        Ok(match image::footer_of(repo, &self.over)? {
            None => Found::Between,
            Some(footer) if footer == self.footer => Found::Done,
            Some(_) => Found::Before,
        })
    }

    /// Makes the former image's other name, where it can have two; to be
    /// synced.
    ///
    /// # Errors
    /// I/O errors.
    pub fn prepare(&self, repo: &Repo) -> Result<()> {
        let what = || format!("second name of {}", self.over);
        repo.volumes.lay_aside(&self.over, &self.aside).during(what)
    }

    /// The lock of the former image, whatever it is called now.
    ///
    /// # Errors
    /// [`Error::Busy`] when somebody holds it, I/O errors.
    pub fn lock_former(&self, repo: &Repo) -> Result<Arc<dyn Volume>> {
        let name = if self.found(repo)? == Found::Between { &self.aside } else { &self.over };
        image::open(repo, name, Access::Write)
    }

    /// Does it, or the rest of it; to be synced.
    ///
    /// # Errors
    /// I/O errors; calling this again goes on.
    pub fn carry_out(&self, repo: &Repo) -> Result<()> {
        if self.found(repo)? == Found::Done {
            return Ok(());
        }
        let what = || format!("name {}", self.over);
        repo.volumes.swap(&self.new, &self.over, &self.aside).during(what)
    }

    /// Removes what was prepared of a swap that has not begun; to be synced.
    /// The other name goes only while it is a second name of the former image:
    /// anything else there is not ours to remove.
    ///
    /// # Errors
    /// [`Error::BadImage`] when something else has the other name, I/O errors.
    pub fn take_back(&self, repo: &Repo) -> Result<()> {
        let gone = |volume: &VolumeName| repo.volumes.delete(volume).during(|| format!("take back {volume}"));
        gone(&self.new)?;
        let what = || format!("take back {}", self.aside);
        if repo.volumes.same(&self.aside, &self.over).during(what)? {
            return gone(&self.aside);
        }
        if image::footer_of(repo, &self.aside)?.is_some() {
            let reason = "an operation that is taken back finds it no second name".into();
            return Err(Error::BadImage { volume: self.aside.clone(), reason });
        }
        Ok(())
    }

    /// Deletes a former image that nobody needs, if it is still there.
    ///
    /// # Errors
    /// I/O errors.
    pub fn drop_aside(&self, repo: &Repo) -> Result<()> {
        let what = || format!("delete {}", self.aside);
        if repo.volumes.same(&self.aside, &self.aside).during(what)? {
            repo.volumes.delete(&self.aside).during(what)?;
        }
        Ok(())
    }
}
