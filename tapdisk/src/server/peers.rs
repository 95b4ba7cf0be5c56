//! Control peers: JSON lines over a Unix socket.
//!
//! A peer's calls are served in order, one at a time: the next line is looked
//! at when the last answer to the one before was given. A peer that hangs up
//! is reported at once, whatever it was waiting for: a pause is a lease on
//! its connection.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use nix::poll::PollFlags;
use tapdisk_control::{Answer, Call, LINE_BYTES_MAX, Refusal};

use super::doors::accepted;
use crate::driver::PeerId;
use crate::limits::{CONTROL_OUTPUT_BYTES_MAX, CONTROL_PEERS_MAX};

/// What happened at a peer.
#[derive(Debug)]
pub enum Event {
    /// It asks.
    Call(PeerId, Call),
    /// It will never ask again, nor wait for an answer.
    Gone(PeerId),
}

/// All peers.
#[derive(Debug, Default)]
pub struct Peers {
    all: BTreeMap<PeerId, Peer>,
    last_id: u64,
}

/// One peer.
#[derive(Debug)]
struct Peer {
    socket: UnixStream,
    /// Bytes received, not yet understood.
    input: Vec<u8>,
    /// Bytes to send.
    output: Vec<u8>,
    /// Nothing more will come.
    hung_up: bool,
    state: State,
}

/// Where a peer's conversation stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// The next line may be taken.
    Idle,
    /// The core is on a call of it.
    Waiting,
    /// It hung up, or was told to go; the core has not heard yet.
    Leaving,
    /// The core knows; only output is left.
    Left,
}

impl Peers {
    /// Takes those who wait at the door.
    ///
    /// # Errors
    /// Nobody can be taken now, though somebody may wait.
    pub fn accept(&mut self, listener: &UnixListener) -> io::Result<()> {
        while let Some(socket) = accepted(listener.accept())? {
            self.admit(socket);
        }
        Ok(())
    }

    /// Takes one, if there is room.
    pub(super) fn admit(&mut self, socket: UnixStream) {
        if self.all.len() >= CONTROL_PEERS_MAX {
            return tracing::warn!(limit = CONTROL_PEERS_MAX, "control peer turned away: too many");
        }
        if let Err(error) = socket.set_nonblocking(true) {
            return tracing::warn!(%error, "control peer turned away");
        }
        self.last_id += 1; // the first is 1: 0 is the process itself
        let (input, output) = (Vec::new(), Vec::new());
        let peer = Peer { socket, input, output, hung_up: false, state: State::Idle };
        self.all.insert(PeerId(self.last_id), peer);
    }

    /// What to poll for.
    pub fn sources(&self) -> impl Iterator<Item = (PeerId, BorrowedFd<'_>, PollFlags)> {
        self.all.iter().map(|(id, peer)| {
            let mut want = PollFlags::empty();
            want.set(PollFlags::POLLIN, matches!(peer.state, State::Idle | State::Waiting));
            want.set(PollFlags::POLLOUT, !peer.output.is_empty());
            (*id, peer.socket.as_fd(), want)
        })
    }

    /// Reads from a peer.
    pub fn serve(&mut self, id: PeerId, flags: PollFlags) {
        let Some(peer) = self.all.get_mut(&id) else {
            return;
        };
        let gone = PollFlags::POLLHUP | PollFlags::POLLERR;
        if !flags.intersects(gone | PollFlags::POLLIN) {
            return;
        }
        if peer.state == State::Left {
            peer.output.clear(); // nobody is there to read it
        } else if !peer.read() {
            peer.hung_up = true;
        }
    }

    /// Gives the next call of each peer that waits for none, and who left;
    /// whether there was anything.
    pub fn take_calls(&mut self, mut take: impl FnMut(Event)) -> bool {
        let mut any = false;
        for (id, peer) in &mut self.all {
            while peer.state == State::Idle
                && let Some(line) = peer.next_line()
            {
                match serde_json::from_slice::<Call>(&line) {
                    Ok(call) => {
                        peer.state = State::Waiting;
                        any = true;
                        take(Event::Call(*id, call));
                    }
                    Err(error) => peer.refuse(&error.to_string()),
                }
            }
            if peer.input.len() >= LINE_BYTES_MAX {
                peer.refuse("too much at once");
                peer.leave();
            }
            if peer.hung_up {
                peer.leave();
            }
            if peer.state == State::Leaving {
                peer.state = State::Left;
                any = true;
                take(Event::Gone(*id));
            }
        }
        any
    }

    /// Sends an answer; silently dropped if the peer is gone.
    pub fn answer(&mut self, id: PeerId, answer: &Answer) {
        let Some(peer) = self.all.get_mut(&id) else {
            return;
        };
        if answer.last && peer.state == State::Waiting {
            peer.state = State::Idle;
        }
        peer.say(answer);
    }

    /// Sends what can be sent, and forgets those who left.
    pub fn flush(&mut self) {
        self.all.retain(|_, peer| {
            if peer.write().is_err() || peer.output.len() > CONTROL_OUTPUT_BYTES_MAX {
                peer.output.clear();
                peer.leave();
            }
            peer.state != State::Left || !peer.output.is_empty()
        });
    }

    /// Sends the last answers, until `deadline` at the latest.
    pub fn farewell(&mut self, deadline: Instant) {
        for peer in self.all.values_mut() {
            let left = deadline.saturating_duration_since(Instant::now());
            let limit = left.max(Duration::from_millis(1));
            let blocking = peer.socket.set_nonblocking(false);
            if blocking.and(peer.socket.set_write_timeout(Some(limit))).is_ok() {
                // Whoever does not take it in time sees the connection end.
                let _ = peer.socket.write_all(&peer.output);
            }
        }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // Whatever else still holds the socket, the peer hears of it now.
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
    }
}

impl Peer {
    /// Reads what is there; `false` at the end.
    fn read(&mut self) -> bool {
        let mut bytes = [0; 4096];
        while self.input.len() < LINE_BYTES_MAX {
            match self.socket.read(&mut bytes) {
                Ok(0) => return false,
                Ok(n) => self.input.extend_from_slice(bytes.get(..n).unwrap_or_default()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return error.kind() == io::ErrorKind::WouldBlock,
            }
        }
        true
    }

    fn next_line(&mut self) -> Option<Vec<u8>> {
        let end = self.input.iter().position(|byte| *byte == b'\n')?;
        Some(self.input.drain(..=end).collect())
    }

    fn say(&mut self, answer: &Answer) {
        match serde_json::to_vec(answer) {
            Ok(line) => {
                self.output.extend_from_slice(&line);
                self.output.push(b'\n');
            }
            Err(error) => tracing::error!(%error, "an answer that is no JSON"),
        }
    }

    /// Refuses a line in which there is no id to repeat.
    fn refuse(&mut self, detail: &str) {
        let outcome = Err(Refusal::Bad { detail: detail.to_owned() });
        self.say(&Answer { id: 0, last: true, outcome });
    }

    fn leave(&mut self) {
        if self.state != State::Left {
            self.state = State::Leaving;
        }
    }

    fn write(&mut self) -> io::Result<()> {
        while !self.output.is_empty() {
            match self.socket.write(&self.output) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => drop(self.output.drain(..n)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}
