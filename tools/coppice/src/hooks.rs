//! Commands run before and after a snapshot, to freeze and thaw guests.
//!
//! They run here and not in smd: smd may be root, and whoever may take a
//! snapshot need not be allowed to run anything as root. smd is asked twice
//! instead: its job holds once nothing else is before it, so that guests are
//! frozen for the instant alone and not for a queue; and it says when the
//! instant is over, so that they are thawed before images are settled.

use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use crate::failure::{Failure, Outcome};

/// How often a running hook is looked at.
const POLL: Duration = Duration::from_millis(20);

/// Runs a shell command with a time limit; the disks stand in
/// `COPPICE_VDIS`. What it prints goes to standard error.
///
/// # Errors
/// `HOOK_FAILED`: it could not be started, ended with another status than 0,
/// took longer than `limit` (then it and all it started are killed), or
/// `stopped` said so.
pub fn run(
    which: &str,
    command: &str,
    vdis: &[String],
    limit: Duration,
    stopped: impl Fn() -> bool,
) -> Outcome<()> {
    let failed = |why: String| Failure::new("HOOK_FAILED", format!("the {which} hook `{command}` {why}"));
    // Standard output is for one document, or for tables.
    let words = std::io::stderr().as_fd().try_clone_to_owned()?;
    let child = Command::new("/bin/sh")
        .args(["-c", command])
        .env("COPPICE_VDIS", vdis.join(" "))
        .stdin(Stdio::null())
        .stdout(words)
        .process_group(0)
        .spawn();
    let mut child = child.map_err(|e| failed(format!("could not be started: {e}")))?;
    let outcome = wait(&mut child, limit, stopped);
    if outcome.is_err() {
        // The whole group: what it started must not go on without it.
        if let Ok(group) = i32::try_from(child.id()) {
            let _ = killpg(Pid::from_raw(group), Signal::SIGKILL);
        }
        let _ = child.wait();
    }
    let status = outcome.map_err(failed)?;
    if status.success() { Ok(()) } else { Err(failed(format!("failed: {status}"))) }
}

fn wait(
    child: &mut Child,
    limit: Duration,
    stopped: impl Fn() -> bool,
) -> Result<std::process::ExitStatus, String> {
    let begun = Instant::now();
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return Ok(status),
            Ok(None) => {}
            Err(error) => return Err(format!("cannot be waited for: {error}")),
        }
        if begun.elapsed() >= limit {
            return Err(format!("took longer than {} s and was killed", limit.as_secs()));
        }
        if stopped() {
            return Err("was stopped".to_owned());
        }
        std::thread::sleep(POLL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hook(command: &str, limit_ms: u64) -> Outcome<()> {
        run("before", command, &["a".into(), "b".into()], Duration::from_millis(limit_ms), || false)
    }

    #[test]
    fn a_hook_knows_its_disks_and_its_status_counts() {
        hook(r#"test "$COPPICE_VDIS" = "a b""#, 60_000).unwrap();
        let failed = hook("exit 3", 60_000).unwrap_err();
        assert_eq!(failed.code, "HOOK_FAILED");
        assert!(failed.message.contains("exit 3") && failed.message.contains("status: 3"), "{failed}");
    }

    #[test]
    fn a_hook_that_hangs_is_killed_with_all_it_started() {
        let folder = tempfile::tempdir().unwrap();
        let mark = folder.path().join("mark");
        let begun = Instant::now();
        let late = hook(&format!("(sleep 2; touch {}) & sleep 100", mark.display()), 100).unwrap_err();
        assert!(late.message.contains("took longer"), "{late}");
        assert!(begun.elapsed() < Duration::from_secs(50));
        std::thread::sleep(Duration::from_millis(2500));
        assert!(!mark.exists());
    }
}
