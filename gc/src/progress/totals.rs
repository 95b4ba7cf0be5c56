//! Sums of all work on an SR, what is under way included.

use serde::Serialize;

use super::State;

/// See the module.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Totals {
    /// Hidden nodes merged into their parents.
    pub coalesced: u64,
    /// Leaves that took their parent's place.
    pub leaf_coalesced: u64,
    /// Hidden nodes deleted as garbage.
    pub deleted: u64,
    /// Bytes read and written, by work under way too.
    pub bytes_copied: u64,
    /// Bytes shared between files, by work under way too.
    pub bytes_cloned: u64,
    /// Bytes of blocks given back by work that ended: on balance, so it is
    /// known only then.
    pub bytes_freed: u64,
    /// Bytes read for content receipts of work that ended.
    pub receipt_bytes_read: u64,
}

impl State {
    /// Everything since the collector was made.
    #[must_use]
    pub fn so_far(&self) -> Totals {
        let ended = &self.totals;
        let mut totals = Totals {
            coalesced: ended.coalesced,
            leaf_coalesced: ended.leaf_coalesced,
            deleted: ended.deleted,
            bytes_copied: ended.bytes_copied,
            bytes_cloned: ended.bytes_cloned,
            bytes_freed: ended.bytes_freed,
            receipt_bytes_read: ended.receipt_bytes_read,
        };
        for doing in self.running.values() {
            totals.bytes_copied += doing.ledger.copied;
            totals.bytes_cloned += doing.ledger.cloned;
        }
        totals
    }
}
