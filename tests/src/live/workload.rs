//! Many callers at once, each knowing what its disks must be: with smd alive,
//! and with smd killed at random moments. In the end nothing differs.
//!
//! `COPPICE_CALLERS_SECONDS` (600 is the long run) and `COPPICE_SMD_KILLS`
//! (500 is the long run) say how long.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use serde_json::Value;

use super::kills::number;
use crate::support::callers::Caller;
use crate::support::host::{Daemon, Host, wait_until};

const SRS: [&str; 2] = ["store", "vault"];
/// Callers of the first test.
const CALLERS: usize = 32;
/// Callers while smd is killed.
const KILLED_CALLERS: usize = 6;
/// How long where nothing is said.
const SECONDS: u64 = 10;
/// Kills where nothing is said.
const KILLS: u64 = 8;
/// Longest life of an smd.
const LIFE_MS_MAX: u64 = 400;

fn seed() -> u64 {
    let seed = number("COPPICE_SEED").unwrap_or_else(|| uuid::Uuid::new_v4().as_u64_pair().0);
    eprintln!("COPPICE_SEED={seed}");
    seed
}

/// On two SRs: disks are copied and carried from one to the other.
fn callers(host: &Host, count: usize, seed: u64, is_killed: bool) -> Vec<Caller> {
    let new_sr = |name: &&str| {
        host.sr(name);
        host.ok(&["sr", "show", name])["uuid"].as_str().unwrap().to_owned()
    };
    let srs: Vec<String> = SRS.iter().map(new_sr).collect();
    (0..count).map(|id| Caller::new(id, host.run_dir(), &srs, host.data(), seed, is_killed)).collect()
}

/// All callers work until `drive` ends; panics of theirs end it too.
fn work(callers: Vec<Caller>, drive: impl FnOnce(&dyn Fn() -> bool)) -> Vec<Caller> {
    let (stop, broken) = (AtomicBool::new(false), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let run = |mut caller: Caller| {
            let told = (&stop, &broken);
            scope.spawn(move || {
                let worked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                    while !told.0.load(Ordering::Relaxed) && !told.1.load(Ordering::Relaxed) {
                        caller.step();
                    }
                }));
                told.1.fetch_or(worked.is_err(), Ordering::Relaxed);
                if let Err(panic) = worked {
                    std::panic::resume_unwind(panic);
                }
                caller
            })
        };
        let threads: Vec<_> = callers.into_iter().map(run).collect();
        drive(&|| broken.load(Ordering::Relaxed));
        stop.store(true, Ordering::Relaxed);
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// Everything is as the callers know it, and nothing else is there.
fn check(host: &Host, callers: &mut [Caller]) {
    SRS.iter().for_each(|sr| drop(host.ok(&["sr", "scan", sr])));
    let mut known: BTreeSet<String> = BTreeSet::new();
    for caller in &mut *callers {
        known.extend(caller.check());
    }
    let listed = host.ok(&["vdi", "list"]);
    let listed = listed.as_array().unwrap();
    let uuid = |vdi: &Value| vdi["uuid"].as_str().unwrap().to_owned();
    let unknown: Vec<&Value> = listed.iter().filter(|vdi| !known.contains(&uuid(vdi))).collect();
    assert!(unknown.is_empty(), "nobody knows {unknown:?}");
    assert_eq!(listed.len(), known.len());
    let names = || {
        let files = SRS.iter().flat_map(|sr| std::fs::read_dir(host.data().join(sr)).unwrap().flatten());
        files.map(|file| file.file_name().to_string_lossy().into_owned()).collect::<Vec<_>>()
    };
    wait_until("temporaries to be gone", || !names().iter().any(|name| name.starts_with("tmp-")));
    let sum = |of: fn(&Caller) -> u64| callers.iter().map(of).sum::<u64>();
    let (answered, refused, cut_off) = (sum(|c| c.answered), sum(|c| c.refused), sum(|c| c.cut_off));
    let left = known.len();
    eprintln!(
        "{answered} operations answered, {refused} refused, {cut_off} cut off, {left} disks in the end"
    );
    assert!(answered > callers.len() as u64);
}

#[test]
fn parallel_callers_find_their_disks_as_they_left_them() {
    let host = Host::new();
    let time = Duration::from_secs(number("COPPICE_CALLERS_SECONDS").unwrap_or(SECONDS));
    let mut callers = work(callers(&host, CALLERS, seed(), false), |broken| {
        let begun = Instant::now();
        while begun.elapsed() < time && !broken() {
            std::thread::sleep(Duration::from_millis(100));
        }
    });
    check(&host, &mut callers);
    // Nobody killed a tapdisk, either.
    let log = host.log(Daemon::Smd);
    let died: Vec<&str> = log.lines().filter(|line| line.contains("tapdisk died")).collect();
    assert!(died.is_empty(), "{died:?}");
}

#[test]
fn each_operation_of_a_killed_smd_happened_wholly_or_not_at_all() {
    let mut host = Host::new();
    let seed = seed();
    let mut rng = SmallRng::seed_from_u64(seed);
    let kills = number("COPPICE_SMD_KILLS").unwrap_or(KILLS);
    let callers = callers(&host, KILLED_CALLERS, seed, true);
    let mut callers = work(callers, |broken| {
        for _ in 0..kills {
            std::thread::sleep(Duration::from_millis(rng.random_range(0..LIFE_MS_MAX)));
            host.kill(Daemon::Smd);
            host.start(Daemon::Smd);
            if broken() {
                return;
            }
        }
    });
    check(&host, &mut callers);
}
