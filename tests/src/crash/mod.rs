//! Every state a crash leaves, recovered from and compared with what was
//! promised.
//!
//! ```text
//!   scenario   real sm, gc and engine code on a simulated machine, guests
//!              writing all along; every guest write and flush is noted in
//!              an oracle with its place in the machine's log
//!   campaign   for every prefix of the log: kills and power cuts, by several
//!              strategies -> recover -> maybe crash inside that, recover
//!              again -> every visible disk holds only what it may
//!   teeth      the same with one labelled step left out, for every label:
//!              some state must lose something
//! ```
//!
//! | file | what |
//! |---|---|
//! | `oracle` | which values a sector may have after a crash |
//! | `guest` | random guest traffic on a simulated tapdisk |
//! | `world` | a machine with an SR: the `Host` and `Tap` of the simulator |
//! | `scenarios` | what happens before the crash |
//! | `scenarios_io` | the same, of imports and groups of disks |
//! | `collecting` | the same, of deletions and merges |
//! | `scenarios_full` | the same on a full filesystem |
//! | `scenarios_ops` | the same for growth, revert and copy |
//! | `finished` | what a collection may leave: nothing to do |
//! | `campaign` | crashing, recovering, comparing, counting |
//! | `teeth` | leaving steps out |
//! | `faults` | operations that fail while others are under way |

mod campaign;
mod collecting;
mod faults;
mod finished;
mod guest;
pub(crate) mod oracle;
pub(crate) mod scenarios;
mod scenarios_full;
mod scenarios_io;
mod scenarios_ops;
mod teeth;
pub(crate) mod world;
