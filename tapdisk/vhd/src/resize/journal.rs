//! Undoing a resize of the reference tools that was interrupted.
//!
//! The reference keeps an undo log beside the image while blocks move: a
//! 512-byte header, then entries of 32 bytes with a payload each. Meanwhile
//! the image's footers carry the cookie `v_poison`, so nobody opens it.
//!
//! ```text
//! journal   0      512                    data_offset        end
//!           header | footers header BAT … | bitmap, data, … |
//! ```

use uuid::Uuid;
use zerocopy::byteorder::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::error::{Error, Result};
use crate::footer::{DiskType, Footer, HEADER_OFFSET, ones_complement};
use crate::header::DynHeader;
use crate::limits::{JOURNAL_ENTRIES_MAX, JOURNAL_PAYLOAD_MAX};
use crate::storage::Volume;
use crate::units::{SECTOR_BYTES, VIRTUAL_BYTES_MAX};

const COOKIE: [u8; 8] = *b"vjournal";
const ENTRY_COOKIE: u64 = 0xAAAA_1234_4321_AAAA;
const ENTRY_BYTES: u64 = 32;

// The end-of-journal field is left out on purpose: the reference writes it in
// the byte order of its host. The entry counts say the same.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct RawHeader {
    cookie: [u8; 8],
    uuid: [u8; 16],
    footer_offset: U64,
    data_entries: U32,
    metadata_entries: U32,
    data_offset: U64,
    metadata_offset: U64,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct RawEntry {
    cookie: U64,
    kind: U32,
    size: U32,
    offset: U64,
    checksum: U32,
    // Stack garbage of the writer; it takes part in the checksum.
    padding: [u8; 4],
}

/// What an entry restores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    EndFooter,
    FrontFooter,
    Header,
    Locator,
    Bat,
    BatmapHeader,
    BatmapBits,
    Data,
}

/// An entry that passed validation; its payload is still in the journal.
#[derive(Debug, Clone, Copy)]
struct Entry {
    kind: Kind,
    /// Bytes of payload.
    size: u32,
    /// Where in the image it goes.
    offset: u64,
    /// Where in the journal the payload lies.
    payload_at: u64,
}

/// A whole journal, every checksum verified.
#[derive(Debug)]
struct Journal {
    footer: Footer,
    footer_offset: u64,
    entries: Vec<Entry>,
}

/// Takes an image back to where it stood before an interrupted resize of the
/// reference tools, as its `journal` recorded it. The journal itself is left
/// for the caller to delete, once this has returned.
///
/// Crash argument; recovery is to run this again:
/// 1. The whole journal is validated before anything is written.
/// 2. Everything but the footers is put back, the file is cut where its
///    footer goes, flush. The front still says `v_poison`, and nothing read
///    from the image decides what is written: every run writes the same.
/// 3. The footer at the end, flush; a crash before 4 still finds the poison
///    at the front, or all of the old image.
/// 4. The footer at the front, flush. The image is what it was.
///
/// # Errors
/// [`Error::BadJournal`] with the reason, nothing having been written; what
/// reading and writing said.
pub fn revert(volume: &dyn Volume, journal: &dyn Volume) -> Result<()> {
    let parsed = Journal::read(journal)?;
    parsed.belongs_to(volume)?;
    let mut payload = Vec::new();
    for entry in &parsed.entries {
        if matches!(entry.kind, Kind::EndFooter | Kind::FrontFooter) {
            continue;
        }
        payload.resize(entry.size as usize, 0);
        journal.read_at(&mut payload, entry.payload_at)?;
        volume.write_at(&payload, entry.offset)?;
    }
    if !volume.is_device() {
        volume.set_len(parsed.footer_offset + SECTOR_BYTES)?;
    }
    volume.flush("revert: old metadata and data before the footers")?;
    let footer = parsed.footer.to_bytes();
    volume.write_at(&footer, parsed.footer_offset)?;
    volume.flush("revert: footer at the end before the poison goes")?;
    if parsed.footer.disk_type != DiskType::Fixed {
        volume.write_at(&footer, 0)?;
        volume.flush("revert: footer at the front")?;
    }
    Ok(())
}

fn bad(reason: &'static str) -> Error {
    Error::BadJournal { reason }
}

impl Journal {
    fn read(journal: &dyn Volume) -> Result<Self> {
        let mut bytes = [0; size_of::<RawHeader>()];
        journal.read_at(&mut bytes, 0).map_err(|_| bad("too short"))?;
        let header = RawHeader::read_from_bytes(&bytes).map_err(|_| bad("too short"))?;
        if header.cookie != COOKIE {
            return Err(bad("no cookie"));
        }
        let (metadata, data) = (header.metadata_entries.get(), header.data_entries.get());
        if metadata == 0 {
            return Err(bad("it was closed: the resize it belongs to had ended"));
        }
        if u64::from(metadata) + u64::from(data) > JOURNAL_ENTRIES_MAX {
            return Err(bad("more entries than a resize makes"));
        }
        let mut entries = read_entries(journal, header.metadata_offset.get(), metadata, false)?;
        let after = entries.last().map_or(SECTOR_BYTES, |e| e.payload_at + u64::from(e.size));
        if data > 0 && header.data_offset.get() != after {
            return Err(bad("data does not follow the metadata"));
        }
        entries.extend(read_entries(journal, after, data, true)?);
        let footer_offset = header.footer_offset.get();
        let footer = old_footer(journal, &entries, footer_offset)?;
        if footer.uuid != Uuid::from_bytes(header.uuid) {
            return Err(bad("its footer is of another image than its header says"));
        }
        check_header(journal, &entries)?;
        Ok(Self { footer, footer_offset, entries })
    }

    /// Refuses a journal of another image. What can be read of the image is
    /// what a torn resize left, so either footer may be the one that is left.
    fn belongs_to(&self, volume: &dyn Volume) -> Result<()> {
        let len = volume.len()?;
        let mut candidates = vec![0, self.footer_offset];
        candidates.extend(len.checked_sub(SECTOR_BYTES));
        let found = candidates.into_iter().any(|offset| {
            let mut bytes = [0; 512];
            volume.read_at(&mut bytes, offset).is_ok()
                && Footer::parse(&bytes).is_ok_and(|footer| footer.uuid == self.footer.uuid)
        });
        if !found {
            return Err(bad("it belongs to another image"));
        }
        let ends = self.entries.iter().map(|e| e.offset + u64::from(e.size));
        if volume.is_device() && ends.max().unwrap_or(0).max(self.footer_offset + SECTOR_BYTES) > len {
            return Err(bad("it reaches past the end of the device"));
        }
        Ok(())
    }
}

fn read_entries(journal: &dyn Volume, from: u64, count: u32, data: bool) -> Result<Vec<Entry>> {
    let mut entries = Vec::new();
    let mut at = from;
    for _ in 0..count {
        let entry = read_entry(journal, at)?;
        if (entry.kind == Kind::Data) != data {
            return Err(bad("an entry of the wrong kind"));
        }
        at = entry.payload_at + u64::from(entry.size);
        entries.push(entry);
    }
    Ok(entries)
}

fn read_entry(journal: &dyn Volume, at: u64) -> Result<Entry> {
    let mut bytes = [0; ENTRY_BYTES as usize];
    journal.read_at(&mut bytes, at).map_err(|_| bad("an entry is cut short"))?;
    let raw = RawEntry::read_from_bytes(&bytes).map_err(|_| bad("an entry is cut short"))?;
    if raw.cookie.get() != ENTRY_COOKIE {
        return Err(bad("an entry without cookie"));
    }
    let kind = match raw.kind.get() {
        1 => Kind::EndFooter,
        2 => Kind::FrontFooter,
        3 => Kind::Header,
        4 => Kind::Locator,
        5 => Kind::Bat,
        6 => Kind::BatmapHeader,
        7 => Kind::BatmapBits,
        8 => Kind::Data,
        _ => return Err(bad("an entry of unknown kind")),
    };
    let (size, offset) = (raw.size.get(), raw.offset.get());
    if size == 0 || size > JOURNAL_PAYLOAD_MAX || !size.is_multiple_of(512) {
        return Err(bad("an entry of a size no resize makes"));
    }
    // Block places are 32-bit sector numbers, so no image reaches further.
    if !offset.is_multiple_of(512) || offset > VIRTUAL_BYTES_MAX * 2 {
        return Err(bad("an entry for a place no image has"));
    }
    let payload_at = at + ENTRY_BYTES;
    let mut payload = vec![0; size as usize];
    journal.read_at(&mut payload, payload_at).map_err(|_| bad("an entry is cut short"))?;
    let head = RawEntry { checksum: 0.into(), ..raw };
    // The sum of two parts, each given as its complement.
    let sum = (!ones_complement(head.as_bytes())).wrapping_add(!ones_complement(&payload));
    if raw.checksum.get() != !sum {
        return Err(bad("an entry with a bad checksum"));
    }
    Ok(Entry { kind, size, offset, payload_at })
}

fn old_footer(journal: &dyn Volume, entries: &[Entry], footer_offset: u64) -> Result<Footer> {
    let entry = entries.iter().find(|e| e.kind == Kind::EndFooter).ok_or_else(|| bad("no footer in it"))?;
    if entry.offset != footer_offset || entry.size != 512 {
        return Err(bad("its footer is not where it says"));
    }
    let mut bytes = [0; 512];
    journal.read_at(&mut bytes, entry.payload_at)?;
    let footer = Footer::parse(&bytes)?;
    Ok(Footer { poisoned: false, ..footer })
}

fn check_header(journal: &dyn Volume, entries: &[Entry]) -> Result<()> {
    let Some(entry) = entries.iter().find(|e| e.kind == Kind::Header) else {
        return Ok(());
    };
    if entry.offset != HEADER_OFFSET || entry.size != 1024 {
        return Err(bad("its header is not where headers are"));
    }
    let mut bytes = [0; 1024];
    journal.read_at(&mut bytes, entry.payload_at)?;
    DynHeader::parse(&bytes).map(drop)
}
