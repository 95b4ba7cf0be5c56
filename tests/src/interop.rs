//! Our images read by others, and theirs by us, byte for byte.
//!
//! Ours: random images and chains, each from a seed that is printed, read by
//! qemu-img (those without a parent) and by libvhdi (chains too). Theirs:
//! dynamic and fixed images by qemu with sizes that its geometry cannot and
//! can express.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use rand::rngs::SmallRng;
use rand::{Rng, RngCore, SeedableRng};
use sha2::{Digest, Sha256};
use uuid::Uuid;
use vhd::chain::Chain;
use vhd::create::{NewImage, NewKind, create};
use vhd::record::TmpfsRecords;
use vhd::reparent::ParentLink;
use vhd::storage::{FileVolumes, PosixFs, VolumeName, Volumes};
use vhd::units::{BLOCK_BYTES, BLOCK_SECTORS, BlockNo, SectorRun};
use vhd::writer::Writer;

use crate::support::libvhdi::hashes;
use crate::support::programs::{have, have_python, run};

/// Images and chains read by others.
const CHAINS: u64 = 200;
/// Of which so many lie on disk at one time.
const BATCH: u64 = 10;
/// Deepest of them.
const DEPTH_MAX: usize = 4;
/// Largest of them, in blocks.
const BLOCKS_MAX: u32 = 4;
const SECTOR: usize = 512;
/// See [`random_run`].
const LIBVHDI_GRAIN: u32 = 8;

/// A folder with a repository in it.
struct Repository {
    folder: tempfile::TempDir,
    volumes: FileVolumes,
    records: TmpfsRecords,
}

impl Repository {
    fn new() -> Self {
        // What is written is what counts here, not that it is durable: on a
        // tmpfs the many flushes cost nothing.
        let folder = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
        let volumes = FileVolumes::new(Arc::new(PosixFs::new(folder.path().to_owned())));
        let records = TmpfsRecords::new(folder.path().join("records"), Uuid::new_v4(), 1);
        Self { folder, volumes, records }
    }

    fn path(&self, name: &VolumeName) -> PathBuf {
        self.folder.path().join(name.as_str())
    }

    /// Makes an image over `parent` and writes random runs into it and into
    /// `model`.
    fn grow(&self, rng: &mut SmallRng, model: &mut [u8], parent: Option<ParentLink>) -> ParentLink {
        let uuid = Uuid::from_u64_pair(rng.random(), rng.random());
        let volume = name_for(rng, uuid);
        let child = parent.is_some();
        let image = NewImage {
            uuid,
            virtual_bytes: model.len() as u64,
            kind: parent.map_or(NewKind::Dynamic, |parent| NewKind::Child { parent }),
            bat_entries_max: rng.random_bool(0.3).then_some(BLOCKS_MAX * 3),
            hidden: rng.random_bool(0.3),
            timestamp_s: 757_479_845,
        };
        create(self.volumes.create(&volume).unwrap().as_ref(), &image).unwrap();
        let mut writer = Writer::open(&self.volumes, &volume, &self.records).unwrap();
        for _ in 0..rng.random_range(0..12) {
            let block = BlockNo(rng.random_range(0..(model.len() as u64 / BLOCK_BYTES) as u32));
            let run = random_run(rng, child);
            let mut data = vec![0; run.bytes() as usize];
            rng.fill_bytes(&mut data);
            writer.write(block, run, &data, child).unwrap();
            let at = block.first_byte() as usize + run.first as usize * SECTOR;
            model[at..at + data.len()].copy_from_slice(&data);
            if rng.random_bool(0.2) {
                writer.commit().unwrap();
            }
        }
        writer.settle(None).unwrap();
        ParentLink { uuid, volume, timestamp_s: 757_479_845 }
    }
}

/// Mostly what a disk is called; now and then letters of other alphabets.
fn name_for(rng: &mut SmallRng, uuid: Uuid) -> VolumeName {
    if rng.random_bool(0.2) {
        let stem = ["größe", "диск", "磁盘", "a b"][rng.random_range(0..4)];
        VolumeName::new(&format!("{stem}-{uuid}.vhd")).unwrap()
    } else {
        VolumeName::vhd(uuid)
    }
}

/// A single sector, some, or the whole block.
///
/// Over a parent a run ends at a multiple of [`LIBVHDI_GRAIN`]: of a byte of
/// the sector bitmap such as `11100000` libvhdi (20210425) takes the zeros for
/// ones, and reads sectors that are not there. Where a run begins, and images
/// without a parent, it reads right at any sector.
fn random_run(rng: &mut SmallRng, over_parent: bool) -> SectorRun {
    let first = rng.random_range(0..BLOCK_SECTORS);
    let run = match rng.random_range(0..4) {
        0 => SectorRun { first, count: 1 },
        1 => SectorRun::BLOCK,
        _ => SectorRun { first, count: rng.random_range(1..=(BLOCK_SECTORS - first).min(300)) },
    };
    if over_parent {
        let end = run.end().next_multiple_of(LIBVHDI_GRAIN);
        SectorRun { first: run.first, count: end - run.first }
    } else {
        run
    }
}

/// A chain in one repository and what each level reads, base first.
struct Grown {
    seed: u64,
    levels: Vec<(PathBuf, Vec<u8>)>,
}

fn grow_chain(repository: &Repository, seed: u64) -> Grown {
    let mut rng = SmallRng::seed_from_u64(seed);
    let blocks = rng.random_range(1..=BLOCKS_MAX);
    let mut model = vec![0; blocks as usize * BLOCK_BYTES as usize];
    let mut parent = None;
    let mut levels = Vec::new();
    for _ in 0..rng.random_range(1..=DEPTH_MAX) {
        let image = repository.grow(&mut rng, &mut model, parent.take());
        levels.push((repository.path(&image.volume), model.clone()));
        let own = Chain::open(&repository.volumes, &image.volume).unwrap();
        assert_eq!(hash(&read_all(&own)), hash(&model), "our own reader, seed {seed}");
        parent = Some(image);
    }
    Grown { seed, levels }
}

#[test]
fn others_read_what_we_write() {
    if !have("qemu-img") || !have_python("pyvhdi") {
        return;
    }
    let base: u64 = Uuid::new_v4().as_u64_pair().0;
    eprintln!("seeds {base} and the {} after it", CHAINS - 1);
    for batch in 0..CHAINS / BATCH {
        let repository = Repository::new();
        let chains: Vec<Grown> =
            (0..BATCH).map(|i| grow_chain(&repository, base.wrapping_add(batch * BATCH + i))).collect();
        check_with_libvhdi(&chains);
        for chain in &chains {
            let (path, content) = &chain.levels[0];
            let raw = by_qemu(path, repository.folder.path());
            assert_eq!(hash(&raw), hash(content), "qemu-img reads another base, seed {}", chain.seed);
        }
    }
}

/// Every level of every chain, in one run of Python.
fn check_with_libvhdi(chains: &[Grown]) {
    let (mut read, mut expected) = (Vec::new(), Vec::new());
    for chain in chains {
        for top in 0..chain.levels.len() {
            read.push(chain.levels[..=top].iter().rev().map(|(path, _)| path).collect());
            expected.push((chain.seed, top, hash(&chain.levels[top].1)));
        }
    }
    let found = hashes(&read);
    for (found, (seed, level, hash)) in found.iter().zip(expected) {
        assert_eq!(*found, hash, "libvhdi reads another level {level}, seed {seed}");
    }
}

/// The content of an image as qemu-img reads it.
fn by_qemu(image: &Path, folder: &Path) -> Vec<u8> {
    let raw = folder.join("qemu.raw");
    run(Command::new("qemu-img").args(["convert", "-f", "vpc", "-O", "raw"]).arg(image).arg(&raw));
    std::fs::read(raw).unwrap()
}

#[test]
fn we_read_what_qemu_writes() {
    if !have("qemu-img") || !have("qemu-io") {
        return;
    }
    let seed: u64 = Uuid::new_v4().as_u64_pair().0;
    eprintln!("seed {seed}");
    let mut rng = SmallRng::seed_from_u64(seed);
    let repository = Repository::new();
    for subformat in ["dynamic", "fixed"] {
        for force_size in ["on", "off"] {
            for _ in 0..6 {
                let name = VolumeName::vhd(Uuid::new_v4());
                let image = repository.path(&name);
                let bytes = u64::from(rng.random_range(1..=24u32)) << 20;
                written_by_qemu(&mut rng, &image, &[subformat, force_size], bytes);
                let raw = by_qemu(&image, repository.folder.path());
                let own = Chain::open(&repository.volumes, &name).unwrap();
                assert_eq!(own.virtual_bytes(), raw.len() as u64, "{subformat} {force_size} {bytes}");
                assert_eq!(hash(&read_all(&own)), hash(&raw), "{subformat} {force_size} {bytes}");
            }
        }
    }
}

/// Has qemu make an image of `bytes` and write some patterns into it.
fn written_by_qemu(rng: &mut SmallRng, image: &Path, [subformat, force_size]: &[&str; 2], bytes: u64) {
    let options = format!("subformat={subformat},force_size={force_size}");
    let mut command = Command::new("qemu-img");
    run(command.args(["create", "-q", "-f", "vpc", "-o", &options]).arg(image).arg(bytes.to_string()));
    let mut command = Command::new("qemu-io");
    command.args(["-f", "vpc"]);
    for _ in 0..rng.random_range(1..8) {
        let offset = rng.random_range(0..bytes / 512) * 512;
        let len = rng.random_range(1..=64u64).min((bytes - offset) / 512) * 512;
        let pattern = rng.random_range(1..256);
        command.args(["-c", &format!("write -P {pattern} {offset} {len}")]);
    }
    run(command.arg(image));
}

fn read_all(chain: &Chain) -> Vec<u8> {
    let mut content = vec![0; chain.virtual_bytes() as usize];
    chain.read_at(&mut content, 0).unwrap();
    content
}

fn hash(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}
