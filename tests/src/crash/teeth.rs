//! Leaving out one labelled step at a time must lose something in some state.
//!
//! The steps are not listed by hand: every flush, sync of names, journal
//! record and wait that any scenario or recovery meets is in the machine's
//! log with its label, and each is left out in turn. A step that nobody
//! misses is either needless, and then it goes, or stands below with the
//! reason why it stays.

use std::collections::BTreeSet;

use vhd::storage::sim::{Sabotage, Step};

use super::campaign::{Effort, Findings, campaign};
use super::scenarios::ALL;

/// Steps that no state misses, and why they stay.
const KEPT: [(Step, &str, &str); 0] = [];

const EFFORT: Effort = Effort { stride: 1, singles_max: 6, randoms: 3 };
const SEEDS: u64 = 3;

/// Every labelled step of every scenario and of recovering from it.
fn all_steps() -> BTreeSet<(Step, &'static str)> {
    let mut steps = BTreeSet::new();
    for scenario in &ALL {
        for seed in 0..SEEDS {
            let ran = scenario.play(seed, None);
            let light = Effort { stride: 7, singles_max: 1, randoms: 1 };
            super::campaign::crash_everywhere(
                scenario.name,
                &ran,
                light,
                seed,
                &mut Findings::default(),
                false,
            );
            steps.extend(ran.disk.whys());
        }
    }
    steps
}

/// The first failure that leaving a step out causes.
fn first_failure(step: Step, why: &'static str) -> Option<String> {
    for seed in 0..SEEDS {
        for scenario in &ALL {
            let mut found = Findings::default();
            // A sabotaged run may fail loudly long before any crash.
            let played = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                campaign(scenario, seed, Some(Sabotage::of(step, why)), EFFORT, &mut found, true);
            }));
            if played.is_err() {
                return Some(format!("{}: could not even run", scenario.name));
            }
            if let Some(failure) = found.failures.first() {
                return Some(failure.clone());
            }
        }
    }
    None
}

#[test]
fn every_step_left_out_is_missed() {
    let mut toothless = Vec::new();
    let mut needless = Vec::new();
    for (step, why) in all_steps() {
        let kept = KEPT.iter().find(|(s, w, _)| *s == step && *w == why);
        match (first_failure(step, why), kept) {
            (Some(failure), None) => println!("{step:?} {why:?}\n    {}", &failure[..failure.len().min(200)]),
            (Some(_), Some(_)) => needless.push(format!("{step:?} {why:?} is missed after all")),
            (None, Some((_, _, reason))) => println!("{step:?} {why:?}\n    not missed, kept: {reason}"),
            (None, None) => toothless.push(format!("{step:?} {why:?}")),
        }
    }
    assert!(needless.is_empty(), "{needless:#?}");
    assert!(toothless.is_empty(), "left out and not missed: {toothless:#?}");
}
