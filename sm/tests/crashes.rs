//! Snapshots and recovery on the crash simulator: every instant, killed or
//! without power, and crashes inside the recovery. Longer scenarios with live
//! guests are the workspace's crash tests; here only trees are looked at.

#![allow(clippy::unwrap_used, reason = "a helper of tests fails by panicking")]

mod support;

use sm::journal::SiblingKind;
use sm::ops::{self, Wanted};
use sm::recover::{self, Scope};
use sm::{Repo, image, scan};
use support::{FakeHost, assert_clean, byte, fill, repo};
use uuid::Uuid;
use vhd::meta::Meta;
use vhd::storage::sim::{Crashed, Effort, Seen, SimDisk};
use vhd::storage::{Access, VolumeName};
use vhd::units::BLOCK_BYTES;

/// Marks the instant at which the operation was answered.
const ANSWERED: u64 = 1;

fn world(disk: &SimDisk, process: u64) -> (Repo, FakeHost) {
    let host = FakeHost::new(disk.volumes());
    (repo(disk.volumes(), &host, process), host)
}

fn recovered(disk: &SimDisk) -> Result<Repo, String> {
    let (repo, _) = world(disk, 2);
    recover::recover(&repo, Scope::All).map_err(|e| e.to_string())?;
    recover::sweep(&repo).map_err(|e| e.to_string())?;
    Ok(repo)
}

/// Both disks still read what was flushed; there are two siblings or none,
/// and two once the operation was answered.
fn judge(repo: &Repo, vdis: [Uuid; 2], answered: bool) -> Result<(), String> {
    let tree = scan::scan(repo).map_err(|e| e.to_string())?.tree;
    for node in &tree.nodes {
        if let Some(broken) = node.broken() {
            return Err(format!("{}: {broken}", node.volume));
        }
    }
    let visible: Vec<Uuid> = tree.nodes.iter().filter(|n| !n.is_hidden()).map(|n| n.uuid).collect();
    let siblings: Vec<Uuid> = visible.iter().copied().filter(|v| !vdis.contains(v)).collect();
    if visible.len() - siblings.len() != 2 {
        return Err(format!("a disk is gone: {visible:?}"));
    }
    let expected: &[usize] = if answered { &[2] } else { &[0, 2] };
    if !expected.contains(&siblings.len()) {
        return Err(format!("{} siblings, answered: {answered}", siblings.len()));
    }
    let hidden = tree.nodes.len() - visible.len();
    if hidden != siblings.len() {
        return Err(format!("{hidden} bases for {} siblings", siblings.len()));
    }
    let mut read: Vec<u8> = visible.iter().map(|&vdi| byte(repo, vdi, 0)).collect();
    read.sort_unstable();
    let both: &[u8] = if siblings.is_empty() { &[1, 2] } else { &[1, 1, 2, 2] };
    if read != both {
        return Err(format!("the disks read {read:?}"));
    }
    assert_clean(repo);
    Ok(())
}

fn explored(attached: bool) {
    let disk = SimDisk::new();
    let (repo, _) = world(&disk, 1);
    let vdis = [1, 2].map(|content| {
        let vdi = ops::create(&repo, "disk", 2 * BLOCK_BYTES).unwrap();
        fill(&repo, vdi, 0, content);
        vdi
    });
    if attached {
        ops::attach(&repo, vdis[0], false).unwrap();
    }
    let from = disk.log_len();
    let wanted = vdis.map(|vdi| Wanted { vdi, name: "s".into() });
    ops::snapshot(&repo, SiblingKind::Snapshot, &wanted).unwrap();
    disk.mark(ANSWERED);

    let (mut seen, mut seen_again) = (Seen::default(), Seen::default());
    let mut again = 0;
    let mut judge_one = |crashed: &Crashed| {
        let answered = crashed.marks.contains(&ANSWERED);
        let repo = recovered(&crashed.disk)?;
        judge(&repo, vdis, answered)?;
        if answered {
            crashed.disk.mark(ANSWERED);
        }
        // Crashes inside the recovery that just ran.
        let tally = crashed.disk.explore(0, Effort::LIGHT, &mut seen_again, &mut |inner| {
            judge(&recovered(&inner.disk)?, vdis, answered)
        })?;
        again += tally.judged;
        Ok(())
    };
    let tally = disk.explore(from, Effort::LIGHT, &mut seen, &mut judge_one).unwrap();
    println!("attached: {attached}: {} states, {again} inside recoveries", tally.judged);
    assert!(tally.judged > 100, "{tally:?}");
}

#[test]
fn a_snapshot_of_two_detached_disks_is_all_or_nothing() {
    explored(false);
}

#[test]
fn a_snapshot_of_an_attached_and_a_detached_disk_is_all_or_nothing() {
    explored(true);
}

/// smd dies at every change it makes while the tapdisk lives on: the tapdisk
/// and the next smd agree.
#[test]
fn smd_dies_and_the_tapdisk_goes_on() {
    for changes in 0.. {
        let disk = SimDisk::new();
        let host = FakeHost::new(disk.new_process().volumes());
        let smd = disk.new_process();
        let first = repo(smd.volumes(), &host, 1);
        let vdis = [1, 2].map(|content| {
            let vdi = ops::create(&first, "disk", 2 * BLOCK_BYTES).unwrap();
            fill(&first, vdi, 0, content);
            ops::attach(&first, vdi, false).unwrap();
            vdi
        });
        smd.kill_process_after(changes);
        let wanted = vdis.map(|vdi| Wanted { vdi, name: "s".into() });
        let outcome = ops::snapshot(&first, SiblingKind::Snapshot, &wanted);
        let alive = smd.is_alive();
        let second = repo(disk.new_process().volumes(), &host, 2);
        recover::recover(&second, Scope::Vdis(&vdis)).unwrap();
        recover::sweep(&second).unwrap();
        judge(&second, vdis, outcome.is_ok()).unwrap_or_else(|e| panic!("after {changes}: {e}"));
        ops::snapshot(&second, SiblingKind::Snapshot, &wanted).unwrap();
        if alive {
            assert!(changes > 30, "{changes}");
            return;
        }
    }
}

/// Whoever gives an image another parent dies at any change, and another does
/// it again: once that is answered, no power cut takes it back. The first
/// locator too leads to the new parent then, for readers that look no further.
#[test]
fn a_parent_changed_by_two_is_changed_for_good() {
    for changes in 0.. {
        let disk = SimDisk::new();
        let (world, _) = world(&disk, 1);
        let [image, parent] = ["one", "two"].map(|name| {
            let vdi = ops::create(&world, name, 2 * BLOCK_BYTES).unwrap();
            fill(&world, vdi, 0, 1);
            ops::snapshot(&world, SiblingKind::Snapshot, &[Wanted { vdi, name: "s".into() }]).unwrap();
            VolumeName::vhd(vdi)
        });
        let meta = |disk: &SimDisk, image: &VolumeName| {
            let volume = disk.volumes().open(image, Access::Read).map_err(|e| e.to_string())?;
            Meta::read(volume.as_ref()).map_err(|e| e.to_string())
        };
        let base = meta(&disk, &parent).unwrap().parent.unwrap();
        let volume = base.candidates().unwrap().remove(0);
        let from = disk.log_len();
        let first = disk.new_process();
        first.kill_process_after(changes);
        let host = FakeHost::new(disk.volumes());
        let outcome = image::set_parent(&repo(first.volumes(), &host, 1), &image, &volume, base.uuid);
        let second = repo(disk.new_process().volumes(), &host, 2);
        image::set_parent(&second, &image, &volume, base.uuid).unwrap();
        disk.mark(ANSWERED);
        let mut judge = |crashed: &Crashed| {
            let now = meta(&crashed.disk, &image)?.parent.ok_or("no parent")?;
            let leads = now.paths.first().is_some_and(|path| path.ends_with(volume.as_str()));
            let changed = now.uuid == base.uuid && leads;
            let answered = crashed.marks.contains(&ANSWERED);
            if changed || !answered { Ok(()) } else { Err(format!("after {changes}: {:?}", now.paths)) }
        };
        disk.explore(from, Effort::LIGHT, &mut Seen::default(), &mut judge).unwrap();
        if outcome.is_ok() {
            assert!(changes > 3, "{changes}");
            return;
        }
    }
}
