//! One NBD client: its socket, and the [`Connection`] behind it.

use std::io::{self, IoSlice};
use std::time::Instant;

use nix::poll::PollFlags;

use super::clients::ClientId;
use super::transport::{Socket, Transport};
use crate::limits::{HANDSHAKE_TIME_MAX, LINGER_TIME_MAX, TURN_BYTES_MAX};
use crate::nbd::{Connection, GuestRequest};
use crate::tls::Tls;

/// Most pieces given to one write call.
const SLICES_MAX: usize = 64;

/// One client.
#[derive(Debug)]
pub(super) struct Client {
    pub(super) connection: Connection,
    /// `None` once the connection is over. The entry stays, and counts
    /// against the limit, until the core has finished its requests: so the
    /// memory those hold is bounded however often somebody reconnects.
    pub(super) socket: Option<Transport>,
    /// It came over TCP.
    pub(super) remote: bool,
    /// When its time is up, while [`Client::is_timed`].
    pub(super) deadline: Instant,
    /// Our last word is said, and our half of the connection closed.
    leaving: bool,
}

impl Client {
    /// One that has just connected.
    pub(super) fn new(connection: Connection, socket: Socket, remote: bool) -> Self {
        let deadline = Instant::now() + HANDSHAKE_TIME_MAX;
        Self { connection, socket: Some(Transport::Plain(socket)), remote, deadline, leaving: false }
    }

    /// Whether it has chosen the export, and is still there.
    pub(super) fn is_transmitting(&self) -> bool {
        self.socket.is_some() && !self.leaving && self.connection.is_transmitting()
    }

    /// Whether it uses the disk, and does not only look on.
    pub(super) fn is_guest(&self) -> bool {
        self.is_transmitting() && !self.connection.is_observer()
    }

    /// Whether nothing is said to it any more.
    pub(super) fn is_leaving(&self) -> bool {
        self.leaving && self.socket.is_some()
    }

    /// Whether its time is limited: it has not chosen the export yet, or is
    /// only to take our last word.
    pub(super) fn is_timed(&self) -> bool {
        self.socket.is_some() && (self.leaving || !self.connection.is_transmitting())
    }

    /// What to poll for.
    pub(super) fn wants(&self) -> PollFlags {
        let Some(socket) = &self.socket else { return PollFlags::empty() };
        if self.leaving {
            return PollFlags::POLLIN;
        }
        if socket.is_shaking() {
            return socket.wants();
        }
        let mut want = PollFlags::empty();
        want.set(PollFlags::POLLIN, self.connection.wants_input());
        want.set(PollFlags::POLLOUT, self.connection.has_output());
        if self.connection.wants_input() {
            // Only while it is read: else it would be ready for nothing.
            want |= socket.wants();
        }
        want
    }

    /// Begins TLS, which it asked for.
    pub(super) fn start_tls(&mut self, id: ClientId, tls: Option<&Tls>) {
        let (Some(socket), Some(tls)) = (self.socket.take(), tls) else { return };
        match socket.start_tls(tls) {
            Ok(socket) => {
                self.socket = Some(socket);
                self.connection.tls_begun();
            }
            Err(error) => {
                tracing::warn!(client = id.number(), %error, "no TLS for an NBD client");
                self.connection.abandon();
            }
        }
    }

    /// Takes its TLS handshake a step further.
    pub(super) fn shake(&mut self, id: ClientId) {
        if let Some(socket) = &mut self.socket
            && let Err(error) = socket.shake()
        {
            tracing::warn!(client = id.number(), %error, "a TLS handshake failed");
            self.leave(id);
        }
    }

    /// Reads about `bytes_max` at most.
    pub(super) fn read(&mut self, bytes_max: usize, submit: &mut impl FnMut(GuestRequest)) {
        let Some(socket) = &mut self.socket else {
            return;
        };
        let mut taken = 0;
        while taken < bytes_max {
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
                    if n < wanted && socket.reads_all() {
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

    /// Reads what TLS has decrypted already: no poll would tell of it.
    pub(super) fn read_pending(&mut self, submit: &mut impl FnMut(GuestRequest)) {
        while let Some(socket) = &self.socket
            && self.connection.wants_input()
            && socket.pending() > 0
        {
            self.read(socket.pending(), submit);
        }
    }

    /// Sends what can be sent.
    pub(super) fn write(&mut self, id: ClientId) {
        if let Err(error) = self.try_write() {
            tracing::debug!(client = id.number(), %error, "NBD client gone while sending");
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

    /// Ends what is said to it, and waits until it has read that: closed with
    /// words of its own unread, the system would cut off ours too, such as the
    /// alert of TLS that says why.
    fn leave(&mut self, id: ClientId) {
        self.connection.abandon();
        if self.socket.as_ref().is_some_and(|socket| socket.half_close().is_ok()) {
            self.leaving = true;
            self.deadline = Instant::now() + LINGER_TIME_MAX;
        } else {
            self.hang_up(id); // it is gone
        }
    }

    /// Drops what one that is leaving still says; whether it is leaving.
    pub(super) fn drain(&mut self, id: ClientId) -> bool {
        if self.leaving && self.socket.as_mut().is_some_and(|socket| !socket.drain(TURN_BYTES_MAX)) {
            self.hang_up(id);
        }
        self.leaving
    }

    /// Closes the socket. What the core still has is finished silently.
    pub(super) fn hang_up(&mut self, id: ClientId) {
        if let Some(socket) = self.socket.take() {
            socket.close();
            self.connection.abandon();
            tracing::info!(client = id.number(), "NBD client disconnected");
        }
    }
}
