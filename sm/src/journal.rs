//! The intent journal of an SR: the authority for what is half done
//! (invariant 9).
//!
//! A record's name is `<intent uuid>.<state>`, its content one [`Intent`] as
//! JSON. For a snapshot the state is the decision, and changing it is one
//! rename, which only one party can win:
//!
//! ```text
//!   pending --rename--> decided     every member swaps, come what may
//!      \-----rename---> void        no member swaps
//! ```
//!
//! All others keep their state inside the record (`<intent uuid>.job`,
//! replaced whole), because nobody races them for it.
//!
//! Absent on purpose: what to do about a record; see [`crate::recover`] and
//! the `gc` crate.

use std::collections::BTreeSet;
use std::fmt;

use serde::{Deserialize, Serialize};
pub use tapdisk_control::{ImageRef, IntentNames};
use uuid::Uuid;
use vhd::storage::{VolumeName, Volumes, Why};

use crate::error::{Error, IoContext, Result};
pub use crate::intents::{MakeIntent, ResizeIntent, RevertIntent, Swap};

/// Something half done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "intent", rename_all = "snake_case")]
pub enum Intent {
    /// Snapshot or clone of one or more leaves at one instant.
    Snapshot(SnapshotIntent),
    /// Hidden nodes merging into their parent; the collector's.
    Inner(InnerIntent),
    /// A leaf merging into its parent; the collector's.
    LeafMerge(LeafMergeIntent),
    /// A new VDI being filled.
    Make(MakeIntent),
    /// A detached VDI changing its size.
    Resize(ResizeIntent),
    /// A VDI going back to a snapshot.
    Revert(RevertIntent),
}

/// Snapshot or clone: all members or none.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotIntent {
    /// Names the intent, its record and its temporary volumes.
    pub id: Uuid,
    /// What the siblings become.
    pub kind: SiblingKind,
    /// The leaves, each once.
    pub members: Vec<Member>,
}

/// What the new sibling of a leaf becomes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SiblingKind {
    /// Read-only.
    Snapshot,
    /// Writable.
    Clone,
}

/// One leaf of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// The VDI; its volume is `<vdi>.vhd` before and after.
    pub vdi: Uuid,
    /// Footer uuid of its image when the intent was written.
    pub leaf_footer: Uuid,
    /// How the tree changes.
    pub shape: Shape,
    /// The snapshot or clone.
    pub sibling: Sibling,
}

/// How the tree changes below a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "shape", rename_all = "snake_case")]
pub enum Shape {
    /// The leaf's image becomes the hidden base `<base>.vhd`, the parent of
    /// both `new_leaf` and the sibling.
    Divide {
        /// Uuid of the base's volume, a second name of the leaf's image.
        base: Uuid,
        /// The prepared leaf, under its temporary name.
        new_leaf: ImageRef,
    },
    /// The leaf holds nothing and stays: the sibling hangs on the leaf's own
    /// parent (or is an empty image, if the leaf has none).
    Empty,
}

/// The new image beside the leaf.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sibling {
    /// The image under its temporary name.
    pub image: ImageRef,
    /// The VDI it becomes: `<vdi>.vhd`.
    pub vdi: Uuid,
    /// Its label, here so that recovery can give it.
    pub name: String,
    /// Whether it has content of its own, so that it is no copy of the leaf.
    #[serde(default)]
    pub filled: bool,
}

/// Merge of hidden nodes into their parent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InnerIntent {
    /// Names the intent.
    pub id: Uuid,
    /// The nodes that go away, adjacent, topmost first.
    pub nodes: Vec<ImageRef>,
    /// The node that takes everything: parent of the lowest of `nodes`.
    pub parent: ImageRef,
    /// How far it is.
    pub state: JobState,
}

/// How far an inner merge is; recovery is one match over it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum JobState {
    /// Copying, or flushing what was copied: may stop and repeat.
    Copying,
    /// From here on the job only goes forward.
    Relinking {
        /// Who gets `parent` as its parent.
        children: Vec<ImageRef>,
    },
    /// All headers are written; leases on the nodes are being refreshed.
    Refreshing,
    /// Nobody reads the nodes any more.
    Deleting,
}

/// Merge of a visible leaf into its hidden parent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeafMergeIntent {
    /// Names the intent.
    pub id: Uuid,
    /// The VDI.
    pub vdi: Uuid,
    /// Its image.
    pub leaf: ImageRef,
    /// The parent, which takes everything and then the name.
    pub parent: ImageRef,
    /// How far it is.
    pub state: LeafMergeState,
}

/// How far a leaf merge is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LeafMergeState {
    /// Blocks may be moving; leaf over parent is right at every instant.
    Merging,
    /// The leaf is durably empty: the parent is unhidden and takes its name.
    Committing,
}

impl Intent {
    /// Its uuid.
    #[must_use]
    pub fn id(&self) -> Uuid {
        match self {
            Self::Snapshot(intent) => intent.id,
            Self::Inner(intent) => intent.id,
            Self::LeafMerge(intent) => intent.id,
            Self::Make(intent) => intent.id,
            Self::Resize(intent) => intent.id,
            Self::Revert(intent) => intent.id,
        }
    }

    /// Whether it is a job of the collector.
    #[must_use]
    pub fn is_merge(&self) -> bool {
        matches!(self, Self::Inner(_) | Self::LeafMerge(_))
    }

    /// What it is, for people.
    #[must_use]
    pub fn word(&self) -> &'static str {
        match self {
            Self::Snapshot(_) => "a snapshot",
            Self::Inner(_) | Self::LeafMerge(_) => "a merge",
            Self::Make(_) => "a copy",
            Self::Resize(_) => "a change of size",
            Self::Revert(_) => "a revert",
        }
    }

    /// Whether the intent names the image, by volume or by footer. What an
    /// intent names is not deleted, merged or relinked by anybody else.
    #[must_use]
    pub fn names(&self, volume: &VolumeName, footer: Uuid) -> bool {
        let is = |image: &ImageRef| image.volume == volume.as_str() || image.footer == footer;
        let is_vhd = |uuid: Uuid| *volume == VolumeName::vhd(uuid);
        match self {
            Self::Snapshot(intent) => intent.members.iter().any(|member| {
                let divides = match &member.shape {
                    Shape::Divide { base, new_leaf } => is_vhd(*base) || is(new_leaf),
                    Shape::Empty => false,
                };
                divides
                    || is_vhd(member.vdi)
                    || member.leaf_footer == footer
                    || is(&member.sibling.image)
                    || is_vhd(member.sibling.vdi)
            }),
            Self::Inner(intent) => {
                let children = match &intent.state {
                    JobState::Relinking { children } => children.as_slice(),
                    JobState::Copying | JobState::Refreshing | JobState::Deleting => &[],
                };
                is(&intent.parent) || intent.nodes.iter().chain(children).any(is)
            }
            Self::LeafMerge(intent) => is(&intent.leaf) || is(&intent.parent),
            Self::Make(intent) => intent.names(volume, footer),
            Self::Resize(intent) => intent.names(volume, footer),
            Self::Revert(intent) => intent.names(volume, footer),
        }
    }
}

/// Which state a record's name says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RecordState {
    /// A snapshot that nothing was decided about.
    Pending,
    /// A snapshot that happens.
    Decided,
    /// A snapshot that does not happen; being cleaned up.
    Void,
    /// Anything nobody else decides about; its state is inside.
    Job,
}

/// The name of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RecordName {
    /// The intent.
    pub id: Uuid,
    /// Its state.
    pub state: RecordState,
}

impl fmt::Display for RecordName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = match self.state {
            RecordState::Pending => "pending",
            RecordState::Decided => "decided",
            RecordState::Void => "void",
            RecordState::Job => "job",
        };
        write!(f, "{}.{state}", self.id)
    }
}

impl RecordName {
    /// Reads a name; `None` if no version of ours wrote it.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        let (id, state) = name.split_once('.')?;
        let state = match state {
            "pending" => RecordState::Pending,
            "decided" => RecordState::Decided,
            "void" => RecordState::Void,
            "job" => RecordState::Job,
            _ => return None,
        };
        if id.len() != 36 {
            return None;
        }
        Some(Self { id: Uuid::try_parse(id).ok()?, state })
    }

    /// The three names of a snapshot's record.
    #[must_use]
    pub fn of_snapshot(id: Uuid) -> IntentNames {
        let name = |state| Self { id, state }.to_string();
        IntentNames {
            pending: name(RecordState::Pending),
            decided: name(RecordState::Decided),
            void: name(RecordState::Void),
        }
    }
}

/// A record as it stands on the SR.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored {
    /// Its name, and so its state.
    pub name: RecordName,
    /// What it says.
    pub intent: Intent,
}

/// Reads all records, sorted by intent.
///
/// The record of a snapshot is renamed under no lock of ours, by whoever
/// decides, and a listing at that moment may show its old name, or neither. It
/// is renamed only once. So of two listings one after the other at least one
/// shows the intent, and looking for its names in the order in which it can
/// take them finds it.
///
/// # Errors
/// [`Error::Journal`] for the first record that cannot be understood: what it
/// guards is unknown, so nothing in the SR may change. Otherwise I/O errors.
pub fn load(volumes: &dyn Volumes) -> Result<Vec<Stored>> {
    let mut ids = BTreeSet::new();
    for _ in 0..2 {
        for record in volumes.records().during(|| "journal: list".into())? {
            ids.insert(parse(&record)?.id);
        }
    }
    let found = ids.into_iter().filter_map(|id| find(volumes, id).transpose());
    found.collect()
}

/// The record of an intent, whatever its state; `None` if it has none any more.
///
/// # Errors
/// As [`load`].
pub fn find(volumes: &dyn Volumes, id: Uuid) -> Result<Option<Stored>> {
    // As time goes: a record that has left one name is found under a later.
    for state in [RecordState::Job, RecordState::Pending, RecordState::Decided, RecordState::Void] {
        if let Some(stored) = read(volumes, &RecordName { id, state }.to_string())? {
            return Ok(Some(stored));
        }
    }
    Ok(None)
}

fn parse(record: &str) -> Result<RecordName> {
    RecordName::parse(record)
        .ok_or_else(|| Error::Journal { record: record.to_owned(), reason: "not a name of ours".into() })
}

/// The record of this name; `None` if there is none.
fn read(volumes: &dyn Volumes, record: &str) -> Result<Option<Stored>> {
    let bad = |reason: String| Error::Journal { record: record.to_owned(), reason };
    let name = parse(record)?;
    let Some(bytes) = volumes.record(record).during(|| format!("journal: read {record}"))? else {
        return Ok(None);
    };
    let intent: Intent = serde_json::from_slice(&bytes).map_err(|e| bad(e.to_string()))?;
    let fits = matches!(intent, Intent::Snapshot(_)) == (name.state != RecordState::Job);
    if !fits || intent.id() != name.id {
        return Err(bad("its content belongs to another name".into()));
    }
    Ok(Some(Stored { name, intent }))
}

/// Writes the record of an intent: `pending` for a snapshot, `job` for all
/// others. Durable when this returns.
///
/// # Errors
/// I/O errors; then the record is there or not, whole in either case.
pub fn put(volumes: &dyn Volumes, intent: &Intent, why: Why) -> Result<RecordName> {
    let state = match intent {
        Intent::Snapshot(_) => RecordState::Pending,
        _ => RecordState::Job,
    };
    let name = RecordName { id: intent.id(), state };
    let bytes = serde_json::to_vec_pretty(intent)
        .map_err(|e| Error::Journal { record: name.to_string(), reason: e.to_string() })?;
    volumes.put_record(&name.to_string(), &bytes, why).during(|| format!("journal: write {name}"))?;
    Ok(name)
}

/// Removes a record if it is there. Durable when this returns.
///
/// # Errors
/// I/O errors.
pub fn remove(volumes: &dyn Volumes, name: RecordName, why: Why) -> Result<()> {
    volumes.delete_record(&name.to_string(), why).during(|| format!("journal: clear {name}"))
}

/// The volume an image reference names.
///
/// # Errors
/// [`Error::Journal`] when the name could lead out of the SR (invariant 10).
pub fn volume_of(image: &ImageRef) -> Result<VolumeName> {
    VolumeName::new(&image.volume).ok_or_else(|| Error::Journal {
        record: image.volume.clone(),
        reason: "names a volume outside the repository".into(),
    })
}

#[cfg(test)]
#[path = "journal_tests.rs"]
mod tests;
