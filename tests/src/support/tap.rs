//! A tapdisk of its own, without smd: on a private folder, started and killed
//! as often as a test likes.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tapdisk_control::{Client, ImageRef};
use tempfile::TempDir;
use uuid::Uuid;
use vhd::create::{NewImage, NewKind, ParentLink, create};
use vhd::record::TmpfsRecords;
use vhd::storage::{FileVolumes, PosixFs, VolumeName, Volumes};

use super::host::{Attached, LIMIT};
use super::programs::coppice;

/// Name of the export.
const EXPORT: &str = "disk";
/// The repository was attached once.
const EPOCH: u64 = 1;
/// What a tapdisk says whose leaf is locked.
const LOCKED: &str = "operation would block";

/// A repository's folder on a real disk, records and sockets in memory.
#[derive(Debug)]
pub struct Place {
    data: TempDir,
    run: TempDir,
    vdi: Uuid,
}

impl Place {
    /// Empty folders.
    pub fn new() -> Self {
        let mut builder = tempfile::Builder::new();
        let builder = builder.prefix("coppice-test-");
        let data = builder.tempdir_in("/var/tmp").unwrap();
        let run = builder.tempdir_in("/dev/shm").or_else(|_| builder.tempdir()).unwrap();
        let place = Self { data, run, vdi: Uuid::new_v4() };
        std::fs::create_dir(place.records()).unwrap();
        place
    }

    /// The repository.
    pub fn volumes(&self) -> FileVolumes {
        FileVolumes::new(Arc::new(PosixFs::new(self.data.path().to_owned())))
    }

    /// A new empty image.
    pub fn image(&self, name: &str, virtual_bytes: u64, parent: Option<&ImageRef>) -> ImageRef {
        let kind = match parent {
            None => NewKind::Dynamic,
            Some(parent) => {
                let volume = VolumeName::new(&parent.volume).unwrap();
                NewKind::Child { parent: ParentLink { uuid: parent.footer, volume, timestamp_s: 0 } }
            }
        };
        let uuid = Uuid::new_v4();
        let new =
            NewImage { uuid, virtual_bytes, kind, bat_entries_max: None, hidden: false, timestamp_s: 0 };
        let file = self.volumes().create(&VolumeName::new(name).unwrap()).unwrap();
        create(file.as_ref(), &new).unwrap();
        ImageRef { volume: name.to_owned(), footer: uuid }
    }

    /// Serves a leaf. The kernel may hold on to what a killed tapdisk had in
    /// flight, and so to its lock, for a moment longer than to the process.
    pub fn start(&self, leaf: &ImageRef) -> Tap {
        let deadline = Instant::now() + LIMIT;
        loop {
            match self.try_start(leaf) {
                Ok(tap) => return tap,
                Err(said) => {
                    assert!(said.contains(LOCKED) && Instant::now() < deadline, "{said}\n{}", self.tail());
                }
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Settles an image that a killed tapdisk had open beside its leaf, which
    /// is what recovery does before anybody reads it.
    pub fn settle(&self, image: &ImageRef) {
        let name = VolumeName::new(&image.volume).unwrap();
        let records = TmpfsRecords::new(self.records(), self.vdi, EPOCH);
        let deadline = Instant::now() + LIMIT;
        while let Err(error) = vhd::writer::settle(&self.volumes(), &name, &records) {
            let said = error.to_string();
            assert!(said.contains(LOCKED) && Instant::now() < deadline, "{said}\n{}", self.tail());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn records(&self) -> PathBuf {
        self.run.path().join("records")
    }

    fn try_start(&self, leaf: &ImageRef) -> Result<Tap, String> {
        let id = self.vdi.to_string();
        let log = std::fs::File::options().create(true).append(true).open(self.log()).unwrap();
        let mut child = Command::new(coppice())
            .args(["daemon", "tapdisk", "--sr-path"])
            .arg(self.data.path())
            .arg("--run")
            .arg(self.run.path())
            .arg("--records")
            .arg(self.records())
            .args(["--volume", &leaf.volume, "--vdi", &id, "--sr", &id, "--export", EXPORT])
            .args(["--boot-id", &id, "--epoch", &EPOCH.to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let said: serde_json::Value = serde_json::from_str(&line).unwrap_or_default();
        let socket = self.run.path().join("nbd.sock");
        let at = Attached {
            uri: format!("nbd+unix:///{EXPORT}?socket={}", socket.display()),
            socket,
            export: EXPORT.to_owned(),
            pid: child.id().cast_signed(),
        };
        let tap = Tap { child, at, control: self.run.path().join("ctl.sock") };
        if said["ready"] == true { Ok(tap) } else { Err(line) }
    }

    fn log(&self) -> PathBuf {
        self.run.path().join("log")
    }

    /// The folder of the images.
    pub fn folder(&self) -> &Path {
        self.data.path()
    }

    /// The end of what tapdisks here have logged.
    pub fn tail(&self) -> String {
        let log = std::fs::read_to_string(self.log()).unwrap_or_default();
        let lines: Vec<&str> = log.lines().rev().take(20).collect();
        lines.into_iter().rev().collect::<Vec<_>>().join("\n")
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if std::thread::panicking() && std::env::var_os("COPPICE_KEEP").is_some() {
            self.data.disable_cleanup(true);
            self.run.disable_cleanup(true);
            eprintln!("kept: {} and {}", self.data.path().display(), self.run.path().display());
        }
    }
}

/// A running tapdisk, killed at the latest with this value.
#[derive(Debug)]
pub struct Tap {
    child: Child,
    /// Where it serves.
    pub at: Attached,
    control: PathBuf,
}

impl Tap {
    /// `kill -9`, from any thread; it is reaped with the value.
    pub fn shoot(&self) {
        kill(Pid::from_raw(self.at.pid), Signal::SIGKILL).unwrap();
    }

    /// Kills and reaps it.
    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Lets it settle its images and end.
    pub fn end(mut self) {
        kill(Pid::from_raw(self.at.pid), Signal::SIGTERM).unwrap();
        assert!(self.child.wait().unwrap().success());
    }

    /// A new control connection; `None` if it is dead.
    pub fn control(&self) -> Option<Client> {
        Client::connect(&self.control, LIMIT).ok()
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
