//! THE walk: a chain of images, flattened to one block map.
//!
//! ```text
//!            block 0    1    2    3
//! leaf        [ .. ]  part  .... ....        heads[1] = leaf, not whole
//! mid         [ .. ]  part  full ....        tails[1] = [mid, base]
//! base        [full]  full  full ....        heads[2] = mid, whole: base hidden
//! ```
//!
//! A whole block costs one lookup at any depth. A block that is whole nowhere
//! near the top is resolved once, from the bitmaps of just the levels that
//! have it (all known from the map, so they can be read at the same time),
//! into runs of sectors with one owner each.
//!
//! Each level's view is clipped at its own virtual size: what a smaller
//! parent has past its end is not there (it reads as zeros). A raw level has
//! every block, whole.
//!
//! Absent on purpose: caching, async. The data path keeps the map and caches
//! what [`resolve`] says; [`Chain::read_at`] serves tools, checks and copies.

use std::collections::HashMap;
use std::sync::Arc;

use uuid::Uuid;

use crate::bat::{BAT_FREE, read_bat};
use crate::batmap::{is_whole, read_batmap};
use crate::bitmap::SectorBitmap;
use crate::error::{Error, Result};
use crate::footer::DiskType;
use crate::limits::CHAIN_NODES_MAX;
use crate::meta::Meta;
pub use crate::owners::{BlockOwners, Owner, OwnerRun, clip, overlay, resolve};
use crate::storage::{Access, Volume, VolumeName, Volumes};
use crate::units::{BLOCK_BYTES, BLOCK_SECTORS, BlockNo, SECTOR_BYTES, Slot};

/// How a level stores its blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Storage {
    /// Blocks with bitmaps, found by the BAT.
    Blocks,
    /// Sectors of the virtual disk one after another from byte 0.
    Flat,
}

/// One level of a chain.
#[derive(Debug, Clone)]
pub struct Node {
    /// Its volume.
    pub name: VolumeName,
    /// Footer uuid; nil for a raw image.
    pub uuid: Uuid,
    /// Virtual size in bytes: the level's view ends there.
    pub virtual_bytes: u64,
    /// Whether its hidden flag is set.
    pub hidden: bool,
    /// How blocks are stored.
    pub storage: Storage,
    /// Open for reading.
    pub volume: Arc<dyn Volume>,
}

impl Node {
    /// Byte offset in the volume of a sector of a block this node has.
    #[must_use]
    pub fn data_offset(&self, block: BlockNo, slot: Slot, sector_in_block: u32) -> u64 {
        match self.storage {
            Storage::Blocks => slot.data_offset(sector_in_block),
            Storage::Flat => block.first_byte() + u64::from(sector_in_block) * SECTOR_BYTES,
        }
    }

    /// Sectors of a block that lie inside the node's virtual size.
    #[must_use]
    pub fn visible_sectors(&self, block: BlockNo) -> u32 {
        let left = self.virtual_bytes.saturating_sub(block.first_byte()).div_ceil(SECTOR_BYTES);
        u32::try_from(left).unwrap_or(u32::MAX).min(BLOCK_SECTORS)
    }
}

/// Where one level has a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// The level, counted from the bottom: 0 is the root. So a level put on
    /// top changes no number.
    pub node: u8,
    /// Whether every sector of the block is present and visible there.
    pub whole: bool,
    /// Where (meaningless for a flat level).
    pub slot: Slot,
}

/// The flattened map of the levels of a chain.
#[derive(Debug, Clone, Default)]
pub struct ChainMap {
    /// The root first.
    nodes: Vec<Node>,
    /// Topmost place of each block.
    heads: Vec<Option<Place>>,
    /// Further places, down to the first whole one, where the topmost is not.
    tails: HashMap<BlockNo, Box<[Place]>>,
}

impl ChainMap {
    /// The levels, topmost first.
    pub fn nodes(&self) -> Nodes<'_> {
        self.nodes.iter().rev()
    }

    /// A level, by the number that [`Place`] and [`Owner`] give.
    #[must_use]
    pub fn node(&self, node: u8) -> Option<&Node> {
        self.nodes.get(usize::from(node))
    }

    /// Levels on top of one, by its number: 0 for the topmost.
    #[must_use]
    pub fn levels_above(&self, node: u8) -> usize {
        self.nodes.len().saturating_sub(usize::from(node) + 1)
    }

    /// Places of a block, topmost first, down to the first whole one.
    pub fn places(&self, block: BlockNo) -> impl Iterator<Item = Place> + '_ {
        let head = self.heads.get(block.index()).copied().flatten();
        let tail = self.tails.get(&block).map_or(&[][..], |tail| tail);
        head.into_iter().chain(tail.iter().copied())
    }

    /// Whether any level has the block.
    #[must_use]
    pub fn has(&self, block: BlockNo) -> bool {
        self.heads.get(block.index()).is_some_and(Option::is_some)
    }

    /// Puts one more level on top, which has `blocks`: where each lies, and
    /// whether it is whole there. Costs nothing for all others.
    pub fn push_top(&mut self, node: Node, blocks: impl IntoIterator<Item = (BlockNo, Slot, bool)>) {
        // Chains are refused long before they have so many levels.
        let number = u8::try_from(self.nodes.len()).unwrap_or(u8::MAX);
        let own = usize::try_from(node.virtual_bytes.div_ceil(BLOCK_BYTES)).unwrap_or(usize::MAX);
        if own > self.heads.len() {
            self.heads.reserve_exact(own - self.heads.len());
            self.heads.resize(own, None);
        }
        for (block, slot, whole) in blocks {
            let visible = node.visible_sectors(block);
            let Some(head) = self.heads.get_mut(block.index()).filter(|_| visible > 0) else { continue };
            let place = Place { node: number, whole: whole && visible == BLOCK_SECTORS, slot };
            let below = head.replace(place);
            let tail = self.tails.remove(&block).unwrap_or_default();
            if let Some(below) = below.filter(|_| !place.whole) {
                self.tails.insert(block, std::iter::once(below).chain(tail).collect());
            }
        }
        self.nodes.push(node);
    }
}

/// Levels, topmost first.
pub type Nodes<'a> = std::iter::Rev<std::slice::Iter<'a, Node>>;

/// A chain open for reading.
#[derive(Debug, Clone, Default)]
pub struct Chain {
    map: ChainMap,
}

/// What opening the levels from one volume down found.
struct Level {
    node: Node,
    bat: Vec<u32>,
    whole: Option<Vec<u8>>,
}

impl Chain {
    /// Opens a volume and every level below it. Each parent is looked for
    /// only among the volumes of the same repository (invariant 10), and must
    /// carry the footer uuid its child names; a volume that comes twice is a
    /// cycle.
    ///
    /// # Errors
    /// Whatever is wrong with an image of the chain, naming the image.
    pub fn open(volumes: &dyn Volumes, top: &VolumeName) -> Result<Self> {
        Self::walk(volumes, None, Some((top.clone(), open_meta(volumes, top)?)))
    }

    /// Opens everything below an image that is open already, as `meta` says.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn below(volumes: &dyn Volumes, child: &VolumeName, meta: &Meta) -> Result<Self> {
        let parent = parent_of(volumes, meta).map_err(|e| e.of(child))?;
        Self::walk(volumes, Some(child), parent)
    }

    fn walk(
        volumes: &dyn Volumes,
        child: Option<&VolumeName>,
        top: Option<(VolumeName, Opened)>,
    ) -> Result<Self> {
        let mut levels: Vec<Level> = Vec::new();
        let mut next = top;
        while let Some((name, (volume, meta))) = next {
            if child == Some(&name) || levels.iter().any(|level| level.node.name == name) {
                return Err(Error::Cycle.of(&name));
            }
            if levels.len() >= CHAIN_NODES_MAX {
                return Err(Error::Unsupported { what: "a chain this deep" }.of(&name));
            }
            next = match &meta {
                Some(meta) => parent_of(volumes, meta).map_err(|e| e.of(&name))?,
                None => None,
            };
            levels.push(open_level(name.clone(), volume, meta.as_ref()).map_err(|e| e.of(&name))?);
        }
        let mut map = ChainMap::default();
        for level in levels.into_iter().rev() {
            let (bat, whole) = (level.bat, level.whole);
            if level.node.storage == Storage::Flat {
                let count = level.node.virtual_bytes.div_ceil(BLOCK_BYTES);
                let all = (0..u32::try_from(count).unwrap_or(u32::MAX)).map(|n| (BlockNo(n), Slot(0), true));
                map.push_top(level.node, all);
            } else {
                let entries = (0..).map(BlockNo).zip(bat).filter(|(_, entry)| *entry != BAT_FREE);
                let place =
                    |(block, slot): (BlockNo, u32)| (block, Slot(slot), is_whole(whole.as_deref(), block.0));
                map.push_top(level.node, entries.map(place));
            }
        }
        Ok(Self { map })
    }

    /// The levels, topmost first.
    pub fn nodes(&self) -> Nodes<'_> {
        self.map.nodes()
    }

    /// The flattened map.
    #[must_use]
    pub fn map(&self) -> &ChainMap {
        &self.map
    }

    /// Gives the map away.
    #[must_use]
    pub fn into_map(self) -> ChainMap {
        self.map
    }

    /// Virtual size of the top level in bytes.
    #[must_use]
    pub fn virtual_bytes(&self) -> u64 {
        self.nodes().next().map_or(0, |node| node.virtual_bytes)
    }

    /// Who owns which run of a block.
    ///
    /// # Errors
    /// A bitmap that could not be read.
    pub fn owners(&self, block: BlockNo) -> Result<Vec<OwnerRun>> {
        let mut places = Vec::new();
        for place in self.map.places(block) {
            let bitmap = if place.whole { SectorBitmap::FULL } else { self.bitmap(block, place)? };
            places.push((place, bitmap));
        }
        Ok(resolve(&places))
    }

    /// The sectors a level has of a block, clipped at its virtual size.
    ///
    /// # Errors
    /// The bitmap could not be read.
    pub fn bitmap(&self, block: BlockNo, place: Place) -> Result<SectorBitmap> {
        let Some(node) = self.map.node(place.node) else {
            return Ok(SectorBitmap::EMPTY);
        };
        let mut bitmap = match node.storage {
            Storage::Flat => SectorBitmap::FULL,
            Storage::Blocks if place.whole => SectorBitmap::FULL,
            Storage::Blocks => {
                let mut bytes = [0; 512];
                node.volume
                    .read_at(&mut bytes, place.slot.bitmap_offset())
                    .map_err(|e| Error::from(e).of(&node.name))?;
                SectorBitmap::from_bytes(&bytes)
            }
        };
        clip(&mut bitmap, node.visible_sectors(block));
        Ok(bitmap)
    }

    /// Reads bytes of the virtual disk; both ends must be whole sectors. Past
    /// the end of the disk it reads zeros.
    ///
    /// # Errors
    /// What reading an image said.
    pub fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        debug_assert!(offset.is_multiple_of(SECTOR_BYTES) && (buf.len() as u64).is_multiple_of(SECTOR_BYTES));
        let mut rest = buf;
        let mut at = offset;
        while !rest.is_empty() {
            let in_block = (BLOCK_BYTES - at % BLOCK_BYTES).min(rest.len() as u64);
            let (part, more) =
                rest.split_at_mut(usize::try_from(in_block).unwrap_or(usize::MAX).min(rest.len()));
            self.read_in_block(part, at)?;
            at += in_block;
            rest = more;
        }
        Ok(())
    }

    fn read_in_block(&self, part: &mut [u8], at: u64) -> Result<()> {
        let block = BlockNo::of_byte(at);
        let first = u32::try_from(at % BLOCK_BYTES / SECTOR_BYTES).unwrap_or(0);
        let end = first + u32::try_from(part.len() as u64 / SECTOR_BYTES).unwrap_or(0);
        for OwnerRun { run, owner } in self.owners(block)? {
            let (from, to) = (run.first.max(first), run.end().min(end));
            if from >= to {
                continue;
            }
            let bytes = |sector: u32| (u64::from(sector - first) * SECTOR_BYTES) as usize;
            let Some(target) = part.get_mut(bytes(from)..bytes(to)) else { continue };
            match owner {
                Owner::Zero => target.fill(0),
                Owner::Node { node, slot } => {
                    let Some(node) = self.map.node(node) else { continue };
                    node.volume
                        .read_at(target, node.data_offset(block, slot, from))
                        .map_err(|e| Error::from(e).of(&node.name))?;
                }
            }
        }
        Ok(())
    }
}

type Opened = (Arc<dyn Volume>, Option<Meta>);

fn open_meta(volumes: &dyn Volumes, name: &VolumeName) -> Result<Opened> {
    let volume = volumes.open(name, Access::Read).map_err(|e| Error::from(e).of(name))?;
    if name.is_raw() {
        return Ok((volume, None));
    }
    let meta = Meta::read(volume.as_ref()).map_err(|e| e.of(name))?;
    Ok((volume, Some(meta)))
}

/// Finds the parent: the first of the locators' names whose image carries the
/// uuid the header names. So every crash state of a reparenting resolves.
fn parent_of(volumes: &dyn Volumes, meta: &Meta) -> Result<Option<(VolumeName, Opened)>> {
    let Some(parent) = &meta.parent else { return Ok(None) };
    let mut failure = Error::ParentMissing { name: parent.name.clone() };
    for name in parent.candidates()? {
        if name.is_raw() != parent.uuid.is_nil() {
            continue;
        }
        match open_meta(volumes, &name) {
            Ok((volume, found)) => {
                if found.as_ref().is_none_or(|found| found.uuid() == parent.uuid) {
                    return Ok(Some((name, (volume, found))));
                }
                failure = Error::ParentMismatch { name: name.to_string() };
            }
            Err(error) if error.is_not_found() => {}
            Err(error) => failure = error,
        }
    }
    Err(failure)
}

fn open_level(name: VolumeName, volume: Arc<dyn Volume>, meta: Option<&Meta>) -> Result<Level> {
    let node = |uuid, virtual_bytes, hidden, storage, volume| Node {
        name,
        uuid,
        virtual_bytes,
        hidden,
        storage,
        volume,
    };
    let Some(meta) = meta else {
        let len = volume.len()?;
        return Ok(Level {
            node: node(Uuid::nil(), len, false, Storage::Flat, volume),
            bat: Vec::new(),
            whole: None,
        });
    };
    let (uuid, size, hidden) = (meta.uuid(), meta.virtual_bytes(), meta.hidden());
    if meta.disk_type() == DiskType::Fixed {
        return Ok(Level {
            node: node(uuid, size, hidden, Storage::Flat, volume),
            bat: Vec::new(),
            whole: None,
        });
    }
    let layout = meta.layout.as_ref().ok_or(Error::BadHeader { reason: "no header" })?;
    if layout.block_sectors != BLOCK_SECTORS {
        return Err(Error::Unsupported { what: "a block size other than 2 MiB in a chain" });
    }
    let bat = read_bat(volume.as_ref(), layout)?;
    let whole = read_batmap(volume.as_ref(), meta);
    Ok(Level { node: node(uuid, size, hidden, Storage::Blocks, volume), bat, whole })
}
