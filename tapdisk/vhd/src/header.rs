//! The dynamic header: 1024 bytes behind the footer's copy. Source: the VHD
//! specification, "Dynamic Disk Header Format".

use uuid::Uuid;
use zerocopy::byteorder::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::error::{Error, Result};
use crate::footer::ones_complement;
use crate::locator::{LocatorEntry, RawLocator};

/// First bytes of the header.
pub const COOKIE: [u8; 8] = *b"cxsparse";
/// UTF-16 units the parent name has room for.
pub const NAME_UNITS: usize = 256;

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Raw {
    cookie: [u8; 8],
    data_offset: U64,
    table_offset: U64,
    version: U32,
    max_entries: U32,
    block_size: U32,
    checksum: U32,
    parent_uuid: [u8; 16],
    parent_timestamp: U32,
    reserved: U32,
    parent_name: [[u8; 2]; NAME_UNITS],
    locators: [RawLocator; 8],
    reserved2: [u8; 256],
}

/// A header that passed validation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DynHeader {
    /// Byte offset of the BAT.
    pub table_offset: u64,
    /// Entries the BAT has room for.
    pub max_entries: u32,
    /// Bytes in a block: a power of two, 512 to 2 MiB.
    pub block_bytes: u32,
    /// The parent's footer uuid; nil for a raw parent (or none).
    pub parent_uuid: Uuid,
    /// The parent's modification time at linking, VHD seconds.
    pub parent_timestamp: u32,
    /// The parent's base name.
    pub parent_name: String,
    /// Where its paths are stored.
    pub locators: [LocatorEntry; 8],
}

impl DynHeader {
    /// Parses the header.
    ///
    /// # Errors
    /// [`Error::BadHeader`] with the reason.
    pub fn parse(bytes: &[u8; 1024]) -> Result<Self> {
        let bad = |reason| Error::BadHeader { reason };
        let raw = Raw::read_from_bytes(bytes).map_err(|_| bad("too short"))?;
        if raw.cookie != COOKIE {
            return Err(bad("no cookie"));
        }
        if raw.checksum.get() != checksum(&raw) {
            return Err(bad("checksum"));
        }
        if raw.version.get() >> 16 != 1 {
            return Err(bad("unknown version"));
        }
        let block_bytes = raw.block_size.get();
        if !block_bytes.is_power_of_two() || !(512..=2 << 20).contains(&block_bytes) {
            return Err(bad("the block size is not a power of two up to 2 MiB"));
        }
        if !raw.table_offset.get().is_multiple_of(512) {
            return Err(bad("the BAT does not begin at a sector"));
        }
        let units = raw.parent_name.map(u16::from_be_bytes);
        let end = units.iter().position(|unit| *unit == 0).unwrap_or(NAME_UNITS);
        Ok(Self {
            table_offset: raw.table_offset.get(),
            max_entries: raw.max_entries.get(),
            block_bytes,
            parent_uuid: Uuid::from_bytes(raw.parent_uuid),
            parent_timestamp: raw.parent_timestamp.get(),
            parent_name: String::from_utf16_lossy(units.get(..end).unwrap_or(&units)),
            locators: raw.locators.map(|locator| LocatorEntry::from_raw(&locator)),
        })
    }

    /// The header's bytes, checksum included.
    ///
    /// # Errors
    /// A parent name that does not fit.
    pub fn to_bytes(&self) -> Result<[u8; 1024]> {
        let mut parent_name = [[0; 2]; NAME_UNITS];
        let units: Vec<u16> = self.parent_name.encode_utf16().collect();
        if units.len() > NAME_UNITS {
            return Err(Error::BadHeader { reason: "the parent's name is longer than 256 UTF-16 units" });
        }
        for (to, unit) in parent_name.iter_mut().zip(units) {
            *to = unit.to_be_bytes();
        }
        let mut raw = Raw {
            cookie: COOKIE,
            data_offset: u64::MAX.into(),
            table_offset: self.table_offset.into(),
            version: 0x0001_0000.into(),
            max_entries: self.max_entries.into(),
            block_size: self.block_bytes.into(),
            checksum: 0.into(),
            parent_uuid: self.parent_uuid.into_bytes(),
            parent_timestamp: self.parent_timestamp.into(),
            reserved: 0.into(),
            parent_name,
            locators: self.locators.map(|locator| locator.to_raw()),
            reserved2: [0; 256],
        };
        raw.checksum = checksum(&raw).into();
        Ok(zerocopy::transmute!(raw))
    }
}

fn checksum(raw: &Raw) -> u32 {
    ones_complement(Raw { checksum: 0.into(), ..*raw }.as_bytes())
}
