//! The images a merge reads, with their block tables.

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::Arc;

use sm::{Repo, image};
use vhd::bat::{BAT_FREE, read_bat};
use vhd::batmap::read_batmap;
use vhd::bitmap::SectorBitmap;
use vhd::chain::{Chain, ChainMap, clip};
use vhd::merge::{Merge, Next, Tables, Window};
use vhd::meta::Meta;
use vhd::rw::Presence;
use vhd::storage::{Access, Volume, VolumeName};
use vhd::units::{BLOCK_BYTES, BLOCK_SECTORS, BlockNo, SECTOR_BYTES, Slot};

use crate::limits;

/// What offsets and lengths of direct reads are multiples of.
const DIRECT_UNIT_MAX: u32 = 4096;

/// One image, open for reading, as its headers stood then. What is cleared
/// from it later is noted with [`Sources::cleared`].
#[derive(Debug)]
struct Source {
    name: VolumeName,
    volume: Arc<dyn Volume>,
    bat: Vec<u32>,
    whole: Option<Vec<u8>>,
    virtual_bytes: u64,
}

impl Source {
    fn open(repo: &Repo, name: &VolumeName) -> sm::Result<Self> {
        let volume = image::open(repo, name, Access::Read)?;
        let bad = |error| image::bad(name, error);
        let meta = Meta::read(volume.as_ref()).map_err(bad)?;
        let unsuitable = |what: &str| sm::Error::Unsupported { what: format!("merging {name}, {what}") };
        let layout = meta.layout.as_ref().ok_or_else(|| unsuitable("a fixed image"))?;
        if layout.block_sectors != BLOCK_SECTORS {
            return Err(unsuitable("whose blocks are not 2 MiB"));
        }
        let bat = read_bat(volume.as_ref(), layout).map_err(bad)?;
        let whole = read_batmap(volume.as_ref(), &meta);
        let virtual_bytes = meta.virtual_bytes();
        // Only short runs are read so, and they are copied the other way
        // where it cannot be had.
        let _ = volume.go_direct(DIRECT_UNIT_MAX);
        Ok(Self { name: name.clone(), volume, bat, whole, virtual_bytes })
    }

    fn presence(&self, block: BlockNo) -> Presence {
        match self.bat.get(block.index()) {
            None | Some(&BAT_FREE) => Presence::Absent,
            Some(&slot) if self.is_whole(block) => Presence::Whole(Slot(slot)),
            Some(&slot) => Presence::Partial(Slot(slot)),
        }
    }

    /// The last block counts as partial when the disk ends inside it: what
    /// lies behind the end is not part of the view and must not move.
    fn is_whole(&self, block: BlockNo) -> bool {
        let byte = self.whole.as_deref().and_then(|bits| bits.get(block.index() / 8));
        byte.is_some_and(|byte| byte & (0x80 >> (block.0 % 8)) != 0)
            && self.visible_sectors(block) == BLOCK_SECTORS
    }

    fn visible_sectors(&self, block: BlockNo) -> u32 {
        let left = self.virtual_bytes.saturating_sub(u64::from(block.0) * BLOCK_BYTES);
        u32::try_from(left.div_ceil(SECTOR_BYTES)).unwrap_or(u32::MAX).min(BLOCK_SECTORS)
    }

    fn read_bitmap(&self, block: BlockNo) -> sm::Result<SectorBitmap> {
        let Presence::Partial(slot) = self.presence(block) else {
            return Ok(SectorBitmap::FULL);
        };
        let mut bytes = [0; 512];
        let read = self.volume.read_at(&mut bytes, slot.bitmap_offset());
        read.map_err(|e| image::bad(&self.name, e.into()))?;
        let mut bitmap = SectorBitmap::from_bytes(&bytes);
        clip(&mut bitmap, self.visible_sectors(block));
        Ok(bitmap)
    }
}

/// All images of one merge, newest first, over their parent.
#[derive(Debug)]
pub struct Sources {
    images: Vec<Source>,
    /// The parent and everything below it, as it was in the beginning.
    below: ChainMap,
    /// Bitmaps of the window being made, and at most
    /// [`limits::BITMAPS_AHEAD`] of each image behind it.
    bitmaps: RefCell<HashMap<(usize, BlockNo), SectorBitmap>>,
}

impl Sources {
    /// Opens settled images, newest first, and the chain of their parent.
    ///
    /// # Errors
    /// An image cannot be read, or is of a kind that is never merged.
    pub fn open(repo: &Repo, sources: &[VolumeName], parent: &VolumeName) -> sm::Result<Self> {
        let images = sources.iter().map(|name| Source::open(repo, name)).collect::<sm::Result<_>>()?;
        let chain = Chain::open(repo.volumes.as_ref(), parent).map_err(|e| image::bad(parent, e))?;
        Ok(Self { images, below: chain.into_map(), bitmaps: RefCell::default() })
    }

    /// The next window, its bitmaps read.
    ///
    /// # Errors
    /// A bitmap cannot be read.
    pub fn next(&self, merge: &mut Merge) -> sm::Result<Option<Window>> {
        self.bitmaps.borrow_mut().retain(|(_, block), _| *block >= merge.position());
        loop {
            match merge.next(self) {
                Next::Done => return Ok(None),
                Next::Window(window) => return Ok(Some(window)),
                Next::NeedBitmap { source, block } => self.read_bitmaps(source, block)?,
            }
        }
    }

    /// Reads the bitmap of a block, and those of blocks behind it that will be
    /// asked for next.
    fn read_bitmaps(&self, source: usize, block: BlockNo) -> sm::Result<()> {
        let Some(image) = self.images.get(source) else {
            self.bitmaps.borrow_mut().insert((source, block), SectorBitmap::EMPTY);
            return Ok(());
        };
        // Of a block that a newer image has whole nothing else is asked.
        let whole_above = |block| {
            (0..source).any(|newer| matches!(Tables::presence(self, newer, block), Presence::Whole(_)))
        };
        let slot = |at| match image.presence(at) {
            Presence::Partial(slot) if at == block || !whole_above(at) => Some((at, slot)),
            Presence::Partial(_) | Presence::Whole(_) | Presence::Absent => None,
        };
        let coming: Vec<(BlockNo, Slot)> =
            (block.0..self.blocks()).map(BlockNo).filter_map(slot).take(limits::BITMAPS_AHEAD).collect();
        for (_, slot) in &coming {
            // And the beginning of the data: next to it, and looked at soon.
            image.volume.will_read(slot.bitmap_offset(), SECTOR_BYTES + 1);
        }
        for (block, _) in coming {
            self.bitmaps.borrow_mut().insert((source, block), image.read_bitmap(block)?);
        }
        Ok(())
    }

    /// The volume of a source.
    #[must_use]
    pub fn volume(&self, source: usize) -> Option<&dyn Volume> {
        self.images.get(source).map(|image| image.volume.as_ref())
    }

    /// The volume of a source, and where a sector of a block lies in it.
    #[must_use]
    pub fn place(&self, source: usize, block: BlockNo, sector: u32) -> Option<(&dyn Volume, u64)> {
        let image = self.images.get(source)?;
        match image.presence(block) {
            Presence::Absent => None,
            Presence::Whole(slot) | Presence::Partial(slot) => {
                Some((image.volume.as_ref(), slot.data_offset(sector)))
            }
        }
    }

    /// Whether anything below the parent has some of the block.
    #[must_use]
    pub fn under_parent(&self, block: BlockNo) -> bool {
        self.below.places(block).any(|place| self.below.levels_above(place.node) > 0)
    }

    /// Blocks were durably cleared from a source.
    pub fn cleared(&mut self, source: usize, blocks: &[BlockNo]) {
        let Some(image) = self.images.get_mut(source) else {
            return;
        };
        for block in blocks {
            if let Some(entry) = image.bat.get_mut(block.index()) {
                *entry = BAT_FREE;
            }
        }
    }

    /// Bytes of all blocks the sources have.
    #[must_use]
    pub fn allocated_bytes(&self) -> u64 {
        let blocks = self.images.iter().flat_map(|image| &image.bat).filter(|e| **e != BAT_FREE);
        blocks.count() as u64 * BLOCK_BYTES
    }
}

impl Tables for Sources {
    fn sources(&self) -> usize {
        self.images.len()
    }

    fn blocks(&self) -> u32 {
        let longest = self.images.iter().map(|image| image.bat.len()).max().unwrap_or(0);
        u32::try_from(longest).unwrap_or(u32::MAX)
    }

    fn presence(&self, source: usize, block: BlockNo) -> Presence {
        self.images.get(source).map_or(Presence::Absent, |image| image.presence(block))
    }

    fn bitmap(&self, source: usize, block: BlockNo) -> Option<SectorBitmap> {
        self.bitmaps.borrow().get(&(source, block)).cloned()
    }

    fn below(&self, block: BlockNo) -> bool {
        self.below.has(block)
    }

    fn in_parent(&self, block: BlockNo) -> bool {
        self.below.places(block).next().is_some_and(|place| self.below.levels_above(place.node) == 0)
    }
}
