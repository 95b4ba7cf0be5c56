//! `coppice up`: both daemons in the foreground, for development and for a
//! single machine without services.

use std::path::PathBuf;
use std::time::Duration;

use serde_json::json;
use tokio::signal::unix::{SignalKind, signal};

use crate::cli::{Global, RUN_DEFAULT, STATE_DEFAULT, UpArgs};
use crate::failure::{Failure, Outcome};
use crate::host::{Folders, Host, Logs, private_run};
use crate::output::{Output, say};

/// How often a daemon that ended by itself is started again, in all.
const RESTARTS_MAX: u32 = 5;
/// How often the daemons are looked at.
const WATCH: Duration = Duration::from_millis(500);

/// Runs until SIGINT or SIGTERM.
pub fn run(global: &Global, args: &UpArgs, output: Output) -> Outcome<()> {
    // The signals are caught before anything is started that they should end.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (mut interrupt, mut terminate) = {
        let _context = runtime.enter();
        (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?)
    };
    args.offer.check()?;
    let (folders, private) = folders(global, args)?;
    let mut host = Host::start(folders.clone(), Logs::Inherit, args.offer.daemon_args()?)?;
    announce(&folders, &host, output);
    let mut restarts = 0;
    let ended = loop {
        let asked = runtime.block_on(async {
            tokio::select! {
                _ = interrupt.recv() => true,
                _ = terminate.recv() => true,
                () = tokio::time::sleep(WATCH) => false,
            }
        });
        if asked {
            break Ok(());
        }
        match host.mend() {
            Ok(None) => {}
            Ok(Some(said)) if restarts < RESTARTS_MAX => {
                restarts += 1;
                say(&format!("coppice: {said}; started again ({restarts} of {RESTARTS_MAX})"));
            }
            Ok(Some(said)) => break Err(Failure::new("NOT_RUNNING", said)),
            Err(failure) => break Err(failure),
        }
    };
    host.stop(args.leave_attached);
    if args.leave_attached
        && let Some(private) = private
    {
        // The disks that stay served live in it.
        let kept = private.keep();
        say(&format!("coppice: {} stays for the attached disks", kept.display()));
    }
    ended
}

/// Where to run: as given, below `--dir`, or in a private folder that goes
/// when its guard is dropped.
fn folders(global: &Global, args: &UpArgs) -> Outcome<(Folders, Option<tempfile::TempDir>)> {
    let below = |dir: &std::path::Path| -> Outcome<Folders> {
        let dir = std::path::absolute(dir)?;
        Ok(Folders { state: dir.join("state"), run: dir.join("run") })
    };
    if let Some(dir) = &args.dir {
        let base = below(dir)?;
        let state = said(global.state.as_ref(), "COPPICE_STATE").unwrap_or(base.state);
        let run = said(global.run.as_ref(), "COPPICE_RUN").unwrap_or(base.run);
        return Ok((Folders { state, run }, None));
    }
    if global.state.is_none() && global.run.is_none() {
        let private = private_run()?;
        return Ok((below(private.path())?, Some(private)));
    }
    let state = global.state.clone().unwrap_or_else(|| STATE_DEFAULT.into());
    let run = global.run.clone().unwrap_or_else(|| RUN_DEFAULT.into());
    Ok((Folders { state: std::path::absolute(state)?, run: std::path::absolute(run)? }, None))
}

/// A folder that was given as an option. What stands in the environment is
/// perhaps that of another `up`, and no answer to `--dir`.
fn said(folder: Option<&PathBuf>, variable: &str) -> Option<PathBuf> {
    folder.filter(|folder| std::env::var_os(variable).is_none_or(|set| set != folder.as_os_str())).cloned()
}

fn announce(folders: &Folders, host: &Host, output: Output) {
    let (state, run) = (folders.state.display(), folders.run.display());
    let document = json!({
        "state": folders.state, "run": folders.run,
        "smd_pid": host.smd_pid(), "gcd_pid": host.gcd_pid(),
    });
    output.result(&document, || format!("export COPPICE_STATE={state} COPPICE_RUN={run}\n"));
    say("coppice: up; Ctrl-C ends it");
}
