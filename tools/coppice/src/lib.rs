//! `coppice`: what people type, as a library so that tests can use its parts.
//!
//! ```text
//!   cli ──> commands ──> client ──HTTP over Unix sockets──> smd, gcd
//!    ├────> up, demo ──> host ──starts──> this program as smd, gcd, tapdisk
//!    └────> daemon (hidden)
//! ```
//!
//! Only a client: no image, lock or journal is touched here, and whatever it
//! can do, the API can.

pub mod cli;
pub mod client;
pub mod commands;
pub mod daemon;
pub mod demo;
pub mod disk_file;
pub mod failure;
pub mod hooks;
pub mod host;
pub mod jobs;
pub use tapdisk_control::nbd as nbd_client;
pub mod output;
pub mod progress;
pub mod reach;
pub mod render;
pub mod resolve;
pub mod size;
pub mod stream;
pub mod up;
pub mod view;

use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind;

use crate::cli::{Cli, Command};
use crate::commands::Context;
use crate::failure::{Failure, Outcome};
use crate::output::Output;

/// Status of a refused or failed request.
const EXIT_FAILED: u8 = 1;
/// Status of wrong usage.
const EXIT_USAGE: u8 = 2;

/// Does what the command line says; the status is that of the process.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    let output = Output { json: cli.global.json };
    match run(cli, output) {
        Ok(code) => code,
        Err(failure) => {
            output.failure(&failure);
            ExitCode::from(if failure.code == "USAGE" { EXIT_USAGE } else { EXIT_FAILED })
        }
    }
}

fn run(cli: Cli, output: Output) -> Outcome<ExitCode> {
    let context = Context::new(&cli.global.run_dir(), output);
    match cli.command {
        Command::Demo(args) => demo::run(&args, output)?,
        Command::Up(args) => up::run(&cli.global, &args, output)?,
        Command::Status => commands::status::run(&context)?,
        Command::Sr(command) => commands::sr::run(&context, command)?,
        Command::Vdi(command) => commands::vdi::run(&context, command)?,
        Command::Gc(command) => commands::gc::run(&context, command)?,
        Command::Completions { shell } => commands::paperwork::completions(shell, output),
        Command::Man { dir } => commands::paperwork::man(&dir, output)?,
        Command::Daemon { args } => return daemon::run(args),
    }
    Ok(ExitCode::SUCCESS)
}

/// Help and version as asked; wrong usage said on standard error, and as a
/// document where one was asked for.
fn usage(error: &clap::Error) -> ExitCode {
    // Where standard output or error is closed there is nobody to tell.
    let _ = error.print();
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => ExitCode::SUCCESS,
        _ => {
            if std::env::args_os().any(|arg| arg == "--json") {
                let first = error.to_string();
                let first = first.lines().next().unwrap_or_default();
                let message = first.trim_start_matches("error: ");
                output::print(&format!("{}\n", Failure::new("USAGE", message).document()));
            }
            ExitCode::from(EXIT_USAGE)
        }
    }
}
