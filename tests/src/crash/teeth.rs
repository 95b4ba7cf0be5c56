//! Leaving out one labelled step at a time must lose something in some state.
//!
//! The steps are not listed by hand: every flush, sync of names, journal
//! record and wait that any scenario or recovery meets is in the machine's
//! log with its label, and each is left out in turn. A step that nobody
//! misses is either needless, and then it goes, or stands below with the
//! reason why it stays. `COPPICE_TEETH=all` tries those too.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;

use vhd::storage::sim::{Sabotage, Step};

use super::campaign::{Effort, Findings, campaign, crash_everywhere};
use super::scenarios::all;
use super::world::{Backend, locked};

const CLEARED: &str = "a record that comes back after a power cut finds everything done and is cleared again";
const SPACE: &str = "without it the merge starts anew: that costs time and space, never a byte";
const FENCE: &str = "it keeps others away while the image is worked on without the SR lock; what a crash leaves of that is \
    swept, or sound as it is; see sm/tests/more_ops.rs";
const EITHER: &str = "two syncs, one after the other: either of the two would do";

const LOCATOR: &str =
    "our readers take any locator; sm/tests/crashes.rs looks at the first alone, as the reference does";
const AGREED: &str = "it is how a pauser and a tapdisk agree while one of them fails; after a crash the swaps that \
    are found decide the same";
const FORGED: &str = "it keeps a footer that a guest forged from being found, and these guests forge none";

/// Steps that no state of these scenarios misses, and why they stay.
const KEPT: [(Step, &str, &str); 41] = [
    (Step::SyncNames, "inner: record cleared, given up", CLEARED),
    (Step::Record, "inner: record cleared, given up", CLEARED),
    (Step::SyncNames, "leaf merge: record cleared, stopped", CLEARED),
    (Step::Record, "leaf merge: record cleared, stopped", CLEARED),
    (Step::Name, "a record is decided", AGREED),
    (Step::Name, "a record becomes void", AGREED),
    (
        Step::Flush,
        "hidden: found so",
        "missed by sm/tests/crashes.rs, where smd alone dies between two steps",
    ),
    (Step::Flush, "reparent: the first locator", LOCATOR),
    (Step::Flush, "reparent: found so", LOCATOR),
    (Step::SyncNames, "snapshot: swaps", EITHER),
    (Step::SyncNames, "snapshot: decision", EITHER),
    // Its tapdisk syncs the names, and so does the collector before it clears the
    // record: a tapdisk goes on though it could not.
    (Step::SyncNames, "merge commit: the name before the intent goes", EITHER),
    (Step::Wait, "merge commit: the name before the intent goes", EITHER),
    (Step::SyncNames, "leaf merge: live, name", EITHER),
    (Step::SyncNames, "snapshot: void record cleared", CLEARED),
    (Step::SyncNames, "leaf merge: record cleared", CLEARED),
    (Step::SyncNames, "leaf merge: stopped for a snapshot", CLEARED),
    (Step::SyncNames, "inner: record cleared", CLEARED),
    (Step::Record, "leaf merge: record cleared", CLEARED),
    (Step::Record, "leaf merge: stopped for a snapshot", CLEARED),
    (Step::Record, "inner: record cleared", CLEARED),
    (Step::SyncNames, "merge: record intent", SPACE),
    (Step::SyncNames, "merge: the record that was found", SPACE),
    (Step::SyncNames, "inner: record relink", SPACE),
    (Step::SyncNames, "inner: record refresh", SPACE),
    (Step::SyncNames, "inner: record delete", SPACE),
    (Step::Record, "inner: record relink", SPACE),
    (Step::Record, "inner: record refresh", SPACE),
    (Step::Record, "inner: record delete", SPACE),
    (Step::SyncNames, "recover: records that were found", SPACE),
    (Step::Flush, "resize: a zero sector behind the last block before the file is cut there", FORGED),
    (Step::Flush, "open: the guard before the file ends with it", FORGED),
    (Step::Flush, "resize: the length before anything is written there", FORGED),
    (
        Step::Flush,
        "resize: new BAT entries before anything reaches them",
        "the header's flush covers them too; an image whose header need not change has only this one",
    ),
    (Step::Record, "make: record", FENCE),
    (Step::SyncNames, "make: record", FENCE),
    (Step::SyncNames, "make: record cleared", CLEARED),
    (Step::Record, "resize: record", FENCE),
    (Step::SyncNames, "resize: record", FENCE),
    (Step::SyncNames, "resize: record cleared", CLEARED),
    (Step::Flush, "scenario: damage", "not a step of ours: it sets the scene"),
];

const EFFORT: Effort = Effort { stride: 1, singles_max: 6, randoms: 3, again: 1 };
const SEEDS: u64 = 3;

/// Every labelled step of every scenario and of recovering from it, and on
/// which machines it was met.
fn all_steps() -> BTreeMap<(Step, &'static str), Vec<Backend>> {
    let mut steps: BTreeMap<_, Vec<Backend>> = BTreeMap::new();
    for backend in Backend::ALL {
        let mut met = BTreeSet::new();
        let runs = all(backend).flat_map(|scenario| (0..SEEDS).map(move |seed| (scenario, seed)));
        for (scenario, seed) in runs {
            let ran = scenario.play(backend, seed, None);
            let light = Effort { stride: 7, singles_max: 1, randoms: 1, again: 2 };
            crash_everywhere(scenario.name, &ran, light, seed, &mut Findings::default(), false);
            met.extend(ran.disk.whys());
        }
        met.into_iter().for_each(|step| steps.entry(step).or_default().push(backend));
    }
    // Which are only met where the collector, and a tapdisk, share blocks that
    // lie side by side.
    for why in ["a copy of blocks side by side", "a copy in flight of blocks side by side"] {
        assert!(steps.contains_key(&(Step::Neighbours, why)), "no scenario plays {why}");
    }
    steps
}

/// The first failure that leaving a step out causes.
fn first_failure(step: Step, why: &'static str, backends: &[Backend]) -> Option<String> {
    for (seed, backend) in (0..SEEDS).flat_map(|seed| backends.iter().map(move |backend| (seed, *backend))) {
        for scenario in all(backend) {
            let mut found = Findings::default();
            // A sabotaged run may fail loudly long before any crash.
            let played = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                campaign(&scenario, backend, seed, Some(Sabotage::of(step, why)), EFFORT, &mut found, true);
            }));
            if played.is_err() {
                return Some(format!("{} on {backend:?}: could not even run", scenario.name));
            }
            if let Some(failure) = found.failures.first() {
                return failure.lines().next().map(str::to_owned);
            }
        }
    }
    None
}

#[test]
fn every_step_left_out_is_missed() {
    let all = std::env::var("COPPICE_TEETH").is_ok_and(|value| value == "all");
    // Just the steps whose label begins so.
    let only = std::env::var("COPPICE_TEETH_ONLY").unwrap_or_default();
    let steps = all_steps().into_iter().filter(|((_, why), _)| why.starts_with(&only));
    let steps = Mutex::new(steps.collect::<Vec<_>>().into_iter());
    let toothless = Mutex::new(Vec::new());
    let next = || locked(&steps).next();
    let work = || {
        while let Some(((step, why), backends)) = next() {
            let kept = KEPT.iter().find(|(s, w, _)| *s == step && *w == why);
            match kept {
                Some((_, _, reason)) if !all => println!("{step:?} {why:?}\n    kept: {reason}"),
                _ => match first_failure(step, why, &backends) {
                    Some(failure) => println!("{step:?} {why:?}\n    {failure}"),
                    None if kept.is_some() => println!("{step:?} {why:?}\n    not missed, as expected"),
                    None => locked(&toothless).push(format!("{step:?} {why:?}")),
                },
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(work);
        }
    });
    let toothless = locked(&toothless);
    assert!(toothless.is_empty(), "left out and not missed: {toothless:#?}");
}
