//! One suite for every [`Fs`], and for the repository over it: the simulator
//! is only worth something while it behaves like the real thing.

use std::io::ErrorKind;
use std::sync::Arc;

use super::{Access, FileVolumes, Fs, Volume, VolumeName, Volumes};

/// Makes an empty filesystem, and keeps alive what it lives in.
type Made = (Arc<dyn Fs>, Box<dyn std::any::Any>);

fn kind<T>(result: std::io::Result<T>) -> Option<ErrorKind> {
    result.err().map(|error| error.kind())
}

fn all(volume: &dyn Volume) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(volume.len().unwrap()).unwrap()];
    volume.read_at(&mut bytes, 0).unwrap();
    bytes
}

fn name(text: &str) -> VolumeName {
    VolumeName::new(text).unwrap()
}

fn reads_what_was_written((fs, _keep): Made) {
    let a = fs.create("a").unwrap();
    a.write_at(b"hello", 510).unwrap();
    a.write_at(b"J", 510).unwrap();
    a.flush("test").unwrap();
    let again = fs.open("a", Access::Read).unwrap();
    assert_eq!(again.len().unwrap(), 515);
    let mut bytes = [1; 7];
    again.read_at(&mut bytes, 508).unwrap();
    assert_eq!(&bytes, b"\0\0Jello");
    assert_eq!(kind(again.read_at(&mut bytes, 509)), Some(ErrorKind::UnexpectedEof));
    again.read_at(&mut [], 0).unwrap();
    assert!(kind(again.write_at(b"x", 0)).is_some(), "opened for reading");
}

fn cuts_and_extends_with_zeros((fs, _keep): Made) {
    let a = fs.create("a").unwrap();
    a.write_at(&[1; 1000], 0).unwrap();
    a.set_len(700).unwrap();
    a.set_len(1200).unwrap();
    let want: Vec<u8> = [[1; 700].as_slice(), &[0; 500]].concat();
    assert_eq!(all(&*a), want);
}

fn zeroes_within_the_length((fs, _keep): Made) {
    let a = fs.create("a").unwrap();
    a.write_at(&[1; 20_000], 0).unwrap();
    a.zero(100, 10_000).unwrap();
    a.zero(19_990, 50_000).unwrap();
    a.zero(90_000, 10).unwrap();
    a.zero(5, 0).unwrap();
    let bytes = all(&*a);
    let zero = |at: &usize| (100..10_100).contains(at) || *at >= 19_990;
    assert!((0..20_000).all(|at| bytes[at] == u8::from(!zero(&at))));
    assert_eq!(bytes.len(), 20_000);
}

fn copies_at_any_alignment((fs, _keep): Made) {
    let a = fs.create("a").unwrap();
    let source: Vec<u8> = (0..40_000_u32).map(|n| (n % 251) as u8).collect();
    a.write_at(&source, 0).unwrap();
    a.zero(12_288, 8192).unwrap();
    let source = all(&*a);
    for (from, to, len) in [(0, 0, 40_000), (4096, 8192, 16_384), (100, 4196, 30_000), (1, 2, 3)] {
        let b = fs.create("b").unwrap();
        b.write_at(&[9; 30_000], 0).unwrap();
        b.copy_from(&*a, from as u64, to as u64, len as u64).unwrap();
        let mut want = vec![9; 30_000.max(to + len)];
        want[to..to + len].copy_from_slice(&source[from..from + len]);
        assert!(all(&*b) == want, "copy of {len} from {from} to {to}");
        fs.unlink("b").unwrap();
    }
    let b = fs.create("b").unwrap();
    assert_eq!(kind(b.copy_from(&*a, 39_999, 0, 2)), Some(ErrorKind::UnexpectedEof));
    b.copy_from(&*a, 0, 0, 0).unwrap();
    // A source that ends in a hole still sets the length.
    b.copy_from(&*a, 12_288, 0, 8192).unwrap();
    assert_eq!(all(&*b), vec![0; 8192]);
    // And within one file.
    a.copy_from(&*a, 0, 20_480, 4096).unwrap();
    assert_eq!(all(&*a)[20_480..24_576], source[..4096]);
}

fn locks_exclusively((fs, _keep): Made) {
    let a = fs.create("a").unwrap();
    fs.link("a", "b").unwrap();
    assert_eq!(kind(fs.open("b", Access::Write)), Some(ErrorKind::WouldBlock));
    fs.open("b", Access::Read).unwrap();
    fs.rename("a", "c").unwrap();
    assert_eq!(kind(fs.open("c", Access::Write)), Some(ErrorKind::WouldBlock));
    drop(a);
    let c = fs.open("c", Access::Write).unwrap();
    assert_eq!(kind(fs.open("b", Access::Write)), Some(ErrorKind::WouldBlock));
    drop(c);
}

fn changes_names((fs, _keep): Made) {
    fs.create("b").unwrap().write_at(b"b", 0).unwrap();
    fs.create("a").unwrap().write_at(b"a", 0).unwrap();
    assert_eq!(kind(fs.create("a")), Some(ErrorKind::AlreadyExists));
    assert_eq!(kind(fs.link("a", "b")), Some(ErrorKind::AlreadyExists));
    assert_eq!(kind(fs.link("nothing", "c")), Some(ErrorKind::NotFound));
    assert_eq!(kind(fs.rename("nothing", "c")), Some(ErrorKind::NotFound));
    assert_eq!(kind(fs.unlink("nothing")), Some(ErrorKind::NotFound));
    assert_eq!(kind(fs.open("nothing", Access::Write)), Some(ErrorKind::NotFound));
    fs.link("a", "c").unwrap();
    assert!(fs.same_file("a", "c").unwrap());
    assert!(!fs.same_file("a", "b").unwrap());
    assert!(!fs.same_file("a", "nothing").unwrap());
    let open = fs.open("b", Access::Read).unwrap();
    fs.rename("a", "b").unwrap();
    assert_eq!(fs.list("").unwrap(), ["b", "c"]);
    assert!(fs.same_file("b", "c").unwrap());
    assert_eq!(all(&*open), b"b", "an open file outlives its name");
    fs.rename("b", "c").unwrap();
    assert_eq!(fs.list("").unwrap(), ["b", "c"], "two names of one file stay");
    fs.unlink("b").unwrap();
    fs.sync_names("", "test").unwrap();
    assert_eq!(fs.list("").unwrap(), ["c"]);
}

fn keeps_folders_apart((fs, _keep): Made) {
    assert_eq!(kind(fs.list(".coppice/journal")), Some(ErrorKind::NotFound));
    assert_eq!(kind(fs.create(".coppice/journal/r")), Some(ErrorKind::NotFound));
    fs.make_folder(".coppice/journal").unwrap();
    fs.make_folder(".coppice/journal").unwrap();
    drop(fs.create(".coppice/journal/r").unwrap());
    assert_eq!(fs.list(".coppice/journal").unwrap(), ["r"]);
    assert!(fs.list("").unwrap().is_empty());
    fs.sync_names(".coppice/journal", "test").unwrap();
}

fn refuses_paths_that_lead_out((fs, _keep): Made) {
    for path in ["../x", "/etc/passwd", "a/../b", "", ".", "..", "a//b"] {
        assert!(fs.open(path, Access::Read).is_err(), "{path:?}");
        assert!(fs.create(path).is_err(), "{path:?}");
    }
}

fn is_a_repository((fs, _keep): Made) {
    let volumes = FileVolumes::new(fs.clone());
    let (a, b, raw) = (name("a.vhd"), name("b.vhd"), name("c.raw"));
    let aside = name("aside.vhd");
    drop(volumes.create(&b).unwrap());
    drop(volumes.create(&a).unwrap());
    drop(volumes.create(&raw).unwrap());
    drop(fs.create("notes.txt").unwrap());
    drop(fs.create(".hidden.vhd").unwrap());
    assert_eq!(volumes.list().unwrap(), [a.clone(), b.clone(), raw.clone()]);
    volumes.delete(&raw).unwrap();
    volumes.delete(&raw).unwrap();
    volumes.open(&b, Access::Write).unwrap().write_at(b"b", 0).unwrap();
    volumes.swap(&b, &a, &aside).unwrap();
    assert_eq!(volumes.list().unwrap().len(), 1);
    assert_eq!(all(&*volumes.open(&a, Access::Read).unwrap()), b"b");
    volumes.lay_aside(&a, &b).unwrap();
    assert!(volumes.same(&a, &b).unwrap());
    assert_eq!(kind(volumes.lay_aside(&a, &b)), Some(ErrorKind::AlreadyExists));
    volumes.rename(&b, &a).unwrap();
    assert_eq!(volumes.list().unwrap(), [a], "the name that was moved is gone");
    volumes.sync("test").unwrap();
}

fn keeps_records((fs, _keep): Made) {
    let volumes = FileVolumes::new(fs.clone());
    assert!(volumes.records().unwrap().is_empty());
    assert_eq!(volumes.record("a.pending").unwrap(), None);
    assert!(!volumes.rename_record("a.pending", "a.void").unwrap());
    volumes.delete_record("a.pending", "test").unwrap();
    volumes.put_record("a.pending", b"one", "test").unwrap();
    volumes.put_record("a.pending", b"two longer", "test").unwrap();
    volumes.put_record("b.pending", b"", "test").unwrap();
    assert_eq!(volumes.records().unwrap(), ["a.pending", "b.pending"]);
    assert_eq!(volumes.record("a.pending").unwrap().unwrap(), b"two longer");
    assert_eq!(volumes.record("b.pending").unwrap().unwrap(), b"");
    // Of two that rename one record, one wins.
    assert!(volumes.rename_record("a.pending", "a.decided").unwrap());
    assert!(!volumes.rename_record("a.pending", "a.void").unwrap());
    volumes.sync_records("test").unwrap();
    volumes.delete_record("b.pending", "test").unwrap();
    volumes.delete_record("b.pending", "test").unwrap();
    assert_eq!(volumes.records().unwrap(), ["a.decided"]);
    for bad in ["", "../x", "a/b", ".hidden", &"x".repeat(250)] {
        assert_eq!(kind(volumes.record(bad)), Some(ErrorKind::InvalidInput));
        assert!(volumes.put_record(bad, b"", "test").is_err());
    }
}

fn cleans_half_records_but_not_live_ones((fs, _keep): Made) {
    let volumes = FileVolumes::new(fs.clone());
    volumes.put_record("a", b"1", "test").unwrap();
    let left = ".coppice/journal/.b.tmp";
    let writing = fs.create(left).unwrap();
    writing.write_at(b"half of it, and longer", 0).unwrap();
    assert_eq!(volumes.records().unwrap(), ["a"]);
    assert_eq!(kind(volumes.put_record("b", b"2", "test")), Some(ErrorKind::WouldBlock));
    drop(writing);
    // A leftover is taken over by the next writer of that record ...
    volumes.put_record("b", b"2", "test").unwrap();
    assert_eq!(volumes.record("b").unwrap().unwrap(), b"2");
    // ... or cleaned.
    drop(fs.create(left).unwrap());
    assert_eq!(volumes.records().unwrap(), ["a", "b"]);
    assert_eq!(fs.list(".coppice/journal").unwrap(), ["a", "b"]);
}

macro_rules! suite {
    ($make:expr, $($test:ident),* $(,)?) => {
        $(#[test] fn $test() { super::$test($make) })*
    };
    ($make:expr) => {
        suite!(
            $make,
            reads_what_was_written,
            cuts_and_extends_with_zeros,
            zeroes_within_the_length,
            copies_at_any_alignment,
            locks_exclusively,
            changes_names,
            keeps_folders_apart,
            refuses_paths_that_lead_out,
            is_a_repository,
            keeps_records,
            cleans_half_records_but_not_live_ones,
        );
    };
}

mod posix {
    use std::sync::Arc;

    fn make() -> super::Made {
        let folder = tempfile::tempdir().unwrap();
        let fs = super::super::PosixFs::new(folder.path().to_owned());
        (Arc::new(fs), Box::new(folder))
    }

    suite!(make());
}

/// The same on a filesystem in memory, which has holes of another unit and
/// other answers to cloning.
mod posix_tmpfs {
    use std::sync::Arc;

    fn make() -> super::Made {
        let shm = std::path::Path::new("/dev/shm");
        let folder = if shm.is_dir() { tempfile::tempdir_in(shm) } else { tempfile::tempdir() };
        let folder = folder.unwrap();
        let fs = super::super::PosixFs::new(folder.path().to_owned());
        (Arc::new(fs), Box::new(folder))
    }

    suite!(make());
}

#[cfg(feature = "sim")]
mod simulated {
    use std::sync::Arc;

    fn make() -> super::Made {
        (Arc::new(super::super::sim::SimDisk::new()), Box::new(()))
    }

    suite!(make());
}

/// Random operations on both filesystems at once: what one reads the other
/// reads.
#[cfg(feature = "sim")]
mod differential {
    use rand::rngs::SmallRng;
    use rand::{Rng, SeedableRng};

    use super::*;

    const FILE_BYTES_MAX: u64 = 40_000;
    const STEPS: usize = 150;

    /// Mostly aligned to something, as real offsets are.
    fn place(rng: &mut SmallRng) -> u64 {
        let unit = [1, 512, 4096][rng.random_range(0..3)];
        rng.random_range(0..FILE_BYTES_MAX) / unit * unit
    }

    /// One random operation on both pairs of files.
    fn step(rng: &mut SmallRng, worlds: &[Vec<Arc<dyn Volume>>]) -> String {
        let (at, len) = (place(rng), place(rng).min(9_000));
        let (which, kind) = (rng.random_range(0..2), rng.random_range(0..4));
        let (from, byte) = (place(rng), rng.random());
        for world in worlds {
            let (volume, other) = (&world[which], &world[1 - which]);
            match kind {
                0 => volume.write_at(&vec![byte; usize::try_from(len).unwrap()], at).unwrap(),
                1 => volume.zero(at, len).unwrap(),
                2 => volume.set_len(at).unwrap(),
                _ => {
                    let len = len.min(other.len().unwrap().saturating_sub(from));
                    volume.copy_from(&**other, from, at, len).unwrap();
                }
            }
        }
        format!("kind {kind} file {which} at {at} from {from} len {len}")
    }

    fn run(seed: u64) {
        let folder = tempfile::tempdir().unwrap();
        let real = super::super::PosixFs::new(folder.path().to_owned());
        let simulated = super::super::sim::SimDisk::new();
        let open = |fs: &dyn Fs| ["a", "b"].map(|name| fs.create(name).unwrap()).to_vec();
        let worlds = [open(&real), open(&simulated)];
        let mut rng = SmallRng::seed_from_u64(seed);
        let mut done = Vec::new();
        for _ in 0..STEPS {
            done.push(step(&mut rng, &worlds));
            for (real, simulated) in worlds[0].iter().zip(&worlds[1]) {
                let same = all(&**real) == all(&**simulated);
                assert!(same, "seed {seed}: differs after {done:#?}");
            }
        }
    }

    #[test]
    fn both_filesystems_read_the_same_after_anything() {
        for seed in 0..40 {
            run(seed);
        }
    }
}
