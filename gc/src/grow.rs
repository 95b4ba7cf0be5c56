//! Making a parent as large as what goes into it.

use sm::image;
use tapdisk_control::ImageRef;
use vhd::meta::Meta;
use vhd::resize;
use vhd::storage::{Access, VolumeName};

use crate::job::{Job, Result, Stop};
use crate::survey;

impl Job<'_> {
    /// Grows the settled image `name` to `virtual_bytes`, if it is smaller.
    ///
    /// Its children see its tail as zeros before and after: what lies past
    /// its old end is no data of its own, and the planner saw to it that no
    /// ancestor is larger. So it is harmless if nothing comes of the merge.
    ///
    /// Where its table needs the room of blocks, these are copied to the end
    /// and named there first; then every reader drops the map that names the
    /// old places; only then are they written over (invariant 6). A crash
    /// between leaves a sound image with a gap that whoever carries on must not
    /// use before it told the readers too; so the record stays till then.
    pub(crate) fn grow(&self, image: &ImageRef, name: &VolumeName, virtual_bytes: u64) -> Result<()> {
        if image::meta(self.repo, name)?.virtual_bytes() >= virtual_bytes {
            return Ok(());
        }
        let volume = image::open(self.repo, name, Access::Write)?;
        let bad = |error| Stop::from(image::bad(name, error));
        let mut meta = Meta::read(volume.as_ref()).map_err(bad)?;
        if resize::needs_moving(&meta, virtual_bytes) {
            resize::make_room(volume.as_ref(), &mut meta, virtual_bytes).map_err(bad)?;
            self.tell_readers([image])?;
        }
        resize::grow(volume.as_ref(), &mut meta, virtual_bytes).map_err(bad)
    }

    /// Has every reader of some images drop the map it has. Whoever takes a
    /// lease from now on reads the new tables.
    ///
    /// # Errors
    /// [`Stop::Unfinished`] if one cannot be told.
    pub(crate) fn tell_readers<'i>(&self, images: impl IntoIterator<Item = &'i ImageRef>) -> Result<()> {
        let images: Vec<&ImageRef> = images.into_iter().collect();
        let unknown = |stop: Stop| Stop::Unfinished(format!("readers must drop the map they have: {stop}"));
        let readers = self.leases().map_err(unknown)?;
        let on = |r: &&sm::lease::Lease| {
            let mut chain = r.chain.iter();
            chain.any(|link| images.iter().any(|image| image.footer == link.footer))
        };
        for reader in readers.iter().filter(on) {
            let told = self.ask_to_refresh(reader);
            let why = match told {
                Ok(true) => continue,
                Ok(false) => "cannot be told to".to_owned(),
                Err(stop) => stop.to_string(),
            };
            return Err(Stop::Unfinished(format!("{} must drop the map it has: {why}", reader.vdi)));
        }
        Ok(())
    }

    fn leases(&self) -> Result<Vec<sm::lease::Lease>> {
        let _lock = self.lock()?;
        Ok(survey::leases(self.repo)?)
    }
}
