//! The stand-in core.

use std::collections::{BTreeSet, HashMap, VecDeque};

use super::*;

/// A core that passes everything on to one file. Reads and writes go in two
/// halves, so that buffers are really shared between workers.
pub(super) struct Plain {
    file: FileId,
    next_op: u64,
    /// Which request an operation belongs to, and how many are left of it.
    ops: HashMap<OpId, RequestId>,
    left: HashMap<RequestId, (u32, Result<(), i32>)>,
    effects: VecDeque<Effect<PeerId>>,
    /// Peers heard of as gone, in the log of `Stats::state`.
    gone: BTreeSet<PeerId>,
    waiting: HashMap<PeerId, u64>,
}

impl Plain {
    pub(super) fn new(file: FileId) -> Self {
        Self {
            file,
            next_op: 0,
            ops: HashMap::new(),
            left: HashMap::new(),
            effects: VecDeque::new(),
            gone: BTreeSet::new(),
            waiting: HashMap::new(),
        }
    }

    fn start(&mut self, request: RequestId, op: Op) {
        let id = OpId(self.next_op);
        self.next_op += 1;
        self.ops.insert(id, request);
        self.effects.push_back(Effect::Engine(Output::Start(id, op)));
    }

    fn answer(&mut self, peer: PeerId, id: u64, outcome: Result<Reply, Refusal>) {
        self.effects.push_back(Effect::Answer(peer, Answer { id, last: true, outcome }));
    }
}

impl Core for Plain {
    type JobDone = PeerId;

    fn submit(&mut self, _: u64, request: Request) {
        let Request { id, kind, offset, len } = request;
        let (file, why) = (self.file, "test");
        let mut ops = Vec::new();
        let half = len / 1024 * 512;
        for (at, len) in [(0, half), (half, len - half)] {
            let range = BufferRange { request: id, at, len };
            let offset = offset + u64::from(at);
            match kind {
                _ if len == 0 => {}
                RequestKind::Read => ops.push(Op::ReadGuest { file, offset, into: range }),
                RequestKind::Write { .. } => {
                    ops.push(Op::WriteGuest { file, offset, from: range });
                }
                _ => {}
            }
        }
        match kind {
            RequestKind::Flush => ops.push(Op::Flush { file, why }),
            RequestKind::Trim { .. } | RequestKind::WriteZeroes { .. } => {
                ops.push(Op::Zero { file, offset, len: len.into(), keep: false, why });
            }
            RequestKind::BlockStatus => {
                let halves = [1, 0].map(|depth| Extent { len: u64::from(len / 2), depth });
                self.effects.push_back(Effect::Engine(Output::Extents(id, halves.to_vec())));
                self.effects.push_back(Effect::Engine(Output::Done(id, Ok(()))));
                return;
            }
            RequestKind::Cache => {
                self.effects.push_back(Effect::Engine(Output::Done(id, Ok(()))));
                return;
            }
            _ => {}
        }
        self.left.insert(id, (ops.len() as u32, Ok(())));
        for op in ops {
            self.start(id, op);
        }
    }

    fn complete(&mut self, _: u64, op: OpId, completion: Completion) {
        let request = self.ops.remove(&op).unwrap();
        let (left, result) = self.left.get_mut(&request).unwrap();
        *left -= 1;
        if let Completion::Failed(errno) = completion {
            *result = Err(errno);
        }
        if *left == 0 {
            let (_, result) = self.left.remove(&request).unwrap();
            self.effects.push_back(Effect::Engine(Output::Done(request, result)));
        }
    }

    fn call(&mut self, _: u64, peer: PeerId, call: Call, counters: &Stats) {
        match call.request {
            ControlRequest::Stats => {
                let state = format!("{:?}", self.gone);
                let stats = Stats { state, ..counters.clone() };
                self.answer(peer, call.id, Ok(Reply::Stats(Box::new(stats))));
            }
            // A background job, to see one run.
            ControlRequest::Settle => {
                self.waiting.insert(peer, call.id);
                self.effects.push_back(Effect::Run(Box::new(move || peer)));
            }
            // Never answered: a peer that waits.
            ControlRequest::MergeStop => {}
            ControlRequest::Stop { .. } => {
                self.answer(peer, call.id, Ok(Reply::Done));
                self.effects.push_back(Effect::Exit);
            }
            _ => self.answer(peer, call.id, Err(Refusal::Voided)),
        }
    }

    fn peer_gone(&mut self, _: u64, peer: PeerId) {
        self.gone.insert(peer);
    }

    fn job_done(&mut self, _: u64, peer: PeerId) {
        let id = self.waiting.remove(&peer).unwrap();
        self.answer(peer, id, Ok(Reply::Done));
    }

    fn tick(&mut self, _: u64) {}

    fn tick_due_us(&self) -> Option<u64> {
        None
    }

    fn next_effect(&mut self) -> Option<Effect<PeerId>> {
        self.effects.pop_front()
    }
}
