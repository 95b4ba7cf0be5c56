//! Block status: which runs are data, and at which depth.

use vhd::placed::{At, Placed, image_id};
use vhd::rw::Presence;
use vhd::units::{BLOCK_BYTES, BlockNo, SECTOR_BYTES, SectorRun};

use super::piece::{Active, Piece, Source};
use super::{Engine, Extent, Output, Request, RequestId};
use crate::limits::RESOLVED_BLOCKS_MAX;

/// A run that a block-status request found.
#[derive(Debug, Clone, Copy)]
pub(super) struct StatusRun {
    pub(super) extent: Extent,
    pub(super) placed: Placed,
}

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
        let extents =
            sources.into_iter().map(|(run, source)| self.status_run(piece.block, run, source)).collect();
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

    pub(super) fn status_run(&self, block: BlockNo, run: SectorRun, source: Source) -> StatusRun {
        let small = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        let (depth, at) = match source {
            Source::Zero => (0, None),
            Source::Stack { index, slot } => {
                let at = At { image: self.stack[index].footer, offset: slot.data_offset(run.first) };
                (small(index) + 1, Some(at))
            }
            Source::Lower { node, slot } => {
                let level = self.lower.map().node(node);
                let at = level.map(|level| At {
                    image: image_id(level),
                    offset: level.data_offset(block, slot, run.first),
                });
                (small(self.stack.len() + 1 + self.lower.map().levels_above(node)), at)
            }
        };
        let offset = block.first_byte() + u64::from(run.first) * SECTOR_BYTES;
        let len = run.bytes();
        StatusRun { extent: Extent { len, depth }, placed: Placed { offset, len, at } }
    }

    /// Joins the blocks' runs, in order, neighbours of one depth as one.
    pub(super) fn answer_status(&mut self, request: RequestId, mut active: Active) {
        active.extents.sort_unstable_by_key(|(block, _)| *block);
        let mut joined: Vec<Extent> = Vec::new();
        for StatusRun { extent, .. } in active.extents.into_iter().flat_map(|(_, runs)| runs) {
            match joined.last_mut() {
                Some(last) if last.depth == extent.depth => last.len += extent.len,
                _ => joined.push(extent),
            }
        }
        self.out.push_back(Output::Extents(request, joined));
    }
}
