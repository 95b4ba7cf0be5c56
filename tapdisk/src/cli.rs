//! The process: arguments in, a served disk out.
//!
//! Order matters here: the image is opened, and for writing locked, before
//! the sockets are bound, so that whoever reaches them reaches its holder;
//! and "ready" is said last.

use std::ffi::OsString;
use std::io::Write;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context;
use clap::Parser;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use uuid::Uuid;
use vhd::meta::Meta;
use vhd::record::TmpfsRecords;
use vhd::storage::{FileVolumes, PosixFs, VolumeName};

use crate::datapath::DataPath;
use crate::disk::{Files, Opener};
use crate::engine::Engine;
use crate::limits::{LOCK_RETRY, LOCK_WAIT_MAX};
use crate::nbd::Export;
use crate::server::{DriverChoice, Parts, Server};
use crate::service::Service;
use crate::tls::{Settings, Tls, TlsError};

/// Name of the NBD socket in the run folder.
const NBD_SOCKET: &str = "nbd.sock";
/// Name of the control socket in the run folder.
const CONTROL_SOCKET: &str = "ctl.sock";

/// Serves one virtual disk of a file repository over NBD.
#[derive(Debug, Parser)]
#[command(name = "tapdisk", version)]
struct Args {
    /// The repository's folder
    #[arg(long)]
    sr_path: PathBuf,
    /// The leaf, by its name in the repository
    #[arg(long)]
    volume: String,
    /// The VDI served
    #[arg(long)]
    vdi: Uuid,
    /// The repository
    #[arg(long)]
    sr: Uuid,
    /// Where the sockets go
    #[arg(long)]
    run: PathBuf,
    /// Where the pending records are, on memory that survives this process
    #[arg(long)]
    records: PathBuf,
    /// This boot of the host
    #[arg(long)]
    boot_id: Uuid,
    /// The repository's attach epoch
    #[arg(long)]
    epoch: u64,
    /// Open everything for reading only
    #[arg(long)]
    read_only: bool,
    /// Name of the export [default: the VDI's uuid]
    #[arg(long)]
    export: Option<String>,
    /// What moves guest data
    #[arg(long, value_enum, default_value_t)]
    driver: DriverChoice,
    /// Also listen for clients on this TCP address, such as `[::1]:10809`;
    /// port 0 takes any, and it is said with "ready"
    #[arg(long, value_name = "ADDRESS:PORT")]
    listen: Option<SocketAddr>,
    /// A folder with server-cert.pem and server-key.pem: TLS on offer to
    /// clients of this host, and required from TCP clients. Files that are
    /// replaced count for connections that begin some seconds later
    #[arg(long, value_name = "DIR")]
    tls_certificates: Option<PathBuf>,
    /// Clients must show a certificate signed by the folder's ca-cert.pem
    #[arg(long)]
    tls_verify_peer: bool,
    /// A file of pre-shared keys, in lines `user:key` with hexadecimal keys
    #[arg(long, value_name = "FILE")]
    tls_psk: Option<PathBuf>,
    /// Listen without TLS beyond this host too: anybody who reaches the
    /// address can read and write the disk
    #[arg(long)]
    insecure: bool,
    /// An inherited descriptor whose lock is the lease on the chain; held
    /// until this process ends
    #[arg(long)]
    lease_fd: Option<u32>,
}

/// What it was told to use it cannot use: whoever said so has to change that.
#[derive(Debug, thiserror::Error)]
enum Unusable {
    /// Files or settings of TLS.
    #[error("TLS: {0}")]
    Tls(#[from] TlsError),
    /// No thread that follows changes of those files.
    #[error("TLS: no thread: {0}")]
    Thread(std::io::Error),
    /// An address.
    #[error("cannot listen on {0}: {1}")]
    Address(SocketAddr, std::io::Error),
    /// An address that anybody could reach.
    #[error(
        "{0} can be reached from other hosts and nothing protects the disk: \
         give --tls-certificates or --tls-psk, or, if the network itself is safe, --insecure"
    )]
    Unprotected(SocketAddr),
}

/// Runs a tapdisk; `args` begins with the program's name. Returns when it was
/// told to stop.
pub fn run(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let args = match Args::try_parse_from(args) {
        Ok(args) => args,
        Err(error) => {
            let _ = error.print(); // there is nowhere else to say it
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    // A program that carries this one may have set it up already.
    let _ =
        tracing_subscriber::fmt().with_writer(std::io::stderr).with_ansi(false).with_target(false).try_init();
    let _span = tracing::info_span!("tapdisk", sr = %args.sr, vdi = %args.vdi).entered();
    match serve(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let message = format!("{error:#}");
            tracing::error!(error = message, "ended");
            let refused = error.is::<Unusable>();
            say(&serde_json::json!({ "ready": false, "error": message, "refused": refused }));
            ExitCode::FAILURE
        }
    }
}

fn serve(args: &Args) -> anyhow::Result<()> {
    if let Some(fd) = args.lease_fd {
        // Nothing here ever closes it, so the lock lasts as long as we do.
        std::fs::metadata(format!("/proc/self/fd/{fd}")).context("the lease is not open")?;
    }
    // A session of our own: signals to the group or the terminal of whoever
    // started us are not for us. Refused only to what leads a group already,
    // such as a command of a shell, and that is where it should stay.
    let _ = nix::unistd::setsid();
    // Before any thread starts, so that all of them leave signals to the loop.
    let signals = signals().context("signals")?;
    let (server, listens) = open(args, signals)?;
    let mut ready = serde_json::json!({ "ready": true, "pid": std::process::id() });
    if let Some(address) = listens {
        ready["listen"] = address.to_string().into();
    }
    say(&ready);
    tracing::info!(volume = args.volume, read_only = args.read_only, "ready");
    let served = server.run().context("serving");
    for socket in [NBD_SOCKET, CONTROL_SOCKET] {
        let _ = std::fs::remove_file(args.run.join(socket)); // only tidiness
    }
    tracing::info!("stopped");
    served
}

/// Opens the chain and the sockets; also the TCP address, if there is one.
fn open(args: &Args, signals: SignalFd) -> anyhow::Result<(Server<DataPath>, Option<SocketAddr>)> {
    let (tcp, tls) = listen(args)?;
    let listens = tcp.as_ref().map(TcpListener::local_addr).transpose()?;
    let top =
        VolumeName::new(&args.volume).with_context(|| format!("{:?} is not a volume name", args.volume))?;
    let opener = Opener {
        volumes: Arc::new(FileVolumes::new(Arc::new(PosixFs::new(args.sr_path.clone())))),
        records: Arc::new(TmpfsRecords::new(args.records.clone(), args.boot_id, args.epoch)),
        files: Arc::new(Files::default()),
    };
    let (engine, meta) = open_in_time(&opener, &top, args.read_only)?;
    let leaf = engine.stack().first().and_then(|image| opener.files.get(image.file));
    let export = Export {
        name: args.export.clone().unwrap_or_else(|| args.vdi.to_string()),
        description: format!("VDI {}", args.vdi),
        virtual_bytes: engine.virtual_bytes(),
        read_only: args.read_only,
        // On a file zeroing punches a hole; a device may have to write them.
        fast_zero: leaf.is_some_and(|leaf| !leaf.is_device()),
    };
    let parts = Parts {
        export,
        nbd: bind(&args.run.join(NBD_SOCKET))?,
        tcp,
        tls,
        control: bind(&args.run.join(CONTROL_SOCKET))?,
        volumes: Arc::clone(&opener.volumes),
        files: Arc::clone(&opener.files),
        signals: Some(signals),
        driver: args.driver,
    };
    let service = Service::new(opener, meta.map(|meta| (top, meta)));
    let server = Server::new(DataPath::new(engine, service), parts).context("threads")?;
    Ok((server, listens))
}

/// What is needed for clients from other hosts.
fn listen(args: &Args) -> Result<(Option<TcpListener>, Option<Tls>), Unusable> {
    let settings = Settings {
        certificates: args.tls_certificates.clone(),
        verify_peer: args.tls_verify_peer,
        psk: args.tls_psk.clone(),
    };
    let tls = Tls::load(&settings)?;
    if let Some(tls) = &tls {
        tls.follow(settings).map_err(Unusable::Thread)?;
    }
    let Some(address) = args.listen else { return Ok((None, tls)) };
    if tls.is_none() && !address.ip().is_loopback() && !args.insecure {
        return Err(Unusable::Unprotected(address));
    }
    let tcp = TcpListener::bind(address).map_err(|error| Unusable::Address(address, error))?;
    Ok((Some(tcp), tls))
}

/// Opens the chain. A process that was killed keeps its lock until the kernel
/// has ended what it had in flight; that is waited for.
fn open_in_time(
    opener: &Opener,
    top: &VolumeName,
    read_only: bool,
) -> vhd::error::Result<(Engine, Option<Meta>)> {
    let deadline = Instant::now() + LOCK_WAIT_MAX;
    loop {
        match opener.open(top, read_only) {
            Err(error) if error.is_locked() && Instant::now() < deadline => {
                std::thread::sleep(LOCK_RETRY);
            }
            opened => return opened,
        }
    }
}

/// Binds a socket, taking the place of one left by a process that died.
fn bind(path: &Path) -> anyhow::Result<UnixListener> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(error).with_context(|| path.display().to_string());
        }
        _ => {}
    }
    UnixListener::bind(path).with_context(|| path.display().to_string())
}

/// The signals that ask for an end, as a descriptor.
///
/// Not SIGHUP, which says that a terminal or whoever started us is gone: the
/// disk is served on. It comes to a stopped process when its parent ends.
fn signals() -> nix::Result<SignalFd> {
    let mut hang_up = SigSet::empty();
    hang_up.add(Signal::SIGHUP);
    hang_up.thread_block()?;
    let mut set = SigSet::empty();
    set.add(Signal::SIGTERM);
    set.add(Signal::SIGINT);
    set.thread_block()?;
    SignalFd::with_flags(&set, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)
}

/// One line to whoever started this process.
fn say(document: &serde_json::Value) {
    let mut stdout = std::io::stdout();
    let said = writeln!(stdout, "{document}").and_then(|()| stdout.flush());
    if let Err(error) = said {
        // Whoever started us does not listen; the disk is served all the same.
        tracing::warn!(%error, "cannot write to standard output");
    }
}
