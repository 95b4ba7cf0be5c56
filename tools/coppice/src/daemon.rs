//! The daemons inside this program.
//!
//! `coppice daemon smd …` is smd, and so on: one program is enough to run
//! everything, so `cargo run --release -- demo` needs nothing else built.

use std::ffi::OsString;
use std::process::ExitCode;

use crate::cli::DaemonCommand;

/// Becomes the daemon; returns when it ends.
pub fn run(command: DaemonCommand) -> ExitCode {
    match command {
        DaemonCommand::Smd(rest) => sm::run(argv("smd", rest.args)),
        DaemonCommand::Gcd(rest) => gc::run(argv("gcd", rest.args)),
        DaemonCommand::Tapdisk(rest) => tapdisk::run(argv("tapdisk", rest.args)),
    }
}

/// The arguments as the daemon's own main would get them.
fn argv(name: &str, args: Vec<OsString>) -> Vec<OsString> {
    std::iter::once(OsString::from(name)).chain(args).collect()
}
