//! The open volumes, by the numbers the engine knows them by.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vhd::storage::Volume;

use crate::engine::FileId;

/// Open volumes. Numbers are never used twice, so a late operation cannot
/// reach another file.
#[derive(Debug, Default)]
pub struct FileTable {
    next: AtomicU32,
    open: Mutex<HashMap<FileId, Arc<dyn Volume>>>,
}

impl FileTable {
    /// Adds a volume.
    pub fn insert(&self, volume: Arc<dyn Volume>) -> FileId {
        let id = FileId(self.next.fetch_add(1, Ordering::Relaxed));
        self.lock().insert(id, volume);
        id
    }

    /// The volume of that number.
    #[must_use]
    pub fn get(&self, id: FileId) -> Option<Arc<dyn Volume>> {
        self.lock().get(&id).cloned()
    }

    /// Forgets a volume; it is closed, and its lock gone, when the last
    /// operation on it ended.
    pub fn close(&self, id: FileId) {
        self.lock().remove(&id);
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<FileId, Arc<dyn Volume>>> {
        // Nothing panics in between, so a poisoned table is sound.
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
