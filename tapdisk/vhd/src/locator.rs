//! Parent locators: where a differencing image says its parent's path is.
//!
//! The reference writes three, each holding the same relative path: `MacX`
//! (UTF-8, `file://` before it), `W2ku` and `W2ru` (UTF-16LE, back-slashes,
//! always beginning `.\`). Lengths and spaces are in bytes; a space below 512
//! means sectors.

use zerocopy::byteorder::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::error::{Error, Result};
use crate::limits::LOCATOR_BYTES_MAX;
use crate::storage::{Volume, VolumeName};
use crate::units::round_up;

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct RawLocator {
    code: U32,
    space: U32,
    len: U32,
    reserved: U32,
    offset: U64,
}

/// How a locator's text is encoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Code {
    /// UTF-8 URL.
    MacX,
    /// UTF-16LE, meant to be absolute.
    W2ku,
    /// UTF-16LE, relative.
    W2ru,
    /// A code whose content is not looked at, or none (0).
    Other(u32),
}

impl Code {
    fn number(self) -> u32 {
        match self {
            Self::MacX => 0x4D61_6358,
            Self::W2ku => 0x5732_6B75,
            Self::W2ru => 0x5732_7275,
            Self::Other(code) => code,
        }
    }

    fn of(number: u32) -> Self {
        [Self::MacX, Self::W2ku, Self::W2ru]
            .into_iter()
            .find(|code| code.number() == number)
            .unwrap_or(Self::Other(number))
    }
}

/// One of the header's eight locator entries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LocatorEntry {
    /// Encoding.
    pub code: Code,
    /// Room for the text, as stored.
    pub space: u32,
    /// Length of the text in bytes.
    pub len: u32,
    /// Byte offset in the file.
    pub offset: u64,
}

impl LocatorEntry {
    /// An unused entry.
    pub const NONE: Self = Self { code: Code::Other(0), space: 0, len: 0, offset: 0 };

    pub(crate) fn from_raw(raw: &RawLocator) -> Self {
        Self {
            code: Code::of(raw.code.get()),
            space: raw.space.get(),
            len: raw.len.get(),
            offset: raw.offset.get(),
        }
    }

    pub(crate) fn to_raw(self) -> RawLocator {
        RawLocator {
            code: self.code.number().into(),
            space: self.space.into(),
            len: self.len.into(),
            reserved: 0.into(),
            offset: self.offset.into(),
        }
    }

    /// Room for the text in bytes; 0 if the field makes no sense.
    #[must_use]
    pub fn space_bytes(&self) -> u64 {
        match self.space {
            sectors @ 0..512 => u64::from(sectors) * 512,
            bytes if bytes.is_multiple_of(512) => u64::from(bytes),
            _ => 0,
        }
    }

    /// Reads and decodes the text as a path with slashes; `None` for codes
    /// whose content is not looked at.
    ///
    /// # Errors
    /// [`Error::BadLocator`] with the reason.
    pub fn read(&self, volume: &dyn Volume) -> Result<Option<String>> {
        let bad = |reason| Error::BadLocator { reason };
        if matches!(self.code, Code::Other(_)) {
            return Ok(None);
        }
        if self.len == 0 || self.len > LOCATOR_BYTES_MAX || u64::from(self.len) > self.space_bytes() {
            return Err(bad("its length does not fit its space"));
        }
        let mut bytes = vec![0; self.len as usize];
        volume.read_at(&mut bytes, self.offset).map_err(|_| bad("it lies outside the file"))?;
        decode(self.code, &bytes).map(Some)
    }
}

fn decode(code: Code, bytes: &[u8]) -> Result<String> {
    let bad = |reason| Error::BadLocator { reason };
    let text = match code {
        Code::MacX => {
            let text = std::str::from_utf8(bytes).map_err(|_| bad("not UTF-8"))?;
            text.strip_prefix("file://").ok_or_else(|| bad("no file:// before the path"))?.to_owned()
        }
        _ => {
            let (units, []) = bytes.as_chunks::<2>() else {
                return Err(bad("an odd number of bytes"));
            };
            String::from_utf16(&units.iter().map(|u| u16::from_le_bytes(*u)).collect::<Vec<_>>())
                .map_err(|_| bad("not UTF-16"))?
        }
    };
    let path = text.trim_end_matches('\0').replace('\\', "/");
    let path = path.strip_prefix("C:").or_else(|| path.strip_prefix("c:")).unwrap_or(&path).to_owned();
    if path.is_empty() || path.contains('\0') { Err(bad("not a path")) } else { Ok(path) }
}

/// The text of a locator for a relative path like `./name`.
#[must_use]
pub fn encode(code: Code, path: &str) -> Vec<u8> {
    if code == Code::MacX {
        return format!("file://{path}").into_bytes();
    }
    let rest = path.strip_prefix("./").unwrap_or(path).replace('/', "\\");
    format!(".\\{rest}").encode_utf16().flat_map(u16::to_le_bytes).collect()
}

/// Room a text of this length is given: whole sectors, at least one.
#[must_use]
pub fn space_for(len: usize) -> u64 {
    round_up(len as u64, 512).max(512)
}

/// The volume a decoded path names, if it stays in the child's own folder
/// (invariant 10).
///
/// # Errors
/// [`Error::ParentOutside`].
pub fn volume_of(path: &str) -> Result<VolumeName> {
    let mut parts = path.split('/').filter(|part| !part.is_empty() && *part != ".");
    let outside = || Error::ParentOutside { path: path.to_owned() };
    if path.starts_with('/') {
        return Err(outside());
    }
    match (parts.next(), parts.next()) {
        (Some(name), None) => VolumeName::new(name).ok_or_else(outside),
        _ => Err(outside()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_encoding_comes_back() {
        for path in ["./base.vhd", "./größe-日本.vhd"] {
            for code in [Code::MacX, Code::W2ku, Code::W2ru] {
                assert_eq!(decode(code, &encode(code, path)).unwrap(), path);
            }
        }
    }

    #[test]
    fn only_the_own_folder_is_reached() {
        assert_eq!(volume_of("././/a.vhd").unwrap().as_str(), "a.vhd");
        for path in ["../a.vhd", "/a.vhd", "./sub/a.vhd", "./..", ".", "./.hidden"] {
            assert!(volume_of(path).is_err(), "{path}");
        }
    }
}
