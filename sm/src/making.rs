//! A new VDI that takes long to fill, as a copy or an import does.
//!
//! ```text
//!  [SR lock]  1  record, durable
//!             2  an empty image under a temporary name, flushed
//!  [no lock]  3  whoever makes it fills it; then it is settled
//!  [SR lock]  4  renamed to its name, names synced
//!             5  label, record cleared
//! ```
//!
//! Crash argument. Up to 4 no scan shows anything: recovery deletes the
//! temporary and clears the record (a deleted name that a power cut brings
//! back has no record, and is swept). The rename is the instant; what it
//! names is durable since 3. After it recovery finds the name leading to the
//! image and does 5 again.

use std::fmt;
use std::sync::Arc;

use uuid::Uuid;
use vhd::storage::{Volume, VolumeName};
use vhd::writer::Writer;

use crate::catalog::{Event, Label};
use crate::error::{Error, IoContext, Result};
use crate::host::Guard;
use crate::image::{self, NewVhd};
use crate::journal::{self, ImageRef, Intent, MakeIntent, RecordName, RecordState, volume_of};
use crate::ops::{self, Filled};
use crate::repo::Repo;

/// What a new VDI shall be called, and how it comes about.
#[derive(Debug, Clone)]
pub struct NewVdi<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its description.
    pub description: &'a str,
    /// Its size in bytes, of whole blocks.
    pub virtual_bytes: u64,
    /// What makes it, like `copy`.
    pub operation: &'static str,
}

/// A VDI being filled. Dropped before [`Making::finish`], nothing of it
/// stays; if that fails, recovery sees to it.
pub struct Making<'a> {
    repo: &'a Repo,
    intent: MakeIntent,
    /// `None` once finished or taken back.
    held: Option<Guard>,
}

impl fmt::Debug for Making<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Making").field("intent", &self.intent).finish_non_exhaustive()
    }
}

impl<'a> Making<'a> {
    /// Steps 1 and 2.
    ///
    /// # Errors
    /// [`Error::BadRequest`] for a name no table could show,
    /// [`Error::NoSpace`], I/O errors.
    pub fn begin(repo: &'a Repo, new: &NewVdi<'_>) -> Result<Self> {
        let virtual_bytes = new.virtual_bytes;
        let image = |volume: &VolumeName, footer| {
            image::create(repo, &NewVhd { volume, footer, virtual_bytes, parent: None })
        };
        Ok(Self::begin_with(repo, new, image)?.0)
    }

    /// As [`Self::begin`], but the volume is empty, and whoever makes it writes
    /// all of it: for what has no size yet. The volume is locked while it is
    /// open.
    ///
    /// # Errors
    /// As [`Self::begin`].
    pub fn begin_unmade(repo: &'a Repo, new: &NewVdi<'_>) -> Result<(Self, Arc<dyn Volume>)> {
        Self::begin_with(repo, new, |volume, _| {
            repo.volumes.create(volume).during(|| format!("create {volume}"))
        })
    }

    fn begin_with(
        repo: &'a Repo,
        new: &NewVdi<'_>,
        create: impl FnOnce(&VolumeName, Uuid) -> Result<Arc<dyn Volume>>,
    ) -> Result<(Self, Arc<dyn Volume>)> {
        ops::check_label(new.name)?;
        ops::check_label(new.description)?;
        let id = repo.ids.uuid();
        let volume = VolumeName::temporary(id, 0);
        let image = ImageRef { volume: volume.as_str().to_owned(), footer: repo.ids.uuid() };
        let intent = MakeIntent {
            id,
            vdi: repo.ids.uuid(),
            image,
            name: new.name.to_owned(),
            description: new.description.to_owned(),
            operation: new.operation.to_owned(),
        };
        let held = repo.host.hold_intent(id).during(|| format!("hold intent {id}"))?;
        let held = held.ok_or_else(|| Error::Busy { reason: format!("intent {id} is taken") })?;
        let making = Self { repo, intent, held: Some(held) };
        let _locked = ops::lock(repo, &[])?;
        journal::put(repo.volumes.as_ref(), &Intent::Make(making.intent.clone()), "make: record")?;
        // On an error the lock goes before the making, which takes it again.
        let created = create(&volume, making.footer())?;
        Ok((making, created))
    }

    /// The image's footer uuid.
    #[must_use]
    pub fn footer(&self) -> Uuid {
        self.intent.image.footer
    }

    /// The image's temporary name.
    ///
    /// # Errors
    /// Never, as we gave it.
    pub fn volume(&self) -> Result<VolumeName> {
        volume_of(&self.intent.image)
    }

    /// The image, for a clone that takes it over.
    pub(crate) fn filled(&self) -> Result<Filled> {
        Ok(Filled {
            volume: self.volume()?,
            footer: self.footer(),
            vdi: self.intent.vdi,
            name: self.intent.name.clone(),
        })
    }

    /// The image, open for writing: step 3.
    ///
    /// # Errors
    /// What opening it said.
    pub fn writer(&self) -> Result<Writer> {
        let volume = volume_of(&self.intent.image)?;
        Writer::open(self.repo.volumes.as_ref(), &volume, self.repo.host.records())
            .map_err(|e| image::bad(&volume, e))
    }

    /// Steps 4 and 5, after the image was settled and its writer dropped.
    /// Returns the VDI.
    ///
    /// # Errors
    /// I/O errors. If the VDI has its name already it stays.
    pub fn finish(self) -> Result<Uuid> {
        self.finish_with(|_| Ok(()))
    }

    /// As [`Self::finish`]; `last` is called with the image under the SR lock
    /// before it gets its name.
    ///
    /// # Errors
    /// As [`Self::finish`], and what `last` says.
    pub fn finish_with(mut self, last: impl FnOnce(&VolumeName) -> Result<()>) -> Result<Uuid> {
        // On an error dropped before the making, which takes it again.
        let _sr = self.repo.host.lock_sr().during(|| format!("lock of SR {}", self.repo.name))?;
        last(&self.volume()?)?;
        let (temporary, volume) = (volume_of(&self.intent.image)?, VolumeName::vhd(self.intent.vdi));
        self.repo.volumes.rename(&temporary, &volume).during(|| format!("name {volume}"))?;
        recover(self.repo, &self.intent)?;
        self.held = None;
        Ok(self.intent.vdi)
    }

    /// Step 5 alone, after a clone has given the image its name.
    ///
    /// # Errors
    /// I/O errors. The VDI stays.
    pub fn finish_named(mut self) -> Result<Uuid> {
        let _sr = self.repo.host.lock_sr().during(|| format!("lock of SR {}", self.repo.name))?;
        recover(self.repo, &self.intent)?;
        self.held = None;
        Ok(self.intent.vdi)
    }
}

impl Drop for Making<'_> {
    fn drop(&mut self) {
        if self.held.is_none() {
            return;
        }
        let taken_back = self.repo.host.lock_sr().during(|| "lock of the SR".into());
        // Best effort: recovery does the same, once nobody holds the intent.
        if let Err(error) = taken_back.and_then(|_sr| recover(self.repo, &self.intent)) {
            tracing::warn!(sr = %self.repo.uuid, job = %self.intent.id, %error, "recovery takes it back");
        }
    }
}

/// Ends a making, one way or the other: see the module. The caller holds the
/// SR lock and the intent.
///
/// # Errors
/// I/O errors; the record then stays.
pub(crate) fn recover(repo: &Repo, intent: &MakeIntent) -> Result<()> {
    let volume = VolumeName::vhd(intent.vdi);
    if image::footer_of(repo, &volume)? == Some(intent.image.footer) {
        repo.volumes.sync("make: name before the record goes").during(|| format!("name {volume}"))?;
        label(repo, intent)?;
    } else {
        let temporary = volume_of(&intent.image)?;
        repo.volumes.delete(&temporary).during(|| format!("take back {temporary}"))?;
        repo.host
            .records()
            .remove(intent.image.footer)
            .during(|| format!("pending record of {temporary}"))?;
    }
    let name = RecordName { id: intent.id, state: RecordState::Job };
    journal::remove(repo.volumes.as_ref(), name, "make: record cleared")
}

fn label(repo: &Repo, intent: &MakeIntent) -> Result<()> {
    let at_s = repo.ids.now_s();
    let label = Label {
        name: intent.name.clone(),
        description: intent.description.clone(),
        created_s: at_s,
        ..Label::default()
    };
    repo.labels.put(intent.vdi, &label)?;
    let detail = intent.operation.clone();
    repo.labels.note(&Event { at_s, operation: "make", vdi: intent.vdi, detail })
}
