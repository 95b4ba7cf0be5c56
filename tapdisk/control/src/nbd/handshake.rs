//! The client's half of the handshake: fixed newstyle, `GO`.

use std::io::{self, Read, Write};

use super::wire::{self, OPTION_MAGIC, OPTION_REPLY_MAGIC, handshake_flag, info, option, option_reply};

/// Longest option reply read.
const OPTION_REPLY_BYTES_MAX: u32 = 64 * 1024;

/// Newstyle negotiation up to transmission; the export's size in bytes.
///
/// # Errors
/// What the stream says, or a server that speaks otherwise or refuses the
/// export.
pub fn negotiate(stream: &mut (impl Read + Write), export: &str) -> io::Result<u64> {
    if u64_from(stream)? != wire::MAGIC || u64_from(stream)? != OPTION_MAGIC {
        return Err(protocol("no NBD newstyle server"));
    }
    let server_flags = u16_from(stream)?;
    if server_flags & handshake_flag::FIXED_NEWSTYLE == 0 {
        return Err(protocol("the server does not speak fixed newstyle"));
    }
    let flags = u32::from(handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES);
    stream.write_all(&flags.to_be_bytes())?;
    let name_len = u32::try_from(export.len()).map_err(io::Error::other)?;
    let mut option = Vec::new();
    option.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
    option.extend_from_slice(&option::GO.to_be_bytes());
    option.extend_from_slice(&(name_len + 6).to_be_bytes());
    option.extend_from_slice(&name_len.to_be_bytes());
    option.extend_from_slice(export.as_bytes());
    option.extend_from_slice(&0u16.to_be_bytes());
    stream.write_all(&option)?;
    let mut size_bytes = None;
    loop {
        if u64_from(stream)? != OPTION_REPLY_MAGIC || u32_from(stream)? != option::GO {
            return Err(protocol("an answer to another option"));
        }
        let kind = u32_from(stream)?;
        let len = u32_from(stream)?;
        if len > OPTION_REPLY_BYTES_MAX {
            return Err(protocol("an option answer beyond any sense"));
        }
        let mut payload = vec![0; len as usize];
        stream.read_exact(&mut payload)?;
        match kind {
            option_reply::ACK => return size_bytes.ok_or_else(|| protocol("the server names no size")),
            option_reply::INFO => size_bytes = export_size(&payload).or(size_bytes),
            _ => {
                let why = String::from_utf8_lossy(&payload).into_owned();
                return Err(protocol(&format!("export \"{export}\" refused ({kind:#x}): {why}")));
            }
        }
    }
}

/// The size in an `NBD_INFO_EXPORT` payload.
fn export_size(payload: &[u8]) -> Option<u64> {
    let (kind, rest) = payload.split_first_chunk::<2>()?;
    let (size, _flags) = rest.split_first_chunk::<8>()?;
    (u16::from_be_bytes(*kind) == info::EXPORT).then(|| u64::from_be_bytes(*size))
}

fn u16_from(stream: &mut impl Read) -> io::Result<u16> {
    let mut bytes = [0; 2];
    stream.read_exact(&mut bytes)?;
    Ok(u16::from_be_bytes(bytes))
}

pub(super) fn u32_from(stream: &mut impl Read) -> io::Result<u32> {
    let mut bytes = [0; 4];
    stream.read_exact(&mut bytes)?;
    Ok(u32::from_be_bytes(bytes))
}

pub(super) fn u64_from(stream: &mut impl Read) -> io::Result<u64> {
    let mut bytes = [0; 8];
    stream.read_exact(&mut bytes)?;
    Ok(u64::from_be_bytes(bytes))
}

pub(super) fn protocol(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_owned())
}
