//! The end of a leaf merge: the emptied leaf goes, the parent takes its name.

use vhd::storage::VolumeName;

use super::command::{CommandError, CommandReply, Token};
use super::image::Purpose;
use super::merge::{CommitStep, LEAF, PARENT, Phase};
use super::{Barrier, Engine, Op, Second};

impl Engine {
    /// Commit, once L is empty: every request already runs on P.
    ///
    /// 1. L's clears are durable (`Empty` says so), and the caller's intent is
    ///    "committing". A crash: recovery sees L empty and starts here.
    /// 2. P's hidden flag is cleared, durably. A crash: as before; scans
    ///    consult the intent, so P never shows up twice.
    /// 3. P is renamed over L; where that takes two steps, L steps `aside`
    ///    first. A crash: L's name leads to P, to the empty L or nowhere; in the
    ///    two latter cases P is still there, and recovery goes on from there.
    /// 4. The names are synced, L leaves the map, the caller deletes what stepped
    ///    aside and drops the intent, after it synced the names itself. Where they
    ///    could not be synced here P is the leaf all the same: before the next
    ///    flush of a guest is answered it is tried again.
    pub(super) fn merge_commit(
        &mut self,
        token: Token,
        footer: &[u8; 512],
        aside: VolumeName,
    ) -> Result<(), CommandError> {
        if !matches!(self.merge.phase, Phase::Empty) || self.merge.stop.is_some() {
            return Err(CommandError::Busy("the leaf is not empty"));
        }
        if !self.stack[LEAF].is_clean() {
            return Err(CommandError::Busy("the leaf has metadata to write back"));
        }
        self.merge.phase = Phase::Committing { token, step: CommitStep::Unhide, aside };
        let file = self.stack[PARENT].file;
        let bytes = footer.as_slice().into();
        self.start(
            Op::WriteMeta { file, parts: vec![(0, bytes)], why: "merge commit: unhide the parent" },
            Purpose::Commit,
        );
        Ok(())
    }

    pub(super) fn commit_step(&mut self, result: Result<(), i32>) {
        let Phase::Committing { token, step, aside } = &self.merge.phase else { return };
        let (token, step, aside) = (*token, *step, aside.clone());
        if let Err(errno) = result {
            if step == CommitStep::RenameSync {
                self.names_owed = true;
                self.drop_leaf();
                return self.answer(token, Ok(CommandReply::Done));
            }
            self.merge.phase = Phase::Empty;
            let detail = format!("committing the merge failed at {step:?}: errno {errno}");
            return self.answer(token, Err(CommandError::Failed(detail)));
        }
        let (new, over) = (self.stack[PARENT].name.clone(), self.stack[LEAF].name.clone());
        let file = self.stack[PARENT].file;
        let (next, op) = match step {
            CommitStep::Unhide => {
                (CommitStep::UnhideFlush, Op::Flush { file, why: "merge commit: unhidden before the rename" })
            }
            CommitStep::UnhideFlush => (
                CommitStep::Rename,
                Op::Swap { new, over, aside: aside.clone(), why: "merge commit: the parent takes the name" },
            ),
            CommitStep::Rename => (
                CommitStep::RenameSync,
                Op::SyncNames { why: "merge commit: the name before the intent goes" },
            ),
            CommitStep::RenameSync => {
                self.drop_leaf();
                return self.answer(token, Ok(CommandReply::Done));
            }
        };
        self.merge.phase = Phase::Committing { token, step: next, aside };
        self.start(op, Purpose::Commit);
    }

    fn drop_leaf(&mut self) {
        let leaf = self.stack.remove(LEAF);
        self.stack[LEAF].name = leaf.name;
        self.second = Second::Frozen;
        self.merge.phase = Phase::None;
        debug_assert!(self.merge.moves.is_empty(), "the leaf still has blocks");
        self.merge.writes.clear();
        self.after_all_so_far(Barrier::Close(vec![leaf.file]));
        self.wake_bitmaps(leaf.file);
    }
}
