//! What a folder's filesystem can do, tried out on files without a name:
//! nothing of them is ever seen, and nothing is left when we die.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;

use nix::sys::statfs::{self, FsType, Statfs, fstatfs};

use super::volume::PosixVolume;
use super::{CopyKind, PosixFs, Volume};

/// Bytes tried with: whole blocks of every filesystem there is.
const TRIAL_BYTES: u64 = 128 << 10;

/// What a repository may rely on beyond names, locks and syncs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Features {
    /// The filesystem, like `ext4`; its number where it is not known to us.
    pub filesystem: String,
    /// Whether it lies on another machine.
    pub network: bool,
    /// Whether copies can share extents; `None` if it could not be tried.
    pub reflink: Option<bool>,
    /// Whether zeroed ranges give their space back; `None` likewise.
    pub punch_hole: Option<bool>,
}

const NAMES: &[(FsType, &str, bool)] = &[
    (statfs::EXT4_SUPER_MAGIC, "ext4", false),
    (statfs::XFS_SUPER_MAGIC, "xfs", false),
    (statfs::BTRFS_SUPER_MAGIC, "btrfs", false),
    (statfs::TMPFS_MAGIC, "tmpfs", false),
    (statfs::OVERLAYFS_SUPER_MAGIC, "overlayfs", false),
    (statfs::NFS_SUPER_MAGIC, "nfs", true),
    (statfs::SMB_SUPER_MAGIC, "smb", true),
    (FsType(0xff53_4d42), "cifs", true),
    (FsType(0xfe53_4d42), "smb2", true),
    (statfs::FUSE_SUPER_MAGIC, "fuse", false),
];

/// Whether a filesystem lies on another machine.
pub(super) fn is_network(found: &Statfs) -> bool {
    let kind = found.filesystem_type();
    NAMES.iter().any(|(magic, _, network)| *magic == kind && *network)
}

impl PosixFs {
    /// Looks at the filesystem of the root and tries it out. A folder that
    /// cannot be written, or a filesystem without unnamed files (NFS), leaves
    /// what would be tried unknown.
    ///
    /// # Errors
    /// The folder cannot be opened.
    pub fn features(&self) -> io::Result<Features> {
        let folder = File::from(self.folder("")?);
        let kind = fstatfs(&folder)?.filesystem_type();
        let known = NAMES.iter().find(|(magic, ..)| *magic == kind);
        let (filesystem, network) = known.map_or_else(
            || (format!("{:#x}", kind.0), false),
            |(_, name, network)| ((*name).into(), *network),
        );
        let tried = self.try_out().ok();
        Ok(Features {
            filesystem,
            network,
            reflink: tried.map(|(reflink, _)| reflink),
            punch_hole: tried.map(|(_, punch_hole)| punch_hole),
        })
    }

    fn unnamed(&self) -> io::Result<PosixVolume> {
        let flags = nix::libc::O_TMPFILE | nix::libc::O_CLOEXEC;
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).mode(0o600).custom_flags(flags).open(self.root())?;
        PosixVolume::from_file(file)
    }

    fn try_out(&self) -> io::Result<(bool, bool)> {
        let (one, two) = (self.unnamed()?, self.unnamed()?);
        one.write_at(&vec![0x5a; TRIAL_BYTES as usize], 0)?;
        // Before that neither is placed on disk.
        one.flush("features: trial data")?;
        let reflink = two.copy_from(&one, 0, 0, TRIAL_BYTES)? == CopyKind::Cloned;
        let before = one.allocated()?;
        one.zero(0, TRIAL_BYTES)?;
        one.flush("features: trial hole")?;
        Ok((reflink, one.allocated()? < before))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trying_it_out_leaves_nothing_and_tells_what_tmpfs_can() {
        let folder = tempfile::tempdir_in("/dev/shm").unwrap();
        let features = PosixFs::new(folder.path().to_owned()).features().unwrap();
        assert_eq!(features.filesystem, "tmpfs");
        assert_eq!((features.reflink, features.punch_hole), (Some(false), Some(true)));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_folder_that_is_not_there_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        assert!(PosixFs::new(folder.path().join("gone")).features().is_err());
    }
}
