//! Other people's clients against a chain of two images.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use super::support::*;

const PYTHON: &str = "/usr/bin/python3";

/// Runs `script` in libnbd's shell, connected with both metadata contexts.
fn shell(place: &Place, script: &str) {
    let uri = place.uri();
    let connect = format!(
        "h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)\n\
         h.add_meta_context('qemu:allocation-depth')\nh.connect_uri({uri:?})\n"
    );
    client(PYTHON, &["-m", "nbd", "-c", &connect, "-c", script]);
}

#[test]
fn nbdinfo_sees_what_the_export_can_and_what_the_disk_is_made_of() {
    let place = Place::with_parent();
    let _tapdisk = place.ready();
    let uri = place.uri();
    assert_eq!(write(&mut place.nbd(), (2 << 20) + 512, &[7; 512]), 0);
    let Some(said) = client("nbdinfo", &["--json", &uri]) else { return };
    for word in [
        "\"export-size\": 67108864",
        "\"can_multi_conn\": true",
        "\"can_fua\": true",
        "\"can_trim\": true",
        "\"can_zero\": true",
        "\"can_fast_zero\": true",
        "\"can_cache\": true",
        "\"can_df\": true",
        "\"is_read_only\": false",
        "\"block_size_minimum\": 1",
        "\"block_size_preferred\": 4096",
        "\"block_size_maximum\": 33554432",
        "base:allocation",
        "qemu:allocation-depth",
    ] {
        assert!(said.contains(word), "{word}: {said}");
    }
    client("nbdinfo", &["--list", &uri]);
    let runs = |context: &str| -> Vec<[u64; 3]> {
        let said = client("nbdinfo", &[&format!("--map={context}"), &uri]).unwrap_or_default();
        let numbers = |line: &str| -> Vec<u64> {
            line.split_whitespace().map_while(|word| word.parse().ok()).collect()
        };
        said.lines().filter_map(|line| numbers(line).get(..3)?.try_into().ok()).collect()
    };
    // The base: block 0 and 4 KiB of block 2. The leaf: block 1, whole, for
    // nothing lies below it.
    let (m, third) = (1 << 20, (4 << 20) + 4096);
    let rest = DISK_BYTES - third - 4096;
    let zero = |at, len| [at, len, 3];
    assert_eq!(
        runs("base:allocation"),
        [[0, 4 * m, 0], zero(4 * m, 4096), [third, 4096, 0], zero(third + 4096, rest)]
    );
    assert_eq!(
        runs("qemu:allocation-depth"),
        [[0, 2 * m, 2], [2 * m, 2 * m, 1], [4 * m, 4096, 0], [third, 4096, 2], [third + 4096, rest, 0]]
    );
}

#[test]
fn nbdcopy_copies_files_of_any_length_both_ways() {
    let place = Place::with_parent();
    let _tapdisk = place.ready();
    let uri = place.uri();
    let source: Vec<u8> = (0..DISK_BYTES / 8 - 1000).flat_map(|n| (n * n).to_le_bytes()).skip(77).collect();
    std::fs::write(place.path("source"), &source).unwrap();
    let (from, to) = (place.path("source"), place.path("copy"));
    let (from, to) = (from.to_str().unwrap(), to.to_str().unwrap());
    for request in ["--request-size=262144", "--request-size=4096"] {
        client("nbdcopy", &["--connections=4", "--requests=32", request, from, &uri]);
        if client("nbdcopy", &["--connections=4", &uri, to]).is_some() {
            let copy = std::fs::read(to).unwrap();
            assert!(copy[..source.len()] == source && copy[source.len()..].iter().all(|byte| *byte == 0));
        }
    }
}

#[test]
fn the_shell_may_begin_and_end_anywhere_and_use_every_flag() {
    let place = Place::with_parent();
    let _tapdisk = place.ready();
    shell(
        &place,
        "import random\n\
         random.seed(7)\n\
         size = h.get_size()\n\
         model = bytearray(size)\n\
         model[0:2<<20] = b'\\x01' * (2<<20)\n\
         model[(4<<20)+4096:(4<<20)+8192] = b'\\x02' * 4096\n\
         F, N, Z = nbd.CMD_FLAG_FUA, nbd.CMD_FLAG_NO_HOLE, nbd.CMD_FLAG_FAST_ZERO\n\
         for n in range(400):\n\
         \x20   at = random.randrange(5 << 20); length = random.choice([1, 100, 511, 513, 5000, 70000])\n\
         \x20   fua = random.choice([0, F]); kind = random.randrange(5)\n\
         \x20   if kind == 0:\n\
         \x20       h.zero(length, at, fua | random.choice([0, N, Z])); model[at:at+length] = bytes(length)\n\
         \x20   elif kind == 1:\n\
         \x20       first = -(-at // 512) * 512; last = (at + length) // 512 * 512\n\
         \x20       h.trim(length, at, fua)\n\
         \x20       if first < last: model[first:last] = bytes(last - first)\n\
         \x20   elif kind == 2:\n\
         \x20       assert h.pread(length, at) == model[at:at+length], n\n\
         \x20   else:\n\
         \x20       data = random.randbytes(length); h.pwrite(data, at, fua); model[at:at+length] = data\n\
         h.flush()\n\
         h.cache(70000, 12345)\n\
         whole = []\n\
         h.pread_structured(9000, 777, lambda d, o, s, e: whole.append((o, bytes(d))), nbd.CMD_FLAG_DF)\n\
         assert whole == [(777, bytes(model[777:9777]))]\n\
         for at in range(0, 8 << 20, 1 << 20):\n\
         \x20   assert h.pread(1 << 20, at) == model[at:at+(1 << 20)], at\n",
    );
}

#[test]
fn the_shell_is_refused_what_cannot_be() {
    let place = Place::new();
    let _tapdisk = place.ready();
    shell(
        &place,
        "h.set_strict_mode(0)\n\
         def refused(errno, call):\n\
         \x20   try: call()\n\
         \x20   except nbd.Error as e: assert e.errno == errno, (e.errno, errno)\n\
         \x20   else: assert False, errno\n\
         size = h.get_size()\n\
         refused('EINVAL', lambda: h.pread(2, size - 1))\n\
         refused('ENOSPC', lambda: h.pwrite(b'ab', size - 1))\n\
         refused('ENOSPC', lambda: h.zero(2, size - 1))\n\
         refused('EINVAL', lambda: h.trim(2, size - 1))\n\
         refused('ENOTSUP', lambda: h.zero(512, 0, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FAST_ZERO))\n\
         refused('EINVAL', lambda: h.zero(512, 0, 1 << 9))\n\
         h.pwrite(b'ab', size - 2)\n\
         assert h.pread(3, size - 3) == b'\\0ab'\n",
    );
}

#[test]
fn block_status_answers_large_and_odd_ranges_and_one_extent_when_asked() {
    let place = Place::with_parent();
    let _tapdisk = place.ready();
    shell(
        &place,
        "seen = {}\n\
         def note(context, offset, entries, error): seen[context] = (offset, list(entries))\n\
         size = h.get_size()\n\
         h.block_status(size, 0, note)\n\
         for context, (offset, entries) in seen.items():\n\
         \x20   assert offset == 0 and sum(entries[0::2]) == size, (context, entries)\n\
         assert len(seen) == 2\n\
         h.block_status(1000, (4 << 20) + 3700, note)\n\
         assert seen['qemu:allocation-depth'][1] == [396, 0, 604, 2], seen\n\
         assert seen['base:allocation'][1] == [396, 3, 604, 0], seen\n\
         h.block_status(size, 0, note, nbd.CMD_FLAG_REQ_ONE)\n\
         assert seen['qemu:allocation-depth'][1] == [2 << 20, 2], seen\n",
    );
}

#[test]
fn what_one_connection_was_told_the_others_see() {
    let place = Place::new();
    let _tapdisk = place.ready();
    let (mut one, mut other) = (place.nbd(), place.nbd());
    for n in 0..100u8 {
        assert_eq!(write(&mut one, 100, &[n; 700]), 0);
        ask(&mut other, 3, 0, 0, &[]);
        assert_eq!(outcome(&mut other), 0);
        assert_eq!(read(&mut other, 100, 700), [n; 700]);
    }
}

#[test]
fn qemu_is_content() {
    let place = Place::with_parent();
    let _tapdisk = place.ready();
    let uri = place.uri();
    let commands = "write -P 7 3000 1M;write -z -u 64k 64k;write -z -u -n 1M 64k;write -f -P 9 5M 100k;\
        discard 128k 64k;flush;read -P 7 3000 60k;read -P 0 64k 128k;read -P 7 192k 64k;\
        aio_write -P 1 2M 2M;aio_write -z 6M 1M;aio_flush;read -P 1 2M 2M;read -P 9 5M 100k;read -P 2 4100k 4k";
    let mut args = vec!["-f", "raw", "-t", "none"];
    args.extend(commands.split(';').flat_map(|command| ["-c", command]));
    args.push(&uri);
    if let Some(said) = client("qemu-io", &args) {
        assert!(!said.contains("failed"), "{said}");
    }
    let raw = place.path("raw");
    let raw = raw.to_str().unwrap();
    if client("qemu-img", &["convert", "-f", "raw", "-O", "raw", &uri, raw]).is_some() {
        client("qemu-img", &["compare", "-f", "raw", "-F", "raw", &uri, raw]);
        client("qemu-img", &["convert", "-n", "-W", "-f", "raw", "-O", "raw", raw, &uri]);
        client("qemu-img", &["compare", "-f", "raw", "-F", "raw", &uri, raw]);
        client("qemu-img", &["map", "--output=json", "-f", "raw", &uri]);
    }
}

/// A client with extended headers, in a few lines.
struct Extended(UnixStream);

impl Extended {
    fn new(place: &Place) -> Self {
        let mut socket = UnixStream::connect(place.path("run/nbd.sock")).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let name = b"base:allocation";
        let query = [&[0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, name.len() as u8], name.as_slice()].concat();
        let mut words = b"\0\0\0\x03IHAVEOPT\0\0\0\x0b\0\0\0\0IHAVEOPT\0\0\0\x0a\0\0\0".to_vec();
        words.push(query.len() as u8);
        words.extend(&query);
        words.extend(b"IHAVEOPT\0\0\0\x07\0\0\0\x06\0\0\0\0\0\0");
        socket.write_all(&words).unwrap();
        // Greeting; ACK; context, ACK; export, block sizes, ACK.
        socket.read_exact(&mut [0; 18 + 20 + (20 + 4 + 15) + 20 + (20 + 12) + (20 + 14) + 20]).unwrap();
        Self(socket)
    }

    /// Kind and data of the reply's one chunk.
    fn ask(&mut self, command: u16, offset: u64, len: u64, data: &[u8]) -> (u16, Vec<u8>) {
        let mut words = 0x21e4_1c71u32.to_be_bytes().to_vec();
        words.extend((if data.is_empty() { 0u16 } else { 32 }).to_be_bytes());
        words.extend(command.to_be_bytes());
        words.extend([9; 8]);
        words.extend(offset.to_be_bytes());
        words.extend(len.to_be_bytes());
        words.extend(data);
        self.0.write_all(&words).unwrap();
        let mut head = [0; 32];
        self.0.read_exact(&mut head).unwrap();
        assert_eq!(head[..6], [0x6e, 0x8a, 0x27, 0x8c, 0, 1]);
        assert_eq!(head[8..24], [[9; 8], offset.to_be_bytes()].concat());
        let mut data = vec![0; u64::from_be_bytes(head[24..].try_into().unwrap()) as usize];
        self.0.read_exact(&mut data).unwrap();
        (u16::from_be_bytes([head[6], head[7]]), data)
    }
}

#[test]
fn one_request_may_be_longer_than_four_gibibytes() {
    const GIB: u64 = 1 << 30;
    let place = Place::of(20 * GIB);
    let _tapdisk = place.ready();
    let mut client = Extended::new(&place);
    let places = [0, GIB - 5, 2 * GIB - 700, 9 * GIB + 3];
    for at in places {
        assert_eq!(client.ask(1, at, 1000, &[7; 1000]), (0, vec![]));
    }
    let (kind, status) = client.ask(7, 0, 20 * GIB, &[]);
    assert_eq!((kind, &status[..8]), (6, &[0, 0, 0, 1, 0, 0, 0, (status.len() / 16) as u8][..]));
    assert_eq!(client.ask(6, 5, 9 * GIB + 1, &[]), (0, vec![]));
    let zeros_then = |n: usize, sevens: usize| (1, [vec![0; n], vec![7; sevens]].concat());
    let (kind, mut read) = client.ask(0, 0, 1000, &[]);
    assert_eq!(
        (kind, read.drain(..13).collect::<Vec<_>>()),
        (1, vec![0, 0, 0, 0, 0, 0, 0, 0, 7, 7, 7, 7, 7])
    );
    assert!(read.iter().all(|byte| *byte == 0));
    for at in [GIB - 5, 2 * GIB - 700] {
        let (_, read) = client.ask(0, at, 1000, &[]);
        assert_eq!(read[8..], [0; 1000]);
    }
    let (kind, read) = client.ask(0, 9 * GIB + 3, 1000, &[]);
    assert_eq!((kind, read[8..].to_vec()), (1, zeros_then(3, 997).1));
    assert_eq!(client.ask(4, 0, 20 * GIB, &[]), (0, vec![]));
    assert_eq!(client.ask(0, 9 * GIB + 3, 1000, &[]).1[8..], [0; 1000]);
    let stats = place.stats();
    assert_eq!((stats.trim.count, stats.trim.bytes, stats.write_zeroes.count), (1, 20 * GIB, 1));
    // Whoever knows of them uses them by himself.
    let uri = place.uri();
    let commands = ["write -P 5 7G 100k", "write -z -u -n 1000 9G", "read -P 0 7G 100k", "discard 0 2000M"];
    let mut args = vec!["-f", "raw", "-t", "none"];
    args.extend(commands.iter().flat_map(|command| ["-c", command]));
    args.push(&uri);
    if let Some(said) = super::support::client("qemu-io", &args) {
        assert!(!said.contains("failed"), "{said}");
    }
}

#[test]
fn fio_reads_what_it_wrote() {
    let place = Place::with_parent();
    let _tapdisk = place.ready();
    let uri = format!("--uri={}", place.uri());
    for sizes in [&["--bsrange=512-256k"][..], &["--bsrange=1k-20k", "--bs_unaligned=1"]] {
        let mut args = vec![
            "--name=v",
            "--ioengine=nbd",
            &uri,
            "--rw=randrw",
            "--iodepth=64",
            "--size=24m",
            "--verify=crc32c",
            "--verify_fatal=1",
            "--do_verify=1",
            "--verify_state_save=0",
        ];
        args.extend(sizes);
        if sizes.len() == 1 {
            args.push("--trim_percentage=5");
        }
        client("fio", &args);
    }
}
