//! A file system of a size one likes, for tests of what happens when it is full.

use std::path::PathBuf;
use std::process::Command;

use super::host::Host;
use super::programs::{am_root, have, output, run, skipped};

/// A small file system of its own, unmounted with it.
pub struct Mounted {
    /// Where it is mounted.
    pub folder: PathBuf,
}

impl Mounted {
    /// An ext4 of `mib` MiB on a loop device, or `None` where there is none.
    pub fn ext4(host: &Host, mib: u64) -> Option<Self> {
        if !am_root() || !have("mkfs.ext4") {
            return None;
        }
        let image = host.data().join("small.img");
        std::fs::File::create(&image).unwrap().set_len(mib << 20).unwrap();
        run(Command::new("mkfs.ext4").args(["-q", "-m", "0", "-O", "^has_journal"]).arg(&image));
        let folder = host.data().join("small");
        std::fs::create_dir(&folder).unwrap();
        let mounted = output(Command::new("mount").args(["-o", "loop"]).arg(&image).arg(&folder));
        if !mounted.status.success() {
            skipped("a loop device");
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
