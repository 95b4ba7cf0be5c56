//! Images made wrong on purpose, from bytes, without our own format crate.
//!
//! Works on a dynamic or differencing image whose header stands at 512, as
//! all of ours do. Offsets are those of the published VHD specification.

use std::ops::Range;
use std::path::Path;

use uuid::Uuid;

const SECTOR: usize = 512;
/// In the footer.
const CURRENT_SIZE: Range<usize> = 48..56;
const FOOTER_SUM: Range<usize> = 64..68;
const FOOTER_UUID: Range<usize> = 68..84;
/// In the header, which stands at [`SECTOR`].
const TABLE_OFFSET: Range<usize> = 16..24;
const MAX_ENTRIES: Range<usize> = 28..32;
const BLOCK_SIZE: Range<usize> = 32..36;
const HEADER_SUM: Range<usize> = 36..40;
const PARENT_UUID: Range<usize> = 40..56;
const HEADER_BYTES: usize = 1024;

/// The bytes of an image.
#[derive(Debug, Clone)]
pub struct Forged {
    bytes: Vec<u8>,
}

impl Forged {
    /// Starts from a good image.
    pub fn from(path: &Path) -> Self {
        Self { bytes: std::fs::read(path).unwrap() }
    }

    /// Bytes that never were an image.
    pub fn random(rng: &mut impl rand::Rng, len: usize) -> Self {
        let mut bytes = vec![0; len];
        rng.fill_bytes(&mut bytes);
        Self { bytes }
    }

    /// Writes it into `folder` under `uuid`; the file's name.
    pub fn put(&self, folder: &Path, uuid: Uuid) -> String {
        let name = format!("{uuid}.vhd");
        std::fs::write(folder.join(&name), &self.bytes).unwrap();
        name
    }

    /// Its length.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Cuts it to `len` bytes.
    pub fn truncated(mut self, len: usize) -> Self {
        self.bytes.truncate(len);
        self
    }

    /// Fills a range with a byte.
    pub fn smeared(mut self, range: Range<usize>, byte: u8) -> Self {
        self.bytes[range].fill(byte);
        self
    }

    /// Another uuid, in both footers.
    pub fn with_footer_uuid(mut self, uuid: Uuid) -> Self {
        self.each_footer(|footer| footer[FOOTER_UUID].copy_from_slice(uuid.as_bytes()));
        self
    }

    /// Another uuid in the footer at the start only: the two disagree.
    pub fn with_contradicting_footers(mut self) -> Self {
        self.bytes[FOOTER_UUID].copy_from_slice(Uuid::new_v4().as_bytes());
        resum(&mut self.bytes[..SECTOR], FOOTER_SUM);
        self
    }

    /// Another virtual size, in both footers.
    pub fn with_size(mut self, bytes: u64) -> Self {
        self.each_footer(|footer| footer[CURRENT_SIZE].copy_from_slice(&bytes.to_be_bytes()));
        self
    }

    /// Another number of block-table entries.
    pub fn with_entries(self, entries: u32) -> Self {
        self.in_header(MAX_ENTRIES, &entries.to_be_bytes())
    }

    /// Another block size.
    pub fn with_block_size(self, bytes: u32) -> Self {
        self.in_header(BLOCK_SIZE, &bytes.to_be_bytes())
    }

    /// The block table somewhere else.
    pub fn with_table_at(self, offset: u64) -> Self {
        self.in_header(TABLE_OFFSET, &offset.to_be_bytes())
    }

    /// Every block-table entry set to `sector`.
    pub fn with_every_block_at(mut self, sector: u32) -> Self {
        let header = &self.bytes[SECTOR..][..HEADER_BYTES];
        let table = u64::from_be_bytes(header[TABLE_OFFSET].try_into().unwrap()) as usize;
        let entries = u32::from_be_bytes(header[MAX_ENTRIES].try_into().unwrap()) as usize;
        for entry in self.bytes[table..][..4 * entries].chunks_exact_mut(4) {
            entry.copy_from_slice(&sector.to_be_bytes());
        }
        self
    }

    /// Another parent: its footer's uuid, and in every locator the text `to`
    /// where `from` stood, of the same length.
    pub fn with_parent(self, uuid: Uuid, from: &str, to: &str) -> Self {
        let mut forged = self.in_header(PARENT_UUID, uuid.as_bytes());
        assert_eq!(from.encode_utf16().count(), to.encode_utf16().count());
        let wide = |text: &str| -> Vec<u8> { text.encode_utf16().flat_map(u16::to_le_bytes).collect() };
        // The header's own copy of the name stays: it is only a remark.
        let tail = &mut forged.bytes[SECTOR + HEADER_BYTES..];
        let mut replaced = replace(tail, from.as_bytes(), to.as_bytes());
        let windows = |text: &str| text.replace('/', "\\");
        for (from, to) in [(from.to_owned(), to.to_owned()), (windows(from), windows(to))] {
            replaced += replace(tail, &wide(&from), &wide(&to));
        }
        assert!(replaced > 0, "no locator says {from}");
        forged
    }

    fn in_header(mut self, field: Range<usize>, value: &[u8]) -> Self {
        let header = &mut self.bytes[SECTOR..][..HEADER_BYTES];
        header[field].copy_from_slice(value);
        resum(header, HEADER_SUM);
        self
    }

    fn each_footer(&mut self, change: impl Fn(&mut [u8])) {
        let end = self.bytes.len() - SECTOR;
        for at in [0, end] {
            let footer = &mut self.bytes[at..at + SECTOR];
            change(footer);
            resum(footer, FOOTER_SUM);
        }
    }
}

/// Sets the checksum of a structure: the complement of the sum of its bytes.
fn resum(bytes: &mut [u8], field: Range<usize>) {
    bytes[field.clone()].fill(0);
    let sum: u32 = bytes.iter().map(|byte| u32::from(*byte)).sum();
    bytes[field].copy_from_slice(&(!sum).to_be_bytes());
}

/// Replaces every `from` by `to`, both of one length; how often.
fn replace(bytes: &mut [u8], from: &[u8], to: &[u8]) -> usize {
    let at: Vec<usize> = (0..=bytes.len() - from.len()).filter(|i| bytes[*i..].starts_with(from)).collect();
    for i in &at {
        bytes[*i..i + to.len()].copy_from_slice(to);
    }
    at.len()
}
