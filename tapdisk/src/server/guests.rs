//! The guest requests that the core has.
//!
//! Most go straight to the core and back. Those that begin or end within a
//! sector, and what collides with them, go through [`Unaligned`]. Very long
//! ones go piece by piece ([`CORE_BYTES_MAX`]), each a request of its own.

use std::collections::VecDeque;

use rustc_hash::FxHashMap;
use tapdisk_control::Stats;

use super::clients::ClientId;
use super::counters::Counters;
use crate::buffer::{Buffer, Pool};
use crate::driver::Core;
use crate::engine::{BufferRange, Extent, Request, RequestId, RequestKind};
use crate::limits::CORE_BYTES_MAX;
use crate::nbd::{GuestRequest, Slot};
use crate::unaligned::{Cut, SECTOR_BYTES, Step, Unaligned, changes};

/// A guest request that the core has.
#[derive(Debug)]
struct Guest {
    client: ClientId,
    slot: Slot,
    extents: Vec<Extent>,
    buffer: Option<Buffer>,
    kind: RequestKind,
    /// What the core has of it.
    offset: u64,
    len: u32,
    /// Bytes asked for after that.
    rest: u64,
    bytes_asked: u64,
    arrived_us: u64,
}

/// A guest request that was carried out.
#[derive(Debug)]
pub struct Answered {
    /// Whose it is.
    pub client: ClientId,
    /// Its name there.
    pub slot: Slot,
    /// How it went; the error is an errno.
    pub result: Result<(), i32>,
    /// The answer to a block-status request.
    pub extents: Vec<Extent>,
}

/// All of them. Their number is bounded by what the connections let in.
#[derive(Debug)]
pub struct Guests {
    all: FxHashMap<RequestId, Guest>,
    next_id: u64,
    pool: Pool,
    unaligned: Unaligned,
    answered: VecDeque<Answered>,
    counters: Counters,
}

impl Guests {
    /// None yet; what must be read to write a part of a sector goes into
    /// buffers of `pool`.
    pub fn new(pool: Pool) -> Self {
        Self {
            all: FxHashMap::default(),
            next_id: 0,
            unaligned: Unaligned::new(pool.clone()),
            pool,
            answered: VecDeque::new(),
            counters: Counters::default(),
        }
    }

    /// Gives a client's request to the core, at once or when its turn has come.
    pub fn submit<C: Core>(&mut self, core: &mut C, now_us: u64, client: ClientId, request: GuestRequest) {
        let GuestRequest { slot, kind, offset, len: bytes_asked, buffer } = request;
        let len = first_of(kind, offset, bytes_asked);
        // Only a part is promised of what changes nothing.
        let rest = if changes(kind, offset, len).is_some() { bytes_asked - u64::from(len) } else { 0 };
        let extents = Vec::new();
        let arrived_us = now_us;
        let guest = Guest { client, slot, extents, buffer, kind, offset, len, rest, bytes_asked, arrived_us };
        self.begin(core, now_us, guest);
        self.follow(core, now_us);
    }

    fn begin<C: Core>(&mut self, core: &mut C, now_us: u64, guest: Guest) {
        let id = RequestId(self.next_id);
        self.next_id += 1;
        let Guest { kind, offset, len, .. } = guest;
        let cut = Cut::new(offset, len.into());
        let alone = cut.is_whole() && self.unaligned.is_idle();
        let direct = alone || changes(kind, offset, len).is_none();
        let data = guest.buffer.clone().filter(|_| !direct);
        self.all.insert(id, guest);
        self.counters.in_flight(self.all.len());
        if direct {
            // For what changes nothing: all sectors touched.
            let len = u32::try_from(cut.len()).unwrap_or(u32::MAX - 511);
            return core.submit(now_us, Request { id, kind, offset: cut.start, len });
        }
        let all = &self.all;
        self.unaligned.submit(Request { id, kind, offset, len }, data, || in_flight(all));
    }

    /// The buffer that a piece belongs to.
    pub fn buffer_of(&self, range: BufferRange) -> Option<&Buffer> {
        let guest = self.all.get(&range.request);
        guest.map_or_else(|| self.unaligned.buffer_of(range.request), |guest| guest.buffer.as_ref())
    }

    /// Notes the answer to a block-status request.
    pub fn extents(&mut self, id: RequestId, extents: Vec<Extent>) {
        if let Some(guest) = self.all.get_mut(&id) {
            guest.extents = extents;
        }
    }

    /// The core answered a request. The error is an errno.
    pub fn done<C: Core>(&mut self, core: &mut C, now_us: u64, id: RequestId, result: Result<(), i32>) {
        if !self.unaligned.part_done(id, result) {
            self.finished(core, now_us, id, result);
        }
        self.follow(core, now_us);
    }

    /// Does what the unaligned requests need next.
    fn follow<C: Core>(&mut self, core: &mut C, now_us: u64) {
        while let Some(step) = self.unaligned.next_step() {
            match step {
                Step::Start(request) => core.submit(now_us, request),
                Step::Done(id, result) => self.finished(core, now_us, id, result),
            }
        }
    }

    /// What the core had of a request is over: the rest follows, or it is
    /// counted and answered.
    fn finished<C: Core>(&mut self, core: &mut C, now_us: u64, id: RequestId, result: Result<(), i32>) {
        let Some(mut guest) = self.all.remove(&id) else { return };
        if !self.unaligned.is_idle() {
            let all = &self.all;
            self.unaligned.finished(id, || in_flight(all));
        }
        if result.is_ok() && guest.rest > 0 {
            guest.offset += u64::from(guest.len);
            guest.len = first_of(guest.kind, guest.offset, guest.rest);
            guest.rest -= u64::from(guest.len);
            return self.begin(core, now_us, guest);
        }
        let took_us = now_us.saturating_sub(guest.arrived_us);
        self.counters.answered(guest.kind, guest.bytes_asked, took_us, result.is_err());
        let Guest { client, slot, extents, .. } = guest;
        self.answered.push_back(Answered { client, slot, result, extents });
    }

    /// The next request to answer, until there is none.
    pub fn next_answered(&mut self) -> Option<Answered> {
        self.answered.pop_front()
    }

    /// The statistics as far as the server knows them.
    pub fn stats(&self, clients: u64) -> Stats {
        Stats {
            in_flight: self.all.len() as u64,
            buffer_bytes: self.pool.used_bytes() as u64,
            ..self.counters.stats(clients)
        }
    }
}

/// How much of a request the core is given at first: all of most; of a long
/// one up to a sector's end.
fn first_of(kind: RequestKind, offset: u64, bytes: u64) -> u32 {
    let most = match kind {
        RequestKind::Read | RequestKind::Write { .. } => bytes,
        _ => bytes.min(CORE_BYTES_MAX - offset % SECTOR_BYTES),
    };
    u32::try_from(most).unwrap_or(u32::MAX)
}

/// What the requests in flight change.
fn in_flight(all: &FxHashMap<RequestId, Guest>) -> impl Iterator<Item = (RequestId, Cut)> {
    all.iter().filter_map(|(id, guest)| Some((*id, changes(guest.kind, guest.offset, guest.len)?)))
}
