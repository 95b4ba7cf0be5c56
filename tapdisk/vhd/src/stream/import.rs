//! A VHD read once from front to end. Every byte is untrusted.
//!
//! ```text
//!   dynamic, differencing   footer copy -> header -> BAT -> blocks in the order
//!                           they lie -> footer, which must agree with its copy
//!   fixed                   data, with the last sector held back: the footer
//! ```
//!
//! What a stream says is checked before it is used: footers, header, every
//! BAT entry's place, overlaps. A block's data is given out before the end of
//! the stream was seen; who takes it makes nothing visible until
//! [`Import::next_block`] has said that all is well.
//!
//! Absent on purpose: images whose BAT lies behind their blocks. They are
//! sound, but not to be read from a pipe.

use std::io::{self, Read};

use uuid::Uuid;

use crate::bat::{BAT_FREE, Layout};
use crate::bitmap::SectorBitmap;
use crate::chain::clip;
use crate::error::{Error, Result};
use crate::footer::{DiskType, Footer, HEADER_OFFSET};
use crate::header::DynHeader;
use crate::limits::SCAN_BYTES;
use crate::units::{BLOCK_BYTES, BLOCK_SECTORS, BlockNo, SECTOR_BYTES, SectorRun, VIRTUAL_BYTES_MAX};

const SECTOR: usize = SECTOR_BYTES as usize;

/// What a stream says it is, once its front was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Head {
    /// Its footer uuid; of a fixed image only known at the end.
    pub uuid: Option<Uuid>,
    /// Virtual size in bytes; of a fixed image only known at the end.
    pub virtual_bytes: Option<u64>,
    /// What a differencing image stands on.
    pub parent: Option<ParentId>,
}

/// The parent that a differencing image names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParentId {
    /// Its footer uuid; nil: a raw image.
    pub uuid: Uuid,
    /// Its name there, for messages.
    pub name: String,
}

/// A block of a stream: which sectors it has, and all of its bytes, zeros
/// where it has none.
#[derive(Debug, Clone)]
pub struct Block {
    /// Which.
    pub number: BlockNo,
    /// What is present.
    pub bitmap: SectorBitmap,
    /// 2 MiB.
    pub data: Vec<u8>,
}

impl Default for Block {
    fn default() -> Self {
        Self { number: BlockNo(0), bitmap: SectorBitmap::EMPTY, data: vec![0; BLOCK_BYTES as usize] }
    }
}

/// A stream being read.
pub struct Import<'a> {
    source: Source<'a>,
    head: Head,
    kind: Kind,
}

enum Kind {
    Dynamic {
        copy: Box<Footer>,
        /// Blocks to come, in the order they lie: sector, block.
        left: std::vec::IntoIter<(u32, BlockNo)>,
    },
    Fixed(Box<Fixed>),
}

impl std::fmt::Debug for Import<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Import")
            .field("head", &self.head)
            .field("at", &self.source.at)
            .finish_non_exhaustive()
    }
}

impl<'a> Import<'a> {
    /// Reads a stream's front.
    ///
    /// # Errors
    /// What is wrong with it; [`Error::Unsupported`] for what is sound and
    /// cannot be read so.
    pub fn open(stream: &'a mut dyn Read) -> Result<Self> {
        let mut source = Source { stream, at: 0 };
        let mut first = [0; 512];
        source.fill(&mut first)?;
        let copy = match Footer::parse(&first) {
            Ok(copy) if copy.disk_type != DiskType::Fixed => copy,
            // A fixed image may hold anything at its front, a footer too.
            Ok(_) | Err(Error::NotVhd) => {
                let head = Head { uuid: None, virtual_bytes: None, parent: None };
                let fixed = Fixed { held: first, next: 0, ended: false };
                return Ok(Self { source, head, kind: Kind::Fixed(Box::new(fixed)) });
            }
            Err(error) => return Err(error),
        };
        if copy.poisoned {
            return Err(Error::Poisoned);
        }
        let header = read_header(&mut source, &copy)?;
        let layout = Layout::of(&copy, &header)?;
        if layout.block_sectors != BLOCK_SECTORS {
            return Err(Error::Unsupported { what: "blocks that are not 2 MiB" });
        }
        let left = read_blocks(&mut source, &layout)?;
        let parent = (copy.disk_type == DiskType::Differencing)
            .then(|| ParentId { uuid: header.parent_uuid, name: header.parent_name.clone() });
        let head = Head { uuid: Some(copy.uuid), virtual_bytes: Some(copy.virtual_bytes), parent };
        Ok(Self { source, head, kind: Kind::Dynamic { copy: Box::new(copy), left: left.into_iter() } })
    }

    /// What the stream says it is; all of it after its end.
    #[must_use]
    pub fn head(&self) -> &Head {
        &self.head
    }

    /// Bytes of the stream read so far.
    #[must_use]
    pub fn position(&self) -> u64 {
        self.source.at
    }

    /// Reads the next block. False at the end, and then the footer was found
    /// sound and in agreement with its copy.
    ///
    /// # Errors
    /// What is wrong with the stream.
    pub fn next_block(&mut self, block: &mut Block) -> Result<bool> {
        match &mut self.kind {
            Kind::Dynamic { copy, left } => match left.next() {
                Some((sector, number)) => {
                    let whole = self.head.parent.is_none();
                    read_block(&mut self.source, (sector, number), copy.virtual_bytes, whole, block)?;
                    Ok(true)
                }
                None => {
                    let last = self.source.last_sector()?;
                    agree(copy, &Footer::parse(&last)?)?;
                    Ok(false)
                }
            },
            Kind::Fixed(fixed) => fixed.next_block(&mut self.source, &mut self.head, block),
        }
    }
}

fn read_header(source: &mut Source<'_>, copy: &Footer) -> Result<DynHeader> {
    if copy.data_offset < HEADER_OFFSET || !copy.data_offset.is_multiple_of(SECTOR_BYTES) {
        return Err(Error::BadFooter { reason: "the dynamic header lies inside the footer" });
    }
    source.skip_to(copy.data_offset)?;
    let mut bytes = [0; 1024];
    source.fill(&mut bytes)?;
    DynHeader::parse(&bytes)
}

/// The blocks of a stream in the order they lie, from a BAT whose entries are
/// all in place: behind the headers, whole sectors apart, none over another.
fn read_blocks(source: &mut Source<'_>, layout: &Layout) -> Result<Vec<(u32, BlockNo)>> {
    if layout.table_offset < source.at {
        return Err(Error::BadHeader { reason: "the BAT overlaps the header" });
    }
    source.skip_to(layout.table_offset)?;
    let mut blocks = Vec::new();
    let mut buffer = vec![0; SCAN_BYTES];
    let mut number = 0;
    while number < layout.entries {
        let entries = (layout.entries - number).min(SCAN_BYTES as u32 / 4);
        let part = buffer.get_mut(..entries as usize * 4).unwrap_or_default();
        source.fill(part)?;
        for (n, entry) in (number..).zip(part.as_chunks::<4>().0) {
            let sector = u32::from_be_bytes(*entry);
            if sector != BAT_FREE {
                blocks.push((sector, BlockNo(n)));
            }
        }
        number += entries;
    }
    blocks.sort_unstable();
    let stride = u64::from(BLOCK_SECTORS) + 1;
    let headers_end = layout.data_start.div_ceil(SECTOR_BYTES);
    let mut free_from = headers_end;
    for (sector, block) in &blocks {
        if u64::from(*sector) < free_from {
            let inside = u64::from(*sector) < headers_end;
            let reason = if inside { "it lies inside the headers" } else { "it overlaps another block" };
            return Err(Error::BadBat { block: block.0, sector: *sector, reason });
        }
        free_from = u64::from(*sector) + stride;
    }
    Ok(blocks)
}

/// `whole`: nothing lies below, so what is absent is zeros, and the block has
/// them.
fn read_block(
    source: &mut Source<'_>,
    (sector, number): (u32, BlockNo),
    virtual_bytes: u64,
    whole: bool,
    block: &mut Block,
) -> Result<()> {
    source.skip_to(u64::from(sector) * SECTOR_BYTES)?;
    let mut bytes = [0; 512];
    source.fill(&mut bytes)?;
    source.fill(&mut block.data)?;
    let mut bitmap = SectorBitmap::from_bytes(&bytes);
    let inside = virtual_bytes.saturating_sub(number.first_byte()).div_ceil(SECTOR_BYTES);
    clip(&mut bitmap, u32::try_from(inside).unwrap_or(u32::MAX));
    for absent in bitmap.runs(SectorRun::BLOCK).filter(|run| !run.present).map(|run| run.run) {
        let first = absent.first as usize * SECTOR;
        block.data.get_mut(first..first + absent.bytes() as usize).unwrap_or_default().fill(0);
    }
    block.number = number;
    block.bitmap = if whole { SectorBitmap::FULL } else { bitmap };
    Ok(())
}

fn agree(copy: &Footer, end: &Footer) -> Result<()> {
    let what = if copy.uuid != end.uuid {
        "uuid"
    } else if copy.disk_type != end.disk_type {
        "type"
    } else if copy.virtual_bytes != end.virtual_bytes {
        "virtual size"
    } else if copy.data_offset != end.data_offset {
        "the place of the header"
    } else {
        return Ok(());
    };
    Err(Error::FootersDisagree { what })
}

/// The next blocks of a fixed image: each is given out once it is known that
/// a footer may still follow.
#[derive(Debug)]
struct Fixed {
    /// The last sector read, which may be the footer.
    held: [u8; 512],
    /// Blocks given out.
    next: u32,
    ended: bool,
}

impl Fixed {
    fn next_block(&mut self, source: &mut Source<'_>, head: &mut Head, block: &mut Block) -> Result<bool> {
        if self.ended {
            return Ok(false);
        }
        let mut bytes = self.held.to_vec();
        let got = source.take(BLOCK_BYTES, &mut bytes)?;
        let (data, last) = bytes.split_at(bytes.len() - SECTOR);
        self.held.copy_from_slice(last);
        let virtual_bytes = u64::from(self.next) * BLOCK_BYTES + data.len() as u64;
        if virtual_bytes > VIRTUAL_BYTES_MAX {
            return Err(Error::TooLarge { what: "a virtual disk", bytes: virtual_bytes });
        }
        if got < BLOCK_BYTES {
            self.ended = true;
            let footer = Footer::parse(&self.held)?;
            if footer.disk_type != DiskType::Fixed {
                return Err(Error::BadFooter { reason: "it is not that of a fixed image, as the rest is" });
            }
            if footer.virtual_bytes != virtual_bytes {
                return Err(Error::BadFooter { reason: "the stream is not as long as its fixed size" });
            }
            *head = Head { uuid: Some(footer.uuid), virtual_bytes: Some(virtual_bytes), parent: None };
        }
        if data.is_empty() {
            return Ok(false);
        }
        block.number = BlockNo(self.next);
        block.bitmap = SectorBitmap::FULL;
        block.data.fill(0);
        block.data.get_mut(..data.len()).unwrap_or_default().copy_from_slice(data);
        self.next += 1;
        Ok(true)
    }
}

/// A stream and how far it was read.
struct Source<'a> {
    stream: &'a mut dyn Read,
    at: u64,
}

impl Source<'_> {
    fn fill(&mut self, buf: &mut [u8]) -> Result<()> {
        self.stream.read_exact(buf).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => broke_off(),
            _ => error,
        })?;
        self.at += buf.len() as u64;
        Ok(())
    }

    fn skip_to(&mut self, offset: u64) -> Result<()> {
        let mut scratch = vec![0; SCAN_BYTES];
        while self.at < offset {
            let part = (offset - self.at).min(SCAN_BYTES as u64) as usize;
            self.fill(scratch.get_mut(..part).unwrap_or_default())?;
        }
        Ok(())
    }

    /// Appends up to `len` bytes; fewer only at the end.
    fn take(&mut self, len: u64, to: &mut Vec<u8>) -> Result<u64> {
        let got = self.stream.take(len).read_to_end(to)? as u64;
        self.at += got;
        Ok(got)
    }

    /// Reads to the end, and gives the last sector.
    fn last_sector(&mut self) -> Result<[u8; 512]> {
        let mut tail = Vec::new();
        loop {
            let got = self.take(SCAN_BYTES as u64, &mut tail)?;
            let keep = tail.len().min(SECTOR);
            tail.drain(..tail.len() - keep);
            if got < SCAN_BYTES as u64 {
                return tail.try_into().map_err(|_| broke_off().into());
            }
        }
    }
}

fn broke_off() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "the stream ends before the image does")
}
