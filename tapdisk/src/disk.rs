//! Opening: from names of volumes to what the engine works on.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use rustc_hash::FxHashMap;
use vhd::chain::{Chain, Node, Storage};
use vhd::meta::Meta;
use vhd::record::RecordStore;
use vhd::storage::{Access, Volume, VolumeName, Volumes};
use vhd::writer::{Settled, open_rw, settle_files};

use crate::engine::{Engine, FileId, Image, Known, Lower, SettlePlan};
use crate::limits::RELEARN_TIME_MAX;

/// Guest requests are whole sectors, in bytes: a file that is written goes
/// past the page cache only if every one of them can.
const WRITE_UNIT_MAX: u32 = 512;
/// In files only read, what does not fit the unit goes through the cache.
const READ_UNIT_MAX: u32 = 4096;

/// The open volumes, by the names the engine uses for them.
#[derive(Debug, Default)]
pub struct Files {
    inner: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    next: u32,
    open: FxHashMap<FileId, OpenFile>,
}

/// An open volume, and how drivers may use its descriptor.
#[derive(Debug, Clone)]
pub struct OpenFile {
    /// The volume.
    pub volume: Arc<dyn Volume>,
    /// What transfers by its descriptor must be multiples of, in bytes: 1
    /// through the page cache, more past it ([`Volume::go_direct`]).
    pub unit: u32,
    /// Whether its description carries the lock of a writer.
    pub locked: bool,
}

impl Files {
    /// Takes in a volume open for writing, to be used through the page cache.
    pub fn add(&self, volume: Arc<dyn Volume>) -> FileId {
        self.insert(OpenFile { volume, unit: 1, locked: true })
    }

    /// Takes in a volume open for writing, whose guest data goes past the page
    /// cache if it can.
    ///
    /// # Errors
    /// What the system says to a descriptor more.
    pub fn add_direct(&self, volume: Arc<dyn Volume>) -> std::io::Result<FileId> {
        let unit = volume.go_direct(WRITE_UNIT_MAX)?.unwrap_or(1);
        Ok(self.insert(OpenFile { volume, unit, locked: true }))
    }

    /// The same of a volume that is only read.
    ///
    /// # Errors
    /// As [`Self::add_direct`].
    pub fn add_read_only(&self, volume: Arc<dyn Volume>) -> std::io::Result<FileId> {
        let unit = volume.go_direct(READ_UNIT_MAX)?.unwrap_or(1);
        Ok(self.insert(OpenFile { volume, unit, locked: false }))
    }

    fn insert(&self, file: OpenFile) -> FileId {
        let mut table = self.lock();
        let id = FileId(table.next);
        table.next += 1;
        table.open.insert(id, file);
        id
    }

    /// A volume with how to use it; `None` once closed.
    #[must_use]
    pub fn open_file(&self, id: FileId) -> Option<OpenFile> {
        self.lock().open.get(&id).cloned()
    }

    /// A volume; `None` once closed.
    #[must_use]
    pub fn get(&self, id: FileId) -> Option<Arc<dyn Volume>> {
        self.lock().open.get(&id).map(|file| Arc::clone(&file.volume))
    }

    /// Lets go of a volume; its lock ends with its last user.
    pub fn close(&self, id: FileId) {
        self.lock().open.remove(&id);
    }

    /// Lets go of every volume.
    pub fn close_all(&self) {
        self.lock().open.clear();
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Table> {
        // Every method leaves the table whole, so a panic elsewhere does not
        // matter here.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An image open for writing, with its metadata.
#[derive(Debug)]
pub struct OpenImage {
    /// For the engine.
    pub image: Image,
    /// Footer and header as they are on the file.
    pub meta: Meta,
}

/// Opens images of one repository for one data path.
#[derive(Debug, Clone)]
pub struct Opener {
    /// The repository.
    pub volumes: Arc<dyn Volumes>,
    /// The pending records.
    pub records: Arc<dyn RecordStore>,
    /// Where opened volumes go.
    pub files: Arc<Files>,
}

impl Opener {
    /// Opens a chain for serving: its top for writing, or everything for
    /// reading. Returns the engine and, for writing, the leaf's metadata.
    ///
    /// # Errors
    /// What is wrong with an image, naming it.
    pub fn open(&self, top: &VolumeName, read_only: bool) -> vhd::error::Result<(Engine, Option<Meta>)> {
        if read_only {
            let (bytes, lower) = self.whole(top, Vec::new())?;
            return Ok((Engine::new(bytes, None, lower), None));
        }
        let leaf = self.image(top)?;
        let lower = self.below(top, &leaf.meta, Vec::new())?;
        Ok((Engine::new(leaf.meta.virtual_bytes(), Some(leaf.image), lower), Some(leaf.meta)))
    }

    /// A whole chain, and its virtual size in bytes, for reading only;
    /// `known` is what an older generation of it knew.
    ///
    /// # Errors
    /// What is wrong with an image of the chain, naming it.
    pub fn whole(&self, top: &VolumeName, known: Vec<Known>) -> vhd::error::Result<(u64, Lower)> {
        let chain = Chain::open(self.volumes.as_ref(), top)?;
        Ok((chain.virtual_bytes(), self.lower(chain, known)?))
    }

    /// Opens an image for writing: locked, its record replayed and renewed.
    ///
    /// # Errors
    /// What is wrong with the image, naming it.
    pub fn image(&self, name: &VolumeName) -> vhd::error::Result<OpenImage> {
        let open = open_rw(self.volumes.as_ref(), name, self.records.as_ref())?;
        let footer = open.meta.uuid();
        let record = self.records.create(footer).map_err(|e| vhd::error::Error::from(e).of(name))?;
        let mut rw = open.rw;
        // A page in the cache that holds more than the bytes written through
        // it would carry old ones over what went past it. So either no page
        // holds guest data and metadata, and every sector goes past the cache,
        // or everything goes through it.
        let file = if rw.slots().page_aligned() {
            let added = self.files.add_direct(open.volume);
            added.map_err(|e| vhd::error::Error::from(e).of(name))?
        } else {
            self.files.add(open.volume)
        };
        let image = Image::new(file, name.clone(), footer, open.meta.virtual_bytes(), rw, record);
        Ok(OpenImage { image, meta: open.meta })
    }

    /// Everything below an image; `known` as in [`Self::whole`].
    ///
    /// # Errors
    /// What is wrong with an image of the chain, naming it.
    pub fn below(&self, name: &VolumeName, meta: &Meta, known: Vec<Known>) -> vhd::error::Result<Lower> {
        self.lower(Chain::below(self.volumes.as_ref(), name, meta)?, known)
    }

    /// An image whose record stands is unsettled: only its next holder may
    /// open it before that is replayed, so a chain over it is refused.
    fn lower(&self, chain: Chain, known: Vec<Known>) -> vhd::error::Result<Lower> {
        for node in chain.nodes() {
            let left =
                self.records.existing(node.uuid).map_err(|e| vhd::error::Error::from(e).of(&node.name))?;
            if left.is_some_and(|record| !record.is_empty()) {
                let what =
                    "reading an image that is not settled: whoever wrote it last must be recovered first";
                return Err(vhd::error::Error::Unsupported { what }.of(&node.name));
            }
        }
        let add = |node: &Node| {
            let added = self.files.add_read_only(Arc::clone(&node.volume));
            added.map_err(|e| vhd::error::Error::from(e).of(&node.name))
        };
        let files = chain.nodes().rev().map(add).collect::<Result<_, _>>()?;
        if known.is_empty() {
            return Ok(Lower::new(chain.into_map(), files));
        }
        let mut lower = Lower::new(chain.map().clone(), files);
        let deadline = Instant::now() + RELEARN_TIME_MAX;
        lower.learn(known, |block| {
            // A bitmap that cannot be read shows when somebody asks for it.
            (Instant::now() < deadline).then(|| chain.owners(block).ok()).flatten()
        });
        Ok(lower)
    }

    /// Settles an image whose metadata is durable.
    ///
    /// # Errors
    /// What writing said.
    pub fn settle(&self, plan: &SettlePlan, meta: &mut Meta, hidden: Option<bool>) -> vhd::error::Result<()> {
        let volume =
            self.files.get(plan.file).ok_or(vhd::error::Error::Unsupported { what: "a closed file" })?;
        let blocks = meta.layout.as_ref().map_or(0, |layout| layout.entries);
        let settled = Settled::new(blocks, plan.whole.iter().copied(), plan.data_end);
        settle_files(volume.as_ref(), meta, &settled, hidden)
    }

    /// A settled image as a level of the chain, open for reading.
    ///
    /// # Errors
    /// What opening said.
    pub fn as_level(&self, name: &VolumeName, meta: &Meta) -> std::io::Result<(Node, FileId)> {
        let volume = self.volumes.open(name, Access::Read)?;
        let file = self.files.add_read_only(Arc::clone(&volume))?;
        let node = Node {
            name: name.clone(),
            uuid: meta.uuid(),
            virtual_bytes: meta.virtual_bytes(),
            hidden: meta.hidden(),
            storage: Storage::Blocks,
            volume,
        };
        Ok((node, file))
    }
}
