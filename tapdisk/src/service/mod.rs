//! The control side of a data path: calls become engine commands and
//! background jobs, their ends become answers.
//!
//! No sockets, threads or clocks: the driver carries [`Step`]s out, so the
//! crash simulator drives the same code.
//!
//! One operation at a time: a second one is refused as busy. Two things span
//! operations: a pause (from `Pause` to `Resume`, or until its lease ends) and
//! a merge (from `MergeStart` to `MergeStop` or `MergeCommit`).

mod answers;
mod ends;
mod growth;
mod pause;
mod places;
mod refresh;

use std::collections::HashMap;

use tapdisk_control::{
    Answer, ImageRef, IntentNames, MERGE_EXTRA_BLOCKS_MAX, Refusal, Reply, Request, Stats,
};
use vhd::meta::Meta;
use vhd::storage::VolumeName;

use self::answers::{answer, busy, merge_status, stale, stats, volume_name};
use crate::disk::{OpenImage, Opener};
use crate::engine::{Command, Engine, FileId, Known, MergeBounds, SettlePlan, Token};

/// A control connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Connection(pub u64);

/// Work that may block; its result goes to [`Service::job_done`].
pub type Job = Box<dyn FnOnce() -> JobResult + Send>;

/// What the driver is to do.
pub enum Step {
    /// Send an answer.
    Answer(Connection, Answer),
    /// Give the engine a command; its answer goes to [`Service::answered`].
    Command(Token, Command),
    /// Run a job off the engine's thread.
    Job(Token, Job),
    /// The disk has this size in bytes from here on.
    Resized(u64),
    /// Everything is settled and answered: end the process.
    Exit,
}

impl std::fmt::Debug for Step {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Answer(connection, answer) => {
                f.debug_tuple("Answer").field(connection).field(answer).finish()
            }
            Self::Command(token, command) => f.debug_tuple("Command").field(token).field(command).finish(),
            Self::Job(token, _) => f.debug_tuple("Job").field(token).finish_non_exhaustive(),
            Self::Resized(bytes) => f.debug_tuple("Resized").field(bytes).finish(),
            Self::Exit => f.write_str("Exit"),
        }
    }
}

/// What a job brought.
#[derive(Debug)]
pub enum JobResult {
    /// An image to swap in.
    Child(Box<Child>),
    /// The parent of a merge and everything below it.
    Parent(Box<OpenImage>, Box<crate::engine::Lower>),
    /// The image under the leaf was settled; read through this file.
    Settled(Box<vhd::chain::Node>, FileId),
    /// The leaf's header names its new parent, durably.
    Reparented(Box<Meta>),
    /// The chain below the leaf, read anew.
    Below(Box<crate::engine::Lower>),
    /// Every image was settled.
    AllSettled,
    /// What became of a leaf that was to grow.
    Grown(growth::Grown),
    /// How the intent of an ended lease was decided.
    Decided {
        /// Whether the swap must happen.
        swap: bool,
    },
    /// It failed.
    Failed(String),
}

/// What an operation does next when its command or job ends.
#[derive(Debug)]
enum Doing {
    Preparing(IntentNames),
    Pausing {
        intent: IntentNames,
        limit_us: u64,
    },
    Resuming {
        swapped: Option<Box<Meta>>,
    },
    /// Another attempt at a swap that failed.
    SwappingNow,
    CleaningBase {
        then: AfterFold,
    },
    SettlingBase,
    Folding,
    Reparenting,
    Rereading,
    Refreshing,
    OpeningParent {
        bounds: MergeBounds,
    },
    StartingMerge {
        parent: Box<Meta>,
        file: FileId,
    },
    StoppingMerge,
    Committing,
    Closing,
    SettlingAll,
    /// A leaf that grows: see [`growth`].
    Growing(growth::Step, u64),
    /// The lease of a pause ended by itself.
    Deciding,
}

/// The image under the leaf that is being settled.
#[derive(Debug, Clone)]
struct AfterFold {
    name: VolumeName,
}

#[derive(Debug)]
struct Operation {
    doing: Doing,
    /// Who gets the answer; nobody for what the tapdisk does by itself.
    caller: Option<(Connection, u64)>,
}

/// An image opened to become the leaf.
#[derive(Debug)]
pub struct Child {
    open: OpenImage,
    /// What the leaf is called then.
    aside: VolumeName,
}

/// A pause in force.
#[derive(Debug)]
struct Lease {
    intent: IntentNames,
    holder: Connection,
    deadline_us: u64,
}

/// See the module.
#[derive(Debug)]
pub struct Service {
    opener: Opener,
    /// Name and metadata of the leaf; `None` when read-only.
    leaf: Option<(VolumeName, Meta)>,
    /// Metadata of the second image of the stack: former leaf, or parent.
    second: Option<Meta>,
    prepared: Option<(IntentNames, Connection, Option<Box<Child>>)>,
    lease: Option<Lease>,
    operations: HashMap<Token, Operation>,
    /// Who asked what stands in nobody's way: where a range lies, what guests
    /// changed.
    lookups: HashMap<Token, (Connection, u64)>,
    next_token: u64,
    /// What the chain below the leaf was known to be when a refresh began.
    known: Vec<Known>,
}

impl Service {
    /// For a data path opened by `opener`; `leaf` as [`Opener::open`] gave it.
    #[must_use]
    pub fn new(opener: Opener, leaf: Option<(VolumeName, Meta)>) -> Self {
        Self {
            opener,
            leaf,
            second: None,
            prepared: None,
            lease: None,
            operations: HashMap::new(),
            lookups: HashMap::new(),
            next_token: 1,
            known: Vec::new(),
        }
    }

    /// A call came in. `counters` is what the driver counts; the rest of the
    /// statistics is filled in here.
    pub fn call(
        &mut self,
        engine: &Engine,
        from: Connection,
        id: u64,
        request: Request,
        counters: &Stats,
    ) -> Vec<Step> {
        let caller = (from, id);
        match self.begin(engine, caller, request, counters) {
            Ok(steps) => steps,
            Err(refusal) => vec![answer(caller, Err(refusal))],
        }
    }

    fn begin(
        &mut self,
        engine: &Engine,
        caller: (Connection, u64),
        request: Request,
        counters: &Stats,
    ) -> Result<Vec<Step>, Refusal> {
        match request {
            Request::Stats => {
                return Ok(vec![answer(caller, Ok(Reply::Stats(Box::new(stats(engine, counters)))))]);
            }
            Request::MergeStatus => return Ok(vec![answer(caller, Ok(Reply::Merge(merge_status(engine))))]),
            Request::Extents { offset, length } => return self.extents(engine, caller, offset, length),
            Request::LeafBlocks { from } => return places::leaf_blocks(engine, caller, from),
            Request::Track { list: id } => return Ok(self.aside(caller, Command::Track { id })),
            Request::Tracked { list: id, from } => {
                return Ok(self.aside(caller, Command::Tracked { id, from }));
            }
            Request::TrackEnd { list: id } => return Ok(self.aside(caller, Command::TrackEnd { id })),
            Request::MergeRate { rate_bytes_per_s } => {
                return Ok(self.aside(caller, Command::MergeRate { rate_bytes_per_s }));
            }
            Request::Settle if !self.is_still() => return Ok(self.aside(caller, Command::WriteBack)),
            // It was decided: whoever asks may have it tried again.
            Request::Resume { swap: true, .. } if engine.is_swapping() => {
                return Ok(self.command(caller, Doing::SwappingNow, Command::SwapNow));
            }
            _ => {}
        }
        if !self.operations.is_empty() {
            return Err(busy("another operation is under way"));
        }
        if self.lease.is_some() && !matches!(request, Request::Resume { .. }) {
            return Err(busy("the disk is paused"));
        }
        match request {
            Request::Stats
            | Request::MergeStatus
            | Request::Extents { .. }
            | Request::LeafBlocks { .. }
            | Request::Track { .. }
            | Request::Tracked { .. }
            | Request::TrackEnd { .. }
            | Request::MergeRate { .. }
            | Request::Settle => Ok(Vec::new()),
            Request::Grow { leaf, virtual_bytes } => self.grow(engine, caller, &leaf, virtual_bytes),
            Request::Prepare { intent, leaf, child, base } => {
                self.prepare(caller, intent, &leaf, child, base.as_deref())
            }
            Request::Pause { intent, limit_ms } => {
                if self.prepared.as_ref().is_none_or(|(prepared, ..)| *prepared != intent) {
                    return Err(stale("nothing was prepared under this intent"));
                }
                let limit_us = limit_ms.saturating_mul(1000);
                Ok(self.command(caller, Doing::Pausing { intent, limit_us }, Command::Pause))
            }
            Request::Resume { intent, swap } => self.resume(caller, &intent, swap),
            Request::SettleBase { base } => self.settle_base(engine, caller, &base),
            Request::Refresh { leaf, parent } => self.refresh(engine, caller, &leaf, parent),
            Request::MergeStart { leaf, parent, rate_bytes_per_s, extra_blocks_max } => {
                let bounds = MergeBounds { rate_bytes_per_s, extra_blocks: extra_blocks_max as usize };
                self.merge_start(caller, &leaf, &parent, bounds)
            }
            Request::MergeStop if engine.merge_status().0 == tapdisk_control::MergePhase::None => {
                // One that was stopped, and whose parent could not be settled.
                let frozen = engine.has_frozen() && self.second_is_parent();
                let done = || vec![answer(caller, Ok(Reply::Done))];
                Ok(if frozen { self.fold_parent(Some(caller)) } else { done() })
            }
            Request::MergeStop => Ok(self.command(caller, Doing::StoppingMerge, Command::MergeStop)),
            Request::MergeCommit { leaf, parent, aside } => {
                self.merge_commit(caller, &leaf, &parent, aside.as_deref())
            }
            Request::Stop { .. } => Ok(self.command(caller, Doing::Closing, Command::Close)),
        }
    }

    /// Whether the engine must stand still: a write-back begun now would write
    /// beside whoever settles or changes the images.
    fn is_still(&self) -> bool {
        let stills =
            |doing: &Doing| matches!(doing, Doing::Closing | Doing::SettlingAll | Doing::Growing(..));
        self.lease.is_some() || self.operations.values().any(|operation| stills(&operation.doing))
    }

    /// Whether the second image is what the leaf stands on.
    fn second_is_parent(&self) -> bool {
        let parent = self.leaf.as_ref().and_then(|(_, meta)| meta.parent.as_ref());
        self.second.as_ref().zip(parent).is_some_and(|(second, parent)| second.uuid() == parent.uuid)
    }

    fn leaf_checked(&self, leaf: &ImageRef) -> Result<&(VolumeName, Meta), Refusal> {
        let Some(own) = &self.leaf else { return Err(stale("this disk is attached read-only")) };
        if own.0.as_str() != leaf.volume || own.1.uuid() != leaf.footer {
            return Err(stale(&format!("the leaf is {} with footer uuid {}", own.0, own.1.uuid())));
        }
        Ok(own)
    }

    fn settle_base(
        &mut self,
        engine: &Engine,
        caller: (Connection, u64),
        base: &ImageRef,
    ) -> Result<Vec<Step>, Refusal> {
        let name = volume_name(&base.volume)?;
        match &self.second {
            Some(meta) if engine.has_frozen() && meta.uuid() == base.footer => {}
            // Settled before: the answer was lost, not the work.
            _ if engine.images().iter().skip(1).any(|(_, footer)| *footer == base.footer) => {
                return Ok(vec![answer(caller, Ok(Reply::Done))]);
            }
            _ => return Err(stale("this image does not wait to be settled")),
        }
        let then = AfterFold { name };
        Ok(self.command(caller, Doing::CleaningBase { then }, Command::Clean { second_only: true }))
    }

    /// The second image is clean: settle it, hidden, and read it as a level.
    fn settle_second(
        &mut self,
        caller: Option<(Connection, u64)>,
        plans: &[SettlePlan],
        then: AfterFold,
    ) -> Vec<Step> {
        let (Some(plan), Some(meta)) = (plans.first().cloned(), self.second.clone()) else {
            return self.fail(caller, "no image waits to be settled");
        };
        let (opener, name) = (self.opener.clone(), then.name.clone());
        let job = move || {
            let mut meta = meta;
            let settled = opener
                .settle(&plan, &mut meta, Some(true))
                .map_err(|e| e.to_string())
                .and_then(|()| opener.as_level(&name, &meta).map_err(|e| format!("{name}: {e}")));
            match settled {
                Ok((node, file)) => JobResult::Settled(Box::new(node), file),
                Err(error) => JobResult::Failed(error),
            }
        };
        self.start_job(caller, Doing::SettlingBase, job)
    }

    fn merge_start(
        &mut self,
        caller: (Connection, u64),
        leaf: &ImageRef,
        parent: &ImageRef,
        bounds: MergeBounds,
    ) -> Result<Vec<Step>, Refusal> {
        let most = MERGE_EXTRA_BLOCKS_MAX as usize;
        if !(1..=most).contains(&bounds.extra_blocks) {
            let detail = format!("{} extra blocks: a merge takes room for 1 to {most}", bounds.extra_blocks);
            return Err(Refusal::Bad { detail });
        }
        let meta = &self.leaf_checked(leaf)?.1;
        if meta.parent.as_ref().is_none_or(|own| own.uuid != parent.footer) {
            return Err(stale("that image is not the leaf's parent"));
        }
        let (name, footer, bytes) = (volume_name(&parent.volume)?, parent.footer, meta.virtual_bytes());
        let opener = self.opener.clone();
        let job = move || {
            let open = match opener.image(&name) {
                Ok(open) => open,
                Err(error) => return JobResult::Failed(error.to_string()),
            };
            let below = if open.meta.uuid() != footer {
                Err(format!("{name} is another image by now"))
            } else if open.meta.virtual_bytes() < bytes {
                Err(format!("{name} is smaller than the leaf and must be grown first"))
            } else {
                opener.below(&name, &open.meta, Vec::new()).map_err(|error| error.to_string())
            };
            match below {
                Ok(lower) => JobResult::Parent(Box::new(open), Box::new(lower)),
                Err(why) => {
                    opener.files.close(open.image.file);
                    JobResult::Failed(why)
                }
            }
        };
        Ok(self.job(caller, Doing::OpeningParent { bounds }, job))
    }

    fn merge_commit(
        &mut self,
        caller: (Connection, u64),
        leaf: &ImageRef,
        parent: &ImageRef,
        aside: Option<&str>,
    ) -> Result<Vec<Step>, Refusal> {
        self.leaf_checked(leaf)?;
        let aside = volume_name(aside.unwrap_or(&parent.volume))?;
        let Some(meta) = self.second.clone().filter(|meta| meta.uuid() == parent.footer) else {
            return Err(stale("no merge into that image is running"));
        };
        let mut footer = meta.footer;
        footer.hidden = false;
        let footer = Box::new(footer.to_bytes());
        Ok(self.command(caller, Doing::Committing, Command::MergeCommit { footer, aside }))
    }

    /// A control connection ended. What it had prepared is dropped; a pause
    /// it held ends.
    pub fn disconnected(&mut self, connection: Connection) -> Vec<Step> {
        if self.lease.as_ref().is_some_and(|lease| lease.holder == connection) {
            return self.lease_ends();
        }
        if self.prepared.as_ref().is_some_and(|(_, holder, _)| *holder == connection)
            && self.operations.is_empty()
        {
            self.drop_prepared();
        }
        Vec::new()
    }

    /// Time passed: a pause over its limit ends.
    pub fn tick(&mut self, now_us: u64) -> Vec<Step> {
        match &self.lease {
            Some(lease) if now_us >= lease.deadline_us => self.lease_ends(),
            _ => Vec::new(),
        }
    }

    fn command(&mut self, caller: (Connection, u64), doing: Doing, command: Command) -> Vec<Step> {
        self.start(Some(caller), doing, command)
    }

    fn job(
        &mut self,
        caller: (Connection, u64),
        doing: Doing,
        job: impl FnOnce() -> JobResult + Send + 'static,
    ) -> Vec<Step> {
        self.start_job(Some(caller), doing, job)
    }

    fn start(&mut self, caller: Option<(Connection, u64)>, doing: Doing, command: Command) -> Vec<Step> {
        vec![Step::Command(self.operation(caller, doing), command)]
    }

    fn start_job(
        &mut self,
        caller: Option<(Connection, u64)>,
        doing: Doing,
        job: impl FnOnce() -> JobResult + Send + 'static,
    ) -> Vec<Step> {
        vec![Step::Job(self.operation(caller, doing), Box::new(job))]
    }

    fn token(&mut self) -> Token {
        let token = Token(self.next_token);
        self.next_token += 1;
        token
    }

    fn operation(&mut self, caller: Option<(Connection, u64)>, doing: Doing) -> Token {
        let token = self.token();
        self.operations.insert(token, Operation { doing, caller });
        token
    }

    fn fail(&mut self, caller: Option<(Connection, u64)>, detail: &str) -> Vec<Step> {
        let refusal = Refusal::Failed { detail: detail.to_owned() };
        caller.map(|caller| answer(caller, Err(refusal))).into_iter().collect()
    }
}
