//! Giving back the space that blocks took and nobody wrote.
//!
//! While a filesystem has plenty, a disk in use takes the space of whole blocks
//! ([`vhd::slots`]); a snapshot keeps what was written, and with it the space of
//! what was not. When space runs short each node that others stand on, so that
//! no guest writes it, is looked at once, some of it in one hold of the SR
//! lock: who wants to change its header waits for that. No record is needed: what
//! is given back reads as zeros before and after.

use std::collections::BTreeSet;

use sm::{Repo, image};
use uuid::Uuid;
use vhd::storage::{Access, VolumeName};

use crate::forest::{Forest, Format, Health, Node};
use crate::job::{Result, io};
use crate::limits;

/// How far it is in one repository.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Progress {
    /// Nodes looked at since space ran short.
    looked: BTreeSet<Uuid>,
    /// The one that is looked at now, and its next byte.
    at: Option<(Uuid, u64)>,
    /// Bytes given back since the collector was made.
    pub bytes: u64,
}

impl Progress {
    /// What to look at next, from which byte on, if space is short and
    /// anything is left.
    pub fn next(&mut self, forest: &Forest) -> Option<(Uuid, u64)> {
        if forest.free_bytes >= forest.total_bytes / limits::SHORT_SHARE {
            // Next time there may be more to be given back.
            (self.looked, self.at) = (BTreeSet::new(), None);
            return None;
        }
        let fit = |node: &Node| {
            node.format == Format::Sparse
                && forest.children(node.uuid).next().is_some()
                && !matches!(node.health, Health::Broken(_))
                && forest.claim_on(node.uuid).is_none()
        };
        if let Some((node, byte)) = self.at
            && forest.node(node).is_some_and(fit)
        {
            return Some((node, byte));
        }
        let left = forest.nodes().find(|node| fit(node) && !self.looked.contains(&node.uuid));
        left.map(|node| (node.uuid, 0))
    }

    /// What came of looking at `node`: how much, and where to go on, if there
    /// is more of it.
    pub fn went_on(&mut self, node: Uuid, bytes: u64, next: Option<u64>) {
        self.bytes += bytes;
        self.at = next.map(|byte| (node, byte));
        if next.is_none() {
            self.looked.insert(node);
        }
    }
}

/// Goes through the file of a node, from byte `from` on, while `go_on` says so,
/// in one hold of the SR lock. Returns the bytes that came free and where to go
/// on, if there is more of it.
///
/// # Errors
/// Somebody writes the node, or I/O.
pub fn give_back(repo: &Repo, node: Uuid, from: u64, go_on: &dyn Fn() -> bool) -> Result<(u64, Option<u64>)> {
    let name = VolumeName::vhd(node);
    let _lock = io("lock the SR", repo.host.lock_sr())?;
    let image = image::open(repo, &name, Access::Write)?;
    let what = "give back space that nobody wrote";
    let before = io(what, image.allocated())?;
    let len = io(what, image.len())?;
    let mut at = from;
    loop {
        io(what, image.give_back_unwritten(at, limits::GIVE_BACK_BYTES))?;
        at = at.saturating_add(limits::GIVE_BACK_BYTES);
        if at >= len || !go_on() {
            break;
        }
    }
    let bytes = before.saturating_sub(io(what, image.allocated())?);
    Ok((bytes, Some(at).filter(|at| *at < len)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::forest::{Claim, Link, Role};

    fn node(n: u128, role: Role, link: Link) -> Node {
        Node {
            uuid: Uuid::from_u128(n),
            footer: Uuid::from_u128(n + 1000),
            link,
            role,
            format: Format::Sparse,
            health: Health::Settled,
            virtual_bytes: 1 << 30,
        }
    }

    fn short_of(mut forest: Forest, free_bytes: u64) -> Forest {
        (forest.free_bytes, forest.total_bytes) = (free_bytes, 1000);
        forest
    }

    /// Visible 2 and 3 stand on hidden 1, visible 5 on visible 4.
    fn forest(free_bytes: u64) -> Forest {
        let on = |n| Link::Child(Uuid::from_u128(n));
        let nodes = [
            node(1, Role::Hidden, Link::Root),
            node(2, Role::Visible, on(1)),
            node(3, Role::Visible, on(1)),
            node(4, Role::Visible, Link::Root),
            node(5, Role::Visible, on(4)),
        ];
        short_of(Forest::new(nodes), free_bytes)
    }

    #[test]
    fn each_node_under_others_is_looked_at_once_while_space_is_short() {
        let [one, four] = [1, 4].map(Uuid::from_u128);
        let (mut progress, short) = (Progress::default(), forest(249));
        assert_eq!(progress.next(&forest(250)), None);
        assert_eq!(progress.next(&short), Some((one, 0)));
        progress.went_on(one, 10, Some(128));
        assert_eq!(progress.next(&short), Some((one, 128)));
        progress.went_on(one, 10, None);
        assert_eq!(progress.next(&short), Some((four, 0)));
        progress.went_on(four, 0, None);
        assert_eq!((progress.next(&short), progress.bytes), (None, 20));
        // Once there was enough, it begins anew.
        assert_eq!(progress.next(&forest(250)), None);
        assert_eq!(progress.next(&short), Some((one, 0)));
    }

    #[test]
    fn what_a_record_names_or_is_broken_is_passed_by() {
        let [one, four] = [1, 4].map(Uuid::from_u128);
        let mut short = forest(0);
        short.claims.push(Claim { id: Uuid::nil(), nodes: vec![one], merge: true });
        let mut progress = Progress::default();
        progress.went_on(one, 0, Some(128));
        assert_eq!(progress.next(&short), Some((four, 0)));
        let mut broken = node(4, Role::Hidden, Link::Root);
        broken.health = Health::Broken("torn".into());
        let leaf = node(5, Role::Visible, Link::Child(four));
        assert_eq!(progress.next(&short_of(Forest::new([broken, leaf]), 0)), None);
    }
}
