//! A leaf that grows while it is served.
//!
//! ```text
//!   Clean       what waits for a flush is written, while requests go on
//!   Hold        requests drain and wait; the little that came since is
//!               written; nothing is in flight
//!   (job)       vhd::resize::grow on the volume, and its tables read anew
//!   Resume      the engine takes them; requests go on
//! ```
//!
//! The stall is Hold and the job: what is in flight, one write-back, at most
//! five blocks copied ([`vhd::resize::make_room`]) and some ten flushes.
//!
//! Crash argument: the record is empty from Hold on, so what a killed holder
//! leaves is what the job had done, each state of which is a sound image of
//! the old size or the new one. A job that fails is followed by reading the
//! tables all the same, as it may have moved blocks by then; if not even that
//! works the disk refuses everything until it was reopened, rather than
//! finding blocks at places that may be somebody else's.

use std::sync::Arc;

use tapdisk_control::{ImageRef, Refusal, Reply};
use vhd::error::Error;
use vhd::meta::Meta;
use vhd::resize;
use vhd::rw::RwImage;
use vhd::storage::Volume;
use vhd::units::{BLOCK_BYTES, VIRTUAL_BYTES_MAX};
use vhd::writer::reopen;

use super::answers::{answer, busy, stale};
use super::{Connection, Doing, JobResult, Service};
use crate::engine::{Command, CommandError, Engine};

/// How far a growth is: what was asked of the engine.
#[derive(Debug)]
pub enum Step {
    /// To write back what waits.
    Clean(Arc<dyn Volume>),
    /// To hold requests.
    Hold(Arc<dyn Volume>),
    /// Nothing: a job changes the volume.
    Change,
    /// To take the tables and go on; then this is answered.
    Resume(Result<(), Refusal>),
}

/// What a job made of the leaf.
#[derive(Debug)]
pub struct Grown {
    /// The leaf as it is now; `None` if that could not be read.
    now: Option<Box<(Meta, RwImage)>>,
    outcome: Result<(), Refusal>,
}

impl Service {
    pub(super) fn grow(
        &mut self,
        engine: &Engine,
        caller: (Connection, u64),
        leaf: &ImageRef,
        virtual_bytes: u64,
    ) -> Result<Vec<super::Step>, Refusal> {
        let now_bytes = self.leaf_checked(leaf)?.1.virtual_bytes();
        if virtual_bytes == now_bytes {
            return Ok(vec![answer(caller, Ok(Reply::Done))]);
        }
        if virtual_bytes < now_bytes
            || virtual_bytes > VIRTUAL_BYTES_MAX
            || !virtual_bytes.is_multiple_of(BLOCK_BYTES)
        {
            let detail = format!("from {now_bytes} bytes a disk does not grow to {virtual_bytes}");
            return Err(Refusal::Bad { detail });
        }
        let [image] = engine.stack() else {
            return Err(busy("a merge is running, or a former leaf is not settled yet"));
        };
        let volume =
            self.opener.files.get(image.file).ok_or_else(|| stale("the leaf is not open for writing"))?;
        let doing = Doing::Growing(Step::Clean(volume), virtual_bytes);
        Ok(self.command(caller, doing, Command::Clean { second_only: false }))
    }

    /// The engine did what a step asks.
    pub(super) fn growth_goes_on(
        &mut self,
        caller: Option<(Connection, u64)>,
        step: Step,
        virtual_bytes: u64,
    ) -> Vec<super::Step> {
        match step {
            Step::Clean(volume) => {
                self.start(caller, Doing::Growing(Step::Hold(volume), virtual_bytes), Command::Close)
            }
            Step::Hold(volume) => {
                let job = move || JobResult::Grown(change(volume.as_ref(), virtual_bytes));
                self.start_job(caller, Doing::Growing(Step::Change, virtual_bytes), job)
            }
            Step::Change => Vec::new(),
            Step::Resume(outcome) => {
                let outcome = outcome.map(|()| Reply::Done);
                caller.map(|caller| answer(caller, outcome)).into_iter().collect()
            }
        }
    }

    /// The job ended, one way or another: the engine goes on with what is.
    pub(super) fn grown(&mut self, caller: Option<(Connection, u64)>, grown: Grown) -> Vec<super::Step> {
        let Some(now) = grown.now else {
            let doing = Doing::Growing(Step::Resume(grown.outcome), 0);
            return self.start(caller, doing, Command::Changed { rw: None, virtual_bytes: 0 });
        };
        let (meta, rw) = *now;
        let virtual_bytes = meta.virtual_bytes();
        if let Some((_, leaf)) = &mut self.leaf {
            *leaf = meta;
        }
        let doing = Doing::Growing(Step::Resume(grown.outcome), virtual_bytes);
        let command = Command::Changed { rw: Some(Box::new(rw)), virtual_bytes };
        let mut steps = vec![super::Step::Resized(virtual_bytes)];
        steps.extend(self.start(caller, doing, command));
        steps
    }

    /// A step was refused, or failed: a disk that is held goes on.
    pub(super) fn growth_failed(
        &mut self,
        caller: Option<(Connection, u64)>,
        step: &Step,
        error: &CommandError,
    ) -> Vec<super::Step> {
        let refusal = match error {
            CommandError::Busy(detail) => busy(detail),
            CommandError::Unknown => super::answers::stale(&error.to_string()),
            CommandError::Failed(detail) | CommandError::Unsettled(detail) => {
                Refusal::Failed { detail: detail.clone() }
            }
        };
        let held = matches!((step, error), (Step::Hold(_), CommandError::Failed(_)));
        if held {
            let doing = Doing::Growing(Step::Resume(Err(refusal)), 0);
            return self.start(caller, doing, Command::Resume { swap: None });
        }
        caller.map(|caller| answer(caller, Err(refusal))).into_iter().collect()
    }
}

fn change(volume: &dyn Volume, virtual_bytes: u64) -> Grown {
    let grown = Meta::read(volume).and_then(|mut meta| resize::grow(volume, &mut meta, virtual_bytes));
    let outcome = grown.map_err(|error| refusal(&error));
    match reopen(volume) {
        Ok(now) => Grown { now: Some(Box::new(now)), outcome },
        Err(error) => {
            let detail = format!("its tables cannot be read: {error}; detach and attach it again");
            Grown { now: None, outcome: Err(Refusal::Failed { detail }) }
        }
    }
}

fn refusal(error: &Error) -> Refusal {
    let detail = format!("growing the leaf: {error}");
    match error {
        Error::Io(io) if io.kind() == std::io::ErrorKind::StorageFull => Refusal::NoSpace { detail },
        _ => Refusal::Failed { detail },
    }
}
