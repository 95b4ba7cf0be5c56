//! The server with a stand-in core (one plain file, no chain) against real
//! sockets, and against real clients where they are installed.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::JoinHandle;

use tapdisk_control::{Answer, Client, Refusal, Reply, Stats};
use vhd::storage::{Access, FileVolumes, Fs, PosixFs};

use self::plain::Plain;
use super::*;
use crate::engine::{Extent, FileId, Request, RequestId, RequestKind};
use crate::limits::CLIENTS_MAX;

mod plain;

const DISK_BYTES: u64 = 64 << 20;

struct Running {
    folder: tempfile::TempDir,
    thread: Option<JoinHandle<()>>,
}

impl Running {
    fn start() -> Self {
        Self::with(DriverChoice::Auto)
    }

    fn with(driver: DriverChoice) -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::File::create(folder.path().join("disk.raw")).unwrap().set_len(DISK_BYTES).unwrap();
        let fs: Arc<dyn Fs> = Arc::new(PosixFs::new(folder.path().to_path_buf()));
        let files = Arc::new(Files::default());
        let file = files.add_direct(fs.open("disk.raw", Access::Write).unwrap()).unwrap();
        let parts = Parts {
            export: Export {
                name: "disk".into(),
                description: "a test".into(),
                virtual_bytes: DISK_BYTES,
                read_only: false,
                fast_zero: true,
            },
            nbd: UnixListener::bind(folder.path().join("nbd.sock")).unwrap(),
            tcp: None,
            tls: None,
            control: UnixListener::bind(folder.path().join("ctl.sock")).unwrap(),
            volumes: Arc::new(FileVolumes::new(fs)),
            files,
            signals: None,
            driver,
        };
        let core = Plain::new(file);
        let thread = Some(std::thread::spawn(move || Server::new(core, parts).unwrap().run().unwrap()));
        Self { folder, thread }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn control(&self) -> Client {
        Client::connect(&self.path("ctl.sock"), Duration::from_secs(10)).unwrap()
    }

    fn stats(&self) -> Stats {
        let Reply::Stats(stats) = self.control().call(ControlRequest::Stats).unwrap() else {
            panic!("no stats");
        };
        *stats
    }

    fn nbd(&self) -> UnixStream {
        let socket = UnixStream::connect(self.path("nbd.sock")).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        socket
    }

    /// A client past the handshake, with simple replies. While those who left
    /// still count, the server may turn it away for a moment.
    fn ready(&self) -> UnixStream {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            match self.try_ready() {
                Ok(socket) => return socket,
                Err(error) => assert!(Instant::now() < deadline, "{error}"),
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn try_ready(&self) -> std::io::Result<UnixStream> {
        let mut socket = self.nbd();
        socket.write_all(&[0, 0, 0, 3])?;
        socket.write_all(b"IHAVEOPT\0\0\0\x01\0\0\0\x04disk")?;
        let mut hello = [0; 18 + 10];
        socket.read_exact(&mut hello)?;
        assert_eq!(hello[18..26], DISK_BYTES.to_be_bytes());
        Ok(socket)
    }

    fn uri(&self) -> String {
        format!("nbd+unix:///disk?socket={}", self.path("nbd.sock").display())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let stopped = self.control().call(ControlRequest::Stop { force: true });
        if !std::thread::panicking() {
            assert_eq!(stopped.unwrap(), Reply::Done);
            self.thread.take().unwrap().join().unwrap();
        }
    }
}

fn header(command: u16, cookie: u64, offset: u64, len: u32) -> Vec<u8> {
    let mut bytes = 0x2560_9513u32.to_be_bytes().to_vec();
    bytes.extend([0, 0]);
    bytes.extend(command.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    bytes.extend(len.to_be_bytes());
    bytes
}

/// Writes and reads back through one connection.
fn round_trip(socket: &mut UnixStream, offset: u64, len: usize, fill: u8) {
    socket.write_all(&header(1, 1, offset, len as u32)).unwrap();
    socket.write_all(&vec![fill; len]).unwrap();
    let mut reply = [0; 16];
    socket.read_exact(&mut reply).unwrap();
    assert_eq!(reply[4..8], [0; 4]);
    socket.write_all(&header(0, 2, offset, len as u32)).unwrap();
    socket.read_exact(&mut reply).unwrap();
    assert_eq!(reply[4..8], [0; 4]);
    let mut data = vec![0; len];
    socket.read_exact(&mut data).unwrap();
    assert!(data.iter().all(|byte| *byte == fill));
}

#[test]
fn what_was_written_is_read_back() {
    let running = Running::start();
    let mut socket = running.ready();
    for (n, len) in [512, 4096, 65536, 1 << 20, 32 << 20].into_iter().enumerate() {
        round_trip(&mut socket, 512 * n as u64, len, n as u8 + 1);
        round_trip(&mut socket, 511 * n as u64 + 1, len - 3, n as u8 + 10);
        round_trip(&mut socket, 511 * n as u64 + 1, len, n as u8 + 20);
    }
}

/// Each of several connections writes its own bytes, many at once, on sectors
/// that all of them share.
#[test]
fn neighbours_in_a_sector_keep_their_bytes() {
    const STRIPE: usize = 700;
    const CONNECTIONS: usize = 4;
    const STRIPES: usize = 40;
    let running = Running::start();
    let writers: Vec<_> = (0..CONNECTIONS)
        .map(|n| {
            let mut socket = running.ready();
            std::thread::spawn(move || {
                for round in 0..30u8 {
                    let mut bytes = Vec::new();
                    for stripe in (n..STRIPES).step_by(CONNECTIONS) {
                        bytes.extend(header(1, stripe as u64, (stripe * STRIPE) as u64, STRIPE as u32));
                        bytes.extend([round ^ stripe as u8; STRIPE]);
                    }
                    socket.write_all(&bytes).unwrap();
                    for _ in (n..STRIPES).step_by(CONNECTIONS) {
                        let mut reply = [0; 16];
                        socket.read_exact(&mut reply).unwrap();
                        assert_eq!(reply[4..8], [0; 4]);
                    }
                }
            })
        })
        .collect();
    for writer in writers {
        writer.join().unwrap();
    }
    let mut socket = running.ready();
    for stripe in 0..STRIPES {
        socket.write_all(&header(0, 1, (stripe * STRIPE) as u64, STRIPE as u32)).unwrap();
        let mut reply = [0; 16 + STRIPE];
        socket.read_exact(&mut reply).unwrap();
        assert!(reply[16..].iter().all(|byte| *byte == 29 ^ stripe as u8), "stripe {stripe}");
    }
}

#[test]
fn threads_move_the_data_where_there_is_no_ring() {
    let running = Running::with(DriverChoice::Threads);
    let mut socket = running.ready();
    for (n, len) in [512, 4096, 65536, 1 << 20].into_iter().enumerate() {
        round_trip(&mut socket, 512 * n as u64, len, n as u8 + 1);
    }
}

#[test]
fn peers_that_stall_leave_or_babble_disturb_nobody() {
    let running = Running::start();
    // In the middle of a write, of a header, of the handshake.
    let mut in_write = running.ready();
    in_write.write_all(&header(1, 1, 0, 1 << 20)).unwrap();
    in_write.write_all(&[1; 5000]).unwrap();
    let mut in_header = running.ready();
    in_header.write_all(&header(1, 1, 0, 1 << 20)[..9]).unwrap();
    let _in_handshake = running.nbd();
    // Asks for much and reads nothing.
    let mut deaf = running.ready();
    deaf.set_nonblocking(true).unwrap();
    while deaf.write(&header(0, 1, 0, 1 << 20)).is_ok_and(|n| n == 28) {}
    // Leaves with requests under way, and garbage.
    for _ in 0..50 {
        let mut brief = running.ready();
        brief.write_all(&header(0, 1, 0, 1 << 20)).unwrap();
        drop(brief);
        let mut garbage = running.nbd();
        let _ = garbage.write_all(&[0x5a; 10_000]);
    }
    let mut socket = running.ready();
    round_trip(&mut socket, 8 << 20, 1 << 20, 9);
    // The stalled ones can still go on.
    in_write.write_all(&vec![1; (1 << 20) - 5000]).unwrap();
    let mut reply = [0; 16];
    in_write.read_exact(&mut reply).unwrap();
    assert_eq!(reply[4..8], [0; 4]);
}

#[test]
fn clients_are_counted_and_one_too_many_is_turned_away() {
    let running = Running::start();
    let clients: Vec<_> = (0..CLIENTS_MAX).map(|_| running.ready()).collect();
    assert_eq!(running.stats().clients, CLIENTS_MAX as u64);
    let mut refused = running.nbd();
    assert_eq!(refused.read(&mut [0; 1]).unwrap(), 0);
    drop(clients);
    // Room comes back once the server has seen them go.
    let deadline = Instant::now() + Duration::from_secs(10);
    while running.stats().clients > 0 {
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(5));
    }
    round_trip(&mut running.ready(), 0, 512, 1);
}

#[test]
fn control_calls_are_answered_and_garbage_is_refused() {
    let running = Running::start();
    let mut client = running.control();
    assert_eq!(client.call(ControlRequest::Settle).unwrap(), Reply::Done);
    assert!(client.call(ControlRequest::MergeStatus).is_err());
    assert_eq!(client.call(ControlRequest::Settle).unwrap(), Reply::Done);

    let mut socket = UnixStream::connect(running.path("ctl.sock")).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    socket.write_all(b"garbage\n{\"id\":1,\"request\":\"no\"}\n").unwrap();
    socket.write_all(b"{\"id\":7,\"request\":\"stats\"}\n").unwrap();
    socket.shutdown(std::net::Shutdown::Write).unwrap();
    let mut said = String::new();
    socket.read_to_string(&mut said).unwrap();
    let ids: Vec<u64> = said.lines().map(|line| serde_json::from_str::<Answer>(line).unwrap().id).collect();
    assert_eq!(ids, [0, 0, 7]);

    let mut endless = UnixStream::connect(running.path("ctl.sock")).unwrap();
    endless.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let flood = vec![b'x'; 1 << 20];
    let _ = endless.write_all(&flood);
    let mut said = Vec::new();
    let _ = endless.read_to_end(&mut said); // ends, by reset or by end
    assert!(client.call(ControlRequest::Stats).is_ok());
}

#[test]
fn a_peer_that_hangs_up_is_reported_while_it_waits() {
    let running = Running::start();
    let before = running.stats().state;
    let mut socket = UnixStream::connect(running.path("ctl.sock")).unwrap();
    socket.write_all(b"{\"id\":1,\"request\":\"merge_stop\"}\n").unwrap();
    drop(socket);
    let deadline = Instant::now() + Duration::from_secs(10);
    while running.stats().state.len() < before.len() + 2 * "PeerId(1), ".len() {
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Runs a client program; `None`, loudly, where it is not installed.
fn client(program: &str, args: &[&str]) -> Option<String> {
    let output = match Command::new("timeout").arg("60").arg(program).args(args).output() {
        Ok(output) if output.status.code() != Some(127) => output,
        _ => {
            eprintln!("SKIPPED: {program} is not installed");
            return None;
        }
    };
    let text =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{program} {args:?}: {text}");
    Some(text)
}

fn same_file(a: &Path, b: &Path) -> bool {
    std::fs::read(a).unwrap() == std::fs::read(b).unwrap()
}

#[test]
fn libnbd_clients_are_content() {
    let running = Running::start();
    let uri = running.uri();
    if let Some(said) = client("nbdinfo", &["--json", &uri]) {
        for word in ["\"export-size\": 67108864", "\"can_fast_zero\": true", "base:allocation"] {
            assert!(said.contains(word), "{word}: {said}");
        }
    }
    if let Some(said) = client("nbdinfo", &["--map=qemu:allocation-depth", &uri]) {
        assert!(said.contains("33554432"), "{said}");
    }
    client("nbdinfo", &["--list", &uri]);
    let source = running.path("source");
    let bytes: Vec<u8> = (0..DISK_BYTES / 8).flat_map(|n| (n * n).to_le_bytes()).collect();
    std::fs::write(&source, bytes).unwrap();
    if client("nbdcopy", &["--connections=4", source.to_str().unwrap(), &uri]).is_some() {
        assert!(same_file(&source, &running.path("disk.raw")));
        let copy = running.path("copy");
        // Its holes are this stand-in's invention: copy them all the same.
        client("nbdcopy", &["--no-extents", &uri, copy.to_str().unwrap()]);
        assert!(same_file(&source, &copy));
    }
    let script = "h.pwrite(b'a'*4096,0); h.flush(); h.trim(4096,0); h.zero(65536,4096); \
        h.cache(4096,0); assert h.pread(4096,0)==bytes(4096)\n\
        h.pwrite(b'b'*1000,8000,nbd.CMD_FLAG_FUA); h.zero(100,8100); h.trim(700,8300)\n\
        d=h.pread(1200,7900); assert d==bytes(100)+b'b'*100+bytes(100)+b'b'*800+bytes(100), d";
    client("/usr/bin/python3", &["-m", "nbd", "-u", &uri, "-c", script]);
}

#[test]
fn qemu_and_fio_are_content() {
    let running = Running::start();
    let uri = running.uri();
    let commands = "write -P 7 0 1M;write -z -u 64k 64k;discard 128k 64k;flush;\
        read -P 7 0 64k;read -P 0 64k 128k;read -P 7 192k 64k;aio_write -P 1 2M 2M;aio_flush;\
        read -P 1 2M 2M";
    let mut args = vec!["-f", "raw", "-t", "none"];
    args.extend(commands.split(';').flat_map(|command| ["-c", command]));
    args.push(&uri);
    if let Some(said) = client("qemu-io", &args) {
        assert!(!said.contains("failed"), "{said}");
    }
    if let Some(said) = client("qemu-img", &["info", &uri]) {
        assert!(said.contains("64 MiB"), "{said}");
    }
    let uri = format!("--uri={uri}");
    let fio = [
        "--name=v",
        "--ioengine=nbd",
        &uri,
        "--rw=randrw",
        "--bsrange=512-256k",
        "--iodepth=64",
        "--size=32m",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--do_verify=1",
        "--trim_percentage=5",
        "--verify_state_save=0",
    ];
    client("fio", &fio);
}
