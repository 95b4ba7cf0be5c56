//! Where a range lies: for those who compare or draw the map of an attached
//! disk, whose tables on disk are behind (invariant 8).
//!
//! It runs as a block-status request among those of guests, so it sees what
//! they would and waits for what they wait for.

use vhd::placed::{Placed, push};

use super::command::{CommandError, CommandReply, Token};
use super::piece::Active;
use super::{Engine, Request, RequestId, RequestKind};

/// Ids from here on are lookups; guests' are counted from 0, parts of their
/// unaligned requests from 2^63.
const FIRST_LOOKUP: u64 = 1 << 62;

impl Engine {
    pub(super) fn look_up(&mut self, token: Token, offset: u64, len: u32) {
        let id = RequestId(FIRST_LOOKUP | token.0);
        self.lookups.insert(id, token);
        let request = Request { id, kind: RequestKind::BlockStatus, offset, len };
        if self.state.runs() {
            self.begin(request);
        } else {
            self.queue.push_back(request);
        }
    }

    /// Answers a lookup.
    pub(super) fn lookup_done(&mut self, request: RequestId, found: Option<Active>, result: Result<(), i32>) {
        let Some(token) = self.lookups.remove(&request) else { return };
        let reply = match (result, found) {
            (Ok(()), Some(mut active)) => {
                active.extents.sort_unstable_by_key(|(block, _)| *block);
                let mut placed: Vec<Placed> = Vec::new();
                let runs = active.extents.into_iter().flat_map(|(_, runs)| runs);
                runs.for_each(|run| push(&mut placed, run.placed));
                Ok(CommandReply::Placed(placed))
            }
            (Err(errno), _) => {
                Err(CommandError::Failed(format!("reading its bitmaps failed: errno {errno}")))
            }
            (Ok(()), None) => Err(CommandError::Busy("the lookup was lost")),
        };
        self.answer(token, reply);
    }
}
