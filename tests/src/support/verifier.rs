//! A guest that checks its disk and outlives it: requests of all kinds and
//! sizes, many in flight; when the disk goes away it knows what may be there.

use std::collections::HashMap;
use std::ops::Range;
use std::time::Duration;

use coppice::nbd_client::{Client, Reply, Ticket};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::host::Attached;
use super::sectors::{SECTOR_BYTES, Sectors, Value, fill};

/// Requests in flight.
const IN_FLIGHT: usize = 24;
/// Longest wait for an answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);
/// Longest read or write, in sectors.
const SECTORS_MAX: u32 = 256;
/// Sectors of a block.
const BLOCK_SECTORS: u32 = 4096;
/// Places tried for a request that meets no other.
const PLACE_TRIES_MAX: u32 = 50;
/// Bytes of one read when all is checked.
const CHECK_BYTES: u32 = 256 << 10;

/// A request in flight.
#[derive(Debug, Clone)]
enum Asked {
    Read(Range<u32>),
    /// Makes the sectors this value; with `fua` durable when answered.
    Write {
        sectors: Range<u32>,
        value: Value,
        fua: bool,
    },
    Zero(Range<u32>),
    Trim(Range<u32>),
    Flush,
}

impl Asked {
    fn sectors(&self) -> Range<u32> {
        match self {
            Self::Read(sectors) | Self::Write { sectors, .. } | Self::Zero(sectors) | Self::Trim(sectors) => {
                sectors.clone()
            }
            Self::Flush => 0..0,
        }
    }
}

/// How many requests were answered, by kind.
#[derive(Debug, Default, Clone, Copy)]
pub struct Tally {
    pub reads: u64,
    pub writes: u64,
    pub zeroes: u64,
    pub trims: u64,
    pub flushes: u64,
}

impl Tally {
    /// All of them.
    pub fn all(&self) -> u64 {
        self.reads + self.writes + self.zeroes + self.trims + self.flushes
    }
}

/// What a power cut may leave: grown by every request sent, replaced by every
/// flush answered.
#[derive(Debug)]
struct Power {
    flushed: Sectors,
    /// The flush in flight that will replace it, and with what.
    flushing: Option<(Ticket, Sectors)>,
}

impl Power {
    fn models(&mut self) -> impl Iterator<Item = &mut Sectors> {
        std::iter::once(&mut self.flushed).chain(self.flushing.as_mut().map(|(_, model)| model))
    }
}

/// See the module.
#[derive(Debug)]
pub struct Verifier {
    /// What the disk holds.
    pub sectors: Sectors,
    /// What was answered, ever.
    pub tally: Tally,
    /// What a snapshot taken since may hold.
    window: Option<Sectors>,
    /// What a power cut may leave.
    power: Power,
    next: Value,
    rng: SmallRng,
    in_flight: HashMap<Ticket, Asked>,
}

impl Verifier {
    /// A guest of an empty disk of `bytes`.
    pub fn new(bytes: u64, seed: u64) -> Self {
        Self {
            sectors: Sectors::new(bytes),
            tally: Tally::default(),
            window: None,
            power: Power { flushed: Sectors::new(bytes), flushing: None },
            next: 0,
            rng: SmallRng::seed_from_u64(seed),
            in_flight: HashMap::new(),
        }
    }

    /// Works until `stop` says so, which is asked before each wait for an
    /// answer, or until the disk is gone. Returns whether it is still there.
    pub fn work(&mut self, at: &Attached, mut stop: impl FnMut(&mut Self) -> bool) -> bool {
        let Ok(mut client) = Client::connect(&at.socket, &at.export) else { return false };
        loop {
            let stopping = stop(self);
            while !stopping && self.in_flight.len() < IN_FLIGHT {
                let Some(asked) = self.choose() else { break };
                if self.send(&mut client, asked).is_err() {
                    return self.abandon();
                }
            }
            if self.in_flight.is_empty() {
                client.close();
                return true;
            }
            match client.next(ANSWER_LIMIT) {
                Ok(reply) => self.answered(reply),
                Err(error) if error.kind() == std::io::ErrorKind::TimedOut => {
                    panic!("no answer in {ANSWER_LIMIT:?} to {:?}", self.in_flight.values());
                }
                Err(_) => return self.abandon(),
            }
        }
    }

    /// A snapshot is about to be asked for.
    pub fn window_opens(&mut self) {
        self.window = Some(self.now());
    }

    /// What each sector may hold, requests in flight included.
    fn now(&self) -> Sectors {
        let mut sectors = self.sectors.clone();
        for asked in self.in_flight.values() {
            uncertain(&mut sectors, asked);
        }
        sectors
    }

    /// All of the disk is durable: it was settled.
    pub fn settled(&mut self) {
        self.power = Power { flushed: self.sectors.clone(), flushing: None };
    }

    /// The power was cut: each sector holds what it held at the last flush
    /// that was answered, or anything written since that was sent (invariant 2).
    pub fn power_cut(&mut self) {
        self.abandon();
        self.sectors = self.power.flushed.clone();
    }

    /// The snapshot was answered: what it may hold is what was acknowledged
    /// before it was asked for, or anything asked for since or in flight then.
    pub fn window_closes(&mut self) -> Sectors {
        self.window.take().unwrap()
    }

    /// A request for which no other in flight is read or written: else the
    /// order of the two would have to be known.
    fn choose(&mut self) -> Option<Asked> {
        let kind = self.rng.random_range(0..1000u32);
        for _ in 0..PLACE_TRIES_MAX {
            let sectors = self.place(kind);
            let free = |other: &Asked| {
                let other = other.sectors();
                other.end <= sectors.start || sectors.end <= other.start
            };
            if !self.in_flight.values().all(free) {
                continue;
            }
            return Some(match kind {
                0..5 => Asked::Flush,
                5..200 => Asked::Read(sectors),
                200..250 => Asked::Zero(sectors),
                250..300 => Asked::Trim(sectors),
                _ => {
                    self.next += 1;
                    Asked::Write { sectors, value: self.next, fua: self.rng.random_ratio(1, 300) }
                }
            });
        }
        None
    }

    /// Any size and place; half of the requests are what filesystems send,
    /// whole units of 4 KiB, and some trims take whole blocks.
    fn place(&mut self, kind: u32) -> Range<u32> {
        let all = self.sectors.len();
        if (200..300).contains(&kind) && self.rng.random_ratio(1, 4) {
            let block = self.rng.random_range(0..all / BLOCK_SECTORS) * BLOCK_SECTORS;
            // The client's longest request is half of it.
            let half = self.rng.random_range(0..2) * (BLOCK_SECTORS / 2);
            return block + half..block + half + BLOCK_SECTORS / 2;
        }
        let (len, align) = match self.rng.random_range(0..4) {
            0 => (8, 8),
            1 => (self.rng.random_range(1..=8) * 8, 8),
            2 => (self.rng.random_range(1..=16), 1),
            _ => (self.rng.random_range(1..=SECTORS_MAX), 1),
        };
        let start = self.rng.random_range(0..=all - len) / align * align;
        start..start + len
    }

    fn send(&mut self, client: &mut Client, asked: Asked) -> std::io::Result<()> {
        for model in self.window.iter_mut().chain(self.power.models()) {
            uncertain(model, &asked);
        }
        let sectors = asked.sectors();
        let offset = u64::from(sectors.start) * SECTOR_BYTES as u64;
        let len = sectors.len() as u32 * SECTOR_BYTES as u32;
        let sent = match &asked {
            Asked::Flush => client.flush(),
            Asked::Read(_) => client.read(offset, len),
            Asked::Zero(_) => client.write_zeroes(offset, len),
            Asked::Trim(_) => client.trim(offset, len),
            Asked::Write { value, fua, .. } => {
                let mut data = vec![0; len as usize];
                fill(&mut data, sectors.start, *value);
                client.write(offset, &data, *fua)
            }
        };
        match sent {
            Ok(ticket) => {
                if matches!(asked, Asked::Flush) && self.power.flushing.is_none() {
                    self.power.flushing = Some((ticket, self.now()));
                }
                self.in_flight.insert(ticket, asked);
                Ok(())
            }
            Err(error) => {
                // Part of it may have been taken in.
                uncertain(&mut self.sectors, &asked);
                Err(error)
            }
        }
    }

    fn answered(&mut self, reply: Reply) {
        let asked = self.in_flight.remove(&reply.ticket).unwrap();
        let data = reply.outcome.unwrap_or_else(|errno| panic!("error {errno} to {asked:?}"));
        match asked {
            Asked::Read(sectors) => {
                self.tally.reads += 1;
                assert_eq!(data.len(), sectors.len() * SECTOR_BYTES);
                self.sectors.check(sectors.start, &data).unwrap_or_else(|wrong| panic!("{}", wrong.0));
            }
            Asked::Write { sectors, value, fua } => {
                self.tally.writes += 1;
                if fua {
                    self.power.models().for_each(|model| model.acknowledge(sectors.clone(), value));
                }
                self.sectors.acknowledge(sectors, value);
            }
            Asked::Zero(sectors) => {
                self.tally.zeroes += 1;
                self.sectors.acknowledge(sectors, 0);
            }
            Asked::Trim(sectors) => {
                self.tally.trims += 1;
                self.sectors.may_hold(sectors, 0);
            }
            Asked::Flush => {
                self.tally.flushes += 1;
                if let Some((_, flushed)) = self.power.flushing.take_if(|(asked, _)| *asked == reply.ticket) {
                    self.power.flushed = flushed;
                }
            }
        }
    }

    fn abandon(&mut self) -> bool {
        self.power.flushing = None;
        for (_, asked) in self.in_flight.drain() {
            uncertain(&mut self.sectors, &asked);
        }
        false
    }

    /// Reads everything and holds it against what must be there. Returns
    /// whether the disk lived through it.
    pub fn check(&mut self, at: &Attached) -> bool {
        check_all(&mut self.sectors, at)
    }
}

/// As [`Verifier::check`], for any model.
pub fn check_all(sectors: &mut Sectors, at: &Attached) -> bool {
    let Ok(mut client) = Client::connect(&at.socket, &at.export) else { return false };
    let step = CHECK_BYTES / SECTOR_BYTES as u32;
    let mut places = HashMap::new();
    let mut next = 0;
    loop {
        while next < sectors.len() && places.len() < IN_FLIGHT {
            let len = step.min(sectors.len() - next) * SECTOR_BYTES as u32;
            let Ok(ticket) = client.read(u64::from(next) * SECTOR_BYTES as u64, len) else { return false };
            places.insert(ticket, next);
            next += step;
        }
        if places.is_empty() {
            client.close();
            return true;
        }
        let Ok(reply) = client.next(ANSWER_LIMIT) else { return false };
        let first = places.remove(&reply.ticket).unwrap();
        let data = reply.outcome.unwrap_or_else(|errno| panic!("error {errno} to a read at {first}"));
        sectors.check(first, &data).unwrap_or_else(|wrong| panic!("{}", wrong.0));
    }
}

/// Whatever a request does may have happened or not.
fn uncertain(sectors: &mut Sectors, asked: &Asked) {
    match asked {
        Asked::Write { sectors: at, value, .. } => sectors.may_hold(at.clone(), *value),
        Asked::Zero(at) | Asked::Trim(at) => sectors.may_hold(at.clone(), 0),
        Asked::Read(_) | Asked::Flush => {}
    }
}
