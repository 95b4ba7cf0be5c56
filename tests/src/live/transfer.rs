//! Exports and imports by the command line: content round trips, read by
//! other people's programs too, and what is left when one is interrupted.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rand::rngs::SmallRng;
use rand::{Rng, RngCore, SeedableRng};

use crate::support::guest::Guest;
use crate::support::host::{Daemon, Host, wait_until};
use crate::support::libvhdi::hashes;
use crate::support::programs::{coppice, have, have_python, run};

const MIB: u64 = 1 << 20;
const DISK: &str = "64MiB";
const DISK_BYTES: u64 = 64 << 20;

fn path(host: &Host, name: &str) -> PathBuf {
    host.data().join(name)
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A raw file with some random parts.
fn raw(host: &Host, name: &str, rng: &mut SmallRng) -> PathBuf {
    let path = path(host, name);
    let file = File::create(&path).unwrap();
    file.set_len(DISK_BYTES).unwrap();
    scribble(&file, rng);
    path
}

fn scribble(file: &File, rng: &mut SmallRng) {
    for _ in 0..6 {
        let mut bytes = vec![0; rng.random_range(1..100) * 4096];
        rng.fill_bytes(&mut bytes);
        file.write_all_at(&bytes, rng.random_range(0..DISK_BYTES / 4096 - 100) * 4096).unwrap();
    }
}

fn same(a: &Path, b: &Path) -> bool {
    std::fs::read(a).unwrap() == std::fs::read(b).unwrap()
}

/// What a disk holds, as a raw file.
fn content(host: &Host, vdi: &str, name: &str) -> PathBuf {
    let to = path(host, name);
    host.ok(&["vdi", "export", vdi, text(&to)]);
    to
}

fn uuid(document: &serde_json::Value) -> String {
    document["uuid"].as_str().unwrap().to_owned()
}

#[test]
fn disks_leave_and_come_back_as_files_and_through_pipes() {
    let mut rng = SmallRng::seed_from_u64(7);
    let host = Host::new();
    host.sr("a");
    host.sr("b");
    let file = raw(&host, "in.raw", &mut rng);
    let web = uuid(&host.ok(&["vdi", "import", "a", "web", text(&file)]));
    let back = content(&host, &web, "back.raw");
    assert!(same(&file, &back));
    assert!(back.metadata().unwrap().blocks() * 512 < 16 * MIB, "holes are kept");
    let vhd = path(&host, "web.vhd");
    let said = host.ok(&["vdi", "export", "web", text(&vhd)]);
    assert_eq!(said["format"], "vhd");
    assert_eq!(said["size"].as_u64().unwrap(), vhd.metadata().unwrap().len());
    if have("qemu-img") {
        let told =
            run(Command::new("qemu-img").args(["compare", "-f", "vpc", "-F", "raw"]).args([&vhd, &file]));
        assert!(told.contains("identical"), "{told}");
    }
    for format in ["raw", "vhd"] {
        let pipe = format!(
            "{0} --run {1} vdi export web --format {format} - | {0} --run {1} vdi import b {format} --format {format} -",
            coppice().display(),
            host.run_dir().display(),
        );
        run(Command::new("bash").args(["-o", "pipefail", "-c", &pipe]));
        assert!(same(&file, &content(&host, format, "piped.raw")), "{format}");
    }
}

#[test]
fn deltas_of_a_disk_in_use_follow_it_into_another_repository() {
    let host = Host::new();
    host.sr("a");
    host.sr("b");
    let vdi = host.disk("a", "web", DISK);
    let at = host.attach(&vdi);
    let mut guest = Guest::new(DISK_BYTES, 11);
    let mut files: Vec<PathBuf> = Vec::new();
    let mut base: Option<(String, String)> = None;
    for round in 0..4 {
        guest.write(&at, |acked| acked >= 150);
        let snapshot = format!("web@{round}");
        host.ok(&["vdi", "snapshot", "web", "--name", &snapshot]);
        let file = path(&host, &format!("{round}.vhd"));
        let mut export = vec!["vdi", "export", &snapshot, text(&file)];
        let name = format!("copy{round}");
        let mut import = vec!["vdi", "import", "b", &name, text(&file)];
        if let Some((of, onto)) = &base {
            export.extend(["--base", of]);
            import.extend(["--base", onto]);
        }
        host.ok(&export);
        host.ok(&import);
        let raw = content(&host, &snapshot, "now.raw");
        assert!(same(&raw, &content(&host, &name, "copy.raw")), "round {round}");
        files.insert(0, file);
        base = Some((snapshot, name));
    }
    host.refused(&["vdi", "export", "web", "/dev/null"], "IN_USE");
    host.refused(&["vdi", "import", "b", "x", text(&files[0])], "WRONG_BASE");
    host.refused(&["vdi", "import", "b", "x", "--base", "copy0", text(&files[0])], "WRONG_BASE");
    let tree = host.ok(&["sr", "tree", "b"]);
    assert_eq!(tree["roots"].as_array().unwrap().len(), 1, "they share: {tree}");
    if have_python("pyvhdi") {
        let hash = hashes(&[files]).swap_remove(0);
        let raw = run(Command::new("sha256sum").arg(path(&host, "now.raw")));
        assert_eq!(hash, raw.split(' ').next().unwrap(), "the chain of deltas by libvhdi");
    }
    // Older copies go, the collector merges, and the next delta still fits.
    host.ok(&["vdi", "delete", "copy0"]);
    host.ok(&["vdi", "delete", "copy1"]);
    host.ok(&["gc", "run", "b", "--wait"]);
    guest.write(&at, |acked| acked >= 50);
    host.ok(&["vdi", "snapshot", "web", "--name", "web@4"]);
    let file = path(&host, "4.vhd");
    host.ok(&["vdi", "export", "web@4", "--base", "web@3", text(&file)]);
    host.ok(&["vdi", "import", "b", "copy4", "--base", "copy3", text(&file)]);
    assert!(same(&content(&host, "web@4", "now.raw"), &content(&host, "copy4", "copy.raw")));
}

#[test]
fn an_interrupted_import_leaves_nothing() {
    let mut rng = SmallRng::seed_from_u64(3);
    let mut host = Host::new();
    let folder = host.sr("a");
    let file = raw(&host, "in.raw", &mut rng);
    let volumes = || {
        let names = std::fs::read_dir(&folder).unwrap().flatten().map(|entry| entry.file_name());
        names.filter(|name| name.to_string_lossy().ends_with(".vhd")).count()
    };
    for how in ["client killed", "ctrl-c", "smd killed"] {
        let mut import = Command::new(coppice())
            .args(["--json", "vdi", "import", "a", "cut", "--format", "raw", "-", "--run"])
            .arg(host.run_dir())
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut stdin = import.stdin.take().unwrap();
        stdin.write_all(&std::fs::read(&file).unwrap()[..32 << 20]).unwrap();
        wait_until("the import to have begun", || volumes() == 1);
        assert_eq!(host.ok(&["vdi", "list", "a"]).as_array().unwrap().len(), 0, "{how}");
        let pid = Pid::from_raw(i32::try_from(import.id()).unwrap());
        match how {
            "client killed" => kill(pid, Signal::SIGKILL).unwrap(),
            "ctrl-c" => kill(pid, Signal::SIGINT).unwrap(),
            _ => {
                host.kill(Daemon::Smd);
                host.start(Daemon::Smd);
            }
        }
        drop(stdin);
        let status = import.wait().unwrap();
        assert!(!status.success(), "{how}: {status}");
        wait_until("nothing to be left", || volumes() == 0);
        host.ok(&["sr", "scan", "a"]);
    }
}

#[test]
fn an_export_outlives_the_deletion_of_what_it_reads() {
    let mut rng = SmallRng::seed_from_u64(5);
    let host = Host::new();
    host.sr("a");
    let file = raw(&host, "in.raw", &mut rng);
    host.ok(&["vdi", "import", "a", "web", text(&file)]);
    host.ok(&["vdi", "snapshot", "web", "--name", "web@1"]);
    let fifo = path(&host, "pipe");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::from_bits_truncate(0o600)).unwrap();
    let mut export = Command::new(coppice())
        .args(["--json", "vdi", "export", "web@1", "--format", "raw", "--run"])
        .arg(host.run_dir())
        .arg(&fifo)
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    // Not read yet: the export waits with most of the disk before it.
    let mut pipe = File::open(&fifo).unwrap();
    let mut came = vec![0; 4096];
    std::io::Read::read_exact(&mut pipe, &mut came).unwrap();
    host.ok(&["vdi", "delete", "web@1"]);
    host.ok(&["vdi", "delete", "web"]);
    host.ok(&["gc", "run", "--wait"]);
    std::io::Read::read_to_end(&mut pipe, &mut came).unwrap();
    assert!(export.wait().unwrap().success());
    assert!(came == std::fs::read(&file).unwrap());
    host.ok(&["gc", "run", "--wait"]);
    assert_eq!(host.ok(&["sr", "tree", "a"])["roots"].as_array().unwrap().len(), 0, "all is collected");
}

#[test]
fn a_stream_that_is_no_image_is_said_to_be_that() {
    let host = Host::new();
    host.sr("a");
    let file = path(&host, "bad.vhd");
    std::fs::write(&file, b"no image at all").unwrap();
    let said = host.refused(&["vdi", "import", "a", "x", text(&file)], "BAD_IMAGE");
    // Advice is about the file, not about an image of the repository.
    assert!(said.stderr.contains("nothing was imported") && !said.stderr.contains("sr check"), "{said:?}");
}
