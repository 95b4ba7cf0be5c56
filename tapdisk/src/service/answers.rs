//! Answers, refusals and statistics in the words of the control protocol.

use tapdisk_control::{Answer, ImageRef, MergeStatus, Refusal, Reply, Stats};
use vhd::storage::VolumeName;

use super::{Connection, Step};
use crate::engine::{CommandError, Engine};

pub(super) fn answer((connection, id): (Connection, u64), outcome: Result<Reply, Refusal>) -> Step {
    Step::Answer(connection, Answer { id, last: true, outcome })
}

pub(super) fn more((connection, id): (Connection, u64), reply: Reply) -> Step {
    Step::Answer(connection, Answer { id, last: false, outcome: Ok(reply) })
}

pub(super) fn said(caller: Option<(Connection, u64)>, reply: Reply) -> Vec<Step> {
    caller.map(|caller| answer(caller, Ok(reply))).into_iter().collect()
}

pub(super) fn busy(detail: &str) -> Refusal {
    Refusal::Busy { detail: detail.to_owned() }
}

pub(super) fn stale(detail: &str) -> Refusal {
    Refusal::Stale { detail: detail.to_owned() }
}

/// Why the engine did not do as it was told.
pub(super) fn refusal(error: &CommandError) -> Refusal {
    match error {
        CommandError::Busy(detail) => busy(detail),
        CommandError::Unknown => stale(&error.to_string()),
        CommandError::Failed(detail) => Refusal::Failed { detail: detail.clone() },
        CommandError::Unsettled(detail) => {
            let detail = format!("{detail}; it is still attached: make room, then detach again");
            Refusal::Failed { detail }
        }
    }
}

pub(super) fn volume_name(name: &str) -> Result<VolumeName, Refusal> {
    VolumeName::new(name).ok_or_else(|| Refusal::Bad { detail: format!("{name:?} is not a volume name") })
}

pub(super) fn merge_status(engine: &Engine) -> MergeStatus {
    let (phase, figures) = engine.merge_status();
    MergeStatus {
        phase,
        blocks_total: figures.blocks_total,
        blocks_done: figures.blocks_done,
        bytes_copied: figures.bytes_copied,
        bytes_cloned: figures.bytes_cloned,
        bytes_freed: figures.bytes_freed,
        longest_wait_us: figures.longest_wait_us,
        error: figures.error,
    }
}

pub(super) fn stats(engine: &Engine, counters: &Stats) -> Stats {
    let mut chain =
        engine.images().into_iter().map(|(name, footer)| ImageRef { volume: name.to_string(), footer });
    let leaf = if engine.leaf().is_some() { chain.next() } else { None };
    Stats {
        depth: engine.images().len() as u64,
        chain: leaf.iter().cloned().chain(chain).collect(),
        leaf,
        virtual_bytes: engine.virtual_bytes(),
        read_only: engine.stack().is_empty(),
        held: engine.held() as u64,
        operations: engine.operations() as u64,
        owners: engine.owners(),
        last_pause_us: engine.holds().last_us,
        longest_pause_us: engine.holds().longest_us,
        leaf_blocks: u64::from(engine.leaf_blocks()),
        record_entries: engine.record_entries() as u64,
        state: engine.state_word(),
        ..counters.clone()
    }
}
