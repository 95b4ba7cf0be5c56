//! A client, a disk and the way between them, played by a fuzzer.
//!
//! The input is a script: what the client says, whole requests as well as
//! raw bytes; which of the disk's operations ends next, and how; what the
//! client takes of the replies. The disk is a byte vector behind the same
//! [`Unaligned`] as in the server.

use std::collections::BTreeMap;
use std::sync::Arc;

use zerocopy::IntoBytes;

use crate::buffer::{Buffer, Pool};
use crate::engine::{Extent, Request, RequestId, RequestKind};
use crate::limits::{CLIENT_BYTES_MAX, CLIENT_REQUESTS_MAX, EDGE_BYTES_MAX};
use crate::nbd::proto::{self, ExtendedRequestHeader, OptionHeader, RequestHeader};
use crate::nbd::{Connection, Export, GuestRequest, Security};
use crate::unaligned::{Cut, Step, Unaligned, changes};

/// Small, so that requests meet.
const DISK_BYTES: u64 = 64 << 10;

/// Plays `script`; panics where something does not hold.
pub fn script(script: &[u8]) {
    let mut script = Script(script);
    let mut world = World::new(script.byte());
    while !script.0.is_empty() {
        world.act(&mut script);
    }
    world.end();
}

/// The rest of a script; zeros after its end.
struct Script<'a>(&'a [u8]);

impl Script<'_> {
    fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    fn number(&mut self) -> u32 {
        u32::from_le_bytes([self.byte(), self.byte(), self.byte(), self.byte()])
    }

    fn bytes(&mut self, most: usize) -> Vec<u8> {
        let n = usize::from(self.byte()).min(most).min(self.0.len());
        let (bytes, rest) = self.0.split_at(n);
        self.0 = rest;
        bytes.to_vec()
    }
}

/// A request that the disk has not answered.
struct Asked {
    request: GuestRequest,
    extents: Vec<Extent>,
}

struct World {
    connection: Connection,
    pool: Pool,
    unaligned: Unaligned,
    asked: BTreeMap<RequestId, Asked>,
    next_id: u64,
    /// Given to the disk.
    disk: Vec<Request>,
    bytes: Vec<u8>,
    /// The client writes extended headers.
    extended: bool,
    /// Sent by the client, not yet taken in.
    said: Vec<u8>,
}

impl World {
    fn new(config: u8) -> Self {
        let export = Export {
            name: "disk".to_owned(),
            description: "fuzzed".to_owned(),
            virtual_bytes: DISK_BYTES,
            read_only: config & 1 != 0,
            fast_zero: config & 2 != 0,
        };
        let security = match config >> 2 & 3 {
            0 => Security::Required,
            1 => Security::Plain,
            _ => Security::Offered,
        };
        let pool = Pool::default();
        let mut world = Self {
            connection: Connection::new(Arc::new(export), security, pool.clone()),
            unaligned: Unaligned::new(pool.clone()),
            pool,
            asked: BTreeMap::new(),
            next_id: 0,
            disk: Vec::new(),
            bytes: vec![0; DISK_BYTES as usize],
            extended: false,
            said: Vec::new(),
        };
        if config & 16 != 0 {
            // Past the handshake, to get on with it.
            world.said.extend([0, 0, 0, 3]);
            if config & 32 != 0 {
                world.extended = config & 64 != 0;
                let both = [proto::option::STRUCTURED_REPLY, proto::option::EXTENDED_HEADERS];
                world.option(both[usize::from(world.extended)], &[]);
                let name = b"base:allocation";
                let query = [&[0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, name.len() as u8], name.as_slice()].concat();
                world.option(proto::option::SET_META_CONTEXT, &query);
            }
            world.option(proto::option::GO, &[0; 6]);
        }
        world.deliver();
        world
    }

    fn act(&mut self, script: &mut Script<'_>) {
        match script.byte() % 8 {
            0 => self.said.extend(script.bytes(255)),
            1 => {
                let (option, data) = (u32::from(script.byte() % 13), script.bytes(64));
                self.option(option, &data);
            }
            2..4 => self.ask(script),
            4 | 5 => self.disk_ends(script),
            6 => self.client_takes(script.number() as usize >> (script.byte() % 32)),
            _ => match script.byte() {
                0 => self.connection.input_ended(),
                1 => self.connection.abandon(),
                _ if self.connection.wants_tls() => self.connection.tls_begun(),
                _ => {}
            },
        }
        self.deliver();
        assert!(self.pool.used_bytes() <= 2 * CLIENT_BYTES_MAX + EDGE_BYTES_MAX);
        assert!(self.connection.open_requests() <= CLIENT_REQUESTS_MAX);
    }

    fn option(&mut self, option: u32, data: &[u8]) {
        let header = OptionHeader {
            magic: proto::OPTION_MAGIC.into(),
            option: option.into(),
            len: (data.len() as u32).into(),
        };
        self.said.extend_from_slice(header.as_bytes());
        self.said.extend_from_slice(data);
    }

    fn ask(&mut self, script: &mut Script<'_>) {
        let command = u16::from(script.byte() % 9);
        let offset = u64::from(script.number() % (DISK_BYTES as u32 + 600));
        let len = script.number() >> (script.byte() % 32);
        let (flags, cookie) = (u16::from(script.byte() & 63), u64::from(script.number()));
        if self.extended {
            let header = ExtendedRequestHeader {
                magic: proto::EXTENDED_REQUEST_MAGIC.into(),
                flags: flags.into(),
                command: command.into(),
                cookie: cookie.into(),
                offset: offset.into(),
                len: u64::from(len).into(),
            };
            self.said.extend_from_slice(header.as_bytes());
        } else {
            let header = RequestHeader {
                magic: proto::REQUEST_MAGIC.into(),
                flags: flags.into(),
                command: command.into(),
                cookie: cookie.into(),
                offset: offset.into(),
                len: len.into(),
            };
            self.said.extend_from_slice(header.as_bytes());
        }
        if command == proto::command::WRITE {
            let fill = script.byte();
            let sent = if fill & 1 == 0 { len.min(100_000) } else { len / 2 % 5000 };
            self.said.resize(self.said.len() + sent as usize, fill);
        }
    }

    /// Lets the connection take in what was said, and the disk what was asked.
    fn deliver(&mut self) {
        loop {
            while let Some(request) = self.connection.next_request() {
                self.submit(request);
            }
            let space = self.connection.input_space();
            let n = space.len().min(self.said.len());
            let (Some(to), Some(from)) = (space.get_mut(..n), self.said.get(..n)) else { return };
            if n == 0 {
                return;
            }
            to.copy_from_slice(from);
            self.said.drain(..n);
            self.connection.input_filled(n);
        }
    }

    fn submit(&mut self, request: GuestRequest) {
        let id = RequestId(self.next_id);
        self.next_id += 1;
        let GuestRequest { kind, offset, len, buffer, .. } = &request;
        assert!(offset + len <= DISK_BYTES, "outside the disk");
        let cut = Cut::new(*offset, *len);
        let (kind, offset, len, buffer) = (*kind, *offset, *len as u32, buffer.clone());
        self.asked.insert(id, Asked { request, extents: Vec::new() });
        if changes(kind, offset, len).is_none() {
            let len = u32::try_from(cut.len()).unwrap_or(u32::MAX);
            return self.disk.push(Request { id, kind, offset: cut.start, len });
        }
        let all = &self.asked;
        self.unaligned.submit(Request { id, kind, offset, len }, buffer, || in_flight(all));
        self.follow();
    }

    fn follow(&mut self) {
        while let Some(step) = self.unaligned.next_step() {
            match step {
                Step::Start(request) => self.disk.push(request),
                Step::Done(id, result) => self.finish(id, result),
            }
        }
    }

    fn finish(&mut self, id: RequestId, result: Result<(), i32>) {
        let Some(Asked { request, extents }) = self.asked.remove(&id) else {
            panic!("answered twice");
        };
        let slot = request.slot;
        drop(request);
        self.connection.finish(slot, result, &extents);
        let all = &self.asked;
        self.unaligned.finished(id, || in_flight(all));
    }

    /// One of the disk's operations is carried out.
    fn disk_ends(&mut self, script: &mut Script<'_>) {
        if self.disk.is_empty() {
            return;
        }
        let n = usize::from(script.byte()) % self.disk.len();
        let request = self.disk.swap_remove(n);
        let fails = script.byte();
        let result = if fails < 240 { Ok(()) } else { Err(i32::from(fails - 240)) };
        self.carry_out(request);
        if !self.unaligned.part_done(request.id, result) {
            self.finish(request.id, result);
        }
        self.follow();
    }

    fn carry_out(&mut self, Request { id, kind, offset, len }: Request) {
        assert!((offset | u64::from(len)).is_multiple_of(512), "not whole sectors");
        let at = offset as usize;
        let Some(bytes) = self.bytes.get_mut(at..at + len as usize) else { panic!("outside the disk") };
        let own = self.asked.get(&id).and_then(|asked| asked.request.buffer.as_ref());
        let buffer: Option<&Buffer> = self.unaligned.buffer_of(id).or(own);
        match (kind, buffer) {
            (RequestKind::Read, Some(buffer)) => {
                if let Some(mut to) = buffer.lend_mut(0, bytes.len()) {
                    to.copy_from_slice(bytes);
                }
            }
            (RequestKind::Write { .. }, Some(buffer)) => {
                if let Some(from) = buffer.lend(0, bytes.len()) {
                    bytes.copy_from_slice(&from);
                }
            }
            (RequestKind::WriteZeroes { .. } | RequestKind::Trim { .. }, _) => bytes.fill(0),
            (RequestKind::BlockStatus, _) => {
                if let Some(asked) = self.asked.get_mut(&id) {
                    asked.extents = (0..len / 512).map(|n| Extent { len: 512, depth: n * 7 % 3 }).collect();
                }
            }
            _ => {}
        }
    }

    fn client_takes(&mut self, most: usize) {
        let mut slices = Vec::new();
        self.connection.output(&mut slices, 64);
        let there: usize = slices.iter().map(|slice| slice.len()).sum();
        drop(slices);
        self.connection.output_written(there.min(most));
    }

    /// The client goes, the disk ends what it has, and nothing is left.
    fn end(mut self) {
        self.connection.input_ended();
        self.connection.abandon();
        while !self.disk.is_empty() {
            self.disk_ends(&mut Script(&[]));
        }
        assert!(self.asked.is_empty(), "a request was never answered");
        assert!(self.unaligned.is_idle());
        assert_eq!(self.connection.open_requests(), 0);
        assert_eq!(self.pool.used_bytes(), 0, "a buffer was lost");
    }
}

fn in_flight(all: &BTreeMap<RequestId, Asked>) -> impl Iterator<Item = (RequestId, Cut)> {
    all.iter().filter_map(|(id, asked)| {
        let GuestRequest { kind, offset, len, .. } = asked.request;
        Some((*id, changes(kind, offset, len as u32)?))
    })
}

#[cfg(test)]
mod tests {
    use rand::rngs::SmallRng;
    use rand::{Rng, RngCore, SeedableRng};

    #[test]
    fn random_scripts_hold() {
        for seed in 0..2000 {
            let mut rng = SmallRng::seed_from_u64(seed);
            let mut script = vec![0; rng.random_range(0..2000)];
            rng.fill_bytes(&mut script);
            super::script(&script);
        }
    }
}
