//! Where the disk's bytes lie, told to those who may not read an attached
//! leaf themselves (invariant 8).

use tapdisk_control::{Extent, Refusal, Reply};
use vhd::units::SECTOR_BYTES;

use super::answers::{answer, refusal};
use super::{Connection, Service, Step};
use crate::engine::{Command, CommandError, CommandReply, Engine};
use crate::limits::{CONTROL_EXTENTS_MAX, CONTROL_RUNS_MAX, LOOKUP_BYTES_MAX};

impl Service {
    pub(super) fn extents(
        &mut self,
        engine: &Engine,
        caller: (Connection, u64),
        offset: u64,
        length: u64,
    ) -> Result<Vec<Step>, Refusal> {
        let sectors = offset.is_multiple_of(SECTOR_BYTES) && length.is_multiple_of(SECTOR_BYTES);
        let left = engine.virtual_bytes().saturating_sub(offset);
        if !sectors || length == 0 || left == 0 {
            let detail = format!("{length} bytes at {offset} of a disk of {}", engine.virtual_bytes());
            return Err(Refusal::Bad { detail });
        }
        let len = u32::try_from(length.min(left).min(LOOKUP_BYTES_MAX)).unwrap_or(u32::MAX);
        Ok(self.aside(caller, Command::Lookup { offset, len }))
    }

    /// Has the engine answer a question that stands in nobody's way.
    pub(super) fn aside(&mut self, caller: (Connection, u64), command: Command) -> Vec<Step> {
        let token = self.token();
        self.lookups.insert(token, caller);
        vec![Step::Command(token, command)]
    }
}

/// The engine's answer to a question, as far as one line carries it.
pub(super) fn found(caller: (Connection, u64), reply: Result<CommandReply, CommandError>) -> Step {
    let outcome = match reply {
        Ok(CommandReply::Placed(placed)) => {
            let extent = |run: &vhd::placed::Placed| Extent {
                length: run.len,
                at: run.at.map(|at| (at.image, at.offset)),
            };
            let extents = placed.iter().take(CONTROL_EXTENTS_MAX).map(extent).collect();
            Ok(Reply::Extents { extents })
        }
        Ok(CommandReply::Done) => Ok(Reply::Done),
        Ok(CommandReply::Blocks { runs, next }) => Ok(Reply::Blocks { runs, next }),
        Ok(other) => Err(Refusal::Failed { detail: format!("the engine said {other:?}") }),
        Err(error) => Err(refusal(&error)),
    };
    answer(caller, outcome)
}

pub(super) fn leaf_blocks(
    engine: &Engine,
    caller: (Connection, u64),
    from: u32,
) -> Result<Vec<Step>, Refusal> {
    let mut runs: Vec<(u32, u32)> = Vec::new();
    let mut next = None;
    let held = engine.stack().first().into_iter().flat_map(|leaf| leaf.rw.blocks_held());
    for block in held.map(|block| block.0).filter(|block| *block >= from) {
        let full = runs.len() == CONTROL_RUNS_MAX;
        match runs.last_mut() {
            Some((first, count)) if *first + *count == block => *count += 1,
            _ if full => {
                next = Some(block);
                break;
            }
            _ => runs.push((block, 1)),
        }
    }
    Ok(vec![answer(caller, Ok(Reply::Blocks { runs, next }))])
}
