//! The core of a tapdisk: the engine, and the service that gives it orders.

use std::collections::{BTreeMap, VecDeque};

use tapdisk_control::{Answer, Call, Refusal, Request as Order, Stats};

use crate::driver::{Core, Effect, PeerId};
use crate::engine::{Completion, Engine, OpId, Output, Request, Token};
use crate::limits::{QUIET_TICK_US, TICK_US};
use crate::service::{Connection, JobResult, Service, Step};

/// What a background job brings back, and to which operation.
pub type JobDone = (Token, JobResult);

/// Engine and service as one [`Core`].
pub struct DataPath {
    engine: Engine,
    service: Service,
    effects: VecDeque<Effect<JobDone>>,
    /// Peers whose call is not answered yet, and whether they are gone.
    asking: BTreeMap<PeerId, bool>,
    now_us: u64,
    last_tick_us: u64,
}

impl DataPath {
    /// Puts the two together.
    #[must_use]
    pub fn new(engine: Engine, service: Service) -> Self {
        Self {
            engine,
            service,
            effects: VecDeque::new(),
            asking: BTreeMap::new(),
            now_us: 0,
            last_tick_us: 0,
        }
    }

    fn take(&mut self, steps: Vec<Step>) {
        for step in steps {
            match step {
                Step::Answer(Connection(peer), answer) => {
                    let last = answer.last;
                    self.effects.push_back(Effect::Answer(PeerId(peer), answer));
                    // What a peer was given after it had gone, such as a pause,
                    // ends here: the service could not end it before.
                    if last && self.asking.remove(&PeerId(peer)) == Some(true) {
                        let steps = self.service.disconnected(Connection(peer));
                        self.take(steps);
                    }
                }
                Step::Command(token, command) => self.engine.command(self.now_us, token, command),
                Step::Job(token, job) => {
                    self.effects.push_back(Effect::Run(Box::new(move || (token, job()))));
                }
                Step::Resized(bytes) => self.effects.push_back(Effect::Resized(bytes)),
                Step::Exit => self.effects.push_back(Effect::Exit),
            }
        }
    }

    /// Whether nothing is under way that [`Core::tick`] would move on.
    fn is_quiet(&self) -> bool {
        self.engine.in_flight() == 0
            && self.engine.record_entries() == 0
            && self.engine.stack().len() < 2
            && self.engine.state_word() == "running"
    }
}

impl Core for DataPath {
    type JobDone = JobDone;

    fn submit(&mut self, now_us: u64, request: Request) {
        self.now_us = now_us;
        self.engine.submit(now_us, request);
    }

    fn complete(&mut self, now_us: u64, op: OpId, completion: Completion) {
        self.now_us = now_us;
        self.engine.complete(now_us, op, completion);
    }

    fn call(&mut self, now_us: u64, PeerId(peer): PeerId, call: Call, counters: &Stats) {
        self.now_us = now_us;
        let Call { id, request } = call;
        if request == (Order::Stop { force: false }) && counters.clients > 0 {
            let detail = format!("{} NBD clients are connected", counters.clients);
            let outcome = Err(Refusal::InUse { detail });
            let answer = Answer { id, last: true, outcome };
            return self.effects.push_back(Effect::Answer(PeerId(peer), answer));
        }
        self.asking.insert(PeerId(peer), false);
        let steps = self.service.call(&self.engine, Connection(peer), id, request, counters);
        self.take(steps);
    }

    fn peer_gone(&mut self, now_us: u64, PeerId(peer): PeerId) {
        self.now_us = now_us;
        if let Some(gone) = self.asking.get_mut(&PeerId(peer)) {
            *gone = true;
        }
        let steps = self.service.disconnected(Connection(peer));
        self.take(steps);
    }

    fn job_done(&mut self, now_us: u64, (token, result): JobDone) {
        self.now_us = now_us;
        let steps = self.service.job_done(token, result);
        self.take(steps);
    }

    fn tick(&mut self, now_us: u64) {
        (self.now_us, self.last_tick_us) = (now_us, now_us);
        self.engine.tick(now_us);
        let steps = self.service.tick(now_us);
        self.take(steps);
    }

    fn tick_due_us(&self) -> Option<u64> {
        let pause_us = if self.is_quiet() { QUIET_TICK_US } else { TICK_US };
        Some(self.last_tick_us.saturating_add(pause_us))
    }

    fn next_effect(&mut self) -> Option<Effect<JobDone>> {
        loop {
            // Answers first: an exit must not overtake them.
            if let Some(effect) = self.effects.pop_front() {
                return Some(effect);
            }
            match self.engine.next_output()? {
                Output::Answer(token, reply) => {
                    let steps = self.service.answered(token, reply, self.now_us);
                    self.take(steps);
                }
                output => return Some(Effect::Engine(output)),
            }
        }
    }
}
