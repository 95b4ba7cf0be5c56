//! The guest requests that the core has.

use std::collections::HashMap;

use tapdisk_control::Stats;

use super::clients::ClientId;
use super::counters::Counters;
use crate::buffer::Buffer;
use crate::driver::Core;
use crate::engine::{BufferRange, Extent, Request, RequestId, RequestKind};
use crate::nbd::{GuestRequest, Slot};

/// A guest request that the core has.
#[derive(Debug)]
pub struct Guest {
    /// Whose it is.
    pub client: ClientId,
    /// Its name there.
    pub slot: Slot,
    /// The answer to a block-status request.
    pub extents: Vec<Extent>,
    buffer: Option<Buffer>,
    kind: RequestKind,
    len: u32,
    arrived_us: u64,
}

/// All of them. Their number is bounded by what the connections let in.
#[derive(Debug, Default)]
pub struct Guests {
    all: HashMap<RequestId, Guest>,
    next_id: u64,
    counters: Counters,
}

impl Guests {
    /// Gives a client's request to the core.
    pub fn submit<C: Core>(&mut self, core: &mut C, now_us: u64, client: ClientId, request: GuestRequest) {
        let id = RequestId(self.next_id);
        self.next_id += 1;
        let GuestRequest { slot, kind, offset, len, buffer } = request;
        let extents = Vec::new();
        let guest = Guest { client, slot, extents, buffer, kind, len, arrived_us: now_us };
        self.all.insert(id, guest);
        core.submit(now_us, Request { id, kind, offset, len });
    }

    /// The buffer that a piece belongs to.
    pub fn buffer_of(&self, range: BufferRange) -> Option<&Buffer> {
        self.all.get(&range.request)?.buffer.as_ref()
    }

    /// Notes the answer to a block-status request.
    pub fn extents(&mut self, id: RequestId, extents: Vec<Extent>) {
        if let Some(guest) = self.all.get_mut(&id) {
            guest.extents = extents;
        }
    }

    /// The core answered a request: it is counted and handed out.
    pub fn done(&mut self, now_us: u64, id: RequestId, failed: bool) -> Option<Guest> {
        let guest = self.all.remove(&id)?;
        let took_us = now_us.saturating_sub(guest.arrived_us);
        self.counters.answered(guest.kind, guest.len, took_us, failed);
        Some(guest)
    }

    /// The statistics as far as the server knows them.
    pub fn stats(&self, clients: u64) -> Stats {
        self.counters.stats(clients, self.all.len() as u64)
    }
}
