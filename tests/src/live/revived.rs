//! A tapdisk that dies is brought back where it was: same socket, same
//! content, without anybody asking; a client that reconnects goes on.

use std::fs::File;
use std::io::Write;
use std::process::{Command, Stdio};
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use serde_json::Value;

use crate::support::guest::Guest;
use crate::support::host::{Attached, Daemon, Host, wait_until};
use crate::support::programs::have;

/// Waits until the disk is served by another process than `before`.
fn served_anew(host: &Host, vdi: &str, before: i32) -> Attached {
    let mut shown = Value::Null;
    wait_until("the tapdisk to be back", || {
        shown = host.ok(&["vdi", "show", vdi]);
        shown["pid"].as_i64().is_some_and(|pid| pid != i64::from(before))
    });
    Attached::of(&shown)
}

fn metric(host: &Host, name: &str) -> u64 {
    let text = host.metrics(Daemon::Smd);
    let line = text.lines().find(|line| line.split([' ', '{']).next() == Some(name));
    line.and_then(|line| line.rsplit(' ').next()?.parse().ok()).unwrap_or_else(|| panic!("{name}: {text}"))
}

#[test]
fn a_killed_tapdisk_comes_back_on_its_socket_with_every_acknowledged_write() {
    let seed = uuid::Uuid::new_v4().as_u64_pair().0;
    eprintln!("seed {seed}");
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut host = Host::new();
    host.sr("store");
    let vdi = host.disk("store", "d", "64MiB");
    let mut guest = Guest::new(64 << 20, rng.random());
    let first = host.attach(&vdi);
    let mut at = first.clone();
    for round in 0..6 {
        let last = rng.random_range(50..800);
        let smd_is_dead = round % 2 == 1;
        if smd_is_dead {
            host.kill(Daemon::Smd);
        }
        let acked = guest.write(&at, |acked| {
            if acked == last {
                at.kill();
            }
            false
        });
        assert!(acked >= last, "round {round}: {acked} of {last}");
        if smd_is_dead {
            host.start(Daemon::Smd);
        }
        at = served_anew(&host, &vdi, at.pid);
        assert_eq!((&at.socket, &at.uri), (&first.socket, &first.uri));
        guest.check(&at);
    }
    assert!(metric(&host, "coppice_tapdisk_deaths_total") >= 1);
    assert!(metric(&host, "coppice_tapdisk_revived_total") >= 1);
    assert!(host.log(Daemon::Smd).contains("tapdisk died"), "it is said in the log");
    assert_eq!(host.ok(&["vdi", "show", &vdi])["down"], Value::Null);
}

#[test]
fn a_reconnecting_client_goes_on() {
    if !have("qemu-io") {
        return;
    }
    let host = Host::new();
    host.sr("store");
    let vdi = host.disk("store", "d", "16MiB");
    let at = host.attach(&vdi);
    let image = format!(
        "driver=nbd,server.type=unix,server.path={},export={},reconnect-delay=60",
        at.socket.display(),
        at.export
    );
    let mut client = Command::new("qemu-io")
        .args(["--image-opts", &image])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut say = client.stdin.take().unwrap();
    writeln!(say, "write -P 0x11 0 1M").unwrap();
    say.flush().unwrap();
    wait_until("the first write", || host.ok(&["vdi", "show", &vdi])["allocated"] != 0);
    at.kill();
    let text = "write -P 0x22 1M 1M\nread -P 0x11 0 1M\nread -P 0x22 1M 1M\nflush\nquit\n";
    say.write_all(text.as_bytes()).unwrap();
    drop(say);
    let said = client.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&said.stdout).into_owned() + &String::from_utf8_lossy(&said.stderr);
    assert!(said.status.success(), "{text}");
    assert!(!text.contains("failed") && !text.contains("error"), "{text}");
    assert_eq!(text.matches("wrote 1048576/1048576").count(), 2, "{text}");
    assert_eq!(text.matches("read 1048576/1048576").count(), 2, "{text}");
}

#[test]
fn a_restarted_smd_finds_running_tapdisks_and_watches_them() {
    let mut host = Host::new();
    host.sr("store");
    let vdi = host.disk("store", "d", "8MiB");
    let at = host.attach(&vdi);
    host.kill(Daemon::Smd);
    host.start(Daemon::Smd);
    assert_eq!(host.attach(&vdi).pid, at.pid, "it was found");
    at.kill();
    let again = served_anew(&host, &vdi, at.pid);
    host.ok(&["vdi", "detach", &vdi]);
    wait_until("the tapdisk to end", || !again.socket.exists());
    assert_eq!(host.ok(&["vdi", "show", &vdi])["attached"], false);
}

#[test]
fn a_disk_that_goes_and_comes_again_is_not_taken_for_dead() {
    let host = Host::new();
    let [held, other] = ["store", "vault"].map(|sr| {
        host.sr(sr);
        host.disk(sr, sr, "8MiB")
    });
    let held_at = host.attach(&held);
    let mut at = host.attach(&other);
    let revived = || metric(&host, "coppice_tapdisk_revived_total");
    let is_well = |vdi: &str| host.ok(&["vdi", "show", vdi])["down"] == Value::Null;
    at.kill();
    wait_until("it to be watched again", || revived() == 1 && is_well(&other));
    // The caretaker is held up in one SR, so it learns late what happens in
    // the other.
    let sr = host.ok(&["sr", "show", "store"])["uuid"].as_str().unwrap().to_owned();
    let lock = File::open(host.run_dir().join(format!("sr/{sr}.lock"))).unwrap();
    lock.lock().unwrap();
    held_at.kill();
    std::thread::sleep(Duration::from_millis(500));
    host.ok(&["vdi", "detach", &other]);
    at = host.attach(&other);
    drop(lock);
    wait_until("the one that died to be back", || revived() >= 2 && is_well(&held));
    let deaths = || metric(&host, "coppice_tapdisk_deaths_total");
    assert_eq!((deaths(), revived()), (2, 2), "{}", host.log(Daemon::Smd));
    assert_eq!(host.ok(&["vdi", "show", &other])["pid"], at.pid);
    // The other one is watched all the same.
    at.kill();
    served_anew(&host, &other, at.pid);
    wait_until("its return to be noted", || revived() >= 3 && is_well(&other));
    assert_eq!((deaths(), revived()), (3, 3), "{}", host.log(Daemon::Smd));
}

#[test]
fn while_it_cannot_come_back_the_reason_is_shown_and_a_detach_ends_it() {
    let host = Host::new();
    let folder = host.sr("store");
    let vdi = host.disk("store", "d", "8MiB");
    let at = host.attach(&vdi);
    let (image, aside) = (folder.join(format!("{vdi}.vhd")), folder.join("aside"));
    std::fs::rename(&image, &aside).unwrap();
    at.kill();
    // Its volume is gone, so it is no VDI of the list; the status names it.
    let mut down = Value::Null;
    wait_until("two attempts", || {
        let status = host.ok(&["status"]);
        down = status.pointer("/smd/status/down/0").cloned().unwrap_or_default();
        down["attempts"].as_u64() >= Some(2)
    });
    assert_eq!(down["vdi"], vdi.as_str());
    assert!(down["error"].as_str().unwrap().contains(&vdi), "{down}");
    std::fs::rename(&aside, &image).unwrap();
    let back = served_anew(&host, &vdi, at.pid);

    // Detached while dead: nobody brings it back.
    std::fs::rename(&image, &aside).unwrap();
    back.kill();
    wait_until("its death to be noticed", || {
        let status = host.ok(&["status"]);
        status["smd"]["status"]["down"].as_array().is_some_and(|down| !down.is_empty())
    });
    host.refused(&["sr", "detach", "store"], "IN_USE");
    host.ok(&["vdi", "detach", &vdi]);
    std::fs::rename(&aside, &image).unwrap();
    // Longer than the caretaker takes to look again.
    std::thread::sleep(Duration::from_secs(3));
    let shown = host.ok(&["vdi", "show", &vdi]);
    assert_eq!((&shown["attached"], &shown["pid"]), (&Value::Bool(false), &Value::Null));
    host.ok(&["vdi", "delete", &vdi]);
}
