//! An SR that is only looked at: no lock, no owner, nothing is written.
//!
//! What it shows may be half of what another host is doing right now; it is
//! for telling an operator what is there, and nothing acts on it.

use std::io;
use std::path::Path;
use std::sync::Arc;

use tapdisk_control::ImageRef;
use uuid::Uuid;
use vhd::record::RecordStore;
use vhd::storage::{FileVolumes, PosixFs};

use crate::catalog::MemoryLabels;
use crate::host::{Endpoint, Guard, Host, LeaseHold, Tap};
use crate::ids::SystemIds;
use crate::lease::Lease;
use crate::limits::Limits;
use crate::repo::Repo;

/// A repo for looking at the SR in `folder`: scans work, operations are
/// refused.
#[must_use]
pub fn look(folder: &Path, sr: Uuid, name: &str) -> Repo {
    Repo {
        uuid: sr,
        name: name.to_owned(),
        volumes: Arc::new(FileVolumes::new(Arc::new(PosixFs::new(folder.to_owned())))),
        host: Arc::new(Nobody(NoRecords)),
        labels: Arc::new(MemoryLabels::default()),
        heads: Arc::default(),
        ids: Arc::new(SystemIds),
        limits: Limits::default(),
    }
}

/// A host that has nothing to do with the SR.
#[derive(Debug)]
struct Nobody(NoRecords);

fn refused<T>() -> io::Result<T> {
    Err(io::Error::new(io::ErrorKind::Unsupported, "the repository is not attached"))
}

impl Host for Nobody {
    fn lock_sr(&self) -> io::Result<Guard> {
        refused()
    }

    fn hold_intent(&self, _id: Uuid) -> io::Result<Option<Guard>> {
        refused()
    }

    fn leases(&self) -> io::Result<Vec<Lease>> {
        Ok(Vec::new())
    }

    fn make_lease(&self, _lease: &Lease) -> io::Result<Box<dyn LeaseHold>> {
        refused()
    }

    fn make_reader(&self, _lease: &Lease) -> io::Result<Guard> {
        refused()
    }

    fn update_lease(&self, _vdi: Uuid, _chain: &[ImageRef]) -> io::Result<()> {
        refused()
    }

    fn tap(&self, _vdi: Uuid) -> io::Result<Option<Box<dyn Tap>>> {
        Ok(None)
    }

    fn endpoint(&self, lease: &Lease) -> Endpoint {
        Endpoint {
            socket: Path::new("").to_owned(),
            export: lease.vdi.to_string(),
            pid: lease.pid,
            listen: None,
        }
    }

    fn wait_gone(&self, _vdi: Uuid) -> io::Result<bool> {
        refused()
    }

    fn records(&self) -> &dyn RecordStore {
        &self.0
    }
}

#[derive(Debug)]
struct NoRecords;

impl RecordStore for NoRecords {
    fn existing(&self, _footer: Uuid) -> io::Result<Option<vhd::record::PendingRecord>> {
        Ok(None)
    }

    fn create(&self, _footer: Uuid) -> io::Result<vhd::record::PendingRecord> {
        refused()
    }

    fn remove(&self, _footer: Uuid) -> io::Result<()> {
        refused()
    }
}
