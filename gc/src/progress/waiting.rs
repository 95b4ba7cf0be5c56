//! Those who wait for a collection, and what they are told.

use uuid::Uuid;

use super::State;
use crate::collector::Scope;
use crate::report::Report;
use crate::watch::Ledger;

/// What was done in the tree of a VDI that somebody waits for.
#[derive(Debug, Clone, Default)]
pub struct Focus {
    /// How many wait.
    pub waiters: usize,
    /// Counts of what was done.
    pub(super) sums: Report,
    /// Bytes of what was done.
    pub(super) room: Ledger,
}

/// Somebody who waits for the whole repository.
#[derive(Debug, Clone, Default)]
pub(super) struct Waiter {
    /// Sums when they began to.
    before: Report,
    /// Bytes of everything since, for the peak over all jobs.
    pub(super) room: Ledger,
}

impl State {
    /// Whether request `asked` was answered and nothing in its scope is left
    /// to be done.
    pub(crate) fn idle(&self, asked: u64, scope: Scope) -> bool {
        if self.looked < asked || self.dirty || self.again || self.looking {
            return false;
        }
        match scope {
            Scope::Sr => self.running.is_empty() && self.active.is_empty(),
            Scope::Vdi(vdi) => {
                let mut nodes = self.running.values().flat_map(|doing| &doing.nodes);
                !nodes.any(|node| self.same_tree(*node, vdi))
                    && self.roots.get(&vdi).is_none_or(|root| !self.active.contains(root))
            }
        }
    }

    /// Whether two nodes were in one tree in the last round.
    #[must_use]
    pub fn same_tree(&self, a: Uuid, b: Uuid) -> bool {
        a == b || self.roots.get(&a).is_some_and(|root| self.roots.get(&b) == Some(root))
    }

    pub(crate) fn focus_on(&mut self, vdi: Uuid) {
        let mut focus = self.focus.remove(&vdi).unwrap_or_default();
        focus.waiters += 1;
        // What runs already is waited for too, so it counts.
        let roots = &self.roots;
        let root = roots.get(&vdi);
        for doing in self.running.values_mut() {
            let here = |node: &Uuid| *node == vdi || (root.is_some() && roots.get(node) == root);
            if doing.nodes.iter().any(here) && !doing.focus.contains(&vdi) {
                doing.focus.push(vdi);
                focus.room.add(&doing.ledger);
            }
        }
        self.focus.insert(vdi, focus);
    }

    /// What was done in the VDI's tree since the first of those who wait for
    /// it began to.
    pub(crate) fn unfocus(&mut self, vdi: Uuid) -> Report {
        let Some(focus) = self.focus.get_mut(&vdi) else {
            return Report::default();
        };
        focus.waiters -= 1;
        let report = Report {
            bytes_copied: focus.room.copied,
            bytes_cloned: focus.room.cloned,
            bytes_freed: focus.room.net_freed(),
            peak_extra_bytes: focus.room.peak,
            ..focus.sums.clone()
        };
        if focus.waiters == 0 {
            self.focus.remove(&vdi);
        }
        report
    }

    /// Somebody waits for everything from now on; returns their number. What
    /// runs already is waited for too, so it counts.
    pub(crate) fn await_all(&mut self) -> u64 {
        let mut room = Ledger::default();
        self.running.values().for_each(|doing| room.add(&doing.ledger));
        let key = self.next_key;
        self.next_key += 1;
        self.waiters.insert(key, Waiter { before: self.totals.clone(), room });
        key
    }

    /// What was done since a waiter began to wait.
    pub(crate) fn awaited(&mut self, waiter: u64) -> Report {
        let Some(Waiter { before, room }) = self.waiters.remove(&waiter) else {
            return Report::default();
        };
        Report {
            coalesced: self.totals.coalesced - before.coalesced,
            leaf_coalesced: self.totals.leaf_coalesced - before.leaf_coalesced,
            deleted: self.totals.deleted - before.deleted,
            bytes_copied: self.totals.bytes_copied - before.bytes_copied,
            bytes_cloned: self.totals.bytes_cloned - before.bytes_cloned,
            bytes_freed: room.net_freed(),
            peak_extra_bytes: room.peak,
            receipt_bytes_read: self.totals.receipt_bytes_read - before.receipt_bytes_read,
            ..Report::default()
        }
    }
}
