//! All NBD clients: who is let in, whose turn it is, who has to go.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::TcpListener;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::Instant;

use nix::poll::PollFlags;

use super::client::Client;
use super::doors::accepted;
use super::transport::Socket;
use crate::buffer::Pool;
use crate::engine::Extent;
use crate::limits::{CLIENTS_MAX, TCP_CLIENTS_MAX, TURN_BYTES_MAX};
use crate::nbd::{Connection, Export, GuestRequest, Security, Slot};
use crate::tls::Tls;

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

/// All clients.
#[derive(Debug)]
pub struct Clients {
    export: Arc<Export>,
    tls: Option<Tls>,
    pool: Pool,
    all: BTreeMap<ClientId, Client>,
    next_id: u64,
    /// Those with something to send, or room for another request.
    stirred: BTreeSet<ClientId>,
    /// Those whose TLS handshake can go on.
    shaking: BTreeSet<ClientId>,
    /// Whose went on last.
    shaken: ClientId,
}

impl Clients {
    /// No clients yet; their data goes into buffers of `pool`. With `tls`,
    /// those from this host may have it, and all others must.
    pub fn new(export: Arc<Export>, tls: Option<Tls>, pool: Pool) -> Self {
        Self {
            export,
            tls,
            pool,
            all: BTreeMap::new(),
            next_id: 0,
            stirred: BTreeSet::new(),
            shaking: BTreeSet::new(),
            shaken: ClientId(0),
        }
    }

    /// Clients that connect from here on are offered this size in bytes. The
    /// protocol tells the others nothing: for them the disk is what it was.
    pub fn resized(&mut self, virtual_bytes: u64) {
        self.export = Arc::new(Export { virtual_bytes, ..(*self.export).clone() });
    }

    /// How many are past their handshake and connected, without those who only
    /// look on: a disk that is detached does not wait for them.
    pub fn guests(&self) -> u64 {
        self.all.values().filter(|client| client.is_guest()).count() as u64
    }

    /// Takes those of this host who wait at the door.
    ///
    /// # Errors
    /// Nobody can be taken now, though somebody may wait.
    pub fn accept(&mut self, listener: &UnixListener) -> io::Result<()> {
        while let Some(socket) = accepted(listener.accept())? {
            let security = if self.tls.is_some() { Security::Offered } else { Security::Plain };
            let socket = socket.set_nonblocking(true).map(|()| Socket::Unix(socket));
            self.admit(socket, false, security);
        }
        Ok(())
    }

    /// Takes those from anywhere who wait at the door.
    ///
    /// # Errors
    /// Nobody can be taken now, though somebody may wait.
    pub fn accept_tcp(&mut self, listener: &TcpListener) -> io::Result<()> {
        while let Some(socket) = accepted(listener.accept())? {
            let security = if self.tls.is_some() { Security::Required } else { Security::Plain };
            if self.all.values().filter(|client| client.remote).count() >= TCP_CLIENTS_MAX {
                self.give_up_slowest_stranger();
            }
            self.admit(Socket::from_tcp(socket), true, security);
        }
        Ok(())
    }

    fn admit(&mut self, socket: io::Result<Socket>, remote: bool, security: Security) {
        let remotes = self.all.values().filter(|client| client.remote).count();
        if self.all.len() >= CLIENTS_MAX || (remote && remotes >= TCP_CLIENTS_MAX) {
            return tracing::warn!(remote, "NBD client turned away: too many");
        }
        let socket = match socket {
            Ok(socket) => socket,
            Err(error) => return tracing::warn!(%error, "NBD client turned away"),
        };
        let id = ClientId(self.next_id);
        self.next_id += 1;
        let connection = Connection::new(Arc::clone(&self.export), security, self.pool.clone());
        let client = Client::new(connection, socket, remote);
        self.all.insert(id, client);
        self.stirred.insert(id);
        tracing::info!(client = id.0, remote, "NBD client connected");
    }

    /// Makes room: whoever connects and says nothing must not keep others out.
    fn give_up_slowest_stranger(&mut self) {
        let strangers = self.all.iter_mut().filter(|(_, client)| client.remote && client.is_timed());
        if let Some((id, client)) = strangers.min_by_key(|(_, client)| client.deadline) {
            tracing::warn!(client = id.0, "NBD client given up for a new one: too many");
            client.hang_up(*id);
            let id = *id;
            self.all.remove(&id); // it has no requests
        }
    }

    /// What to poll for.
    pub fn sources(&self) -> impl Iterator<Item = (ClientId, BorrowedFd<'_>, PollFlags)> {
        self.all.iter().filter_map(|(id, client)| {
            let socket = client.socket.as_ref()?;
            Some((*id, socket.as_fd(), client.wants()))
        })
    }

    /// Reads a client's share of this turn and hands over its requests.
    pub fn serve(&mut self, id: ClientId, flags: PollFlags, mut submit: impl FnMut(GuestRequest)) {
        let Some(client) = self.all.get_mut(&id) else {
            return;
        };
        self.stirred.insert(id);
        if client.drain(id) {
            return;
        }
        let gone = PollFlags::POLLHUP | PollFlags::POLLERR;
        let Some(socket) = &client.socket else { return };
        if socket.is_shaking() {
            self.shaking.insert(id);
        } else if client.connection.wants_input() {
            if flags.intersects(gone | PollFlags::POLLIN | socket.wants()) {
                client.read(TURN_BYTES_MAX, &mut submit);
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
        self.shake_one();
        while let Some(id) = self.stirred.pop_first() {
            let Some(client) = self.all.get_mut(&id) else {
                continue;
            };
            if client.is_leaving() {
                continue;
            }
            client.write(id);
            if client.connection.wants_tls() {
                client.start_tls(id, self.tls.as_ref());
            }
            if client.socket.is_some() {
                let mut hand_over = |request| {
                    handed_over = true;
                    submit(id, request);
                };
                // Refusals are sent at once. What leaves makes room, perhaps for a
                // request that is here and that no poll would tell of any more;
                // what does not leave is polled for.
                loop {
                    while let Some(request) = client.connection.next_request() {
                        hand_over(request);
                    }
                    client.read_pending(&mut hand_over);
                    if !client.connection.has_output() {
                        break;
                    }
                    client.write(id);
                    if client.connection.has_output() {
                        break;
                    }
                }
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

    /// Takes one TLS handshake a step further: it may cost as much as
    /// hundreds of requests, so nobody waits for more than one. The others'
    /// sockets stay ready, and each has its turn.
    fn shake_one(&mut self) {
        let after = self.shaking.range(ClientId(self.shaken.0 + 1)..).next();
        let Some(id) = after.or(self.shaking.first()).copied() else { return };
        self.shaking.clear();
        self.shaken = id;
        if let Some(client) = self.all.get_mut(&id) {
            client.shake(id);
            self.stirred.insert(id);
        }
    }

    /// When the next client has had its time.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.all.values().filter(|client| client.is_timed()).map(|client| client.deadline).min()
    }

    /// Disconnects those who did not finish their handshake in time, or did
    /// not leave.
    pub fn drop_late_handshakes(&mut self, now: Instant) {
        for (id, client) in &mut self.all {
            if client.is_timed() && client.deadline <= now {
                tracing::warn!(client = id.0, "NBD client's time is up");
                client.hang_up(*id);
                self.stirred.insert(*id);
            }
        }
    }
}
