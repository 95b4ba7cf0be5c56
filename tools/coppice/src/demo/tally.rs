//! Counters of the load over time.

use std::time::{Duration, Instant};

/// Width of one slice of time.
const SLICE: Duration = Duration::from_millis(10);

/// One slice of time.
#[derive(Debug, Clone, Copy, Default)]
struct Slice {
    writes: u64,
    longest: Duration,
}

/// What was answered, when, and how long it took.
#[derive(Debug)]
pub struct Tally {
    began: Instant,
    slices: Vec<Slice>,
    /// Writes acknowledged.
    pub writes: u64,
    /// Bytes of them.
    pub bytes_written: u64,
    /// Reads answered and found right.
    pub reads: u64,
    /// Flushes answered.
    pub flushes: u64,
    /// Longest time from sending a flush to its answer.
    pub longest_flush: Duration,
    /// Least requests in flight when waiting for an answer.
    pub in_flight_min: Option<usize>,
}

impl Default for Tally {
    fn default() -> Self {
        Self::new()
    }
}

impl Tally {
    /// All zero, from now on.
    pub fn new() -> Self {
        Self {
            began: Instant::now(),
            slices: Vec::new(),
            writes: 0,
            bytes_written: 0,
            reads: 0,
            flushes: 0,
            longest_flush: Duration::ZERO,
            in_flight_min: None,
        }
    }

    /// Notes how many requests are in flight.
    pub fn in_flight(&mut self, now: usize) {
        self.in_flight_min = Some(self.in_flight_min.map_or(now, |min| min.min(now)));
    }

    /// A write was acknowledged after `took`.
    pub fn write(&mut self, bytes: usize, took: Duration) {
        self.writes += 1;
        self.bytes_written += bytes as u64;
        let slice = self.slice_now();
        slice.writes += 1;
        slice.longest = slice.longest.max(took);
    }

    /// A read was answered after `took`, and right.
    pub fn read(&mut self, took: Duration) {
        self.reads += 1;
        let slice = self.slice_now();
        slice.longest = slice.longest.max(took);
    }

    /// A flush was answered after `took`.
    pub fn flush(&mut self, took: Duration) {
        self.flushes += 1;
        self.longest_flush = self.longest_flush.max(took);
    }

    /// Writes acknowledged between two instants, and the longest that a read
    /// or write answered then had taken. To the grain of a slice.
    pub fn between(&self, from: Instant, to: Instant) -> (u64, Duration) {
        let (first, last) = (self.index(from), self.index(to));
        let slices = self.slices.get(first..).unwrap_or_default();
        let slices = slices.get(..=last.saturating_sub(first)).unwrap_or(slices);
        let writes = slices.iter().map(|slice| slice.writes).sum();
        let longest = slices.iter().map(|slice| slice.longest).max().unwrap_or_default();
        (writes, longest)
    }

    /// The longest that any read or write took.
    pub fn longest(&self) -> Duration {
        self.slices.iter().map(|slice| slice.longest).max().unwrap_or_default()
    }

    fn index(&self, at: Instant) -> usize {
        let since = at.saturating_duration_since(self.began);
        (since.as_millis() / SLICE.as_millis()) as usize
    }

    /// The slice of now; time only adds some, a few thousand in a demo.
    fn slice_now(&mut self) -> &mut Slice {
        let index = self.index(Instant::now());
        if self.slices.len() <= index {
            self.slices.resize(index + 1, Slice::default());
        }
        &mut self.slices[index]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_happened_between_is_counted() {
        let before = Instant::now();
        let mut tally = Tally::new();
        tally.write(4096, Duration::from_millis(3));
        tally.read(Duration::from_millis(5));
        let (writes, longest) = tally.between(before, Instant::now());
        assert_eq!((writes, longest), (1, Duration::from_millis(5)));
        let later = Instant::now() + Duration::from_secs(60);
        assert_eq!(tally.between(later, later).0, 0);
        assert_eq!(tally.longest(), Duration::from_millis(5));
    }
}
