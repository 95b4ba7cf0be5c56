//! Arguments in, report out.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Parser;

use crate::bench::Bench;
use crate::images::Images;
use crate::measures::{GROUPS, Group};
use crate::procs::{TapProgram, Tool};
use crate::report::Report;
use crate::sets::BLOCK_BYTES;

/// First argument that makes this program a tapdisk.
pub const TAPDISK: &str = "tapdisk";
/// Most rounds.
const RUNS_MAX: i64 = 1000;

/// Measures the data path against its peers, side by side
#[derive(Debug, Parser)]
#[command(name = "benches", version)]
struct Args {
    /// Where images go (removed at the end): a folder on a real disk that takes O_DIRECT
    #[arg(long, default_value = ".")]
    dir: PathBuf,
    /// Size of the disks
    #[arg(long, default_value = "1GiB", value_parser = size)]
    size: u64,
    /// Rounds of each contender; medians are taken over them
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=RUNS_MAX))]
    runs: u32,
    /// Length of a round
    #[arg(long, default_value_t = 3.0, value_parser = seconds)]
    seconds: f64,
    /// Swaps per depth
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..))]
    swaps: u32,
    /// Only these groups of measures
    #[arg(long, value_name = "NAME")]
    only: Vec<String>,
    /// Also the measures on a sparse 100 GiB disk (takes some 8 GiB and minutes)
    #[arg(long)]
    large: bool,
    /// A smoke run: small disks, short rounds, figures without meaning
    #[arg(long)]
    quick: bool,
    /// One JSON document on standard output, the table on standard error
    #[arg(long)]
    json: bool,
    /// Measure this program, called with a tapdisk's arguments, instead of
    /// the tapdisk built in
    #[arg(long, value_name = "PROGRAM")]
    tapdisk: Option<PathBuf>,
    /// What comes before the tapdisk's arguments, such as `daemon`
    #[arg(long, value_name = "ARG", requires = "tapdisk")]
    tapdisk_arg: Vec<OsString>,
    /// Name the groups and what is missing for them, measure nothing
    #[arg(long)]
    list: bool,
}

fn size(text: &str) -> Result<u64> {
    let number = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match &text[number.len()..] {
        "" => 0,
        "MiB" => 20,
        "GiB" => 30,
        other => bail!("{other:?}: give bytes, MiB or GiB"),
    };
    let bytes = number.parse::<u64>()?.checked_mul(1 << shift).context("too large")?;
    if bytes < 8 * BLOCK_BYTES || bytes % BLOCK_BYTES != 0 {
        bail!("at least 16 MiB, in whole blocks of 2 MiB");
    }
    Ok(bytes)
}

fn seconds(text: &str) -> Result<f64> {
    let seconds: f64 = text.parse()?;
    if !(0.05..=3600.0).contains(&seconds) {
        bail!("from 0.05 to 3600");
    }
    Ok(seconds)
}

/// Does what the command line says.
pub fn main(args: Vec<OsString>) -> ExitCode {
    let mut args = match Args::try_parse_from(args) {
        Ok(args) => args,
        Err(error) => {
            let _ = error.print(); // there is nowhere else to say it
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    if args.quick {
        (args.size, args.runs, args.seconds, args.swaps) = (16 << 20, 1, 0.1, 2);
    }
    match run(&args) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("benches: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Whether every group that was asked for could be run.
fn run(args: &Args) -> Result<bool> {
    let groups = chosen(args)?;
    if args.list {
        for group in &groups {
            println!("{:12} {}{}", group.name, group.about, if group.large { " (--large)" } else { "" });
        }
        for tool in Tool::ALL.iter().filter(|tool| !tool.is_there()) {
            println!("missing: {} (package {})", tool.program(), tool.package());
        }
        return Ok(true);
    }
    let bench = Bench {
        images: Images::new(&args.dir)?,
        size_bytes: args.size,
        runs: args.runs,
        time: Duration::from_secs_f64(args.seconds),
        swaps: args.swaps,
        tap: tap_program(args)?,
    };
    let mut report = Report { conditions: conditions(args), ..Report::default() };
    let mut whole = true;
    for group in groups {
        eprintln!("measuring: {}", group.about);
        if let Err(error) = (group.run)(&bench, &mut report) {
            whole = false;
            crate::bench::miss(&mut report, group.name, format!("{error:#}"));
        }
    }
    if args.json {
        eprint!("{}", report.table());
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print!("{}", report.table());
    }
    Ok(whole)
}

fn chosen(args: &Args) -> Result<Vec<&'static Group>> {
    for name in &args.only {
        if !GROUPS.iter().any(|group| group.name == name) {
            let names: Vec<&str> = GROUPS.iter().map(|group| group.name).collect();
            bail!("no group {name:?}; there are {}", names.join(", "));
        }
    }
    let named = |group: &&Group| args.only.iter().any(|name| name == group.name);
    let usual = |group: &&Group| args.only.is_empty() && (!group.large || args.large || args.list);
    Ok(GROUPS.iter().filter(|group| named(group) || usual(group)).collect())
}

fn tap_program(args: &Args) -> Result<TapProgram> {
    Ok(match &args.tapdisk {
        Some(path) => TapProgram { path: path.clone(), args: args.tapdisk_arg.clone() },
        None => TapProgram { path: std::env::current_exe()?, args: vec![TAPDISK.into()] },
    })
}

fn conditions(args: &Args) -> std::collections::BTreeMap<String, String> {
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load: Vec<&str> = load.split_whitespace().take(3).collect();
    [
        ("kernel", kernel.trim().to_owned()),
        ("processors", cores.to_string()),
        ("load before", load.join(" ")),
        ("disks", format!("{} MiB", args.size >> 20)),
        ("rounds", format!("{} of {} s", args.runs, args.seconds)),
        ("build", if cfg!(debug_assertions) { "with debug assertions" } else { "release" }.to_owned()),
    ]
    .into_iter()
    .map(|(name, value)| (name.to_owned(), value))
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_whole_blocks() {
        assert_eq!(size("1GiB").unwrap(), 1 << 30);
        assert_eq!(size("64MiB").unwrap(), 64 << 20);
        assert_eq!(size("16777216").unwrap(), 16 << 20);
        for bad in ["", "1", "17MiB", "1TiB", "99999999999GiB"] {
            assert!(size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn arguments_are_consistent() {
        use clap::CommandFactory;
        Args::command().debug_assert();
    }
}
