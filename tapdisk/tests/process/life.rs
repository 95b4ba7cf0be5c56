//! Started, asked, told to end, killed, started again.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, getsid};
use tapdisk_control::{Answer, Call, ClientError, IntentNames, Refusal, Reply, Request};

use super::support::*;

#[test]
fn a_signal_settles_and_ends_well() {
    let place = Place::new();
    let tapdisk = place.ready();
    let mut socket = place.nbd();
    assert_eq!(write(&mut socket, 4096, &[5; 8192]), 0);
    let status = tapdisk.end(Signal::SIGTERM);
    assert!(status.success(), "{status}");
    assert!(!place.path("run/nbd.sock").exists());
    assert_eq!(std::fs::read_dir(place.path("records")).unwrap().count(), 0);
    assert_eq!(open_meta(&place.path("sr")).virtual_bytes(), DISK_BYTES);

    let _again = place.ready();
    assert_eq!(read(&mut place.nbd(), 4096, 8192), [5; 8192]);
}

#[test]
fn what_was_acknowledged_survives_a_kill() {
    let place = Place::new();
    for round in 1..=5u8 {
        let tapdisk = place.ready();
        let mut socket = place.nbd();
        for block in 0..8 {
            assert_eq!(write(&mut socket, block << 21, &[round; 1024]), 0);
        }
        tapdisk.end(Signal::SIGKILL);
        let _again = place.ready(); // over the sockets left behind
        let mut socket = place.nbd();
        for block in 0..8 {
            assert_eq!(read(&mut socket, block << 21, 1024), [round; 1024]);
        }
    }
}

#[test]
fn stop_is_refused_while_clients_are_there_unless_forced() {
    let place = Place::new();
    let mut tapdisk = place.ready();
    let socket = place.nbd();
    assert_eq!(place.stats().clients, 1);
    let mut control = place.control();
    let refused = control.call(Request::Stop { force: false });
    assert!(matches!(refused, Err(ClientError::Refused(Refusal::InUse { .. }))), "{refused:?}");
    assert_eq!(control.call(Request::Stop { force: true }).unwrap(), Reply::Done);
    assert!(tapdisk.wait().success());
    drop(socket);
}

#[test]
fn a_pause_ends_with_its_connection_even_before_its_answer() {
    let place = Place::new();
    let _tapdisk = place.ready();
    let name = |state| format!("intent.{state}");
    let intent = IntentNames { pending: name("pending"), decided: name("decided"), void: name("void") };
    for asked_and_left in [true, false] {
        let mut control = place.control();
        let leaf = place.stats().leaf.unwrap();
        let prepare = Request::Prepare { intent: intent.clone(), leaf, child: None, base: None };
        assert_eq!(control.call(prepare).unwrap(), Reply::Done);
        let pause = Request::Pause { intent: intent.clone(), limit_ms: 60_000 };
        if asked_and_left {
            let mut brief = UnixStream::connect(place.path("run/ctl.sock")).unwrap();
            let line = serde_json::to_string(&Call { id: 1, request: pause }).unwrap();
            brief.write_all(format!("{line}\n").as_bytes()).unwrap();
        } else {
            let paused = control.call(pause).unwrap();
            assert!(matches!(paused, Reply::Paused { .. }), "{paused:?}");
            assert_eq!(place.stats().state, "paused");
            drop(control);
        }
        let deadline = Instant::now() + Duration::from_secs(20);
        while place.stats().state != "running" {
            assert!(Instant::now() < deadline);
            std::thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(write(&mut place.nbd(), 0, &[1; 512]), 0);
    }
}

#[test]
fn a_second_writer_is_refused() {
    let place = Place::new();
    let first = place.ready();
    let mut socket = place.nbd();
    let (mut second, said) = place.start(&[]);
    assert_eq!(said["ready"], false, "{said}");
    assert_eq!(second.wait().code(), Some(1));
    // The first one is still reached by its sockets.
    assert_eq!(write(&mut socket, 0, &[1; 512]), 0);
    assert_eq!(read(&mut place.nbd(), 0, 512), [1; 512]);
    drop(first);
}

#[test]
fn a_read_only_disk_refuses_writes() {
    let place = Place::new();
    let (tapdisk, said) = place.start(&["--read-only", "--export", "disk"]);
    assert_eq!(said["ready"], true, "{said}");
    let mut socket = place.nbd();
    assert_eq!(write(&mut socket, 0, &[1; 512]), 1);
    assert_eq!(read(&mut socket, 0, 512), [0; 512]);
    assert!(place.stats().read_only);
    assert!(tapdisk.end(Signal::SIGTERM).success());
}

#[test]
fn a_lease_that_is_not_open_and_wrong_usage_are_refused() {
    let place = Place::new();
    let (mut tapdisk, said) = place.start(&["--lease-fd", "77"]);
    assert_eq!((said["ready"].as_bool(), tapdisk.wait().code()), (Some(false), Some(1)));
    let status = Command::new(env!("CARGO_BIN_EXE_tapdisk"))
        .arg("--no-such-flag")
        .stderr(Stdio::null())
        .status()
        .unwrap();
    assert_eq!(status.code(), Some(2));
}

#[test]
fn zeros_keep_their_space_when_asked_to() {
    const WRITE_ZEROES: u16 = 6;
    const NO_HOLE: u16 = 2;
    const FAST_ZERO: u16 = 16;
    let place = Place::new();
    let _tapdisk = place.ready();
    let mut socket = place.nbd();
    let allocated = || {
        let meta = std::fs::metadata(place.path("sr").join(format!("{VDI}.vhd"))).unwrap();
        std::os::unix::fs::MetadataExt::blocks(&meta) * 512
    };
    let zero = |socket: &mut UnixStream, flags, offset, len| {
        ask_with(socket, flags, WRITE_ZEROES, offset, len, &[]);
        outcome(socket)
    };
    let before = allocated();
    assert_eq!(zero(&mut socket, 0, 0, 4 << 20), 0);
    assert!(allocated() < before + (1 << 20));
    // Never written, and written: both have space afterwards.
    assert_eq!(write(&mut socket, 100, &[3; 1000]), 0);
    assert_eq!(zero(&mut socket, NO_HOLE, 1, 4 << 20), 0);
    assert!(allocated() >= before + (4 << 20) - 1024, "{before} {}", allocated());
    assert_eq!(read(&mut socket, 0, 4 << 20), vec![0; 4 << 20]);
    let full = allocated();
    assert_eq!(zero(&mut socket, FAST_ZERO, 0, 4 << 20), 0);
    // Given back once the entries are durably clear. (Space for blocks to come
    // may have been taken ahead.)
    let deadline = Instant::now() + Duration::from_secs(20);
    while allocated() > full - (4 << 20) + 1024 {
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(zero(&mut socket, FAST_ZERO | NO_HOLE, 0, 512), 95);
}

#[test]
fn statistics_tell_each_kind_and_how_long_it_took() {
    let place = Place::new();
    let _tapdisk = place.ready();
    let mut socket = place.nbd();
    assert_eq!(write(&mut socket, 5, &[3; 1000]), 0);
    read(&mut socket, 5, 1000);
    for (command, len) in [(3, 0), (4, 4096), (5, 8192), (6, 4096)] {
        ask(&mut socket, command, 0, len, &[]);
        assert_eq!(outcome(&mut socket), 0, "{command}");
    }
    let stats = place.stats();
    for (kind, bytes) in [
        (&stats.read, 1000),
        (&stats.write, 1000),
        (&stats.flush, 0),
        (&stats.trim, 4096),
        (&stats.cache, 8192),
        (&stats.write_zeroes, 4096),
    ] {
        assert_eq!((kind.count, kind.bytes, kind.errors, kind.latency.count()), (1, bytes, 0, 1));
        assert!(kind.latency.at_most_us(1, 1) >= kind.longest_us);
    }
    assert_eq!((stats.depth, stats.in_flight, stats.in_flight_max), (1, 0, 1));
    assert!(stats.owners.bytes_max > 0 && stats.buffer_bytes == 0);
}

#[test]
fn a_hang_up_of_whoever_started_it_ends_nothing() {
    let place = Place::new();
    let tapdisk = place.ready();
    let pid = Pid::from_raw(tapdisk.0.id() as i32);
    assert_eq!(getsid(Some(pid)).unwrap(), pid, "a session of its own");
    let mut socket = place.nbd();
    for signal in [Signal::SIGHUP, Signal::SIGSTOP, Signal::SIGHUP, Signal::SIGCONT] {
        kill(pid, signal).unwrap();
    }
    assert_eq!(write(&mut socket, 4096, &[5; 8192]), 0);
    assert_eq!(read(&mut place.nbd(), 4096, 8192), [5; 8192]);
}

#[test]
fn clients_that_cannot_be_let_in_for_want_of_descriptors_cost_no_time() {
    let place = Place::new();
    let tapdisk = place.ready();
    let mut inside = place.nbd();
    let pid = tapdisk.0.id().to_string();
    let limit = |soft: usize| {
        let limit = format!("--nofile={soft}:");
        assert!(Command::new("prlimit").args(["--pid", &pid, &limit]).status().unwrap().success());
    };
    limit(3); // it has those
    let mut waiting = UnixStream::connect(place.path("run/nbd.sock")).unwrap();
    let before = ticks(&tapdisk);
    std::thread::sleep(Duration::from_secs(2));
    let used = ticks(&tapdisk) - before;
    assert!(used <= 5, "{used} ticks in two seconds of waiting");
    assert_eq!(write(&mut inside, 4096, &[5; 8192]), 0);
    limit(1024);
    waiting.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let mut greeting = [0; 18];
    std::io::Read::read_exact(&mut waiting, &mut greeting).unwrap();
    assert_eq!(&greeting[..8], b"NBDMAGIC");
}

#[test]
fn a_flush_of_one_connection_makes_what_another_wrote_durable() {
    // What several connections are promised by the flag for them: the one
    // flush covers the others' acknowledged writes. After a power cut the
    // image alone is left: no record, in which they would be otherwise.
    let power_cut = |flushed: bool| {
        let place = Place::new();
        let tapdisk = place.ready();
        let (mut writer, mut other) = (place.nbd(), place.nbd());
        for block in 0..4u8 {
            assert_eq!(write(&mut writer, u64::from(block) << 21, &[block + 1; 4096]), 0);
        }
        if flushed {
            assert_eq!(flush(&mut other), 0);
        }
        tapdisk.end(Signal::SIGKILL);
        for record in std::fs::read_dir(place.path("records")).unwrap() {
            std::fs::remove_file(record.unwrap().path()).unwrap();
        }
        let _again = place.ready();
        let mut socket = place.nbd();
        (0..4u8).filter(|block| read(&mut socket, u64::from(*block) << 21, 4096) == [block + 1; 4096]).count()
    };
    assert_eq!(power_cut(true), 4);
    // Without it they are lost, if it comes before the disk counts as idle: so
    // a flush that does nothing would be noticed.
    let quick = (0..10).any(|_| {
        let began = Instant::now();
        power_cut(false) == 0 || began.elapsed() > Duration::from_millis(900)
    });
    assert!(quick, "they are there without a flush");
}

/// Orders on several connections: each is given before the one before it has
/// its answer.
#[test]
fn settling_is_refused_to_nobody_and_stands_in_nobodys_way() {
    let place = Place::new();
    let _tapdisk = place.ready();
    let mut socket = place.nbd();
    let orders = [Request::Settle, Request::Settle, Request::MergeStop, Request::Settle];
    let mut callers = orders.map(|request| {
        let line = serde_json::to_string(&Call { id: 1, request }).unwrap() + "\n";
        let control = UnixStream::connect(place.path("run/ctl.sock")).unwrap();
        control.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        (BufReader::new(control), line)
    });
    for round in 0..32u64 {
        assert_eq!(write(&mut socket, round << 21, &[5; 8192]), 0);
        for (control, order) in &mut callers {
            control.get_mut().write_all(order.as_bytes()).unwrap();
        }
        for (control, order) in &mut callers {
            let mut line = String::new();
            control.read_line(&mut line).unwrap();
            let answer: Answer = serde_json::from_str(&line).unwrap();
            assert_eq!(answer.outcome, Ok(Reply::Done), "round {round}: {order}");
        }
    }
}
