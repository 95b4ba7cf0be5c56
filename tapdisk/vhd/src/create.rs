//! New images, laid out byte for byte as the reference lays them out.

use uuid::Uuid;

use crate::bat::{BAT_FREE, table_bytes};
use crate::batmap::{map_bytes, new_header};
use crate::error::{Error, Result};
use crate::footer::{CREATOR_TAP, CREATOR_VERSION, DiskType, Footer, Geometry, HEADER_OFFSET};
use crate::header::DynHeader;
use crate::limits::BAT_ENTRIES_MAX;
use crate::locator::{Code, LocatorEntry, encode, space_for};
use crate::meta::Meta;
pub use crate::reparent::ParentLink;
use crate::storage::Volume;
use crate::units::{BLOCK_BYTES, SECTOR_BYTES, VIRTUAL_BYTES_MAX, round_up};

/// Where the BAT of our images begins.
const TABLE_OFFSET: u64 = 1536;

/// Kinds of new image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NewKind {
    /// All space taken at once (as a hole on a file).
    Fixed,
    /// Empty, without a parent.
    Dynamic,
    /// Empty, over a parent.
    Child {
        /// Which.
        parent: ParentLink,
    },
}

/// What a new image is to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewImage {
    /// Its footer uuid.
    pub uuid: Uuid,
    /// Virtual size in bytes; rounded up to whole 2 MiB blocks.
    pub virtual_bytes: u64,
    /// Kind.
    pub kind: NewKind,
    /// Room in the BAT and BATmap for a larger size later, in blocks.
    pub bat_entries_max: Option<u32>,
    /// The hidden flag.
    pub hidden: bool,
    /// Creation time, seconds since 2000.
    pub timestamp_s: u32,
}

/// Writes a new image into an empty volume and makes it durable.
///
/// Nothing names the volume yet, so no order matters before the flush.
///
/// # Errors
/// [`Error::BadSize`], or what writing said.
pub fn create(volume: &dyn Volume, new: &NewImage) -> Result<Meta> {
    let virtual_bytes = checked_size(new.virtual_bytes)?;
    let disk_type = match new.kind {
        NewKind::Fixed => DiskType::Fixed,
        NewKind::Dynamic => DiskType::Dynamic,
        NewKind::Child { .. } => DiskType::Differencing,
    };
    let footer = Footer {
        features: 2,
        timestamp: new.timestamp_s,
        creator: CREATOR_TAP,
        creator_version: CREATOR_VERSION,
        creator_os: 0,
        data_offset: if disk_type == DiskType::Fixed { u64::MAX } else { HEADER_OFFSET },
        original_bytes: virtual_bytes,
        virtual_bytes,
        geometry: Geometry::of(virtual_bytes),
        disk_type,
        uuid: new.uuid,
        saved: 0,
        hidden: new.hidden,
        poisoned: false,
    };
    let end = match &new.kind {
        NewKind::Fixed => virtual_bytes,
        NewKind::Dynamic => write_headers(volume, new, &footer, None)?,
        NewKind::Child { parent } => write_headers(volume, new, &footer, Some(parent))?,
    };
    let end = if volume.is_device() { volume.len()?.saturating_sub(SECTOR_BYTES) } else { end };
    volume.write_at(&footer.to_bytes(), end)?;
    volume.flush("create: the new image before anything names it")?;
    Meta::read(volume)
}

/// Rounds a size up to whole blocks.
///
/// # Errors
/// [`Error::BadSize`] for nothing or for more than 2040 GiB.
pub fn checked_size(virtual_bytes: u64) -> Result<u64> {
    match round_up(virtual_bytes, BLOCK_BYTES) {
        0 => Err(Error::BadSize { reason: "a disk needs at least one byte" }),
        bytes if bytes > VIRTUAL_BYTES_MAX => Err(Error::BadSize { reason: "more than 2040 GiB" }),
        bytes => Ok(bytes),
    }
}

/// Everything but the footer at the end; returns where that goes.
fn write_headers(
    volume: &dyn Volume,
    new: &NewImage,
    footer: &Footer,
    parent: Option<&ParentLink>,
) -> Result<u64> {
    let blocks = u32::try_from(footer.virtual_bytes / BLOCK_BYTES).unwrap_or(u32::MAX);
    let max_entries = new.bat_entries_max.unwrap_or(blocks).max(blocks);
    if max_entries > BAT_ENTRIES_MAX {
        return Err(Error::BadSize { reason: "a BAT of more entries than any image needs" });
    }
    let batmap = TABLE_OFFSET + table_bytes(max_entries);
    let locators_at = batmap + SECTOR_BYTES + map_bytes(max_entries);
    let mut header = DynHeader {
        table_offset: TABLE_OFFSET,
        max_entries,
        block_bytes: 2 << 20,
        parent_uuid: Uuid::nil(),
        parent_timestamp: 0,
        parent_name: String::new(),
        locators: [LocatorEntry::NONE; 8],
    };
    let mut end = locators_at;
    if let Some(parent) = parent {
        header.parent_uuid = parent.uuid;
        header.parent_timestamp = parent.timestamp_s;
        parent.volume.as_str().clone_into(&mut header.parent_name);
        let path = format!("./{}", parent.volume);
        for (slot, code) in header.locators.iter_mut().zip([Code::MacX, Code::W2ku, Code::W2ru]) {
            let text = encode(code, &path);
            let space = space_for(text.len());
            let small = |n: u64| u32::try_from(n).unwrap_or(u32::MAX);
            *slot = LocatorEntry { code, space: small(space), len: small(text.len() as u64), offset: end };
            volume.write_at(&text, end)?;
            end += space;
        }
    }
    volume.write_at(&footer.to_bytes(), 0)?;
    volume.write_at(&header.to_bytes()?, HEADER_OFFSET)?;
    write_table(volume, max_entries)?;
    volume.write_at(&new_header(batmap, max_entries), batmap)?;
    volume.write_at(&[0; 512], locators_at - SECTOR_BYTES)?;
    if volume.is_device() {
        volume.zero(batmap + SECTOR_BYTES, map_bytes(max_entries))?;
    }
    Ok(end)
}

/// An empty BAT; behind its last entry the reference leaves zeros.
fn write_table(volume: &dyn Volume, max_entries: u32) -> Result<()> {
    let mut chunk = Vec::new();
    let mut at = TABLE_OFFSET;
    let end = TABLE_OFFSET + table_bytes(max_entries);
    let mut left = max_entries;
    while at < end {
        let bytes = (end - at).min(64 * 1024);
        let entries = left.min(u32::try_from(bytes / 4).unwrap_or(left));
        chunk.clear();
        chunk.extend((0..entries).flat_map(|_| BAT_FREE.to_be_bytes()));
        chunk.resize(usize::try_from(bytes).unwrap_or(0), 0);
        volume.write_at(&chunk, at)?;
        at += bytes;
        left -= entries;
    }
    Ok(())
}
