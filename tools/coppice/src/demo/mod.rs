//! `coppice demo`: the main job on one machine, start to end.
//!
//! ```text
//!   stage    folders, real smd, gcd and tapdisk, one file SR
//!   load     a guest on our own NBD client, 16 requests in flight, never idle
//!   script   snapshots under writes -> compare some -> delete all -> merge
//!            down to one image, the live leaf too -> compare every byte
//!   oracle   what each 4 KiB must hold, from what was acknowledged
//! ```
//!
//! Nothing is simulated, and nothing is taken on trust from the daemons but
//! the figures they alone know (bytes copied and freed).

pub mod load;
pub mod oracle;
pub mod report;
pub mod script;
pub mod stage;
pub mod stamp;
pub mod tally;
pub mod verify;
pub mod watch;

use std::time::Instant;

use crate::cli::DemoArgs;
use crate::failure::{Failure, Outcome};
use crate::output::{Output, say};
use stage::Stage;

/// Plays it; fails unless every check held.
pub fn run(args: &DemoArgs, output: Output) -> Outcome<()> {
    let began = Instant::now();
    let seed = args.seed.unwrap_or_else(|| uuid::Uuid::new_v4().as_u64_pair().0);
    say(&format!("coppice: demo with seed {seed}"));
    let stage = Stage::set_up(args.dir.as_deref())?;
    let played = script::play(&stage, seed);
    // A failed run is worth a look: everything stays where it is.
    stage.take_down(args.keep || played.is_err());
    let mut report = played?;
    report.seconds = began.elapsed().as_secs_f64();
    report.ok = true;
    let document =
        serde_json::to_value(&report).map_err(|e| Failure::new("IO_ERROR", format!("the report: {e}")))?;
    output.result(&document, || report.text());
    Ok(())
}
