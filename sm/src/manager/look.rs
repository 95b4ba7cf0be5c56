//! Looking at SRs without changing anything: probe and check.

use std::path::Path;

use uuid::Uuid;
use vhd::storage::PosixFs;

use super::sr::check_kind;
use super::{Manager, find};
use crate::check::{self, CheckReport};
use crate::error::{Error, Result};
use crate::offline;
use crate::probe::{self, Probe};
use crate::state::SrType;

impl Manager {
    /// What lies at a path.
    ///
    /// # Errors
    /// [`Error::BadRequest`] for a path that is not absolute or no folder,
    /// I/O errors.
    pub fn probe_sr(&self, kind: SrType, path: Option<&Path>) -> Result<Probe> {
        check_kind(kind)?;
        let Some(path) = path.filter(|path| path.is_absolute()) else {
            return Err(Error::BadRequest { reason: "an SR has an absolute path".into() });
        };
        probe::probe(path, self.id)
    }

    /// Reads all metadata of an SR, attached or not.
    ///
    /// # Errors
    /// [`Error::NotFound`]; the SR or its journal cannot be read.
    pub fn check_sr(&self, sr: Uuid) -> Result<CheckReport> {
        let (known, open) = {
            let entries = self.entries();
            let entry = find(&entries, sr)?;
            (entry.known.clone(), entry.open.clone())
        };
        let fs = PosixFs::new(known.path.clone());
        match open {
            Some(open) => check::check(&open.repo, &fs),
            None => check::check(&offline::look(&known.path, sr, &known.name), &fs),
        }
    }
}
