//! VDIs that are to be served until somebody detaches them.
//!
//! A lease ends with its tapdisk. What outlives it, and tells a tapdisk that
//! died from one that was stopped, is `<run>/tap/<vdi>/wanted`: made under
//! the SR lock when the VDI is attached, removed under it when it is detached.
//!
//! ```text
//!   wanted   lease    the VDI
//!   yes      live     is served
//!   yes      dead     has lost its tapdisk: see [`crate::caretaker`]
//!   no       dead     is not attached
//!   no       live     is being detached; if smd died at that, the next
//!                     attach of the SR notes it again
//! ```
//!
//! It is bound to one boot and one attach epoch: after a reboot, or when the
//! SR was elsewhere meanwhile, nobody gets a disk served that he did not ask
//! for.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::remote::Remote;
use crate::state::read_json;

/// A VDI that is to be served.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wanted {
    /// The VDI.
    pub vdi: Uuid,
    /// Its SR.
    pub sr: Uuid,
    /// Whether it is attached for reading only.
    pub read_only: bool,
    /// Where else than on this host it is served.
    #[serde(default)]
    pub remote: Option<Remote>,
    /// Its first tapdisk is being started: whoever asked has no answer yet.
    #[serde(default)]
    pub starting: bool,
    /// How often its tapdisk died since it was attached.
    #[serde(default)]
    pub deaths: u32,
    /// Set while it has none.
    #[serde(default)]
    pub down: Option<Down>,
}

/// A VDI that lost its tapdisk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Down {
    /// When that was noticed, in seconds since 1970.
    pub since_s: u64,
    /// Attempts to bring it back so far.
    pub attempts: u32,
    /// Whether no more attempts are made.
    pub given_up: bool,
    /// Why the last attempt failed.
    pub error: Option<String>,
}

impl Down {
    /// Not looked at by anybody yet.
    #[must_use]
    pub fn just_now() -> Self {
        Self { since_s: 0, attempts: 0, given_up: false, error: None }
    }
}

impl Wanted {
    /// What an attach asks for.
    #[must_use]
    pub fn starting(sr: Uuid, vdi: Uuid, read_only: bool) -> Self {
        Self { vdi, sr, read_only, remote: None, starting: true, deaths: 0, down: None }
    }

    /// The same once it is served.
    #[must_use]
    pub fn started(self) -> Self {
        Self { starting: false, ..self }
    }

    /// The same once it is known which port was taken: the next tapdisk is to
    /// take it again.
    #[must_use]
    pub fn listening(mut self, address: Option<SocketAddr>) -> Self {
        if let (Some(remote), Some(address)) = (&mut self.remote, address) {
            remote.listen = address;
        }
        self
    }
}

/// The file's content: what is wanted, and for which life of the SR.
#[derive(Debug, Serialize, Deserialize)]
struct Content {
    boot: Uuid,
    epoch: u64,
    #[serde(flatten)]
    wanted: Wanted,
}

/// The files of one SR in one boot.
#[derive(Debug, Clone, Copy)]
pub struct WantedFiles<'a> {
    /// `<run>/tap`.
    pub taps: &'a Path,
    /// The SR.
    pub sr: Uuid,
    /// This boot.
    pub boot: Uuid,
    /// The SR's attach epoch.
    pub epoch: u64,
}

impl WantedFiles<'_> {
    fn path(&self, vdi: Uuid) -> PathBuf {
        self.taps.join(vdi.to_string()).join("wanted")
    }

    /// What is wanted of one VDI. A file of another life is as good as none.
    ///
    /// # Errors
    /// I/O errors.
    pub fn get(&self, vdi: Uuid) -> io::Result<Option<Wanted>> {
        let content = match read_json::<Content>(&self.path(vdi)) {
            // Half written by a process that died: nobody was answered.
            Err(error) if error.kind() == io::ErrorKind::InvalidData => None,
            content => content?,
        };
        let ours = |c: &Content| c.boot == self.boot && c.epoch == self.epoch && c.wanted.sr == self.sr;
        Ok(content.filter(ours).map(|content| content.wanted))
    }

    /// Notes it. Not durable: the folder does not survive the power either.
    ///
    /// # Errors
    /// I/O errors; the old content then stands.
    pub fn put(&self, wanted: &Wanted) -> io::Result<()> {
        let content = Content { boot: self.boot, epoch: self.epoch, wanted: wanted.clone() };
        let path = self.path(wanted.vdi);
        let beside = path.with_extension("new");
        fs::write(&beside, serde_json::to_vec(&content).map_err(io::Error::other)?)?;
        fs::rename(&beside, &path)
    }

    /// Forgets it; fine if it is not wanted.
    ///
    /// # Errors
    /// I/O errors.
    pub fn remove(&self, vdi: Uuid) -> io::Result<()> {
        match fs::remove_file(self.path(vdi)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_boot_another_epoch_and_another_sr_void_it() {
        let folder = tempfile::tempdir().unwrap();
        let (vdi, sr, boot) = (Uuid::from_u128(1), Uuid::from_u128(2), Uuid::from_u128(3));
        fs::create_dir(folder.path().join(vdi.to_string())).unwrap();
        let files = WantedFiles { taps: folder.path(), sr, boot, epoch: 4 };
        let wanted = Wanted { deaths: 2, ..Wanted::starting(sr, vdi, true) };
        files.put(&wanted).unwrap();
        assert_eq!(files.get(vdi).unwrap(), Some(wanted));
        let others = [
            WantedFiles { boot: Uuid::from_u128(9), ..files },
            WantedFiles { epoch: 5, ..files },
            WantedFiles { sr: Uuid::from_u128(9), ..files },
        ];
        for other in others {
            assert_eq!(other.get(vdi).unwrap(), None);
        }
        fs::write(files.path(vdi), b"{\"boot\":").unwrap();
        assert_eq!(files.get(vdi).unwrap(), None);
        files.remove(vdi).unwrap();
        files.remove(vdi).unwrap();
    }
}
