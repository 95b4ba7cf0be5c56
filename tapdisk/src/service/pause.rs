//! A pause is a lease on the connection that asked for it, and names an intent
//! record: when it ends by itself, the record's state decides what happens.

use tapdisk_control::{ImageRef, IntentNames, Refusal, Reply};

use super::answers::{answer, volume_name};
use super::{Child, Connection, Doing, JobResult, Service, Step};
use crate::engine::{Command, NewLeaf};

impl Service {
    pub(super) fn prepare(
        &mut self,
        caller: (Connection, u64),
        intent: IntentNames,
        leaf: &ImageRef,
        child: Option<ImageRef>,
        base: Option<&str>,
    ) -> Result<Vec<Step>, Refusal> {
        let bytes = self.leaf_checked(leaf)?.1.virtual_bytes();
        self.drop_prepared();
        let Some(child) = child else {
            self.prepared = Some((intent, caller.0, None));
            return Ok(vec![answer(caller, Ok(Reply::Done))]);
        };
        let name = volume_name(&child.volume)?;
        let aside = volume_name(base.unwrap_or(&child.volume))?;
        let opener = self.opener.clone();
        let job = move || match opener.image(&name) {
            Err(error) => JobResult::Failed(error.to_string()),
            Ok(open) if open.meta.uuid() != child.footer => JobResult::Failed(format!(
                "{name} has footer uuid {}, not {}",
                open.meta.uuid(),
                child.footer
            )),
            Ok(open) if open.meta.virtual_bytes() != bytes || open.image.rw.allocated_blocks() != 0 => {
                JobResult::Failed(format!("{name} is not an empty image of {bytes} bytes"))
            }
            Ok(open) => JobResult::Child(Box::new(Child { open, aside })),
        };
        Ok(self.job(caller, Doing::Preparing(intent), job))
    }

    pub(super) fn resume(
        &mut self,
        caller: (Connection, u64),
        intent: &IntentNames,
        swap: bool,
    ) -> Result<Vec<Step>, Refusal> {
        match &self.lease {
            Some(lease) if lease.intent == *intent => {}
            _ => return Err(Refusal::Voided),
        }
        Ok(self.end_pause(Some(caller), swap))
    }

    /// Ends a pause one way or the other.
    pub(super) fn end_pause(&mut self, caller: Option<(Connection, u64)>, swap: bool) -> Vec<Step> {
        self.lease = None;
        let leaf_name = self.leaf.as_ref().map(|(name, _)| name.clone());
        let child = self.prepared.take().and_then(|(_, _, child)| child);
        let (swapped, command) = match (swap, child, leaf_name) {
            (true, Some(child), Some(name)) => {
                let Child { open, aside } = *child;
                let leaf = Box::new(NewLeaf { image: open.image, name, aside });
                (Some(Box::new(open.meta)), Command::Resume { swap: Some(leaf) })
            }
            (_, child, _) => {
                if let Some(child) = child {
                    self.opener.files.close(child.open.image.file);
                }
                (None, Command::Resume { swap: None })
            }
        };
        self.start(caller, Doing::Resuming { swapped }, command)
    }

    /// Whoever paused is gone or late. The intent is renamed from pending to
    /// void; if that finds it decided already, the swap is completed. Only
    /// one of the two renames can win, so both sides agree.
    pub(super) fn lease_ends(&mut self) -> Vec<Step> {
        if !self.operations.is_empty() {
            return Vec::new();
        }
        let Some(lease) = &self.lease else { return Vec::new() };
        let (volumes, intent) = (self.opener.volumes.clone(), lease.intent.clone());
        let job = move || {
            let decided = match volumes.rename_record(&intent.pending, &intent.void) {
                Ok(true) => false,
                // Not pending any more, or unreadable: decided only if it says so.
                Ok(false) | Err(_) => matches!(volumes.record(&intent.decided), Ok(Some(_))),
            };
            JobResult::Decided { swap: decided }
        };
        self.start_job(None, Doing::Deciding, job)
    }

    pub(super) fn drop_prepared(&mut self) {
        if let Some((_, _, Some(child))) = self.prepared.take() {
            self.opener.files.close(child.open.image.file);
        }
    }
}
