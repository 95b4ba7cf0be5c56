//! Labels: names, descriptions, what is a snapshot of what, and history.
//!
//! The authority for these and nothing else. Losing it loses labels, never
//! data; a scan fills it again from the images. Nothing that decides about
//! data reads it (invariant 8).

mod sqlite;
pub use sqlite::SqliteLabels;

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use uuid::Uuid;

use crate::error::Result;

/// What people call a VDI.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Label {
    /// Its name; not necessarily unique.
    pub name: String,
    /// Free text.
    pub description: String,
    /// The VDI it is a snapshot of; also marks it as a snapshot.
    pub snapshot_of: Option<Uuid>,
    /// Seconds since 1970.
    pub created_s: u64,
    /// Attached for reading only.
    pub read_only: bool,
}

/// One line of history.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// Seconds since 1970.
    pub at_s: u64,
    /// The operation, like `snapshot`.
    pub operation: &'static str,
    /// The VDI it was about.
    pub vdi: Uuid,
    /// What came of it.
    pub detail: String,
}

/// The labels of one SR.
pub trait Labels: Send + Sync + std::fmt::Debug {
    /// All of them.
    ///
    /// # Errors
    /// The catalog cannot be read.
    fn all(&self) -> Result<BTreeMap<Uuid, Label>>;
    /// One of them.
    ///
    /// # Errors
    /// The catalog cannot be read.
    fn get(&self, vdi: Uuid) -> Result<Option<Label>>;
    /// The VDIs of a name.
    ///
    /// # Errors
    /// The catalog cannot be read.
    fn named(&self, name: &str) -> Result<Vec<Uuid>> {
        let all = self.all()?.into_iter();
        Ok(all.filter(|(_, label)| label.name == name).map(|(vdi, _)| vdi).collect())
    }
    /// Sets one, replacing what was there.
    ///
    /// # Errors
    /// The catalog cannot be written.
    fn put(&self, vdi: Uuid, label: &Label) -> Result<()>;
    /// Forgets one; fine if there is none.
    ///
    /// # Errors
    /// The catalog cannot be written.
    fn remove(&self, vdi: Uuid) -> Result<()>;
    /// What names the exact content of a VDI: see [`crate::identity`].
    ///
    /// # Errors
    /// The catalog cannot be read.
    fn content_id(&self, vdi: Uuid) -> Result<Option<Uuid>>;
    /// Sets that, or with `None` forgets it.
    ///
    /// # Errors
    /// The catalog cannot be written.
    fn set_content_id(&self, vdi: Uuid, id: Option<Uuid>) -> Result<()>;
    /// Adds to the history, which drops its oldest lines at a stated length.
    ///
    /// # Errors
    /// The catalog cannot be written.
    fn note(&self, event: &Event) -> Result<()>;
    /// Keeps a document of a job beside the history, under its number in the
    /// job; the oldest jobs' go at a stated number of bytes. A catalog that
    /// keeps no history keeps none of these.
    ///
    /// # Errors
    /// The catalog cannot be written.
    fn keep_paper(&self, _job: &str, _number: u32, _text: &str) -> Result<()> {
        Ok(())
    }
    /// The documents of a job, in the order of their numbers.
    ///
    /// # Errors
    /// The catalog cannot be read.
    fn papers(&self, _job: &str) -> Result<Vec<String>> {
        Ok(Vec::new())
    }
    /// Raises an alarm that stands until a person puts it down; one of the
    /// same name is replaced.
    ///
    /// # Errors
    /// The catalog cannot be written.
    fn raise_alarm(&self, _name: &str, _text: &str) -> Result<()> {
        Ok(())
    }
    /// The alarms that stand: name and text.
    ///
    /// # Errors
    /// The catalog cannot be read.
    fn alarms(&self) -> Result<Vec<(String, String)>> {
        Ok(Vec::new())
    }
    /// Puts an alarm down; fine if there is none.
    ///
    /// # Errors
    /// The catalog cannot be written.
    fn drop_alarm(&self, _name: &str) -> Result<()> {
        Ok(())
    }
}

/// Labels in memory, for simulated SRs.
#[derive(Debug, Default)]
pub struct MemoryLabels {
    labels: Mutex<BTreeMap<Uuid, Label>>,
    content_ids: Mutex<BTreeMap<Uuid, Uuid>>,
}

impl MemoryLabels {
    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<Uuid, Label>> {
        // A map is whole between any two calls, so a poisoned one is usable.
        self.labels.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn content_ids(&self) -> std::sync::MutexGuard<'_, BTreeMap<Uuid, Uuid>> {
        self.content_ids.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Labels for MemoryLabels {
    fn all(&self) -> Result<BTreeMap<Uuid, Label>> {
        Ok(self.lock().clone())
    }

    fn get(&self, vdi: Uuid) -> Result<Option<Label>> {
        Ok(self.lock().get(&vdi).cloned())
    }

    fn put(&self, vdi: Uuid, label: &Label) -> Result<()> {
        self.lock().insert(vdi, label.clone());
        Ok(())
    }

    fn remove(&self, vdi: Uuid) -> Result<()> {
        self.lock().remove(&vdi);
        self.content_ids().remove(&vdi);
        Ok(())
    }

    fn content_id(&self, vdi: Uuid) -> Result<Option<Uuid>> {
        Ok(self.content_ids().get(&vdi).copied())
    }

    fn set_content_id(&self, vdi: Uuid, id: Option<Uuid>) -> Result<()> {
        match id {
            Some(id) => self.content_ids().insert(vdi, id),
            None => self.content_ids().remove(&vdi),
        };
        Ok(())
    }

    fn note(&self, _event: &Event) -> Result<()> {
        Ok(())
    }
}
