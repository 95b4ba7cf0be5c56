//! The BATmap: one bit per block, set when every sector of the block is
//! present. The reference tapdisk's extension; a cache that may be thrown
//! away. Its header is found by computation, right behind the BAT.

use zerocopy::byteorder::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::bat::{Layout, table_bytes};
use crate::error::{Error, Result};
use crate::footer::{CREATOR_TAP, Footer, ones_complement};
use crate::meta::Meta;
use crate::storage::Volume;
use crate::units::{BLOCK_BYTES, SECTOR_BYTES, round_up};

const COOKIE: [u8; 8] = *b"tdbatmap";
const VERSION_1_1: u32 = 0x0001_0001;
const VERSION_1_2: u32 = 0x0001_0002;

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Raw {
    cookie: [u8; 8],
    offset: U64,
    sectors: U32,
    version: U32,
    checksum: U32,
    marker: u8,
    /// Key hash and reserve: kept as they are.
    rest: [u8; 483],
}

/// Bytes of bits for so many blocks: whole sectors, at least one.
#[must_use]
pub fn map_bytes(entries: u32) -> u64 {
    round_up(u64::from(entries).div_ceil(8), SECTOR_BYTES).max(SECTOR_BYTES)
}

/// The bytes the checksum covers: bits for the virtual size.
fn summed_bytes(virtual_bytes: u64) -> usize {
    let bytes = round_up(virtual_bytes / (8 * BLOCK_BYTES), SECTOR_BYTES).max(SECTOR_BYTES);
    usize::try_from(bytes).unwrap_or(usize::MAX)
}

/// Adds to a layout where the BATmap lies, if the image has one: the creator
/// is the reference (or we), of a version that wrote one, and the header's
/// fields hold water.
pub fn locate(volume: &dyn Volume, footer: &Footer, layout: &mut Layout) -> Result<()> {
    if footer.creator != CREATOR_TAP || footer.creator_version < VERSION_1_1 {
        return Ok(());
    }
    let header = layout.table_offset + table_bytes(layout.max_entries);
    let Some(raw) = read_header(volume, header) else {
        return Ok(());
    };
    let bits = (raw.offset.get(), raw.sectors.get());
    let end = bits.0.checked_add(u64::from(bits.1) * SECTOR_BYTES);
    let needed = map_bytes(layout.entries);
    if bits.0 < header + SECTOR_BYTES
        || u64::from(bits.1) * SECTOR_BYTES < needed
        || u64::from(bits.1) * SECTOR_BYTES > map_bytes(layout.max_entries)
        || end.is_none_or(|end| end > volume.len().unwrap_or(0))
    {
        return Ok(());
    }
    layout.batmap_header = Some(header);
    layout.batmap_bits = Some(bits);
    layout.data_start = layout.data_start.max(end.unwrap_or(0));
    Ok(())
}

fn read_header(volume: &dyn Volume, at: u64) -> Option<Raw> {
    let mut bytes = [0; 512];
    volume.read_at(&mut bytes, at).ok()?;
    let raw = Raw::read_from_bytes(&bytes).ok()?;
    (raw.cookie == COOKIE && matches!(raw.version.get(), VERSION_1_1 | VERSION_1_2)).then_some(raw)
}

/// The bits for the virtual size, bit 0x80 of byte 0 first; `None` where
/// there is no BATmap or a torn one (its checksum fails): then nothing is
/// known to be whole (invariant 7).
#[must_use]
pub fn read_batmap(volume: &dyn Volume, meta: &Meta) -> Option<Vec<u8>> {
    let layout = meta.layout.as_ref()?;
    let (bits, sectors) = layout.batmap_bits?;
    let raw = read_header(volume, layout.batmap_header?)?;
    let summed = summed_bytes(meta.virtual_bytes());
    let mut map = vec![0; summed.min(sectors as usize * 512)];
    volume.read_at(&mut map, bits).ok()?;
    let sum = match raw.version.get() {
        // Version 1.1 summed signed bytes.
        VERSION_1_1 => {
            !map.iter().fold(0_u32, |sum, byte| sum.wrapping_add_signed(i32::from(byte.cast_signed())))
        }
        _ => ones_complement(&map),
    };
    if sum != raw.checksum.get() {
        return None;
    }
    // The reference sums by a rounding that can leave out the last bits.
    let needed = usize::try_from(map_bytes(layout.entries)).unwrap_or(usize::MAX);
    map.resize(needed, 0);
    Some(map)
}

/// Whether those bits say that the image has all of a block.
pub(crate) fn is_whole(bits: Option<&[u8]>, block: u32) -> bool {
    let byte = bits.and_then(|bits| bits.get(block as usize / 8));
    byte.is_some_and(|byte| byte & (0x80 >> (block % 8)) != 0)
}

/// What can be told of an image's BATmap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BatmapState {
    /// Its checksum holds.
    Sound,
    /// Its header stands, its checksum fails: ignored, and rebuilt when the
    /// image is settled.
    Torn,
    /// No header behind the BAT, or one that makes no sense.
    Missing,
}

/// Looks at the BATmap.
#[must_use]
pub fn state(volume: &dyn Volume, meta: &Meta) -> BatmapState {
    let found = meta.layout.as_ref().is_some_and(|layout| layout.batmap_bits.is_some());
    match read_batmap(volume, meta) {
        Some(_) => BatmapState::Sound,
        None if found => BatmapState::Torn,
        None => BatmapState::Missing,
    }
}

/// Whether the file's BATmap, sound or torn, has any bit set.
#[must_use]
pub fn batmap_has_bits(volume: &dyn Volume, meta: &Meta) -> bool {
    let Some((bits, sectors)) = meta.layout.as_ref().and_then(|layout| layout.batmap_bits) else {
        return false;
    };
    let mut sector = [0; 512];
    (0..u64::from(sectors)).any(|n| {
        volume.read_at(&mut sector, bits + n * SECTOR_BYTES).is_err() || sector.iter().any(|byte| *byte != 0)
    }) || read_batmap(volume, meta).is_none()
}

/// Writes the BATmap: `bits` (the rest zero), then its header with the
/// checksum. Not flushed: torn, it is ignored. Nothing where the image has
/// none.
///
/// # Errors
/// What writing said.
pub fn write_batmap(volume: &dyn Volume, meta: &Meta, bits: &[u8]) -> Result<()> {
    let Some(layout) = &meta.layout else {
        return Ok(());
    };
    let (Some(header), Some((offset, sectors))) = (layout.batmap_header, layout.batmap_bits) else {
        return Ok(());
    };
    let mut map = bits.to_vec();
    map.resize(sectors as usize * 512, 0);
    volume.write_at(&map, offset)?;
    let Some(mut raw) = read_header(volume, header) else {
        return Ok(());
    };
    raw.version = VERSION_1_2.into();
    let summed = summed_bytes(meta.virtual_bytes()).min(map.len());
    raw.checksum = ones_complement(map.get(..summed).unwrap_or(&map)).into();
    volume.write_at(raw.as_bytes(), header)?;
    Ok(())
}

/// The marker byte, which nothing here interprets; `None` where the image has
/// no BATmap to keep it in.
#[must_use]
pub fn marker(volume: &dyn Volume, meta: &Meta) -> Option<u8> {
    let at = meta.layout.as_ref()?.batmap_header?;
    read_header(volume, at).map(|raw| raw.marker)
}

/// Sets the marker byte, durably: one sector is written.
///
/// # Errors
/// [`Error::Unsupported`] where the image has no BATmap, what writing said.
pub fn set_marker(volume: &dyn Volume, meta: &Meta, marker: u8) -> Result<()> {
    let at = meta.layout.as_ref().and_then(|layout| layout.batmap_header);
    let found = at.and_then(|at| Some((at, read_header(volume, at)?)));
    let Some((at, raw)) = found else {
        return Err(Error::Unsupported { what: "a marker in an image without a BATmap" });
    };
    volume.write_at(Raw { marker, ..raw }.as_bytes(), at)?;
    volume.flush("marker: the BATmap's header")?;
    Ok(())
}

/// The header sector of an empty BATmap that takes the place of the one an
/// image has: marker and key hash go along.
pub(crate) fn header_for(
    volume: &dyn Volume,
    old: &Layout,
    header_offset: u64,
    max_entries: u32,
) -> [u8; 512] {
    let mut bytes = new_header(header_offset, max_entries);
    if let Some(raw) = old.batmap_header.and_then(|at| read_header(volume, at)) {
        let kept = raw.as_bytes().len() - raw.rest.len() - 1;
        bytes[kept..].copy_from_slice(&raw.as_bytes()[kept..]);
    }
    bytes
}

/// The header sector of a new, empty BATmap.
#[must_use]
pub fn new_header(header_offset: u64, max_entries: u32) -> [u8; 512] {
    header_over(header_offset, max_entries, 0, &[])
}

/// The header sector of a new BATmap with these bits, right behind it.
pub(crate) fn header_over(header_offset: u64, max_entries: u32, virtual_bytes: u64, map: &[u8]) -> [u8; 512] {
    let summed = summed_bytes(virtual_bytes).min(map.len());
    let sectors = u32::try_from(map_bytes(max_entries) / SECTOR_BYTES).unwrap_or(u32::MAX);
    let raw = Raw {
        cookie: COOKIE,
        offset: (header_offset + SECTOR_BYTES).into(),
        sectors: sectors.into(),
        version: VERSION_1_2.into(),
        checksum: ones_complement(map.get(..summed).unwrap_or(map)).into(),
        marker: 0,
        rest: [0; 483],
    };
    zerocopy::transmute!(raw)
}
