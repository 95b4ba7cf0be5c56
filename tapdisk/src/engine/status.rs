//! Block status: which runs are data, and at which depth.

use super::piece::Active;
use super::{Engine, Extent, Output, RequestId};

impl Engine {
    /// Joins the blocks' runs, in order, neighbours of one depth as one.
    pub(super) fn answer_status(&mut self, request: RequestId, mut active: Active) {
        active.extents.sort_unstable_by_key(|(block, _)| *block);
        let mut joined: Vec<Extent> = Vec::new();
        for extent in active.extents.into_iter().flat_map(|(_, extents)| extents) {
            match joined.last_mut() {
                Some(last) if last.depth == extent.depth => last.len += extent.len,
                _ => joined.push(extent),
            }
        }
        self.out.push_back(Output::Extents(request, joined));
    }
}
