//! Going through the crashes of a recorded run.
//!
//! ```text
//!   for each prefix of the log
//!     for Kill and PowerCut
//!       for each strategy worth trying
//!         a fresh machine, if no such one was judged -> judge
//! ```
//!
//! The judge recovers the machine and compares; it may explore again what it
//! just ran, for crashes inside a recovery.

use std::collections::BTreeSet;

use rand::SeedableRng;
use rand::rngs::SmallRng;

use super::crash::{CrashKind, Strategy};
use super::disk::SimDisk;

/// Lines of the log shown with a failure.
const LOG_LINES: usize = 60;

/// How thoroughly to look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Effort {
    /// At most this many units alone lost and alone kept, at each instant.
    pub singles_max: usize,
    /// Random states of either kind at each instant.
    pub randoms: usize,
    /// Makes another choice of random states.
    pub seed: u64,
    /// Look at every n-th instant only (1: at all of them). An instant where
    /// a mark was just made is never left out.
    pub stride: usize,
}

impl Effort {
    /// Every instant, a few random states.
    pub const FULL: Self = Self { singles_max: 16, randoms: 4, seed: 1, stride: 1 };
    /// For crashes inside recoveries, of which there are many.
    pub const LIGHT: Self = Self { singles_max: 4, randoms: 1, seed: 1, stride: 1 };
}

/// One state a crash left.
#[derive(Debug)]
pub struct Crashed {
    /// The machine, to recover and look at.
    pub disk: SimDisk,
    /// After how many events the crash struck.
    pub prefix: usize,
    /// What happened.
    pub kind: CrashKind,
    /// Which of the possible states it is.
    pub strategy: Strategy,
    /// The marks made before.
    pub marks: Vec<u64>,
}

/// What was seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Tally {
    /// States made.
    pub tried: u64,
    /// States that differed from all before, and were judged.
    pub judged: u64,
}

/// States judged already. Shared between explorations that one judge
/// compares by the same rules.
#[derive(Debug, Default)]
pub struct Seen(BTreeSet<(u128, Vec<u64>)>);

impl SimDisk {
    /// Gives `judge` every state that a crash at or after event `from` could
    /// leave, as far as `effort` goes and `seen` does not hold it. Two states
    /// are the same if nothing can tell them apart, a later crash included,
    /// and the same marks were made before.
    ///
    /// For crashes inside a recovery: mark the fresh machine with whatever was
    /// promised before, recover, and explore it from the event after the mark.
    ///
    /// # Errors
    /// The first complaint of the judge, with the place, the strategy and the
    /// end of the log.
    pub fn explore(
        &self,
        from: usize,
        effort: Effort,
        seen: &mut Seen,
        judge: &mut dyn FnMut(&Crashed) -> Result<(), String>,
    ) -> Result<Tally, String> {
        let all_marks = self.marks();
        let mut tally = Tally::default();
        for prefix in from..=self.log_len() {
            let marked = all_marks.iter().any(|(at, _)| at + 1 == prefix);
            if !marked && !(prefix - from).is_multiple_of(effort.stride.max(1)) {
                continue;
            }
            let before = all_marks.iter().filter(|(at, _)| *at < prefix);
            let marks: Vec<u64> = before.map(|(_, mark)| *mark).collect();
            let mut rng = SmallRng::seed_from_u64(effort.seed ^ (prefix as u64) << 20);
            for kind in [CrashKind::Kill, CrashKind::PowerCut] {
                for strategy in self.strategies(prefix, kind, effort.singles_max, effort.randoms) {
                    let disk = self.crash(prefix, kind, &mut rng, strategy);
                    tally.tried += 1;
                    if !seen.0.insert((disk.full_hash(), marks.clone())) {
                        continue;
                    }
                    tally.judged += 1;
                    let crashed = Crashed { disk, prefix, kind, strategy, marks: marks.clone() };
                    judge(&crashed).map_err(|complaint| self.tell(&crashed, &complaint))?;
                }
            }
        }
        Ok(tally)
    }

    fn tell(&self, crashed: &Crashed, complaint: &str) -> String {
        let Crashed { prefix, kind, strategy, .. } = crashed;
        let log = self.log_text(prefix.saturating_sub(LOG_LINES)..*prefix);
        format!("{complaint}\n... after {kind:?} {strategy:?} at {prefix}, the log being\n{log}")
    }
}
