//! The verbs of `gc`.

use clap::{ArgGroup, Args, Subcommand, ValueEnum};

use crate::size::Size;

/// Verbs of `gc`.
#[derive(Debug, Subcommand)]
pub enum GcCommand {
    /// Collect garbage and merge chains now
    Run {
        /// Only this storage repository, or the tree of this disk [default: all]
        #[arg(value_name = "SR|VDI")]
        what: Option<String>,
        /// Say what would be done, also in a storage repository that is not attached
        #[arg(long)]
        dry_run: bool,
        /// Return when nothing is left to do, with what was done beside what was predicted
        #[arg(long)]
        wait: bool,
    },
    /// Say what runs and what waits
    Status(GcScope),
    /// Stop running merges at the next safe point and start no new work; of a disk, leave its leaf alone
    Pause {
        /// Only this storage repository, or only the leaf of this disk
        #[arg(value_name = "SR|VDI")]
        what: Option<String>,
    },
    /// Go on at once, after an abort too
    Resume {
        /// Only this storage repository, or only the leaf of this disk
        #[arg(value_name = "SR|VDI")]
        what: Option<String>,
    },
    /// Stop running merges at the next safe point; they begin again after half a minute, or with `gc resume` or `gc run`
    Abort(GcScope),
    /// Set limits, also for merges under way
    #[command(group = ArgGroup::new("setting").required(true).multiple(true)
        .args(["rate", "parallel", "latency_factor", "receipts"]))]
    Set {
        /// Storage repository
        sr: String,
        /// Bytes per second of all merges together; 0 is no limit
        #[arg(long, value_name = "SIZE")]
        rate: Option<Size>,
        /// Merges at one time, up to 16; 0 is the default, 2
        #[arg(long, value_name = "N", value_parser = parallel)]
        parallel: Option<usize>,
        /// Merges slow down while an attached disk takes this many times
        /// longer to answer than it does without them, up to 1000; 0 is never [default: 4]
        #[arg(long, value_name = "FACTOR", value_parser = latency_factor)]
        latency_factor: Option<f64>,
        /// Read every disk on a merge before and after it, and compare [default: off]
        #[arg(long, value_name = "on|off", value_enum)]
        receipts: Option<Switch>,
    },
    /// Print the hash of every block that the receipt of a finished merge compared
    Receipt {
        /// Storage repository
        sr: String,
        /// The merge, as `gc status` names it
        job: String,
    },
    /// Say that a disk which a merge has changed was looked at: its tree is merged again
    Acknowledge {
        /// Storage repository
        sr: String,
        /// The merge, as the alarm names it [default: all]
        job: Option<String>,
    },
}

/// Whether something is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Switch {
    /// It is
    On,
    /// It is not
    Off,
}

fn parallel(text: &str) -> Result<usize, String> {
    let most = ::gc::limits::PARALLEL_MAX;
    let number = text.parse().map_err(|_| format!("not a number from 0 to {most}"))?;
    if number > most { Err(format!("at most {most} merges may run at one time")) } else { Ok(number) }
}

fn latency_factor(text: &str) -> Result<f64, String> {
    let most = ::gc::limits::LATENCY_FACTOR_MAX;
    let factor = text.parse().ok().filter(|factor| (0.0..=most).contains(factor));
    factor.ok_or_else(|| format!("not a number from 0 to {most}"))
}

/// One storage repository or all.
#[derive(Debug, Args)]
pub struct GcScope {
    /// Only this storage repository
    pub sr: Option<String>,
}
