//! What an operation does next when its command or its job has ended.

use tapdisk_control::Reply;
use vhd::meta::Meta;

use super::answers::{answer, more, refusal, said};
use super::{AfterFold, Connection, Doing, JobResult, Lease, Operation, Service, Step, places};
use crate::engine::{Command, CommandError, CommandReply, SettlePlan, Token};

impl Service {
    /// The engine answered a command.
    pub fn answered(
        &mut self,
        token: Token,
        reply: Result<CommandReply, CommandError>,
        now_us: u64,
    ) -> Vec<Step> {
        if let Some(caller) = self.lookups.remove(&token) {
            return vec![places::found(caller, reply)];
        }
        let Some(Operation { doing, caller }) = self.operations.remove(&token) else { return Vec::new() };
        let reply = match reply {
            Ok(reply) => reply,
            // It goes on being tried; only the caller need not wait for that.
            Err(CommandError::Failed(detail)) if matches!(doing, Doing::Resuming { swapped: Some(_) }) => {
                self.operations.insert(token, Operation { doing, caller: None });
                return self.fail(caller, &detail);
            }
            Err(error) => return self.command_failed(doing, caller, &error),
        };
        match (doing, reply) {
            (Doing::Pausing { intent, limit_us }, CommandReply::Paused { leaf_is_empty }) => {
                let holder = caller.map_or(Connection(0), |(connection, _)| connection);
                self.lease = Some(Lease { intent, holder, deadline_us: now_us.saturating_add(limit_us) });
                said(caller, Reply::Paused { leaf_is_empty })
            }
            (Doing::Resuming { swapped }, _) => {
                if let (Some(meta), Some((_, leaf))) = (swapped, &mut self.leaf) {
                    self.second = Some(std::mem::replace(leaf, *meta));
                }
                said(caller, Reply::Done)
            }
            (Doing::CleaningBase { then }, CommandReply::Clean(plans)) => {
                self.settle_second(caller, &plans, then)
            }
            (Doing::Folding, _) => {
                if let Some(meta) = self.second.take() {
                    // What the record held is durable in the image by now.
                    let _ = self.opener.records.remove(meta.uuid());
                }
                said(caller, Reply::Done)
            }
            (Doing::Refreshing, _) => said(caller, Reply::Drained),
            (Doing::StartingMerge { parent, .. }, _) => {
                self.second = Some(*parent);
                said(caller, Reply::Done)
            }
            (Doing::StoppingMerge, _) => self.fold_parent(caller),
            (Doing::Committing, _) => {
                self.committed();
                said(caller, Reply::Done)
            }
            (Doing::Closing, CommandReply::Clean(plans)) => self.settle_all(caller, plans),
            (Doing::Growing(step, bytes), _) => self.growth_goes_on(caller, step, bytes),
            _ => said(caller, Reply::Done),
        }
    }

    fn command_failed(
        &mut self,
        doing: Doing,
        caller: Option<(Connection, u64)>,
        error: &CommandError,
    ) -> Vec<Step> {
        if let Doing::Growing(step, _) = &doing {
            return self.growth_failed(caller, step, error);
        }
        if let Doing::StartingMerge { file, .. } = &doing {
            self.opener.files.close(*file);
        }
        let refused = |caller| answer(caller, Err(refusal(error)));
        let mut steps = caller.map(refused).into_iter().collect::<Vec<_>>();
        // A disk whose flush failed must still be able to end; its record stays
        // for whoever opens it next.
        if matches!((doing, error), (Doing::Closing, CommandError::Failed(_))) {
            steps.push(Step::Exit);
        }
        steps
    }

    /// A stopped merge: the parent is frozen now; settle and fold it.
    pub(super) fn fold_parent(&mut self, caller: Option<(Connection, u64)>) -> Vec<Step> {
        let name = self
            .leaf
            .as_ref()
            .and_then(|(_, meta)| meta.parent.as_ref())
            .and_then(|parent| parent.candidates().ok().and_then(|names| names.into_iter().next()));
        match name {
            Some(name) => {
                let then = AfterFold { name };
                self.start(caller, Doing::CleaningBase { then }, Command::Clean { second_only: true })
            }
            None => self.fail(caller, "the leaf has no parent any more"),
        }
    }

    fn committed(&mut self) {
        if let (Some((_, leaf)), Some(mut parent)) = (&mut self.leaf, self.second.take()) {
            parent.footer.hidden = false;
            let emptied = std::mem::replace(leaf, parent);
            let _ = self.opener.records.remove(emptied.uuid());
        }
    }

    fn settle_all(&mut self, caller: Option<(Connection, u64)>, plans: Vec<SettlePlan>) -> Vec<Step> {
        let opener = self.opener.clone();
        let metas: Vec<Meta> =
            self.leaf.iter().map(|(_, meta)| meta.clone()).chain(self.second.clone()).collect();
        let job = move || {
            for (plan, mut meta) in plans.into_iter().zip(metas) {
                let settled = opener.settle(&plan, &mut meta, None);
                if let Err(error) = settled.and_then(|()| Ok(opener.records.remove(meta.uuid())?)) {
                    return JobResult::Failed(error.to_string());
                }
            }
            JobResult::AllSettled
        };
        self.start_job(caller, Doing::SettlingAll, job)
    }

    /// A job ended.
    pub fn job_done(&mut self, token: Token, result: JobResult) -> Vec<Step> {
        let Some(Operation { doing, caller }) = self.operations.remove(&token) else { return Vec::new() };
        match (doing, result) {
            (Doing::SettlingAll, JobResult::AllSettled) => {
                let mut steps = said(caller, Reply::Done);
                steps.push(Step::Exit);
                steps
            }
            (Doing::SettlingAll, JobResult::Failed(detail)) => {
                let mut steps = self.fail(caller, &detail);
                steps.push(Step::Exit);
                steps
            }
            (Doing::Growing(..), JobResult::Grown(grown)) => self.grown(caller, grown),
            (_, JobResult::Failed(detail)) => self.fail(caller, &detail),
            (Doing::Preparing(intent), JobResult::Child(child)) => {
                let holder = caller.map_or(Connection(0), |(connection, _)| connection);
                self.prepared = Some((intent, holder, Some(child)));
                said(caller, Reply::Done)
            }
            (Doing::SettlingBase, JobResult::Settled(node, file)) => {
                self.start(caller, Doing::Folding, Command::Fold { node, file })
            }
            (Doing::Reparenting, JobResult::Reparented(meta)) => {
                if let Some((_, leaf)) = &mut self.leaf {
                    *leaf = *meta;
                }
                let mut steps: Vec<Step> =
                    caller.map(|c| more(c, Reply::HeaderDurable)).into_iter().collect();
                steps.extend(self.reread(caller));
                steps
            }
            (Doing::Rereading, JobResult::Below(lower)) => {
                self.start(caller, Doing::Refreshing, Command::Refresh { lower })
            }
            (Doing::OpeningParent { bounds }, JobResult::Parent(parent, below)) => {
                let doing = Doing::StartingMerge { parent: Box::new(parent.meta), file: parent.image.file };
                let command = Command::MergeStart { parent: Box::new(parent.image), below, bounds };
                self.start(caller, doing, command)
            }
            (Doing::Deciding, JobResult::Decided { swap }) => self.end_pause(caller, swap),
            (_, other) => self.fail(caller, &format!("a job brought {other:?}")),
        }
    }
}
