//! Re-reading the chain below the leaf holds no guest's request: what the
//! statistics say of pauses and drains stays nothing, and says something of a
//! pause, so that it would have been seen.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tapdisk_control::{IntentNames, Reply, Request};
use vhd::units::BLOCK_BYTES;

use super::support::*;

const REFRESHES: u32 = 20;
/// Requests that are answered between two of them, at least.
const BETWEEN: u64 = 5;
const LIMIT: Duration = Duration::from_secs(60);

fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !done() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Writes over the parent's data and beside it, and reads, until it is over.
fn guest(place: &Place, kind: u64, over: &AtomicBool, answered: &AtomicU64) {
    let mut socket = place.nbd();
    let mut n = 0;
    while !over.load(Ordering::Relaxed) {
        n += 1;
        let offset = (n % 4) * BLOCK_BYTES + (n % 64) * 8192 + kind * 4096;
        if kind == 0 {
            assert_eq!(write(&mut socket, offset, &[7; 4096]), 0);
        } else {
            read(&mut socket, offset, 4096);
        }
        answered.fetch_add(1, Ordering::Relaxed);
    }
}

#[test]
fn a_refresh_under_load_holds_no_request_and_a_pause_does() {
    let place = Place::with_parent();
    let _tapdisk = place.ready();
    let (over, answered) = (AtomicBool::new(false), AtomicU64::new(0));
    let answers = || answered.load(Ordering::Relaxed);
    std::thread::scope(|scope| {
        for kind in [0, 0, 1, 1] {
            let (place, over, answered) = (&place, &over, &answered);
            scope.spawn(move || guest(place, kind, over, answered));
        }
        // A failure below ends the guests, too.
        let _over = Ends(&over);
        let mut control = place.control();
        let leaf = place.stats().leaf.unwrap();
        for _ in 0..REFRESHES {
            let before = answers();
            wait_until("the guests stand still", || answers() >= before + BETWEEN);
            let refreshed = control.call(Request::Refresh { leaf: leaf.clone(), parent: None });
            assert_eq!(refreshed.unwrap(), Reply::Drained);
        }
        let stats = place.stats();
        assert_eq!((stats.last_pause_us, stats.longest_pause_us), (0, 0), "a refresh held requests");

        let name = |state| format!("intent.{state}");
        let intent = IntentNames { pending: name("pending"), decided: name("decided"), void: name("void") };
        let prepare = Request::Prepare { intent: intent.clone(), leaf, child: None, base: None };
        assert_eq!(control.call(prepare).unwrap(), Reply::Done);
        let paused = control.call(Request::Pause { intent, limit_ms: 60_000 }).unwrap();
        assert!(matches!(paused, Reply::Paused { .. }), "{paused:?}");
        wait_until("no request is held by a pause", || place.stats().held > 0);
        // The pause ends with its connection.
        drop(control);
        wait_until("it stays paused", || place.stats().state == "running");
        let stats = place.stats();
        assert!(stats.last_pause_us > 0, "a pause was not seen");
        assert_eq!(stats.longest_pause_us, stats.last_pause_us);
    });
}

/// Tells the guests to end.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
