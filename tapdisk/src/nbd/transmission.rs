//! Transmission: what each request header means, and what replies look like.
//!
//! [`decide`] is a pure function from a header to what to do with it; the
//! replies are built here too, so that both directions of a command can be
//! read side by side.

use zerocopy::IntoBytes;

use super::handshake::{Agreed, Context, Export};
use super::proto::{
    self, ChunkHeader, NbdError, RequestHeader, SimpleReply, allocation, chunk, command, command_flag,
};
use crate::engine::{Extent, RequestKind};
use crate::limits::{DISCARD_BYTES_MAX, REPLY_EXTENTS_MAX, REQUEST_BYTES_MAX};
use crate::unaligned::Cut;

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
pub fn decide(header: &RequestHeader, agreed: Agreed, export: &Export) -> Decision {
    if header.magic.get() != proto::REQUEST_MAGIC {
        return Decision::OutOfStep;
    }
    let command = header.command.get();
    if command == command::DISC {
        return Decision::Disconnect;
    }
    let discard = if command == command::WRITE { header.len.get() } else { 0 };
    if discard > DISCARD_BYTES_MAX {
        return Decision::OutOfStep;
    }
    match check(header, agreed, export) {
        Err(error) => Decision::Refuse { error, discard },
        Ok(kind) => Decision::Submit(kind),
    }
}

/// The request for the engine, if there is one, or why it is refused.
fn check(header: &RequestHeader, agreed: Agreed, export: &Export) -> Result<RequestKind, NbdError> {
    let flags = header.flags.get();
    let fua = flags & command_flag::FUA != 0;
    let len = header.len.get();
    let (kind, allowed_flags) = match header.command.get() {
        // A range of no length means nothing; a flush has no range.
        command::FLUSH if len == 0 && header.offset.get() == 0 => (RequestKind::Flush, 0),
        command::FLUSH => return Err(NbdError::Invalid),
        command::READ => {
            let df = if agreed.structured { command_flag::DF } else { 0 };
            if len as usize > REQUEST_BYTES_MAX {
                let df = flags & df != 0;
                return Err(if df { NbdError::Overflow } else { NbdError::Invalid });
            }
            (RequestKind::Read, df)
        }
        command::WRITE if len as usize > REQUEST_BYTES_MAX => return Err(NbdError::Invalid),
        command::WRITE => (RequestKind::Write { fua }, 0),
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

fn check_range(header: &RequestHeader, export: &Export, kind: RequestKind) -> Result<(), NbdError> {
    use RequestKind::{Trim, Write, WriteZeroes};
    let changes = matches!(kind, Write { .. } | WriteZeroes { .. } | Trim { .. });
    if changes && export.read_only {
        return Err(NbdError::Perm);
    }
    let (offset, len) = (header.offset.get(), header.len.get());
    if len == 0 {
        return Err(NbdError::Invalid);
    }
    let inside = offset.checked_add(u64::from(len)).is_some_and(|end| end <= export.virtual_bytes);
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
    pub len: u32,
    /// Which reply the client expects.
    pub expects: Expects,
}

impl Asked {
    /// How it lies on the sectors. A buffer for it holds all of them.
    #[must_use]
    pub fn cut(&self) -> Cut {
        Cut::new(self.offset, self.len.into())
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

/// The head of a reply: everything but the data of a read, which follows it.
#[must_use]
pub fn reply_head(
    asked: &Asked,
    agreed: Agreed,
    result: Result<(), NbdError>,
    extents: &[Extent],
) -> Vec<u8> {
    match (result, asked.expects) {
        (Err(error), _) if agreed.structured => {
            let mut head = chunk_head(asked, chunk::FLAG_DONE, chunk::ERROR, 6);
            head.extend_from_slice(&(error as u32).to_be_bytes());
            head.extend_from_slice(&0u16.to_be_bytes()); // no message
            head
        }
        (Ok(()), Expects::Data) if agreed.structured => {
            let len = 8 + asked.len;
            let mut head = chunk_head(asked, chunk::FLAG_DONE, chunk::OFFSET_DATA, len);
            head.extend_from_slice(&asked.offset.to_be_bytes());
            head
        }
        (Ok(()), Expects::Extents { one }) => block_status(asked, agreed, one, extents),
        // Everything else has nothing to carry, and a simple reply may answer
        // it also where replies are structured.
        (result, _) => {
            let error = result.err().map_or(0, |error| error as u32);
            let reply = SimpleReply {
                magic: proto::SIMPLE_REPLY_MAGIC.into(),
                error: error.into(),
                cookie: asked.cookie.into(),
            };
            reply.as_bytes().to_vec()
        }
    }
}

fn chunk_head(asked: &Asked, flags: u16, kind: u16, len: u32) -> Vec<u8> {
    let header = ChunkHeader {
        magic: proto::CHUNK_MAGIC.into(),
        flags: flags.into(),
        kind: kind.into(),
        cookie: asked.cookie.into(),
        len: len.into(),
    };
    header.as_bytes().to_vec()
}

/// One chunk for each context, the last one marked.
fn block_status(asked: &Asked, agreed: Agreed, one: bool, extents: &[Extent]) -> Vec<u8> {
    let chosen = |context: &Context| match context {
        Context::Allocation => agreed.allocation,
        Context::Depth => agreed.depth,
    };
    let contexts: Vec<Context> = Context::ALL.into_iter().filter(chosen).collect();
    let mut head = Vec::new();
    for (i, context) in contexts.iter().enumerate() {
        let runs = runs(asked, *context, one, extents);
        let flags = if i + 1 == contexts.len() { chunk::FLAG_DONE } else { 0 };
        let len = 4 + 8 * runs.len() as u32;
        head.extend(chunk_head(asked, flags, chunk::BLOCK_STATUS, len));
        head.extend_from_slice(&(*context as u32).to_be_bytes());
        for (len, word) in runs {
            head.extend_from_slice(&len.to_be_bytes());
            head.extend_from_slice(&word.to_be_bytes());
        }
    }
    head
}

/// The extents as `context` sees them, like neighbours joined, clipped to the
/// request: (bytes, word). Never empty: the protocol wants at least one.
fn runs(asked: &Asked, context: Context, one: bool, extents: &[Extent]) -> Vec<(u32, u32)> {
    let mut runs: Vec<(u32, u32)> = Vec::new();
    let runs_max = if one { 1 } else { REPLY_EXTENTS_MAX };
    let mut left = asked.len;
    // The engine's answer begins with the sector that the request begins in.
    let mut skip = asked.skip() as u64;
    for extent in extents {
        let len = extent.len.saturating_sub(skip);
        skip = skip.saturating_sub(extent.len);
        let len = u32::try_from(len).unwrap_or(u32::MAX).min(left);
        let word = match context {
            Context::Depth => extent.depth,
            Context::Allocation if extent.depth == 0 => allocation::HOLE | allocation::ZERO,
            Context::Allocation => 0,
        };
        if len == 0 {
            continue;
        }
        left -= len;
        if let Some(last) = runs.last_mut().filter(|last| last.1 == word) {
            last.0 += len;
        } else if runs.len() < runs_max {
            runs.push((len, word));
        } else {
            break;
        }
    }
    if runs.is_empty() {
        // The answer that promises nothing: data, somewhere.
        runs.push((asked.len, u32::from(context == Context::Depth)));
    }
    runs
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
    const ALL: Agreed = Agreed { structured: true, allocation: true, depth: true };

    fn header(command: u16, flags: u16, offset: u64, len: u32) -> RequestHeader {
        RequestHeader {
            magic: proto::REQUEST_MAGIC.into(),
            flags: flags.into(),
            command: command.into(),
            cookie: 7.into(),
            offset: offset.into(),
            len: len.into(),
        }
    }

    fn asked(command: u16, flags: u16, offset: u64, len: u32) -> Decision {
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
        assert_eq!(asked(command::FLUSH, 0, 0, 0), Decision::Submit(Kind::Flush));
        assert_eq!(asked(command::READ, 0, 1, 1), Decision::Submit(Kind::Read));
        assert_eq!(asked(command::CACHE, 0, 0, 4096), Decision::Submit(Kind::Cache));
        assert_eq!(asked(command::DISC, 0, 0, 0), Decision::Disconnect);
        let long = Kind::Trim { fua: false };
        let big = Export { virtual_bytes: 1 << 40, ..EXPORT };
        let header = header(command::TRIM, 0, 0, u32::MAX - 511);
        assert_eq!(decide(&header, ALL, &big), Decision::Submit(long));
    }

    #[test]
    fn bad_requests_are_refused_with_the_right_error() {
        let too_long = REQUEST_BYTES_MAX as u32 + 512;
        for (command, flags, offset, len, error) in [
            (command::READ, 0, 1, (1 << 30) as u32, NbdError::Invalid),
            (command::READ, 0, (1 << 30) - 512, 513, NbdError::Invalid),
            (command::READ, 0, 0, 0, NbdError::Invalid),
            (command::READ, 0, 1 << 30, 512, NbdError::Invalid),
            (command::READ, 0, u64::MAX - 511, 1024, NbdError::Invalid),
            (command::READ, 0, 0, too_long, NbdError::Invalid),
            (command::READ, command_flag::DF, 0, too_long, NbdError::Overflow),
            (command::READ, command_flag::NO_HOLE, 0, 512, NbdError::Invalid),
            (command::READ, 1 << 15, 0, 512, NbdError::Invalid),
            (command::WRITE_ZEROES, 0, 1 << 30, 512, NbdError::NoSpace),
            (command::WRITE_ZEROES, 2 | 16, 0, 512, NbdError::NotSup),
            (command::TRIM, 0, 1 << 30, 512, NbdError::Invalid),
            (command::FLUSH, 0, 0, 512, NbdError::Invalid),
            (8, 0, 0, 512, NbdError::Invalid),
            (u16::MAX, 0, 0, 512, NbdError::Invalid),
        ] {
            assert_eq!(asked(command, flags, offset, len), refused(error), "{command} {offset}");
        }
    }

    #[test]
    fn a_refused_write_still_has_its_data_dropped() {
        let discard = 1024;
        let past = asked(command::WRITE, 0, (1 << 30) - 512, discard);
        assert_eq!(past, Decision::Refuse { error: NbdError::NoSpace, discard });
        let read_only = Export { read_only: true, ..EXPORT };
        let write = header(command::WRITE, 0, 0, discard);
        let no = decide(&write, ALL, &read_only);
        assert_eq!(no, Decision::Refuse { error: NbdError::Perm, discard });
        let huge = asked(command::WRITE, 0, 0, u32::MAX);
        assert_eq!(huge, Decision::OutOfStep);
        let mut garbage = write;
        garbage.magic = 1.into();
        assert_eq!(decide(&garbage, ALL, &EXPORT), Decision::OutOfStep);
    }

    #[test]
    fn block_status_needs_a_context_and_fast_zero_a_fast_export() {
        let status = header(command::BLOCK_STATUS, 0, 0, 512);
        let none = Agreed { structured: true, ..Agreed::default() };
        assert_eq!(decide(&status, none, &EXPORT), refused(NbdError::Invalid));
        let slow = Export { fast_zero: false, ..EXPORT };
        let zero = header(command::WRITE_ZEROES, command_flag::FAST_ZERO, 0, 512);
        assert_eq!(decide(&zero, ALL, &slow), refused(NbdError::Invalid));
    }

    #[test]
    fn extents_are_joined_clipped_and_limited() {
        let asked = Asked { cookie: 1, offset: 0, len: 4096, expects: Expects::Extents { one: false } };
        let extents = [
            Extent { len: 1024, depth: 1 },
            Extent { len: 1024, depth: 2 },
            Extent { len: 1024, depth: 0 },
            Extent { len: u64::MAX, depth: 3 },
        ];
        let both = runs(&asked, Context::Allocation, false, &extents);
        assert_eq!(both, [(2048, 0), (1024, 3), (1024, 0)]);
        let depths = runs(&asked, Context::Depth, false, &extents);
        assert_eq!(depths, [(1024, 1), (1024, 2), (1024, 0), (1024, 3)]);
        assert_eq!(runs(&asked, Context::Allocation, true, &extents), [(2048, 0)]);
        assert_eq!(runs(&asked, Context::Depth, false, &[]), [(4096, 1)]);
        let asked = Asked { offset: 700, len: 1000, ..asked };
        let within = runs(&asked, Context::Depth, false, &extents);
        assert_eq!(within, [(836, 1), (164, 2)]);
        let short = [Extent { len: 100, depth: 1 }, Extent { len: 1000, depth: 0 }];
        assert_eq!(runs(&asked, Context::Depth, false, &short), [(912, 0)]);
    }

    #[test]
    fn errors_are_chunks_where_replies_are_structured() {
        let asked = Asked { cookie: 1, offset: 0, len: 512, expects: Expects::Data };
        let head = reply_head(&asked, ALL, Err(NbdError::Io), &[]);
        assert_eq!((head.len(), &head[4..8], head[23]), (26, &[0, 1, 0x80, 1][..], 5));
        let simple = reply_head(&asked, Agreed::default(), Err(NbdError::Io), &[]);
        assert_eq!((simple.len(), simple[7]), (16, 5));
    }
}
