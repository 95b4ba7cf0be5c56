//! A client as bytes: driven whole, byte by byte, in random pieces, and with
//! garbage.

use rand::rngs::SmallRng;
use rand::{Rng, RngCore, SeedableRng};

use super::proto::{ChunkHeader, OptionReply, RequestHeader, SimpleReply, chunk, command, option};
use super::*;
use crate::limits::{OPTIONS_MAX, REQUEST_BYTES_MAX};
use zerocopy::FromBytes;

fn connection() -> Connection {
    let export = Export {
        name: "disk".into(),
        description: String::new(),
        virtual_bytes: 1 << 30,
        read_only: false,
        fast_zero: true,
    };
    Connection::new(Arc::new(export), Security::Offered, Pool::default())
}

/// Feeds all of `bytes` in pieces of at most `piece()`, as far as the
/// connection takes them; the requests that came of it.
fn feed(
    connection: &mut Connection,
    mut bytes: &[u8],
    mut piece: impl FnMut() -> usize,
) -> Vec<GuestRequest> {
    let mut requests = Vec::new();
    loop {
        requests.extend(std::iter::from_fn(|| connection.next_request()));
        let space = connection.input_space();
        let n = space.len().min(bytes.len()).min(piece());
        if n == 0 {
            return requests;
        }
        space[..n].copy_from_slice(&bytes[..n]);
        connection.input_filled(n);
        bytes = &bytes[n..];
    }
}

/// Takes everything there is to send.
fn drain(connection: &mut Connection) -> Vec<u8> {
    let mut slices = Vec::new();
    connection.output(&mut slices, usize::MAX);
    let bytes: Vec<u8> = slices.iter().flat_map(|slice| slice.to_vec()).collect();
    connection.output_written(bytes.len());
    assert!(!connection.has_output());
    bytes
}

fn said(option: u32, data: &[u8]) -> Vec<u8> {
    let header = OptionHeader {
        magic: proto::OPTION_MAGIC.into(),
        option: option.into(),
        len: (data.len() as u32).into(),
    };
    [header.as_bytes(), data].concat()
}

fn asked(command: u16, cookie: u64, offset: u64, len: u32, data: &[u8]) -> Vec<u8> {
    let header = RequestHeader {
        magic: proto::REQUEST_MAGIC.into(),
        flags: 0.into(),
        command: command.into(),
        cookie: cookie.into(),
        offset: offset.into(),
        len: len.into(),
    };
    [header.as_bytes(), data].concat()
}

fn flags() -> Vec<u8> {
    vec![0, 0, 0, 3]
}

/// A handshake with structured replies.
fn hello() -> Vec<u8> {
    [flags(), said(option::STRUCTURED_REPLY, &[]), said(option::GO, &[0; 6])].concat()
}

fn ready() -> Connection {
    let mut connection = connection();
    assert!(feed(&mut connection, &hello(), || usize::MAX).is_empty());
    drain(&mut connection);
    connection
}

#[test]
fn the_greeting_and_a_go_byte_by_byte() {
    let mut connection = connection();
    let greeting = drain(&mut connection);
    assert_eq!(greeting, b"NBDMAGICIHAVEOPT\0\x03");
    assert!(!connection.is_transmitting());
    feed(&mut connection, &hello(), || 1);
    assert!(connection.is_transmitting());
    let (first, _) = OptionReply::read_from_prefix(&drain(&mut connection)).unwrap();
    assert_eq!((first.option.get(), first.kind.get()), (8, 1));
}

#[test]
fn writes_and_reads_in_any_chunking() {
    for seed in 0..200 {
        let mut rng = SmallRng::seed_from_u64(seed);
        let mut connection = ready();
        let mut bytes = Vec::new();
        let mut data = Vec::new();
        for cookie in 0..20 {
            let len = rng.random_range(1..80) * 512;
            if rng.random() {
                let mut payload = vec![0; len as usize];
                rng.fill_bytes(&mut payload);
                bytes.extend(asked(command::WRITE, cookie, 512 * cookie, len, &payload));
                data.push(Some(payload));
            } else {
                bytes.extend(asked(command::READ, cookie, 512 * cookie, len, &[]));
                data.push(None);
            }
        }
        let most = rng.random_range(1..40_000);
        let requests = feed(&mut connection, &bytes, || rng.random_range(1..=most));
        assert_eq!(requests.len(), 20, "seed {seed}");
        for (n, (request, expected)) in requests.into_iter().zip(data).enumerate() {
            let buffer = request.buffer.unwrap();
            assert_eq!((request.offset, buffer.len()), (512 * n as u64, request.len as usize));
            if let Some(expected) = expected {
                assert_eq!(buffer.lend(0, buffer.len()).unwrap().to_vec(), expected);
                assert_eq!(request.kind, RequestKind::Write { fua: false });
            } else {
                buffer.lend_mut(0, buffer.len()).unwrap().fill(n as u8);
            }
            connection.finish(request.slot, Ok(()), &[]);
            let said = drain(&mut connection);
            if request.kind == RequestKind::Read {
                let (head, rest) = ChunkHeader::read_from_prefix(&said).unwrap();
                assert_eq!((head.kind.get(), head.cookie.get()), (chunk::OFFSET_DATA, n as u64));
                assert_eq!(rest[..8], (512 * n as u64).to_be_bytes());
                assert!(rest[8..].iter().all(|byte| *byte == n as u8));
                assert_eq!(rest.len(), 8 + request.len as usize);
            } else {
                let reply = SimpleReply::read_from_bytes(&said).unwrap();
                assert_eq!((reply.error.get(), reply.cookie.get()), (0, n as u64));
            }
        }
        assert_eq!(connection.pool.used_bytes(), 0);
    }
}

#[test]
fn a_refused_write_leaves_the_stream_in_step() {
    let mut connection = ready();
    let huge = REQUEST_BYTES_MAX as u32 + 512;
    let bytes = [
        asked(command::WRITE, 1, (1 << 30) - 999, 1000, &[1; 1000]),
        asked(command::WRITE, 2, 1 << 30, 512, &[1; 512]),
        asked(command::WRITE, 3, 0, huge, &vec![1; huge as usize]),
        asked(command::READ, 4, 0, 512, &[]),
    ]
    .concat();
    let requests = feed(&mut connection, &bytes, || 70_000);
    assert_eq!(requests.len(), 1);
    assert_eq!(requests[0].kind, RequestKind::Read);
    let said = drain(&mut connection);
    let errors: Vec<_> = said.chunks_exact(26).map(|chunk| (chunk[15], chunk[23])).collect();
    assert_eq!(errors, [(1, 28), (2, 28), (3, 22)]);
}

#[test]
fn nothing_more_is_read_than_the_limits_allow() {
    let mut connection = ready();
    let many = asked(command::READ, 0, 0, 512, &[]).repeat(CLIENT_REQUESTS_MAX + 10);
    let requests = feed(&mut connection, &many, || usize::MAX);
    assert_eq!(requests.len(), CLIENT_REQUESTS_MAX);
    assert!(!connection.wants_input());
    // Answered is not enough: the client must take the reply.
    connection.finish(requests[0].slot, Ok(()), &[]);
    assert!(connection.next_request().is_none());
    drain(&mut connection);
    assert!(connection.next_request().is_some());

    let mut connection = ready();
    let large = asked(command::READ, 0, 0, 20 << 20, &[]).repeat(2);
    let requests = feed(&mut connection, &large, || usize::MAX);
    assert_eq!((requests.len(), connection.wants_input()), (1, false));

    // Refusals take room too.
    let mut connection = ready();
    let bad = asked(99, 0, 0, 0, &[]).repeat(10_000);
    feed(&mut connection, &bad, || usize::MAX);
    assert_eq!(drain(&mut connection).len(), 26 * CLIENT_REQUESTS_MAX);
}

#[test]
fn a_peer_out_of_step_is_over() {
    for bytes in [
        vec![0xff; 4],
        [flags(), vec![0; 16]].concat(),
        [flags(), said(option::LIST, &[]).repeat(OPTIONS_MAX as usize + 1)].concat(),
        [flags(), said(option::EXPORT_NAME, b"nobody")].concat(),
        [hello(), vec![0; 28]].concat(),
        [hello(), asked(command::WRITE, 0, 0, u32::MAX, &[])].concat(),
    ] {
        let mut connection = connection();
        feed(&mut connection, &bytes, || usize::MAX);
        assert!(connection.is_over(), "{bytes:?}");
        assert!(connection.input_space().is_empty());
    }
}

#[test]
fn goodbyes_wait_for_the_replies() {
    let mut connection = ready();
    let bytes = [asked(command::READ, 1, 0, 512, &[]), asked(command::DISC, 0, 0, 0, &[])].concat();
    let requests = feed(&mut connection, &bytes, || usize::MAX);
    assert!(!connection.is_over());
    assert_eq!(connection.open_requests(), 1);
    connection.finish(requests[0].slot, Err(libc::EIO), &[]);
    assert!(!connection.is_over());
    drain(&mut connection);
    assert!(connection.is_over());

    let mut connection = super::tests::connection();
    feed(&mut connection, &[flags(), said(option::ABORT, &[])].concat(), || usize::MAX);
    assert!(!connection.is_over());
    drain(&mut connection);
    assert!(connection.is_over());
}

#[test]
fn a_peer_gone_in_mid_write_returns_the_buffer() {
    for leave in [Connection::input_ended, Connection::abandon] {
        let mut connection = ready();
        let bytes = asked(command::WRITE, 1, 0, 1 << 20, &[7; 1000]);
        feed(&mut connection, &bytes, || usize::MAX);
        assert_eq!((connection.pool.used_bytes(), connection.open_requests()), (1 << 20, 0));
        leave(&mut connection);
        assert!(connection.is_over());
        assert_eq!(connection.pool.used_bytes(), 0);
    }
}

#[test]
fn a_long_option_is_skipped_and_refused() {
    let mut connection = connection();
    drain(&mut connection);
    let long = said(option::GO, &vec![0; OPTION_BYTES_MAX as usize + 1]);
    feed(&mut connection, &[flags(), long, said(option::GO, &[0; 6])].concat(), || 1000);
    let (first, _) = OptionReply::read_from_prefix(&drain(&mut connection)).unwrap();
    assert_eq!(first.kind.get(), proto::option_reply::ERR_TOO_BIG);
    assert!(connection.is_transmitting());
}

#[test]
fn garbage_never_panics_nor_holds_memory() {
    for seed in 0..3000 {
        let mut rng = SmallRng::seed_from_u64(seed);
        let mut bytes = if rng.random() { hello() } else { flags() };
        for _ in 0..rng.random_range(1..30) {
            let len = rng.random_range(0..2000);
            let mut noise = vec![0; len as usize];
            rng.fill_bytes(&mut noise);
            match rng.random_range(0..4) {
                0 => bytes.extend(said(rng.random_range(0..12), &noise)),
                1 => bytes.extend(noise),
                _ => {
                    let command = rng.random_range(0..10);
                    let offset = u64::from(rng.random::<u32>() >> rng.random_range(0..32)) & !511;
                    let len = if rng.random() { len & !511 } else { rng.random::<u32>() >> 8 };
                    bytes.extend(asked(command, rng.random(), offset, len, &noise));
                }
            }
        }
        for _ in 0..rng.random_range(0..4) {
            let at = rng.random_range(0..bytes.len());
            bytes[at] ^= 1 << rng.random_range(0..8);
        }
        fuzz::raw(&bytes);
    }
}

#[test]
fn tls_begins_when_all_is_said_and_voids_what_was_agreed() {
    let mut connection = connection();
    let words = [flags(), said(option::STRUCTURED_REPLY, &[]), said(option::STARTTLS, &[])].concat();
    feed(&mut connection, &words, || 7);
    assert!(!connection.wants_tls() && !connection.wants_input());
    drain(&mut connection);
    assert!(connection.wants_tls() && !connection.is_over());
    connection.tls_begun();
    assert!(!connection.wants_tls() && connection.wants_input());
    let words = [said(option::STARTTLS, &[]), said(option::GO, &[0; 6])].concat();
    feed(&mut connection, &words, || 7);
    let (first, _) = OptionReply::read_from_prefix(&drain(&mut connection)).unwrap();
    assert_eq!(first.kind.get(), proto::option_reply::ERR_INVALID);
    // Replies are simple again.
    let requests = feed(&mut connection, &asked(command::READ, 1, 0, 512, &[]), || 100);
    connection.finish(requests[0].slot, Err(libc::EIO), &[]);
    assert_eq!(drain(&mut connection).len(), 16);
}

#[test]
fn words_sent_before_tls_do_not_count_as_said_under_it() {
    let mut connection = connection();
    let words = [flags(), said(option::STARTTLS, &[]), said(option::GO, &[0; 6])].concat();
    feed(&mut connection, &words, || usize::MAX);
    assert!(connection.is_over());
}
