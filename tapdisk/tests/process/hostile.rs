//! Clients that stall, flood, leave or lie: the disk and everybody else go on.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use tapdisk::limits::{CLIENT_BYTES_MAX, CLIENTS_MAX, EDGE_BYTES_MAX};
use tapdisk_control::{IntentNames, Reply, Request};

use super::support::*;

/// A request's header.
fn header(command: u16, offset: u64, len: u32) -> Vec<u8> {
    let mut bytes = 0x2560_9513u32.to_be_bytes().to_vec();
    bytes.extend([0, 0]);
    bytes.extend(command.to_be_bytes());
    bytes.extend([7; 8]);
    bytes.extend(offset.to_be_bytes());
    bytes.extend(len.to_be_bytes());
    bytes
}

/// Whether the server has ended this connection.
fn is_over(socket: &mut UnixStream) -> bool {
    let mut rest = Vec::new();
    let ended = socket.read_to_end(&mut rest);
    ended.is_ok() || ended.is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionReset)
}

fn resident_bytes(tapdisk: &Tapdisk) -> u64 {
    let statm = std::fs::read_to_string(format!("/proc/{}/statm", tapdisk.0.id())).unwrap();
    statm.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
}

#[test]
fn half_a_request_holds_up_neither_the_others_nor_a_pause() {
    let place = Place::new();
    let _tapdisk = place.ready();
    let mut in_header = place.nbd();
    in_header.write_all(&header(1, 0, 4096)[..13]).unwrap();
    let mut in_data = place.nbd();
    in_data.write_all(&header(1, 0, 4096)).unwrap();
    in_data.write_all(&[1; 100]).unwrap();
    let mut good = place.nbd();
    assert_eq!(write(&mut good, 0, &[5; 4096]), 0);

    let name = |state: &str| format!("intent.{state}");
    let intent = IntentNames { pending: name("pending"), decided: name("decided"), void: name("void") };
    let mut control = place.control();
    let leaf = place.stats().leaf.unwrap();
    let prepare = Request::Prepare { intent: intent.clone(), leaf, child: None, base: None };
    assert_eq!(control.call(prepare).unwrap(), Reply::Done);
    let paused = control.call(Request::Pause { intent: intent.clone(), limit_ms: 60_000 }).unwrap();
    assert!(matches!(paused, Reply::Paused { .. }), "{paused:?}");
    assert_eq!(control.call(Request::Resume { intent, swap: false }).unwrap(), Reply::Done);
    assert!(place.stats().longest_pause_us > 0);

    // Half a write is no write.
    drop((in_header, in_data));
    assert_eq!(read(&mut good, 0, 4096), [5; 4096]);
}

#[test]
fn whoever_leaves_in_mid_write_has_not_written() {
    let place = Place::new();
    let _tapdisk = place.ready();
    let mut good = place.nbd();
    assert_eq!(write(&mut good, 0, &vec![5; 1 << 20]), 0);
    for sent in [0, 1, 4096, 500_000, (1 << 20) - 1] {
        let mut brief = place.nbd();
        brief.write_all(&header(1, 0, 1 << 20)).unwrap();
        brief.write_all(&vec![6; sent]).unwrap();
        drop(brief);
    }
    assert!(read(&mut good, 0, 1 << 20).iter().all(|byte| *byte == 5));
    let deadline = Instant::now() + Duration::from_secs(20);
    while place.stats().buffer_bytes > 0 {
        assert!(Instant::now() < deadline, "their buffers were kept");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn lengths_that_cannot_be_end_one_connection_at_most() {
    let place = Place::new();
    let _tapdisk = place.ready();
    let mut good = place.nbd();
    // Refused, and the connection goes on.
    for (command, errno) in [(0, 22), (4, 22), (5, 22), (6, 28), (7, 22), (99, 22)] {
        ask(&mut good, command, 512, u32::MAX, &[]);
        assert_eq!(outcome(&mut good), errno, "{command}");
    }
    // More data than anybody would drop.
    let mut liar = place.nbd();
    liar.write_all(&header(1, 0, u32::MAX)).unwrap();
    assert!(is_over(&mut liar));
    let mut garbage = place.nbd();
    garbage.write_all(&[0xff; 28]).unwrap();
    assert!(is_over(&mut garbage));
    // An option that never ends.
    let mut endless = UnixStream::connect(place.path("run/nbd.sock")).unwrap();
    endless.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    endless.write_all(b"\0\0\0\x03IHAVEOPT\0\0\0\x07\xff\xff\xff\xff").unwrap();
    assert!(is_over(&mut endless));
    assert_eq!(write(&mut good, 0, &[1; 512]), 0);
}

#[test]
fn floods_whose_answers_nobody_reads_cost_a_bounded_amount_of_memory() {
    let place = Place::new();
    let tapdisk = place.ready();
    let mut good = place.nbd();
    assert_eq!(write(&mut good, 0, &vec![5; 32 << 20]), 0);
    let before = resident_bytes(&tapdisk);
    // Every kind of request, as fast as the server takes them.
    let mut deaf: Vec<_> = (0..4).map(|_| place.nbd()).collect();
    for (n, socket) in deaf.iter_mut().enumerate() {
        socket.set_nonblocking(true).unwrap();
        let large = [1 << 20, 32 << 20, 4096, 513][n];
        let flood = [header(0, 1, large), header(7, 0, 4096), header(3, 0, 0), header(99, 0, 0)].concat();
        let until = Instant::now() + Duration::from_millis(300);
        while Instant::now() < until {
            let _ = socket.write(&flood);
        }
    }
    let began = Instant::now();
    for n in 0..50u8 {
        assert_eq!(write(&mut good, 1000, &[n; 3000]), 0);
        assert_eq!(read(&mut good, 1000, 3000), [n; 3000]);
    }
    assert!(began.elapsed() < Duration::from_secs(20));
    let held = place.stats().buffer_bytes;
    assert!(held <= (deaf.len() * 2 * CLIENT_BYTES_MAX + EDGE_BYTES_MAX) as u64, "{held}");
    let grown = resident_bytes(&tapdisk).saturating_sub(before);
    assert!(grown < (5 * CLIENT_BYTES_MAX) as u64, "{grown} bytes for four clients");
}

#[test]
fn one_client_too_many_is_turned_away_and_the_rest_stay() {
    let place = Place::new();
    let _tapdisk = place.ready();
    let mut clients: Vec<_> = (0..CLIENTS_MAX).map(|_| place.nbd()).collect();
    for _ in 0..20 {
        let mut late = UnixStream::connect(place.path("run/nbd.sock")).unwrap();
        late.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        assert!(is_over(&mut late));
    }
    for (n, client) in clients.iter_mut().enumerate() {
        assert_eq!(write(client, n as u64 * 1000, &[n as u8; 1000]), 0);
    }
    for (n, client) in clients.iter_mut().enumerate() {
        assert_eq!(read(client, n as u64 * 1000, 1000), [n as u8; 1000]);
    }
}

#[test]
fn block_status_beside_reads_and_writes_in_one_burst() {
    let place = Place::with_parent();
    let _tapdisk = place.ready();
    for leave_early in [true, false, true] {
        let mut socket = UnixStream::connect(place.path("run/nbd.sock")).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let name = b"qemu:allocation-depth";
        let query = [&[0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, name.len() as u8], name.as_slice()].concat();
        let mut words = b"\0\0\0\x03IHAVEOPT\0\0\0\x08\0\0\0\0".to_vec();
        words.extend(b"IHAVEOPT\0\0\0\x0a\0\0\0");
        words.push(query.len() as u8);
        words.extend(&query);
        words.extend(b"IHAVEOPT\0\0\0\x07\0\0\0\x06\0\0\0\0\0\0");
        for n in 0..40 {
            words.extend(header(7, 512 * n, 6 << 20));
            words.extend(header(0, 100 * n, 3000));
            words.extend(header(1, 4 << 20, 10));
            words.extend([9; 10]);
        }
        words.extend(header(2, 0, 0));
        socket.write_all(&words).unwrap();
        if leave_early {
            continue;
        }
        let mut said = Vec::new();
        socket.read_to_end(&mut said).unwrap();
        let magic = [0x66, 0x8e, 0x33, 0xef];
        assert!(said.windows(4).filter(|window| *window == magic).count() >= 80);
    }
    assert_eq!(read(&mut place.nbd(), (4 << 20) + 5, 10), [9, 9, 9, 9, 9, 0, 0, 0, 0, 0]);
}
