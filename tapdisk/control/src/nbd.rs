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

/// Added to the name of a tapdisk's export: the same disk, for reading only. A
/// client of that name is in nobody's way, so the disk can be detached under it.
pub const OBSERVER_SUFFIX: &str = "@observe";
/// Most requests in flight on one connection.
pub const IN_FLIGHT_MAX: usize = 64;
/// Longest request, data bytes.
pub const REQUEST_BYTES_MAX: u32 = 1 << 20;
/// Longest time a handshake step may take.
const HANDSHAKE_S_MAX: u64 = 10;
/// Longest option reply read.
const OPTION_REPLY_BYTES_MAX: u32 = 64 * 1024;

const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943; // "NBDMAGIC"
const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054; // "IHAVEOPT"
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;
const FLAGS_FIXED_NO_ZEROES: u32 = 0b11;
const OPT_GO: u32 = 7;
const REP_ACK: u32 = 1;
const REP_INFO: u32 = 3;
const INFO_EXPORT: u16 = 0;
const CMD_READ: u16 = 0;
const CMD_WRITE: u16 = 1;
const CMD_DISCONNECT: u16 = 2;
const CMD_FLUSH: u16 = 3;
const CMD_TRIM: u16 = 4;
const CMD_WRITE_ZEROES: u16 = 6;
const FLAG_FUA: u16 = 1;

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
        self.send(CMD_READ, 0, offset, len, len, &[])
    }

    /// Writes `data` at `offset`; with `fua` it is durable when answered.
    ///
    /// # Errors
    /// The connection broke, or the request is longer or one more than the
    /// limits of this module.
    pub fn write(&mut self, offset: u64, data: &[u8], fua: bool) -> io::Result<Ticket> {
        let len = u32::try_from(data.len()).map_err(io::Error::other)?;
        self.send(CMD_WRITE, if fua { FLAG_FUA } else { 0 }, offset, len, 0, data)
    }

    /// Makes `len` bytes at `offset` read as zeros.
    ///
    /// # Errors
    /// As [`Client::write`].
    pub fn write_zeroes(&mut self, offset: u64, len: u32) -> io::Result<Ticket> {
        self.send(CMD_WRITE_ZEROES, 0, offset, len, 0, &[])
    }

    /// Says that `len` bytes at `offset` are not needed any more.
    ///
    /// # Errors
    /// As [`Client::write`].
    pub fn trim(&mut self, offset: u64, len: u32) -> io::Result<Ticket> {
        self.send(CMD_TRIM, 0, offset, len, 0, &[])
    }

    /// Makes everything answered before durable.
    ///
    /// # Errors
    /// As [`Client::write`].
    pub fn flush(&mut self) -> io::Result<Ticket> {
        self.send(CMD_FLUSH, 0, 0, 0, 0, &[])
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
        let _ = self.send(CMD_DISCONNECT, 0, 0, 0, 0, &[]);
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

/// Newstyle negotiation up to transmission; the export's size in bytes.
fn negotiate(stream: &mut UnixStream, export: &str) -> io::Result<u64> {
    if u64_from(stream)? != INIT_MAGIC || u64_from(stream)? != OPTION_MAGIC {
        return Err(protocol("no NBD newstyle server"));
    }
    let server_flags = u16_from(stream)?;
    if server_flags & 1 == 0 {
        return Err(protocol("the server does not speak fixed newstyle"));
    }
    stream.write_all(&FLAGS_FIXED_NO_ZEROES.to_be_bytes())?;
    let name_len = u32::try_from(export.len()).map_err(io::Error::other)?;
    let mut option = Vec::new();
    option.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
    option.extend_from_slice(&OPT_GO.to_be_bytes());
    option.extend_from_slice(&(name_len + 6).to_be_bytes());
    option.extend_from_slice(&name_len.to_be_bytes());
    option.extend_from_slice(export.as_bytes());
    option.extend_from_slice(&0u16.to_be_bytes());
    stream.write_all(&option)?;
    let mut size_bytes = None;
    loop {
        if u64_from(stream)? != OPTION_REPLY_MAGIC || u32_from(stream)? != OPT_GO {
            return Err(protocol("an answer to another option"));
        }
        let kind = u32_from(stream)?;
        let len = u32_from(stream)?;
        if len > OPTION_REPLY_BYTES_MAX {
            return Err(protocol("an option answer beyond any sense"));
        }
        let mut payload = vec![0; len as usize];
        stream.read_exact(&mut payload)?;
        match kind {
            REP_ACK => return size_bytes.ok_or_else(|| protocol("the server names no size")),
            REP_INFO => size_bytes = export_size(&payload).or(size_bytes),
            _ => {
                let why = String::from_utf8_lossy(&payload).into_owned();
                return Err(protocol(&format!("export \"{export}\" refused ({kind:#x}): {why}")));
            }
        }
    }
}

/// The size in an `NBD_INFO_EXPORT` payload.
fn export_size(payload: &[u8]) -> Option<u64> {
    let (kind, rest) = payload.split_first_chunk::<2>()?;
    let (size, _flags) = rest.split_first_chunk::<8>()?;
    (u16::from_be_bytes(*kind) == INFO_EXPORT).then(|| u64::from_be_bytes(*size))
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
    if u32_from(stream)? != REPLY_MAGIC {
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

fn u16_from(stream: &mut UnixStream) -> io::Result<u16> {
    let mut bytes = [0; 2];
    stream.read_exact(&mut bytes)?;
    Ok(u16::from_be_bytes(bytes))
}

fn u32_from(stream: &mut UnixStream) -> io::Result<u32> {
    let mut bytes = [0; 4];
    stream.read_exact(&mut bytes)?;
    Ok(u32::from_be_bytes(bytes))
}

fn u64_from(stream: &mut UnixStream) -> io::Result<u64> {
    let mut bytes = [0; 8];
    stream.read_exact(&mut bytes)?;
    Ok(u64::from_be_bytes(bytes))
}

fn protocol(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_owned())
}
