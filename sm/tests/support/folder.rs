//! An SR over a folder on disk.

use std::sync::Arc;

use sm::Repo;
use vhd::storage::{FileVolumes, PosixFs};

use super::{FakeHost, repo};

/// The SR and its host; the folder goes with it.
pub struct Sr {
    pub repo: Repo,
    pub host: FakeHost,
    _folder: tempfile::TempDir,
}

/// A new one.
pub fn sr() -> Sr {
    let folder = tempfile::tempdir().unwrap();
    let open = || Arc::new(FileVolumes::new(Arc::new(PosixFs::new(folder.path().to_owned()))));
    let host = FakeHost::new(open());
    Sr { repo: repo(open(), &host, 1), host, _folder: folder }
}
