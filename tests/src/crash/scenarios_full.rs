//! A filesystem without room: what was acknowledged stays, and what the guest
//! gives up makes room, though nothing else does.

use super::guest::Guest;
use super::scenarios::{Play, Scenario};
use super::world::locked;

/// All of them.
pub const ALL: [Scenario; 1] = [Scenario { name: "full", go: full }];

/// ENOSPC.
const NO_SPACE: i32 = 28;
/// Steps in which failed metadata is tried again for sure.
const RETRY_STEPS: usize = 1_000;
/// Steps in which slots that are free give their space back.
const SETTLE_STEPS: usize = 200;
/// How often a flush is tried until it must have gone through.
const FLUSHES_MAX: usize = 4;

/// How often it becomes full.
const ROUNDS: u32 = 4;

/// Full, and something is given up; then full, and all of it is given up and
/// written again.
fn full(play: &mut Play) {
    play.attach();
    play.traffic(8);
    let Some(guest) = play.guest.clone() else { return };
    let mut guest = locked(&guest);
    for round in 0..ROUNDS {
        if let Err(what) = until_room(play, &mut guest, round % 2 == 1) {
            play.failures.push(format!("round {round}: {what}"));
        }
    }
    guest.tolerated = None;
    guest.run(6);
}

/// Blocks that are on the disk, durably, and one that is not; then there is
/// no room for the metadata of that one, until others are given up.
fn until_room(play: &Play, guest: &mut Guest, again: bool) -> Result<(), &'static str> {
    let must = |fine: bool, what: &'static str| if fine { Ok(()) } else { Err(what) };
    let (disk, volumes) = (&play.world.disk, &play.world.repo.volumes);
    guest.trim_block(2);
    guest.write_block(0);
    guest.write_block(1);
    must(heals(guest), "a flush while there is room")?;
    guest.idle(SETTLE_STEPS);
    guest.tolerated = Some(NO_SPACE);
    guest.write_block(2);
    if guest.toss(2) == 1 {
        // What waits with it: a block that leaves, and comes back.
        guest.trim_block(1);
        guest.write_block(1);
    }
    disk.set_free_bytes(Some(0));
    must(!guest.try_flush(), "metadata found room where there is none")?;
    guest.trim_block(0);
    if again {
        // The space of one goes to another at once, while the disk may still
        // say that it is the first one's.
        guest.trim_block(1);
        guest.trim_block(2);
        let room = (0..RETRY_STEPS).any(|_| {
            guest.idle(1);
            volumes.space().is_ok_and(|space| space.free > 0)
        });
        must(room, "what was given up gives nothing back")?;
        [1, 2, 0].into_iter().for_each(|block| guest.begin_write(block));
        guest.run(3);
    } else {
        must(heals(guest), "what was given up makes no room")?;
    }
    // Whatever comes then, with hardly any room, the disk goes on.
    guest.run(6);
    disk.set_free_bytes(None);
    must(heals(guest), "room again, and no use of it")
}

/// Whether a flush goes through, if it is tried now and then.
fn heals(guest: &mut Guest) -> bool {
    (0..FLUSHES_MAX).any(|_| {
        guest.idle(RETRY_STEPS);
        guest.try_flush()
    })
}
