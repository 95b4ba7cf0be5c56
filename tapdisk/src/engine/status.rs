//! Block status: which runs are data, and at which depth.

use vhd::rw::Presence;
use vhd::units::{BLOCK_BYTES, BlockNo};

use super::piece::{Active, Piece, Source};
use super::{Engine, Extent, Output, Request, RequestId};
use crate::limits::RESOLVED_BLOCKS_MAX;

impl Engine {
    /// How much of a request for status or cache is looked at, in bytes: up
    /// to the block at which more bitmaps than the limit would have to be
    /// read. Blocks that are nowhere or whole cost nothing.
    pub(super) fn resolvable(&self, request: &Request) -> u32 {
        let end = request.offset.saturating_add(u64::from(request.len));
        let mut at = request.offset;
        let mut left = RESOLVED_BLOCKS_MAX;
        while at < end {
            let block = BlockNo::of_byte(at);
            let partly = self
                .stack
                .iter()
                .map(|image| image.rw.presence(block))
                .find(|presence| *presence != Presence::Absent)
                .map_or_else(
                    || self.lower.map().places(block).next().is_some_and(|place| !place.whole),
                    |presence| matches!(presence, Presence::Partial(_)),
                );
            if partly {
                if left == 0 {
                    break;
                }
                left -= 1;
            }
            at = block.first_byte() + BLOCK_BYTES;
        }
        u32::try_from(at.min(end) - request.offset).unwrap_or(request.len)
    }

    pub(super) fn plan_status(&mut self, piece: Piece) {
        let Some(sources) = self.sources(piece) else { return };
        let depth_below = u32::try_from(self.stack.len()).unwrap_or(0) + 1;
        let extents = sources
            .into_iter()
            .map(|(run, source)| Extent {
                len: run.bytes(),
                depth: match source {
                    Source::Zero => 0,
                    Source::Stack { index, .. } => u32::try_from(index).unwrap_or(0) + 1,
                    Source::Lower { node, .. } => depth_below + u32::from(node),
                },
            })
            .collect();
        if let Some(active) = self.active.get_mut(&piece.request) {
            active.extents.push((piece.block, extents));
        }
        self.part_done(piece.request, Ok(()));
    }

    /// The data is not read: with direct I/O there is nowhere to keep it. But
    /// who owns it is known afterwards.
    pub(super) fn plan_cache(&mut self, piece: Piece) {
        if self.sources(piece).is_some() {
            self.part_done(piece.request, Ok(()));
        }
    }

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
