//! smd and gcd as children of this process: starting, watching, ending.
//!
//! The only file of this crate that starts or ends processes. Each daemon
//! gets a process group of its own, so that Ctrl-C in a terminal reaches
//! `up` alone, which then ends them in order: gcd first (it stops its merges
//! at a safe point), then the attached disks, then smd.

use std::ffi::OsString;
use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use crate::client::Daemon;
use crate::failure::{Failure, Outcome};
use crate::output::say;
use crate::view::{Vdi, list_of};

/// Longest wait for a daemon to answer after its start.
const START_LIMIT: Duration = Duration::from_secs(30);
/// Longest wait for a daemon to end when asked to.
const STOP_LIMIT: Duration = Duration::from_secs(20);
/// How often a starting or ending daemon is looked at.
const POLL: Duration = Duration::from_millis(20);
/// Longest path of a Unix socket, its final zero included.
const SOCKET_PATH_BYTES_MAX: usize = 108;
/// What smd appends to the run folder at most: `/tap/<uuid>/nbd.sock`.
const SOCKET_SUFFIX_BYTES: usize = 5 + 36 + 9;

/// Where a host keeps its things.
#[derive(Debug, Clone)]
pub struct Folders {
    /// State that survives a reboot.
    pub state: PathBuf,
    /// Sockets and what survives only a process.
    pub run: PathBuf,
}

/// Where the daemons' words go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Logs {
    /// To our own standard error.
    Inherit,
    /// To `smd.log` and `gcd.log` in the state folder.
    Files,
}

/// One daemon as a child.
#[derive(Debug)]
struct Service {
    name: &'static str,
    args: Vec<OsString>,
    api: Daemon,
    child: Child,
}

/// A host: smd and gcd on one pair of folders.
#[derive(Debug)]
pub struct Host {
    folders: Folders,
    logs: Logs,
    exe: PathBuf,
    smd: Service,
    gcd: Service,
}

impl Host {
    /// Starts both daemons and waits until they answer.
    ///
    /// `more` are further arguments of smd.
    pub fn start(folders: Folders, logs: Logs, more: Vec<OsString>) -> Outcome<Self> {
        prepare(&folders)?;
        let exe = std::env::current_exe()?;
        let common = |name: &str| {
            let mut args: Vec<OsString> = ["daemon", name, "--state"].map(OsString::from).into();
            args.push(folders.state.clone().into());
            args.push("--run".into());
            args.push(folders.run.clone().into());
            args
        };
        let mut smd_args = common("smd");
        smd_args.push("--tapdisk".into());
        smd_args.push(exe.clone().into());
        for part in ["daemon", "tapdisk"] {
            smd_args.push("--tapdisk-arg".into());
            smd_args.push(part.into());
        }
        smd_args.extend(more);
        let smd = Service::start("smd", smd_args, Daemon::smd(&folders.run), &exe, &folders, logs)?;
        let started = Service::start("gcd", common("gcd"), Daemon::gcd(&folders.run), &exe, &folders, logs);
        let gcd = match started {
            Ok(gcd) => gcd,
            Err(failure) => {
                let mut smd = smd;
                smd.end();
                return Err(failure);
            }
        };
        Ok(Self { folders, logs, exe, smd, gcd })
    }

    /// The storage daemon's process.
    pub fn smd_pid(&self) -> u32 {
        self.smd.child.id()
    }

    /// The collector's process.
    pub fn gcd_pid(&self) -> u32 {
        self.gcd.child.id()
    }

    /// Starts again whatever ended by itself; says which, and how it ended.
    pub fn mend(&mut self) -> Outcome<Option<String>> {
        for service in [&mut self.smd, &mut self.gcd] {
            if let Some(status) = service.child.try_wait()? {
                let said = format!("{} ended by itself: {status}", service.name);
                let (args, api) = (service.args.clone(), service.api.clone());
                *service = Service::start(service.name, args, api, &self.exe, &self.folders, self.logs)?;
                return Ok(Some(said));
            }
        }
        Ok(None)
    }

    /// Ends everything in order; with `leave_attached` disks stay served.
    pub fn stop(mut self, leave_attached: bool) {
        self.gcd.end();
        if !leave_attached {
            detach_all(&self.smd.api);
        }
        self.smd.end();
    }
}

impl Service {
    fn start(
        name: &'static str,
        args: Vec<OsString>,
        api: Daemon,
        exe: &Path,
        folders: &Folders,
        logs: Logs,
    ) -> Outcome<Self> {
        let log = match logs {
            Logs::Inherit => Stdio::inherit(),
            Logs::Files => {
                let path = folders.state.join(format!("{name}.log"));
                File::options().create(true).append(true).open(path)?.into()
            }
        };
        let child = Command::new(exe)
            .args(&args)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .process_group(0)
            .spawn()?;
        let mut service = Self { name, args, api, child };
        match service.wait_ready(folders, logs) {
            Ok(()) => Ok(service),
            Err(failure) => {
                service.end();
                Err(failure)
            }
        }
    }

    /// Waits until our own child answers, not one that was there before.
    fn wait_ready(&mut self, folders: &Folders, logs: Logs) -> Outcome<()> {
        let probe = if self.name == "smd" { "/srs" } else { "/status" };
        let deadline = Instant::now() + START_LIMIT;
        loop {
            if let Some(status) = self.child.try_wait()? {
                let why = match logs {
                    Logs::Inherit => String::new(),
                    Logs::Files => last_line(&folders.state.join(format!("{}.log", self.name))),
                };
                let message = format!("{} did not start: {status} {why}", self.name);
                return Err(Failure::new("NOT_RUNNING", message.trim_end()));
            }
            if self.api.get(probe).is_ok() {
                return Ok(());
            }
            if Instant::now() > deadline {
                let limit_s = START_LIMIT.as_secs();
                let message = format!("{} gave no answer within {limit_s} s", self.name);
                return Err(Failure::new("NOT_RUNNING", message));
            }
            std::thread::sleep(POLL);
        }
    }

    /// Asks it to end, and insists after [`STOP_LIMIT`].
    fn end(&mut self) {
        let deadline = Instant::now() + STOP_LIMIT;
        if let Ok(pid) = i32::try_from(self.child.id()) {
            // Fails only when it is gone, which the loop finds out.
            let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
        }
        while let Ok(None) = self.child.try_wait() {
            if Instant::now() > deadline {
                say(&format!("coppice: {} does not end; killing it", self.name));
                let _ = self.child.kill();
                let _ = self.child.wait();
                return;
            }
            std::thread::sleep(POLL);
        }
    }
}

/// Detaches every attached disk, clients or not.
fn detach_all(smd: &Daemon) {
    let vdis: Vec<Vdi> = match smd.get("/vdis").and_then(|list| list_of(&list, "vdis")) {
        Ok(vdis) => vdis,
        Err(failure) => {
            say(&format!("coppice: attached disks stay served: {failure}"));
            return;
        }
    };
    for vdi in vdis.iter().filter(|vdi| vdi.attached) {
        let path = format!("/vdis/{}/detach", vdi.uuid);
        if let Err(failure) = smd.post(&path, &json!({"force": true})) {
            say(&format!("coppice: {} stays attached: {failure}", vdi.uuid));
        }
    }
}

/// Makes the folders, and refuses a run folder whose sockets could not exist.
fn prepare(folders: &Folders) -> Outcome<()> {
    let run = folders.run.as_os_str().len();
    if run + SOCKET_SUFFIX_BYTES >= SOCKET_PATH_BYTES_MAX {
        let message = format!(
            "{}: too long for the path of a Unix socket; name a shorter folder with --run",
            folders.run.display()
        );
        return Err(Failure::new("UNSUPPORTED", message));
    }
    for folder in [&folders.state, &folders.run] {
        std::fs::create_dir_all(folder)
            .map_err(|e| Failure::new("IO_ERROR", format!("{}: {e}", folder.display())))?;
    }
    Ok(())
}

/// A new private folder for sockets, on a tmpfs where there is one.
pub fn private_run() -> Outcome<tempfile::TempDir> {
    let mut builder = tempfile::Builder::new();
    let builder = builder.prefix("coppice-");
    match builder.tempdir_in("/dev/shm") {
        Ok(folder) => Ok(folder),
        Err(_) => Ok(builder.tempdir()?),
    }
}

/// The last line of a log, where a daemon said why it ended.
fn last_line(path: &Path) -> String {
    let log = std::fs::read_to_string(path).unwrap_or_default();
    log.lines().last().map(|line| format!("({line})")).unwrap_or_default()
}
