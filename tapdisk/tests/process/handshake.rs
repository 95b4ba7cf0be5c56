//! The handshake over a real socket: done in full, declined in part, ended in
//! order, and left at any byte.

use std::io::Write;
use std::net::Shutdown;
use std::time::{Duration, Instant};

use super::peer::*;
use super::support::*;

#[test]
fn an_option_nobody_knows_is_declined_and_the_handshake_goes_on() {
    let place = Place::new();
    let _tapdisk = place.ready();
    let mut peer = Peer::greeted(&place);
    // One that was given up before anybody used it, and some that never were.
    for number in [4, 0x0bad_cafe, 0x7fff_ffff, u32::MAX] {
        for data in [0, 1, 4, 4000] {
            assert_eq!(
                peer.choose(number, &vec![0x49; data]),
                (REP_ERR_UNSUP, vec![]),
                "{number:#x}, {data}"
            );
        }
    }
    let unknown = [&[0, 0, 0, 5], b"other".as_slice(), &[0, 0]].concat();
    assert_eq!(peer.choose(OPT_GO, &unknown).0, REP_ERR_UNKNOWN);
    let (end, exports) = peer.choose(OPT_LIST, &[]);
    assert_eq!((end, exports.len()), (REP_ACK, 1));
    let name = VDI.to_string();
    assert_eq!(
        exports[0].1[..4 + name.len()],
        [&(name.len() as u32).to_be_bytes(), name.as_bytes()].concat()
    );
    let whole = [&exports[0].1[..4 + name.len()], &[0, 0]].concat();
    assert_eq!(peer.choose(OPT_GO, &whole).0, REP_ACK);
    peer.ask([0, WRITE], 1, (700, 4), b"then").unwrap();
    assert_eq!(peer.answer(|_| None).unwrap(), Answer { cookie: 1, error: 0, data: vec![] });
    assert_eq!(read(&mut place.nbd(), 700, 4), b"then");
}

#[test]
fn an_abort_is_acknowledged_and_ends_the_connection() {
    let place = Place::new();
    let _tapdisk = place.ready();
    let mut good = place.nbd();
    // More of them than there may be clients.
    for asked_before in 0..40 {
        let mut peer = Peer::greeted(&place);
        for _ in 0..asked_before {
            assert_eq!(peer.choose(0x0bad_cafe, b"four"), (REP_ERR_UNSUP, vec![]));
        }
        assert_eq!(peer.choose(OPT_ABORT, &[]), (REP_ACK, vec![]));
        assert!(peer.rest().is_empty());
    }
    // The older way to choose an export has no reply that declines.
    let mut peer = Peer::greeted(&place);
    peer.socket.write_all(&option(1, b"other")).unwrap();
    assert!(peer.rest().is_empty());
    // Flags that do not exist.
    let mut peer = Peer::connect(&place);
    peer.socket.write_all(&[0, 0, 0, 0x83]).unwrap();
    assert_eq!(peer.rest(), GREETING);
    assert_eq!(write(&mut good, 0, &[1; 512]), 0);
}

#[test]
fn a_handshake_left_at_any_byte_costs_nobody_anything() {
    let place = Place::new();
    let _tapdisk = place.ready();
    let mut good = place.nbd();
    let whole = [
        CLIENT_FLAGS.to_vec(),
        option(0x0bad_cafe, b"four"),
        option(OPT_LIST, &[]),
        option(OPT_STRUCTURED_REPLY, &[]),
        option(OPT_GO, &[0; 6]),
    ]
    .concat();
    for sent in 0..=whole.len() {
        // Says no more, and waits for the end.
        let mut peer = Peer::connect(&place);
        peer.socket.write_all(&whole[..sent]).unwrap();
        peer.socket.shutdown(Shutdown::Write).unwrap();
        assert!(peer.rest().starts_with(GREETING), "{sent} bytes");
        // Is gone at once, its answers unread.
        let mut peer = Peer::connect(&place);
        let _ = peer.socket.write_all(&whole[..sent]);
        drop(peer);
        assert_eq!(write(&mut good, sent as u64, &[sent as u8; 3]), 0);
        assert_eq!(read(&mut good, sent as u64, 3), [sent as u8; 3]);
    }
    let deadline = Instant::now() + Duration::from_secs(120);
    while place.stats().clients > 1 {
        assert!(Instant::now() < deadline, "{} clients stay", place.stats().clients);
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(place.stats().buffer_bytes, 0);
    assert_eq!(read(&mut place.nbd(), 0, 1), [0]);
}
