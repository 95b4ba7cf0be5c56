//! A trace of requests, the same for the same seed, on several connections at
//! once: what each read returns is what had been written.
//!
//! A request waits only for those under way that it overlaps, if one of the
//! two changes the disk; so at any time there is exactly one right answer to
//! each read, though requests and answers pass each other freely.

use std::collections::{HashMap, VecDeque};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};

use nix::sys::signal::Signal;
use rand::rngs::SmallRng;
use rand::{Rng, RngCore, SeedableRng};

use super::peer::*;
use super::support::*;

/// Connections, and requests of each that may be under way.
const CONNECTIONS: usize = 4;
const DEPTH: usize = 24;
/// Requests of one trace.
const REQUESTS: u64 = 2500;

/// One request of the trace.
#[derive(Debug, Clone, Copy)]
struct Step {
    connection: usize,
    command: u16,
    flags: u16,
    offset: u64,
    len: u32,
}

impl Step {
    /// The next one: mostly where others are, of many sizes, a quarter of
    /// them on no boundary.
    fn random(rng: &mut SmallRng) -> Self {
        let connection = rng.random_range(0..CONNECTIONS);
        let command = match rng.random_range(0..100) {
            0..4 => FLUSH,
            4..7 => TRIM,
            7..11 => WRITE_ZEROES,
            11..50 => WRITE,
            _ => READ,
        };
        if command == FLUSH {
            return Self { connection, command, flags: 0, offset: 0, len: 0 };
        }
        let sizes = [512, 1024, 4096, 4096, 4096, 20 << 10, 64 << 10, 300 << 10];
        let mut len: u32 = sizes[rng.random_range(0..sizes.len())];
        let reach = if rng.random_range(0..3) > 0 { 3 << 20 } else { DISK_BYTES };
        let mut offset = rng.random_range(0..(reach - u64::from(len)) / 512) * 512;
        // A trim is a hint, and what it does to parts of sectors is open.
        if command != TRIM && rng.random_range(0..4) == 0 {
            offset += rng.random_range(1..512);
            len -= rng.random_range(1..512);
        }
        let flags = if command != READ && rng.random_range(0..20) == 0 { FUA } else { 0 };
        Self { connection, command, flags, offset, len }
    }

    fn changes(&self) -> bool {
        [WRITE, TRIM, WRITE_ZEROES].contains(&self.command)
    }

    /// Whether it must wait until `other` was answered.
    fn meets(&self, other: &Self) -> bool {
        let end = |step: &Self| step.offset + u64::from(step.len);
        let apart = self.offset >= end(other) || other.offset >= end(self);
        (self.changes() || other.changes()) && !apart
    }

    fn range(&self) -> std::ops::Range<usize> {
        self.offset as usize..self.offset as usize + self.len as usize
    }
}

/// The reads under way on one connection, for whoever takes its answers.
type Reads = Arc<Mutex<HashMap<u64, (u64, u32)>>>;

/// One connection: this end asks, a thread hands its answers on.
struct Line {
    peer: Peer,
    reads: Reads,
    /// Requests under way, in the order they were sent.
    sent: VecDeque<u64>,
}

impl Line {
    fn new(place: &Place, structured: bool, answers: Sender<Answer>) -> Self {
        let (peer, _) = Peer::ready(place, structured);
        let reads = Reads::default();
        let mut hears = peer.again();
        let known = Arc::clone(&reads);
        std::thread::spawn(move || {
            while let Ok(answer) = hears.answer(|cookie| known.lock().unwrap().get(&cookie).copied()) {
                known.lock().unwrap().remove(&answer.cookie);
                if answers.send(answer).is_err() {
                    break;
                }
            }
        });
        Self { peer, reads, sent: VecDeque::new() }
    }
}

/// A run of the trace, and what the disk must hold.
struct Run {
    seed: u64,
    lines: Vec<Line>,
    answers: Receiver<Answer>,
    under_way: HashMap<u64, Step>,
    model: Vec<u8>,
    /// Answers that came before one to an earlier request of their connection.
    overtook: u64,
}

impl Run {
    fn new(place: &Place, seed: u64, model: Vec<u8>) -> Self {
        let (answered, answers) = channel();
        let lines = (0..CONNECTIONS).map(|n| Line::new(place, n % 2 == 1, answered.clone())).collect();
        Self { seed, lines, answers, under_way: HashMap::new(), model, overtook: 0 }
    }

    /// Waits until `step` may go, and sends it under the name `cookie`.
    fn send(&mut self, cookie: u64, step: Step) {
        while self.lines[step.connection].sent.len() >= DEPTH
            || self.under_way.values().any(|other| step.meets(other))
        {
            self.hear();
        }
        let mut data = Vec::new();
        if step.command == WRITE {
            data.resize(step.len as usize, 0);
            SmallRng::seed_from_u64(cookie).fill_bytes(&mut data);
            self.model[step.range()].copy_from_slice(&data);
        } else if step.changes() {
            self.model[step.range()].fill(0);
        }
        let line = &mut self.lines[step.connection];
        if step.command == READ {
            line.reads.lock().unwrap().insert(cookie, (step.offset, step.len));
        }
        line.sent.push_back(cookie);
        self.under_way.insert(cookie, step);
        let range = (step.offset, step.len);
        line.peer.ask([step.flags, step.command], cookie, range, &data).unwrap();
    }

    /// Takes one answer, and compares.
    fn hear(&mut self) {
        let seed = self.seed;
        let answer = self.answers.recv().unwrap_or_else(|_| panic!("seed {seed}: no answer any more"));
        let Some(step) = self.under_way.remove(&answer.cookie) else {
            panic!("seed {seed}: {} was answered twice or never asked", answer.cookie)
        };
        assert_eq!(answer.error, 0, "seed {seed}, request {}: {step:?}", answer.cookie);
        let sent = &mut self.lines[step.connection].sent;
        let place = sent.iter().position(|cookie| *cookie == answer.cookie);
        let place = place.unwrap_or_else(|| panic!("seed {seed}: {step:?} answered on another connection"));
        sent.remove(place);
        self.overtook += u64::from(place > 0);
        if step.command == READ {
            let right = answer.data == self.model[step.range()];
            assert!(right, "seed {seed}, request {}: {step:?} reads what was not written", answer.cookie);
        }
    }
}

/// Plays the trace of `seed`; then all is compared over a new connection, and
/// again with a tapdisk that follows a killed one.
fn play(place: &Place, driver: &str, seed: u64, model: Vec<u8>) {
    let (tapdisk, said) = place.start(&["--driver", driver]);
    if said["ready"] != true && driver == "uring" && std::env::var_os("CI").is_none() {
        eprintln!("SKIPPED: no ring here: {said}");
        return;
    }
    assert_eq!(said["ready"], true, "{said}");
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut run = Run::new(place, seed, model);
    let mut flushes = 0;
    for cookie in 1..=REQUESTS {
        let step = Step::random(&mut rng);
        flushes += u64::from(step.command == FLUSH);
        run.send(cookie, step);
    }
    while !run.under_way.is_empty() {
        run.hear();
    }
    assert!(run.overtook > 0, "seed {seed}: every answer came in turn, so nothing was tried");
    assert_eq!(place.stats().flush.count, flushes);
    holds(place, seed, &run.model);
    tapdisk.end(Signal::SIGKILL);
    let _again = place.ready();
    holds(place, seed, &run.model);
}

fn holds(place: &Place, seed: u64, model: &[u8]) {
    let mut socket = place.nbd();
    for (n, part) in model.chunks(1 << 20).enumerate() {
        assert!(read(&mut socket, (n as u64) << 20, 1 << 20) == part, "seed {seed}: MiB {n} differs");
    }
}

/// On a disk that is empty.
fn on_an_empty_disk(driver: &str) {
    for seed in 1..=2 {
        play(&Place::new(), driver, seed, vec![0; DISK_BYTES as usize]);
    }
}

/// Over a base that has one block and a part of another.
fn over_a_base(driver: &str) {
    for seed in 3..=4 {
        let mut model = vec![0; DISK_BYTES as usize];
        model[..2 << 20].fill(1);
        model[(4 << 20) + 4096..(4 << 20) + 8192].fill(2);
        play(&Place::with_parent(), driver, seed, model);
    }
}

#[test]
fn a_trace_on_an_empty_disk_reads_what_it_wrote_through_the_ring() {
    on_an_empty_disk("uring");
}

#[test]
fn a_trace_on_an_empty_disk_reads_what_it_wrote_through_threads() {
    on_an_empty_disk("threads");
}

#[test]
fn a_trace_over_a_base_reads_what_it_wrote_through_the_ring() {
    over_a_base("uring");
}

#[test]
fn a_trace_over_a_base_reads_what_it_wrote_through_threads() {
    over_a_base("threads");
}
