//! Crashing, recovering, comparing, counting.

use std::collections::HashSet;

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use sm::recover::{Scope, recover, sweep};
use uuid::Uuid;
use vhd::chain::Chain;
use vhd::storage::VolumeName;
use vhd::storage::sim::{CrashKind, Sabotage, SimDisk};
use vhd::units::BLOCK_BYTES;

use super::oracle::{At, Value, tracked, unstamp};
use super::scenarios::{Expected, Ran, Scenario, all, collect_garbage};
use super::world::{BLOCKS, Backend, World};

/// How thoroughly to look.
#[derive(Clone, Copy)]
pub struct Effort {
    /// Every n-th prefix of the log.
    pub stride: usize,
    /// Units tried alone, lost and kept.
    pub singles_max: usize,
    /// Random choices of each kind per prefix.
    pub randoms: usize,
    /// Every n-th state is crashed again inside its recovery.
    pub again: usize,
}

/// What was found.
#[derive(Default)]
pub struct Findings {
    pub states: HashSet<u128>,
    pub tried: usize,
    pub failures: Vec<String>,
}

/// Crashes a run everywhere. Stops at the first failure if asked.
pub fn crash_everywhere(
    name: &str,
    ran: &Ran,
    effort: Effort,
    seed: u64,
    found: &mut Findings,
    first_only: bool,
) {
    let mut rng = SmallRng::seed_from_u64(seed);
    for failure in &ran.failures {
        found.failures.push(format!("{name}, seed {seed}, without any crash: {failure}"));
    }
    let mut at = ran.from + rng.random_range(0..effort.stride);
    while at <= ran.disk.log_len() {
        for kind in [CrashKind::Kill, CrashKind::PowerCut] {
            for strategy in ran.disk.strategies(at, kind, effort.singles_max, effort.randoms) {
                let state = ran.disk.crash(at, kind, &mut rng, strategy);
                found.tried += 1;
                if !found.states.insert(state.state_hash()) {
                    continue;
                }
                if let Err(failure) = survives(ran, &state, at, kind, &mut rng, (found.tried, effort.again)) {
                    let text = format!("{name}, seed {seed}, {kind:?} at {at}, {strategy:?}: {failure}");
                    let last = ran.disk.log_text(at.saturating_sub(6)..at);
                    found.failures.push(format!("{text}\n{last}"));
                    if first_only || found.failures.len() > 20 {
                        return;
                    }
                }
            }
        }
        at += effort.stride;
    }
}

/// Recovers a state and compares; and again with a second crash inside the
/// recovery, a few times if that was a kill, whose recovery replays a record.
fn survives(
    ran: &Ran,
    state: &SimDisk,
    at: At,
    kind: CrashKind,
    rng: &mut SmallRng,
    (n, again): (usize, usize),
) -> Result<(), String> {
    let world = recovered(state, n as u64)?;
    compare(ran, &world, at, kind)?;
    for _ in 0..usize::from(n.is_multiple_of(again)) * if kind == CrashKind::Kill { 4 } else { 1 } {
        let second = if rng.random_range(0..3) == 0 { kind } else { CrashKind::PowerCut };
        let inside = rng.random_range(0..=state.log_len());
        let strategies = state.strategies(inside, second, 3, 3);
        let strategy = strategies[rng.random_range(0..strategies.len())];
        let after = state.crash(inside, second, rng, strategy);
        let worst = kind.max(second);
        recovered(&after, n as u64 + 1).and_then(|world| compare(ran, &world, at, worst)).map_err(|e| {
            let last = state.log_text(inside.saturating_sub(6)..inside);
            format!("and {second:?} at {inside} of its recovery, {strategy:?}: {e}\n{last}before which")
        })?;
    }
    if n.is_multiple_of(7) {
        collect_garbage(&world).map_err(|e| format!("collecting after recovery: {e}"))?;
        compare(ran, &world, at, kind).map_err(|e| format!("after collecting: {e}"))?;
    }
    Ok(())
}

fn recovered(state: &SimDisk, seed: u64) -> Result<World, String> {
    let world = World::over(state.clone(), 1000 + seed);
    recover(&world.repo, Scope::All).map_err(|e| format!("recovery: {e}"))?;
    sweep(&world.repo).map_err(|e| format!("sweep: {e}"))?;
    sm::ops::settle_all(&world.repo).map_err(|e| format!("settling: {e}"))?;
    Ok(world)
}

/// Every visible disk is there and holds only what it may.
fn compare(ran: &Ran, world: &World, at: At, kind: CrashKind) -> Result<(), String> {
    let scan = sm::scan::scan(&world.repo).map_err(|e| format!("scan: {e}"))?;
    for node in &scan.tree.nodes {
        if let Some(broken) = node.broken() {
            return Err(format!("{} is broken: {broken}", node.volume));
        }
    }
    let half_done = scan.intents.iter().find(|stored| !stored.intent.is_merge());
    if let Some(left) = half_done.map(|stored| stored.name) {
        return Err(format!("recovery left the record {left}"));
    }
    if let (Some(left), true) = (scan.tree.prepared.first(), scan.intents.is_empty()) {
        return Err(format!("recovery left {}", left.volume));
    }
    let known = |vdi: Uuid| {
        ran.expected.iter().any(|expected| match expected {
            Expected::Disk { vdi: own, .. }
            | Expected::Snapshot { vdi: own, .. }
            | Expected::Made { vdi: own, .. } => *own == vdi,
        })
    };
    if let Some(node) = scan.tree.nodes.iter().find(|node| !node.is_hidden() && !known(node.uuid)) {
        return Err(format!("{} shows up as a disk", node.volume));
    }
    let visible = |vdi: Uuid| scan.tree.by_uuid(vdi).is_some_and(|ix| !scan.tree.nodes[ix].is_hidden());
    for expected in &ran.expected {
        match expected {
            Expected::Disk { lives: (made, _), .. } if at < *made => {}
            Expected::Disk { lives: (_, Some(deleted)), vdi, .. } if *deleted <= at && !visible(*vdi) => {}
            Expected::Disk { vdi, oracle, .. } => {
                if !visible(*vdi) {
                    return Err(format!("disk {vdi} is gone"));
                }
                let allowed = |sector| oracle.after_crash(sector, kind, at);
                holds(world, *vdi, allowed).map_err(|e| format!("the disk: {e}"))?;
                has_size(ran, world, *vdi, at)?;
            }
            Expected::Made { vdi, oracle, instant } => {
                if visible(*vdi) {
                    let allowed = |sector| oracle.after_crash(sector, kind, at);
                    holds(world, *vdi, allowed).map_err(|e| format!("another disk: {e}"))?;
                } else if instant.ended <= at {
                    return Err(format!("disk {vdi} is gone"));
                }
            }
            Expected::Snapshot { vdi, of, instant, taken, deleted } => {
                let answered = instant.ended <= at;
                let may_be_gone = deleted.is_some_and(|deleted| deleted <= at);
                if visible(*vdi) && instant.began <= at {
                    // Not answered yet, it may lack what was not flushed.
                    let allowed = |sector| {
                        let mut values = of.in_snapshot(sector, *taken);
                        if !answered {
                            values.extend(of.after_crash(sector, kind, at));
                        }
                        values
                    };
                    holds(world, *vdi, allowed).map_err(|e| format!("a snapshot: {e}"))?;
                } else if answered && !may_be_gone {
                    return Err(format!("snapshot {vdi} is gone"));
                }
            }
        }
    }
    Ok(())
}

/// The disk has the size it was given last, or one it was being given; what
/// it grew by reads as zeros.
fn has_size(ran: &Ran, world: &World, vdi: Uuid, at: At) -> Result<(), String> {
    let chain = Chain::open(world.repo.volumes.as_ref(), &VolumeName::vhd(vdi)).map_err(|e| e.to_string())?;
    let size = chain.virtual_bytes();
    let given = ran.sizes.iter().filter(|sizes| sizes.when.ended <= at).map(|sizes| sizes.virtual_bytes);
    let given = given.max().unwrap_or(BLOCKS * BLOCK_BYTES);
    let begun = ran.sizes.iter().filter(|sizes| sizes.when.began <= at && at < sizes.when.ended);
    if size != given && !begun.map(|sizes| sizes.virtual_bytes).any(|bytes| bytes == size) {
        return Err(format!("the disk has {size} bytes, and was given {given}"));
    }
    let mut bytes = [0; 512];
    for offset in [BLOCKS * BLOCK_BYTES, size.saturating_sub(512)].into_iter().filter(|at| *at < size) {
        chain.read_at(&mut bytes, offset).map_err(|e| e.to_string())?;
        if size > BLOCKS * BLOCK_BYTES && bytes != [0; 512] {
            return Err(format!("byte {offset}, past the size it had, is not zero"));
        }
    }
    Ok(())
}

fn holds(
    world: &World,
    vdi: Uuid,
    allowed: impl Fn(u64) -> std::collections::BTreeSet<Value>,
) -> Result<(), String> {
    let chain = Chain::open(world.repo.volumes.as_ref(), &VolumeName::vhd(vdi)).map_err(|e| e.to_string())?;
    let mut bytes = [0; 512];
    for sector in tracked(BLOCKS) {
        chain.read_at(&mut bytes, sector * 512).map_err(|e| e.to_string())?;
        let value = unstamp(&bytes, sector).map_err(|e| format!("sector {sector} holds {e}"))?;
        let allowed = allowed(sector);
        if !allowed.contains(&value) {
            return Err(format!("sector {sector} holds {value:x}, allowed {allowed:x?}"));
        }
    }
    // Sectors nobody ever wrote.
    for sector in (0..BLOCKS).map(|block| block * 4096 + 1000) {
        chain.read_at(&mut bytes, sector * 512).map_err(|e| e.to_string())?;
        if bytes != [0; 512] {
            return Err(format!("sector {sector}, never written, is not zero"));
        }
    }
    Ok(())
}

/// Plays and crashes one scenario with one seed.
pub fn campaign(
    scenario: &Scenario,
    backend: Backend,
    seed: u64,
    sabotage: Option<Sabotage>,
    effort: Effort,
    found: &mut Findings,
    first_only: bool,
) {
    let ran = scenario.play(backend, seed, sabotage);
    crash_everywhere(&format!("{} on {backend:?}", scenario.name), &ran, effort, seed, found, first_only);
}

/// The long run is `COPPICE_CRASH_SEEDS=200 tests/run crash`.
fn seeds() -> u64 {
    std::env::var("COPPICE_CRASH_SEEDS").ok().and_then(|text| text.parse().ok()).unwrap_or(8)
}

/// Seeds by scenario in which a long run found something: played for ever. An
/// image that had grown was cut where its footer of before still stood.
const REMEMBERED: [(&str, u64); 1] = [("growth", 42)];

/// Of so many seeds, one is played on devices too.
const DEVICES_SHARE: u64 = 4;

/// Plays and crashes all scenarios; at least so many distinct states.
fn crash_all(backend: Backend, played: u64, states_min: usize) {
    let whole = seeds() >= 8 && std::env::var_os("COPPICE_CRASH_SCENARIO").is_none();
    let effort = Effort { stride: 2, singles_max: 3, randoms: 2, again: 3 };
    let mut total = 0;
    let mut failures = Vec::new();
    for scenario in all(backend) {
        let mut found = Findings::default();
        let remembered = REMEMBERED.iter().filter(|(name, _)| *name == scenario.name).map(|(_, seed)| *seed);
        for seed in (0..played).chain(remembered) {
            campaign(&scenario, backend, seed, None, effort, &mut found, false);
        }
        println!("{}: {} crashes tried, {} distinct states", scenario.name, found.tried, found.states.len());
        total += found.states.len();
        failures.append(&mut found.failures);
    }
    println!("{total} distinct states in all, on {backend:?}");
    assert!(total >= states_min || !whole, "only {total} distinct states: the scenarios have become poorer");
    assert!(
        failures.is_empty(),
        "{} failures, first ones:\n{}",
        failures.len(),
        failures[..failures.len().min(10)].join("\n")
    );
}

#[test]
fn no_crash_loses_a_promised_byte() {
    crash_all(Backend::Files, seeds(), 100_000);
}

/// The same operations where volumes are devices; with fewer seeds, for time.
#[test]
fn no_crash_loses_a_promised_byte_on_devices() {
    crash_all(Backend::Devices, seeds().div_ceil(DEVICES_SHARE), 40_000);
}
