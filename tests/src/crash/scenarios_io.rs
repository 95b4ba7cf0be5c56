//! Imports, and groups of disks, before the crash.

use sm::journal::SiblingKind;
use sm::ops::{self, Format, ImportWanted, Wanted};
use sm::progress::Progress;
use uuid::Uuid;

use super::oracle::{Instant, Oracle};
use super::scenarios::{Expected, Play, Scenario, Snapshot};
use super::world::{BLOCKS, locked};

/// All of them.
pub(super) const ALL: [Scenario; 3] = [
    Scenario { name: "import", go: import },
    Scenario { name: "delta", go: delta },
    Scenario { name: "group", go: group },
];

fn export(play: &mut Play, vdi: Uuid, base: Option<Uuid>) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut sink = |piece: &[u8]| {
        bytes.extend_from_slice(piece);
        Ok(())
    };
    let progress = Progress::default();
    let done = ops::export(&play.world.repo, vdi, base, Format::Vhd, &progress, |_| (), &mut sink);
    if let Err(error) = done {
        play.failures.push(format!("export: {error}"));
    }
    bytes
}

/// The disk, which nobody writes meanwhile, comes in once more.
fn come_in(play: &mut Play, base: Option<Uuid>, bytes: &[u8]) -> Option<Uuid> {
    let began = play.world.disk.log_len();
    let wanted = ImportWanted { name: "came", format: Format::Vhd, base };
    let mut stream = bytes;
    match ops::import(&play.world.repo, &wanted, &mut stream, &Progress::default(), || ()) {
        Ok(vdi) => {
            let instant = Instant { began, ended: play.world.disk.log_len() };
            play.snapshots.push(Snapshot { vdi, instant, taken: instant, deleted: None });
            Some(vdi)
        }
        Err(error) => {
            play.failures.push(format!("import: {error}"));
            None
        }
    }
}

/// A whole disk comes in; one that breaks off leaves nothing.
fn import(play: &mut Play) {
    play.attach();
    play.traffic(20);
    play.detach();
    let bytes = export(play, play.vdi, None);
    let wanted = ImportWanted { name: "cut", format: Format::Vhd, base: None };
    let mut cut = &bytes[..bytes.len() - 600];
    if ops::import(&play.world.repo, &wanted, &mut cut, &Progress::default(), || ()).is_ok() {
        play.failures.push("a stream that breaks off was taken".to_owned());
    }
    come_in(play, None, &bytes);
    play.attach();
    play.traffic(5);
}

/// Deltas come in: over a snapshot, over what was imported (which is divided
/// for it), and over a hidden node.
fn delta(play: &mut Play) {
    play.attach();
    play.traffic(12);
    play.detach();
    let first = play.snapshot();
    let first = play.snapshots[first].vdi;
    let full = export(play, first, None);
    let whole = come_in(play, None, &full);
    play.attach();
    play.traffic(8);
    play.detach();
    let bytes = export(play, play.vdi, Some(first));
    come_in(play, Some(first), &bytes);
    come_in(play, whole, &bytes);
    let tree = sm::scan::scan(&play.world.repo).expect("scan").tree;
    let hidden = tree.nodes.iter().find(|node| node.is_hidden()).map(|node| node.uuid);
    let over_hidden = export(play, play.vdi, hidden);
    come_in(play, hidden, &over_hidden);
    play.attach();
    play.traffic(4);
}

/// A group whose second member dies when it is asked to pause: nobody gets a
/// snapshot. Then the group again, with both.
fn group(play: &mut Play) {
    let other = ops::create(&play.world.repo, "other", BLOCKS << 21).expect("create");
    let made = play.world.disk.log_len();
    play.attach();
    let guest = play.world.attach(other, Oracle::default());
    locked(&guest).run(8);
    play.traffic(8);
    play.meanwhile(20);
    let wanted = [play.vdi, other].map(|vdi| Wanted { vdi, name: "snap".to_owned() });
    let take = |play: &Play| ops::snapshot(&play.world.repo, SiblingKind::Snapshot, &wanted);
    play.world.doom(other);
    if take(play).is_ok() {
        play.failures.push("a snapshot of a group with a dead member was taken".to_owned());
    }
    play.world.kill(other);
    let oracle = std::mem::take(&mut locked(&guest).oracle);
    let guest = play.world.attach(other, oracle);
    locked(&guest).run(4);
    play.meanwhile(20);
    let began = play.world.disk.log_len();
    let taken = take(play);
    let instant = Instant { began, ended: play.world.disk.log_len() };
    play.traffic(4);
    locked(&guest).run(4);
    locked(&guest).drain();
    if let Err(error) = ops::detach(&play.world.repo, other, true) {
        play.failures.push(format!("detach: {error}"));
    }
    let mut guest = locked(&guest);
    play.failures.append(&mut guest.failures);
    let oracle = std::mem::take(&mut guest.oracle);
    match taken.as_deref() {
        Ok(&[mine, its]) => {
            play.snapshots.push(Snapshot { vdi: mine, instant, taken: instant, deleted: None });
            play.others.push(Expected::Snapshot {
                vdi: its,
                of: oracle.clone(),
                instant,
                taken: instant,
                deleted: None,
            });
        }
        other => play.failures.push(format!("group: {other:?}")),
    }
    play.others.push(Expected::Disk { vdi: other, oracle, lives: (made, None) });
}
