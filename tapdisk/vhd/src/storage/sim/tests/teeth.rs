//! A whole scenario, as the big ones are written: every crash of a recorded
//! run is recovered from and judged, and each labelled step in turn is left
//! out and must be missed.

use super::super::super::VolumeName;
use super::super::{Effort, Seen, Tally};
use super::*;

/// Two files change content together: both old or both new, and new once
/// acknowledged. Everything needs its place here:
///   1. new contents under temporary names, flushed, the names synced;
///   2. record: from here on the change is decided;
///   3. both renames, synced; acknowledged; record deleted.
const ACKNOWLEDGED: u64 = 1;

const PAIRS: [(&str, &str); 2] = [("tmp-1.vhd", "a.vhd"), ("tmp-2.vhd", "b.vhd")];

/// Where the scenario proper begins in the log.
const START: u64 = 2;

fn run(sabotage: Option<Sabotage>) -> SimDisk {
    let disk = SimDisk::new();
    if let Some(sabotage) = sabotage {
        disk.sabotage(sabotage);
    }
    drop(file(&disk, "a.vhd", 4, 1));
    drop(file(&disk, "b.vhd", 4, 1));
    disk.make_folder(".coppice/journal").unwrap();
    disk.mark(START);
    scenario(&disk).unwrap();
    disk
}

fn scenario(disk: &SimDisk) -> std::io::Result<()> {
    let volumes = disk.volumes();
    for (temporary, _) in PAIRS {
        let new = volumes.create(&volume(temporary))?;
        new.write_at(&[2; 2048], 0)?;
        new.flush("swap: content")?;
    }
    volumes.sync("swap: temporary names")?;
    volumes.put_record("swap", b"decided", "swap: decide")?;
    for (temporary, name) in PAIRS {
        volumes.swap(&volume(temporary), &volume(name), &volume("old.vhd"))?;
    }
    volumes.sync("swap: names")?;
    disk.mark(ACKNOWLEDGED);
    volumes.delete_record("swap", "swap: forget")
}

fn volume(name: &str) -> VolumeName {
    VolumeName::new(name).unwrap()
}

/// Rolls forward what was decided and removes what was not.
///
/// The record is synced before anything is built on it: its writer may have
/// been killed between renaming and syncing it, and a power cut now could
/// take the record and leave one of our renames.
fn recover(disk: &SimDisk) -> std::io::Result<()> {
    let volumes = disk.volumes();
    volumes.sync_records("recover: record")?;
    let decided = volumes.record("swap")?.is_some_and(|bytes| bytes == b"decided");
    for (temporary, name) in PAIRS.map(|(t, n)| (volume(t), volume(n))) {
        if !decided {
            volumes.delete(&temporary)?;
        } else if volumes.list()?.contains(&temporary) {
            volumes.swap(&temporary, &name, &volume("old.vhd"))?;
        }
    }
    if volumes.records()?.is_empty() {
        return Ok(());
    }
    volumes.sync("recover: names")?;
    volumes.delete_record("swap", "recover: forget")
}

fn judge(disk: &SimDisk, acknowledged: bool) -> Result<(), String> {
    let names = disk.list("").map_err(|error| error.to_string())?;
    if names != ["a.vhd", "b.vhd"] {
        return Err(format!("names {names:?}"));
    }
    let (a, b) = (sectors(disk, "a.vhd"), sectors(disk, "b.vhd"));
    match (a.as_slice(), b.as_slice()) {
        ([2, 2, 2, 2], [2, 2, 2, 2]) => Ok(()),
        ([1, 1, 1, 1], [1, 1, 1, 1]) if !acknowledged => Ok(()),
        other => Err(format!("contents {other:?}, acknowledged {acknowledged}")),
    }
}

/// Every crash of a run, and of each recovery from one.
fn all_crashes(disk: &SimDisk) -> Result<Tally, String> {
    let start = disk.marks().iter().find(|(_, mark)| *mark == START).map_or(0, |(at, _)| *at);
    let (mut seen, mut seen_inside) = (Seen::default(), Seen::default());
    let mut inside = Tally::default();
    let mut outside = disk.explore(start, Effort::FULL, &mut seen, &mut |crashed| {
        let acknowledged = crashed.marks.contains(&ACKNOWLEDGED);
        let after = &crashed.disk;
        // Equal states with other promises must not be taken for one.
        after.mark(u64::from(acknowledged));
        recover(after).map_err(|error| error.to_string())?;
        judge(after, acknowledged)?;
        let tally = after.explore(1, Effort::LIGHT, &mut seen_inside, &mut |again| {
            recover(&again.disk).map_err(|error| error.to_string())?;
            judge(&again.disk, acknowledged)
        })?;
        inside.judged += tally.judged;
        Ok(())
    })?;
    outside.judged += inside.judged;
    Ok(outside)
}

#[test]
fn every_crash_of_a_swap_is_recovered_from() {
    let tally = all_crashes(&run(None)).unwrap();
    println!("{tally:?}");
    assert!(tally.judged > 150, "only {tally:?}");
}

#[test]
fn every_step_left_out_is_missed() {
    let good = run(None);
    all_crashes(&good).unwrap();
    let mut unpunished = Vec::new();
    for (step, why) in good.whys().into_iter().filter(|(_, why)| *why != "set up") {
        if all_crashes(&run(Some(Sabotage::of(step, why)))).is_ok() {
            unpunished.push((step, why));
        }
    }
    // A record that stays behind is found and deleted again by the next
    // recovery.
    let harmless = [
        (Step::SyncNames, "recover: forget"),
        (Step::SyncNames, "swap: forget"),
        (Step::Record, "recover: forget"),
        (Step::Record, "swap: forget"),
    ];
    assert_eq!(unpunished, harmless);
}

#[test]
fn a_crash_state_costs_little() {
    let disk = SimDisk::new();
    let a = file(&disk, "a", 4096, 1);
    for n in 0..500_u64 {
        a.write_at(&[2; 1024], n * 4096).unwrap();
        if n % 50 == 0 {
            a.flush("now and then").unwrap();
        }
    }
    let begun = std::time::Instant::now();
    let mut seen = BTreeSet::new();
    let mut rng = rng();
    for prefix in 4..=disk.log_len() {
        for strategy in [AllLost, RandomPerOp, RandomPerSector] {
            seen.insert(disk.crash(prefix, PowerCut, &mut rng, strategy).state_hash());
        }
    }
    let each = begun.elapsed() / u32::try_from(3 * disk.log_len()).unwrap();
    println!("{each:?} for each of the states, {} of them distinct", seen.len());
    assert!(each.as_millis() < 5, "{each:?} for each");
}
