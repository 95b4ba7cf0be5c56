//! Attached SRs, as every process of the host finds them:
//! `<run>/sr/<uuid>.json`, written by smd, read by gcd.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use uuid::Uuid;
use vhd::storage::{FileVolumes, PosixFs};

use crate::catalog::SqliteLabels;
use crate::error::{Error, IoContext, Result};
use crate::heads::Heads;
use crate::ids::SystemIds;
use crate::limits::Limits;
use crate::owner::{HostId, Owner};
use crate::repo::Repo;
use crate::run_folder::RunFolder;
use crate::spawn::TapProgram;
use crate::state::{self, SrType};
use crate::verified::Verified;

/// An SR that this host uses in this boot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttachedSr {
    /// Its uuid.
    pub uuid: Uuid,
    /// Its name.
    pub name: String,
    /// What it is.
    #[serde(rename = "type")]
    pub kind: SrType,
    /// Where it lies.
    pub path: PathBuf,
    /// Its attach epoch.
    pub epoch: u64,
    /// Who we are to it.
    #[serde(flatten)]
    pub id: HostId,
}

/// An SR in use. The repo holds the SR's owner lock, with all its clones.
#[derive(Debug, Clone)]
pub struct OpenSr {
    /// For operations.
    pub repo: Repo,
    /// Its catalog, with what only file SRs have.
    pub labels: Arc<SqliteLabels>,
}

impl AttachedSr {
    /// Where the record of an SR is.
    #[must_use]
    pub fn file(run: &Path, sr: Uuid) -> PathBuf {
        run.join("sr").join(format!("{sr}.json"))
    }

    /// All attached SRs of a run folder, sorted by uuid.
    ///
    /// # Errors
    /// I/O errors, and a file that is not ours.
    pub fn list(run: &Path) -> io::Result<Vec<Self>> {
        let mut found = Vec::new();
        let entries = match std::fs::read_dir(run.join("sr")) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(found),
            entries => entries?,
        };
        for entry in entries {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "json") {
                found.extend(state::read_json::<Self>(&path)?);
            }
        }
        found.sort_by_key(|sr| sr.uuid);
        Ok(found)
    }

    /// Opens an SR that smd has attached, from another process of the host.
    ///
    /// # Errors
    /// [`Error::SrInUse`] if it was detached or taken meanwhile, I/O errors.
    pub fn open(&self, run: &Path) -> Result<OpenSr> {
        let owner = Owner::join(&self.path, self.id, self.epoch)?;
        self.open_owned(run, owner, None)
    }

    /// Opens an SR whose use `owner` proves.
    ///
    /// # Errors
    /// The run folder or the catalog cannot be opened.
    pub fn open_owned(&self, run: &Path, owner: Owner, program: Option<TapProgram>) -> Result<OpenSr> {
        if owner.epoch != self.epoch {
            return Err(Error::SrInUse { holder: "another attach of this host".into() });
        }
        let host = RunFolder::open(run, self.uuid, &self.path, self.id, Arc::new(owner), program)
            .during(|| format!("run folder {}", run.display()))?;
        let dot = self.path.join(".coppice");
        let labels = Arc::new(SqliteLabels::open(&dot)?);
        let repo = Repo {
            uuid: self.uuid,
            name: self.name.clone(),
            volumes: Arc::new(FileVolumes::new(Arc::new(PosixFs::new(self.path.clone())))),
            host: Arc::new(host),
            labels: labels.clone(),
            heads: Arc::new(Heads::with(Verified::open(&dot)?)),
            ids: Arc::new(SystemIds),
            limits: Limits::default(),
        };
        Ok(OpenSr { repo, labels })
    }
}
