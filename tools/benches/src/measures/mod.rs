//! The measures, one file per group.

use anyhow::Result;

use crate::bench::Bench;
use crate::report::Report;

mod copy;
mod large;
mod memory;
mod merge_stall;
mod reads;
mod refresh;
mod sequential;
mod swap;
mod tls;
mod writes;

/// Measures that share image sets and servers.
pub struct Group {
    /// For `--only`.
    pub name: &'static str,
    /// What is in it.
    pub about: &'static str,
    /// Only with `--large`.
    pub large: bool,
    /// Adds its rows.
    pub run: fn(&Bench, &mut Report) -> Result<()>,
}

/// All groups, in the order they run.
pub const GROUPS: &[Group] = &[
    Group {
        name: "reads",
        about: "4 KiB random reads, QD 32 and 1; CPU time",
        large: false,
        run: reads::run,
    },
    Group { name: "sequential", about: "1 MiB reads and writes, QD 8", large: false, run: sequential::run },
    Group { name: "tls", about: "1 MiB reads over TCP with TLS and without", large: false, run: tls::run },
    Group { name: "writes", about: "4 KiB random writes of all kinds", large: false, run: writes::run },
    Group { name: "swap", about: "guest stall of a snapshot", large: false, run: swap::run },
    Group { name: "refresh", about: "latency while the chain is re-read", large: false, run: refresh::run },
    Group { name: "copy", about: "merges against cp and run by run", large: false, run: copy::run },
    Group {
        name: "merge-stall",
        about: "a guest that writes while its leaf is merged",
        large: false,
        run: merge_stall::run,
    },
    Group { name: "memory", about: "resident memory, 2040 GiB, 30 nodes", large: false, run: memory::run },
    Group { name: "large-reads", about: "reads on 100 GiB", large: true, run: large::reads },
    Group { name: "large-writes", about: "writes on 100 GiB", large: true, run: large::writes },
];
