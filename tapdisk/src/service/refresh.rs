//! Refresh: the chain below the leaf is read anew while requests go on.

use tapdisk_control::{ImageRef, Refusal, Reply};
use vhd::reparent::{ParentLink, set_parent};

use super::answers::{more, stale, volume_name};
use super::{Connection, Doing, JobResult, Service, Step};
use crate::engine::Engine;

impl Service {
    /// The header first, then the chain is read anew while requests go on.
    /// The leaf's header and locator sectors are written by nobody else.
    pub(super) fn refresh(
        &mut self,
        engine: &Engine,
        caller: (Connection, u64),
        leaf: &ImageRef,
        parent: Option<ImageRef>,
    ) -> Result<Vec<Step>, Refusal> {
        if self.leaf.is_none() {
            return self.refresh_read_only(engine, caller, leaf, parent);
        }
        let meta = self.leaf_checked(leaf)?.1.clone();
        self.known = engine.lower().known();
        let Some(parent) = parent else {
            let mut steps = vec![more(caller, Reply::HeaderDurable)];
            steps.extend(self.reread(Some(caller)));
            return Ok(steps);
        };
        let link = ParentLink { uuid: parent.footer, volume: volume_name(&parent.volume)?, timestamp_s: 0 };
        let volume = engine.stack().first().and_then(|image| self.opener.files.get(image.file));
        let volume = volume.ok_or_else(|| stale("the leaf is not open for writing"))?;
        let job = move || {
            let mut meta = meta;
            match set_parent(volume.as_ref(), &mut meta, &link) {
                Ok(()) => JobResult::Reparented(Box::new(meta)),
                Err(error) => JobResult::Failed(error.to_string()),
            }
        };
        Ok(self.job(caller, Doing::Reparenting, job))
    }

    /// A disk that is only read: the whole chain is read anew. Its leaf's
    /// header is not ours to write.
    pub(super) fn refresh_read_only(
        &mut self,
        engine: &Engine,
        caller: (Connection, u64),
        leaf: &ImageRef,
        parent: Option<ImageRef>,
    ) -> Result<Vec<Step>, Refusal> {
        if parent.is_some() {
            return Err(stale("this disk is attached read-only"));
        }
        let top = volume_name(&leaf.volume)?;
        if engine.images().first().is_none_or(|(name, footer)| *name != top || *footer != leaf.footer) {
            return Err(stale("that image is not the top of the chain"));
        }
        let (opener, known) = (self.opener.clone(), engine.lower().known());
        let job = move || match opener.whole(&top, known) {
            Ok((_, lower)) => JobResult::Below(Box::new(lower)),
            Err(error) => JobResult::Failed(error.to_string()),
        };
        let mut steps = vec![more(caller, Reply::HeaderDurable)];
        steps.extend(self.start_job(Some(caller), Doing::Rereading, job));
        Ok(steps)
    }

    pub(super) fn reread(&mut self, caller: Option<(Connection, u64)>) -> Vec<Step> {
        let Some((name, meta)) = self.leaf.clone() else { return Vec::new() };
        let (opener, known) = (self.opener.clone(), std::mem::take(&mut self.known));
        let job = move || match opener.below(&name, &meta, known) {
            Ok(lower) => JobResult::Below(Box::new(lower)),
            Err(error) => JobResult::Failed(error.to_string()),
        };
        self.start_job(caller, Doing::Rereading, job)
    }
}
