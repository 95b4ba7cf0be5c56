//! The daemons inside this program.
//!
//! `coppice daemon smd …` is smd, and so on: one program is enough to run
//! everything, so `cargo run --release -- demo` needs nothing else built.

use std::ffi::OsString;
use std::process::ExitCode;

use crate::failure::{Failure, Outcome};

/// Becomes the daemon that `args` begins with; returns when it ends.
pub fn run(args: Vec<OsString>) -> Outcome<ExitCode> {
    let name = args.first().and_then(|name| name.to_str()).unwrap_or_default();
    match name {
        "smd" => Ok(sm::run(args)),
        "gcd" => Ok(gc::run(args)),
        "tapdisk" => Ok(tapdisk::run(args)),
        _ => Err(Failure::new("NOT_FOUND", format!("no daemon is called \"{name}\""))),
    }
}
