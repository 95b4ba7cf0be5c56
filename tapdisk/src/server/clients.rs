//! NBD clients: their sockets, and the [`Connection`] behind each.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, IoSlice, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::Instant;

use nix::poll::PollFlags;

use crate::buffer::Pool;
use crate::engine::Extent;
use crate::limits::{CLIENTS_MAX, HANDSHAKE_TIME_MAX, TURN_BYTES_MAX};
use crate::nbd::{Connection, Export, GuestRequest, Slot};

/// Most pieces given to one write call.
const SLICES_MAX: usize = 64;

/// Names a client for the life of the process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClientId(u64);

impl ClientId {
    /// As a number, of which there is one each.
    pub fn number(self) -> u64 {
        self.0
    }

    /// Back from a number.
    pub fn of(number: u64) -> Self {
        Self(number)
    }
}

/// One client.
#[derive(Debug)]
struct Client {
    connection: Connection,
    /// `None` once the connection is over. The entry stays, and counts
    /// against the limit, until the core has finished its requests: so the
    /// memory those hold is bounded however often somebody reconnects.
    socket: Option<UnixStream>,
    handshake_deadline: Instant,
}

/// All clients.
#[derive(Debug)]
pub struct Clients {
    export: Arc<Export>,
    pool: Pool,
    all: BTreeMap<ClientId, Client>,
    next_id: u64,
    /// Those with something to send, or room for another request.
    stirred: BTreeSet<ClientId>,
}

impl Clients {
    /// No clients yet; their data goes into buffers of `pool`.
    pub fn new(export: Arc<Export>, pool: Pool) -> Self {
        Self { export, pool, all: BTreeMap::new(), next_id: 0, stirred: BTreeSet::new() }
    }

    /// Clients that connect from here on are offered this size in bytes. The
    /// protocol tells the others nothing: for them the disk is what it was.
    pub fn resized(&mut self, virtual_bytes: u64) {
        self.export = Arc::new(Export { virtual_bytes, ..(*self.export).clone() });
    }

    /// How many are past their handshake and connected.
    pub fn transmitting(&self) -> u64 {
        let transmitting = |client: &&Client| client.socket.is_some() && client.connection.is_transmitting();
        self.all.values().filter(transmitting).count() as u64
    }

    /// Takes those who wait at the door.
    pub fn accept(&mut self, listener: &UnixListener) {
        loop {
            let socket = match listener.accept() {
                Ok((socket, _)) => socket,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept an NBD client");
                    return;
                }
            };
            if self.all.len() >= CLIENTS_MAX {
                tracing::warn!(limit = CLIENTS_MAX, "NBD client turned away: too many");
                continue;
            }
            if let Err(error) = socket.set_nonblocking(true) {
                tracing::warn!(%error, "NBD client turned away");
                continue;
            }
            let id = ClientId(self.next_id);
            self.next_id += 1;
            let client = Client {
                connection: Connection::new(Arc::clone(&self.export), self.pool.clone()),
                socket: Some(socket),
                handshake_deadline: Instant::now() + HANDSHAKE_TIME_MAX,
            };
            self.all.insert(id, client);
            self.stirred.insert(id);
            tracing::info!(client = id.0, "NBD client connected");
        }
    }

    /// What to poll for.
    pub fn sources(&self) -> impl Iterator<Item = (ClientId, BorrowedFd<'_>, PollFlags)> {
        self.all.iter().filter_map(|(id, client)| {
            let mut want = PollFlags::empty();
            want.set(PollFlags::POLLIN, client.connection.wants_input());
            want.set(PollFlags::POLLOUT, client.connection.has_output());
            client.socket.as_ref().map(|socket| (*id, socket.as_fd(), want))
        })
    }

    /// Reads a client's share of this turn and hands over its requests.
    pub fn serve(&mut self, id: ClientId, flags: PollFlags, mut submit: impl FnMut(GuestRequest)) {
        let Some(client) = self.all.get_mut(&id) else {
            return;
        };
        self.stirred.insert(id);
        let gone = PollFlags::POLLHUP | PollFlags::POLLERR;
        if client.connection.wants_input() {
            if flags.intersects(gone | PollFlags::POLLIN) {
                client.read(&mut submit);
            }
        } else if flags.intersects(gone) {
            // It will never take a reply, and nothing more is read from it.
            client.hang_up(id);
        }
    }

    /// Answers a request.
    pub fn finish(&mut self, id: ClientId, slot: Slot, result: Result<(), i32>, extents: &[Extent]) {
        if let Some(client) = self.all.get_mut(&id) {
            client.connection.finish(slot, result, extents);
            self.stirred.insert(id);
        }
    }

    /// Sends what can be sent and hands over requests that have room now;
    /// whether there were any.
    pub fn flush(&mut self, mut submit: impl FnMut(ClientId, GuestRequest)) -> bool {
        let mut handed_over = false;
        while let Some(id) = self.stirred.pop_first() {
            let Some(client) = self.all.get_mut(&id) else {
                continue;
            };
            client.write(id);
            if client.socket.is_some() {
                while let Some(request) = client.connection.next_request() {
                    handed_over = true;
                    submit(id, request);
                }
                client.write(id); // refusals
            }
            if client.connection.is_over() {
                client.hang_up(id);
            }
            if client.socket.is_none() && client.connection.open_requests() == 0 {
                self.all.remove(&id);
            }
        }
        handed_over
    }

    /// When the next client has had its time for the handshake.
    pub fn next_deadline(&self) -> Option<Instant> {
        let shaking = |client: &&Client| client.socket.is_some() && !client.connection.is_transmitting();
        self.all.values().filter(shaking).map(|client| client.handshake_deadline).min()
    }

    /// Disconnects those who did not finish their handshake in time.
    pub fn drop_late_handshakes(&mut self, now: Instant) {
        for (id, client) in &mut self.all {
            if !client.connection.is_transmitting() && client.handshake_deadline <= now {
                tracing::warn!(client = id.0, "NBD handshake took too long");
                client.hang_up(*id);
                self.stirred.insert(*id);
            }
        }
    }
}

impl Client {
    fn read(&mut self, submit: &mut impl FnMut(GuestRequest)) {
        let Some(socket) = &mut self.socket else {
            return;
        };
        let mut taken = 0;
        while taken < TURN_BYTES_MAX {
            let space = self.connection.input_space();
            let wanted = space.len();
            if wanted == 0 {
                return;
            }
            match socket.read(space) {
                Ok(0) => {
                    self.connection.input_ended();
                    return;
                }
                Ok(n) => {
                    self.connection.input_filled(n);
                    while let Some(request) = self.connection.next_request() {
                        submit(request);
                    }
                    taken += n;
                    if n < wanted {
                        return; // that was all there is
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => {
                    self.connection.input_ended();
                    return;
                }
            }
        }
    }

    fn write(&mut self, id: ClientId) {
        if let Err(error) = self.try_write() {
            tracing::debug!(client = id.0, %error, "NBD client gone while sending");
            self.hang_up(id);
        }
    }

    fn try_write(&mut self) -> io::Result<()> {
        let Some(socket) = &mut self.socket else {
            return Ok(());
        };
        while self.connection.has_output() {
            let mut slices: Vec<IoSlice<'_>> = Vec::with_capacity(SLICES_MAX);
            self.connection.output(&mut slices, SLICES_MAX);
            match socket.write_vectored(&slices) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => self.connection.output_written(n),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Closes the socket. What the core still has is finished silently.
    fn hang_up(&mut self, id: ClientId) {
        if let Some(socket) = self.socket.take() {
            // Whatever else still holds the socket, the peer hears of it now.
            let _ = socket.shutdown(std::net::Shutdown::Both);
            self.connection.abandon();
            tracing::info!(client = id.0, "NBD client disconnected");
        }
    }
}
