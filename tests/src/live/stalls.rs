//! A leaf merge under a guest that never stops: it ends, copies no more than
//! the leaf had, lets the leaf only shrink, and the guest hardly notices.
//! Times are printed, not judged: the machine may be busy with other tests.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use coppice::nbd_client::Client;
use tapdisk_control::{MergePhase, Reply, Request};

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

/// What the times of a leaf merge are told of: the commit, in which the parent
/// takes the leaf's place, apart from the windows before it.
const PERIODS: [&str; 4] = ["before", "in windows", "at commit", "after"];

/// Watches the merge of a leaf and begins a period with its windows, one when
/// the leaf is empty and to be committed, and one when it has been; `over` is
/// set when it has, whether all of them were noticed or not.
fn by_period(control: &mut tapdisk_control::Client, writer: &Writer, over: &AtomicBool) {
    let mut phase = || match control.call(Request::MergeStatus).unwrap() {
        Reply::Merge(status) => status.phase,
        other => panic!("{other:?}"),
    };
    let mut wait = |what: &str, done: &[MergePhase]| {
        wait_until(what, || over.load(Ordering::SeqCst) || done.contains(&phase()));
    };
    let ending = [MergePhase::Empty, MergePhase::Committing];
    wait("the leaf to be empty", &ending);
    writer.next_period();
    wait("the merge to be committed", &[MergePhase::None]);
    writer.next_period();
}

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
    let socket = host.run_dir().join("tap").join(&vdi).join("ctl.sock");
    let mut control = tapdisk_control::Client::connect(&socket, Duration::from_secs(60)).unwrap();
    let over = AtomicBool::new(false);
    writer.next_period();
    host.ok(&["gc", "resume", "store"]);
    std::thread::scope(|scope| {
        scope.spawn(|| by_period(&mut control, &writer, &over));
        wait_until("the leaf to be merged", || {
            lengths.push(leaf.metadata().unwrap().len());
            host.ok(&["sr", "tree", "store"])["roots"][0]["kind"] == "leaf"
        });
        over.store(true, Ordering::SeqCst);
    });
    let took = began.elapsed();
    std::thread::sleep(Duration::from_secs(1));
    let times = writer.stop();
    let status = host.ok(&["gc", "status", "store"]);
    let copied = status["srs"][0]["totals"]["bytes_copied"].as_u64().unwrap();
    let cloned = status["srs"][0]["totals"]["bytes_cloned"].as_u64().unwrap();

    println!("{} MiB of leaf merged in {took:.1?}; copied {copied}, cloned {cloned} bytes", held >> 20);
    for (name, times) in PERIODS.iter().zip(&times) {
        println!("{name:>10}: {times}");
    }
    assert_eq!(times.len(), PERIODS.len());
    assert!(times[1].count() > 0, "the guest was stopped");
    let ratio = times[1].rate() / times[0].rate();
    println!("guest's rate in windows: {:.0} % of before", 100.0 * ratio);
    assert!(copied + cloned <= held, "copied {copied} and cloned {cloned} of {held} bytes");
    assert!(lengths.is_sorted_by(|a, b| a >= b), "the leaf grew: {lengths:?}");
    // What is left of it is headers: every slot was given back.
    assert!(leaf.metadata().unwrap().blocks() * 512 < 1 << 20, "{:?}", leaf.metadata());
}
