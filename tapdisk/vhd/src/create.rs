//! New images, laid out byte for byte as the reference lays them out.

use uuid::Uuid;

use crate::bat::{BAT_FREE, table_bytes};
use crate::batmap::{header_over, map_bytes};
use crate::error::{Error, Result};
use crate::footer::{CREATOR_TAP, CREATOR_VERSION, DiskType, Footer, Geometry, HEADER_OFFSET};
use crate::header::DynHeader;
use crate::limits::BAT_ENTRIES_MAX;
use crate::locator::{Code, LocatorEntry, encode, space_for};
use crate::meta::Meta;
pub use crate::reparent::ParentLink;
use crate::settle::{footer_place, give_back};
use crate::storage::Volume;
use crate::units::{BLOCK_BYTES, SECTOR_BYTES, VIRTUAL_BYTES_MAX, round_up};

/// Where the BAT of our images begins.
pub(crate) const TABLE_OFFSET: u64 = 1536;

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
    let footer = footer(new)?;
    let head = match new.kind {
        NewKind::Fixed => Vec::new(),
        NewKind::Dynamic | NewKind::Child { .. } => head(new, &footer, &Contents::default())?,
    };
    let data_end = if head.is_empty() { footer.virtual_bytes } else { head.len() as u64 };
    let end = footer_place(volume, data_end)?;
    if !head.is_empty() {
        volume.write_at(&head, 0)?;
    }
    volume.write_at(&footer.to_bytes(), end)?;
    volume.flush("create: the new image before anything names it")?;
    give_back(volume, end)?;
    Meta::read(volume)
}

/// The footer of a new image.
///
/// # Errors
/// [`Error::BadSize`].
pub(crate) fn footer(new: &NewImage) -> Result<Footer> {
    let virtual_bytes = checked_size(new.virtual_bytes)?;
    let disk_type = match new.kind {
        NewKind::Fixed => DiskType::Fixed,
        NewKind::Dynamic => DiskType::Dynamic,
        NewKind::Child { .. } => DiskType::Differencing,
    };
    Ok(Footer {
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
    })
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

/// Which blocks a new image has from the beginning; what is left out at the
/// end is none.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Contents<'a> {
    /// BAT entries.
    pub bat: &'a [u32],
    /// BATmap: bit 0x80 of byte 0 is block 0.
    pub batmap: &'a [u8],
}

/// Everything before the first block of a dynamic image: some 5 MiB at most.
///
/// # Errors
/// [`Error::BadSize`], a parent's name that does not fit.
pub(crate) fn head(new: &NewImage, footer: &Footer, contents: &Contents<'_>) -> Result<Vec<u8>> {
    let max_entries = max_entries(new, footer)?;
    let batmap_at = TABLE_OFFSET + table_bytes(max_entries);
    let locators_at = batmap_at + SECTOR_BYTES + map_bytes(max_entries);
    let mut header = DynHeader {
        table_offset: TABLE_OFFSET,
        max_entries,
        block_bytes: 2 << 20,
        parent_uuid: Uuid::nil(),
        parent_timestamp: 0,
        parent_name: String::new(),
        locators: [LocatorEntry::NONE; 8],
    };
    let mut locators = Vec::new();
    if let NewKind::Child { parent } = &new.kind {
        header.parent_uuid = parent.uuid;
        header.parent_timestamp = parent.timestamp_s;
        parent.volume.as_str().clone_into(&mut header.parent_name);
        let path = format!("./{}", parent.volume);
        for (slot, code) in header.locators.iter_mut().zip([Code::MacX, Code::W2ku, Code::W2ru]) {
            let text = encode(code, &path);
            let space = space_for(text.len());
            let small = |n: u64| u32::try_from(n).unwrap_or(u32::MAX);
            let offset = locators_at + locators.len() as u64;
            *slot = LocatorEntry { code, space: small(space), len: small(text.len() as u64), offset };
            let end = locators.len() + usize::try_from(space).unwrap_or(usize::MAX);
            locators.extend(text);
            locators.resize(end, 0);
        }
    }
    let mut map = contents.batmap.to_vec();
    map.resize(usize::try_from(map_bytes(max_entries)).unwrap_or(usize::MAX), 0);
    let mut bytes = Vec::new();
    bytes.extend(footer.to_bytes());
    bytes.extend(header.to_bytes()?);
    bytes.extend(table(contents.bat, max_entries));
    bytes.extend(header_over(batmap_at, max_entries, footer.virtual_bytes, &map));
    bytes.extend(map);
    bytes.extend(locators);
    Ok(bytes)
}

fn max_entries(new: &NewImage, footer: &Footer) -> Result<u32> {
    let blocks = u32::try_from(footer.virtual_bytes / BLOCK_BYTES).unwrap_or(u32::MAX);
    let max_entries = new.bat_entries_max.unwrap_or(blocks).max(blocks);
    if max_entries > BAT_ENTRIES_MAX {
        return Err(Error::BadSize { reason: "a BAT of more entries than any image needs" });
    }
    Ok(max_entries)
}

/// A BAT; behind its last entry the reference leaves zeros.
fn table(bat: &[u32], max_entries: u32) -> Vec<u8> {
    let free = std::iter::repeat(&BAT_FREE);
    let entries = bat.iter().chain(free).take(max_entries as usize);
    let mut bytes: Vec<u8> = entries.flat_map(|entry| entry.to_be_bytes()).collect();
    bytes.resize(usize::try_from(table_bytes(max_entries)).unwrap_or(usize::MAX), 0);
    bytes
}
