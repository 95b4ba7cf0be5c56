//! The guest of the demo: writes, reads, zeroes and flushes, always
//! [`IN_FLIGHT`] at once, on a thread of its own until it is told to stop.
//!
//! Every read is checked against the oracle as it comes back; every answer
//! goes into the [`Tally`] that the report is made from.

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::oracle::Oracle;
use super::stamp::{self, UNIT_BYTES, Value};
use super::tally::Tally;
use crate::nbd_client::{Client, Reply, Ticket};

/// Requests kept in flight.
pub const IN_FLIGHT: usize = 16;
/// Longest wait for an answer before the run has failed.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);
/// Units of one VHD block.
pub const BLOCK_UNITS: u32 = (2 << 20) / UNIT_BYTES as u32;
/// Every how many blocks a hot one lies, into which most requests go: this
/// bounds what the demo takes on disk while it spans the whole disk.
const HOT_EVERY: u32 = 4;
/// One request in so many goes anywhere.
const ANYWHERE_ONE_IN: u32 = 64;
/// Longest request, in units.
const REQUEST_UNITS_MAX: u32 = 8;
/// Places tried for a request that meets no other, before the run has failed.
const PLACE_TRIES_MAX: u32 = 10_000;

/// What is shared with the thread of the load.
#[derive(Debug)]
struct Shared {
    oracle: Mutex<Oracle>,
    tally: Mutex<Tally>,
    stop: AtomicBool,
}

/// A running load.
#[derive(Debug)]
pub struct Load {
    shared: Arc<Shared>,
    thread: JoinHandle<Result<(), String>>,
}

impl Load {
    /// Connects and begins; the disk is all zero.
    ///
    /// # Errors
    /// The connection could not be made.
    pub fn start(socket: &Path, export: &str, seed: u64) -> std::io::Result<Self> {
        let client = Client::connect(socket, export)?;
        let units = u32::try_from(client.size_bytes() / UNIT_BYTES as u64).map_err(std::io::Error::other)?;
        let shared = Arc::new(Shared {
            oracle: Mutex::new(Oracle::new(units)),
            tally: Mutex::new(Tally::new()),
            stop: AtomicBool::new(false),
        });
        let guest = Guest {
            client,
            shared: Arc::clone(&shared),
            rng: SmallRng::seed_from_u64(seed),
            requests: HashMap::new(),
            units,
        };
        let thread = std::thread::Builder::new().name("guest".to_owned()).spawn(move || guest.run())?;
        Ok(Self { shared, thread })
    }

    /// The model; hold it briefly, the load waits meanwhile.
    pub fn oracle(&self) -> MutexGuard<'_, Oracle> {
        lock(&self.shared.oracle)
    }

    /// The counters so far.
    pub fn tally(&self) -> MutexGuard<'_, Tally> {
        lock(&self.shared.tally)
    }

    /// Whether it ended by itself, which only a failure does.
    pub fn has_failed(&self) -> bool {
        self.thread.is_finished()
    }

    /// Stops, waits for every answer, and hands over model and counters.
    ///
    /// # Errors
    /// What went wrong on the way, first thing first.
    pub fn stop(self) -> Result<(Oracle, Tally), String> {
        self.shared.stop.store(true, Ordering::Relaxed);
        let ended = self.thread.join().map_err(|_| "the load's thread panicked".to_owned())?;
        ended?;
        let shared = Arc::into_inner(self.shared).ok_or("the load is still in use")?;
        let oracle = shared.oracle.into_inner().unwrap_or_else(PoisonError::into_inner);
        let tally = shared.tally.into_inner().unwrap_or_else(PoisonError::into_inner);
        Ok((oracle, tally))
    }
}

/// What a request in flight is, for its answer.
#[derive(Debug)]
enum Kind {
    Write { begun: u64, units: Range<u32> },
    Read { units: Range<u32>, expected: Vec<Value> },
    Flush,
}

#[derive(Debug)]
struct Guest {
    client: Client,
    shared: Arc<Shared>,
    rng: SmallRng,
    requests: HashMap<Ticket, (Instant, Kind)>,
    units: u32,
}

impl Guest {
    fn run(mut self) -> Result<(), String> {
        while !self.shared.stop.load(Ordering::Relaxed) {
            while self.client.in_flight() < IN_FLIGHT {
                self.issue()?;
            }
            self.answer()?;
            // At its lowest: one was answered, none sent in its place yet.
            lock(&self.shared.tally).in_flight(self.client.in_flight());
        }
        while self.client.in_flight() > 0 {
            self.answer()?;
        }
        self.client.close();
        Ok(())
    }

    /// Sends one request of a random kind.
    fn issue(&mut self) -> Result<(), String> {
        let now = Instant::now();
        let (ticket, kind) = match self.rng.random_range(0..2000u32) {
            0 => (self.client.flush(), Kind::Flush),
            1..=20 => self.write(true, false)?,
            21 => self.write(false, true)?,
            22..=300 => self.read()?,
            _ => self.write(false, false)?,
        };
        let ticket = ticket.map_err(|e| format!("sending to the disk: {e}"))?;
        self.requests.insert(ticket, (now, kind));
        Ok(())
    }

    fn write(&mut self, zero: bool, fua: bool) -> Result<(std::io::Result<Ticket>, Kind), String> {
        let units = self.place()?;
        let (begun, value) = lock(&self.shared.oracle).begin(units.clone(), zero);
        let offset = u64::from(units.start) * UNIT_BYTES as u64;
        let bytes = units.len() * UNIT_BYTES;
        let sent = if zero {
            self.client.write_zeroes(offset, bytes as u32)
        } else {
            let mut data = vec![0; bytes];
            for (unit, buf) in units.clone().zip(data.chunks_exact_mut(UNIT_BYTES)) {
                stamp::fill(buf, unit, value);
            }
            self.client.write(offset, &data, fua)
        };
        Ok((sent, Kind::Write { begun, units }))
    }

    fn read(&mut self) -> Result<(std::io::Result<Ticket>, Kind), String> {
        let units = self.place()?;
        let expected = lock(&self.shared.oracle).held(&units).to_vec();
        let offset = u64::from(units.start) * UNIT_BYTES as u64;
        let sent = self.client.read(offset, (units.len() * UNIT_BYTES) as u32);
        Ok((sent, Kind::Read { units, expected }))
    }

    /// Claims a random run of units, most of them in hot blocks.
    fn place(&mut self) -> Result<Range<u32>, String> {
        for _ in 0..PLACE_TRIES_MAX {
            let blocks = self.units / BLOCK_UNITS;
            let block = self.rng.random_range(0..blocks);
            let anywhere = self.rng.random_ratio(1, ANYWHERE_ONE_IN);
            let block = if anywhere { block } else { block - block % HOT_EVERY };
            let len = self.rng.random_range(1..=REQUEST_UNITS_MAX);
            let start = block * BLOCK_UNITS + self.rng.random_range(0..=BLOCK_UNITS - len);
            let units = start..start + len;
            if lock(&self.shared.oracle).claim(&units) {
                return Ok(units);
            }
        }
        Err("no place for a request".to_owned())
    }

    /// Waits for one answer and judges it.
    fn answer(&mut self) -> Result<(), String> {
        let Reply { ticket, outcome } =
            self.client.next(ANSWER_LIMIT).map_err(|e| format!("waiting for the disk: {e}"))?;
        let Some((sent, kind)) = self.requests.remove(&ticket) else {
            return Err(format!("an answer to a request never sent: {ticket}"));
        };
        let data = outcome.map_err(|errno| format!("the disk answered {kind:?} with error {errno}"))?;
        match kind {
            Kind::Write { begun, units } => {
                lock(&self.shared.oracle).acknowledge(begun);
                lock(&self.shared.tally).write(units.len() * UNIT_BYTES, sent.elapsed());
            }
            Kind::Read { units, expected } => {
                check_read(&data, &units, &expected)?;
                lock(&self.shared.oracle).release(&units);
                lock(&self.shared.tally).read(sent.elapsed());
            }
            Kind::Flush => lock(&self.shared.tally).flush(sent.elapsed()),
        }
        Ok(())
    }
}

fn check_read(data: &[u8], units: &Range<u32>, expected: &[Value]) -> Result<(), String> {
    for ((unit, buf), want) in units.clone().zip(data.chunks_exact(UNIT_BYTES)).zip(expected) {
        let found = stamp::read(buf, unit);
        if found != Some(*want) {
            return Err(format!("unit {unit} reads {found:?} where {want:?} was acknowledged"));
        }
    }
    if data.len() != units.len() * UNIT_BYTES {
        return Err(format!("a read of {} units gave {} bytes", units.len(), data.len()));
    }
    Ok(())
}

/// A panic of the other side is reported by `stop`; the data stays usable.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
