//! The power of a machine is cut under load, again and again: each sector
//! holds its last flushed value or one written since, never a third
//! (invariant 2).
//!
//! What the machine's own page cache held is lost; the order of what it sent
//! to its disk is kept, which is where the crash simulator goes further.

use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use vhd::storage::{VolumeName, Volumes};

use super::kills::number;
use crate::support::machine::Parts;
use crate::support::programs::{have, run, skipped};
use crate::support::tap::Place;
use crate::support::verifier::Verifier;

/// Power cuts where nothing is said.
const CUTS: u64 = 5;
/// Size of the disk.
const DISK_BYTES: u64 = 16 << 20;
/// Longest life of a machine under load.
const LIFE_MS_MAX: u64 = 4000;

#[test]
#[ignore = "minutes; needs qemu-system-x86, busybox and COPPICE_VM, a folder with vmlinuz and modules/"]
fn power_cuts_leave_what_was_flushed_or_written_since() {
    let Some(vm) = std::env::var_os("COPPICE_VM").map(PathBuf::from) else {
        skipped("COPPICE_VM");
        return;
    };
    if !["qemu-system-x86_64", "busybox", "cpio", "mke2fs"].into_iter().all(have) {
        return;
    }
    let seed = number("COPPICE_SEED").unwrap_or_else(|| uuid::Uuid::new_v4().as_u64_pair().0);
    let cuts = number("COPPICE_CUTS").unwrap_or(CUTS);
    eprintln!("COPPICE_SEED={seed} COPPICE_CUTS={cuts}");
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut guest = Verifier::new(DISK_BYTES, rng.random());

    // An ancestor with data below an empty leaf, then into a file system.
    let place = Place::new();
    let base = place.image("base.vhd", DISK_BYTES, None);
    let tap = place.start(&base);
    let until = Instant::now() + Duration::from_millis(500);
    assert!(guest.work(&tap.at, |_| Instant::now() > until) && guest.check(&tap.at));
    tap.end();
    guest.settled();
    let leaf = place.image("leaf.vhd", DISK_BYTES, Some(&base));
    assert!(place.volumes().list().unwrap().contains(&VolumeName::new(&leaf.volume).unwrap()));
    let work = tempfile::Builder::new().prefix("coppice-test-").tempdir_in("/var/tmp").unwrap();
    let disk = work.path().join("disk.raw");
    let mut make = Command::new("mke2fs");
    run(make.args(["-q", "-t", "ext4", "-d"]).arg(place.folder()).arg(&disk).arg("256M"));
    let parts = Parts::new(&vm, work.path(), &leaf.volume);

    for cut in 1..=cuts {
        let mut machine = parts.boot(&disk);
        assert!(guest.check(&machine.at), "the machine died unasked");
        let at = machine.at.clone();
        let life = Duration::from_millis(rng.random_range(0..LIFE_MS_MAX));
        let (began, mut dead) = (Instant::now(), false);
        let lived = guest.work(&at, |_| {
            if !dead && began.elapsed() > life {
                machine.cut();
                dead = true;
            }
            false
        });
        assert!(dead && !lived, "the machine died unasked");
        guest.power_cut();
        eprintln!("cut {cut} after {life:?}: {:?}", guest.tally);
    }
    assert!(guest.check(&parts.boot(&disk).at));
}
