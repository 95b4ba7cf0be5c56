//! Large repositories, through the real daemon and command line: what takes
//! how long, in proportion.
//!
//! `COPPICE_SCALE_VDIS` says how many disks there are at the end; everything is
//! measured with a tenth of them, too.

use std::time::{Duration, Instant};

use coppice::client::Daemon as Api;
use serde_json::json;

use crate::support::host::{Daemon, Host};

/// Most that a tenfold number of disks may make an operation slower. It is
/// ten where each disk is looked at; hundred would be what grows with the
/// square.
const RATIO_MAX: f64 = 30.0;
/// What is too quick to be compared: starting a process takes as long.
const FLOOR: Duration = Duration::from_millis(20);

fn disks() -> usize {
    std::env::var("COPPICE_SCALE_VDIS").map_or(1000, |text| text.parse().unwrap())
}

/// The median of three.
fn timed(mut work: impl FnMut()) -> Duration {
    let mut times: Vec<Duration> = (0..3)
        .map(|_| {
            let began = Instant::now();
            work();
            began.elapsed()
        })
        .collect();
    times.sort();
    times[1]
}

/// Makes disks until there are `n`; how long the last hundred took.
fn grow_to(api: &Api, made: &mut usize, n: usize) -> Duration {
    let mut began = Instant::now();
    while *made < n {
        if *made == n.saturating_sub(100) {
            began = Instant::now();
        }
        let body = json!({ "sr": "large", "name": format!("disk {made}"), "virtual_size": 8 << 20 });
        api.post("/vdis", &body).unwrap();
        *made += 1;
    }
    began.elapsed()
}

/// What every operation takes now.
fn measured(host: &mut Host, made: usize, created: Duration) -> Vec<(&'static str, Duration)> {
    let last = format!("disk {}", made - 1);
    let mut snapshots = 0;
    let mut times = vec![("create, 100 disks", created)];
    let count = |answer: serde_json::Value| answer.as_array().map_or(0, Vec::len);
    times.push(("vdi list", timed(|| assert!(count(host.ok(&["vdi", "list", "large"])) >= made))));
    let roots = |host: &Host| count(host.ok(&["sr", "tree", "large"])["roots"].take());
    times.push(("sr tree", timed(|| assert!(roots(host) >= made))));
    times.push(("sr scan", timed(|| drop(host.ok(&["sr", "scan", "large"])))));
    times.push(("vdi show, by name", timed(|| drop(host.ok(&["vdi", "show", &last])))));
    let mut snapshot = || {
        snapshots += 1;
        host.ok(&["vdi", "snapshot", &last, "--name", &format!("s{made} {snapshots}")]);
    };
    times.push(("vdi snapshot", timed(&mut snapshot)));
    times.push(("gc run", timed(|| drop(host.ok(&["gc", "run", "large", "--wait"])))));
    host.kill(Daemon::Smd);
    let began = Instant::now();
    host.start(Daemon::Smd);
    host.ok(&["vdi", "list", "large"]);
    times.push(("start, and the first list", began.elapsed()));
    times
}

#[test]
fn ten_times_the_disks_take_about_ten_times_as_long() {
    let mut host = Host::new();
    // Where syncs cost nothing.
    let folder = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
    host.ok(&["sr", "create", "large", "--type", "file", "--path", folder.path().to_str().unwrap()]);
    let api = Api::smd(host.run_dir());
    let (n, mut made) = (disks(), 0);
    let created = grow_to(&api, &mut made, n / 10);
    let few = measured(&mut host, made, created);
    let created = grow_to(&api, &mut made, n);
    let many = measured(&mut host, made, created);
    println!("{:<28}{:>12}{:>12}{:>8}", "", n / 10, n, "ratio");
    let mut slow = Vec::new();
    for ((what, few), (_, many)) in few.into_iter().zip(many) {
        let ratio = many.as_secs_f64() / few.max(FLOOR).as_secs_f64();
        println!("{what:<28}{:>9.1} ms{:>9.1} ms{ratio:>8.1}", ms(few), ms(many));
        if ratio > RATIO_MAX {
            slow.push(what);
        }
    }
    assert!(slow.is_empty(), "more than in proportion: {slow:?}");
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
