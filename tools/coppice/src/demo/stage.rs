//! The demo's own host: folders, daemons, one storage repository.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::client::Daemon;
use crate::failure::{Failure, Outcome};
use crate::host::{Folders, Host, Logs, private_run};
use crate::output::say;

/// Free space wanted before anything is begun.
const FREE_BYTES_MIN: u64 = 4 << 30;

/// A place to play, and who plays there.
#[derive(Debug)]
pub struct Stage {
    host: Host,
    /// The storage daemon.
    pub smd: Daemon,
    /// The garbage collector.
    pub gcd: Daemon,
    /// The folder of the images.
    pub store: PathBuf,
    data: Folder,
    run: tempfile::TempDir,
}

/// Where images, state and logs lie.
#[derive(Debug)]
enum Folder {
    Private(tempfile::TempDir),
    Given(PathBuf),
}

impl Folder {
    fn path(&self) -> &Path {
        match self {
            Folder::Private(folder) => folder.path(),
            Folder::Given(path) => path,
        }
    }
}

/// Where an attached disk is served.
#[derive(Debug, Clone)]
pub struct Served {
    /// The NBD socket.
    pub socket: PathBuf,
    /// The export's name.
    pub export: String,
}

impl Stage {
    /// Makes folders and starts the daemons.
    pub fn set_up(dir: Option<&Path>) -> Outcome<Self> {
        let data = match dir {
            Some(dir) => Folder::Given(std::path::absolute(dir)?),
            None => Folder::Private(private_data()?),
        };
        let store = data.path().join("store");
        fresh(&store, &data.path().join("state"))?;
        enough_space(&store)?;
        // Sockets want a short path, the pending records a tmpfs.
        let run = private_run()?;
        let folders = Folders { state: data.path().join("state"), run: run.path().to_owned() };
        let smd = Daemon::smd(&folders.run);
        let gcd = Daemon::gcd(&folders.run);
        let host = Host::start(folders, Logs::Files, Vec::new())?;
        Ok(Self { host, smd, gcd, store, data, run })
    }

    /// Attaches a disk.
    pub fn attach(&self, vdi: &str, read_only: bool) -> Outcome<Served> {
        let path = format!("/vdis/{vdi}/attach");
        let answer = self.smd.post(&path, &json!({"read_only": read_only}))?;
        served(&answer).ok_or_else(|| Failure::new("IO_ERROR", format!("attached, but where? {answer}")))
    }

    /// Detaches it.
    pub fn detach(&self, vdi: &str) -> Outcome<()> {
        self.smd.post(&format!("/vdis/{vdi}/detach"), &json!({}))?;
        Ok(())
    }

    /// Ends the daemons; folders of our own go, unless they are to be kept.
    pub fn take_down(self, keep: bool) {
        self.host.stop(false);
        if keep {
            let kept = match self.data {
                Folder::Private(folder) => folder.keep(),
                Folder::Given(path) => path,
            };
            say(&format!("coppice: images, state and logs are kept in {}", kept.display()));
        } else if let Folder::Given(path) = &self.data {
            for name in ["store", "state"] {
                if let Err(error) = std::fs::remove_dir_all(path.join(name)) {
                    say(&format!("coppice: {}: {error}", path.join(name).display()));
                }
            }
        }
        drop(self.run);
    }
}

fn served(answer: &Value) -> Option<Served> {
    let socket = answer.get("socket")?.as_str()?.into();
    // nbd+unix:///NAME?socket=PATH
    let uri = answer.get("nbd")?.as_str()?;
    let export = uri.strip_prefix("nbd+unix:///")?.split('?').next()?;
    Some(Served { socket, export: export.to_owned() })
}

/// A folder on a real disk: /tmp is a tmpfs on many machines.
fn private_data() -> Outcome<tempfile::TempDir> {
    let mut builder = tempfile::Builder::new();
    let builder = builder.prefix("coppice-demo-");
    match builder.tempdir_in("/var/tmp") {
        Ok(folder) => Ok(folder),
        Err(_) => Ok(builder.tempdir()?),
    }
}

/// Makes the folder of the images. What is there already is somebody's, and
/// the demo deletes what it made.
fn fresh(store: &Path, state: &Path) -> Outcome<()> {
    for folder in [store, state] {
        if folder.exists() {
            let message = format!("{} exists already; name another --dir", folder.display());
            return Err(Failure::new("EXISTS", message));
        }
    }
    std::fs::create_dir_all(store).map_err(|e| Failure::new("IO_ERROR", format!("{}: {e}", store.display())))
}

fn enough_space(folder: &Path) -> Outcome<()> {
    let stat = nix::sys::statvfs::statvfs(folder).map_err(std::io::Error::from)?;
    let free = stat.blocks_available() * stat.fragment_size();
    if free < FREE_BYTES_MIN {
        let message = format!(
            "{} has {} free, the demo wants {}; name another folder with --dir",
            folder.display(),
            crate::size::human(free),
            crate::size::human(FREE_BYTES_MIN)
        );
        return Err(Failure::new("NO_SPACE", message));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_export_is_read_from_the_uri() {
        let answer = json!({"socket": "/r/nbd.sock", "nbd": "nbd+unix:///web?socket=/r/nbd.sock"});
        let served = served(&answer).unwrap();
        assert_eq!(served.export, "web");
        assert_eq!(served.socket, PathBuf::from("/r/nbd.sock"));
    }
}
