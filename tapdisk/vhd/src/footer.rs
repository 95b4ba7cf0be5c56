//! The footer: 512 bytes at the end of every image, copied to the front of a
//! dynamic one. Source: the VHD specification, "Hard Disk Footer Format", and
//! the reference tapdisk's extensions (the hidden byte).

use uuid::Uuid;
use zerocopy::byteorder::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::error::{Error, Result};
use crate::units::{SECTOR_BYTES, VIRTUAL_BYTES_MAX};

/// First bytes of every footer.
pub const COOKIE: [u8; 8] = *b"conectix";
/// First bytes while a resize of the reference tools is under way.
pub const COOKIE_POISON: [u8; 8] = *b"v_poison";
/// Creator application of the reference tools, and ours.
pub const CREATOR_TAP: [u8; 4] = *b"tap\0";
/// Creator version written: 1.3.
pub const CREATOR_VERSION: u32 = 0x0001_0003;
/// Where the dynamic header lies.
pub const HEADER_OFFSET: u64 = 512;
/// Seconds from 1970 to 2000, where VHD time begins.
pub const VHD_EPOCH_S: u64 = 946_684_800;

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Raw {
    cookie: [u8; 8],
    features: U32,
    format_version: U32,
    data_offset: U64,
    timestamp: U32,
    creator: [u8; 4],
    creator_version: U32,
    creator_os: U32,
    original_size: U64,
    current_size: U64,
    cylinders: U16,
    heads: u8,
    sectors: u8,
    disk_type: U32,
    checksum: U32,
    uuid: [u8; 16],
    saved: u8,
    hidden: u8,
    reserved: [u8; 426],
}

/// Kinds of image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskType {
    /// Raw data with a footer.
    Fixed,
    /// Blocks allocated as they are written.
    Dynamic,
    /// As dynamic; what it has not, its parent has.
    Differencing,
}

impl DiskType {
    fn code(self) -> u32 {
        match self {
            Self::Fixed => 2,
            Self::Dynamic => 3,
            Self::Differencing => 4,
        }
    }
}

/// Cylinders, heads, sectors per track: never what determines the size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Cylinders.
    pub cylinders: u16,
    /// Heads.
    pub heads: u8,
    /// Sectors per track.
    pub sectors: u8,
}

impl Geometry {
    /// The specification's algorithm for a size in bytes.
    #[must_use]
    pub fn of(virtual_bytes: u64) -> Self {
        let sectors = virtual_bytes.div_ceil(SECTOR_BYTES).min(65535 * 16 * 255);
        let (mut per_track, mut heads, mut cylinders_heads);
        if sectors >= 65535 * 16 * 63 {
            (per_track, heads) = (255, 16);
            cylinders_heads = sectors / per_track;
        } else {
            per_track = 17;
            cylinders_heads = sectors / per_track;
            heads = cylinders_heads.div_ceil(1024).max(4);
            if cylinders_heads >= heads * 1024 || heads > 16 {
                (per_track, heads) = (31, 16);
                cylinders_heads = sectors / per_track;
            }
            if cylinders_heads >= heads * 1024 {
                (per_track, heads) = (63, 16);
                cylinders_heads = sectors / per_track;
            }
        }
        Self {
            cylinders: u16::try_from(cylinders_heads / heads).unwrap_or(u16::MAX),
            heads: u8::try_from(heads).unwrap_or(u8::MAX),
            sectors: u8::try_from(per_track).unwrap_or(u8::MAX),
        }
    }
}

/// A footer that passed validation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Footer {
    /// Feature bits.
    pub features: u32,
    /// Seconds since 2000.
    pub timestamp: u32,
    /// Creator application.
    pub creator: [u8; 4],
    /// Its version.
    pub creator_version: u32,
    /// Its operating system.
    pub creator_os: u32,
    /// Offset of the dynamic header; all ones for a fixed image.
    pub data_offset: u64,
    /// Size at creation, in bytes.
    pub original_bytes: u64,
    /// Virtual size in bytes.
    pub virtual_bytes: u64,
    /// Geometry as it stands.
    pub geometry: Geometry,
    /// Kind of image.
    pub disk_type: DiskType,
    /// Given once, never changed; children name it.
    pub uuid: Uuid,
    /// Saved state byte.
    pub saved: u8,
    /// A base copy that is nobody's disk.
    pub hidden: bool,
    /// Whether the cookie says a reference resize is under way.
    pub poisoned: bool,
}

impl Footer {
    /// Parses a footer sector.
    ///
    /// # Errors
    /// [`Error::NotVhd`] without cookie or with a bad checksum,
    /// [`Error::BadFooter`] where a sound one says what cannot be.
    pub fn parse(bytes: &[u8; 512]) -> Result<Self> {
        let raw = Raw::read_from_bytes(bytes).map_err(|_| Error::NotVhd)?;
        let poisoned = raw.cookie == COOKIE_POISON;
        if raw.cookie != COOKIE && !poisoned {
            return Err(Error::NotVhd);
        }
        if raw.checksum.get() != checksum(&raw) && !old_hidden_checksum(&raw) {
            return Err(Error::NotVhd);
        }
        let disk_type = match raw.disk_type.get() {
            2 => DiskType::Fixed,
            3 => DiskType::Dynamic,
            4 => DiskType::Differencing,
            _ => {
                return Err(Error::BadFooter { reason: "unknown disk type" });
            }
        };
        if raw.format_version.get() >> 16 != 1 {
            return Err(Error::BadFooter { reason: "unknown format version" });
        }
        if raw.creator == CREATOR_TAP && raw.creator_version.get() == 1 {
            return Err(Error::BadFooter {
                reason: "written by version 0.1 of the reference, which is refused",
            });
        }
        if raw.creator == CREATOR_TAP && raw.creator_version.get() > CREATOR_VERSION {
            return Err(Error::BadFooter { reason: "written by a newer version of the reference" });
        }
        let virtual_bytes = raw.current_size.get();
        if virtual_bytes > VIRTUAL_BYTES_MAX {
            return Err(Error::TooLarge { what: "a virtual disk", bytes: virtual_bytes });
        }
        if !virtual_bytes.is_multiple_of(SECTOR_BYTES) {
            return Err(Error::BadFooter { reason: "the virtual size is not a multiple of 512" });
        }
        Ok(Self {
            features: raw.features.get(),
            timestamp: raw.timestamp.get(),
            creator: raw.creator,
            creator_version: raw.creator_version.get(),
            creator_os: raw.creator_os.get(),
            data_offset: raw.data_offset.get(),
            original_bytes: raw.original_size.get(),
            virtual_bytes,
            geometry: Geometry { cylinders: raw.cylinders.get(), heads: raw.heads, sectors: raw.sectors },
            disk_type,
            uuid: Uuid::from_bytes(raw.uuid),
            saved: raw.saved,
            hidden: raw.hidden != 0,
            poisoned,
        })
    }

    /// The footer sector, checksum included.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; 512] {
        let mut raw = Raw {
            cookie: if self.poisoned { COOKIE_POISON } else { COOKIE },
            features: self.features.into(),
            format_version: 0x0001_0000.into(),
            data_offset: self.data_offset.into(),
            timestamp: self.timestamp.into(),
            creator: self.creator,
            creator_version: self.creator_version.into(),
            creator_os: self.creator_os.into(),
            original_size: self.original_bytes.into(),
            current_size: self.virtual_bytes.into(),
            cylinders: self.geometry.cylinders.into(),
            heads: self.geometry.heads,
            sectors: self.geometry.sectors,
            disk_type: self.disk_type.code().into(),
            checksum: 0.into(),
            uuid: self.uuid.into_bytes(),
            saved: self.saved,
            hidden: u8::from(self.hidden),
            reserved: [0; 426],
        };
        raw.checksum = checksum(&raw).into();
        zerocopy::transmute!(raw)
    }
}

/// Ones' complement of the byte sum; `bytes` has 0 where the checksum goes.
#[must_use]
pub fn ones_complement(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(0_u32, |sum, byte| sum.wrapping_add(u32::from(*byte)))
}

fn checksum(raw: &Raw) -> u32 {
    ones_complement(Raw { checksum: 0.into(), ..*raw }.as_bytes())
}

/// Versions 0.1 and 1.1 of the reference summed with `hidden` taken as 0.
fn old_hidden_checksum(raw: &Raw) -> bool {
    raw.creator == CREATOR_TAP
        && matches!(raw.creator_version.get(), 0x0000_0001 | 0x0001_0001)
        && raw.hidden != 0
        && raw.checksum.get() == checksum(&Raw { hidden: 0, ..*raw })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn geometry_of_known_sizes() {
        let g = Geometry::of(64 << 20);
        assert_eq!((g.cylinders, g.heads, g.sectors), (963, 8, 17));
        let g = Geometry::of(16 << 20);
        assert_eq!((g.cylinders, g.heads, g.sectors), (481, 4, 17));
    }
}
