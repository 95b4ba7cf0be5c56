//! The one file that starts processes: tapdisks.
//!
//! A tapdisk is a process of its own and outlives us. It inherits two
//! descriptors and holds them for life: its lease's, locked, and the SR
//! owner's; it makes a session of its own. On its standard output it says one line of JSON, once it serves or
//! knows why it cannot; its standard error goes to `log` in its run folder.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read};
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd};
use std::path::PathBuf;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout};
use serde::Deserialize;
use uuid::Uuid;

use crate::limits::TAP_START_MS_MAX;
use crate::remote::Remote;

/// Bytes of its first line, and of the end of its log that is looked at.
const WORDS_BYTES_MAX: u64 = 4096;

/// How a tapdisk is started: program and leading arguments, so that one
/// multi-call program will do.
#[derive(Debug, Clone)]
pub struct TapProgram {
    /// The program.
    pub program: OsString,
    /// Arguments before ours.
    pub args: Vec<OsString>,
}

/// What one tapdisk is to serve.
#[derive(Debug, Clone)]
pub struct TapOrder {
    /// The SR.
    pub sr: Uuid,
    /// Its folder.
    pub sr_folder: PathBuf,
    /// The VDI; also the export's name.
    pub vdi: Uuid,
    /// Its volume.
    pub volume: String,
    /// Where its sockets, lease and log are.
    pub run_folder: PathBuf,
    /// Where pending records of the SR are.
    pub records: PathBuf,
    /// This boot.
    pub boot: Uuid,
    /// The SR's attach epoch.
    pub epoch: u64,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Where else it listens.
    pub remote: Option<Remote>,
}

impl TapOrder {
    fn args(&self) -> Vec<OsString> {
        let mut args: Vec<OsString> = Vec::new();
        let mut option = |name: &str, value: OsString| {
            args.push(name.into());
            args.push(value);
        };
        option("--sr", self.sr.to_string().into());
        option("--sr-path", self.sr_folder.clone().into());
        option("--vdi", self.vdi.to_string().into());
        option("--volume", self.volume.clone().into());
        option("--run", self.run_folder.clone().into());
        option("--records", self.records.clone().into());
        option("--boot-id", self.boot.to_string().into());
        option("--epoch", self.epoch.to_string().into());
        if self.read_only {
            args.push("--read-only".into());
        }
        args.extend(self.remote.iter().flat_map(Remote::args));
        args
    }
}

/// The first line a tapdisk says.
#[derive(Debug, Deserialize)]
struct FirstWords {
    ready: bool,
    error: Option<String>,
    /// It was told to use something that it cannot use: an address, a file.
    #[serde(default)]
    refused: bool,
    listen: Option<SocketAddr>,
}

/// Starting is one at a time: between making copies of descriptors that a
/// child inherits and closing them again, no other child may be made.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// Starts a tapdisk and waits until it serves. Returns its process id, and the
/// TCP address if it listens on one.
///
/// # Errors
/// It could not be started, ended, or did not come up in time (it is killed
/// then); the message carries what it said. [`io::ErrorKind::InvalidInput`]: it
/// cannot use the address or the files it was told to use.
pub fn start(
    program: &TapProgram,
    order: &TapOrder,
    lease: &File,
    owner: &File,
) -> io::Result<(u32, Option<SocketAddr>)> {
    let log_path = order.run_folder.join("log");
    let log = File::options().create(true).append(true).open(&log_path)?;
    let mut child = {
        let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        // A copy made by dup is not close-on-exec, which is the point.
        let (lease, owner) = (nix::unistd::dup(lease)?, nix::unistd::dup(owner)?);
        let child = Command::new(&program.program)
            .args(&program.args)
            .args(order.args())
            .arg("--lease-fd")
            .arg(lease.as_raw_fd().to_string())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn();
        drop((lease, owner));
        child.map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", program.program.to_string_lossy())))?
    };
    let pid = child.id();
    let ready =
        child.stdout.take().ok_or_else(|| io::Error::other("no standard output")).and_then(wait_ready);
    let listen = match ready {
        Ok(listen) => listen,
        Err(error) => {
            // Killing what has ended already is no error that matters here.
            let _ = child.kill();
            let status = child.wait()?;
            if error.kind() == io::ErrorKind::InvalidInput {
                return Err(error);
            }
            let words = last_words(&log_path);
            let text = format!("{error} ({status}; its log ends: {words})");
            return Err(io::Error::new(error.kind(), text));
        }
    };
    reap_later(child, order.vdi)?;
    Ok((pid, listen))
}

/// Waits for the ready line.
fn wait_ready(mut stdout: ChildStdout) -> io::Result<Option<SocketAddr>> {
    let deadline = Instant::now() + Duration::from_millis(TAP_START_MS_MAX);
    let mut said = Vec::new();
    while !said.contains(&b'\n') && (said.len() as u64) < WORDS_BYTES_MAX {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "it did not come up in time"));
        }
        let mut fds = [PollFd::new(stdout.as_fd(), PollFlags::POLLIN)];
        let limit = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match nix::poll::poll(&mut fds, limit) {
            Ok(0) | Err(nix::Error::EINTR) => continue,
            Ok(_) => {}
            Err(error) => return Err(error.into()),
        }
        let mut buffer = [0; 256];
        match stdout.read(&mut buffer)? {
            0 => return Err(io::Error::other("it ended before it served")),
            n => said.extend_from_slice(&buffer[..n]),
        }
    }
    match serde_json::from_slice(&said) {
        Ok(FirstWords { ready: true, listen, .. }) => Ok(listen),
        Ok(FirstWords { error, refused, .. }) => {
            let kind = if refused { io::ErrorKind::InvalidInput } else { io::ErrorKind::Other };
            Err(io::Error::new(kind, error.unwrap_or_default()))
        }
        Err(_) => Err(io::Error::other(format!("it said {:?}", String::from_utf8_lossy(&said)))),
    }
}

/// One thread per tapdisk, so none stays a zombie. As many as there are
/// attached VDIs.
fn reap_later(mut child: Child, vdi: Uuid) -> io::Result<()> {
    let wait = move || match child.wait() {
        Ok(status) if status.success() => tracing::info!(%vdi, "tapdisk ended"),
        Ok(status) => tracing::warn!(%vdi, %status, "tapdisk ended"),
        Err(error) => tracing::warn!(%vdi, %error, "tapdisk"),
    };
    std::thread::Builder::new().name("tapdisk-reaper".into()).spawn(wait).map(drop)
}

fn last_words(log: &std::path::Path) -> String {
    let read = || -> io::Result<String> {
        use std::io::{Seek, SeekFrom};
        let mut file = File::open(log)?;
        let len = file.metadata()?.len();
        file.seek(SeekFrom::Start(len.saturating_sub(WORDS_BYTES_MAX)))?;
        let mut bytes = Vec::new();
        file.take(WORDS_BYTES_MAX).read_to_end(&mut bytes)?;
        let text = String::from_utf8_lossy(&bytes).into_owned();
        Ok(text.lines().last().unwrap_or_default().to_owned())
    };
    read().unwrap_or_default()
}
