//! Why something waits. Every hidden node that a finished collection would
//! not leave behind has one of these, or is being worked on.

use uuid::Uuid;

/// Why a node is not collected now.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Reason {
    /// An image of its tree is broken (invariant 11).
    #[error(
        "image {node} of its tree is broken: {why}; `coppice sr check` names all that are: restore it from a backup, or delete the disks that need it"
    )]
    BrokenTree {
        /// Which image.
        node: Uuid,
        /// What is wrong with it.
        why: String,
    },
    /// Nobody knows whose child an unreadable image is (invariant 11).
    #[error(
        "image {node} cannot be read ({why}) and its parents are not known; nothing hidden is touched until it is repaired or removed"
    )]
    UnknownParents {
        /// Which image.
        node: Uuid,
        /// What is wrong with it.
        why: String,
    },
    /// A content receipt says that a merge changed a disk of its tree.
    #[error(
        "disk {vdi} is not what it was before merge {job}: look at it, then `coppice gc acknowledge SR {job}`"
    )]
    Differs {
        /// The disk.
        vdi: Uuid,
        /// The merge.
        job: String,
    },
    /// Its parent is a raw or fixed image.
    #[error("its parent {parent} is not a dynamic image: nothing can be merged into it")]
    ParentTakesNothing {
        /// The parent.
        parent: Uuid,
    },
    /// Blocks of another size.
    #[error("{node} has blocks of another size than 2 MiB")]
    OtherBlocks {
        /// Which image.
        node: Uuid,
    },
    /// The child is smaller: merged, its readers would see the parent's tail.
    #[error("it is smaller than its parent {parent}")]
    SmallerThanParent {
        /// The parent.
        parent: Uuid,
    },
    /// Growing the parent would show an ancestor's data past its old end.
    #[error("growing {parent} would uncover data of {ancestor}")]
    Uncovers {
        /// What would grow.
        parent: Uuid,
        /// Whose data would come to the light.
        ancestor: Uuid,
    },
    /// Not enough room for even one slice.
    #[error(
        "no space: {needed} bytes are needed, {free} are free: make room on the SR, or delete snapshots; it goes on by itself then"
    )]
    NoSpace {
        /// Bytes.
        needed: u64,
        /// Bytes.
        free: u64,
    },
    /// Its block table could not be read.
    #[error(
        "its blocks cannot be counted: {why}; `coppice sr check` names what is broken, it is tried again by itself"
    )]
    NoCost {
        /// What reading says.
        why: String,
    },
    /// It failed too often; a person should look.
    #[error(
        "set aside after {attempts} attempts: {why}; mend that, then `coppice gc run` tries again at once"
    )]
    SetAside {
        /// How often it was tried.
        attempts: u32,
        /// The last failure.
        why: String,
    },
    /// It failed and is tried again.
    #[error("attempt {attempts} failed: {why}; next in {wait_s} s")]
    Retry {
        /// How often it was tried.
        attempts: u32,
        /// The last failure.
        why: String,
        /// Seconds until the next attempt.
        wait_s: u64,
    },
    /// An image has not been settled yet.
    #[error("{node} is not settled")]
    Unsettled {
        /// Which image.
        node: Uuid,
    },
    /// Somebody reads it in a way that must end first.
    #[error("{node} is read by {vdi}")]
    Read {
        /// What is read.
        node: Uuid,
        /// By whose lease.
        vdi: Uuid,
    },
    /// It is attached read-only, so nobody may write it.
    #[error("it is attached read-only")]
    AttachedReadOnly,
    /// Another operation holds it.
    #[error("operation {id} holds {node}")]
    Claimed {
        /// What is held.
        node: Uuid,
        /// The intent.
        id: Uuid,
    },
    /// What lies below is merged first: every byte is then copied once.
    #[error("its parent {parent} is merged first")]
    ParentFirst {
        /// The parent.
        parent: Uuid,
    },
    /// Another merge of its tree runs or goes first.
    #[error("another merge of its tree goes first")]
    TreeBusy,
    /// As many merges run as may.
    #[error("{running} merges run already")]
    Parallel {
        /// How many.
        running: usize,
    },
    /// Somebody wants the leaf of this disk left alone.
    #[error("merging its leaf is switched off: `coppice gc resume {vdi}` switches it on")]
    SwitchedOff {
        /// The disk.
        vdi: Uuid,
    },
    /// The collector is paused.
    #[error("the collector is paused: `coppice gc resume` lets it go on")]
    Paused,
    /// Somebody stopped all merges a moment ago.
    #[error(
        "all merges were stopped by `coppice gc abort`: they go on in {left_s} s, or at once after `coppice gc resume` or `coppice gc run`"
    )]
    Quiet {
        /// Seconds until then, as of the last look.
        left_s: u64,
    },
}

impl Reason {
    /// A stable word for programs.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::BrokenTree { .. } => "BROKEN_TREE",
            Self::UnknownParents { .. } => "UNKNOWN_PARENTS",
            Self::Differs { .. } => "DIFFERS",
            Self::ParentTakesNothing { .. } => "PARENT_TAKES_NOTHING",
            Self::OtherBlocks { .. } => "OTHER_BLOCKS",
            Self::SmallerThanParent { .. } => "SMALLER_THAN_PARENT",
            Self::Uncovers { .. } => "UNCOVERS",
            Self::NoSpace { .. } => "NO_SPACE",
            Self::NoCost { .. } => "NO_COST",
            Self::SetAside { .. } => "SET_ASIDE",
            Self::SwitchedOff { .. } => "SWITCHED_OFF",
            Self::Retry { .. } => "RETRY",
            Self::Unsettled { .. } => "UNSETTLED",
            Self::Read { .. } => "READ",
            Self::AttachedReadOnly => "ATTACHED_READ_ONLY",
            Self::Claimed { .. } => "CLAIMED",
            Self::ParentFirst { .. } => "PARENT_FIRST",
            Self::TreeBusy => "TREE_BUSY",
            Self::Parallel { .. } => "PARALLEL",
            Self::Paused => "PAUSED",
            Self::Quiet { .. } => "QUIET",
        }
    }

    /// Whether it goes away by itself, or needs a person (or a reader, or
    /// room) to act.
    #[must_use]
    pub fn is_blocked(&self) -> bool {
        match self {
            Self::BrokenTree { .. }
            | Self::Differs { .. }
            | Self::UnknownParents { .. }
            | Self::ParentTakesNothing { .. }
            | Self::OtherBlocks { .. }
            | Self::SmallerThanParent { .. }
            | Self::Uncovers { .. }
            | Self::NoSpace { .. }
            | Self::NoCost { .. }
            | Self::SwitchedOff { .. }
            | Self::SetAside { .. } => true,
            Self::Retry { .. }
            | Self::Unsettled { .. }
            | Self::Read { .. }
            | Self::AttachedReadOnly
            | Self::Claimed { .. }
            | Self::ParentFirst { .. }
            | Self::TreeBusy
            | Self::Parallel { .. }
            | Self::Paused
            | Self::Quiet { .. } => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a person must act on says how.
    #[test]
    fn reasons_that_need_somebody_name_the_next_step() {
        let (node, why) = (Uuid::nil(), String::new());
        for (reason, step) in [
            (Reason::BrokenTree { node, why: why.clone() }, "sr check"),
            (Reason::NoSpace { needed: 2, free: 1 }, "make room"),
            (Reason::NoCost { why: why.clone() }, "sr check"),
            (Reason::SetAside { attempts: 6, why }, "gc run"),
            (Reason::Differs { vdi: node, job: String::new() }, "gc acknowledge"),
            (Reason::SwitchedOff { vdi: node }, "gc resume"),
            (Reason::Paused, "gc resume"),
            (Reason::Quiet { left_s: 1 }, "gc resume"),
        ] {
            assert!(reason.to_string().contains(step), "{reason}");
        }
    }
}
