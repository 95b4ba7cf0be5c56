//! kill -9 of each process at random moments; afterwards every acknowledged
//! write is there (invariant 1), and nothing needs to be put right by hand.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use coppice::demo::load::Load;
use coppice::demo::verify;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use crate::support::guest::Guest;
use crate::support::host::{Daemon, Host, wait_until};

/// Size of the disks here.
const DISK: &str = "64MiB";
const DISK_BYTES: u64 = 64 << 20;

/// A new seed, printed so that a failure can be looked at again.
fn seed() -> u64 {
    let seed = uuid::Uuid::new_v4().as_u64_pair().0;
    eprintln!("seed {seed}");
    seed
}

#[test]
fn a_killed_tapdisk_loses_no_acknowledged_write() {
    let mut rng = SmallRng::seed_from_u64(seed());
    let host = Host::new();
    host.sr("store");
    let vdi = host.disk("store", "d", DISK);
    let mut guest = Guest::new(DISK_BYTES, rng.random());
    for round in 0..8 {
        let at = host.attach(&vdi);
        guest.check(&at);
        if round == 4 {
            // From here on over an ancestor's data.
            host.ok(&["vdi", "snapshot", "d"]);
        }
        let last = rng.random_range(50..2000);
        let acked = guest.write(&at, |acked| {
            if acked == last {
                at.kill();
            }
            false
        });
        assert!(acked >= last, "round {round}: {acked} of {last}");
        // What is dead is not attached; smd may still have to notice.
        wait_until("the dead disk to be detached", || {
            host.cli(&["vdi", "detach", "d"]).status == 0
                || host.ok(&["vdi", "show", "d"])["attached"] == false
        });
    }
    guest.check(&host.attach(&vdi));
}

#[test]
fn a_killed_smd_leaves_disks_served_and_snapshots_whole() {
    let mut rng = SmallRng::seed_from_u64(seed());
    let mut host = Host::new();
    host.sr("store");
    let vdi = host.disk("store", "d", DISK);
    let at = host.attach(&vdi);
    let load = Load::start(&at.socket, &at.export, rng.random()).unwrap();
    for _ in 0..6 {
        let wait = Duration::from_millis(rng.random_range(0..60));
        std::thread::scope(|scope| {
            // It may be answered, refused or cut off; each must be whole.
            let asked = scope.spawn(|| {
                let said = host_cli(&host, &["vdi", "snapshot", "d", "--name", "s"]);
                assert!(said == 0 || said == 1, "status {said}");
            });
            std::thread::sleep(wait);
            kill_smd(&host);
            asked.join().unwrap();
        });
        host.kill(Daemon::Smd);
        host.start(Daemon::Smd);
        assert!(!load.has_failed(), "the disk stopped serving");
    }
    host.ok(&["vdi", "snapshot", "d", "--name", "last"]);
    let (oracle, tally) = load.stop().unwrap();
    assert!(tally.writes > 0);
    verify::disk(&at.socket, &at.export, oracle.content()).unwrap();
    merge_all(&host, &vdi);
    verify::disk(&at.socket, &at.export, oracle.content()).unwrap();
}

fn host_cli(host: &Host, args: &[&str]) -> i32 {
    host.cli(args).status
}

/// Kills without reaping, while the host is borrowed elsewhere.
fn kill_smd(host: &Host) {
    let pid = nix::unistd::Pid::from_raw(i32::try_from(host.pid(Daemon::Smd)).unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
}

#[test]
fn a_killed_gcd_goes_on_where_it_was() {
    let mut rng = SmallRng::seed_from_u64(seed());
    let mut host = Host::new();
    host.sr("store");
    let vdi = host.disk("store", "d", "256MiB");
    let at = host.attach(&vdi);
    let load = Load::start(&at.socket, &at.export, rng.random()).unwrap();
    chain(&host, &load, 5);
    for snapshot in 1..=5 {
        host.ok(&["vdi", "delete", &format!("s{snapshot}")]);
    }
    for _ in 0..8 {
        host.cli(&["gc", "run"]);
        std::thread::sleep(Duration::from_millis(rng.random_range(0..400)));
        host.kill(Daemon::Gcd);
        host.start(Daemon::Gcd);
        assert!(!load.has_failed(), "the disk stopped serving");
    }
    merge_all(&host, &vdi);
    let (oracle, _) = load.stop().unwrap();
    verify::disk(&at.socket, &at.export, oracle.content()).unwrap();
    host.ok(&["vdi", "detach", &vdi]);
    let at = host.attach_read_only(&vdi);
    verify::disk(&at.socket, &at.export, oracle.content()).unwrap();
}

#[test]
fn a_tapdisk_killed_in_a_merge_loses_nothing() {
    let mut rng = SmallRng::seed_from_u64(seed());
    let host = Host::new();
    host.sr("store");
    let vdi = host.disk("store", "d", DISK);
    let mut guest = Guest::new(DISK_BYTES, rng.random());
    for round in 0..6 {
        let at = host.attach(&vdi);
        guest.check(&at);
        guest.write(&at, |acked| acked == 600);
        host.ok(&["vdi", "snapshot", "d", "--name", "s"]);
        guest.write(&at, |acked| acked == 600);
        host.ok(&["vdi", "delete", "s"]);
        let (began, limit) = (Instant::now(), Duration::from_millis(rng.random_range(20..800)));
        let killed = AtomicBool::new(false);
        guest.write(&at, |_| {
            if began.elapsed() > limit && !killed.swap(true, Ordering::Relaxed) {
                at.kill();
            }
            false
        });
        assert!(killed.load(Ordering::Relaxed), "round {round}: the disk went away by itself");
        wait_until("the dead disk to be detached", || {
            host.cli(&["vdi", "detach", "d"]).status == 0
                || host.ok(&["vdi", "show", "d"])["attached"] == false
        });
    }
    let at = host.attach(&vdi);
    guest.check(&at);
    merge_all(&host, &vdi);
    guest.check(&at);
}

/// Takes `n` snapshots, `s1` and so on, with writes between.
fn chain(host: &Host, load: &Load, n: u32) {
    for i in 1..=n {
        let before = load.tally().writes;
        wait_until("some writes", || load.tally().writes > before + 1000);
        host.ok(&["vdi", "snapshot", "d", "--name", &format!("s{i}")]);
    }
}

/// Deletes all snapshots and merges until the disk is one image.
fn merge_all(host: &Host, vdi: &str) {
    for each in host.ok(&["vdi", "list"]).as_array().unwrap() {
        if each["kind"] == "snapshot" {
            host.ok(&["vdi", "delete", each["uuid"].as_str().unwrap()]);
        }
    }
    wait_until("the chain to be one image", || {
        host.cli(&["gc", "run", "--wait"]);
        host.ok(&["vdi", "show", vdi])["depth"] == 1
    });
}
