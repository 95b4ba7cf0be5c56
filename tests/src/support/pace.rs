//! A guest that never stops writing, with the time of each of its requests.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use coppice::nbd_client::Client;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::host::Attached;

/// Writes in flight.
const DEPTH: usize = 32;
/// Bytes of each.
const BYTES: u64 = 4096;
const ANSWER_LIMIT: Duration = Duration::from_secs(60);

/// Times of one period's requests.
#[derive(Debug, Clone, Default)]
pub struct Times {
    /// Microseconds of each, in the order of the answers.
    us: Vec<u64>,
    lasted: Duration,
}

impl Times {
    /// The time that so many of ten thousand requests did not exceed.
    pub fn per_ten_thousand(&self, rank: usize) -> Duration {
        let mut sorted = self.us.clone();
        sorted.sort_unstable();
        let at = (sorted.len() * rank / 10_000).min(sorted.len().saturating_sub(1));
        Duration::from_micros(sorted.get(at).copied().unwrap_or(0))
    }

    /// Requests.
    pub fn count(&self) -> usize {
        self.us.len()
    }

    /// Requests per second.
    pub fn rate(&self) -> f64 {
        self.us.len() as f64 / self.lasted.as_secs_f64().max(0.001)
    }
}

impl std::fmt::Display for Times {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let at = |rank| self.per_ten_thousand(rank);
        if self.us.is_empty() {
            return write!(f, "no request: over too soon to be told apart");
        }
        write!(
            f,
            "{} requests in {:.1?}, {:.0}/s; p50 {:?}, p99 {:?}, p99.9 {:?}, longest {:?}",
            self.count(),
            self.lasted,
            self.rate(),
            at(5_000),
            at(9_900),
            at(9_990),
            at(10_000)
        )
    }
}

/// Random writes over a whole disk at full depth, until dropped.
#[derive(Debug)]
pub struct Writer {
    period: Arc<AtomicUsize>,
    ends: Arc<AtomicBool>,
    times: Arc<Mutex<Vec<Times>>>,
    thread: Option<JoinHandle<()>>,
}

impl Writer {
    /// Begins to write; its times count for period 0.
    pub fn start(at: &Attached, seed: u64) -> Self {
        let (period, ends) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        let times = Arc::new(Mutex::new(vec![Times::default()]));
        let client = Client::connect(&at.socket, &at.export).unwrap();
        let (now, over, taken) = (period.clone(), ends.clone(), times.clone());
        let thread = std::thread::spawn(move || write(client, seed, &now, &over, &taken));
        Self { period, ends, times, thread: Some(thread) }
    }

    /// From now on times count for the next period.
    pub fn next_period(&self) {
        self.period.fetch_add(1, Ordering::SeqCst);
    }

    /// Stops writing; the times of each period.
    pub fn stop(mut self) -> Vec<Times> {
        self.ends.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
        std::mem::take(&mut *self.times.lock().unwrap())
    }
}

fn write(mut client: Client, seed: u64, period: &AtomicUsize, ends: &AtomicBool, times: &Mutex<Vec<Times>>) {
    let mut rng = SmallRng::seed_from_u64(seed);
    let units = client.size_bytes() / BYTES;
    let mut data = vec![0; BYTES as usize];
    let mut sent: HashMap<u32, (Instant, usize)> = HashMap::new();
    let mut own: Vec<Times> = vec![Times::default()];
    let mut began = Instant::now();
    while !ends.load(Ordering::SeqCst) || !sent.is_empty() {
        let now = period.load(Ordering::SeqCst);
        if now >= own.len() {
            // One that was over before it was noticed has no requests.
            own.last_mut().unwrap().lasted = began.elapsed();
            own.resize(now + 1, Times::default());
            began = Instant::now();
        }
        while sent.len() < DEPTH && !ends.load(Ordering::SeqCst) {
            rng.fill(&mut data[..64]);
            let offset = rng.random_range(0..units) * BYTES;
            let ticket = client.write(offset, &data, false).unwrap();
            sent.insert(ticket, (Instant::now(), now));
        }
        let Ok(reply) = client.next(ANSWER_LIMIT) else { panic!("a write was not answered") };
        let (at, begun_in) = sent.remove(&reply.ticket).unwrap();
        assert_eq!(reply.outcome, Ok(Vec::new()), "a write failed");
        own[begun_in].us.push(u64::try_from(at.elapsed().as_micros()).unwrap());
    }
    let last = own.len() - 1;
    own[last].lasted = began.elapsed();
    *times.lock().unwrap() = own;
    client.close();
}
