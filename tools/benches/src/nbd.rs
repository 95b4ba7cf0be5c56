//! The client of every NBD measure, ours and peers' alike: one thread, one
//! Unix socket, a fixed number of requests in flight.
//!
//! Lean on purpose, so that the server is what is measured: whatever replies
//! one `read` brings are answered with one `write` of as many requests; data
//! is received and thrown away. Simple replies only. Absent: TLS, structured
//! replies, checking of what was read (the tests do that).

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::{RngCore, SeedableRng};
use tapdisk_control::nbd::negotiate;
use tapdisk_control::nbd::wire::{REQUEST_MAGIC, SIMPLE_REPLY_MAGIC, command};

/// Most requests in flight.
pub const DEPTH_MAX: usize = 256;
/// Longest request in bytes.
pub const REQUEST_BYTES_MAX: usize = 2 << 20;
/// Longest time without any reply before a server counts as hung.
const SILENCE_MAX: Duration = Duration::from_secs(60);
/// Bytes taken in at once.
const RECEIVE_BYTES: usize = 256 << 10;
const HEADER_BYTES: usize = 16;

/// What to ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// NBD_CMD_READ.
    Read,
    /// NBD_CMD_WRITE of bytes that do not compress.
    Write,
    /// NBD_CMD_FLUSH; offsets are ignored.
    Flush,
}

impl Kind {
    fn command(self) -> u16 {
        match self {
            Self::Read => command::READ,
            Self::Write => command::WRITE,
            Self::Flush => command::FLUSH,
        }
    }
}

/// A load.
#[derive(Debug, Clone, Copy)]
pub struct Job {
    /// Which request.
    pub kind: Kind,
    /// Bytes of each.
    pub request_bytes: u32,
    /// Requests in flight.
    pub depth: usize,
    /// Ends after so long; `None`: when there are no more offsets.
    pub time: Option<Duration>,
}

/// One answered request.
#[derive(Debug, Clone, Copy)]
pub struct Answered {
    /// When it was sent.
    pub sent: Instant,
    /// When its answer was complete.
    pub at: Instant,
}

/// A connection in its transmission phase.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    payload: Vec<u8>,
    size_bytes: u64,
}

impl Connection {
    /// Connects to `export` at `socket`.
    ///
    /// # Errors
    /// What connecting says, or a server that speaks otherwise.
    pub fn open(socket: &Path, export: &str) -> io::Result<Self> {
        let mut stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(SILENCE_MAX))?;
        let size_bytes = negotiate(&mut stream, export)?;
        let mut payload = vec![0; REQUEST_BYTES_MAX];
        SmallRng::seed_from_u64(1).fill_bytes(&mut payload);
        Ok(Self { stream, payload, size_bytes })
    }

    /// Size of the export in bytes.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Runs a load over `offsets`; `seen` hears of every answer. Returns once
    /// all that was sent is answered.
    ///
    /// # Errors
    /// The connection broke, the server fell silent or answered with an
    /// error, or the job is beyond the limits of this module.
    pub fn run(
        &mut self,
        job: &Job,
        offsets: &mut dyn Iterator<Item = u64>,
        mut seen: impl FnMut(Answered),
    ) -> io::Result<()> {
        if job.depth == 0 || job.depth > DEPTH_MAX || job.request_bytes as usize > REQUEST_BYTES_MAX {
            return Err(io::Error::other("beyond the client's limits"));
        }
        let began = Instant::now();
        let mut sent_at = vec![began; job.depth];
        let mut free: Vec<usize> = (0..job.depth).rev().collect();
        let data_bytes = if job.kind == Kind::Read { job.request_bytes as usize } else { 0 };
        let mut replies = Replies::new(data_bytes);
        let mut batch = Vec::with_capacity(job.depth * 32);
        let mut received = vec![0; RECEIVE_BYTES];
        loop {
            let now = Instant::now();
            let over = job.time.is_some_and(|time| now - began >= time);
            batch.clear();
            while !over && let Some(slot) = free.pop() {
                let Some(offset) = offsets.next() else {
                    free.push(slot);
                    break;
                };
                sent_at[slot] = now;
                self.request(&mut batch, job, slot, offset);
            }
            self.stream.write_all(&batch)?;
            if free.len() == job.depth {
                return Ok(());
            }
            let n = self.stream.read(&mut received)?;
            if n == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let at = Instant::now();
            replies.feed(&received[..n], |handle| {
                let slot = usize::try_from(handle).ok().filter(|slot| *slot < job.depth);
                let slot = slot.ok_or_else(|| protocol("a reply to nothing"))?;
                seen(Answered { sent: sent_at[slot], at });
                free.push(slot);
                Ok(())
            })?;
        }
    }

    fn request(&self, batch: &mut Vec<u8>, job: &Job, slot: usize, offset: u64) {
        let (offset, bytes) = match job.kind {
            Kind::Flush => (0, 0),
            Kind::Read | Kind::Write => (offset, job.request_bytes),
        };
        batch.extend_from_slice(&REQUEST_MAGIC.to_be_bytes());
        batch.extend_from_slice(&[0, 0]);
        batch.extend_from_slice(&job.kind.command().to_be_bytes());
        batch.extend_from_slice(&(slot as u64).to_be_bytes());
        batch.extend_from_slice(&offset.to_be_bytes());
        batch.extend_from_slice(&bytes.to_be_bytes());
        if job.kind == Kind::Write {
            batch.extend_from_slice(&self.payload[..bytes as usize]);
        }
    }

    /// Reads `bytes` at `offset`, and returns them.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub fn read_at(&mut self, offset: u64, bytes: u32) -> io::Result<Vec<u8>> {
        let mut request = Vec::new();
        let job = Job { kind: Kind::Read, request_bytes: bytes, depth: 1, time: None };
        self.request(&mut request, &job, 0, offset);
        self.stream.write_all(&request)?;
        let mut header = [0; HEADER_BYTES];
        self.stream.read_exact(&mut header)?;
        handle_of(&header)?;
        let mut data = vec![0; bytes as usize];
        self.stream.read_exact(&mut data)?;
        Ok(data)
    }

    /// Writes `data` at `offset` and waits for the answer.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub fn write_at(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut request = Vec::with_capacity(28 + data.len());
        let bytes = u32::try_from(data.len()).map_err(io::Error::other)?;
        let job = Job { kind: Kind::Read, request_bytes: bytes, depth: 1, time: None };
        self.request(&mut request, &job, 0, offset);
        request[6..8].copy_from_slice(&Kind::Write.command().to_be_bytes());
        request.extend_from_slice(data);
        self.stream.write_all(&request)?;
        let mut header = [0; HEADER_BYTES];
        self.stream.read_exact(&mut header)?;
        handle_of(&header).map(drop)
    }
}

/// Cuts a stream of simple replies, however it arrives, into answers.
#[derive(Debug)]
struct Replies {
    /// Bytes of data behind each reply without an error.
    data_bytes: usize,
    header: [u8; HEADER_BYTES],
    have: usize,
    /// Bytes of data still to come for the reply in `header`.
    data_left: usize,
}

impl Replies {
    fn new(data_bytes: usize) -> Self {
        Self { data_bytes, header: [0; HEADER_BYTES], have: 0, data_left: 0 }
    }

    /// Calls `answered` with the handle of each reply that is complete.
    fn feed(&mut self, mut bytes: &[u8], mut answered: impl FnMut(u64) -> io::Result<()>) -> io::Result<()> {
        while !bytes.is_empty() {
            if self.have < HEADER_BYTES {
                let n = bytes.len().min(HEADER_BYTES - self.have);
                self.header[self.have..self.have + n].copy_from_slice(&bytes[..n]);
                self.have += n;
                bytes = &bytes[n..];
                if self.have < HEADER_BYTES {
                    return Ok(());
                }
                self.data_left = self.data_bytes;
            }
            let n = bytes.len().min(self.data_left);
            self.data_left -= n;
            bytes = &bytes[n..];
            if self.data_left == 0 {
                self.have = 0;
                answered(handle_of(&self.header)?)?;
            } else {
                // An error has no data behind it: say so before waiting for any.
                handle_of(&self.header)?;
            }
        }
        Ok(())
    }
}

/// The handle of a reply that is no error.
fn handle_of(header: &[u8; HEADER_BYTES]) -> io::Result<u64> {
    let [m0, m1, m2, m3, e0, e1, e2, e3, handle @ ..] = *header;
    if u32::from_be_bytes([m0, m1, m2, m3]) != SIMPLE_REPLY_MAGIC {
        return Err(protocol("not a simple reply"));
    }
    match u32::from_be_bytes([e0, e1, e2, e3]) {
        0 => Ok(u64::from_be_bytes(handle)),
        errno => Err(io::Error::other(format!("the server answered with error {errno}"))),
    }
}

fn protocol(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reply(handle: u64, errno: u32, data: usize) -> Vec<u8> {
        let mut bytes = SIMPLE_REPLY_MAGIC.to_be_bytes().to_vec();
        bytes.extend(errno.to_be_bytes());
        bytes.extend(handle.to_be_bytes());
        bytes.extend(vec![0x67; data]);
        bytes
    }

    /// Answers every write, the last of each batch first.
    fn serve(mut stream: UnixStream, request_bytes: usize) {
        let mut requests = Vec::new();
        let mut buf = [0; 65536];
        while let Ok(n @ 1..) = stream.read(&mut buf) {
            requests.extend_from_slice(&buf[..n]);
            let whole = requests.len() / (28 + request_bytes) * (28 + request_bytes);
            let taken: Vec<u8> = requests.drain(..whole).collect();
            for request in taken.chunks(28 + request_bytes).rev() {
                let handle = request[8..16].try_into().unwrap();
                stream.write_all(&reply(u64::from_be_bytes(handle), 0, 0)).unwrap();
            }
        }
    }

    #[test]
    fn a_load_ends_when_its_time_or_its_offsets_do_and_every_answer_is_heard() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        std::thread::spawn(|| serve(theirs, 512));
        let mut connection = Connection { stream: ours, payload: vec![7; 512], size_bytes: 1 << 20 };
        let job = Job { kind: Kind::Write, request_bytes: 512, depth: 8, time: None };
        let mut heard = 0;
        connection.run(&job, &mut (0..1000).map(|n| n * 512), |_| heard += 1).unwrap();
        assert_eq!(heard, 1000);
        let (sent, mut heard) = (std::cell::Cell::new(0), 0);
        let mut endless = std::iter::repeat_with(|| {
            sent.set(sent.get() + 1);
            0
        });
        let job = Job { time: Some(Duration::from_millis(30)), ..job };
        connection.run(&job, &mut endless, |_| heard += 1).unwrap();
        assert!(heard > 0);
        assert_eq!(heard, sent.get());
    }

    #[test]
    fn replies_are_found_however_the_stream_is_cut() {
        for data in [0, 1, 4096] {
            let stream: Vec<u8> = (0..5).flat_map(|handle| reply(handle, 0, data)).collect();
            for step in [1, 7, 16, 4112, 100_000] {
                let (mut replies, mut handles) = (Replies::new(data), Vec::new());
                for part in stream.chunks(step) {
                    let heard = replies.feed(part, |handle| {
                        handles.push(handle);
                        Ok(())
                    });
                    heard.unwrap();
                }
                assert_eq!(handles, [0, 1, 2, 3, 4], "{data} bytes in steps of {step}");
            }
        }
    }

    #[test]
    fn errors_and_garbage_end_the_load() {
        let mut stream = reply(0, 0, 512);
        stream.extend(reply(1, 5, 0));
        stream.extend(reply(2, 0, 512));
        assert!(Replies::new(512).feed(&stream, |_| Ok(())).is_err());
        assert!(Replies::new(0).feed(&[7; 16], |_| Ok(())).is_err());
    }
}
