//! What collecting an SR that is not attached would do, told without changing
//! anything in it.
//!
//! Leftovers of the reference are put right by an attach, before the collector
//! sees the SR. What they are about is explained and not predicted: nobody
//! knows before which way it goes.

use std::collections::BTreeSet;
use std::path::Path;

use uuid::Uuid;
use vhd::storage::PosixFs;

use crate::cost;
use crate::forest::Claim;
use crate::job::Result;
use crate::plan::{Holds, Settings};
use crate::report::{FailedNode, Report};
use crate::survey;

/// Bytes per second that nobody has measured here: as good a guess as any.
const GUESSED_RATE: f64 = 200e6;

/// Predicts for the SR in `folder`.
///
/// # Errors
/// It cannot be read.
pub fn predict(folder: &Path, sr: Uuid, name: &str) -> Result<Report> {
    let repo = sm::offline::look(folder, sr, name);
    let mut forest = survey::survey(&repo, &[])?;
    let touched = sm::reference::touched(&repo, &PosixFs::new(folder.to_owned()))?;
    let trees: BTreeSet<Uuid> =
        touched.iter().flat_map(|one| &one.nodes).map(|node| forest.root(*node)).collect();
    let held = forest.nodes().map(|node| node.uuid).filter(|node| trees.contains(&forest.root(*node)));
    let held: Vec<Uuid> = held.collect();
    forest.claims.push(Claim { id: Uuid::nil(), nodes: held, merge: false });
    let mut report = cost::predict(&repo, &forest, Settings::default(), Holds::new(), None, &|| false)?;
    report.seconds = report.bytes_copied as f64 / GUESSED_RATE;
    let reasons = touched
        .into_iter()
        .map(|one| FailedNode { uuid: one.of, reason: format!("{}: {}", one.name, one.why) });
    report.failed.extend(reasons);
    Ok(report)
}
