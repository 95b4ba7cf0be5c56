//! A raw disk without its holes, as a stream.
//!
//! ```text
//!   offset u64 BE, length u32 BE, that many bytes     offsets rise; what lies
//!   …                                                 between reads as zeros
//!   virtual size u64 BE, 0 u32                        the end: a stream that
//! ```                                                 breaks off lacks it
//!
//! Both sides of a socket speak it, so that a hole costs nothing on the way
//! and a stream cut short is never taken for a smaller disk.

use std::io::{self, Read};

use super::Sink;
use crate::chain::{Chain, Owner};
use crate::error::Result;
use crate::units::{BLOCK_BYTES, SECTOR_BYTES, VIRTUAL_BYTES_MAX};

/// Bytes of an extent's head.
pub const HEAD_BYTES: usize = 12;
/// Bytes of the longest extent.
pub const EXTENT_BYTES_MAX: u32 = 2 << 20;
/// What is looked at as a whole for being zero.
const GRAIN: usize = 64 * 1024;

/// The head of an extent, or with length 0 the end.
#[must_use]
pub fn head(offset: u64, len: u32) -> [u8; HEAD_BYTES] {
    let mut bytes = [0; HEAD_BYTES];
    bytes[..8].copy_from_slice(&offset.to_be_bytes());
    bytes[8..].copy_from_slice(&len.to_be_bytes());
    bytes
}

/// One thing a stream says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Piece {
    /// Bytes follow, at this offset.
    Data {
        /// Offset on the disk.
        offset: u64,
        /// Length in bytes, at least 1.
        len: u32,
    },
    /// The end: the disk's size in bytes.
    End {
        /// Virtual size.
        virtual_bytes: u64,
    },
}

/// Reads the next head; the caller then reads the data. `at`: where the last
/// extent ended.
///
/// # Errors
/// `InvalidData` for what no writer of ours says, `UnexpectedEof` for a
/// stream that breaks off.
pub fn next(stream: &mut dyn Read, at: u64) -> io::Result<Piece> {
    let mut bytes = [0; HEAD_BYTES];
    stream.read_exact(&mut bytes)?;
    let (offset, len) = bytes.split_at(8);
    let offset = u64::from_be_bytes(offset.try_into().unwrap_or_default());
    let len = u32::from_be_bytes(len.try_into().unwrap_or_default());
    let bad = |what: &str| Err(io::Error::new(io::ErrorKind::InvalidData, what.to_owned()));
    if offset < at {
        return bad("an extent that begins before the last one's end");
    }
    if len > EXTENT_BYTES_MAX {
        return bad("an extent that is longer than allowed");
    }
    if offset.checked_add(u64::from(len)).is_none_or(|end| end > VIRTUAL_BYTES_MAX) {
        return bad("an extent past the end of any disk");
    }
    Ok(if len == 0 { Piece::End { virtual_bytes: offset } } else { Piece::Data { offset, len } })
}

/// Writes what a disk holds besides zeros, and how large it is. `passed` is
/// told how much of the disk is behind, now and then.
///
/// # Errors
/// What reading an image or the sink said.
pub fn write(disk: &Chain, sink: Sink<'_>, passed: &mut dyn FnMut(u64)) -> Result<()> {
    let end = disk.virtual_bytes();
    each(disk, &mut |offset, data| {
        let len = u32::try_from(data.len()).map_err(io::Error::other)?;
        sink(&head(offset, len))?;
        sink(data)?;
        passed(offset + u64::from(len));
        Ok(())
    })?;
    sink(&head(end, 0))?;
    Ok(())
}

/// Writes every byte of a disk, zeros included.
///
/// # Errors
/// As [`write`].
pub fn write_plain(disk: &Chain, sink: Sink<'_>, passed: &mut dyn FnMut(u64)) -> Result<()> {
    let zeros = vec![0; GRAIN];
    let mut at = 0;
    let mut fill = |from: &mut u64, to: u64, sink: &mut dyn FnMut(&[u8]) -> io::Result<()>| {
        while *from < to {
            let part = (to - *from).min(GRAIN as u64);
            sink(zeros.get(..part as usize).unwrap_or(&zeros))?;
            *from += part;
            passed(*from);
        }
        io::Result::Ok(())
    };
    each(disk, &mut |offset, data| {
        fill(&mut at, offset, sink)?;
        sink(data)?;
        at = offset + data.len() as u64;
        Ok(())
    })?;
    Ok(fill(&mut at, disk.virtual_bytes(), sink)?)
}

/// Calls with each stretch that is not all zeros, in order.
fn each(disk: &Chain, found: &mut dyn FnMut(u64, &[u8]) -> io::Result<()>) -> Result<()> {
    let end = disk.virtual_bytes();
    let mut data = vec![0; BLOCK_BYTES as usize];
    for block in (0..disk.blocks()).map(crate::units::BlockNo) {
        if !disk.map().has(block) {
            continue;
        }
        let owned = disk.owners(block)?.into_iter().filter(|part| part.owner != Owner::Zero);
        for run in owned.map(|part| part.run) {
            let offset = block.first_byte() + u64::from(run.first) * SECTOR_BYTES;
            let len = run.bytes().min(end.saturating_sub(offset));
            let Some(part) = data.get_mut(..len as usize) else { continue };
            disk.read_at(part, offset)?;
            for (from, to) in not_zero(part) {
                found(offset + from as u64, part.get(from..to).unwrap_or_default())?;
            }
        }
    }
    Ok(())
}

/// The parts of some bytes that are not all zeros, in steps of a grain.
#[must_use]
pub fn not_zero(data: &[u8]) -> Vec<(usize, usize)> {
    let mut parts: Vec<(usize, usize)> = Vec::new();
    for (n, grain) in data.chunks(GRAIN).enumerate() {
        if is_zero(grain) {
            continue;
        }
        let (from, to) = (n * GRAIN, n * GRAIN + grain.len());
        match parts.last_mut() {
            Some(last) if last.1 == from => last.1 = to,
            _ => parts.push((from, to)),
        }
    }
    parts
}

/// Whether all bytes are zero.
#[must_use]
pub fn is_zero(data: &[u8]) -> bool {
    let (words, rest) = data.as_chunks::<16>();
    words.iter().all(|word| *word == [0; 16]) && rest.iter().all(|byte| *byte == 0)
}
