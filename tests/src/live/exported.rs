//! An export that takes its time, while all there is to merge around it is
//! merged: what lies upon what it reads, and the very images it reads.

use std::fs::File;
use std::io::Read;
use std::ops::RangeInclusive;
use std::process::{Command, Stdio};

use coppice::nbd_client::Client;
use rand::rngs::SmallRng;
use rand::{Rng, RngCore, SeedableRng};

use crate::support::host::{Attached, Host, LIMIT, wait_until};
use crate::support::programs::coppice;

const DISK: &str = "64MiB";
const DISK_BYTES: u64 = 64 << 20;
/// Snapshots; the one in the middle is exported.
const LEVELS: u32 = 5;
const EXPORTED: u32 = 3;
/// Writes between two of them, of so many units of 4 KiB at most.
const WRITES: u32 = 60;
const UNITS_MAX: u64 = 64;

/// A guest's disk as it must be.
struct Disk {
    bytes: Vec<u8>,
    rng: SmallRng,
}

impl Disk {
    fn write_some(&mut self, at: &Attached) {
        let mut client = Client::connect(&at.socket, &at.export).unwrap();
        for _ in 0..WRITES {
            let units = self.rng.random_range(1..=UNITS_MAX);
            let first = self.rng.random_range(0..=DISK_BYTES / 4096 - units) * 4096;
            let to = usize::try_from(first).unwrap();
            let part = &mut self.bytes[to..to + usize::try_from(units * 4096).unwrap()];
            self.rng.fill_bytes(part);
            client.write(first, part, false).unwrap();
            client.next(LIMIT).unwrap().outcome.unwrap();
        }
        client.close();
    }
}

#[test]
fn an_export_reads_its_snapshot_while_all_around_it_is_merged() {
    let host = Host::new();
    host.sr("store");
    let vdi = host.disk("store", "web", DISK);
    let at = host.attach(&vdi);
    let mut disk =
        Disk { bytes: vec![0; usize::try_from(DISK_BYTES).unwrap()], rng: SmallRng::seed_from_u64(11) };
    let mut wanted = Vec::new();
    host.ok(&["gc", "pause", "store"]);
    for level in 1..=LEVELS {
        disk.write_some(&at);
        host.ok(&["vdi", "snapshot", "web", "--name", &format!("s{level}")]);
        if level == EXPORTED {
            wanted.clone_from(&disk.bytes);
        }
    }
    disk.write_some(&at);
    let depth = |name: &str| host.ok(&["vdi", "show", name])["depth"].as_u64().unwrap();
    let exported = format!("s{EXPORTED}");
    assert_eq!((depth("web"), depth(&exported)), (u64::from(LEVELS) + 1, u64::from(EXPORTED) + 1));

    let fifo = host.data().join("pipe");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::from_bits_truncate(0o600)).unwrap();
    let mut command = Command::new(coppice());
    command.args(["--json", "vdi", "export", &exported, "--format", "raw", "--run"]).arg(host.run_dir());
    let mut export = command.arg(&fifo).stdout(Stdio::null()).spawn().unwrap();
    // Under way, and it waits for us with most of the disk before it.
    let mut pipe = File::open(&fifo).unwrap();
    let mut came = vec![0; 4096];
    pipe.read_exact(&mut came).unwrap();

    host.ok(&["gc", "resume", "store"]);
    // First what lies upon the snapshot, then what it reads itself: that goes
    // into one image, and the export is what its nodes wait for in the end.
    let delete = |levels: RangeInclusive<u32>| {
        levels.for_each(|level| drop(host.ok(&["vdi", "delete", &format!("s{level}")])));
    };
    delete(EXPORTED + 1..=LEVELS);
    let above = u64::from(EXPORTED) + 1;
    wait_until("what lies upon it to be merged", || depth("web") == above);
    disk.write_some(&at);
    host.ok(&["gc", "pause", "store"]);
    delete(1..=EXPORTED - 1);
    host.ok(&["gc", "resume", "store"]);
    wait_until("what it reads to be merged", || (depth(&exported), depth("web")) == (2, 2));
    disk.write_some(&at);
    pipe.read_to_end(&mut came).unwrap();
    assert!(export.wait().unwrap().success());
    assert!(came == wanted, "the export is not its snapshot");
    host.ok(&["gc", "run", "store", "--wait"]);
    let again = host.data().join("again.raw");
    host.ok(&["vdi", "export", &exported, "--format", "raw", again.to_str().unwrap()]);
    assert!(std::fs::read(&again).unwrap() == wanted, "the snapshot has changed");
    let now = host.data().join("now.raw");
    host.ok(&["vdi", "detach", "web"]);
    host.ok(&["vdi", "export", "web", "--format", "raw", now.to_str().unwrap()]);
    assert!(std::fs::read(&now).unwrap() == disk.bytes, "the disk has changed");
}
