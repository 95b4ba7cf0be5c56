//! The NBD front end as a state machine without I/O.
//!
//! ```text
//!   socket bytes -> input_space/input_filled -> next_request -> engine
//!   socket bytes <- output/output_written    <- finish       <-
//! ```
//!
//! [`Connection`] never waits and never panics, whatever bytes arrive: a peer
//! out of step is [`Connection::is_over`]. A request's data is received
//! straight into the buffer that the disk operation uses, and sent from it.
//!
//! What a peer can make this process hold is bounded: at most
//! [`CLIENT_REQUESTS_MAX`] requests with [`CLIENT_BYTES_MAX`] of data between
//! a request's arrival and the moment the client took the last byte of its
//! reply. At either limit, [`Connection::input_space`] is empty until a reply
//! has left.
//!
//! Absent on purpose: sockets, time, the order of replies (whatever the
//! engine finishes first is answered first, as the protocol allows).

use std::collections::VecDeque;
use std::io::IoSlice;
use std::sync::Arc;

use zerocopy::IntoBytes;

#[cfg(any(test, feature = "fuzz"))]
pub mod fuzz;
pub mod handshake;
pub mod proto;
pub mod reply;
pub mod transmission;

pub use handshake::{Export, Security};

use crate::buffer::{Buffer, Exclusive, Pool, Shared};
use crate::engine::{Extent, RequestKind};
use crate::limits::{CLIENT_BYTES_MAX, CLIENT_REQUESTS_MAX, OPTION_BYTES_MAX};
use handshake::{Agreed, Handshake};
use proto::{Greeting, NbdError, OptionHeader, handshake_flag};
use transmission::{Asked, Expects, Header};

/// Bytes read ahead: the longest option with its header, and many requests.
const STAGING_BYTES: usize = 16 << 10;
const _: () = assert!(STAGING_BYTES >= OPTION_BYTES_MAX as usize + size_of::<OptionHeader>());
// Otherwise the largest request could never have room.
const _: () = assert!(CLIENT_BYTES_MAX >= crate::limits::REQUEST_BYTES_MAX + 2 * 511);

/// Names a request of a connection until it is finished.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot(u16);

/// A request for the engine.
#[derive(Debug)]
pub struct GuestRequest {
    /// To be given to [`Connection::finish`].
    pub slot: Slot,
    /// What is asked.
    pub kind: RequestKind,
    /// First byte on the virtual disk.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// The data of a write, or where that of a read goes, within all the
    /// sectors it touches: [`crate::unaligned::Cut`].
    pub buffer: Option<Buffer>,
}

/// What the next bytes from the peer are.
#[derive(Debug)]
enum Phase {
    /// The client's handshake flags.
    ClientFlags(Handshake),
    /// An option.
    Option {
        handshake: Handshake,
        /// How many came before.
        seen: u32,
    },
    /// Nothing, until TLS is there.
    StartTls { handshake: Handshake, seen: u32 },
    /// Data of an option too long to look at.
    SkipOption { handshake: Handshake, seen: u32, option: u32, left: u32 },
    /// A request's header.
    Request(Agreed),
    /// A write's data.
    Payload { agreed: Agreed, slot: Slot, kind: RequestKind, into: Exclusive, filled: usize },
    /// A refused write's data.
    Discard { agreed: Agreed, asked: Asked, error: NbdError, left: u32 },
    /// Nothing: the peer said goodbye and gets the replies it is owed.
    Goodbye(Agreed),
    /// Nothing: the peer is out of step, or was told all there is to say.
    Over,
}

/// A request between its arrival and the last byte of its reply.
#[derive(Debug)]
struct InFlight {
    asked: Asked,
    buffer: Option<Buffer>,
    /// Not yet finished: the engine has it, or its data is still arriving.
    open: bool,
}

/// Bytes to send: a head, then data.
#[derive(Debug)]
struct Piece {
    head: Vec<u8>,
    data: Option<Shared>,
    /// The slot that is free once this was sent.
    slot: Option<Slot>,
}

impl Piece {
    fn len(&self) -> usize {
        self.head.len() + self.data.as_ref().map_or(0, |data| data.len())
    }
}

/// One client's connection.
#[derive(Debug)]
pub struct Connection {
    export: Arc<Export>,
    security: Security,
    pool: Pool,
    phase: Phase,
    /// Bytes received and not yet understood: `staging[start..end]`.
    staging: Box<[u8]>,
    start: usize,
    end: usize,
    slots: Vec<Option<InFlight>>,
    free_slots: Vec<Slot>,
    /// Bytes of data in `slots`.
    held_bytes: usize,
    output: VecDeque<Piece>,
    /// Bytes of the first piece already sent.
    sent: usize,
}

impl Connection {
    /// A connection just accepted; the greeting is ready to be sent.
    #[must_use]
    pub fn new(export: Arc<Export>, security: Security, pool: Pool) -> Self {
        let greeting = Greeting {
            magic: proto::MAGIC.into(),
            option_magic: proto::OPTION_MAGIC.into(),
            flags: (handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES).into(),
        };
        let mut connection = Self {
            export,
            security,
            pool,
            phase: Phase::ClientFlags(Handshake::default()),
            staging: vec![0; STAGING_BYTES].into_boxed_slice(),
            start: 0,
            end: 0,
            slots: (0..CLIENT_REQUESTS_MAX).map(|_| None).collect(),
            free_slots: (0..CLIENT_REQUESTS_MAX as u16).rev().map(Slot).collect(),
            held_bytes: 0,
            output: VecDeque::new(),
            sent: 0,
        };
        connection.say(greeting.as_bytes().to_vec());
        connection
    }

    /// Whether the client waits for TLS to begin, everything before being
    /// sent.
    #[must_use]
    pub fn wants_tls(&self) -> bool {
        matches!(self.phase, Phase::StartTls { .. }) && self.output.is_empty()
    }

    /// Says that TLS has begun: from here on bytes come in and go out through
    /// it. What was agreed on before counts no more.
    pub fn tls_begun(&mut self) {
        if let Phase::StartTls { handshake, seen } = &self.phase {
            let handshake = Handshake { no_zeroes: handshake.no_zeroes, ..Handshake::default() };
            self.phase = Phase::Option { handshake, seen: *seen };
            self.security = Security::Secured;
        }
    }

    /// Where received bytes go; empty while nothing is to be read. Call
    /// [`Connection::next_request`] until it gives nothing before reading.
    pub fn input_space(&mut self) -> &mut [u8] {
        if self.is_blocked() {
            return &mut [];
        }
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
            if let Phase::Payload { into, filled, .. } = &mut self.phase {
                return into.get_mut(*filled..).unwrap_or_default();
            }
        } else if self.start > 0 {
            self.staging.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        self.staging.get_mut(self.end..).unwrap_or_default()
    }

    /// Says that `n` bytes were put into [`Connection::input_space`].
    pub fn input_filled(&mut self, n: usize) {
        match &mut self.phase {
            Phase::Payload { into, filled, .. } if self.start == self.end => {
                *filled = (*filled + n).min(into.len());
            }
            _ => self.end = (self.end + n).min(self.staging.len()),
        }
    }

    /// Says that no more bytes will come. What was asked is still answered.
    pub fn input_ended(&mut self) {
        self.phase = match std::mem::replace(&mut self.phase, Phase::Over) {
            Phase::Request(agreed) | Phase::Discard { agreed, .. } | Phase::Goodbye(agreed) => {
                Phase::Goodbye(agreed)
            }
            Phase::Payload { agreed, slot, into, .. } => {
                drop(into);
                self.release(slot);
                Phase::Goodbye(agreed)
            }
            _ => Phase::Over,
        };
    }

    /// The next request, if enough bytes for one have come and the limits
    /// allow it.
    pub fn next_request(&mut self) -> Option<GuestRequest> {
        loop {
            let phase = std::mem::replace(&mut self.phase, Phase::Over);
            match self.step(phase) {
                Step::Wait => return None,
                Step::Again => {}
                Step::Request(request) => return Some(request),
            }
        }
    }

    /// Answers a request. `extents` are those of a block-status request. The
    /// error is an errno.
    pub fn finish(&mut self, slot: Slot, result: Result<(), i32>, extents: &[Extent]) {
        let Some(Some(request)) = self.slots.get_mut(usize::from(slot.0)) else {
            return;
        };
        if !std::mem::replace(&mut request.open, false) {
            return;
        }
        let asked = request.asked;
        let mut data = None;
        let mut result = result.map_err(NbdError::from_errno);
        if result.is_ok() && asked.expects == Expects::Data {
            data = request.buffer.as_ref().and_then(|buffer| buffer.lend(asked.skip(), asked.len as usize));
            if data.is_none() {
                // Still on loan to a writer: somebody answered too early.
                debug_assert!(false, "a read was answered before it was over");
                result = Err(NbdError::Io);
            }
        }
        let (Phase::Request(agreed)
        | Phase::Payload { agreed, .. }
        | Phase::Discard { agreed, .. }
        | Phase::Goodbye(agreed)) = self.phase
        else {
            self.release(slot);
            return;
        };
        let head = reply::reply_head(&asked, agreed, result, extents);
        self.output.push_back(Piece { head, data, slot: Some(slot) });
    }

    /// Says that the peer is gone: nothing more is received or sent.
    pub fn abandon(&mut self) {
        if let Phase::Payload { slot, into, .. } = std::mem::replace(&mut self.phase, Phase::Over) {
            drop(into);
            self.release(slot);
        }
        self.output.clear();
        self.sent = 0;
        for n in 0..CLIENT_REQUESTS_MAX as u16 {
            let answered = |request: &InFlight| !request.open;
            if self.slots.get(usize::from(n)).and_then(Option::as_ref).is_some_and(answered) {
                self.release(Slot(n));
            }
        }
    }

    /// Adds what is to be sent to `slices`, up to `slices_max` of them.
    pub fn output<'a>(&'a self, slices: &mut Vec<IoSlice<'a>>, slices_max: usize) {
        let mut skip = self.sent;
        for piece in &self.output {
            let data = piece.data.as_deref().unwrap_or_default();
            for bytes in [piece.head.as_slice(), data] {
                let rest = bytes.get(skip..).unwrap_or_default();
                skip = skip.saturating_sub(bytes.len());
                if !rest.is_empty() {
                    slices.push(IoSlice::new(rest));
                }
            }
            if slices.len() + 2 > slices_max {
                return;
            }
        }
    }

    /// Says that `n` bytes of [`Connection::output`] were sent.
    pub fn output_written(&mut self, n: usize) {
        self.sent += n;
        while let Some(piece) = self.output.front()
            && self.sent >= piece.len()
        {
            self.sent -= piece.len();
            if let Some(Piece { slot: Some(slot), .. }) = self.output.pop_front() {
                self.release(slot);
            }
        }
    }

    /// Whether bytes from the peer are wanted now.
    #[must_use]
    pub fn wants_input(&self) -> bool {
        !self.is_blocked()
    }

    /// Whether there is something to send.
    #[must_use]
    pub fn has_output(&self) -> bool {
        !self.output.is_empty()
    }

    /// Whether the handshake is behind.
    #[must_use]
    pub fn is_transmitting(&self) -> bool {
        !matches!(
            self.phase,
            Phase::ClientFlags(_) | Phase::Option { .. } | Phase::StartTls { .. } | Phase::SkipOption { .. }
        )
    }

    /// Whether it only looks on: nothing need wait for it to leave.
    #[must_use]
    pub fn is_observer(&self) -> bool {
        self.export.is_observed()
    }

    /// Whether the socket should be closed: all was said, or the peer is out
    /// of step. Requests may still be with the engine.
    #[must_use]
    pub fn is_over(&self) -> bool {
        match self.phase {
            Phase::Over => true,
            Phase::Goodbye(_) => self.output.is_empty() && self.open_requests() == 0,
            _ => false,
        }
    }

    /// Requests with the engine.
    #[must_use]
    pub fn open_requests(&self) -> usize {
        let receiving = usize::from(matches!(self.phase, Phase::Payload { .. }));
        let open = self.slots.iter().flatten().filter(|request| request.open).count();
        open - receiving.min(open)
    }

    /// Whether reading must wait for replies to leave.
    fn is_blocked(&self) -> bool {
        match self.phase {
            Phase::Over | Phase::Goodbye(_) | Phase::StartTls { .. } => true,
            // A header that is here and was not taken waits for room.
            Phase::Request(agreed) => self.end - self.start >= Header::size(agreed.mode),
            _ => false,
        }
    }

    fn say(&mut self, head: Vec<u8>) {
        if !head.is_empty() {
            self.output.push_back(Piece { head, data: None, slot: None });
        }
    }

    fn release(&mut self, slot: Slot) {
        if let Some(request) = self.slots.get_mut(usize::from(slot.0)).and_then(Option::take) {
            self.held_bytes -= request.buffer.map_or(0, |buffer| buffer.len());
            self.free_slots.push(slot);
        }
    }
}

mod receive;
use receive::Step;

#[cfg(test)]
mod tests;
