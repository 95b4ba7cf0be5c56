//! A repository of devices: two renames where a file has one, lengths that
//! only the backend changes, litter in new space.

use std::io::ErrorKind;
use std::sync::Arc;

use rand::SeedableRng;
use rand::rngs::SmallRng;

use super::super::super::{Access, VolumeName, Volumes};
use super::super::devices::EXTENT;
use super::super::{CrashKind, SimDisk, Strategy};

fn machine() -> (SimDisk, Arc<dyn Volumes>) {
    let disk = SimDisk::with_devices(1, &[]);
    let volumes = disk.volumes();
    (disk, volumes)
}

fn name(name: &str) -> VolumeName {
    VolumeName::new(name).unwrap()
}

fn marked(volumes: &dyn Volumes, called: &str, mark: u8) {
    let volume = volumes.create(&name(called)).unwrap();
    volume.write_at(&[mark; 512], 0).unwrap();
    volume.flush("mark").unwrap();
}

/// Which marked volume has which name.
fn marks(volumes: &dyn Volumes) -> Vec<(String, u8)> {
    let mark = |called: VolumeName| {
        let mut bytes = [0; 512];
        volumes.open(&called, Access::Read).unwrap().read_at(&mut bytes, 0).unwrap();
        (called.as_str().to_owned(), bytes[0])
    };
    volumes.list().unwrap().into_iter().map(mark).collect()
}

#[test]
fn a_swap_is_two_renames_and_goes_on_from_wherever_it_was() {
    let (disk, volumes) = machine();
    marked(volumes.as_ref(), "disk.vhd", 1);
    marked(volumes.as_ref(), "new.vhd", 2);
    let (new, over, aside) = (name("new.vhd"), name("disk.vhd"), name("old.vhd"));
    volumes.lay_aside(&over, &aside).unwrap();
    assert!(!volumes.same(&aside, &over).unwrap(), "a device has one name");
    let from = disk.log_len();
    volumes.swap(&new, &over, &aside).unwrap();
    let owned = |all: &[(&str, u8)]| all.iter().map(|(n, m)| ((*n).to_owned(), *m)).collect::<Vec<_>>();
    let before = owned(&[("disk.vhd", 1), ("new.vhd", 2)]);
    let between = owned(&[("new.vhd", 2), ("old.vhd", 1)]);
    let done = owned(&[("disk.vhd", 2), ("old.vhd", 1)]);
    let mut seen = Vec::new();
    let mut rng = SmallRng::seed_from_u64(1);
    for prefix in from..=disk.log_len() {
        for kind in [CrashKind::Kill, CrashKind::PowerCut] {
            for strategy in [Strategy::AllLost, Strategy::AllKept] {
                let after = disk.crash(prefix, kind, &mut rng, strategy).volumes();
                seen.push(marks(after.as_ref()));
                after.swap(&new, &over, &aside).unwrap();
                assert_eq!(marks(after.as_ref()), done);
            }
        }
    }
    for state in [before, between, done] {
        assert!(seen.contains(&state), "no crash leaves {state:?}");
    }
}

#[test]
fn a_swap_never_takes_a_name_that_is_in_use() {
    let (_, volumes) = machine();
    for (called, mark) in [("a.vhd", 1), ("b.vhd", 2), ("c.vhd", 3)] {
        marked(volumes.as_ref(), called, mark);
    }
    let kind = |result: std::io::Result<()>| result.unwrap_err().kind();
    assert_eq!(kind(volumes.rename(&name("a.vhd"), &name("b.vhd"))), ErrorKind::AlreadyExists);
    let taken = volumes.swap(&name("a.vhd"), &name("b.vhd"), &name("c.vhd"));
    assert_eq!(kind(taken), ErrorKind::AlreadyExists);
    assert_eq!(kind(volumes.swap(&name("x.vhd"), &name("y.vhd"), &name("z.vhd"))), ErrorKind::NotFound);
    assert_eq!(marks(volumes.as_ref()).len(), 3);
}

#[test]
fn lengths_are_whole_extents_changed_by_the_backend_alone() {
    let (disk, volumes) = machine();
    let volume = volumes.create(&name("a.vhd")).unwrap();
    assert_eq!((volume.is_device(), volume.len().unwrap()), (true, EXTENT));
    assert_eq!(volume.set_len(1).unwrap_err().kind(), ErrorKind::Unsupported);
    volume.extend(EXTENT + 1).unwrap();
    volume.extend(10).unwrap();
    assert_eq!(volume.len().unwrap(), 2 * EXTENT);
    let mut last = [1; 512];
    volume.read_at(&mut last, 2 * EXTENT - 512).unwrap();
    assert_eq!(last, [0; 512], "no footer of a stranger stands at the end");
    assert_eq!(volume.reduced_len(700).unwrap(), EXTENT);
    volume.reduce(700).unwrap();
    // Durable at once, and given anew it is litter again.
    let mut rng = SmallRng::seed_from_u64(1);
    let after = disk.crash(disk.log_len(), CrashKind::PowerCut, &mut rng, Strategy::AllLost).volumes();
    let volume = after.open(&name("a.vhd"), Access::Write).unwrap();
    assert_eq!(volume.len().unwrap(), EXTENT);
    volume.extend(2 * EXTENT).unwrap();
    let mut bytes = vec![0; EXTENT as usize - 512];
    volume.read_at(&mut bytes, EXTENT).unwrap();
    assert!(bytes.chunks(512).all(|sector| sector.iter().any(|byte| *byte != 0)));
}

#[test]
fn zeros_take_space_on_a_device_and_are_told_from_litter() {
    let (disk, volumes) = machine();
    let volume = volumes.create(&name("a.vhd")).unwrap();
    let littered = disk.state_hash();
    volume.zero(512, 4096).unwrap();
    assert_ne!(disk.state_hash(), littered);
    let mut bytes = [1; 4608];
    volume.read_at(&mut bytes, 512).unwrap();
    assert!(bytes[..4096].iter().all(|byte| *byte == 0) && bytes[4096..].iter().any(|byte| *byte != 0));
    assert_eq!(volume.allocated().unwrap(), EXTENT);
    disk.set_free_bytes(Some(EXTENT));
    volume.extend(2 * EXTENT).unwrap();
    assert_eq!(volume.extend(3 * EXTENT).unwrap_err().raw_os_error(), Some(nix::libc::ENOSPC));
}

#[test]
fn records_are_whole_and_durable_at_once() {
    let (disk, volumes) = machine();
    volumes.put_record("r.pending", b"one", "record").unwrap();
    let from = disk.log_len();
    volumes.put_record("r.pending", b"two", "record").unwrap();
    assert!(volumes.rename_record("r.pending", "r.decided").unwrap());
    assert!(!volumes.rename_record("r.pending", "r.void").unwrap());
    let mut rng = SmallRng::seed_from_u64(1);
    for prefix in from..=disk.log_len() {
        for strategy in [Strategy::AllLost, Strategy::AllKept] {
            let after = disk.crash(prefix, CrashKind::PowerCut, &mut rng, strategy).volumes();
            let names = after.records().unwrap();
            assert_eq!(names.len(), 1);
            let bytes = after.record(&names[0]).unwrap().unwrap();
            assert!(bytes == b"two" || (bytes == b"one" && names[0] == "r.pending"));
        }
    }
    let after = disk.crash(disk.log_len(), CrashKind::PowerCut, &mut rng, Strategy::AllLost).volumes();
    assert_eq!(after.records().unwrap(), ["r.decided"]);
    after.delete_record("r.decided", "record").unwrap();
    assert!(after.records().unwrap().is_empty());
}
