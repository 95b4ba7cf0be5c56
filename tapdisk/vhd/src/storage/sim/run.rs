//! The run folder: memory that outlives a process and not the power.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::Arc;

use super::disk::SimDisk;
use super::log::Event;
use super::sector::{hash_bytes, mix};

/// What happened in the run folder; each is indivisible.
#[derive(Debug, Clone)]
pub(super) enum RunEvent {
    Create {
        name: Arc<str>,
        id: u64,
        words: usize,
    },
    Store {
        id: u64,
        index: usize,
        value: u64,
    },
    Remove {
        name: Arc<str>,
    },
    /// A small file, replaced whole.
    File {
        name: Arc<str>,
        bytes: Arc<[u8]>,
    },
}

/// Words in a page, the unit of copy-on-write.
const PAGE: usize = 512;

/// A buffer: half a MiB costs little to copy and nothing to hash.
#[derive(Clone)]
struct Words {
    len: usize,
    /// `None` reads as zeros.
    pages: Vec<Option<Arc<[u64; PAGE]>>>,
    /// The sum of what each word that is not 0 adds.
    hash: u128,
}

impl Words {
    fn new(len: usize) -> Self {
        let pages = vec![None; len.div_ceil(PAGE)];
        Self { len, pages, hash: 0 }
    }

    fn load(&self, index: usize) -> u64 {
        let page = self.pages.get(index / PAGE).and_then(Option::as_ref);
        page.map_or(0, |page| page[index % PAGE])
    }

    fn store(&mut self, index: usize, value: u64) {
        if index >= self.len {
            return;
        }
        let share = |value: u64| match value {
            0 => 0,
            value => mix(index as u128 + 1, value.into()),
        };
        let delta = share(value).wrapping_sub(share(self.load(index)));
        self.hash = self.hash.wrapping_add(delta);
        let page = self.pages[index / PAGE].get_or_insert_with(|| Arc::new([0; PAGE]));
        Arc::make_mut(page)[index % PAGE] = value;
    }
}

#[derive(Clone, Default)]
pub(super) struct RunState {
    buffers: BTreeMap<Arc<str>, u64>,
    /// By id: a removed buffer stays usable for who has it mapped.
    words: BTreeMap<u64, Words>,
    files: BTreeMap<Arc<str>, Arc<[u8]>>,
    next_id: u64,
}

impl RunState {
    pub(super) fn apply(&mut self, event: &RunEvent) {
        match event {
            RunEvent::Create { name, id, words } => {
                self.buffers.insert(name.clone(), *id);
                self.words.insert(*id, Words::new(*words));
                self.next_id = self.next_id.max(id + 1);
            }
            RunEvent::Store { id, index, value } => {
                if let Some(words) = self.words.get_mut(id) {
                    words.store(*index, *value);
                }
            }
            RunEvent::Remove { name } => {
                self.buffers.remove(name);
                self.files.remove(name);
            }
            RunEvent::File { name, bytes } => {
                self.files.insert(name.clone(), bytes.clone());
            }
        }
    }

    /// All processes died: nobody has a removed buffer mapped any more.
    pub(super) fn unmap(&mut self) {
        let named: BTreeSet<u64> = self.buffers.values().copied().collect();
        self.words.retain(|id, _| named.contains(id));
    }

    /// What a new process can find.
    pub(super) fn hash(&self) -> u128 {
        let mut hash = 0;
        for (name, id) in &self.buffers {
            hash = mix(hash, hash_bytes(name.as_bytes()));
            if let Some(words) = self.words.get(id) {
                hash = mix(mix(hash, words.hash), words.len as u128);
            }
        }
        for (name, bytes) in &self.files {
            hash = mix(hash, hash_bytes(name.as_bytes()));
            hash = mix(hash, hash_bytes(bytes));
        }
        hash
    }
}

/// The run folder of the simulated machine. It survives
/// [`CrashKind::Kill`](super::CrashKind::Kill) with exactly the stores made
/// before it, and is empty after a power cut.
#[derive(Debug, Clone)]
pub struct SimRun {
    disk: SimDisk,
}

impl SimRun {
    pub(super) fn new(disk: SimDisk) -> Self {
        Self { disk }
    }

    /// Opens the buffer of this name, or makes one of `len_bytes` zeros
    /// (rounded up to 8). An existing one keeps its own length.
    pub fn buffer(&self, name: &str, len_bytes: usize) -> io::Result<SimBuffer> {
        self.disk.with(|live| {
            if let Some(id) = live.state.run.buffers.get(name) {
                return Ok(SimBuffer { disk: self.disk.clone(), id: *id });
            }
            live.step(self.disk.process)?;
            let id = live.state.run.next_id;
            let words = len_bytes.div_ceil(8);
            live.push(Event::Run(RunEvent::Create { name: name.into(), id, words }));
            Ok(SimBuffer { disk: self.disk.clone(), id })
        })
    }

    /// The buffer of this name, if there is one.
    #[must_use]
    pub fn existing(&self, name: &str) -> Option<SimBuffer> {
        let id = self.disk.with(|live| live.state.run.buffers.get(name).copied())?;
        Some(SimBuffer { disk: self.disk.clone(), id })
    }

    /// Whether there is a buffer or file of this name.
    #[must_use]
    pub fn exists(&self, name: &str) -> bool {
        let found = |run: &RunState| run.buffers.contains_key(name) || run.files.contains_key(name);
        self.disk.with(|live| found(&live.state.run))
    }

    /// Removes a buffer or file; fine if it is gone. Whoever has the buffer
    /// open goes on using it unseen.
    pub fn remove(&self, name: &str) -> io::Result<()> {
        self.disk.with(|live| {
            live.step(self.disk.process)?;
            live.push(Event::Run(RunEvent::Remove { name: name.into() }));
            Ok(())
        })
    }

    /// Writes a small file, whole.
    pub fn write_file(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        self.disk.with(|live| {
            live.step(self.disk.process)?;
            let (name, bytes) = (name.into(), bytes.into());
            live.push(Event::Run(RunEvent::File { name, bytes }));
            Ok(())
        })
    }

    /// The bytes of a small file.
    #[must_use]
    pub fn read_file(&self, name: &str) -> Option<Vec<u8>> {
        self.disk.with(|live| live.state.run.files.get(name).map(|bytes| bytes.to_vec()))
    }

    /// Names of all buffers and files, sorted.
    #[must_use]
    pub fn list(&self) -> Vec<String> {
        self.disk.with(|live| {
            let run = &live.state.run;
            let mut names: Vec<String> =
                run.buffers.keys().chain(run.files.keys()).map(ToString::to_string).collect();
            names.sort_unstable();
            names
        })
    }
}

/// A mapped buffer of the run folder, used in aligned 8-byte words.
#[derive(Debug, Clone)]
pub struct SimBuffer {
    disk: SimDisk,
    id: u64,
}

impl SimBuffer {
    /// Words of 8 bytes.
    #[must_use]
    pub fn words(&self) -> usize {
        self.disk.with(|live| live.state.run.words.get(&self.id).map_or(0, |words| words.len))
    }

    /// Stores a word: an instant of its own in the log. Ignored past the end,
    /// and from a process that was killed.
    pub fn store(&self, index: usize, value: u64) {
        self.disk.with(|live| {
            if live.step(self.disk.process).is_ok() {
                let id = self.id;
                live.push(Event::Run(RunEvent::Store { id, index, value }));
            }
        });
    }

    /// Loads a word; 0 past the end.
    #[must_use]
    pub fn load(&self, index: usize) -> u64 {
        self.disk.with(|live| {
            let words = live.state.run.words.get(&self.id);
            words.map_or(0, |words| words.load(index))
        })
    }
}
