//! The process gcd: arguments in, a served socket, out on a signal.

use std::ffi::OsString;
use std::fs::File;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use clap::Parser;
use sm::access::{Checked, Rights};
use sm::sd_notify::Notifier;
use tokio::signal::unix::{SignalKind, signal};

use crate::api;
use crate::limits;
use crate::service::Service;

/// Collects garbage and merges chains in the attached repositories.
#[derive(Debug, Parser)]
#[command(name = "gcd", version)]
struct Args {
    /// Folder of the state that survives the power
    #[arg(long, env = "COPPICE_STATE", default_value = "/var/lib/coppice")]
    state: PathBuf,
    /// Folder of sockets and of what survives only a process
    #[arg(long, env = "COPPICE_RUN", default_value = "/run/coppice")]
    run: PathBuf,
    /// Group whose members may use the API, besides root and ourselves
    #[arg(long)]
    group: Option<String>,
    /// Seconds between two looks of its own at a repository, at most a day; who
    /// changes one kicks, and is not waited for
    #[arg(long, value_name = "SECONDS", default_value_t = limits::LOOK_EVERY.as_secs(), value_parser = clap::value_parser!(u64).range(1..=limits::LOOK_EVERY_MAX_S))]
    look_every: u64,
}

/// Becomes gcd; returns when it is told to end. `args` begin with the
/// program's name.
pub fn run(args: impl IntoIterator<Item = impl Into<OsString> + Clone>) -> ExitCode {
    let args = match Args::try_parse_from(args) {
        Ok(args) => args,
        Err(error) => {
            error.print().ok();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    let filter = tracing_subscriber::EnvFilter::builder()
        .with_default_directive(tracing::level_filters::LevelFilter::INFO.into())
        .from_env_lossy();
    // Somebody may have set one up already: then that one serves.
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .try_init()
        .ok();
    match serve(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("gcd: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn serve(args: &Args) -> anyhow::Result<()> {
    for folder in [&args.state, &args.run] {
        std::fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
    }
    let _lock = only_one(args)?;
    let service = Service::new(&args.state, &args.run, Duration::from_secs(args.look_every))
        .context("read the settings")?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let attending = service.clone();
    let thread = std::thread::Builder::new().name("attend".into()).spawn(move || attending.attend())?;
    let served = runtime.block_on(listen(args, service.clone()));
    service.close();
    if thread.join().is_err() {
        tracing::error!("the thread that follows attached SRs panicked");
    }
    std::fs::remove_file(args.run.join("gcd.sock")).ok();
    // Requests that still wait are broken off.
    runtime.shutdown_background();
    served
}

/// Refuses a second gcd on one run folder.
fn only_one(args: &Args) -> anyhow::Result<File> {
    let path = args.run.join("gcd.lock");
    let file = File::options().create(true).truncate(false).write(true).open(&path)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(_) => anyhow::bail!("another gcd serves {}", args.run.display()),
    }
}

async fn listen(args: &Args, service: Arc<Service>) -> anyhow::Result<()> {
    let path = args.run.join("gcd.sock");
    // Ours: we hold the lock, so whoever left it is gone.
    std::fs::remove_file(&path).ok();
    let rights = Rights::new(args.group.as_deref()).context("group")?;
    let listener = Checked::bind(&path, rights).with_context(|| format!("listen on {}", path.display()))?;
    let notifier = Notifier::from_env();
    let mut term = signal(SignalKind::terminate())?;
    let mut int = signal(SignalKind::interrupt())?;
    tracing::info!(socket = %path.display(), "gcd: ready");
    notifier.ready("collecting");
    let server = axum::serve(listener, api::router(service.clone()));
    tokio::select! {
        ended = async { server.await } => ended.context("serve")?,
        _ = term.recv() => tracing::info!("gcd: told to end"),
        _ = int.recv() => tracing::info!("gcd: told to end"),
        () = live(&notifier) => {}
    }
    notifier.stopping();
    Ok(())
}

/// Tells the service manager that we live; never ends.
async fn live(notifier: &Notifier) {
    loop {
        match notifier.pace() {
            Some(pace) => {
                notifier.alive();
                tokio::time::sleep(pace).await;
            }
            None => std::future::pending().await,
        }
    }
}
