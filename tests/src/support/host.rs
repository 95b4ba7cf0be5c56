//! A host of its own for each test: real smd and gcd on private folders,
//! which may be killed and started again.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tempfile::TempDir;

use super::programs::{coppice, output};

/// Longest wait for anything a test waits for.
pub const LIMIT: Duration = Duration::from_secs(60);
/// How often it looks.
const POLL: Duration = Duration::from_millis(10);

/// Waits until `done` says so.
pub fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !done() {
        assert!(Instant::now() < deadline, "waited {LIMIT:?} for {what}");
        std::thread::sleep(POLL);
    }
}

/// A daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Daemon {
    /// The storage daemon.
    Smd,
    /// The garbage collector.
    Gcd,
}

/// What a command came to.
#[derive(Debug)]
pub struct Said {
    /// Exit status.
    pub status: i32,
    /// The one document on standard output; null when there was none.
    pub json: Value,
    /// Standard error.
    pub stderr: String,
}

impl Said {
    /// The code of the error, or nothing.
    pub fn code(&self) -> &str {
        self.json["error"]["code"].as_str().unwrap_or_default()
    }
}

/// Folders and daemons; everything ends with it.
#[derive(Debug)]
pub struct Host {
    data: TempDir,
    run: TempDir,
    smd: Option<Child>,
    gcd: Option<Child>,
    /// What gcd is given besides its folders.
    gcd_args: &'static [&'static str],
}

impl Host {
    /// Both daemons up on new folders.
    pub fn new() -> Self {
        let mut host = Self::without_daemons();
        host.start(Daemon::Smd);
        host.start(Daemon::Gcd);
        host
    }

    /// Both daemons, gcd looking only when it is kicked.
    pub fn without_rounds() -> Self {
        let mut host = Self::without_daemons();
        host.gcd_args = &["--look-every", "86400"];
        host.start(Daemon::Smd);
        host.start(Daemon::Gcd);
        host
    }

    /// Folders only.
    pub fn without_daemons() -> Self {
        let mut builder = tempfile::Builder::new();
        let builder = builder.prefix("coppice-test-");
        // Images on a real disk, sockets where paths are short.
        let data = builder.tempdir_in("/var/tmp").unwrap();
        let run = builder.tempdir_in("/dev/shm").or_else(|_| builder.tempdir()).unwrap();
        let host = Self { data, run, smd: None, gcd: None, gcd_args: &[] };
        std::fs::create_dir(host.state()).unwrap();
        host
    }

    /// The folder for images and whatever the test makes.
    pub fn data(&self) -> &Path {
        self.data.path()
    }

    /// The state folder.
    pub fn state(&self) -> PathBuf {
        self.data().join("state")
    }

    /// The run folder.
    pub fn run_dir(&self) -> &Path {
        self.run.path()
    }

    /// Starts a daemon and waits until it answers.
    pub fn start(&mut self, daemon: Daemon) {
        let mut child = self.spawn(daemon);
        let verb: &[&str] = match daemon {
            Daemon::Smd => &["sr", "list"],
            Daemon::Gcd => &["gc", "status"],
        };
        wait_until("a daemon to answer", || {
            if let Some(status) = child.try_wait().unwrap() {
                panic!("{daemon:?} ended: {status}\n{}", self.log(daemon));
            }
            self.cli(verb).status == 0
        });
        *self.slot(daemon) = Some(child);
    }

    /// Starts a daemon without waiting for anything.
    pub fn spawn(&self, daemon: Daemon) -> Child {
        let log = std::fs::File::options().create(true).append(true).open(self.log_path(daemon));
        let mut command = Command::new(coppice());
        command.arg("daemon").arg(name(daemon));
        command.arg("--state").arg(self.state()).arg("--run").arg(self.run_dir());
        if daemon == Daemon::Smd {
            command.arg("--tapdisk").arg(coppice());
            command.args(["--tapdisk-arg", "daemon", "--tapdisk-arg", "tapdisk"]);
        }
        if daemon == Daemon::Gcd {
            command.args(self.gcd_args);
        }
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log.unwrap());
        command.spawn().unwrap()
    }

    /// Kills a daemon as `kill -9` does.
    pub fn kill(&mut self, daemon: Daemon) {
        let mut child = self.slot(daemon).take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// What a daemon has logged.
    pub fn log(&self, daemon: Daemon) -> String {
        std::fs::read_to_string(self.log_path(daemon)).unwrap_or_default()
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(coppice());
        command.arg("--json").args(args);
        command.arg("--state").arg(self.state()).arg("--run").arg(self.run_dir());
        command
    }

    /// Starts `coppice --json` with `args` and does not wait for it.
    pub fn begin(&self, args: &[&str]) -> Child {
        let mut command = self.command(args);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
    }

    /// Runs `coppice --json` with `args`.
    pub fn cli(&self, args: &[&str]) -> Said {
        let output = output(&mut self.command(args));
        let stdout = String::from_utf8_lossy(&output.stdout);
        let json = if stdout.is_empty() {
            Value::Null
        } else {
            serde_json::from_str(&stdout).unwrap_or_else(|e| panic!("{args:?}: {e}: {stdout}"))
        };
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        Said { status: output.status.code().unwrap_or(-1), json, stderr }
    }

    /// Runs a command that must succeed; its document.
    pub fn ok(&self, args: &[&str]) -> Value {
        let said = self.cli(args);
        assert_eq!(said.status, 0, "{args:?}: {}\n{}", said.stderr, self.log(Daemon::Smd));
        said.json
    }

    /// Runs a command that must fail with `code`, status 1 and a reason.
    pub fn refused(&self, args: &[&str], code: &str) -> Said {
        let said = self.cli(args);
        assert_eq!((said.status, said.code()), (1, code), "{args:?}: {said:?}");
        assert!(said.stderr.contains(said.json["error"]["message"].as_str().unwrap()), "{said:?}");
        said
    }

    /// A new file SR called `name` in the data folder; its folder.
    pub fn sr(&self, name: &str) -> PathBuf {
        let path = self.data().join(name);
        std::fs::create_dir_all(&path).unwrap();
        self.ok(&["sr", "create", name, "--type", "file", "--path", path.to_str().unwrap()]);
        path
    }

    /// A new disk; its uuid.
    pub fn disk(&self, sr: &str, name: &str, size: &str) -> String {
        let vdi = self.ok(&["vdi", "create", sr, name, "--size", size]);
        vdi["uuid"].as_str().unwrap().to_owned()
    }

    /// Attaches a disk.
    pub fn attach(&self, vdi: &str) -> Attached {
        Attached::of(&self.ok(&["vdi", "attach", vdi]))
    }

    /// Attaches a disk that is not to be written.
    pub fn attach_read_only(&self, vdi: &str) -> Attached {
        Attached::of(&self.ok(&["vdi", "attach", "--read-only", vdi]))
    }

    /// What a daemon says to Prometheus.
    pub fn metrics(&self, daemon: Daemon) -> String {
        self.get(daemon, "/metrics")
    }

    /// What a daemon answers to a request that must succeed.
    pub fn get(&self, daemon: Daemon, path: &str) -> String {
        let mut socket = UnixStream::connect(self.run_dir().join(format!("{}.sock", name(daemon)))).unwrap();
        write!(socket, "GET {path} HTTP/1.0\r\n\r\n").unwrap();
        let mut text = String::new();
        socket.read_to_string(&mut text).unwrap();
        assert!(text.starts_with("HTTP/1.0 200") || text.starts_with("HTTP/1.1 200"), "{path}: {text}");
        let (_, body) = text.split_once("\r\n\r\n").unwrap();
        body.to_owned()
    }

    /// The process of a daemon.
    pub fn pid(&self, daemon: Daemon) -> u32 {
        let child = match daemon {
            Daemon::Smd => &self.smd,
            Daemon::Gcd => &self.gcd,
        };
        child.as_ref().unwrap().id()
    }

    fn slot(&mut self, daemon: Daemon) -> &mut Option<Child> {
        match daemon {
            Daemon::Smd => &mut self.smd,
            Daemon::Gcd => &mut self.gcd,
        }
    }

    fn log_path(&self, daemon: Daemon) -> PathBuf {
        self.data().join(format!("{}.log", name(daemon)))
    }

    /// Pids of the tapdisks of this host, from their leases.
    fn tapdisks(&self) -> Vec<i32> {
        let Ok(folders) = std::fs::read_dir(self.run_dir().join("tap")) else { return Vec::new() };
        let leases = folders.flatten().filter_map(|f| std::fs::read(f.path().join("lease")).ok());
        let pid = |lease: Vec<u8>| serde_json::from_slice::<Value>(&lease).ok()?["pid"].as_i64();
        leases.filter_map(pid).filter_map(|pid| i32::try_from(pid).ok()).collect()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let tapdisks = self.tapdisks();
        for child in [&mut self.smd, &mut self.gcd].into_iter().flatten() {
            let _ = child.kill();
            let _ = child.wait();
        }
        for pid in tapdisks {
            // Only if it is still ours: the pid may be somebody else's by now.
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let ours = self.run_dir().as_os_str().as_encoded_bytes();
            if line.windows(ours.len()).any(|part| part == ours) {
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
        }
        if std::thread::panicking() {
            for daemon in [Daemon::Smd, Daemon::Gcd] {
                eprintln!("--- {daemon:?}\n{}", self.log(daemon));
            }
        }
    }
}

/// Where an attached disk is served.
#[derive(Debug, Clone)]
pub struct Attached {
    /// NBD URI.
    pub uri: String,
    /// The socket in it.
    pub socket: PathBuf,
    /// The export in it.
    pub export: String,
    /// The tapdisk.
    pub pid: i32,
}

impl Attached {
    /// Where `vdi attach` or `vdi show` says it is.
    pub fn of(answer: &Value) -> Self {
        let uri = answer["nbd"].as_str().unwrap().to_owned();
        let export = uri.strip_prefix("nbd+unix:///").unwrap().split('?').next().unwrap();
        Self {
            export: export.to_owned(),
            socket: answer["socket"].as_str().unwrap().into(),
            pid: i32::try_from(answer["pid"].as_i64().unwrap()).unwrap(),
            uri,
        }
    }

    /// Whether somebody serves it.
    pub fn answers(&self) -> bool {
        coppice::nbd_client::Client::connect(&self.socket, &self.export).is_ok()
    }

    /// Kills its tapdisk as `kill -9` does, unless it is gone.
    pub fn kill_if_alive(&self) {
        // Only if it is still ours: the pid may be somebody else's by now.
        let line = std::fs::read(format!("/proc/{}/cmdline", self.pid)).unwrap_or_default();
        let export = self.export.as_bytes();
        if line.windows(export.len()).any(|part| part == export) {
            let _ = kill(Pid::from_raw(self.pid), Signal::SIGKILL);
        }
    }

    /// Kills its tapdisk as `kill -9` does.
    pub fn kill(&self) {
        kill(Pid::from_raw(self.pid), Signal::SIGKILL).unwrap();
        // smd reaps it; until then it is a zombie, which is as dead.
        wait_until("the tapdisk to die", || {
            std::fs::read_to_string(format!("/proc/{}/stat", self.pid))
                .map_or(true, |stat| stat.rsplit(')').next().is_some_and(|s| s.starts_with(" Z")))
        });
    }
}

fn name(daemon: Daemon) -> &'static str {
    match daemon {
        Daemon::Smd => "smd",
        Daemon::Gcd => "gcd",
    }
}
