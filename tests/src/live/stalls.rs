//! A leaf merge under a guest that never stops: it ends, copies no more than
//! the leaf had, lets the leaf only shrink, and the guest hardly notices.
//! Times are printed, not judged: the machine may be busy with other tests.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use coppice::nbd_client::Client;
use tapdisk_control::{Reply, Request};

use crate::support::host::{Attached, Host, wait_until};
use crate::support::pace::Writer;

/// Size of the disk; `COPPICE_STALL_MIB` for another.
fn mib() -> u64 {
    std::env::var("COPPICE_STALL_MIB").ok().and_then(|text| text.parse().ok()).unwrap_or(96)
}

/// Writes the whole disk once.
fn fill(at: &Attached) {
    let mut client = Client::connect(&at.socket, &at.export).unwrap();
    let data = vec![0x5A; 1 << 20];
    let answer = |client: &mut Client| {
        assert_eq!(client.next(Duration::from_secs(60)).unwrap().outcome, Ok(Vec::new()));
    };
    for offset in (0..client.size_bytes()).step_by(1 << 20) {
        client.write(offset, &data, false).unwrap();
        if client.in_flight() >= 8 {
            answer(&mut client);
        }
    }
    client.flush().unwrap();
    while client.in_flight() > 0 {
        answer(&mut client);
    }
    client.close();
}

/// Longest a settle may take on a machine that is busy with other tests:
/// generously more than the two write-backs it waits for.
const SETTLE_MAX: Duration = Duration::from_secs(20);

/// Writes the tapdisk has answered.
fn writes(control: &mut tapdisk_control::Client) -> u64 {
    let Ok(Reply::Stats(stats)) = control.call(Request::Stats) else { panic!("no stats") };
    stats.write.count
}

#[test]
fn settling_does_not_wait_for_a_guest_that_never_stops() {
    let host = Host::new();
    host.sr("store");
    let vdi = host.disk("store", "busy", &format!("{}MiB", mib()));
    let at = host.attach(&vdi);
    fill(&at);
    host.ok(&["gc", "pause", "store"]);
    host.ok(&["vdi", "snapshot", "busy", "--name", "snap"]);
    // A whole leaf to merge, whatever the guest gets to write.
    fill(&at);
    host.ok(&["vdi", "delete", "snap"]);
    let writer = Writer::start(&at, 2);
    let socket = host.run_dir().join("tap").join(&vdi).join("ctl.sock");
    let mut control = tapdisk_control::Client::connect(&socket, Duration::from_secs(60)).unwrap();
    let filled = writes(&mut control);
    wait_until("the guest to write", || writes(&mut control) > filled);
    let mut settle = |when: &str| {
        let began = Instant::now();
        control.call(Request::Settle).unwrap();
        println!("settled {when} in {:.1?}", began.elapsed());
        assert!(began.elapsed() < SETTLE_MAX, "{when}");
    };
    (0..3).for_each(|_| settle("before the merge"));
    // Slow enough to outlast three of them on the slowest machine.
    host.ok(&["gc", "set", "store", "--rate", "1MiB"]);
    host.ok(&["gc", "resume", "store"]);
    let merging = || host.ok(&["gc", "status", "store"])["srs"][0]["running"] == 1;
    wait_until("the merge to run", merging);
    (0..3).for_each(|_| settle("during the merge"));
    assert!(merging(), "it was over too soon to tell");
    host.ok(&["gc", "set", "store", "--rate", "0"]);
    assert!(writer.stop()[0].count() > 0);
    host.ok(&["gc", "run", "store", "--wait"]);
}

#[test]
fn a_leaf_merges_under_a_guest_that_never_stops() {
    let host = Host::new();
    let folder = host.sr("store");
    let vdi = host.disk("store", "busy", &format!("{}MiB", mib()));
    let at = host.attach(&vdi);
    fill(&at);
    host.ok(&["gc", "pause", "store"]);
    host.ok(&["vdi", "snapshot", "busy", "--name", "snap"]);
    fill(&at);
    host.ok(&["vdi", "delete", "snap"]);
    let writer = Writer::start(&at, 1);
    std::thread::sleep(Duration::from_secs(2));

    // The leaf's file by its inode: its name will lead to the parent.
    let leaf = File::open(folder.join(format!("{vdi}.vhd"))).unwrap();
    let held = mib() << 20;
    let mut lengths = vec![leaf.metadata().unwrap().len()];
    let began = Instant::now();
    writer.next_period();
    host.ok(&["gc", "resume", "store"]);
    wait_until("the leaf to be merged", || {
        lengths.push(leaf.metadata().unwrap().len());
        host.ok(&["sr", "tree", "store"])["roots"][0]["kind"] == "leaf"
    });
    let took = began.elapsed();
    writer.next_period();
    std::thread::sleep(Duration::from_secs(1));
    let times = writer.stop();
    let status = host.ok(&["gc", "status", "store"]);
    let copied = status["srs"][0]["totals"]["bytes_copied"].as_u64().unwrap();
    let cloned = status["srs"][0]["totals"]["bytes_cloned"].as_u64().unwrap();

    println!("{} MiB of leaf merged in {took:.1?}; copied {copied}, cloned {cloned} bytes", held >> 20);
    for (name, times) in ["before", "during", "after"].iter().zip(&times) {
        println!("{name:>7}: {times}");
    }
    let ratio = times[1].rate() / times[0].rate();
    println!("guest's rate during the merge: {:.0} % of before", 100.0 * ratio);
    assert!(times[1].count() > 0, "the guest was stopped");
    assert!(copied + cloned <= held, "copied {copied} and cloned {cloned} of {held} bytes");
    assert!(lengths.is_sorted_by(|a, b| a >= b), "the leaf grew: {lengths:?}");
    // What is left of it is headers: every slot was given back.
    assert!(leaf.metadata().unwrap().blocks() * 512 < 1 << 20, "{:?}", leaf.metadata());
}
