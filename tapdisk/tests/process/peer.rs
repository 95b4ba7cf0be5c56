//! A client by hand, from the protocol's text alone: its numbers are stated
//! here once more, so that a wrong one in the server is seen.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use super::support::*;

pub const READ: u16 = 0;
pub const WRITE: u16 = 1;
pub const FLUSH: u16 = 3;
pub const TRIM: u16 = 4;
pub const WRITE_ZEROES: u16 = 6;
pub const FUA: u16 = 1;

pub const OPT_ABORT: u32 = 2;
pub const OPT_LIST: u32 = 3;
pub const OPT_GO: u32 = 7;
pub const OPT_STRUCTURED_REPLY: u32 = 8;

pub const REP_ACK: u32 = 1;
pub const REP_SERVER: u32 = 2;
pub const REP_INFO: u32 = 3;
pub const REP_ERR_UNSUP: u32 = 0x8000_0001;
pub const REP_ERR_UNKNOWN: u32 = 0x8000_0006;

/// What every connection begins with: fixed newstyle, and zeros left out.
pub const GREETING: &[u8] = b"NBDMAGICIHAVEOPT\0\x03";
/// A client that can do both.
pub const CLIENT_FLAGS: [u8; 4] = [0, 0, 0, 3];

/// Longer than anything takes on a machine that is busy with other things.
const PATIENCE: Duration = Duration::from_secs(120);

/// An option as it is sent.
pub fn option(number: u32, data: &[u8]) -> Vec<u8> {
    let len = (data.len() as u32).to_be_bytes();
    [b"IHAVEOPT", number.to_be_bytes().as_slice(), &len, data].concat()
}

/// One end of a connection.
pub struct Peer {
    pub socket: UnixStream,
    structured: bool,
}

/// The answer to one request.
#[derive(Debug, PartialEq, Eq)]
pub struct Answer {
    pub cookie: u64,
    pub error: u32,
    /// Of a read that succeeded.
    pub data: Vec<u8>,
}

impl Peer {
    /// Connected, and nothing said or heard.
    pub fn connect(place: &Place) -> Self {
        let socket = UnixStream::connect(place.path("run/nbd.sock")).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket.set_write_timeout(Some(PATIENCE)).unwrap();
        Self { socket, structured: false }
    }

    /// Past the greeting and the client's flags.
    pub fn greeted(place: &Place) -> Self {
        let mut peer = Self::connect(place);
        let mut greeting = [0; GREETING.len()];
        peer.socket.read_exact(&mut greeting).unwrap();
        assert_eq!(greeting, GREETING);
        peer.socket.write_all(&CLIENT_FLAGS).unwrap();
        peer
    }

    /// Past the whole handshake; and the largest request the server takes.
    pub fn ready(place: &Place, structured: bool) -> (Self, u32) {
        let mut peer = Self::greeted(place);
        if structured {
            assert_eq!(peer.choose(OPT_STRUCTURED_REPLY, &[]).0, REP_ACK);
            peer.structured = true;
        }
        // No name, and one thing asked for: the block sizes.
        let (end, infos) = peer.choose(OPT_GO, &[0, 0, 0, 0, 0, 1, 0, 3]);
        assert_eq!(end, REP_ACK);
        let info = |kind: u16| {
            let is_it =
                |(reply, data): &&(u32, Vec<u8>)| *reply == REP_INFO && data[..2] == kind.to_be_bytes();
            infos.iter().find(is_it).unwrap().1.clone()
        };
        assert_eq!(info(0)[2..10], DISK_BYTES.to_be_bytes());
        let sizes = info(3);
        assert_eq!(sizes.len(), 14);
        (peer, u32::from_be_bytes(sizes[10..].try_into().unwrap()))
    }

    /// Sends an option: the last of its replies, and those before it.
    pub fn choose(&mut self, number: u32, data: &[u8]) -> (u32, Vec<(u32, Vec<u8>)>) {
        self.socket.write_all(&option(number, data)).unwrap();
        let mut before = Vec::new();
        loop {
            let mut head = [0; 20];
            self.socket.read_exact(&mut head).unwrap();
            assert_eq!(head[..8], 0x0003_e889_0455_65a9u64.to_be_bytes());
            assert_eq!(head[8..12], number.to_be_bytes(), "a reply to another option");
            let kind = u32::from_be_bytes(head[12..16].try_into().unwrap());
            let mut data = vec![0; u32::from_be_bytes(head[16..].try_into().unwrap()) as usize];
            self.socket.read_exact(&mut data).unwrap();
            if kind != REP_SERVER && kind != REP_INFO {
                return (kind, before);
            }
            before.push((kind, data));
        }
    }

    /// All that the server still says until it ends the connection.
    pub fn rest(&mut self) -> Vec<u8> {
        let mut said = Vec::new();
        self.socket.read_to_end(&mut said).unwrap();
        said
    }

    /// The other half: for whoever reads while this one writes.
    pub fn again(&self) -> Self {
        Self { socket: self.socket.try_clone().unwrap(), structured: self.structured }
    }

    /// Sends a request; `Err` if the server does not take it.
    pub fn ask(
        &mut self,
        [flags, command]: [u16; 2],
        cookie: u64,
        (offset, len): (u64, u32),
        data: &[u8],
    ) -> io::Result<()> {
        let mut bytes = 0x2560_9513u32.to_be_bytes().to_vec();
        bytes.extend(flags.to_be_bytes());
        bytes.extend(command.to_be_bytes());
        bytes.extend(cookie.to_be_bytes());
        bytes.extend(offset.to_be_bytes());
        bytes.extend(len.to_be_bytes());
        bytes.extend(data);
        self.socket.write_all(&bytes)
    }

    /// The next answer, whichever request it is of; `read` tells the range of
    /// a read by its cookie. Panics on what the protocol does not allow.
    pub fn answer(&mut self, read: impl Fn(u64) -> Option<(u64, u32)>) -> io::Result<Answer> {
        let mut head = [0; 16];
        self.socket.read_exact(&mut head)?;
        let word = |at: usize| u32::from_be_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let cookie = u64::from_be_bytes(head[8..].try_into().unwrap());
        match word(0) {
            0x6744_6698 => {
                let error = word(4);
                let mut data = Vec::new();
                if let (Some((_, len)), 0) = (read(cookie), error) {
                    assert!(!self.structured, "a read answered without chunks");
                    data.resize(len as usize, 0);
                    self.socket.read_exact(&mut data)?;
                }
                Ok(Answer { cookie, error, data })
            }
            0x668e_33ef => self.chunks(head, cookie, read(cookie)),
            other => panic!("out of step: {other:#x}"),
        }
    }

    /// The rest of a structured reply whose first chunk begins with `head`.
    fn chunks(&mut self, mut head: [u8; 16], cookie: u64, read: Option<(u64, u32)>) -> io::Result<Answer> {
        assert!(self.structured, "chunks for a client that did not ask for them");
        let (offset, len) = read.unwrap_or_default();
        let mut answer = Answer { cookie, error: 0, data: vec![0; len as usize] };
        let mut filled = 0;
        loop {
            let mut size = [0; 4];
            self.socket.read_exact(&mut size)?;
            let mut chunk = vec![0; u32::from_be_bytes(size) as usize];
            self.socket.read_exact(&mut chunk)?;
            let number = |at: usize| u64::from_be_bytes(chunk[at..at + 8].try_into().unwrap()) as usize;
            match u16::from_be_bytes([head[6], head[7]]) {
                0 => assert!(chunk.is_empty()),
                1 => {
                    let at = number(0) - offset as usize;
                    answer.data[at..at + chunk.len() - 8].copy_from_slice(&chunk[8..]);
                    filled += chunk.len() - 8;
                }
                2 => filled += u32::from_be_bytes(chunk[8..12].try_into().unwrap()) as usize,
                kind => {
                    assert!(kind >= 0x8000, "a chunk of kind {kind}");
                    answer.error = u32::from_be_bytes(chunk[..4].try_into().unwrap());
                }
            }
            if head[5] & 1 != 0 {
                break;
            }
            self.socket.read_exact(&mut head)?;
            assert_eq!(head[..4], 0x668e_33efu32.to_be_bytes());
            assert_eq!(head[8..], cookie.to_be_bytes(), "chunks of two replies mixed");
        }
        if answer.error != 0 {
            answer.data.clear();
        } else {
            assert_eq!(filled, len as usize, "bytes left out or said twice");
        }
        Ok(answer)
    }
}
