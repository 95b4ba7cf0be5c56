//! Reading a disk that nobody writes, through its images.

use sm::Repo;
use sm::identity;
use sm::reading::Reading;
use uuid::Uuid;
use vhd::units::{BLOCK_BYTES, BlockNo};

use super::compare::Digest;
use crate::limits;
use crate::watch::{Aborted, Watch};

/// Why a reading ended early.
#[derive(Debug)]
pub(super) enum Trouble {
    /// The job was told to stop.
    Aborted,
    /// It is attached for writing.
    Attached,
    /// Its content cannot be read.
    Unreadable(String),
    /// Nothing can be said.
    Void(String),
}

impl From<Aborted> for Trouble {
    fn from(_: Aborted) -> Self {
        Self::Aborted
    }
}

impl From<sm::Error> for Trouble {
    fn from(error: sm::Error) -> Self {
        use sm::Error as E;
        match error {
            E::InUse { .. } => Self::Attached,
            E::BadImage { .. } | E::MissingParent { .. } | E::ParentOutside { .. } => {
                Self::Unreadable(error.to_string())
            }
            // That somebody is in the way, or the host out of something, says
            // nothing of the content.
            other => Self::Void(other.to_string()),
        }
    }
}

impl From<std::io::Error> for Trouble {
    fn from(error: std::io::Error) -> Self {
        Self::Void(error.to_string())
    }
}

/// Called with each block that is not zeros, in order.
pub(super) type Found<'a> = &'a mut dyn FnMut(u32, Digest) -> Result<(), Trouble>;

/// A disk that nobody writes while this lives.
pub(super) struct Detached {
    reading: Reading,
    vdi: Uuid,
}

impl Detached {
    /// Takes a lease on its chain and opens it. Waits a while for an operation
    /// under way.
    pub fn open(repo: &Repo, watch: &dyn Watch, vdi: Uuid) -> Result<Self, Trouble> {
        let begun = watch.now();
        loop {
            match Reading::open_yielding(repo, vdi) {
                Ok(reading) => return Ok(Self { reading, vdi }),
                Err(error)
                    if error.is_busy() && watch.now().saturating_sub(begun) < limits::RECEIPT_BUSY_MAX =>
                {
                    watch.sleep(limits::LEAVE_POLL)?;
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Its size in bytes.
    pub fn virtual_bytes(&self) -> u64 {
        self.reading.chain.virtual_bytes()
    }

    /// What names its content until it can change, a new name if it has none.
    pub fn name_content(&self, repo: &Repo) -> Result<Uuid, Trouble> {
        Ok(identity::of_or_new(repo, self.vdi)?)
    }

    /// Whether that name still stands.
    pub fn has_content(&self, repo: &Repo, name: Uuid) -> Result<bool, Trouble> {
        Ok(identity::of(repo, self.vdi)? == Some(name))
    }

    /// Reads every block that is somewhere in its chain, within the budget.
    pub fn read(&self, repo: &Repo, watch: &dyn Watch, found: Found<'_>) -> Result<u64, Trouble> {
        let (chain, end) = (&self.reading.chain, self.virtual_bytes());
        let mut buffer = vec![0; usize::try_from(BLOCK_BYTES).unwrap_or(0)];
        let mut bytes_read = 0;
        for block in (0..chain.blocks()).map(BlockNo).filter(|block| chain.map().has(*block)) {
            let len = BLOCK_BYTES.min(end - block.first_byte());
            watch.allow(len)?;
            if repo.host.is_asked_to_leave(self.vdi) {
                return Err(Trouble::Void("somebody wanted the disk while it was read".into()));
            }
            let part = buffer.get_mut(..usize::try_from(len).unwrap_or(0)).unwrap_or_default();
            let read = chain.read_at(part, block.first_byte());
            read.map_err(|error| Trouble::Unreadable(error.to_string()))?;
            bytes_read += len;
            if let Some(digest) = Digest::of(part) {
                found(block.0, digest)?;
            }
        }
        Ok(bytes_read)
    }
}
