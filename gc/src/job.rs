//! A merge as a job: its record, how it begins, how it ends.
//!
//! ```text
//!   begin:   SR lock { headers, leases, intents re-read; record written }
//!   inner:   Copying --> Relinking --> Refreshing --> Deleting --> (cleared)
//!               |            (from here only forward)
//!               +--> aborted: parent settled, record cleared
//!   leaf:    Merging --> Committing --> (cleared)
//!               +--> stopped: parent settled, record cleared
//! ```
//!
//! The states are [`sm::journal::JobState`] and [`LeafMergeState`], stored in
//! the record itself, so that carrying on after a crash is the same match as
//! going on without one ([`Job::carry_on`]).

use sm::Repo;
use sm::host::Guard;
use sm::journal::{self, InnerIntent, Intent, JobState, LeafMergeIntent, LeafMergeState, RecordName};
use tapdisk_control::{ClientError, ImageRef};
use uuid::Uuid;
use vhd::storage::{VolumeName, Why};

use crate::candidates::{Merge, candidates};
use crate::forest::Forest;
use crate::survey;
use crate::watch::{Aborted, Watch};

/// Why a job ended early.
#[derive(Debug, thiserror::Error)]
pub enum Stop {
    /// It was told to.
    #[error("aborted")]
    Aborted,
    /// Something must happen first; it is planned again.
    #[error("{0}")]
    Later(String),
    /// It can neither go on nor be given up now: its record stays, and it is
    /// carried on later.
    #[error("{0}")]
    Unfinished(String),
    /// It failed.
    #[error("{0}")]
    Failed(#[from] sm::Error),
    /// A tapdisk refused or did not answer.
    #[error("tapdisk of {vdi}: {source}")]
    Tap {
        /// Whose.
        vdi: Uuid,
        /// What it said.
        source: ClientError,
    },
}

impl Stop {
    /// The stable upper-case word of the API.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Aborted => "CANCELLED",
            Self::Later(_) => "BUSY",
            Self::Failed(error) => error.code(),
            Self::Unfinished(_) | Self::Tap { .. } => "IO_ERROR",
        }
    }

    /// Whether the same may go well a moment later without anybody's help.
    #[must_use]
    pub fn may_pass(&self) -> bool {
        match self {
            Self::Aborted | Self::Later(_) | Self::Unfinished(_) | Self::Tap { .. } => true,
            Self::Failed(error) => matches!(error, sm::Error::Busy { .. } | sm::Error::Io { .. }),
        }
    }
}

impl From<Aborted> for Stop {
    fn from(_: Aborted) -> Self {
        Self::Aborted
    }
}

/// Shorthand for results of jobs.
pub type Result<T> = std::result::Result<T, Stop>;

/// A job that this process works on.
pub struct Job<'a> {
    /// The SR.
    pub repo: &'a Repo,
    /// Time, pace and somebody to tell.
    pub watch: &'a dyn Watch,
    /// Whether somebody else began it.
    pub(crate) resumed: bool,
    /// Keeps others from recovering it while we live.
    _hold: Guard,
}

/// An I/O error of the run folder or the repository, with what was done.
pub(crate) fn io<T>(what: &str, result: std::io::Result<T>) -> Result<T> {
    result.map_err(|source| sm::Error::io(what, source).into())
}

impl<'a> Job<'a> {
    /// Begins a merge: checks it against what stands on the SR now and writes
    /// its record, in one hold of the SR lock, so that nothing can come
    /// between (invariants 8, 9). A crash before the record is durable leaves
    /// nothing; after it, a job to carry on or to drop.
    ///
    /// # Errors
    /// [`Stop::Later`] with the reason when it may not be done any more.
    pub fn begin(repo: &'a Repo, watch: &'a dyn Watch, merge: &Merge) -> Result<(Self, Intent)> {
        let id = repo.ids.uuid();
        let hold = io("hold the intent", repo.host.hold_intent(id))?
            .ok_or_else(|| Stop::Later("its intent is held".into()))?;
        // What it reads is remembered: under the lock, which everybody waits
        // for, only the headers that changed since are read again.
        sm::scan::scan(repo)?;
        let _lock = io("lock the SR", repo.host.lock_sr())?;
        let forest = survey::survey(repo, &survey::leases(repo)?)?;
        check(&forest, merge)?;
        let intent = record_of(&forest, merge, id)?;
        journal::put(repo.volumes.as_ref(), &intent, "merge: record intent")?;
        Ok((Self { repo, watch, resumed: false, _hold: hold }, intent))
    }

    /// Takes over a merge whose record stands. `None` when somebody alive
    /// works on it, or it is no merge, or gone.
    ///
    /// # Errors
    /// I/O errors.
    pub fn take_over(repo: &'a Repo, watch: &'a dyn Watch, id: Uuid) -> Result<Option<(Self, Intent)>> {
        let Some(hold) = io("hold the intent", repo.host.hold_intent(id))? else {
            return Ok(None);
        };
        // Read after the hold: what its last holder wrote is final now, and
        // durable before it is acted on.
        io("sync the journal", repo.volumes.sync_records("merge: the record that was found"))?;
        let found = journal::load(repo.volumes.as_ref())?
            .into_iter()
            .map(|stored| stored.intent)
            .find(|intent| intent.id() == id && intent.is_merge());
        Ok(found.map(|intent| (Self { repo, watch, resumed: true, _hold: hold }, intent)))
    }

    /// Does what is left of a merge, whatever state it is in.
    ///
    /// # Errors
    /// Why it ended early. The record then still stands, unless nothing of
    /// the merge needs to be carried on.
    pub fn carry_on(&self, intent: Intent) -> Result<()> {
        match intent {
            Intent::Inner(mut inner) => self.inner(&mut inner),
            Intent::LeafMerge(mut leaf) => self.leaf(&mut leaf),
            _ => Ok(()),
        }
    }

    /// Writes the record anew; durable when this returns.
    pub(crate) fn put(&self, intent: &Intent, why: Why) -> Result<()> {
        journal::put(self.repo.volumes.as_ref(), intent, why)?;
        Ok(())
    }

    /// Clears the record.
    pub(crate) fn clear(&self, id: Uuid, why: Why) -> Result<()> {
        let name = RecordName { id, state: journal::RecordState::Job };
        journal::remove(self.repo.volumes.as_ref(), name, why)?;
        Ok(())
    }

    pub(crate) fn lock(&self) -> Result<Guard> {
        io("lock the SR", self.repo.host.lock_sr())
    }
}

/// Whether a merge may be done in the forest as it is now.
///
/// # Errors
/// [`Stop::Later`] with what stands against it.
fn check(forest: &Forest, merge: &Merge) -> Result<()> {
    let found = candidates(forest).into_iter().find(|(candidate, _)| candidate == merge);
    let Some((_, against)) = found else {
        return Err(Stop::Later("the tree has changed".into()));
    };
    let unknown = forest.unknown_parents().map(|(node, why)| format!("{} cannot be read: {why}", node.uuid));
    let broken = || {
        let (node, why) = forest.broken_trees().remove(&forest.root(merge.parent()))?;
        Some(format!("{node} is broken: {why}"))
    };
    match unknown.or_else(broken).or(against.map(|reason| reason.to_string())) {
        Some(reason) => Err(Stop::Later(reason)),
        None => Ok(()),
    }
}

fn record_of(forest: &Forest, merge: &Merge, id: Uuid) -> Result<Intent> {
    let image = |uuid: Uuid| match forest.node(uuid) {
        Some(node) => Ok(ImageRef { volume: VolumeName::vhd(uuid).as_str().to_owned(), footer: node.footer }),
        None => Err(Stop::Later("the tree has changed".into())),
    };
    Ok(match merge {
        Merge::Inner { sources, parent } => Intent::Inner(InnerIntent {
            id,
            nodes: sources.iter().map(|uuid| image(*uuid)).collect::<Result<_>>()?,
            parent: image(*parent)?,
            state: JobState::Copying,
        }),
        Merge::Leaf { vdi, parent, .. } => Intent::LeafMerge(LeafMergeIntent {
            id,
            vdi: *vdi,
            leaf: image(*vdi)?,
            parent: image(*parent)?,
            state: LeafMergeState::Merging,
        }),
    })
}
