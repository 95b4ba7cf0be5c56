//! The receiving half of a [`Connection`]: one step for each whole thing that
//! arrived.

use std::sync::Arc;

use zerocopy::FromBytes;

use super::handshake::{self, Agreed, Handshake, Next};
use super::proto::{self, NbdError, OptionHeader, handshake_flag};
use super::transmission::{self, Asked, Decision, Expects, Header};
use super::{Connection, GuestRequest, InFlight, Phase, Piece, Slot, reply};
use crate::buffer::{Buffer, Exclusive};
use crate::engine::RequestKind;
use crate::limits::{CLIENT_BYTES_MAX, OPTION_BYTES_MAX, OPTION_SKIP_BYTES_MAX, OPTIONS_MAX};

/// What came of a step.
pub(super) enum Step {
    /// More bytes are needed, or room; or nothing will ever come.
    Wait,
    /// There may be more.
    Again,
    /// A request.
    Request(GuestRequest),
}

impl Connection {
    /// Takes one thing from the bytes received. `self.phase` is
    /// [`Phase::Over`] on entry; whoever returns without setting it ends the
    /// connection.
    pub(super) fn step(&mut self, phase: Phase) -> Step {
        match phase {
            Phase::ClientFlags(handshake) => self.client_flags(handshake),
            Phase::Option { handshake, seen } => self.option(handshake, seen),
            Phase::SkipOption { handshake, seen, option, left } => {
                let left = self.skip(left);
                if left > 0 {
                    self.phase = Phase::SkipOption { handshake, seen, option, left };
                    return Step::Wait;
                }
                let mut out = Vec::new();
                handshake::refuse_too_big(option, &mut out);
                self.say(out);
                self.phase = Phase::Option { handshake, seen };
                Step::Again
            }
            Phase::Request(agreed) => self.request(agreed),
            Phase::Payload { agreed, slot, kind, into, filled } => {
                self.payload(agreed, slot, kind, into, filled)
            }
            Phase::Discard { agreed, asked, error, left } => {
                let left = self.skip(left);
                if left > 0 {
                    self.phase = Phase::Discard { agreed, asked, error, left };
                    return Step::Wait;
                }
                self.refuse(agreed, &asked, error);
                self.phase = Phase::Request(agreed);
                Step::Again
            }
            phase @ (Phase::Goodbye(_) | Phase::StartTls { .. } | Phase::Over) => {
                self.phase = phase;
                Step::Wait
            }
        }
    }

    fn client_flags(&mut self, mut handshake: Handshake) -> Step {
        let Some((flags, _)) = self.staged().split_first_chunk::<4>() else {
            self.phase = Phase::ClientFlags(handshake);
            return Step::Wait;
        };
        let flags = u32::from_be_bytes(*flags);
        self.start += 4;
        let known = handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES;
        if flags & !u32::from(known) != 0 {
            return Step::Wait; // it wants what was not offered
        }
        handshake.no_zeroes = flags & u32::from(handshake_flag::NO_ZEROES) != 0;
        self.phase = Phase::Option { handshake, seen: 0 };
        Step::Again
    }

    fn option(&mut self, mut handshake: Handshake, seen: u32) -> Step {
        let header = OptionHeader::read_from_prefix(self.staged());
        let Ok((OptionHeader { magic, option, len }, _)) = header else {
            self.phase = Phase::Option { handshake, seen };
            return Step::Wait;
        };
        let (option, len) = (option.get(), len.get());
        if magic.get() != proto::OPTION_MAGIC || seen >= OPTIONS_MAX {
            return Step::Wait;
        }
        let head = size_of::<OptionHeader>();
        if len > OPTION_BYTES_MAX {
            if len <= OPTION_SKIP_BYTES_MAX {
                self.start += head;
                self.phase = Phase::SkipOption { handshake, seen: seen + 1, option, left: len };
            }
            return Step::Again;
        }
        let end = self.start + head + len as usize;
        let data = if end <= self.end { self.staging.get(self.start + head..end) } else { None };
        let Some(data) = data else {
            self.phase = Phase::Option { handshake, seen };
            return Step::Wait;
        };
        let mut out = Vec::new();
        let next = handshake.option((&self.export, self.security), option, data, &mut out);
        self.start = end;
        self.say(out);
        match next {
            Next::Option => self.phase = Phase::Option { handshake, seen: seen + 1 },
            // Whatever came with it was not protected: somebody else's words,
            // perhaps, that would count as said under TLS.
            Next::StartTls if self.start < self.end => {}
            Next::StartTls => self.phase = Phase::StartTls { handshake, seen: seen + 1 },
            Next::Transmission => {
                if let Some(chosen) = handshake.chosen {
                    self.export = Arc::new(chosen);
                }
                self.phase = Phase::Request(handshake.agreed);
            }
            Next::Goodbye => self.phase = Phase::Goodbye(handshake.agreed),
            Next::Close => {}
        }
        Step::Again
    }

    fn request(&mut self, agreed: Agreed) -> Step {
        let size = Header::size(agreed.mode);
        if self.end - self.start < size {
            self.phase = Phase::Request(agreed);
            return Step::Wait;
        }
        let Some(header) = Header::read(self.staged(), agreed.mode) else {
            return Step::Wait; // out of step
        };
        let decision = transmission::decide(&header, agreed, &self.export);
        let (offset, len) = match decision {
            Decision::Submit(RequestKind::Flush) => (0, 0),
            _ => (header.offset, header.len),
        };
        let asked = Asked {
            cookie: header.cookie,
            offset,
            len,
            expects: match decision {
                Decision::Submit(RequestKind::Read) => Expects::Data,
                Decision::Submit(RequestKind::BlockStatus) => {
                    Expects::Extents { one: header.flags & proto::command_flag::REQ_ONE != 0 }
                }
                _ => Expects::Outcome,
            },
        };
        // Every answer takes a slot, refusals too: output stays bounded.
        if !matches!(decision, Decision::OutOfStep | Decision::Disconnect) && !self.has_room(decision, &asked)
        {
            self.phase = Phase::Request(agreed);
            return Step::Wait;
        }
        self.start += size;
        match decision {
            Decision::OutOfStep => return Step::Wait,
            Decision::Disconnect => self.phase = Phase::Goodbye(agreed),
            Decision::Refuse { error, discard } => {
                self.phase = Phase::Discard { agreed, asked, error, left: discard };
            }
            Decision::Submit(kind) => return self.submit(agreed, asked, kind),
        }
        Step::Again
    }

    /// Takes a buffer and a slot for a request whose header was taken.
    fn submit(&mut self, agreed: Agreed, asked: Asked, kind: RequestKind) -> Step {
        let writes = matches!(kind, RequestKind::Write { .. });
        let mut buffer = None;
        if carries_data(kind) {
            buffer = self.pool.take(asked.cut().len() as usize);
            if buffer.is_none() {
                let left = if writes { asked.len as u32 } else { 0 };
                let error = NbdError::NoMem;
                self.phase = Phase::Discard { agreed, asked, error, left };
                return Step::Again;
            }
        }
        let data = buffer.clone().filter(|_| writes);
        let Some(slot) = self.occupy(asked, buffer.clone()) else {
            return Step::Wait;
        };
        if let Some(data) = data {
            let Some(into) = data.lend_mut(asked.skip(), asked.len as usize) else {
                return Step::Wait;
            };
            self.phase = Phase::Payload { agreed, slot, kind, into, filled: 0 };
            return Step::Again;
        }
        self.phase = Phase::Request(agreed);
        let (offset, len) = (asked.offset, asked.len);
        Step::Request(GuestRequest { slot, kind, offset, len, buffer })
    }

    fn payload(
        &mut self,
        agreed: Agreed,
        slot: Slot,
        kind: RequestKind,
        mut into: Exclusive,
        mut filled: usize,
    ) -> Step {
        // What was read ahead; the rest is received in place.
        let ahead = (into.len() - filled).min(self.end - self.start);
        let source = self.staging.get(self.start..self.start + ahead);
        if let (Some(source), Some(to)) = (source, into.get_mut(filled..filled + ahead)) {
            to.copy_from_slice(source);
        }
        self.start += ahead;
        filled += ahead;
        if filled < into.len() {
            self.phase = Phase::Payload { agreed, slot, kind, into, filled };
            return Step::Wait;
        }
        drop(into);
        self.phase = Phase::Request(agreed);
        let request = self.slots.get(usize::from(slot.0)).and_then(Option::as_ref);
        request.map_or(Step::Again, |InFlight { asked, buffer, .. }| {
            let (offset, len) = (asked.offset, asked.len);
            Step::Request(GuestRequest { slot, kind, offset, len, buffer: buffer.clone() })
        })
    }

    /// Answers a request that never gets to the engine.
    fn refuse(&mut self, agreed: Agreed, asked: &Asked, error: NbdError) {
        let slot = self.occupy(*asked, None);
        if let Some(Some(request)) = slot.and_then(|slot| self.slots.get_mut(usize::from(slot.0))) {
            request.open = false;
        }
        let head = reply::reply_head(asked, agreed, Err(error), &[]);
        self.output.push_back(Piece { head, data: None, slot });
    }

    fn has_room(&self, decision: Decision, asked: &Asked) -> bool {
        let bytes = match decision {
            Decision::Submit(kind) if carries_data(kind) => asked.cut().len() as usize,
            _ => 0,
        };
        !self.free_slots.is_empty() && self.held_bytes + bytes <= CLIENT_BYTES_MAX
    }

    fn occupy(&mut self, asked: Asked, buffer: Option<Buffer>) -> Option<Slot> {
        let slot = self.free_slots.pop()?;
        self.held_bytes += buffer.as_ref().map_or(0, Buffer::len);
        *self.slots.get_mut(usize::from(slot.0))? = Some(InFlight { asked, buffer, open: true });
        Some(slot)
    }

    fn staged(&self) -> &[u8] {
        self.staging.get(self.start..self.end).unwrap_or_default()
    }

    /// Drops up to `left` bytes; how many are still to be dropped.
    fn skip(&mut self, left: u32) -> u32 {
        let n = (self.end - self.start).min(left as usize);
        self.start += n;
        left - n as u32
    }
}

fn carries_data(kind: RequestKind) -> bool {
    matches!(kind, RequestKind::Read | RequestKind::Write { .. })
}
