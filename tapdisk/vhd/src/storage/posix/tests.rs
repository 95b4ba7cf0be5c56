//! What only a real folder can show; the rest is in the suite that both
//! filesystems pass.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;
use std::process::Command;

use super::super::{Access, CopyKind, Fs, Volume};
use super::{PosixFs, PosixVolume};
use crate::limits::PLENTY_SHARE;

fn folder() -> (tempfile::TempDir, PosixFs) {
    let folder = tempfile::tempdir().unwrap();
    let fs = PosixFs::new(folder.path().to_owned());
    (folder, fs)
}

#[test]
fn no_symbolic_link_is_followed_below_the_root() {
    let (folder, fs) = folder();
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("secret.vhd"), b"secret").unwrap();
    symlink(outside.path().join("secret.vhd"), folder.path().join("a.vhd")).unwrap();
    symlink(outside.path(), folder.path().join("sub")).unwrap();
    for access in [Access::Read, Access::Write] {
        let error = fs.open("a.vhd", access).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(nix::libc::ELOOP));
        assert!(fs.open("sub/secret.vhd", access).is_err());
    }
    assert!(fs.list("sub").is_err());
    assert!(fs.make_folder("sub/journal").is_err());
    assert!(fs.create("sub/x").is_err());
    assert!(fs.rename("sub/secret.vhd", "b").is_err());
    assert!(fs.unlink("sub/secret.vhd").is_err());
    // A link to a link is a link: still nowhere.
    fs.link("a.vhd", "c.vhd").unwrap();
    assert!(fs.open("c.vhd", Access::Read).is_err());
    assert!(fs.list("").unwrap().is_empty(), "links are no volumes");
    assert!(outside.path().join("secret.vhd").exists());
}

#[test]
fn a_root_that_is_a_link_is_the_administrators() {
    let (folder, _) = folder();
    let other = tempfile::tempdir().unwrap();
    symlink(folder.path(), other.path().join("sr")).unwrap();
    let fs = PosixFs::new(other.path().join("sr"));
    drop(fs.create("a.vhd").unwrap());
    assert!(folder.path().join("a.vhd").exists());
}

#[test]
fn sockets_and_folders_are_no_volumes() {
    let (folder, fs) = folder();
    let _socket = UnixListener::bind(folder.path().join("s.vhd")).unwrap();
    fs.make_folder("f.vhd").unwrap();
    for name in ["s.vhd", "f.vhd"] {
        let error = fs.open(name, Access::Read).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
    }
    assert!(fs.list("").unwrap().is_empty());
}

#[test]
fn what_is_soon_written_all_over_takes_its_space_at_once() {
    const MIB: u64 = 1 << 20;
    let (_folder, fs) = folder();
    let volume = fs.create("a").unwrap();
    volume.write_at(&[7; 4096], 0).unwrap();
    volume.extend_with_room(8 * MIB).unwrap();
    volume.extend_with_room(MIB).unwrap();
    assert_eq!(volume.len().unwrap(), 8 * MIB);
    let mut bytes = vec![1; (8 * MIB) as usize];
    volume.read_at(&mut bytes, 0).unwrap();
    assert!(bytes[..4096].iter().all(|byte| *byte == 7) && bytes[4096..].iter().all(|byte| *byte == 0));
    let space = fs.space().unwrap();
    if space.free > space.total / PLENTY_SHARE + 64 * MIB {
        assert!(volume.allocated().unwrap() >= 8 * MIB);
    }
    // What cannot be had does not stand in the way of the length.
    volume.extend_with_room(space.total + 8 * MIB).unwrap();
    assert_eq!(volume.len().unwrap(), space.total + 8 * MIB);
    assert!(volume.allocated().unwrap() < 64 * MIB);
}

#[test]
fn the_lock_is_on_the_description_and_ends_with_its_last_descriptor() {
    let (_folder, fs) = folder();
    let a = fs.create("a").unwrap();
    let inherited = a.fd().unwrap().try_clone_to_owned().unwrap();
    drop(a);
    let busy = fs.open("a", Access::Write).unwrap_err();
    assert_eq!(busy.kind(), ErrorKind::WouldBlock);
    drop(inherited);
    fs.open("a", Access::Write).unwrap();
}

// A replaced name must be opened as what it is now; whoever holds the old
// inode's lock holds no lock on the new one.
#[test]
fn a_name_replaced_while_its_old_file_is_locked_leads_to_the_new_one() {
    let (_folder, fs) = folder();
    let old = fs.create("a").unwrap();
    fs.create("b").unwrap().write_at(b"new", 0).unwrap();
    fs.rename("b", "a").unwrap();
    let new = fs.open("a", Access::Write).unwrap();
    assert_eq!((old.len().unwrap(), new.len().unwrap()), (0, 3));
}

#[test]
fn punching_gives_space_back() {
    let (_folder, fs) = folder();
    let a = fs.create("a").unwrap();
    a.write_at(&vec![1; 4 << 20], 0).unwrap();
    a.flush("test").unwrap();
    let full = a.allocated().unwrap();
    a.zero(1 << 20, 2 << 20).unwrap();
    assert_eq!(a.len().unwrap(), 4 << 20);
    // A filesystem without holes writes zeros instead, and gives nothing back.
    if a.allocated().unwrap() < full {
        assert!(a.allocated().unwrap() <= full - (2 << 20));
    }
}

#[test]
fn holes_of_the_source_stay_holes() {
    let (_folder, fs) = folder();
    let a = fs.create("a").unwrap();
    a.set_len(8 << 20).unwrap();
    a.write_at(&[7; 4096], 1 << 20).unwrap();
    let b = fs.create("b").unwrap();
    b.write_at(&vec![9; 2 << 20], 0).unwrap();
    // Off by a sector: no filesystem can share that.
    let kind = b.copy_from(&*a, 0, 512, 8 << 20).unwrap();
    assert_eq!(kind, CopyKind::Copied);
    assert_eq!(b.len().unwrap(), (8 << 20) + 512);
    let mut bytes = vec![0; (8 << 20) + 512];
    b.read_at(&mut bytes, 0).unwrap();
    assert!(bytes[..512].iter().all(|byte| *byte == 9));
    let copied = &bytes[512..];
    let data = (1 << 20)..(1 << 20) + 4096;
    let want = |at: usize| if data.contains(&at) { 7 } else { 0 };
    assert!(copied.iter().enumerate().all(|(at, byte)| *byte == want(at)));
    assert!(b.allocated().unwrap() < 4 << 20);
}

// Where the filesystem shares extents (TMPDIR on XFS or btrfs) this sees a
// clone, elsewhere a copy; what can be read must be the same.
#[test]
fn a_clone_with_ragged_edges_reads_as_a_copy_and_stays_apart() {
    let (_folder, fs) = folder();
    let a = fs.create("a").unwrap();
    let source: Vec<u8> = (0..3_u32 << 20).map(|n| (n % 253) as u8).collect();
    a.write_at(&source, 0).unwrap();
    let b = fs.create("b").unwrap();
    let (from, to, len) = (1536, 4096 * 5 + 1536, 2 << 20);
    let kind = b.copy_from(&*a, from as u64, to as u64, len as u64).unwrap();
    println!("{kind:?}");
    a.write_at(&vec![0xff; 3 << 20], 0).unwrap();
    let mut bytes = vec![0; len];
    b.read_at(&mut bytes, to as u64).unwrap();
    assert!(bytes == source[from..from + len]);
    assert_eq!(b.len().unwrap(), (to + len) as u64);
}

#[test]
fn a_device_is_wanted_where_a_device_is_asked_for() {
    let (folder, fs) = folder();
    drop(fs.create("a").unwrap());
    assert!(PosixVolume::open_device(&folder.path().join("a"), Access::Write).is_err());
}

#[test]
fn space_is_that_of_the_filesystem() {
    let (_folder, fs) = folder();
    let space = fs.space().unwrap();
    assert!(space.total >= space.free && space.total > 0);
}

/// A loop device over a file; detached when dropped.
struct Loop(String);

impl Loop {
    fn over(file: &std::path::Path) -> Self {
        let made = Command::new("losetup").args(["--find", "--show"]).arg(file).output().unwrap();
        assert!(made.status.success(), "{made:?}");
        Self(String::from_utf8(made.stdout).unwrap().trim().to_owned())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.0]).status();
    }
}

#[test]
#[ignore = "needs root and a loop device"]
fn a_block_device_is_a_volume_of_fixed_length() {
    let (folder, fs) = folder();
    let backing = folder.path().join("backing");
    fs::write(&backing, vec![7; 1 << 20]).unwrap();
    let device = Loop::over(&backing);
    let path = std::path::Path::new(&device.0);
    let volume = PosixVolume::open_device(path, Access::Write).unwrap();
    let busy = PosixVolume::open_device(path, Access::Write).unwrap_err();
    assert_eq!(busy.kind(), ErrorKind::WouldBlock);
    assert!(volume.is_device());
    assert_eq!(volume.len().unwrap(), 1 << 20);
    assert_eq!(volume.allocated().unwrap(), 1 << 20);
    assert_eq!(volume.set_len(0).unwrap_err().kind(), ErrorKind::Unsupported);
    assert!(volume.write_at(&[1; 1024], (1 << 20) - 512).is_err());
    volume.zero(4096, 8192).unwrap();
    volume.zero(512 * 100, 512).unwrap();
    volume.zero((1 << 20) - 512, 4096).unwrap();
    let file = fs.create("a").unwrap();
    file.write_at(&[9; 8192], 0).unwrap();
    volume.copy_from(&*file, 0, 65_536, 8192).unwrap();
    file.copy_from(&volume, 0, 0, 1 << 20).unwrap();
    volume.flush("test").unwrap();
    let mut bytes = vec![1; 1 << 20];
    file.read_at(&mut bytes, 0).unwrap();
    let want = |at: usize| match at {
        4096..12_288 | 51_200..51_712 | 1_048_064.. => 0,
        65_536..73_728 => 9,
        _ => 7,
    };
    assert!(bytes.iter().enumerate().all(|(at, byte)| *byte == want(at)));
}

#[test]
fn zeros_that_keep_their_space_have_it() {
    let (_folder, fs) = folder();
    let file = fs.create("a").unwrap();
    file.set_len(4 << 20).unwrap();
    file.write_at(&[7; 1 << 20], 1 << 20).unwrap();
    file.flush("test").unwrap();
    file.zero_keeping_space(1 << 20, 2 << 20).unwrap();
    assert_eq!((file.len().unwrap(), file.allocated().unwrap()), (4 << 20, 2 << 20));
    let mut bytes = vec![1; 4 << 20];
    file.read_at(&mut bytes, 0).unwrap();
    assert!(bytes.iter().all(|byte| *byte == 0));
    file.zero(0, 4 << 20).unwrap();
    assert_eq!((file.len().unwrap(), file.allocated().unwrap()), (4 << 20, 0));
}

#[test]
fn many_ranges_arrive_whatever_their_length_and_place() {
    use super::super::CopyRange;
    let folder = tempfile::tempdir_in("/var/tmp").unwrap();
    let fs = PosixFs::new(folder.path().to_owned());
    let (source, to) = (fs.create("source").unwrap(), fs.create("to").unwrap());
    let content: Vec<u8> =
        (0..8_u32 << 20).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8 | 1).collect();
    source.write_at(&content, 0).unwrap();
    source.zero(5 << 20, 1 << 20).unwrap();
    let mut expected = vec![0xee; 10 << 20];
    to.write_at(&expected, 0).unwrap();
    let direct = source.go_direct(4096).unwrap().is_some() && to.go_direct(4096).unwrap().is_some();
    if !direct {
        eprintln!("!! SKIPPED in part: a /var/tmp that takes O_DIRECT");
    }
    // More short ones than one ring takes at a time, neighbours among them,
    // some off every page, and long ones, one of them with a hole.
    let short = (0..1500_u64).map(|n| (n * 2741 % 900 * 4096, 4096 * (1 + u64::from(n % 9 == 0))));
    let mut ranges: Vec<CopyRange> = Vec::new();
    let mut taken = std::collections::BTreeSet::new();
    for (at, len_bytes) in short {
        if (at..at + len_bytes).step_by(4096).all(|page| !taken.contains(&page)) {
            taken.extend((at..at + len_bytes).step_by(4096));
            ranges.push(CopyRange { from: at, to: at + (1 << 20), len_bytes });
        }
    }
    assert!(ranges.len() > 512, "{} ranges", ranges.len());
    ranges.push(CopyRange { from: 4 << 20, to: 6 << 20, len_bytes: 2 << 20 });
    ranges.push(CopyRange { from: (6 << 20) + 512, to: (8 << 20) + 512, len_bytes: 1536 });
    ranges.push(CopyRange { from: 7 << 20, to: (9 << 20) + 100, len_bytes: 300_000 });
    to.copy_many(source.as_ref(), &ranges).unwrap();
    let mut read = vec![0; 8 << 20];
    source.read_at(&mut read, 0).unwrap();
    for CopyRange { from, to, len_bytes } in &ranges {
        let (from, to, len) = (*from as usize, *to as usize, *len_bytes as usize);
        expected[to..to + len].copy_from_slice(&read[from..from + len]);
    }
    let mut found = vec![0; expected.len()];
    to.read_at(&mut found, 0).unwrap();
    assert!(found == expected);
    // What is not there is an error and nobody hangs.
    let past = [CopyRange { from: 16 << 20, to: 0, len_bytes: 4096 }];
    assert_eq!(to.copy_many(source.as_ref(), &past).unwrap_err().kind(), std::io::ErrorKind::UnexpectedEof);
}
