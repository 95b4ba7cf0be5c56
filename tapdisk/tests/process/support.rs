//! A repository with one disk, tapdisks that serve it, and clients in a few
//! lines.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tapdisk_control::{Client, Reply, Request, Stats};
use uuid::Uuid;
use vhd::create::{NewImage, NewKind, ParentLink, create};
use vhd::meta::Meta;
use vhd::record::TmpfsRecords;
use vhd::storage::{Access, FileVolumes, PosixFs, VolumeName, Volumes};
use vhd::units::{BLOCK_BYTES, BlockNo, SectorRun};
use vhd::writer::Writer;

pub const DISK_BYTES: u64 = 64 << 20;
pub const VDI: Uuid = Uuid::from_u128(7);

/// A repository with one empty image, and folders for a tapdisk.
pub struct Place {
    folder: tempfile::TempDir,
}

impl Place {
    pub fn new() -> Self {
        Self::of(DISK_BYTES)
    }

    /// The same with a disk of another size.
    pub fn of(virtual_bytes: u64) -> Self {
        let place = Self { folder: tempfile::tempdir().unwrap() };
        for folder in ["sr", "run", "records"] {
            std::fs::create_dir(place.path(folder)).unwrap();
        }
        let image = NewImage {
            uuid: Uuid::from_u128(1),
            virtual_bytes,
            kind: NewKind::Dynamic,
            bat_entries_max: None,
            hidden: false,
            timestamp_s: 0,
        };
        let volume = place.volumes().create(&VolumeName::vhd(VDI)).unwrap();
        create(volume.as_ref(), &image).unwrap();
        place
    }

    /// With a base that has its first block and some sectors of its third,
    /// under an empty leaf.
    pub fn with_parent() -> Self {
        let place = Self { folder: tempfile::tempdir().unwrap() };
        for folder in ["sr", "run", "records"] {
            std::fs::create_dir(place.path(folder)).unwrap();
        }
        let base = VolumeName::vhd(Uuid::from_u128(8));
        let image = NewImage {
            uuid: Uuid::from_u128(2),
            virtual_bytes: DISK_BYTES,
            kind: NewKind::Dynamic,
            bat_entries_max: None,
            hidden: true,
            timestamp_s: 0,
        };
        let parent = ParentLink { uuid: image.uuid, volume: base.clone(), timestamp_s: 0 };
        let volumes = place.volumes();
        create(volumes.create(&base).unwrap().as_ref(), &image).unwrap();
        let records = TmpfsRecords::new(place.path("records"), Uuid::from_u128(9), 1);
        let mut writer = Writer::open(&volumes, &base, &records).unwrap();
        writer.write(BlockNo(0), SectorRun::BLOCK, &vec![1; BLOCK_BYTES as usize], false).unwrap();
        writer.write(BlockNo(2), SectorRun { first: 8, count: 8 }, &[2; 4096], true).unwrap();
        writer.settle(Some(true)).unwrap();
        let leaf =
            NewImage { uuid: Uuid::from_u128(1), kind: NewKind::Child { parent }, hidden: false, ..image };
        create(volumes.create(&VolumeName::vhd(VDI)).unwrap().as_ref(), &leaf).unwrap();
        place
    }

    pub fn uri(&self) -> String {
        format!("nbd+unix:///{VDI}?socket={}", self.path("run/nbd.sock").display())
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn volumes(&self) -> FileVolumes {
        FileVolumes::new(std::sync::Arc::new(PosixFs::new(self.path("sr"))))
    }

    /// Starts a tapdisk; its first line.
    pub fn start(&self, more: &[&str]) -> (Tapdisk, serde_json::Value) {
        let volume = VolumeName::vhd(VDI);
        let id = VDI.to_string();
        let mut child = Command::new(env!("CARGO_BIN_EXE_tapdisk"))
            .arg("--sr-path")
            .arg(self.path("sr"))
            .arg("--run")
            .arg(self.path("run"))
            .arg("--records")
            .arg(self.path("records"))
            .args(["--volume", volume.as_str(), "--vdi", &id, "--sr", &id])
            .args(["--boot-id", &id, "--epoch", "1"])
            .args(more)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        (Tapdisk(child), serde_json::from_str(&line).unwrap())
    }

    pub fn ready(&self) -> Tapdisk {
        let (tapdisk, said) = self.start(&[]);
        assert_eq!(said["ready"], true, "{said}");
        assert_eq!(said["pid"], tapdisk.0.id());
        tapdisk
    }

    pub fn control(&self) -> Client {
        Client::connect(&self.path("run/ctl.sock"), Duration::from_secs(20)).unwrap()
    }

    pub fn stats(&self) -> Stats {
        match self.control().call(Request::Stats).unwrap() {
            Reply::Stats(stats) => *stats,
            other => panic!("{other:?}"),
        }
    }

    /// A client past the handshake, with simple replies.
    pub fn nbd(&self) -> UnixStream {
        let mut socket = UnixStream::connect(self.path("run/nbd.sock")).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        socket.write_all(b"\0\0\0\x03IHAVEOPT\0\0\0\x01\0\0\0\0").unwrap();
        let mut hello = [0; 28];
        socket.read_exact(&mut hello).unwrap();
        assert_eq!(hello[18..26], DISK_BYTES.to_be_bytes());
        socket
    }
}

/// A running tapdisk, killed when dropped.
pub struct Tapdisk(pub Child);

impl Tapdisk {
    pub fn end(mut self, signal: Signal) -> ExitStatus {
        kill(Pid::from_raw(self.0.id() as i32), signal).unwrap();
        self.wait()
    }

    pub fn wait(&mut self) -> ExitStatus {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            if let Some(status) = self.0.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "it does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Tapdisk {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub fn ask(socket: &mut UnixStream, command: u16, offset: u64, len: u32, data: &[u8]) {
    ask_with(socket, 0, command, offset, len, data);
}

pub fn ask_with(socket: &mut UnixStream, flags: u16, command: u16, offset: u64, len: u32, data: &[u8]) {
    let mut bytes = 0x2560_9513u32.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(command.to_be_bytes());
    bytes.extend([0; 8]);
    bytes.extend(offset.to_be_bytes());
    bytes.extend(len.to_be_bytes());
    bytes.extend(data);
    socket.write_all(&bytes).unwrap();
}

pub fn write(socket: &mut UnixStream, offset: u64, data: &[u8]) -> u32 {
    ask(socket, 1, offset, data.len() as u32, data);
    outcome(socket)
}

pub fn read(socket: &mut UnixStream, offset: u64, len: u32) -> Vec<u8> {
    ask(socket, 0, offset, len, &[]);
    assert_eq!(outcome(socket), 0);
    let mut data = vec![0; len as usize];
    socket.read_exact(&mut data).unwrap();
    data
}

pub fn flush(socket: &mut UnixStream) -> u32 {
    ask(socket, 3, 0, 0, &[]);
    outcome(socket)
}

pub fn outcome(socket: &mut UnixStream) -> u32 {
    let mut reply = [0; 16];
    socket.read_exact(&mut reply).unwrap();
    u32::from_be_bytes(reply[4..8].try_into().unwrap())
}

pub fn open_meta(path: &Path) -> Meta {
    let volumes = FileVolumes::new(std::sync::Arc::new(PosixFs::new(path.to_path_buf())));
    let volume = volumes.open(&VolumeName::vhd(VDI), Access::Read).unwrap();
    Meta::read(volume.as_ref()).unwrap()
}

/// Runs a client program: whether it succeeded, and all it said. `None`,
/// loudly, where it is not installed; in CI everything must be there.
pub fn try_client(program: &str, args: &[&str]) -> Option<(bool, String)> {
    let output = Command::new("timeout").arg("120").arg(program).args(args).output().unwrap();
    if output.status.code() == Some(127) {
        assert!(std::env::var_os("CI").is_none(), "{program} is needed here");
        eprintln!("SKIPPED: {program} is not installed");
        return None;
    }
    let said = [output.stdout, output.stderr].concat();
    Some((output.status.success(), String::from_utf8_lossy(&said).into_owned()))
}

/// As [`try_client`]; it must succeed. What it said.
pub fn client(program: &str, args: &[&str]) -> Option<String> {
    let (fine, said) = try_client(program, args)?;
    assert!(fine, "{program} {args:?}: {said}");
    Some(said)
}

/// Ticks of processor time that a process has used.
pub fn ticks(tapdisk: &Tapdisk) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", tapdisk.0.id())).unwrap();
    let after_name = stat.rsplit_once(')').unwrap().1;
    let fields: Vec<&str> = after_name.split_whitespace().collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}
