//! A file system of a size one likes, for tests of what happens when it is full.

use std::path::{Path, PathBuf};
use std::process::Command;

use nix::fcntl::{FallocateFlags, fallocate};

use super::host::Host;
use super::programs::{am_root, have, output, run, skipped};

/// Smallest XFS and btrfs that their makers make, with room to spare, in MiB.
const MIB_MIN: u64 = 512;

/// A small file system of its own, unmounted with it.
pub struct Mounted {
    /// Where it is mounted.
    pub folder: PathBuf,
}

impl Mounted {
    /// An ext4 of `mib` MiB on a loop device, or `None` where there is none.
    pub fn ext4(host: &Host, mib: u64) -> Option<Self> {
        Self::made(host, "mkfs.ext4", &["-q", "-m", "0", "-O", "^has_journal"], mib)
    }

    /// An XFS that shares extents, likewise.
    pub fn xfs(host: &Host) -> Option<Self> {
        Self::made(host, "mkfs.xfs", &["-q", "-m", "reflink=1"], MIB_MIN)
    }

    /// A btrfs, likewise.
    pub fn btrfs(host: &Host) -> Option<Self> {
        Self::made(host, "mkfs.btrfs", &["-q"], MIB_MIN)
    }

    fn made(host: &Host, maker: &str, options: &[&str], mib: u64) -> Option<Self> {
        if !am_root() || !have(maker) {
            return None;
        }
        let image = host.data().join("small.img");
        std::fs::File::create(&image).unwrap().set_len(mib << 20).unwrap();
        run(Command::new(maker).args(options).arg(&image));
        let folder = host.data().join("small");
        std::fs::create_dir(&folder).unwrap();
        let mounted = output(Command::new("mount").args(["-o", "loop"]).arg(&image).arg(&folder));
        if !mounted.status.success() {
            skipped(&format!("a loop device, and a kernel that knows what {maker} makes"));
            return None;
        }
        Some(Self { folder })
    }

    /// Mounts it anew, `ro` or `rw`.
    pub fn remount(&self, how: &str) {
        run(Command::new("mount").arg("-o").arg(format!("remount,{how}")).arg(&self.folder));
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Lazily: a tapdisk of a failed test may still hold it.
        let _ = Command::new("umount").arg("-l").arg(&self.folder).status();
    }
}

/// Bytes a new file may take there.
pub fn free_bytes(folder: &Path) -> u64 {
    let found = nix::sys::statvfs::statvfs(folder).unwrap();
    found.blocks_available() * found.fragment_size()
}

/// Takes room, as a file of that name, until just `left` bytes are free.
pub fn leave_free(folder: &Path, name: &str, left: u64) {
    let taken = free_bytes(folder).checked_sub(left).expect("the file system is too small for this test");
    let file = std::fs::File::create(folder.join(name)).unwrap();
    fallocate(&file, FallocateFlags::empty(), 0, i64::try_from(taken).unwrap()).unwrap();
    let free = free_bytes(folder);
    assert!(free.abs_diff(left) < 1 << 20, "{free} bytes are free instead of {left}");
}
