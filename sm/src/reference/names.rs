//! What a file in an SR folder is, by its name. Pure.

use serde::Serialize;
use uuid::Uuid;
use vhd::storage::VolumeName;

/// What the reference leaves in an SR folder beside images.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Leftover {
    /// `.journal-<uuid>`: undo journal of a resize.
    ResizeJournal {
        /// The image being resized.
        of: Uuid,
    },
    /// `coalesce_<uuid>`: an inner node was being merged into its parent.
    CoalesceJournal {
        /// The node.
        of: Uuid,
    },
    /// `relink_<uuid>`: its children were being given its parent.
    RelinkJournal {
        /// The node.
        of: Uuid,
    },
    /// `leaf_<uuid>`: a leaf was being merged into its parent.
    LeafJournal {
        /// The leaf.
        of: Uuid,
    },
    /// `OLD_<uuid>.vhd`: a leaf whose content went into its parent.
    OldLeaf {
        /// The leaf's name before.
        of: Uuid,
    },
    /// `<uuid>.vhd.new`: a child prepared by a snapshot.
    SnapshotChild {
        /// The disk.
        of: Uuid,
    },
    /// `<uuid>.cbtlog`: changed blocks of a disk.
    CbtLog {
        /// The disk.
        of: Uuid,
    },
    /// `<uuid>.vhdcache`.
    Cache {
        /// The disk.
        of: Uuid,
    },
    /// A file of the reference that means nothing to images.
    Note,
}

impl Leftover {
    /// Recognises a name; `None` for images, our temporaries and files of
    /// others.
    #[must_use]
    pub fn of(name: &str) -> Option<Self> {
        let between = |prefix: &str, suffix: &str| {
            let uuid = name.strip_prefix(prefix)?.strip_suffix(suffix)?;
            if uuid.len() == 36 { Uuid::try_parse(uuid).ok() } else { None }
        };
        let journal = between(".journal-", "").map(|of| Self::ResizeJournal { of });
        journal
            .or_else(|| between("coalesce_", "").map(|of| Self::CoalesceJournal { of }))
            .or_else(|| between("relink_", "").map(|of| Self::RelinkJournal { of }))
            .or_else(|| between("leaf_", "").map(|of| Self::LeafJournal { of }))
            .or_else(|| between("OLD_", ".vhd").map(|of| Self::OldLeaf { of }))
            .or_else(|| between("", ".vhd.new").map(|of| Self::SnapshotChild { of }))
            .or_else(|| between("", ".cbtlog").map(|of| Self::CbtLog { of }))
            .or_else(|| between("", ".vhdcache").map(|of| Self::Cache { of }))
            .or_else(|| ["sm-hardlink.conf", "filelog.txt"].contains(&name).then_some(Self::Note))
    }

    /// What it means, for the operator.
    #[must_use]
    pub fn explain(self) -> String {
        match self {
            Self::ResizeJournal { of } => {
                format!(
                    "undo journal of an interrupted resize of {of}: the next attach takes the resize back"
                )
            }
            Self::CoalesceJournal { of } => {
                format!("an interrupted merge of {of} into its parent: harmless, the merge is done again")
            }
            Self::RelinkJournal { of } => {
                format!("{of} was merged and its children were being relinked: the next attach goes on")
            }
            Self::LeafJournal { of } => {
                format!(
                    "an interrupted merge of the disk {of} into its parent: the next attach takes it back"
                )
            }
            Self::OldLeaf { of } => format!("the emptied leaf of a merge of the disk {of}"),
            Self::SnapshotChild { of } => {
                format!("prepared by an interrupted snapshot of {of}: holds nothing")
            }
            Self::CbtLog { of } => format!("changed-block log of {of}: left alone"),
            Self::Cache { of } => format!("local cache of {of}: left alone"),
            Self::Note => "a note of the reference storage manager: left alone".into(),
        }
    }

    /// Whether an attach may have something to do because of it.
    #[must_use]
    pub fn needs_repair(self) -> bool {
        !matches!(self, Self::CbtLog { .. } | Self::Cache { .. } | Self::Note)
    }
}

/// `OLD_<uuid>.vhd`.
#[must_use]
pub fn old_leaf(of: Uuid) -> Option<VolumeName> {
    VolumeName::new(&format!("OLD_{of}.vhd"))
}

/// Which images of an interrupted leaf merge are there, and so what is to be
/// done. Between the reference's steps the disk's guest is held, so that the
/// leaf still has everything it had.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LeafCase {
    /// Nothing was renamed: hide the parent again, show the leaf.
    BeforeRenames,
    /// The leaf is called `OLD_`: rename it back first.
    LeafRenamed,
    /// The parent has the leaf's name: rename it back first, then the leaf.
    BothRenamed,
    /// The leaf is gone: the merge is done.
    Done,
    /// None of these; nothing is touched.
    Unclear,
}

impl LeafCase {
    /// By what exists: `<leaf>.vhd`, `OLD_<leaf>.vhd`, `<parent>.vhd`.
    #[must_use]
    pub fn of(leaf: bool, old: bool, parent: bool) -> Self {
        match (leaf, old, parent) {
            (true, false, true) => Self::BeforeRenames,
            (false, true, true) => Self::LeafRenamed,
            (true, true, false) => Self::BothRenamed,
            (true, false, false) => Self::Done,
            _ => Self::Unclear,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_told_apart_and_strangers_are_not_taken() {
        let of = Uuid::from_u128(7);
        let table = [
            (format!(".journal-{of}"), Leftover::ResizeJournal { of }),
            (format!("coalesce_{of}"), Leftover::CoalesceJournal { of }),
            (format!("relink_{of}"), Leftover::RelinkJournal { of }),
            (format!("leaf_{of}"), Leftover::LeafJournal { of }),
            (format!("OLD_{of}.vhd"), Leftover::OldLeaf { of }),
            (format!("{of}.vhd.new"), Leftover::SnapshotChild { of }),
            (format!("{of}.cbtlog"), Leftover::CbtLog { of }),
            (format!("{of}.vhdcache"), Leftover::Cache { of }),
            ("filelog.txt".into(), Leftover::Note),
        ];
        for (name, leftover) in table {
            assert_eq!(Leftover::of(&name), Some(leftover), "{name}");
        }
        // Names that make the reference's own listing fail.
        for name in ["leaf_a_b", "cloned-disk.vhd", "coalesce_", "OLD_x.vhd", &format!("{of}.vhd")] {
            assert_eq!(Leftover::of(name), None, "{name}");
        }
    }

    #[test]
    fn leaf_merges_are_taken_back_unless_they_are_done() {
        use LeafCase::*;
        let cases: Vec<LeafCase> = (0..8).map(|n| LeafCase::of(n & 4 != 0, n & 2 != 0, n & 1 != 0)).collect();
        assert_eq!(
            cases,
            [Unclear, Unclear, Unclear, LeafRenamed, Done, BeforeRenames, BothRenamed, Unclear]
        );
    }
}
