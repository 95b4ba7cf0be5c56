//! Operations on whole disks: growth, revert and copy.

use sm::catalog::Label;
use sm::journal::SiblingKind;
use sm::ops::{self, Wanted};
use sm::progress::Progress;
use uuid::Uuid;
use vhd::chain::Chain;
use vhd::storage::VolumeName;
use vhd::units::BLOCK_BYTES;

use super::oracle::{Instant, Oracle, tracked, unstamp};
use super::scenarios::{Expected, Play, Resized, Scenario, Snapshot};
use super::world::BLOCKS;

/// All of them.
pub const ALL: [Scenario; 5] = [
    Scenario { name: "grow live", go: grow_live },
    Scenario { name: "grow offline", go: grow_offline },
    Scenario { name: "revert", go: revert },
    Scenario { name: "revert divided", go: revert_divided },
    Scenario { name: "copy", go: copy },
];

/// Room in the table's last sector; room only where blocks are; and as
/// before, once more.
const SIZES: [u64; 3] = [32 * BLOCK_BYTES, 300 * BLOCK_BYTES, 1000 * BLOCK_BYTES];

impl Play {
    pub fn resize(&mut self, virtual_bytes: u64) {
        let began = self.world.disk.log_len();
        if let Err(error) = ops::resize(&self.world.repo, self.vdi, virtual_bytes) {
            self.failures.push(format!("resize to {virtual_bytes}: {error}"));
            return;
        }
        let when = Instant { began, ended: self.world.disk.log_len() };
        self.sizes.push(Resized { virtual_bytes, when });
    }

    /// What a disk nobody writes holds now, sector by sector.
    fn content(&self, vdi: Uuid) -> Vec<(u64, u64)> {
        let volumes = self.world.repo.volumes.as_ref();
        let chain = Chain::open(volumes, &VolumeName::vhd(vdi)).expect("open");
        let mut bytes = [0; 512];
        let mut read = |sector: u64| {
            chain.read_at(&mut bytes, sector * 512).expect("read");
            (sector, unstamp(&bytes, sector).expect("a stamp"))
        };
        tracked(BLOCKS).map(&mut read).collect()
    }

    /// Goes back to a snapshot: as if all of the disk were written at once,
    /// durably, with what the snapshot holds.
    fn revert(&mut self, to: Uuid) {
        let began = self.world.disk.log_len();
        let content = self.content(to);
        for &(sector, value) in &content {
            self.oracle.began(std::iter::once(sector), value, began, true);
        }
        if let Err(error) = ops::revert(&self.world.repo, self.vdi, to) {
            self.failures.push(format!("revert: {error}"));
            return;
        }
        let ended = self.world.disk.log_len();
        for (sector, value) in content {
            self.oracle.answered(std::iter::once(sector), value, began, ended);
        }
    }

    fn copy(&mut self, vdi: Uuid) {
        let began = self.world.disk.log_len();
        let repo = &self.world.repo;
        match ops::copy(repo, vdi, repo, "copy", &Progress::default(), || ()) {
            Ok(vdi) => {
                let instant = Instant { began, ended: self.world.disk.log_len() };
                self.snapshots.push(Snapshot { vdi, instant, taken: instant, deleted: None });
            }
            Err(error) => self.failures.push(format!("copy: {error}")),
        }
    }

    /// Another disk takes the place of the one that is played with.
    fn exchange(&mut self, other: &mut (Uuid, Oracle)) {
        std::mem::swap(&mut self.vdi, &mut other.0);
        std::mem::swap(&mut self.oracle, &mut other.1);
    }
}

/// A disk grows while it is written, over nothing and over a snapshot.
fn grow_live(play: &mut Play) {
    play.attach();
    play.traffic(20);
    for (nth, size) in SIZES.into_iter().enumerate() {
        play.meanwhile(25);
        play.resize(size);
        play.traffic(6);
        if nth == 1 {
            play.snapshot();
            play.traffic(6);
        }
    }
}

/// The same of a disk nobody uses.
fn grow_offline(play: &mut Play) {
    play.attach();
    play.traffic(15);
    play.detach();
    play.resize(SIZES[0]);
    play.snapshot();
    play.attach();
    play.traffic(10);
    play.detach();
    play.resize(SIZES[1]);
    play.attach();
    play.traffic(8);
    play.detach();
    play.resize(SIZES[2]);
}

/// Back to a snapshot that holds nothing of its own, and on from there.
fn revert(play: &mut Play) {
    play.attach();
    play.traffic(12);
    play.detach();
    let first = play.snapshot();
    play.attach();
    play.traffic(12);
    play.detach();
    let to = play.snapshots[first].vdi;
    play.revert(to);
    play.attach();
    play.traffic(8);
    play.detach();
    play.collect();
}

/// Back to a sibling that was written to, which becomes a base.
fn revert_divided(play: &mut Play) {
    play.attach();
    play.traffic(10);
    play.detach();
    let began = play.world.disk.log_len();
    let wanted = Wanted { vdi: play.vdi, name: "clone".to_owned() };
    let made = ops::snapshot(&play.world.repo, SiblingKind::Clone, &[wanted]).expect("clone");
    let instant = Instant { began, ended: play.world.disk.log_len() };
    let mut other = (made[0], play.oracle.clone());
    for _ in 0..2 {
        play.exchange(&mut other);
        play.attach();
        play.traffic(8);
        play.detach();
    }
    // Only labels know what is a snapshot of what.
    let label = Label { snapshot_of: Some(play.vdi), ..Label::default() };
    play.world.repo.labels.put(other.0, &label).expect("label");
    play.revert(other.0);
    play.attach();
    play.traffic(6);
    play.detach();
    play.others.push(Expected::Made { vdi: other.0, oracle: other.1, instant });
    play.collect();
}

/// Copies of a disk and of a snapshot, while the disk goes on.
fn copy(play: &mut Play) {
    play.attach();
    play.traffic(12);
    play.detach();
    play.copy(play.vdi);
    let first = play.snapshot();
    play.attach();
    play.traffic(10);
    let (vdi, taken) = (play.snapshots[first].vdi, play.snapshots[first].taken);
    play.copy(vdi);
    // It holds what the snapshot does, whatever was written since.
    if let Some(copy) = play.snapshots.last_mut() {
        copy.taken = taken;
    }
    play.traffic(5);
}
