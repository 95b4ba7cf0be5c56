//! The driver of the crash simulator: the same core, on a simulated machine,
//! with operations completed one at a time in an order a seed decides.
//!
//! Nothing runs by itself: every [`SimTap::step`] completes one operation or
//! runs one background job. Guest data lives in plain buffers.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use rand::rngs::SmallRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use tapdisk_control::{Answer, Call, Request as Order, Stats};
use uuid::Uuid;
use vhd::record::{Owner, PendingRecord, RECORD_WORDS, RecordStore, Words};
use vhd::storage::sim::{SimBuffer, SimDisk, SimDone, SimFile, SimOp, SimRequest, SimRun};
use vhd::storage::{CopyKind, CopyRange, Fs, VolumeName, Volumes, Why};

use super::{Core, Effect, PeerId};
use crate::datapath::{DataPath, JobDone};
use crate::disk::{Files, Opener};
use crate::engine::{
    BufferRange, Completion, Extent, FileId, Op, OpId, Output, Request, RequestId, RequestKind,
};
use crate::service::Service;

/// Simulated time between steps, in microseconds.
const STEP_US: u64 = 100;
/// The boot and epoch of every simulated record: a power cut empties the run
/// folder, so nothing else need void them.
const BOOT: Uuid = Uuid::from_u128(0xB007);

/// Pending records in the simulated run folder.
#[derive(Debug, Clone)]
pub struct SimRecords(SimRun);

impl SimRecords {
    /// The records of a simulated machine.
    #[must_use]
    pub fn new(disk: &SimDisk) -> Self {
        Self(disk.run())
    }

    fn name(footer: Uuid) -> String {
        format!("records/{footer}")
    }

    fn owner(footer: Uuid) -> Owner {
        Owner { boot: BOOT, footer, epoch: 1 }
    }
}

#[derive(Debug)]
struct Buffer(SimBuffer);

impl Words for Buffer {
    fn load(&self, index: usize) -> u64 {
        self.0.load(index)
    }

    fn store(&mut self, index: usize, value: u64) {
        self.0.store(index, value);
    }
}

impl RecordStore for SimRecords {
    fn existing(&self, footer: Uuid) -> std::io::Result<Option<PendingRecord>> {
        let buffer = self.0.existing(&Self::name(footer));
        Ok(buffer.and_then(|b| PendingRecord::existing(Box::new(Buffer(b)), Self::owner(footer))))
    }

    fn create(&self, footer: Uuid) -> std::io::Result<PendingRecord> {
        let buffer = self.0.buffer(&Self::name(footer), RECORD_WORDS * 8)?;
        Ok(PendingRecord::format(Box::new(Buffer(buffer)), Self::owner(footer)))
    }

    fn remove(&self, footer: Uuid) -> std::io::Result<()> {
        self.0.remove(&Self::name(footer))
    }
}

/// A guest request that was answered.
#[derive(Debug)]
pub struct Finished {
    /// Which.
    pub id: RequestId,
    /// How; the error is an errno.
    pub result: Result<(), i32>,
    /// Its buffer: what a read brought.
    pub buffer: Vec<u8>,
    /// What a block-status request found.
    pub extents: Vec<Extent>,
}

struct Flying {
    op: OpId,
    sim: SimOp,
    then: Then,
}

/// What comes of an operation after its part in flight.
struct Then {
    into: Option<BufferRange>,
    /// Bytes a copy copies.
    copied_bytes: u64,
    /// What its reads of metadata have brought so far.
    bytes: Vec<u8>,
    /// What follows before the operation is complete.
    rest: VecDeque<(SimRequest, Why)>,
}

/// One tapdisk on a simulated machine.
pub struct SimTap {
    core: DataPath,
    files: Arc<Files>,
    disk: SimDisk,
    flying: Vec<Flying>,
    /// Reported complete before they were (a wait left out).
    late: Vec<SimOp>,
    jobs: VecDeque<Box<dyn FnOnce() -> JobDone + Send>>,
    buffers: BTreeMap<RequestId, (Vec<u8>, Vec<Extent>)>,
    finished: VecDeque<Finished>,
    answers: VecDeque<(PeerId, Answer)>,
    exited: bool,
    next_request: u64,
    now_us: u64,
    rng: SmallRng,
}

impl SimTap {
    /// Opens a chain on the machine.
    ///
    /// # Errors
    /// What is wrong with an image, naming it.
    pub fn open(
        disk: &SimDisk,
        volumes: Arc<dyn Volumes>,
        top: &VolumeName,
        read_only: bool,
        seed: u64,
    ) -> vhd::error::Result<Self> {
        let files = Arc::new(Files::default());
        let records = Arc::new(SimRecords::new(disk));
        let opener = Opener { volumes, records, files: Arc::clone(&files) };
        let (engine, meta) = opener.open(top, read_only)?;
        let service = Service::new(opener, meta.map(|meta| (top.clone(), meta)));
        Ok(Self {
            core: DataPath::new(engine, service),
            files,
            disk: disk.clone(),
            flying: Vec::new(),
            late: Vec::new(),
            jobs: VecDeque::new(),
            buffers: BTreeMap::new(),
            finished: VecDeque::new(),
            answers: VecDeque::new(),
            exited: false,
            next_request: 1,
            now_us: 0,
            rng: SmallRng::seed_from_u64(seed),
        })
    }

    /// Submits a guest request; `buffer` holds what a write writes.
    pub fn submit(&mut self, kind: RequestKind, offset: u64, len: u32, buffer: Vec<u8>) -> RequestId {
        let id = RequestId(self.next_request);
        self.next_request += 1;
        let mut buffer = buffer;
        buffer.resize(len as usize, 0);
        self.buffers.insert(id, (buffer, Vec::new()));
        self.core.submit(self.now_us, Request { id, kind, offset, len });
        self.apply();
        id
    }

    /// Sends a control call.
    pub fn call(&mut self, peer: PeerId, id: u64, request: Order) {
        self.core.call(self.now_us, peer, Call { id, request }, &Stats::default());
        self.apply();
    }

    /// A control peer goes away.
    pub fn peer_gone(&mut self, peer: PeerId) {
        self.core.peer_gone(self.now_us, peer);
        self.apply();
    }

    /// The next answered guest request.
    pub fn take_finished(&mut self) -> Option<Finished> {
        self.finished.pop_front()
    }

    /// The next answer for a control peer.
    pub fn take_answer(&mut self, peer: PeerId) -> Option<Answer> {
        let at = self.answers.iter().position(|(to, _)| *to == peer)?;
        self.answers.remove(at).map(|(_, answer)| answer)
    }

    /// Dies: nothing in flight lands any more, every lock is free.
    pub fn die(&mut self) {
        self.flying.clear();
        self.late.clear();
        self.jobs.clear();
        self.files.close_all();
        self.exited = true;
    }

    /// Whether the process has ended.
    #[must_use]
    pub fn exited(&self) -> bool {
        self.exited
    }

    /// Guest requests not answered yet.
    #[must_use]
    pub fn unanswered(&self) -> usize {
        self.buffers.len()
    }

    /// The engine and its orders, for looking.
    #[must_use]
    pub fn core(&self) -> &DataPath {
        &self.core
    }

    /// Completes one operation or job, or lets time pass. Returns false if
    /// there was nothing but time.
    pub fn step(&mut self) -> bool {
        self.now_us += STEP_US;
        let late = self.rng.random_range(0..8) == 0 && !self.late.is_empty();
        if late {
            let at = self.rng.random_range(0..self.late.len());
            // Nobody hears of it.
            let _ = self.disk.complete(self.late.swap_remove(at));
            return true;
        }
        let choices = self.flying.len() + self.jobs.len();
        if choices == 0 {
            self.now_us += crate::limits::TICK_US;
            self.core.tick(self.now_us);
            self.apply();
            return !self.flying.is_empty();
        }
        let at = self.rng.random_range(0..choices);
        if at < self.flying.len() {
            let flying = self.flying.swap_remove(at);
            self.land(flying);
        } else if let Some(job) = self.jobs.pop_front() {
            let done = job();
            self.core.job_done(self.now_us, done);
        }
        self.apply();
        true
    }

    fn land(&mut self, mut flying: Flying) {
        let completion = match self.disk.complete(flying.sim) {
            Ok(done) if !flying.then.rest.is_empty() => {
                if let SimDone::Bytes(bytes) = done {
                    flying.then.bytes.extend(bytes);
                }
                let next = flying.then.rest.pop_front();
                return self.fly(flying.op, next, flying.then);
            }
            Ok(done) => self.arrived(done, &mut flying.then),
            Err(error) => Completion::Failed(error.raw_os_error().unwrap_or(libc::EIO)),
        };
        self.core.complete(self.now_us, flying.op, completion);
    }

    fn arrived(&mut self, done: SimDone, then: &mut Then) -> Completion {
        match (done, then.into) {
            (SimDone::Bytes(bytes), Some(range)) => {
                if let Some(target) = self.target(range) {
                    target.copy_from_slice(&bytes);
                }
                Completion::Done
            }
            (SimDone::Bytes(bytes), None) => {
                then.bytes.extend(bytes);
                Completion::Bytes(std::mem::take(&mut then.bytes))
            }
            (SimDone::Copied(kind), _) => Completion::Copied {
                shared_bytes: if kind == CopyKind::Cloned { then.copied_bytes } else { 0 },
            },
            (SimDone::Done, _) => Completion::Done,
        }
    }

    fn target(&mut self, range: BufferRange) -> Option<&mut [u8]> {
        let (buffer, _) = self.buffers.get_mut(&range.request)?;
        buffer.get_mut(range.at as usize..(range.at + range.len) as usize)
    }

    fn apply(&mut self) {
        while let Some(effect) = self.core.next_effect() {
            match effect {
                Effect::Answer(peer, answer) => self.answers.push_back((peer, answer)),
                Effect::Run(job) => self.jobs.push_back(job),
                Effect::Resized(_) => {}
                Effect::Exit => self.exited = true,
                Effect::Engine(output) => self.output(output),
            }
        }
    }

    fn output(&mut self, output: Output) {
        match output {
            Output::Start(id, op) => self.start(id, op),
            Output::ZeroFill(range) => {
                if let Some(target) = self.target(range) {
                    target.fill(0);
                }
            }
            Output::Extents(id, extents) => {
                if let Some((_, own)) = self.buffers.get_mut(&id) {
                    *own = extents;
                }
            }
            Output::Done(id, result) => {
                let (buffer, extents) = self.buffers.remove(&id).unwrap_or_default();
                self.finished.push_back(Finished { id, result, buffer, extents });
            }
            Output::Close(file) => self.files.close(file),
            Output::Answer(..) => {}
        }
    }

    fn start(&mut self, op: OpId, what: Op) {
        let into = match &what {
            Op::ReadGuest { into, .. } => Some(*into),
            _ => None,
        };
        let copied_bytes = match &what {
            Op::Copy { ranges, .. } => ranges.iter().map(|range| range.len_bytes).sum(),
            _ => 0,
        };
        let mut rest = self.requests(what);
        let first = rest.pop_front();
        self.fly(op, first, Then { into, copied_bytes, bytes: Vec::new(), rest });
    }

    fn fly(&mut self, op: OpId, request: Option<(SimRequest, Why)>, mut then: Then) {
        match request.and_then(|(request, why)| self.disk.begin(request, why).ok()) {
            Some(sim) if sim.early() && !then.rest.is_empty() => {
                self.late.push(sim);
                let next = then.rest.pop_front();
                self.fly(op, next, then);
            }
            Some(sim) if sim.early() => {
                let completion = match sim.early_answer() {
                    SimDone::Copied(_) => Completion::Copied { shared_bytes: 0 },
                    _ => Completion::Done,
                };
                self.late.push(sim);
                self.core.complete(self.now_us, op, completion);
            }
            Some(sim) => self.flying.push(Flying { op, sim, then }),
            None => self.core.complete(self.now_us, op, Completion::Failed(libc::EIO)),
        }
    }

    fn file(&self, file: FileId) -> Option<SimFile> {
        SimFile::of(self.files.get(file)?.as_ref())
    }

    /// An operation as the machine does it: mostly one request. None if the
    /// file was closed.
    fn requests(&mut self, op: Op) -> VecDeque<(SimRequest, Why)> {
        let rename = |from: &VolumeName, over: &VolumeName| SimRequest::Rename {
            from: from.as_str().to_owned(),
            over: over.as_str().to_owned(),
        };
        match op {
            Op::Swap { new, over, aside, why } if self.disk.has_devices() => {
                let aside = (rename(&over, &aside), "swap: the former leaf steps aside");
                // A swap that failed half way is tried again.
                let there = self.disk.same_file(over.as_str(), over.as_str()).unwrap_or(true);
                let first = there.then_some(aside);
                first.into_iter().chain([(rename(&new, &over), why)]).collect()
            }
            Op::Swap { new, over, why, .. } => VecDeque::from([(rename(&new, &over), why)]),
            Op::Copy { from, to, ranges, .. } => self.copies(from, to, &ranges).unwrap_or_default(),
            Op::ReadPages { file, offsets, len } => {
                let Some(file) = self.file(file) else { return VecDeque::new() };
                let read = |offset: &u64| {
                    (SimRequest::Read { file, offset: *offset, len: len.into() }, "metadata read")
                };
                offsets.iter().map(read).collect()
            }
            Op::WriteMeta { file, parts, why } => {
                let Some(file) = self.file(file) else { return VecDeque::new() };
                let write = |(offset, bytes)| (SimRequest::Write { file, offset, bytes }, why);
                parts.into_iter().map(write).collect()
            }
            op => self.request(op).into_iter().collect(),
        }
    }

    /// A copy of many ranges: they land in any order.
    fn copies(
        &mut self,
        from: FileId,
        to: FileId,
        ranges: &[CopyRange],
    ) -> Option<VecDeque<(SimRequest, Why)>> {
        let (from, to) = (self.file(from)?, self.file(to)?);
        let copy = |range: &CopyRange| {
            let (from_offset, to_offset, len) = (range.from, range.to, range.len_bytes);
            (SimRequest::Copy { from, from_offset, to, to_offset, len }, "merge: copy")
        };
        let mut copies: Vec<_> = ranges.iter().map(copy).collect();
        copies.shuffle(&mut self.rng);
        Some(copies.into())
    }

    fn request(&mut self, op: Op) -> Option<(SimRequest, Why)> {
        Some(match op {
            Op::ReadGuest { file, offset, into } => {
                (SimRequest::Read { file: self.file(file)?, offset, len: u64::from(into.len) }, "guest read")
            }
            Op::ReadMeta { file, offset, len } => {
                (SimRequest::Read { file: self.file(file)?, offset, len: u64::from(len) }, "metadata read")
            }
            Op::WriteGuest { file, offset, from } => {
                let bytes: Arc<[u8]> = self.target(from)?.to_vec().into();
                (SimRequest::Write { file: self.file(file)?, offset, bytes }, "guest write")
            }
            Op::Zero { file, offset, len, keep, why } => {
                (SimRequest::Zero { file: self.file(file)?, offset, len, keep }, why)
            }
            Op::Extend { file, len } => (SimRequest::Extend { file: self.file(file)?, len }, "longer file"),
            Op::Flush { file, why } => (SimRequest::Flush { file: self.file(file)? }, why),
            Op::Copy { .. } | Op::Swap { .. } | Op::WriteMeta { .. } | Op::ReadPages { .. } => return None,
            Op::SyncNames { why } => (SimRequest::SyncNames { folder: String::new() }, why),
        })
    }
}
