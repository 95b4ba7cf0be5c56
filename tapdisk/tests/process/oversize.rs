//! Requests above the size the server said it takes: an error for each, and
//! every other request on that connection answered as if they were not there.

use super::peer::*;
use super::support::*;

const EINVAL: u32 = 22;

/// Asks for too much between requests that are right, without waiting for any
/// answer.
fn in_step(structured: bool) {
    let place = Place::new();
    let _tapdisk = place.ready();
    let (mut peer, most) = Peer::ready(&place, structured);
    assert_eq!(u64::from(most) * 2, DISK_BYTES, "the largest request fits the disk twice");
    assert_eq!(write(&mut place.nbd(), 0, &[5; 4096]), 0);
    let over = most + 1;
    let second = u64::from(most);
    let read = |cookie: u64| match cookie {
        1 => Some((0, over)),
        3 => Some((0, most)),
        5 => Some((0, 4096)),
        7 => Some((4096 - 7, u32::MAX)),
        8 => Some((4000, 200)),
        _ => None,
    };
    let mut sender = peer.again();
    let sending = std::thread::spawn(move || {
        let mut ask = |command, cookie, range, data: &[u8]| {
            sender.ask([0, command], cookie, range, data).unwrap();
        };
        ask(READ, 1, (0, over), &[]);
        ask(WRITE, 2, (0, over), &vec![6; over as usize]);
        ask(READ, 3, (0, most), &[]);
        ask(WRITE, 4, (second, most), &vec![7; most as usize]);
        ask(READ, 5, (0, 4096), &[]);
        ask(WRITE, 6, (1, over + 511), &vec![6; over as usize + 511]);
        ask(READ, 7, (4096 - 7, u32::MAX), &[]);
        ask(READ, 8, (4000, 200), &[]);
        ask(FLUSH, 9, (0, 0), &[]);
    });
    let mut answers: Vec<Answer> = (0..9).map(|_| peer.answer(read).unwrap()).collect();
    sending.join().unwrap();
    answers.sort_by_key(|answer| answer.cookie);
    let zeros = vec![0; most as usize - 4096];
    let expected = [
        (EINVAL, vec![]),
        (EINVAL, vec![]),
        (0, [vec![5; 4096], zeros].concat()),
        (0, vec![]),
        (0, vec![5; 4096]),
        (EINVAL, vec![]),
        (EINVAL, vec![]),
        (0, [[5; 96].as_slice(), &[0; 104]].concat()),
        (0, vec![]),
    ];
    for (n, (answer, (error, data))) in answers.iter().zip(expected).enumerate() {
        assert_eq!((answer.cookie, answer.error), (n as u64 + 1, error));
        assert!(answer.data == data, "request {}", answer.cookie);
    }
    // What was refused has changed nothing, what was not has.
    let mut other = place.nbd();
    assert!(super::support::read(&mut other, second, most).iter().all(|byte| *byte == 7));
    let first = super::support::read(&mut other, 0, most);
    assert!(first[..4096] == [5; 4096] && first[4096..].iter().all(|byte| *byte == 0));
}

#[test]
fn a_request_above_the_limit_is_refused_and_simple_replies_stay_in_step() {
    in_step(false);
}

#[test]
fn a_request_above_the_limit_is_refused_and_structured_replies_stay_in_step() {
    in_step(true);
}

/// The reference's tester leaves the length of the write before in its flushes.
#[test]
fn a_flush_covers_the_disk_whatever_range_it_names() {
    let place = Place::new();
    let _tapdisk = place.ready();
    let (mut peer, most) = Peer::ready(&place, false);
    let ranges = [(0, 1024), (DISK_BYTES, 0), (u64::MAX, u32::MAX), (0, most + 1)];
    for (cookie, range) in (0..).zip(ranges) {
        peer.ask([0, FLUSH], cookie, range, &[]).unwrap();
        assert_eq!(peer.answer(|_| None).unwrap(), Answer { cookie, error: 0, data: vec![] }, "{range:?}");
    }
}
