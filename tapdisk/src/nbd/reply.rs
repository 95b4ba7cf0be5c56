//! What replies look like.

use zerocopy::IntoBytes;

use super::handshake::{Agreed, Context, Mode};
use super::proto::{self, ChunkHeader, ExtendedChunkHeader, NbdError, SimpleReply, allocation, chunk};
use super::transmission::{Asked, Expects};
use crate::engine::Extent;
use crate::limits::REPLY_EXTENTS_MAX;

/// The head of a reply: everything but the data of a read, which follows it.
#[must_use]
pub fn reply_head(
    asked: &Asked,
    agreed: Agreed,
    result: Result<(), NbdError>,
    extents: &[Extent],
) -> Vec<u8> {
    match (result, asked.expects) {
        (Err(error), _) if agreed.mode != Mode::Simple => {
            let mut head = chunk_head(asked, agreed.mode, chunk::FLAG_DONE, chunk::ERROR, 6);
            head.extend_from_slice(&(error as u32).to_be_bytes());
            head.extend_from_slice(&0u16.to_be_bytes()); // no message
            head
        }
        (Ok(()), Expects::Data) if agreed.mode != Mode::Simple => {
            let len = 8 + asked.len;
            let mut head = chunk_head(asked, agreed.mode, chunk::FLAG_DONE, chunk::OFFSET_DATA, len);
            head.extend_from_slice(&asked.offset.to_be_bytes());
            head
        }
        (Ok(()), Expects::Extents { one }) => block_status(asked, agreed, one, extents),
        (Ok(()), Expects::Outcome) if agreed.mode == Mode::Extended => {
            chunk_head(asked, agreed.mode, chunk::FLAG_DONE, chunk::NONE, 0)
        }
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

fn chunk_head(asked: &Asked, mode: Mode, flags: u16, kind: u16, len: u64) -> Vec<u8> {
    if mode == Mode::Extended {
        let header = ExtendedChunkHeader {
            magic: proto::EXTENDED_CHUNK_MAGIC.into(),
            flags: flags.into(),
            kind: kind.into(),
            cookie: asked.cookie.into(),
            offset: asked.offset.into(),
            len: len.into(),
        };
        return header.as_bytes().to_vec();
    }
    let header = ChunkHeader {
        magic: proto::CHUNK_MAGIC.into(),
        flags: flags.into(),
        kind: kind.into(),
        cookie: asked.cookie.into(),
        len: short(len).into(),
    };
    header.as_bytes().to_vec()
}

/// A length without extended headers: no request is longer.
fn short(len: u64) -> u32 {
    debug_assert!(len <= u32::MAX.into());
    u32::try_from(len).unwrap_or(u32::MAX)
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
        let count = runs.len() as u32;
        if agreed.mode == Mode::Extended {
            let len = 8 + 16 * u64::from(count);
            head.extend(chunk_head(asked, agreed.mode, flags, chunk::BLOCK_STATUS_EXT, len));
            head.extend_from_slice(&(*context as u32).to_be_bytes());
            head.extend_from_slice(&count.to_be_bytes());
            for (len, word) in runs {
                head.extend_from_slice(&len.to_be_bytes());
                head.extend_from_slice(&u64::from(word).to_be_bytes());
            }
            continue;
        }
        let len = 4 + 8 * u64::from(count);
        head.extend(chunk_head(asked, agreed.mode, flags, chunk::BLOCK_STATUS, len));
        head.extend_from_slice(&(*context as u32).to_be_bytes());
        for (len, word) in runs {
            head.extend_from_slice(&short(len).to_be_bytes());
            head.extend_from_slice(&word.to_be_bytes());
        }
    }
    head
}

/// The extents as `context` sees them, like neighbours joined, clipped to the
/// request: (bytes, word). Never empty: the protocol wants at least one.
fn runs(asked: &Asked, context: Context, one: bool, extents: &[Extent]) -> Vec<(u64, u32)> {
    let mut runs: Vec<(u64, u32)> = Vec::new();
    let runs_max = if one { 1 } else { REPLY_EXTENTS_MAX };
    let mut left = asked.len;
    // The engine's answer begins with the sector that the request begins in.
    let mut skip = asked.skip() as u64;
    for extent in extents {
        let len = extent.len.saturating_sub(skip).min(left);
        skip = skip.saturating_sub(extent.len);
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

    const ALL: Agreed = Agreed { mode: Mode::Structured, allocation: true, depth: true };

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
        let extended = Agreed { mode: Mode::Extended, ..ALL };
        let head = reply_head(&asked, extended, Err(NbdError::Io), &[]);
        assert_eq!((head.len(), head[35]), (38, 5));
        let head = reply_head(&Asked { expects: Expects::Outcome, ..asked }, extended, Ok(()), &[]);
        assert_eq!((head.len(), &head[4..8]), (32, &[0, 1, 0, 0][..]));
        let asked = Asked { len: 1 << 40, expects: Expects::Extents { one: false }, ..asked };
        let head = reply_head(&asked, extended, Ok(()), &[Extent { len: 1 << 40, depth: 2 }]);
        assert_eq!(head.len(), 2 * (32 + 8 + 16));
        assert_eq!(head[40..48], (1u64 << 40).to_be_bytes());
    }
}
