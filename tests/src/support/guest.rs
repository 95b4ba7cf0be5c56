//! A guest that expects its disk to die: it knows for each 4 KiB what was
//! acknowledged, and what else it may hold because a write was in flight when
//! the disk went away.

use std::collections::HashMap;
use std::time::Duration;

use coppice::demo::stamp::{self, UNIT_BYTES, Value};
use coppice::nbd_client::{Client, Ticket};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::host::Attached;

/// Writes in flight.
const IN_FLIGHT: usize = 12;
/// Longest wait for an answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);
/// Longest write, in units.
const WRITE_UNITS_MAX: u32 = 6;
/// Units of one read when checking.
const READ_UNITS: usize = 64;
/// Units of a block.
const BLOCK_UNITS: u32 = 512;

/// The guest and what it knows.
#[derive(Debug, Clone)]
pub struct Guest {
    held: Vec<Value>,
    /// What else a unit may hold.
    maybe: HashMap<u32, Vec<Value>>,
    next: u32,
    rng: SmallRng,
    /// Writes go into the first so many units of each block only.
    reach: u32,
}

/// A write in flight: what it covers and what it makes it.
type InFlight = HashMap<Ticket, (std::ops::Range<u32>, Value)>;

impl Guest {
    /// A guest of an empty disk of `bytes`.
    pub fn new(bytes: u64, seed: u64) -> Self {
        Self {
            held: vec![Value::ZERO; (bytes / UNIT_BYTES as u64) as usize],
            maybe: HashMap::new(),
            next: 0,
            rng: SmallRng::seed_from_u64(seed),
            reach: 400,
        }
    }

    /// Writes until `stop` says so after some acknowledgement, counted from 1,
    /// or the disk is gone. Returns how many were acknowledged.
    pub fn write(&mut self, at: &Attached, mut stop: impl FnMut(u64) -> bool) -> u64 {
        let Ok(mut client) = Client::connect(&at.socket, &at.export) else { return 0 };
        let mut in_flight = InFlight::new();
        let mut acked = 0;
        let mut stopping = false;
        loop {
            while !stopping && in_flight.len() < IN_FLIGHT {
                if self.send(&mut client, &mut in_flight).is_err() {
                    return self.abandon(in_flight, acked);
                }
            }
            if in_flight.is_empty() {
                client.close();
                return acked;
            }
            let Ok(reply) = client.next(ANSWER_LIMIT) else {
                return self.abandon(in_flight, acked);
            };
            let (units, value) = in_flight.remove(&reply.ticket).unwrap();
            assert_eq!(reply.outcome, Ok(Vec::new()), "a write of {units:?}");
            for unit in units {
                self.held[unit as usize] = value;
                // What was uncertain is overwritten.
                self.maybe.remove(&unit);
            }
            acked += 1;
            stopping = stopping || stop(acked);
        }
    }

    /// Writes whole blocks, in order.
    pub fn fill(&mut self, at: &Attached, blocks: std::ops::Range<u32>) {
        let mut client = Client::connect(&at.socket, &at.export).unwrap();
        let answer = |client: &mut Client| {
            assert_eq!(client.next(ANSWER_LIMIT).unwrap().outcome, Ok(Vec::new()));
        };
        for first in (blocks.start * BLOCK_UNITS..blocks.end * BLOCK_UNITS).step_by(READ_UNITS) {
            self.next += 1;
            let value = Value(self.next);
            let units = first..first + READ_UNITS as u32;
            let mut data = vec![0; READ_UNITS * UNIT_BYTES];
            for (unit, buf) in units.zip(data.chunks_exact_mut(UNIT_BYTES)) {
                stamp::fill(buf, unit, value);
                self.held[unit as usize] = value;
            }
            client.write(u64::from(first) * UNIT_BYTES as u64, &data, false).unwrap();
            if client.in_flight() >= IN_FLIGHT {
                answer(&mut client);
            }
        }
        while client.in_flight() > 0 {
            answer(&mut client);
        }
        client.close();
    }

    fn send(&mut self, client: &mut Client, in_flight: &mut InFlight) -> std::io::Result<()> {
        let units = loop {
            let len = self.rng.random_range(1..=WRITE_UNITS_MAX);
            let block = self.rng.random_range(0..self.held.len() as u32 / 512);
            let start = block * 512 + self.rng.random_range(0..self.reach - len);
            let units = start..start + len;
            if in_flight.values().all(|(o, _)| o.end <= units.start || units.end <= o.start) {
                break units;
            }
        };
        self.next += 1;
        let value = Value(self.next);
        let mut data = vec![0; units.len() * UNIT_BYTES];
        for (unit, buf) in units.clone().zip(data.chunks_exact_mut(UNIT_BYTES)) {
            stamp::fill(buf, unit, value);
        }
        let offset = u64::from(units.start) * UNIT_BYTES as u64;
        match client.write(offset, &data, self.rng.random_ratio(1, 500)) {
            Ok(ticket) => {
                in_flight.insert(ticket, (units, value));
                Ok(())
            }
            Err(error) => {
                // Part of it may have been taken in.
                self.uncertain(units, value);
                Err(error)
            }
        }
    }

    fn abandon(&mut self, in_flight: InFlight, acked: u64) -> u64 {
        for (units, value) in in_flight.into_values() {
            self.uncertain(units, value);
        }
        acked
    }

    fn uncertain(&mut self, units: std::ops::Range<u32>, value: Value) {
        for unit in units {
            self.maybe.entry(unit).or_default().push(value);
        }
    }

    /// Reads everything: each unit holds what was acknowledged last, or a
    /// write that was in flight when the disk died; that is certain from now
    /// on.
    pub fn check(&mut self, at: &Attached) {
        let mut client = Client::connect(&at.socket, &at.export).unwrap();
        for first in (0..self.held.len()).step_by(READ_UNITS) {
            let count = READ_UNITS.min(self.held.len() - first);
            let offset = (first * UNIT_BYTES) as u64;
            client.read(offset, (count * UNIT_BYTES) as u32).unwrap();
            let data = client.next(ANSWER_LIMIT).unwrap().outcome.unwrap();
            for (i, buf) in data.chunks_exact(UNIT_BYTES).enumerate() {
                self.check_unit(first + i, buf);
            }
        }
        client.close();
    }

    /// The same for a whole copy of the disk.
    pub fn check_bytes(&mut self, bytes: &[u8]) {
        assert_eq!(bytes.len(), self.held.len() * UNIT_BYTES, "the length of a copy");
        for (unit, buf) in bytes.chunks_exact(UNIT_BYTES).enumerate() {
            self.check_unit(unit, buf);
        }
    }

    fn check_unit(&mut self, unit: usize, buf: &[u8]) {
        let acked = self.held[unit];
        let maybe = self.maybe.remove(&(unit as u32)).unwrap_or_default();
        let found = stamp::read(buf, unit as u32);
        match found {
            Some(value) if value == acked || maybe.contains(&value) => self.held[unit] = value,
            // A write of 4 KiB torn between sectors is a third value too:
            // each sector is the old one or a new one.
            _ => {
                let mut want = vec![vec![0; UNIT_BYTES]; 1 + maybe.len()];
                for (want, value) in want.iter_mut().zip(std::iter::once(&acked).chain(&maybe)) {
                    stamp::fill(want, unit as u32, *value);
                }
                let torn = (0..UNIT_BYTES)
                    .step_by(512)
                    .all(|at| want.iter().any(|want| want[at..at + 512] == buf[at..at + 512]));
                assert!(
                    torn && !maybe.is_empty(),
                    "unit {unit} holds {found:?}; acknowledged {acked:?}, in flight {maybe:?}"
                );
                self.maybe.insert(unit as u32, maybe);
            }
        }
    }
}
