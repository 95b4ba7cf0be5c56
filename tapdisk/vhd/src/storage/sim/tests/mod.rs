//! Tests of the simulator itself: each property it promises.

use rand::SeedableRng;
use rand::rngs::SmallRng;

use super::super::{Access, Fs, Volume};
use super::{CrashKind, Fault, OpClass, Sabotage, SimDisk, SimDone, SimFile, SimOp, SimRequest};
use super::{Step, Strategy};
use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::sync::Arc;

mod bytes;
mod devices;
mod faults;
mod machine;
mod names;
mod teeth;

use CrashKind::{Kill, PowerCut};
use Strategy::{AllKept, AllLost, OnlyKept, OnlyLost, RandomPerOp, RandomPerSector};

fn rng() -> SmallRng {
    SmallRng::seed_from_u64(7)
}

fn crash(disk: &SimDisk, kind: CrashKind, strategy: Strategy) -> SimDisk {
    disk.crash(disk.log_len(), kind, &mut rng(), strategy)
}

/// A file of `sectors` sectors of `byte`, durable and so is its name.
fn file(disk: &SimDisk, name: &str, sectors: usize, byte: u8) -> Arc<dyn Volume> {
    let file = disk.create(name).unwrap();
    file.write_at(&vec![byte; sectors * 512], 0).unwrap();
    file.flush("set up").unwrap();
    disk.sync_names("", "set up").unwrap();
    file
}

fn bytes(disk: &SimDisk, name: &str) -> Vec<u8> {
    let file = disk.open(name, Access::Read).unwrap();
    let mut bytes = vec![0; usize::try_from(file.len().unwrap()).unwrap()];
    file.read_at(&mut bytes, 0).unwrap();
    bytes
}

/// The first byte of each sector.
fn sectors(disk: &SimDisk, name: &str) -> Vec<u8> {
    bytes(disk, name).chunks(512).map(|sector| sector[0]).collect()
}

/// All outcomes that many random crashes leave of a file.
fn outcomes(disk: &SimDisk, kind: CrashKind, strategy: Strategy) -> BTreeSet<Vec<u8>> {
    let mut rng = rng();
    let end = disk.log_len();
    (0..400).map(|_| sectors(&disk.crash(end, kind, &mut rng, strategy), "a")).collect()
}

fn write(disk: &SimDisk, file: &dyn Volume, at: u64, byte: u8, count: usize) -> SimOp {
    let request = SimRequest::Write {
        file: SimFile::of(file).unwrap(),
        offset: at * 512,
        bytes: vec![byte; count * 512].into(),
    };
    disk.begin(request, "guest write").unwrap()
}

fn flush(disk: &SimDisk, file: &dyn Volume) -> SimOp {
    disk.begin(SimRequest::Flush { file: SimFile::of(file).unwrap() }, "guest flush").unwrap()
}
