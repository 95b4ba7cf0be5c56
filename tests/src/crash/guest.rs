//! Random guest traffic on a simulated tapdisk, with everything it was
//! promised noted in an oracle.

use std::collections::BTreeMap;

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use tapdisk::driver::sim::{Finished, SimTap};
use tapdisk::engine::{RequestId, RequestKind};
use vhd::storage::sim::SimDisk;

use super::oracle::{At, Instant, Oracle, Value, stamp, tracked, unstamp};

/// Most requests in flight.
const DEPTH_MAX: usize = 6;

enum Pending {
    Read { first: u64, began: At },
    Write { sectors: Vec<u64>, value: Value, began: At },
    Flush { began: At },
}

/// A guest, its tapdisk, and what it knows.
pub struct Guest {
    pub tap: SimTap,
    pub oracle: Oracle,
    disk: SimDisk,
    blocks: u64,
    pending: BTreeMap<RequestId, Pending>,
    next_value: Value,
    /// Requests it may still start.
    pub budget: u32,
    /// It only reads, and what it reads is the oracle's disk at this instant.
    pub snapshot: Option<Instant>,
    /// An errno that requests may fail with; what they wrote may be there.
    pub tolerated: Option<i32>,
    /// Flushes that went through.
    flushed: u64,
    rng: SmallRng,
    /// What it read and should not have.
    pub failures: Vec<String>,
}

impl Guest {
    pub fn new(tap: SimTap, disk: SimDisk, blocks: u64, oracle: Oracle, seed: u64) -> Self {
        let rng = SmallRng::seed_from_u64(seed);
        let pending = BTreeMap::new();
        // Values of guests that follow each other on one disk differ.
        let next_value = (seed + 1) << 20;
        Self {
            tap,
            oracle,
            disk,
            blocks,
            pending,
            next_value,
            budget: 0,
            snapshot: None,
            tolerated: None,
            flushed: 0,
            rng,
            failures: Vec::new(),
        }
    }

    /// Maybe starts a request, and lets the tapdisk do one thing.
    pub fn pump(&mut self) {
        if self.budget > 0 && self.pending.len() < DEPTH_MAX && self.rng.random_range(0..3) == 0 {
            self.budget -= 1;
            self.start();
        }
        self.tap.step();
        self.collect();
    }

    /// Lets everything begun come to its end.
    pub fn drain(&mut self) {
        for _ in 0..100_000 {
            if self.pending.is_empty() {
                return;
            }
            self.tap.step();
            self.collect();
        }
        self.failures.push(format!("{} requests were never answered", self.pending.len()));
    }

    /// Pumps until the budget is spent and everything answered.
    pub fn run(&mut self, budget: u32) {
        self.budget = budget;
        while self.budget > 0 {
            self.pump();
        }
        self.drain();
    }

    /// Works on for some steps, then a flush, waited for.
    pub fn busy_then_flush(&mut self, steps: usize) {
        for _ in 0..steps {
            self.pump();
        }
        self.submit_flush();
        self.drain();
    }

    /// [`Self::replace_block`]; then starts a flush, answered or not.
    pub fn replace_block_then_flush(&mut self) {
        self.replace_block();
        self.submit_flush();
    }

    /// Trims a block and writes into it: metadata waits then.
    pub fn replace_block(&mut self) {
        self.trim_block(0);
        self.write_block(0);
    }

    /// Gives up a block, and waits for the answer.
    pub fn trim_block(&mut self, block: u64) {
        self.drain();
        self.submit(RequestKind::Trim { fua: false }, block * 4096, 4096, 0, false, Vec::new());
        self.drain();
    }

    /// Writes the first sector of a block, and waits for the answer.
    pub fn write_block(&mut self, block: u64) {
        self.drain();
        self.begin_write(block);
        self.drain();
    }

    /// Has a block take room, with zeros in it, and waits for the answer.
    pub fn take_block(&mut self, block: u64) {
        self.drain();
        self.submit(RequestKind::Write { fua: false }, block * 4096, 1, 0, false, vec![0; 512]);
        self.drain();
    }

    /// The same as [`Self::write_block`] without waiting.
    pub fn begin_write(&mut self, block: u64) {
        self.next_value += 1;
        let first = block * 4096;
        let bytes = stamp(self.next_value, first).to_vec();
        self.submit(RequestKind::Write { fua: false }, first, 1, self.next_value, false, bytes);
    }

    /// A flush, waited for; whether it went through.
    pub fn try_flush(&mut self) -> bool {
        let before = self.flushed;
        self.submit_flush();
        self.drain();
        self.flushed > before
    }

    /// Lets the tapdisk be for so many steps.
    pub fn idle(&mut self, steps: usize) {
        for _ in 0..steps {
            self.tap.step();
        }
        self.collect();
    }

    /// A number below `sides`, by the seed.
    pub fn toss(&mut self, sides: u32) -> u32 {
        self.rng.random_range(0..sides)
    }

    fn submit_flush(&mut self) {
        let began = self.disk.log_len();
        let id = self.tap.submit(RequestKind::Flush, 0, 0, Vec::new());
        self.pending.insert(id, Pending::Flush { began });
        self.collect();
    }

    fn start(&mut self) {
        if self.snapshot.is_some() {
            return self.read();
        }
        match self.rng.random_range(0..100) {
            0..55 => self.write(false),
            55..65 => self.write(true),
            65..73 => self.zero(),
            73..80 => self.trim(),
            80..90 => self.read(),
            _ => self.submit_flush(),
        }
    }

    /// A run of tracked sectors, sometimes across a block's end.
    fn run_of_sectors(&mut self) -> (u64, u64) {
        let block = self.rng.random_range(0..self.blocks);
        let across = block + 1 < self.blocks && self.rng.random_range(0..8) == 0;
        if across {
            let before = self.rng.random_range(1..5);
            return ((block + 1) * 4096 - before, before + self.rng.random_range(1..5));
        }
        let window = [0, 2044, 4088][self.rng.random_range(0..3)];
        let skip = self.rng.random_range(0..6);
        (block * 4096 + window + skip, self.rng.random_range(1..=8 - skip))
    }

    fn write(&mut self, fua: bool) {
        let (first, count) = self.run_of_sectors();
        self.next_value += 1;
        let value = self.next_value;
        let bytes = (first..first + count).flat_map(|sector| stamp(value, sector)).collect();
        self.submit(RequestKind::Write { fua }, first, count, value, fua, bytes);
    }

    fn zero(&mut self) {
        let (first, count) = self.run_of_sectors();
        let fua = self.rng.random_range(0..4) == 0;
        self.submit(RequestKind::WriteZeroes { fua, no_hole: false }, first, count, 0, fua, Vec::new());
    }

    fn trim(&mut self) {
        let block = self.rng.random_range(0..self.blocks);
        self.submit(RequestKind::Trim { fua: false }, block * 4096, 4096, 0, false, Vec::new());
    }

    fn submit(&mut self, kind: RequestKind, first: u64, count: u64, value: Value, fua: bool, bytes: Vec<u8>) {
        let range = first..first + count;
        let sectors: Vec<u64> = tracked(self.blocks).filter(|sector| range.contains(sector)).collect();
        let began = self.disk.log_len();
        // A trim takes no space on a device, so it may do nothing there.
        match kind {
            RequestKind::Trim { .. } if self.disk.has_devices() => {
                self.oracle.hinted(sectors.iter().copied(), began);
            }
            _ => self.oracle.began(sectors.iter().copied(), value, began, fua),
        }
        let id = self.tap.submit(kind, first * 512, (count * 512) as u32, bytes);
        self.pending.insert(id, Pending::Write { sectors, value, began });
        self.collect();
    }

    fn read(&mut self) {
        let (first, count) = self.run_of_sectors();
        let began = self.disk.log_len();
        let id = self.tap.submit(RequestKind::Read, first * 512, (count * 512) as u32, Vec::new());
        self.pending.insert(id, Pending::Read { first, began });
        self.collect();
    }

    fn collect(&mut self) {
        while let Some(finished) = self.tap.take_finished() {
            self.finished(finished);
        }
    }

    fn finished(&mut self, finished: Finished) {
        let now = self.disk.log_len();
        let Some(pending) = self.pending.remove(&finished.id) else { return };
        if let Err(errno) = finished.result {
            if self.tolerated == Some(errno) {
                return;
            }
            self.failures.push(format!("a request failed with errno {errno}"));
            return;
        }
        match pending {
            Pending::Write { sectors, value, began } => {
                self.oracle.answered(sectors.into_iter(), value, began, now);
            }
            Pending::Flush { began } => {
                self.flushed += 1;
                self.oracle.flushed(began, now);
            }
            Pending::Read { first, began } => {
                for (sector, bytes) in (first..).zip(finished.buffer.chunks(512)) {
                    let allowed = match self.snapshot {
                        Some(instant) => self.oracle.in_snapshot(sector, instant),
                        None => self.oracle.readable(sector, began, now),
                    };
                    match unstamp(bytes, sector) {
                        Ok(value) if allowed.contains(&value) => {}
                        Ok(value) => {
                            self.failures
                                .push(format!("sector {sector} read {value:x}, allowed {allowed:x?}"));
                        }
                        Err(what) => self.failures.push(format!("sector {sector} read {what}")),
                    }
                }
            }
        }
    }
}
