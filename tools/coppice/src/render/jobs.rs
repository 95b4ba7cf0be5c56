//! Jobs of the collector that ended, for people.

use super::table::Table;
use crate::size::human;
use crate::view::GcStatus;

/// Jobs shown, the last ones; `--json` has all that are kept.
const SHOWN_MAX: usize = 10;

/// A table of the last jobs, what they came to beside what was expected;
/// nothing if there are none.
pub fn ended(status: &GcStatus) -> String {
    if status.done.is_empty() {
        return String::new();
    }
    let mut table = Table::new(["ENDED JOB", "KIND", "NODE", "MOVED", "FREED", "PEAK", "OUTCOME"]);
    for done in &status.done[status.done.len().saturating_sub(SHOWN_MAX)..] {
        let beside = |bytes: u64, bound: &str, predicted: Option<u64>| match predicted {
            Some(predicted) => format!("{} ({bound} {})", human(bytes), human(predicted)),
            None => human(bytes),
        };
        let predicted = done.predicted.as_ref();
        table.row([
            done.job.clone(),
            done.kind.clone(),
            done.vdi.clone(),
            beside(done.bytes_copied + done.bytes_cloned, "at most", predicted.map(|p| p.bytes_copied)),
            beside(done.bytes_freed, "at least", predicted.map(|p| p.bytes_freed)),
            beside(done.peak_extra_bytes, "at most", predicted.map(|p| p.peak_extra_bytes)),
            done.error.clone().unwrap_or_else(|| "done".to_owned()),
        ]);
    }
    format!("\n{table}")
}
