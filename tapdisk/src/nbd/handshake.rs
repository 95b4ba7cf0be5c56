//! The handshake: what is answered to each option.
//!
//! ```text
//!   greeting -> client flags -> option* -> GO or EXPORT_NAME -> transmission
//!                                 |  ^
//!                                 |  +--- STARTTLS -> TLS; all agreed is void
//!                                 +-> ABORT -> closed
//! ```
//!
//! [`Handshake::option`] takes one whole option and appends its replies; it
//! does no I/O and keeps nothing but what was agreed on so far.
//!
//! Absent on purpose: TLS itself (whoever owns the socket does it).

use zerocopy::IntoBytes;

use super::proto::{self, InfoBlockSize, InfoExport, OptionReply, info, option, option_reply};
use crate::limits::{CONTEXT_QUERIES_MAX, REQUEST_BYTES_MAX};

/// Smallest unit of a request and its alignment, in bytes: any will do.
const BLOCK_BYTES_MIN: u32 = 1;
/// Best unit of a request, in bytes.
const BLOCK_BYTES_PREFERRED: u32 = 4096;

pub use tapdisk_control::nbd::OBSERVER_SUFFIX;

/// What is offered to clients.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Export {
    /// Its name; the empty name leads here too.
    pub name: String,
    /// For people.
    pub description: String,
    /// Virtual bytes, a multiple of 512.
    pub virtual_bytes: u64,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Whether zeroing never has to write zeros.
    pub fast_zero: bool,
}

impl Export {
    /// What a client sees that asks for `name`: the disk, or with
    /// [`OBSERVER_SUFFIX`] the same for reading only. `None`: it is not called so.
    fn called(&self, name: &[u8]) -> Option<Self> {
        let plain = name.strip_suffix(OBSERVER_SUFFIX.as_bytes());
        let own = plain.unwrap_or(name);
        if !own.is_empty() && own != self.name.as_bytes() {
            return None;
        }
        Some(match plain {
            Some(_) => {
                Self { name: format!("{}{OBSERVER_SUFFIX}", self.name), read_only: true, ..self.clone() }
            }
            None => self.clone(),
        })
    }

    /// Whether whoever sees it only looks on.
    pub(super) fn is_observed(&self) -> bool {
        self.name.ends_with(OBSERVER_SUFFIX)
    }

    /// The transmission flags to advertise.
    #[must_use]
    pub fn flags(&self, agreed: Agreed) -> u16 {
        use proto::transmission_flag as flag;
        // CAN_MULTI_CONN: one engine serves all connections, so a flush on
        // any of them covers what was answered on all.
        let mut flags =
            flag::HAS_FLAGS | flag::SEND_FLUSH | flag::SEND_FUA | flag::SEND_CACHE | flag::CAN_MULTI_CONN;
        if self.read_only {
            flags |= flag::READ_ONLY;
        } else {
            flags |= flag::SEND_TRIM | flag::SEND_WRITE_ZEROES;
            if self.fast_zero {
                flags |= flag::SEND_FAST_ZERO;
            }
        }
        if agreed.mode != Mode::Simple {
            flags |= flag::SEND_DF;
        }
        flags
    }
}

/// What requests and replies look like.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Mode {
    /// A reply is an error or data.
    #[default]
    Simple,
    /// A reply is made of chunks.
    Structured,
    /// The same, and all lengths have 64 bits.
    Extended,
}

/// What client and server agreed on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Agreed {
    /// What requests and replies look like.
    pub mode: Mode,
    /// `BLOCK_STATUS` reports [`Context::Allocation`].
    pub allocation: bool,
    /// `BLOCK_STATUS` reports [`Context::Depth`].
    pub depth: bool,
}

/// A metadata context.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Context {
    /// `base:allocation`: holes and zeros.
    Allocation = 1,
    /// `qemu:allocation-depth`: the level of the chain that holds a run.
    Depth = 2,
}

impl Context {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Allocation, Self::Depth];

    fn name(self) -> &'static str {
        match self {
            Self::Allocation => "base:allocation",
            Self::Depth => "qemu:allocation-depth",
        }
    }

    /// Whether a query of `LIST_META_CONTEXT` asks for it: by its name, or
    /// by its namespace and a colon.
    fn is_listed_by(self, query: &[u8]) -> bool {
        let name = self.name().as_bytes();
        query == name || (query.ends_with(b":") && name.starts_with(query))
    }
}

/// How a connection is protected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Security {
    /// It need not be, and cannot be.
    Plain,
    /// It may ask for TLS.
    Offered,
    /// It must ask for TLS before anything else.
    Required,
    /// It has TLS.
    Secured,
}

/// What follows an option.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// The next option.
    Option,
    /// TLS, once the replies are sent.
    StartTls,
    /// Requests.
    Transmission,
    /// The replies are sent, then the connection ends.
    Goodbye,
    /// The connection ends at once: the client expects no reply, or could
    /// not understand one.
    Close,
}

/// A handshake under way.
#[derive(Debug, Default)]
pub struct Handshake {
    /// The client does not want 124 zeros after `EXPORT_NAME`.
    pub no_zeroes: bool,
    /// What was agreed on so far.
    pub agreed: Agreed,
    /// The export as the client asked for it last.
    pub chosen: Option<Export>,
}

impl Handshake {
    /// Answers `option` with its whole `data`, appending to `out`.
    pub fn option(
        &mut self,
        (export, security): (&Export, Security),
        option: u32,
        data: &[u8],
        out: &mut Vec<u8>,
    ) -> Next {
        let mut replies = Replies { out, option };
        if security == Security::Required && !matches!(option, option::STARTTLS | option::ABORT) {
            if option == option::EXPORT_NAME {
                return Next::Close; // this option has no other way to say no
            }
            replies.refuse(option_reply::ERR_TLS_REQD, "TLS comes first");
            return Next::Option;
        }
        match option {
            option::STARTTLS => return start_tls(security, data, &mut replies),
            option::EXPORT_NAME => return self.export_name(export, data, replies.out),
            option::ABORT => {
                replies.push(option_reply::ACK, &[]);
                return Next::Goodbye;
            }
            option::LIST => list(export, data, &mut replies),
            option::INFO => {
                self.info(export, data, &mut replies);
            }
            option::GO => {
                if self.info(export, data, &mut replies) {
                    return Next::Transmission;
                }
            }
            option::STRUCTURED_REPLY => self.replies_in(Mode::Structured, data, &mut replies),
            option::EXTENDED_HEADERS => self.replies_in(Mode::Extended, data, &mut replies),
            option::LIST_META_CONTEXT => self.contexts(export, data, &mut replies, false),
            option::SET_META_CONTEXT => self.contexts(export, data, &mut replies, true),
            _ => replies.refuse(option_reply::ERR_UNSUP, "option not supported"),
        }
        Next::Option
    }

    fn replies_in(&mut self, mode: Mode, data: &[u8], replies: &mut Replies<'_>) {
        if !data.is_empty() {
            return replies.refuse(option_reply::ERR_INVALID, "this option takes no data");
        }
        if (mode, self.agreed.mode) == (Mode::Structured, Mode::Extended) {
            let text = "extended headers were agreed on";
            return replies.refuse(option_reply::ERR_EXT_HEADER_REQD, text);
        }
        self.agreed.mode = mode;
        replies.push(option_reply::ACK, &[]);
    }

    fn export_name(&mut self, export: &Export, name: &[u8], out: &mut Vec<u8>) -> Next {
        let Some(export) = export.called(name) else {
            return Next::Close; // this option has no other way to say no
        };
        out.extend_from_slice(&export.virtual_bytes.to_be_bytes());
        out.extend_from_slice(&export.flags(self.agreed).to_be_bytes());
        if !self.no_zeroes {
            out.extend_from_slice(&[0; 124]);
        }
        self.chosen = Some(export);
        Next::Transmission
    }

    /// Answers `INFO` and `GO`; whether the export was found.
    fn info(&mut self, export: &Export, data: &[u8], replies: &mut Replies<'_>) -> bool {
        let Some((name, wanted)) = parse_info(data) else {
            replies.refuse(option_reply::ERR_INVALID, "malformed INFO or GO");
            return false;
        };
        let Some(export) = export.called(name) else {
            replies.refuse(option_reply::ERR_UNKNOWN, "no such export");
            return false;
        };
        let what = InfoExport {
            kind: info::EXPORT.into(),
            virtual_bytes: export.virtual_bytes.into(),
            flags: export.flags(self.agreed).into(),
        };
        replies.push(option_reply::INFO, what.as_bytes());
        let blocks = InfoBlockSize {
            kind: info::BLOCK_SIZE.into(),
            min: BLOCK_BYTES_MIN.into(),
            preferred: BLOCK_BYTES_PREFERRED.into(),
            max: (REQUEST_BYTES_MAX as u32).into(),
        };
        replies.push(option_reply::INFO, blocks.as_bytes());
        for (kind, text) in [(info::NAME, &export.name), (info::DESCRIPTION, &export.description)] {
            if wanted.chunks_exact(2).any(|w| w == kind.to_be_bytes()) {
                let mut reply = kind.to_be_bytes().to_vec();
                reply.extend_from_slice(text.as_bytes());
                replies.push(option_reply::INFO, &reply);
            }
        }
        replies.push(option_reply::ACK, &[]);
        self.chosen = Some(export);
        true
    }

    /// Answers `LIST_META_CONTEXT` and, with `choose`, `SET_META_CONTEXT`.
    fn contexts(&mut self, export: &Export, data: &[u8], replies: &mut Replies<'_>, choose: bool) {
        if choose {
            // A failed choice leaves nothing chosen.
            self.agreed = Agreed { mode: self.agreed.mode, ..Agreed::default() };
        }
        let Some((name, queries)) = parse_queries(data) else {
            return replies.refuse(option_reply::ERR_INVALID, "malformed metadata query");
        };
        if export.called(name).is_none() {
            return replies.refuse(option_reply::ERR_UNKNOWN, "no such export");
        }
        if choose && self.agreed.mode == Mode::Simple {
            let text = "metadata contexts need structured replies";
            return replies.refuse(option_reply::ERR_INVALID, text);
        }
        for context in Context::ALL {
            let named = if choose {
                queries.iter().any(|query| *query == context.name().as_bytes())
            } else {
                queries.is_empty() || queries.iter().any(|query| context.is_listed_by(query))
            };
            if !named {
                continue;
            }
            if choose {
                match context {
                    Context::Allocation => self.agreed.allocation = true,
                    Context::Depth => self.agreed.depth = true,
                }
            }
            let id = if choose { context as u32 } else { 0 };
            let mut reply = id.to_be_bytes().to_vec();
            reply.extend_from_slice(context.name().as_bytes());
            replies.push(option_reply::META_CONTEXT, &reply);
        }
        replies.push(option_reply::ACK, &[]);
    }
}

/// The refusal of an option whose data was too long to look at.
pub fn refuse_too_big(option: u32, out: &mut Vec<u8>) {
    Replies { out, option }.refuse(option_reply::ERR_TOO_BIG, "option too long");
}

fn start_tls(security: Security, data: &[u8], replies: &mut Replies<'_>) -> Next {
    match security {
        Security::Plain => replies.refuse(option_reply::ERR_UNSUP, "TLS is not set up here"),
        Security::Secured => replies.refuse(option_reply::ERR_INVALID, "TLS is there already"),
        _ if !data.is_empty() => replies.refuse(option_reply::ERR_INVALID, "STARTTLS takes no data"),
        Security::Offered | Security::Required => {
            replies.push(option_reply::ACK, &[]);
            return Next::StartTls;
        }
    }
    Next::Option
}

fn list(export: &Export, data: &[u8], replies: &mut Replies<'_>) {
    if !data.is_empty() {
        return replies.refuse(option_reply::ERR_INVALID, "LIST takes no data");
    }
    let mut reply = (export.name.len() as u32).to_be_bytes().to_vec();
    reply.extend_from_slice(export.name.as_bytes());
    reply.extend_from_slice(export.description.as_bytes());
    replies.push(option_reply::SERVER, &reply);
    replies.push(option_reply::ACK, &[]);
}

/// Where replies to one option go.
struct Replies<'a> {
    out: &'a mut Vec<u8>,
    option: u32,
}

impl Replies<'_> {
    fn push(&mut self, kind: u32, data: &[u8]) {
        let header = OptionReply {
            magic: proto::OPTION_REPLY_MAGIC.into(),
            option: self.option.into(),
            kind: kind.into(),
            len: (data.len() as u32).into(),
        };
        self.out.extend_from_slice(header.as_bytes());
        self.out.extend_from_slice(data);
    }

    fn refuse(&mut self, kind: u32, text: &str) {
        self.push(kind, text.as_bytes());
    }
}

/// Name and wanted kinds (two bytes each) of an `INFO` or `GO`.
fn parse_info(data: &[u8]) -> Option<(&[u8], &[u8])> {
    let (name, rest) = take_string(data)?;
    let (count, wanted) = rest.split_first_chunk::<2>()?;
    (wanted.len() == usize::from(u16::from_be_bytes(*count)) * 2).then_some((name, wanted))
}

/// Export name and queries of a metadata context option.
fn parse_queries(data: &[u8]) -> Option<(&[u8], Vec<&[u8]>)> {
    let (name, rest) = take_string(data)?;
    let (count, mut rest) = rest.split_first_chunk::<4>()?;
    let count = u32::from_be_bytes(*count);
    if count > CONTEXT_QUERIES_MAX {
        return None;
    }
    let mut queries = Vec::new();
    for _ in 0..count {
        let (query, after) = take_string(rest)?;
        queries.push(query);
        rest = after;
    }
    rest.is_empty().then_some((name, queries))
}

/// A string with its length in four bytes before it, and what follows.
fn take_string(data: &[u8]) -> Option<(&[u8], &[u8])> {
    let (len, rest) = data.split_first_chunk::<4>()?;
    rest.split_at_checked(u32::from_be_bytes(*len) as usize)
}

#[cfg(test)]
#[path = "handshake_tests.rs"]
mod tests;
