//! The one file that starts programs: tapdisks, peers' servers, fio.
//!
//! A server is killed when it is dropped, a tapdisk asked to end first.

use std::ffi::{OsStr, OsString};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use uuid::Uuid;

use crate::images::{Image, Images};
use crate::nbd::Connection;

/// Name of every export.
pub const EXPORT: &str = "disk";
/// Longest wait for a server to come up or to end.
const SERVER_S_MAX: u64 = 120;

/// Programs of others that measures need.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tool {
    /// The load on raw files.
    Fio,
    /// The peer.
    QemuNbd,
    /// Makes qcow2 chains.
    QemuImg,
    /// Another peer.
    Nbdkit,
    /// The client for TLS.
    Nbdcopy,
}

impl Tool {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Fio, Self::QemuNbd, Self::QemuImg, Self::Nbdkit, Self::Nbdcopy];

    /// Name of the program.
    #[must_use]
    pub fn program(self) -> &'static str {
        match self {
            Self::Fio => "fio",
            Self::QemuNbd => "qemu-nbd",
            Self::QemuImg => "qemu-img",
            Self::Nbdkit => "nbdkit",
            Self::Nbdcopy => "nbdcopy",
        }
    }

    /// The Debian and Ubuntu package it is in.
    #[must_use]
    pub fn package(self) -> &'static str {
        match self {
            Self::Fio => "fio",
            Self::QemuNbd | Self::QemuImg => "qemu-utils",
            Self::Nbdkit => "nbdkit",
            Self::Nbdcopy => "libnbd-bin",
        }
    }

    /// Whether it is in PATH.
    #[must_use]
    pub fn is_there(self) -> bool {
        let path = std::env::var_os("PATH").unwrap_or_default();
        std::env::split_paths(&path).any(|folder| folder.join(self.program()).is_file())
    }
}

/// How a peer reads and writes its file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Aio {
    /// io_uring.
    Uring,
    /// Linux native AIO.
    Native,
}

impl Aio {
    /// Both, the better of which is the peer.
    pub const BOTH: [Self; 2] = [Self::Uring, Self::Native];

    fn of_qemu(self) -> &'static str {
        match self {
            Self::Uring => "io_uring",
            Self::Native => "native",
        }
    }

    /// As fio calls it.
    #[must_use]
    pub fn of_fio(self) -> &'static str {
        match self {
            Self::Uring => "io_uring",
            Self::Native => "libaio",
        }
    }
}

/// A running NBD server.
#[derive(Debug)]
pub struct Server {
    child: Child,
    socket: PathBuf,
    control: Option<PathBuf>,
    /// The TCP address it listens on as well, if it was told to.
    listen: Option<String>,
}

impl Server {
    /// A tapdisk on the leaf of a chain. `program` is what runs with the
    /// tapdisk's arguments, `more` included: this program itself unless told
    /// otherwise.
    ///
    /// # Errors
    /// What it said instead of "ready".
    pub fn tapdisk(program: &TapProgram, images: &Images, leaf: &Image, more: &[&OsStr]) -> Result<Self> {
        let run = images.run_folder().join(format!("tap-{}", number()));
        std::fs::create_dir(&run)?;
        let id = Uuid::new_v4().to_string();
        let mut child = Command::new(&program.path)
            .args(&program.args)
            .arg("--sr-path")
            .arg(images.repository())
            .arg("--run")
            .arg(&run)
            .arg("--records")
            .arg(images.records_folder())
            .args(["--volume", leaf.volume.as_str(), "--vdi", &id, "--sr", &id, "--export", EXPORT])
            .args(["--boot-id", &Uuid::nil().to_string(), "--epoch", "1"])
            .args(more)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .with_context(|| program.path.display().to_string())?;
        let mut line = String::new();
        let stdout = child.stdout.take().context("no standard output")?;
        BufReader::new(stdout).read_line(&mut line)?;
        let (socket, control) = (run.join("nbd.sock"), Some(run.join("ctl.sock")));
        let mut server = Self { child, socket, control, listen: None };
        let said: serde_json::Value = serde_json::from_str(&line)?;
        if said["ready"] != true {
            bail!("tapdisk: {line}");
        }
        server.listen = said["listen"].as_str().map(str::to_owned);
        Ok(server)
    }

    /// qemu-nbd on a raw file or a qcow2 chain, past the page cache. Several
    /// may serve one file, one after another.
    ///
    /// # Errors
    /// It cannot be started or does not come up.
    pub fn qemu_nbd(images: &Images, file: &Path, format: &str, aio: Aio) -> Result<Self> {
        let socket = images.run_folder().join(format!("qemu-{}.sock", number()));
        let mut options = OsString::from(format!("driver={format},file.driver=file,file.locking=off,"));
        options.push("file.filename=");
        options.push(file);
        let mut command = Command::new(Tool::QemuNbd.program());
        command.arg("--socket").arg(&socket).args(["--export-name", EXPORT, "--persistent", "--shared=8"]);
        command.args(["--cache=none", &format!("--aio={}", aio.of_qemu()), "--discard=unmap"]);
        command.arg("--image-opts").arg(options);
        Self::peer(command, socket)
    }

    /// nbdkit's file plugin (which goes through the page cache).
    ///
    /// # Errors
    /// It cannot be started or does not come up.
    pub fn nbdkit_file(images: &Images, file: &Path) -> Result<Self> {
        let socket = images.run_folder().join(format!("nbdkit-{}.sock", number()));
        let mut command = Command::new(Tool::Nbdkit.program());
        command.args(["--foreground", "--unix"]).arg(&socket).arg("file").arg(file);
        Self::peer(command, socket)
    }

    fn peer(mut command: Command, socket: PathBuf) -> Result<Self> {
        command.stdin(Stdio::null()).stdout(Stdio::null());
        let child = command.spawn().with_context(|| format!("{command:?}"))?;
        let mut server = Self { child, socket, control: None, listen: None };
        let deadline = Instant::now() + Duration::from_secs(SERVER_S_MAX);
        while server.connect().is_err() {
            if let Some(status) = server.child.try_wait()? {
                bail!("{command:?} ended: {status}");
            }
            if Instant::now() > deadline {
                bail!("{command:?} did not come up in {SERVER_S_MAX} s");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(server)
    }

    /// A new connection.
    ///
    /// # Errors
    /// What connecting says.
    pub fn connect(&self) -> std::io::Result<Connection> {
        Connection::open(&self.socket, EXPORT)
    }

    /// Its NBD URI.
    #[must_use]
    pub fn uri(&self) -> String {
        format!("nbd+unix:///{EXPORT}?socket={}", self.socket.display())
    }

    /// Its address for clients over TCP.
    ///
    /// # Errors
    /// It was not told to listen.
    pub fn tcp_address(&self) -> Result<&str> {
        self.listen.as_deref().context("it does not listen on TCP")
    }

    /// A new control connection; tapdisks only.
    ///
    /// # Errors
    /// What connecting says.
    pub fn control(&self) -> Result<tapdisk_control::Client> {
        let socket = self.control.as_deref().context("only a tapdisk has a control socket")?;
        Ok(tapdisk_control::Client::connect(socket, Duration::from_secs(SERVER_S_MAX))?)
    }

    /// CPU time its threads have used, kernel threads that work for them
    /// included, in microseconds. The kernel tells it in ticks of 10 ms.
    ///
    /// # Errors
    /// It is gone.
    pub fn cpu_us(&self) -> Result<f64> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id()))?;
        let ticks_per_s = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK)?.context("clock ticks")?;
        let ticks = cpu_ticks(&stat).context("/proc/PID/stat")?;
        Ok(ticks as f64 * 1e6 / ticks_per_s as f64)
    }

    /// Resident memory in bytes.
    ///
    /// # Errors
    /// It is gone.
    pub fn resident_bytes(&self) -> Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("VmRSS")?;
        let kib: u64 = line.trim().trim_end_matches(" kB").trim().parse()?;
        Ok(kib * 1024)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // A tapdisk settles its image first: another may follow on it.
        if self.control.is_some() {
            let _ = kill(Pid::from_raw(self.child.id().cast_signed()), Signal::SIGTERM);
            let deadline = Instant::now() + Duration::from_secs(SERVER_S_MAX);
            while matches!(self.child.try_wait(), Ok(None)) && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(2));
            }
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// User and system time in `/proc/PID/stat`, behind the name, which may hold
/// anything.
fn cpu_ticks(stat: &str) -> Option<u64> {
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some(user + system)
}

/// How a tapdisk is started.
#[derive(Debug, Clone)]
pub struct TapProgram {
    /// The program.
    pub path: PathBuf,
    /// What comes before the tapdisk's own arguments.
    pub args: Vec<OsString>,
}

/// A load of fio.
#[derive(Debug, Clone)]
pub struct FioJob<'a> {
    /// `randread`, `read`, `write`…
    pub rw: &'a str,
    /// Bytes of a request.
    pub request_bytes: u32,
    /// Requests in flight.
    pub depth: usize,
    /// How long.
    pub time: Duration,
}

/// What fio came to, in requests per second, on a raw file past the page
/// cache.
///
/// # Errors
/// It failed, or what it printed is not understood.
pub fn fio_raw(file: &Path, aio: Aio, job: &FioJob<'_>) -> Result<f64> {
    let mut filename = OsString::from("--filename=");
    filename.push(file);
    fio(&[&filename, OsStr::new(&format!("--ioengine={}", aio.of_fio())), OsStr::new("--direct=1")], job)
}

/// The same through fio's own NBD client.
///
/// # Errors
/// As [`fio_raw`].
pub fn fio_nbd(uri: &str, size_bytes: u64, job: &FioJob<'_>) -> Result<f64> {
    let (uri, size) = (format!("--uri={uri}"), format!("--size={size_bytes}"));
    fio(&[OsStr::new("--ioengine=nbd"), OsStr::new(&uri), OsStr::new(&size)], job)
}

fn fio(target: &[&OsStr], job: &FioJob<'_>) -> Result<f64> {
    let output = Command::new(Tool::Fio.program())
        .args(["--name=load", "--output-format=json", "--time_based", "--norandommap", "--randrepeat=0"])
        .args(target)
        .arg(format!("--rw={}", job.rw))
        .arg(format!("--bs={}", job.request_bytes))
        .arg(format!("--iodepth={}", job.depth))
        .arg(format!("--runtime={}ms", job.time.as_millis()))
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .output()
        .context("fio")?;
    let said = String::from_utf8_lossy(&output.stdout);
    // Some engines print a line before the document.
    let document = said.find('{').map_or("", |at| &said[at..]);
    if !output.status.success() || document.is_empty() {
        bail!("fio: {}: {}{}", output.status, said, String::from_utf8_lossy(&output.stderr));
    }
    let document: serde_json::Value = serde_json::from_str(document)?;
    let side = if job.rw.ends_with("write") { "write" } else { "read" };
    let rate = document["jobs"][0][side]["iops"].as_f64().context("fio: no iops")?;
    if document["jobs"][0]["error"] != 0 || rate <= 0.0 {
        bail!("fio: error {}", document["jobs"][0]["error"]);
    }
    Ok(rate)
}

/// Reads a whole export once, from its first byte to its last, on one
/// connection; requests per second, the time the program takes to start
/// included.
///
/// # Errors
/// nbdcopy failed, with what it said.
pub fn nbdcopy(uri: &str, size_bytes: u64, request_bytes: u32, depth: usize) -> Result<f64> {
    let mut command = Command::new(Tool::Nbdcopy.program());
    command.args(["--connections=1", "--threads=1", "--no-extents"]);
    command.arg(format!("--requests={depth}")).arg(format!("--request-size={request_bytes}"));
    let began = Instant::now();
    let output = command.args([uri, "null:"]).stdin(Stdio::null()).output().context("nbdcopy")?;
    let seconds = began.elapsed().as_secs_f64();
    if !output.status.success() {
        bail!("nbdcopy: {}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(size_bytes as f64 / f64::from(request_bytes) / seconds)
}

/// An empty qcow2 image over `backing`.
///
/// # Errors
/// qemu-img failed.
pub fn qcow2(path: &Path, bytes: u64, backing: Option<&Path>) -> Result<()> {
    let mut command = Command::new(Tool::QemuImg.program());
    command.args(["create", "-q", "-f", "qcow2"]);
    if let Some(backing) = backing {
        command.args(["-F", "qcow2", "-b"]).arg(backing);
    }
    let status = command.arg(path).arg(bytes.to_string()).stdin(Stdio::null()).status()?;
    if !status.success() {
        bail!("{command:?}: {status}");
    }
    Ok(())
}

/// For names that no other server has.
fn number() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_time_is_read_behind_any_name() {
        let stat = "12 (a) b (c) S 1 12 12 0 -1 4194304 100 0 0 0 250 31 0 0 20 0 1 0 5 6 7";
        assert_eq!(cpu_ticks(stat), Some(281));
        assert_eq!(cpu_ticks("12 (x) S 1"), None);
    }
}
