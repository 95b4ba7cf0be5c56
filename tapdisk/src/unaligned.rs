//! Requests of any offset and length, on a disk of whole sectors.
//!
//! | asked | done |
//! |---|---|
//! | read, block status, cache | on the sectors around it; the front end cuts the answer out |
//! | write | the sectors written in part are read, filled up, and all is written at once |
//! | write zeroes | the whole sectors inside become zeros; those in part are written as above |
//! | trim | the whole sectors inside |
//!
//! ```text
//!   submit --> Waiting --> Reading --> Writing --> Step::Done
//!              (behind      (sectors    (one write; for zeros
//!              a change)    in part)    one for each edge too)
//! ```
//!
//! A sector written in part is read, changed and written back, so no other
//! change of that sector may come between. Two changes *collide* when one has
//! only a part of a sector that the other changes too; the later one waits
//! until the earlier one is finished. A request waits only for earlier ones,
//! so no two wait for each other, and for a sector that many want each has its
//! turn. Whole-sector requests pay nothing while no other kind is under way.
//!
//! Nothing here survives a crash, and nothing needs to: until its one write
//! is acknowledged by the engine, no byte of a request is on the disk, except
//! for zeros, whose edges and middle may each be there or not, as with any
//! request that was never answered.
//!
//! Limits: as many as the connections let in, with at most two buffers of one
//! sector each ([`crate::limits::EDGE_BYTES_MAX`]).
//!
//! Absent on purpose: I/O, knowledge of connections, order among requests
//! that do not collide.

use std::collections::{BTreeMap, VecDeque};

use rustc_hash::FxHashMap;

use crate::buffer::{Buffer, Pool};
use crate::engine::{Request, RequestId, RequestKind};

/// Bytes of a sector.
pub const SECTOR_BYTES: u64 = 512;
/// Names of parts have this bit, names of requests do not.
const PART: u64 = 1 << 63;

/// How a range of bytes lies on the sectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cut {
    /// First byte of the first sector touched.
    pub start: u64,
    /// First byte after the last sector touched.
    pub end: u64,
    /// First byte of the sector at the front that is touched in part.
    head: Option<u64>,
    /// First byte of another such sector, at the end.
    tail: Option<u64>,
}

impl Cut {
    /// The cut of `len` bytes at `offset`. The range must end 512 bytes below
    /// the largest `u64`, as on any disk it does.
    #[must_use]
    pub fn new(offset: u64, len: u64) -> Self {
        let stop = offset.saturating_add(len);
        let start = offset - offset % SECTOR_BYTES;
        let end = stop.checked_next_multiple_of(SECTOR_BYTES).unwrap_or(u64::MAX);
        let last = end.saturating_sub(SECTOR_BYTES);
        let head = (start < offset || (stop < end && last == start)).then_some(start);
        let tail = (stop < end && last > start).then_some(last);
        Self { start, end, head, tail }
    }

    /// Whether it has no sector in part.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.head.is_none() && self.tail.is_none()
    }

    /// The bytes of all sectors touched.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.end - self.start
    }

    /// Whether it touches no sector.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The whole sectors inside.
    #[must_use]
    pub fn inside(&self) -> Self {
        let start = self.start + self.head.map_or(0, |_| SECTOR_BYTES);
        let end = self.end - self.tail.map_or(0, |_| SECTOR_BYTES);
        Self { start, end: end.max(start), head: None, tail: None }
    }

    fn edges(&self) -> impl Iterator<Item = u64> {
        self.head.into_iter().chain(self.tail)
    }

    /// See the module.
    fn collides_with(&self, other: &Self) -> bool {
        let has = |cut: &Self, sector: u64| cut.start <= sector && sector < cut.end;
        self.edges().any(|sector| has(other, sector)) || other.edges().any(|sector| has(self, sector))
    }
}

/// What a request changes, if anything.
#[must_use]
pub fn changes(kind: RequestKind, offset: u64, len: u32) -> Option<Cut> {
    let cut = Cut::new(offset, len.into());
    match kind {
        RequestKind::Write { .. } | RequestKind::WriteZeroes { .. } => Some(cut),
        RequestKind::Trim { .. } => Some(cut.inside()),
        RequestKind::Read | RequestKind::Flush | RequestKind::BlockStatus | RequestKind::Cache => None,
    }
}

/// What is to be done next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Give this to the engine.
    Start(Request),
    /// A request is answered; take it out of the table, then say
    /// [`Unaligned::finished`]. The error is an errno.
    Done(RequestId, Result<(), i32>),
}

/// Changes with sectors in part, and those that wait for them. See the module.
#[derive(Debug)]
pub struct Unaligned {
    pool: Pool,
    changes: BTreeMap<RequestId, Change>,
    parts: FxHashMap<RequestId, Part>,
    next_part: u64,
    steps: VecDeque<Step>,
}

/// One change.
#[derive(Debug)]
struct Change {
    request: Request,
    cut: Cut,
    /// The data of a write; it holds all sectors touched.
    data: Option<Buffer>,
    state: State,
}

/// Where a change is.
#[derive(Debug)]
enum State {
    /// An earlier one collides with it, or it is about to start.
    Waiting { on: Option<RequestId> },
    /// Its sectors in part are being read.
    Reading { left: usize, edges: Vec<(u64, Buffer)>, error: Option<i32> },
    /// It is being written.
    Writing { left: usize, error: Option<i32> },
}

/// A request given to the engine on behalf of a change.
#[derive(Debug)]
struct Part {
    owner: RequestId,
    buffer: Option<Buffer>,
}

impl Unaligned {
    /// Nothing under way; sectors in part are read into buffers of `pool`.
    #[must_use]
    pub fn new(pool: Pool) -> Self {
        Self {
            pool,
            changes: BTreeMap::new(),
            parts: FxHashMap::default(),
            next_part: PART,
            steps: VecDeque::new(),
        }
    }

    /// Whether nothing is under way: a request of whole sectors then goes to
    /// the engine directly.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.changes.is_empty()
    }

    /// Takes a change. `data` is that of a write, as the front end received
    /// it: in place within all sectors touched. `in_flight` gives what every
    /// unfinished request changes; it may contain the new one.
    pub fn submit<I>(&mut self, request: Request, data: Option<Buffer>, in_flight: impl Fn() -> I)
    where
        I: Iterator<Item = (RequestId, Cut)>,
    {
        let Some(cut) = changes(request.kind, request.offset, request.len) else {
            return self.steps.push_back(Step::Start(request));
        };
        let request = if matches!(request.kind, RequestKind::Trim { .. }) {
            if cut.is_empty() {
                return self.steps.push_back(Step::Done(request.id, Ok(())));
            }
            Request { offset: cut.start, len: length(cut), ..request }
        } else {
            request
        };
        let on = self.blocker(request.id, &cut, in_flight);
        if cut.is_whole() && on.is_none() {
            return self.steps.push_back(Step::Start(request));
        }
        let state = State::Waiting { on };
        self.changes.insert(request.id, Change { request, cut, data, state });
        if on.is_none() {
            self.start(request.id);
        }
    }

    /// The latest of the earlier changes that collide with one.
    fn blocker<I>(&self, id: RequestId, cut: &Cut, in_flight: impl Fn() -> I) -> Option<RequestId>
    where
        I: Iterator<Item = (RequestId, Cut)>,
    {
        if cut.is_whole() {
            // Only those with sectors in part can be in its way.
            let earlier = self.changes.range(..id).rev();
            return earlier.filter(|(_, other)| other.cut.collides_with(cut)).map(|(id, _)| *id).next();
        }
        let colliding = in_flight().filter(|(other, other_cut)| *other < id && other_cut.collides_with(cut));
        colliding.map(|(id, _)| id).max()
    }

    /// Nothing is in the way of a change any more.
    fn start(&mut self, id: RequestId) {
        let Some(change) = self.changes.get_mut(&id) else { return };
        if change.cut.is_whole() {
            self.steps.push_back(Step::Start(change.request));
            self.changes.remove(&id);
            return;
        }
        let pool = &self.pool;
        let take = |sector: u64| Some((sector, pool.take(SECTOR_BYTES as usize)?));
        let Some(edges) = change.cut.edges().map(take).collect::<Option<Vec<_>>>() else {
            return self.steps.push_back(Step::Done(id, Err(libc::ENOMEM)));
        };
        change.state = State::Reading { left: edges.len(), edges: edges.clone(), error: None };
        for (sector, buffer) in edges {
            self.start_part(id, RequestKind::Read, Cut::new(sector, SECTOR_BYTES), Some(buffer));
        }
    }

    fn start_part(&mut self, owner: RequestId, kind: RequestKind, cut: Cut, buffer: Option<Buffer>) {
        let id = RequestId(self.next_part);
        self.next_part += 1;
        self.parts.insert(id, Part { owner, buffer });
        self.steps.push_back(Step::Start(Request { id, kind, offset: cut.start, len: length(cut) }));
    }

    /// The buffer of a part; `None` if `id` is not a part.
    #[must_use]
    pub fn buffer_of(&self, id: RequestId) -> Option<&Buffer> {
        self.parts.get(&id)?.buffer.as_ref()
    }

    /// The engine answered `id`; whether that was a part of a change, and not
    /// a request of its own.
    pub fn part_done(&mut self, id: RequestId, result: Result<(), i32>) -> bool {
        if id.0 & PART == 0 {
            return false;
        }
        let Some(owner) = self.parts.remove(&id).map(|part| part.owner) else { return true };
        let Some(change) = self.changes.get_mut(&owner) else { return true };
        let (State::Reading { left, error, .. } | State::Writing { left, error }) = &mut change.state else {
            return true;
        };
        *left -= 1;
        if let Err(errno) = result {
            error.get_or_insert(errno);
        }
        if *left > 0 {
            return true;
        }
        let error = *error;
        match (&mut change.state, error) {
            (State::Reading { edges, .. }, None) => {
                let edges = std::mem::take(edges);
                self.write(owner, edges);
            }
            (_, error) => self.steps.push_back(Step::Done(owner, error.map_or(Ok(()), Err))),
        }
        true
    }

    /// The sectors in part are here: fills them up and writes.
    fn write(&mut self, id: RequestId, edges: Vec<(u64, Buffer)>) {
        let Some(Change { request, cut, data, state }) = self.changes.get_mut(&id) else { return };
        let (request, cut, data) = (*request, *cut, data.clone());
        let asked = request.offset..request.offset + u64::from(request.len);
        let filled = edges.iter().all(|(sector, edge)| match &data {
            Some(data) => keep_around(data, cut.start, edge, *sector, &asked).is_some(),
            None => zero_inside(edge, *sector, &asked).is_some(),
        });
        if !filled {
            debug_assert!(false, "somebody still has a buffer that was given back");
            return self.steps.push_back(Step::Done(id, Err(libc::EIO)));
        }
        let inside = cut.inside();
        let left = if data.is_some() { 1 } else { edges.len() + usize::from(!inside.is_empty()) };
        *state = State::Writing { left, error: None };
        if data.is_some() {
            return self.start_part(id, request.kind, cut, data);
        }
        let RequestKind::WriteZeroes { fua, .. } = request.kind else { return };
        if !inside.is_empty() {
            self.start_part(id, request.kind, inside, None);
        }
        for (sector, edge) in edges {
            let kind = RequestKind::Write { fua };
            self.start_part(id, kind, Cut::new(sector, SECTOR_BYTES), Some(edge));
        }
    }

    /// A request was answered and is no longer in flight: whoever waited for
    /// it looks again.
    pub fn finished<I>(&mut self, id: RequestId, in_flight: impl Fn() -> I)
    where
        I: Iterator<Item = (RequestId, Cut)>,
    {
        self.changes.remove(&id);
        let waits =
            |(_, change): &(_, &Change)| matches!(change.state, State::Waiting { on } if on == Some(id));
        let waiting: Vec<_> =
            self.changes.iter().filter(waits).map(|(id, change)| (*id, change.cut)).collect();
        for (waiter, cut) in waiting {
            match (self.blocker(waiter, &cut, &in_flight), self.changes.get_mut(&waiter)) {
                (on @ Some(_), Some(change)) => change.state = State::Waiting { on },
                _ => self.start(waiter),
            }
        }
    }

    /// The next thing to do, until there is nothing.
    pub fn next_step(&mut self) -> Option<Step> {
        self.steps.pop_front()
    }
}

/// The length of a part: no longer than the request that it is cut from,
/// rounded up to sectors.
fn length(cut: Cut) -> u32 {
    debug_assert!(cut.len() <= u32::MAX.into());
    u32::try_from(cut.len()).unwrap_or(u32::MAX - (SECTOR_BYTES as u32 - 1))
}

/// Copies the bytes of a sector that were not asked to change from `edge` to
/// where they belong in `data`, which begins at byte `start` of the disk.
fn keep_around(
    data: &Buffer,
    start: u64,
    edge: &Buffer,
    sector: u64,
    asked: &std::ops::Range<u64>,
) -> Option<()> {
    let at = usize::try_from(sector - start).ok()?;
    let mut to = data.lend_mut(at, SECTOR_BYTES as usize)?;
    let from = edge.lend(0, SECTOR_BYTES as usize)?;
    for ((byte, to), from) in (sector..).zip(to.iter_mut()).zip(from.iter()) {
        if !asked.contains(&byte) {
            *to = *from;
        }
    }
    Some(())
}

/// Zeroes the bytes of a sector that were asked to be zero.
fn zero_inside(edge: &Buffer, sector: u64, asked: &std::ops::Range<u64>) -> Option<()> {
    let mut bytes = edge.lend_mut(0, SECTOR_BYTES as usize)?;
    for (byte, to) in (sector..).zip(bytes.iter_mut()) {
        if asked.contains(&byte) {
            *to = 0;
        }
    }
    Some(())
}

#[cfg(test)]
#[path = "unaligned_tests.rs"]
mod tests;
