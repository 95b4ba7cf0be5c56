//! Benchmarks: every measure against a peer or the raw file in the same run,
//! interleaved, as ratios of medians over several rounds.
//!
//! ```text
//!   cli ──> measures/* ──> bench (contenders in turn) ──> report (table, JSON)
//!                │            └──> nbd (one client for all sides) ──> stats
//!                └──> images (sets on disk), merges, procs (tapdisk, peers, fio)
//! ```
//!
//! Nothing is installed; what is missing is said, and only the rows that need
//! it are left out. Absent on purpose: absolute promises. Figures of different
//! runs, or of different machines, are not to be compared; ratios are.

mod bench;
mod cli;
mod images;
mod measures;
mod merges;
mod nbd;
mod offsets;
mod procs;
mod report;
mod sets;
mod stats;
mod xfs;

use std::ffi::OsString;
use std::process::ExitCode;

fn main() -> ExitCode {
    let args: Vec<OsString> = std::env::args_os().collect();
    // A tapdisk is this program itself, so what is measured is what was built.
    if args.get(1).is_some_and(|arg| arg == cli::TAPDISK) {
        return tapdisk::cli::run(args.into_iter().skip(1));
    }
    cli::main(args)
}
