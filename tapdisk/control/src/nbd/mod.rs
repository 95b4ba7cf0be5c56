//! A small NBD client over a Unix socket: fixed newstyle, pipelined.
//!
//! ```text
//!   caller ── Client::write/read/flush ──> socket ──> server
//!   caller <── Client::next <── channel <── reader thread <── socket
//! ```
//!
//! Requests are sent from the caller's thread; a thread of its own reads
//! replies, so that neither side can block the other however full the socket
//! is. Simple replies only: each carries the whole outcome of its request.
//!
//! The protocol gives the client 64 bits per request that come back in the
//! reply. Half of them number the request, the other half say how many bytes
//! of data follow the reply, so the reader needs no table of its own.
//!
//! Absent on purpose: TLS, TCP, structured replies, reconnecting.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

pub use self::handshake::negotiate;
use self::handshake::{protocol, u32_from, u64_from};
use self::wire::{REQUEST_MAGIC, SIMPLE_REPLY_MAGIC, command, command_flag};

mod handshake;
pub mod wire;

/// Added to the name of a tapdisk's export: the same disk, for reading only. A
/// client of that name is in nobody's way, so the disk can be detached under it.
pub const OBSERVER_SUFFIX: &str = "@observe";
/// Most requests in flight on one connection.
pub const IN_FLIGHT_MAX: usize = 64;
/// Longest request, data bytes.
pub const REQUEST_BYTES_MAX: u32 = 1 << 20;
/// Longest time a handshake step may take.
const HANDSHAKE_S_MAX: u64 = 10;

/// Number of a request, given by the client, never repeated on a connection
/// before four thousand million others.
pub type Ticket = u32;

/// A reply.
#[derive(Debug)]
pub struct Reply {
    /// Which request it answers.
    pub ticket: Ticket,
    /// The data of a read, nothing for others, or the server's errno.
    pub outcome: Result<Vec<u8>, u32>,
}

/// A connection to one export.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
    replies: Receiver<io::Result<Reply>>,
    reader: Option<JoinHandle<()>>,
    next_ticket: Ticket,
    in_flight: usize,
    size_bytes: u64,
}

impl Client {
    /// Connects to `export` on the socket at `path`.
    ///
    /// # Errors
    /// Whatever connecting says, or a server that speaks otherwise.
    pub fn connect(path: &Path, export: &str) -> io::Result<Self> {
        let mut stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(Duration::from_secs(HANDSHAKE_S_MAX)))?;
        let size_bytes = negotiate(&mut stream, export)?;
        stream.set_read_timeout(None)?;
        // As many places as requests: the reader thread never waits here.
        let (sender, replies) = sync_channel(IN_FLIGHT_MAX + 1);
        let socket = stream.try_clone()?;
        let reader = std::thread::Builder::new()
            .name("nbd replies".to_owned())
            .spawn(move || read_replies(socket, &sender))?;
        Ok(Self { stream, replies, reader: Some(reader), next_ticket: 0, in_flight: 0, size_bytes })
    }

    /// Size of the export in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Requests sent and not yet answered.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Asks for `len` bytes at `offset`.
    ///
    /// # Errors
    /// As [`Client::write`].
    pub fn read(&mut self, offset: u64, len: u32) -> io::Result<Ticket> {
        self.send(command::READ, 0, offset, len, len, &[])
    }

    /// Writes `data` at `offset`; with `fua` it is durable when answered.
    ///
    /// # Errors
    /// The connection broke, or the request is longer or one more than the
    /// limits of this module.
    pub fn write(&mut self, offset: u64, data: &[u8], fua: bool) -> io::Result<Ticket> {
        let len = u32::try_from(data.len()).map_err(io::Error::other)?;
        self.send(command::WRITE, if fua { command_flag::FUA } else { 0 }, offset, len, 0, data)
    }

    /// Makes `len` bytes at `offset` read as zeros.
    ///
    /// # Errors
    /// As [`Client::write`].
    pub fn write_zeroes(&mut self, offset: u64, len: u32) -> io::Result<Ticket> {
        self.send(command::WRITE_ZEROES, 0, offset, len, 0, &[])
    }

    /// Says that `len` bytes at `offset` are not needed any more.
    ///
    /// # Errors
    /// As [`Client::write`].
    pub fn trim(&mut self, offset: u64, len: u32) -> io::Result<Ticket> {
        self.send(command::TRIM, 0, offset, len, 0, &[])
    }

    /// Makes everything answered before durable.
    ///
    /// # Errors
    /// As [`Client::write`].
    pub fn flush(&mut self) -> io::Result<Ticket> {
        self.send(command::FLUSH, 0, 0, 0, 0, &[])
    }

    /// Waits for the next reply, in whatever order the server answers.
    ///
    /// # Errors
    /// The connection broke, or `limit` passed without a reply.
    pub fn next(&mut self, limit: Duration) -> io::Result<Reply> {
        let reply = self
            .replies
            .recv_timeout(limit)
            .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "no reply to an NBD request in time"))??;
        self.in_flight -= 1;
        Ok(reply)
    }

    fn send(
        &mut self,
        command: u16,
        flags: u16,
        offset: u64,
        len: u32,
        data_back: u32,
        data: &[u8],
    ) -> io::Result<Ticket> {
        if self.in_flight == IN_FLIGHT_MAX || len > REQUEST_BYTES_MAX {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "beyond the client's limits"));
        }
        let ticket = self.next_ticket;
        self.next_ticket = self.next_ticket.wrapping_add(1);
        let handle = u64::from(ticket) << 32 | u64::from(data_back);
        let mut message = Vec::with_capacity(28 + data.len());
        message.extend_from_slice(&REQUEST_MAGIC.to_be_bytes());
        message.extend_from_slice(&flags.to_be_bytes());
        message.extend_from_slice(&command.to_be_bytes());
        message.extend_from_slice(&handle.to_be_bytes());
        message.extend_from_slice(&offset.to_be_bytes());
        message.extend_from_slice(&len.to_be_bytes());
        message.extend_from_slice(data);
        self.stream.write_all(&message)?;
        self.in_flight += 1;
        Ok(ticket)
    }

    /// Says goodbye; what is still in flight is abandoned.
    pub fn close(mut self) {
        self.in_flight = 0;
        // The server may be gone already, which is as good as a goodbye.
        let _ = self.send(command::DISC, 0, 0, 0, 0, &[]);
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
    }
}

fn read_replies(mut stream: UnixStream, replies: &SyncSender<io::Result<Reply>>) {
    loop {
        let reply = read_reply(&mut stream);
        let broken = reply.is_err();
        if replies.send(reply).is_err() || broken {
            return;
        }
    }
}

fn read_reply(stream: &mut UnixStream) -> io::Result<Reply> {
    if u32_from(stream)? != SIMPLE_REPLY_MAGIC {
        return Err(protocol("not a simple reply"));
    }
    let error = u32_from(stream)?;
    let handle = u64_from(stream)?;
    let ticket = (handle >> 32) as u32;
    if error != 0 {
        return Ok(Reply { ticket, outcome: Err(error) });
    }
    // The low half is ours, but came back from the server: bound it again.
    let len = handle as u32;
    if len > REQUEST_BYTES_MAX {
        return Err(protocol("a reply to a request never sent"));
    }
    let mut data = vec![0; len as usize];
    stream.read_exact(&mut data)?;
    Ok(Reply { ticket, outcome: Ok(data) })
}
