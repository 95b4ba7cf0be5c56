//! Transmission: what each request header means.
//!
//! [`decide`] is a pure function from a header to what to do with it.

use zerocopy::FromBytes;

use super::handshake::{Agreed, Export, Mode};
use super::proto::{self, ExtendedRequestHeader, NbdError, RequestHeader, command, command_flag};
use crate::engine::RequestKind;
use crate::limits::{DISCARD_BYTES_MAX, REQUEST_BYTES_MAX};
use crate::unaligned::Cut;

/// A request's header, whichever way it was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// [`command_flag`]s.
    pub flags: u16,
    /// One of [`command`].
    pub command: u16,
    /// The client's name for the request.
    pub cookie: u64,
    /// First byte on the disk.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
}

impl Header {
    /// Bytes of a header.
    #[must_use]
    pub fn size(mode: Mode) -> usize {
        match mode {
            Mode::Simple | Mode::Structured => size_of::<RequestHeader>(),
            Mode::Extended => size_of::<ExtendedRequestHeader>(),
        }
    }

    /// Takes the header that `bytes` begin with; `None` if that is not one.
    #[must_use]
    pub fn read(bytes: &[u8], mode: Mode) -> Option<Self> {
        if mode == Mode::Extended {
            let (header, _) = ExtendedRequestHeader::read_from_prefix(bytes).ok()?;
            return (header.magic.get() == proto::EXTENDED_REQUEST_MAGIC).then_some(Self {
                flags: header.flags.get(),
                command: header.command.get(),
                cookie: header.cookie.get(),
                offset: header.offset.get(),
                len: header.len.get(),
            });
        }
        let (header, _) = RequestHeader::read_from_prefix(bytes).ok()?;
        (header.magic.get() == proto::REQUEST_MAGIC).then_some(Self {
            flags: header.flags.get(),
            command: header.command.get(),
            cookie: header.cookie.get(),
            offset: header.offset.get(),
            len: header.len.get().into(),
        })
    }
}

/// What to do with a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// Hand it to the engine; a write once its data is here.
    Submit(RequestKind),
    /// Answer with an error, after dropping `discard` bytes that follow.
    Refuse {
        /// What to answer.
        error: NbdError,
        /// Bytes of data to drop first.
        discard: u32,
    },
    /// Answer what is under way, then end.
    Disconnect,
    /// Not a request, or one whose data is too much to drop: the connection
    /// is out of step and ends at once.
    OutOfStep,
}

/// Decides on a request, from its header alone.
#[must_use]
pub fn decide(header: &Header, agreed: Agreed, export: &Export) -> Decision {
    let Header { flags, command, len, .. } = *header;
    if command == command::DISC {
        return Decision::Disconnect;
    }
    let follows = agreed.mode == Mode::Extended && flags & command_flag::PAYLOAD_LEN != 0;
    let discard = if command == command::WRITE || follows { len } else { 0 };
    let Some(discard) = u32::try_from(discard).ok().filter(|bytes| *bytes <= DISCARD_BYTES_MAX) else {
        return Decision::OutOfStep;
    };
    match check(header, agreed, export) {
        Err(error) => Decision::Refuse { error, discard },
        Ok(kind) => Decision::Submit(kind),
    }
}

/// The request for the engine, if there is one, or why it is refused.
fn check(header: &Header, agreed: Agreed, export: &Export) -> Result<RequestKind, NbdError> {
    let flags = header.flags;
    let fua = flags & command_flag::FUA != 0;
    let len = header.len;
    let too_long = len > REQUEST_BYTES_MAX as u64;
    let (kind, allowed_flags) = match header.command {
        // A range of no length means nothing. A flush has no range: what a
        // client leaves in those fields (the reference's tester does) is not
        // looked at.
        command::FLUSH => (RequestKind::Flush, 0),
        command::READ => {
            let df = if agreed.mode == Mode::Simple { 0 } else { command_flag::DF };
            if too_long {
                let df = flags & df != 0;
                return Err(if df { NbdError::Overflow } else { NbdError::Invalid });
            }
            (RequestKind::Read, df)
        }
        command::WRITE if too_long => return Err(NbdError::Invalid),
        command::WRITE => {
            let follows = if agreed.mode == Mode::Extended { command_flag::PAYLOAD_LEN } else { 0 };
            (RequestKind::Write { fua }, follows)
        }
        command::TRIM => (RequestKind::Trim { fua }, 0),
        command::WRITE_ZEROES => {
            let no_hole = flags & command_flag::NO_HOLE != 0;
            let fast = if export.fast_zero { command_flag::FAST_ZERO } else { 0 };
            if no_hole && flags & fast != 0 {
                // A hole is always fast here; whether zeros with space of
                // their own are is only known once they were written.
                return Err(NbdError::NotSup);
            }
            (RequestKind::WriteZeroes { fua, no_hole }, command_flag::NO_HOLE | fast)
        }
        command::CACHE => (RequestKind::Cache, 0),
        command::BLOCK_STATUS if agreed.allocation || agreed.depth => {
            (RequestKind::BlockStatus, command_flag::REQ_ONE)
        }
        _ => return Err(NbdError::Invalid),
    };
    // FUA is allowed on every command, and means nothing on those that
    // change nothing.
    if flags & !(allowed_flags | command_flag::FUA) != 0 {
        return Err(NbdError::Invalid);
    }
    if kind != RequestKind::Flush {
        check_range(header, export, kind)?;
    }
    Ok(kind)
}

fn check_range(header: &Header, export: &Export, kind: RequestKind) -> Result<(), NbdError> {
    use RequestKind::{Trim, Write, WriteZeroes};
    let changes = matches!(kind, Write { .. } | WriteZeroes { .. } | Trim { .. });
    if changes && export.read_only {
        return Err(NbdError::Perm);
    }
    let (offset, len) = (header.offset, header.len);
    if len == 0 {
        return Err(NbdError::Invalid);
    }
    let inside = offset.checked_add(len).is_some_and(|end| end <= export.virtual_bytes);
    match kind {
        _ if inside => Ok(()),
        Write { .. } | WriteZeroes { .. } => Err(NbdError::NoSpace),
        _ => Err(NbdError::Invalid),
    }
}

/// What a reply must know of its request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Asked {
    /// The client's name for it, repeated in the reply.
    pub cookie: u64,
    /// First byte on the disk.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// Which reply the client expects.
    pub expects: Expects,
}

impl Asked {
    /// How it lies on the sectors. A buffer for it holds all of them.
    #[must_use]
    pub fn cut(&self) -> Cut {
        Cut::new(self.offset, self.len)
    }

    /// Where in that buffer its first byte is.
    #[must_use]
    pub fn skip(&self) -> usize {
        (self.offset - self.cut().start) as usize
    }
}

/// Which reply a client expects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expects {
    /// Only whether it went well.
    Outcome,
    /// The data read.
    Data,
    /// Extents; with `one`, just one.
    Extents {
        /// REQ_ONE was set.
        one: bool,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXPORT: Export = Export {
        name: String::new(),
        description: String::new(),
        virtual_bytes: 1 << 30,
        read_only: false,
        fast_zero: true,
    };
    const ALL: Agreed = Agreed { mode: Mode::Structured, allocation: true, depth: true };

    fn header(command: u16, flags: u16, offset: u64, len: u64) -> Header {
        Header { flags, command, cookie: 7, offset, len }
    }

    fn asked(command: u16, flags: u16, offset: u64, len: u64) -> Decision {
        decide(&header(command, flags, offset, len), ALL, &EXPORT)
    }

    fn refused(error: NbdError) -> Decision {
        Decision::Refuse { error, discard: 0 }
    }

    #[test]
    fn each_command_reaches_the_engine_with_its_flags() {
        use RequestKind as Kind;
        let end = (1 << 30) - 512;
        for (command, flags, kind) in [
            (command::READ, command_flag::DF, Kind::Read),
            (command::WRITE, command_flag::FUA, Kind::Write { fua: true }),
            (command::TRIM, 0, Kind::Trim { fua: false }),
            (command::WRITE_ZEROES, 2, Kind::WriteZeroes { fua: false, no_hole: true }),
            (command::WRITE_ZEROES, 16, Kind::WriteZeroes { fua: false, no_hole: false }),
            (command::BLOCK_STATUS, command_flag::REQ_ONE, Kind::BlockStatus),
        ] {
            assert_eq!(asked(command, flags, end, 512), Decision::Submit(kind));
        }
        for (offset, len) in [(0, 0), (0, 1024), (1 << 40, 7)] {
            assert_eq!(asked(command::FLUSH, 0, offset, len), Decision::Submit(Kind::Flush));
        }
        assert_eq!(asked(command::READ, 0, 1, 1), Decision::Submit(Kind::Read));
        assert_eq!(asked(command::CACHE, 0, 0, 4096), Decision::Submit(Kind::Cache));
        assert_eq!(asked(command::DISC, 0, 0, 0), Decision::Disconnect);
        let long = Kind::Trim { fua: false };
        let big = Export { virtual_bytes: 1 << 40, ..EXPORT };
        let header = header(command::TRIM, 0, 0, u64::from(u32::MAX) - 511);
        assert_eq!(decide(&header, ALL, &big), Decision::Submit(long));
    }

    #[test]
    fn bad_requests_are_refused_with_the_right_error() {
        let too_long = REQUEST_BYTES_MAX as u64 + 512;
        for (command, flags, offset, len, error) in [
            (command::READ, 0, 1, 1 << 30, NbdError::Invalid),
            (command::READ, 0, (1 << 30) - 512, 513, NbdError::Invalid),
            (command::READ, 0, 0, 0, NbdError::Invalid),
            (command::READ, 0, 1 << 30, 512, NbdError::Invalid),
            (command::READ, 0, u64::MAX - 511, 1024, NbdError::Invalid),
            (command::READ, 0, 0, too_long, NbdError::Invalid),
            (command::READ, command_flag::DF, 0, too_long, NbdError::Overflow),
            (command::READ, command_flag::NO_HOLE, 0, 512, NbdError::Invalid),
            (command::READ, command_flag::PAYLOAD_LEN, 0, 512, NbdError::Invalid),
            (command::READ, 1 << 15, 0, 512, NbdError::Invalid),
            (command::WRITE_ZEROES, 0, 1 << 30, 512, NbdError::NoSpace),
            (command::WRITE_ZEROES, 2 | 16, 0, 512, NbdError::NotSup),
            (command::TRIM, 0, 1 << 30, 512, NbdError::Invalid),
            (command::FLUSH, command_flag::NO_HOLE, 0, 0, NbdError::Invalid),
            (8, 0, 0, 512, NbdError::Invalid),
            (u16::MAX, 0, 0, 512, NbdError::Invalid),
        ] {
            assert_eq!(asked(command, flags, offset, len), refused(error), "{command} {offset}");
        }
    }

    #[test]
    fn a_refused_write_still_has_its_data_dropped() {
        let discard = 1024;
        let past = asked(command::WRITE, 0, (1 << 30) - 512, discard.into());
        assert_eq!(past, Decision::Refuse { error: NbdError::NoSpace, discard });
        let read_only = Export { read_only: true, ..EXPORT };
        let write = header(command::WRITE, 0, 0, discard.into());
        let no = decide(&write, ALL, &read_only);
        assert_eq!(no, Decision::Refuse { error: NbdError::Perm, discard });
        let huge = asked(command::WRITE, 0, 0, u32::MAX.into());
        assert_eq!(huge, Decision::OutOfStep);
    }

    #[test]
    fn extended_requests_say_what_follows_them() {
        let extended = Agreed { mode: Mode::Extended, ..ALL };
        let big = Export { virtual_bytes: 1 << 40, ..EXPORT };
        let ask = |command, flags, len| decide(&header(command, flags, 0, len), extended, &big);
        let kind = RequestKind::Write { fua: false };
        assert_eq!(ask(command::WRITE, command_flag::PAYLOAD_LEN, 512), Decision::Submit(kind));
        assert_eq!(ask(command::WRITE, 0, 512), Decision::Submit(kind));
        let kind = RequestKind::WriteZeroes { fua: false, no_hole: false };
        assert_eq!(ask(command::WRITE_ZEROES, 0, 1 << 40), Decision::Submit(kind));
        for command in [command::READ, command::BLOCK_STATUS, 77] {
            let refused = Decision::Refuse { error: NbdError::Invalid, discard: 600 };
            assert_eq!(ask(command, command_flag::PAYLOAD_LEN, 600), refused);
        }
        assert_eq!(ask(command::TRIM, command_flag::PAYLOAD_LEN, u64::MAX), Decision::OutOfStep);
    }

    #[test]
    fn a_header_is_known_by_its_first_word() {
        let mut bytes = proto::REQUEST_MAGIC.to_be_bytes().to_vec();
        bytes.extend(1..=28);
        let read = Header::read(&bytes, Mode::Structured).unwrap();
        let expected = (0x0102, 0x0304, 0x0506_0708_090a_0b0c, 0x0d0e_0f10_1112_1314, 0x1516_1718);
        assert_eq!((read.flags, read.command, read.cookie, read.offset, read.len), expected);
        assert_eq!(Header::read(&bytes, Mode::Extended), None);
        bytes[..4].copy_from_slice(&proto::EXTENDED_REQUEST_MAGIC.to_be_bytes());
        assert_eq!(Header::read(&bytes, Mode::Extended).unwrap().len, 0x1516_1718_191a_1b1c);
        assert_eq!(Header::read(&bytes, Mode::Simple), None);
    }

    #[test]
    fn block_status_needs_a_context_and_fast_zero_a_fast_export() {
        let status = header(command::BLOCK_STATUS, 0, 0, 512);
        let none = Agreed { mode: Mode::Structured, ..Agreed::default() };
        assert_eq!(decide(&status, none, &EXPORT), refused(NbdError::Invalid));
        let slow = Export { fast_zero: false, ..EXPORT };
        let zero = header(command::WRITE_ZEROES, command_flag::FAST_ZERO, 0, 512);
        assert_eq!(decide(&zero, ALL, &slow), refused(NbdError::Invalid));
    }
}
