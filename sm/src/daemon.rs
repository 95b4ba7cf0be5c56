//! smd as a program: arguments in, exit status out.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context;
use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};

use crate::access::Rights;
use crate::api;
use crate::manager::{Manager, Settings};
use crate::offer::OfferArgs;
use crate::sd_notify::Notifier;
use crate::spawn::TapProgram;

/// The storage daemon: SRs and VDIs of this host.
#[derive(Debug, Parser)]
#[command(name = "smd", version)]
struct Args {
    /// State folder
    #[arg(long, env = "COPPICE_STATE", default_value = "/var/lib/coppice")]
    state: PathBuf,
    /// Run folder, best on tmpfs
    #[arg(long, env = "COPPICE_RUN", default_value = "/run/coppice")]
    run: PathBuf,
    /// Program that serves a disk
    #[arg(long, default_value = "tapdisk")]
    tapdisk: OsString,
    /// An argument before ours for that program; may be given several times
    #[arg(long = "tapdisk-arg", allow_hyphen_values = true)]
    tapdisk_args: Vec<OsString>,
    /// Group whose members may use the API, besides root and ourselves
    #[arg(long)]
    group: Option<String>,
    /// Socket of the collector [default: gcd.sock in the run folder]
    #[arg(long)]
    gcd_socket: Option<PathBuf>,
    /// Where disks are offered.
    #[command(flatten)]
    offer: OfferArgs,
}

/// Runs smd with the arguments of a process, its name first, until SIGTERM
/// or SIGINT. Attached disks are served on after its end.
pub fn run(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let args = match Args::try_parse_from(args) {
        Ok(args) => args,
        Err(error) => {
            // Nothing to say it on is no reason for another exit status.
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { 2 } else { 0 });
        }
    };
    // Fails when a program that carries us has set one up already.
    let _ = tracing_subscriber::fmt().with_writer(std::io::stderr).with_ansi(false).try_init();
    match serve(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn serve(args: Args) -> anyhow::Result<()> {
    let run = std::path::absolute(&args.run).context("run folder")?;
    let offer = args.offer.remote()?;
    let settings = Settings {
        state: std::path::absolute(&args.state).context("state folder")?,
        gcd_socket: args.gcd_socket.unwrap_or_else(|| run.join("gcd.sock")),
        tapdisk: TapProgram { program: args.tapdisk, args: args.tapdisk_args },
        run,
        offer,
    };
    let rights = Rights::new(args.group.as_deref()).context("group")?;
    let notifier = Arc::new(Notifier::from_env());
    let manager = Arc::new(Manager::open(settings)?);
    crate::caretaker::start(&manager).context("caretaker")?;
    let socket = manager.run().join("smd.sock");
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .max_blocking_threads(2 * crate::limits::REQUESTS_AT_ONCE_MAX)
        .build()?;
    runtime.block_on(async {
        let (mut terminate, mut interrupt) =
            (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        let ended = async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        };
        let attached = manager.known().iter().filter(|sr| sr.attached).count();
        let watchdog = tokio::spawn(watch(notifier.clone(), manager.clone()));
        let saying = notifier.clone();
        let ended = async move {
            ended.await;
            saying.stopping();
        };
        let ready = move || notifier.ready(&format!("{attached} repositories attached"));
        let served = api::serve(manager, &socket, rights, ready, ended).await;
        watchdog.abort();
        served
    })
}

/// Says that we live as long as a thread for requests can be had and the list
/// of SRs be looked at.
async fn watch(notifier: Arc<Notifier>, manager: Arc<Manager>) {
    let Some(pace) = notifier.pace() else {
        return;
    };
    loop {
        let manager = manager.clone();
        if tokio::task::spawn_blocking(move || manager.known().len()).await.is_ok() {
            notifier.alive();
        }
        tokio::time::sleep(pace).await;
    }
}
