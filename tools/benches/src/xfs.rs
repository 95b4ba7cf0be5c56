//! An XFS with reflink on a loop device, where one can be had.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// Smallest XFS that its maker makes, with room to spare.
const XFS_BYTES_MIN: u64 = 512 << 20;
/// How long its unmounting is tried.
const UNMOUNT_TIME_MAX: Duration = Duration::from_secs(10);
/// And how often.
const UNMOUNT_RETRY: Duration = Duration::from_millis(50);

/// Mounted; unmounted when dropped.
#[derive(Debug)]
pub struct Xfs {
    /// Where.
    pub folder: PathBuf,
    image: PathBuf,
}

impl Xfs {
    /// One of `bytes`, as files below `dir`.
    ///
    /// # Errors
    /// What is missing for it, and what to do about it.
    pub fn mount(dir: &Path, bytes: u64) -> Result<Self> {
        if !nix::unistd::geteuid().is_root() {
            bail!("mounting an XFS image needs root; or give --dir on an XFS with reflink");
        }
        let image = dir.join(format!("coppice-bench-{}.xfs", std::process::id()));
        let folder = dir.join(format!("coppice-bench-{}.mnt", std::process::id()));
        std::fs::File::create(&image)?.set_len(bytes.max(XFS_BYTES_MIN))?;
        let made = std::fs::create_dir(&folder).map_err(anyhow::Error::from).and_then(|()| {
            let mut mkfs = Command::new("mkfs.xfs");
            run(mkfs.args(["-q", "-f", "-m", "reflink=1"]).arg(&image), "install xfsprogs")?;
            run(
                Command::new("mount").args(["-o", "loop"]).arg(&image).arg(&folder),
                "a loop device is needed",
            )
        });
        match made {
            Ok(()) => Ok(Self { folder, image }),
            Err(error) => {
                // Nothing is mounted on it, so only an empty folder goes.
                let _ = std::fs::remove_dir(&folder);
                std::fs::remove_file(&image)?;
                Err(error)
            }
        }
    }
}

impl Xfs {
    /// A tapdisk that was killed gives up its files a moment after it is gone.
    fn unmount(&self) -> bool {
        let deadline = Instant::now() + UNMOUNT_TIME_MAX;
        loop {
            let tried = Command::new("umount").arg(&self.folder).output();
            if tried.is_ok_and(|output| output.status.success()) {
                return true;
            }
            if Instant::now() > deadline {
                return false;
            }
            std::thread::sleep(UNMOUNT_RETRY);
        }
    }
}

impl Drop for Xfs {
    fn drop(&mut self) {
        if self.unmount() {
            // What stays behind is named like a benchmark's.
            let _ = std::fs::remove_dir(&self.folder);
            let _ = std::fs::remove_file(&self.image);
        } else {
            eprintln!("{} could not be unmounted", self.folder.display());
        }
    }
}

fn run(command: &mut Command, missing: &str) -> Result<()> {
    match command.output() {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => {
            bail!("{command:?}: {}: {missing}", String::from_utf8_lossy(&output.stderr).trim())
        }
        Err(error) => bail!("{command:?}: {error}: {missing}"),
    }
}
