//! What the disk must hold, from what was acknowledged.
//!
//! Never are two requests in flight on one unit, so once everything is
//! answered the content is known exactly. What a snapshot may hold is known
//! almost as well: a [`Window`] is open while it is taken, and notes every
//! write that was in flight at its start or begun before its end. A snapshot
//! is right when each unit holds the value from before the window or that of
//! a write of the window, and the writes it holds make one instant: if it
//! holds a write, it holds every other that was acknowledged before that one
//! began (invariant 1).

use std::collections::HashMap;
use std::ops::Range;

use super::stamp::Value;

/// A write in flight.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Write {
    /// The units it covers.
    pub units: Range<u32>,
    /// What it makes them.
    pub value: Value,
    /// When it began, on the oracle's clock.
    begun: u64,
}

/// The model of one disk.
#[derive(Debug)]
pub struct Oracle {
    held: Vec<Value>,
    busy: Vec<bool>,
    writes: HashMap<u64, Write>,
    next_value: u32,
    clock: u64,
    window: Option<Window>,
    /// Units written since the last snapshot: what the current level holds.
    level: Vec<bool>,
}

impl Oracle {
    /// A disk of `units` units, all zero.
    pub fn new(units: u32) -> Self {
        let n = units as usize;
        Self {
            held: vec![Value::ZERO; n],
            busy: vec![false; n],
            writes: HashMap::new(),
            next_value: 0,
            clock: 0,
            window: None,
            level: vec![false; n],
        }
    }

    /// Takes `units` for a request; `false` when one of them is taken.
    pub fn claim(&mut self, units: &Range<u32>) -> bool {
        let range = units.start as usize..units.end as usize;
        if self.busy[range.clone()].contains(&true) {
            return false;
        }
        self.busy[range].fill(true);
        true
    }

    /// Gives `units` back after a read.
    pub fn release(&mut self, units: &Range<u32>) {
        self.busy[units.start as usize..units.end as usize].fill(false);
    }

    /// What `units` hold.
    pub fn held(&self, units: &Range<u32>) -> &[Value] {
        &self.held[units.start as usize..units.end as usize]
    }

    /// Everything, once nothing is in flight.
    pub fn content(&self) -> &[Value] {
        &self.held
    }

    /// Begins a write of claimed units, of zeros or of a new stamp. Its begin
    /// is its place on the clock and its name in [`Oracle::acknowledge`].
    pub fn begin(&mut self, units: Range<u32>, zero: bool) -> (u64, Value) {
        let value = if zero {
            Value::ZERO
        } else {
            self.next_value += 1;
            Value(self.next_value)
        };
        let begun = self.tick();
        let write = Write { units, value, begun };
        if let Some(window) = &mut self.window {
            window.note(&write);
        }
        self.writes.insert(begun, write);
        (begun, value)
    }

    /// The write that began at `begun` was acknowledged.
    pub fn acknowledge(&mut self, begun: u64) {
        let Some(write) = self.writes.remove(&begun) else {
            return;
        };
        let now = self.tick();
        let range = write.units.start as usize..write.units.end as usize;
        self.held[range.clone()].fill(write.value);
        self.busy[range.clone()].fill(false);
        self.level[range].fill(true);
        if let Some(window) = &mut self.window {
            window.acked.insert(begun, now);
        }
    }

    /// A snapshot is about to be asked for.
    pub fn open_window(&mut self) {
        let mut window = Window { before: self.held.clone(), during: HashMap::new(), acked: HashMap::new() };
        for write in self.writes.values() {
            window.note(write);
        }
        self.window = Some(window);
    }

    /// The snapshot was answered: what it may hold, and how many blocks of
    /// `block_units` the level below it holds in part.
    pub fn close_window(&mut self, block_units: usize) -> Option<(Window, usize)> {
        let window = self.window.take()?;
        let partly = self.level.chunks(block_units).filter(|block| is_partial(block)).count();
        self.level.fill(false);
        Some((window, partly))
    }

    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }
}

/// Some units are set, not all.
fn is_partial(block: &[bool]) -> bool {
    block.contains(&true) && block.contains(&false)
}

/// What a snapshot taken within it may hold.
#[derive(Debug)]
pub struct Window {
    before: Vec<Value>,
    /// Per unit the writes of the window, in the order they began.
    during: HashMap<u32, Vec<(u64, Value)>>,
    /// When writes of the window were acknowledged, within it.
    acked: HashMap<u64, u64>,
}

/// What a snapshot was found to hold, against its window.
#[derive(Debug, Default)]
pub struct Instant {
    /// The youngest write it holds: when it began, and a unit of it.
    youngest: Option<(u64, u32)>,
    /// Of the writes it lacks the one acknowledged first: when, and a unit.
    lacking: Option<(u64, u32)>,
}

/// Two writes that contradict each other: the first was acknowledged before
/// the second began, yet only the second is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Torn {
    /// A unit that lacks its write.
    pub lacks: u32,
    /// When that write was acknowledged, on the oracle's clock.
    pub acknowledged: u64,
    /// A unit that holds a later one.
    pub holds: u32,
    /// When that began.
    pub begun: u64,
}

impl Window {
    fn note(&mut self, write: &Write) {
        for unit in write.units.clone() {
            self.during.entry(unit).or_default().push((write.begun, write.value));
        }
    }

    /// Number of units.
    pub fn units(&self) -> u32 {
        self.before.len() as u32
    }

    /// Judges that the snapshot holds `found` in `unit`; `None` when it must
    /// not. What it says about the instant is gathered in `instant`.
    pub fn judge(&self, unit: u32, found: Value, instant: &mut Instant) -> Option<()> {
        let before = *self.before.get(unit as usize)?;
        let Some(writes) = self.during.get(&unit) else {
            return (before == found).then_some(());
        };
        // Zeros may be several writes: the last one that fits lacks least,
        // the first one proves least.
        let held = writes.iter().rposition(|(_, value)| *value == found);
        match held {
            // A zero that also was there before proves nothing.
            Some(i) if found != before => {
                let first = writes.iter().position(|(_, value)| *value == found).unwrap_or(i);
                instant.youngest = instant.youngest.max(Some((writes[first].0, unit)));
            }
            Some(_) => {}
            None if found == before => {}
            None => return None,
        }
        let lacks = &writes[held.map_or(0, |i| i + 1)..];
        for acked in lacks.iter().filter_map(|(begun, _)| self.acked.get(begun)) {
            if instant.lacking.is_none_or(|(oldest, _)| *acked < oldest) {
                instant.lacking = Some((*acked, unit));
            }
        }
        Some(())
    }
}

impl std::fmt::Display for Torn {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { lacks, acknowledged, holds, begun } = self;
        write!(f, "unit {lacks} lacks a write acknowledged at {acknowledged}, ")?;
        write!(f, "unit {holds} holds one begun at {begun}")
    }
}

impl Instant {
    /// Whether no instant has all that is there and nothing else.
    pub fn torn(&self) -> Option<Torn> {
        let ((acknowledged, lacks), (begun, holds)) = self.lacking.zip(self.youngest)?;
        (acknowledged < begun).then_some(Torn { lacks, acknowledged, holds, begun })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(oracle: &mut Oracle, unit: u32) -> (u64, Value) {
        assert!(oracle.claim(&(unit..unit + 1)));
        oracle.begin(unit..unit + 1, false)
    }

    #[test]
    fn a_unit_is_never_written_twice_at_once() {
        let mut oracle = Oracle::new(8);
        assert!(oracle.claim(&(2..5)));
        assert!(!oracle.claim(&(4..6)));
        oracle.release(&(2..5));
        assert!(oracle.claim(&(4..6)));
    }

    #[test]
    fn what_is_acknowledged_is_held() {
        let mut oracle = Oracle::new(8);
        let (begun, value) = write(&mut oracle, 3);
        assert_eq!(oracle.content()[3], Value::ZERO);
        oracle.acknowledge(begun);
        assert_eq!(oracle.content()[3], value);
    }

    #[test]
    fn a_snapshot_may_hold_either_side_of_a_write_in_flight() {
        let mut oracle = Oracle::new(8);
        let (_, in_flight) = write(&mut oracle, 1);
        oracle.open_window();
        let (window, _) = oracle.close_window(4).unwrap();
        let mut instant = Instant::default();
        assert!(window.judge(1, Value::ZERO, &mut instant).is_some());
        assert!(window.judge(1, in_flight, &mut instant).is_some());
        assert!(window.judge(1, Value(99), &mut instant).is_none());
        assert!(window.judge(2, in_flight, &mut instant).is_none());
    }

    #[test]
    fn a_snapshot_of_no_single_instant_is_found() {
        let mut oracle = Oracle::new(8);
        oracle.open_window();
        let (first, one) = write(&mut oracle, 1);
        oracle.acknowledge(first);
        let (_, two) = write(&mut oracle, 2);
        let (window, partly) = oracle.close_window(4).unwrap();
        assert_eq!(partly, 1);
        let judge = |at_one, at_two| {
            let mut instant = Instant::default();
            window.judge(1, at_one, &mut instant).unwrap();
            window.judge(2, at_two, &mut instant).unwrap();
            instant.torn().map(|torn| torn.lacks)
        };
        assert_eq!(judge(one, two), None);
        assert_eq!(judge(one, Value::ZERO), None);
        assert_eq!(judge(Value::ZERO, Value::ZERO), None);
        assert_eq!(judge(Value::ZERO, two), Some(1), "holds the second without the first");
    }
}
