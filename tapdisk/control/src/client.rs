//! A blocking client with a time limit on every call.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};

use crate::{Answer, Call, LINE_BYTES_MAX, Refusal, Reply, Request};

/// Why a call brought no reply.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The tapdisk refused; it goes on as before.
    #[error("tapdisk refused: {0}")]
    Refused(#[from] Refusal),
    /// No answer could be had: it is dead, hung, or speaks otherwise.
    #[error("no answer from tapdisk: {0}")]
    Io(#[from] std::io::Error),
}

/// A connection to one tapdisk.
#[derive(Debug)]
pub struct Client {
    stream: BufReader<UnixStream>,
    next_id: u64,
}

impl Client {
    /// Connects to the control socket at `path`. `limit` bounds this, and each
    /// later read and write.
    ///
    /// # Errors
    /// Whatever connecting says; `WouldBlock` when nobody has taken the
    /// callers before us for that long: it hangs.
    pub fn connect(path: &Path, limit: Duration) -> std::io::Result<Self> {
        // The standard library's own connect would wait for a place in the
        // queue of callers without a limit.
        let socket = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
        let stream = UnixStream::from(socket);
        stream.set_read_timeout(Some(limit))?;
        stream.set_write_timeout(Some(limit))?;
        connect(stream.as_raw_fd(), &UnixAddr::new(path)?)?;
        Ok(Self { stream: BufReader::new(stream), next_id: 1 })
    }

    /// Asks and waits for the one answer.
    ///
    /// # Errors
    /// A refusal, or no answer within the limit.
    pub fn call(&mut self, request: Request) -> Result<Reply, ClientError> {
        let mut reply = self.begin(request)?;
        while !reply.last {
            reply = self.next_answer(reply.id)?;
        }
        Ok(reply.outcome?)
    }

    /// Asks and waits for the first answer of possibly several.
    ///
    /// # Errors
    /// A refusal is in the answer; an error here means no answer.
    pub fn begin(&mut self, request: Request) -> Result<Answer, ClientError> {
        let id = self.next_id;
        self.next_id += 1;
        let mut line = serde_json::to_vec(&Call { id, request }).map_err(std::io::Error::other)?;
        line.push(b'\n');
        self.stream.get_mut().write_all(&line)?;
        self.next_answer(id)
    }

    /// Waits for the next answer to call `id`.
    ///
    /// # Errors
    /// As [`Client::begin`].
    pub fn next_answer(&mut self, id: u64) -> Result<Answer, ClientError> {
        let mut line = Vec::new();
        let limit = LINE_BYTES_MAX as u64;
        let n = (&mut self.stream).take(limit).read_until(b'\n', &mut line)?;
        if n == 0 {
            return Err(std::io::Error::from(std::io::ErrorKind::UnexpectedEof).into());
        }
        let answer: Answer = serde_json::from_slice(&line).map_err(std::io::Error::other)?;
        if answer.id != id {
            return Err(std::io::Error::other("an answer to another call").into());
        }
        Ok(answer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::ErrorKind;
    use std::os::unix::net::UnixListener;

    #[test]
    fn a_full_queue_of_callers_is_waited_for_within_the_limit() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ctl.sock");
        let _nobody_accepts = UnixListener::bind(&path).unwrap();
        let limit = Duration::from_millis(50);
        let mut callers = Vec::new();
        let refused = loop {
            match Client::connect(&path, limit) {
                Ok(caller) => callers.push(caller),
                Err(error) => break error,
            }
            assert!(callers.len() < 10_000);
        };
        assert_eq!(refused.kind(), ErrorKind::WouldBlock);
        assert!(
            Client::connect(&folder.path().join("none"), limit)
                .is_err_and(|e| e.kind() == ErrorKind::NotFound)
        );
    }
}
