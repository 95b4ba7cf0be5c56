//! Each command as a few requests to a daemon.

pub mod gc;
pub mod looks;
pub mod paperwork;
pub mod snapshot;
pub mod sr;
pub mod status;
pub mod transfer;
pub mod vdi;

use std::path::Path;

use crate::client::Daemon;
use crate::output::Output;

/// What every command needs.
#[derive(Debug, Clone)]
pub struct Context {
    /// The storage daemon.
    pub smd: Daemon,
    /// The garbage collector.
    pub gcd: Daemon,
    /// How to print.
    pub output: Output,
}

impl Context {
    /// The daemons of one run folder.
    pub fn new(run: &Path, output: Output) -> Self {
        Self { smd: Daemon::smd(run), gcd: Daemon::gcd(run), output }
    }
}
