//! Every fixture opens, reads and checks as the reference recorded, but for
//! the differences listed here with their reasons.

use std::sync::Arc;

use sha2::{Digest, Sha256};
use vhd::batmap::{marker, set_marker};
use vhd::chain::Chain;
use vhd::check::{Options, Problem, check};
use vhd::create::{NewImage, NewKind, ParentLink, create};
use vhd::meta::{FooterState, Meta};
use vhd::repair::{Repaired, repair};
use vhd::storage::{Access, FileVolumes, PosixFs, Volume, VolumeName, Volumes};
use vhd::{Error, resize};

use crate::fixture::{self, Fixture, hex};
use crate::mem::Mem;

/// Fixtures whose chain we refuse to follow.
const REFUSED: &[&str] = &[
    // Its locators lead out of its folder (invariant 10); the reference
    // follows them.
    "sub/child.vhd",
];

/// Fixtures that check differently here.
const CHECK_DIFFERS: &[(&str, bool)] = &[
    // As above.
    ("sub/child.vhd", false),
];

struct Unpacked {
    root: tempfile::TempDir,
}

impl Unpacked {
    /// The repository a fixture lies in, and its name there.
    fn place(&self, path: &str) -> (FileVolumes, VolumeName) {
        let path = self.root.path().join(path);
        let fs = PosixFs::new(path.parent().unwrap().to_owned());
        let name = VolumeName::new(path.file_name().unwrap().to_str().unwrap()).unwrap();
        (FileVolumes::new(Arc::new(fs)), name)
    }
}

fn images() -> impl Iterator<Item = Fixture> {
    fixture::manifest().into_iter().filter(|fixture| fixture.path.ends_with(".vhd"))
}

fn logical_sha256(chain: &Chain) -> String {
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    let mut at = 0;
    while at < chain.virtual_bytes() {
        let part = (chain.virtual_bytes() - at).min(buffer.len() as u64) as usize;
        chain.read_at(&mut buffer[..part], at).unwrap();
        hash.update(&buffer[..part]);
        at += part as u64;
    }
    hex(hash)
}

#[test]
fn the_files_are_the_recorded_ones() {
    for fixture in fixture::manifest() {
        let mut hash = Sha256::new();
        hash.update(fixture::bytes(&fixture.path));
        assert_eq!(hex(hash), fixture.file_sha256, "{}", fixture.path);
    }
}

#[test]
fn every_chain_reads_as_recorded() {
    let all = Unpacked { root: fixture::unpack() };
    for fixture in images().filter(|f| !REFUSED.contains(&f.path.as_str())) {
        let Some((bytes, sha256)) = &fixture.logical else {
            continue;
        };
        let (volumes, name) = all.place(&fixture.path);
        let chain = Chain::open(&volumes, &name).unwrap_or_else(|e| panic!("{}: {e}", fixture.path));
        assert_eq!(chain.virtual_bytes(), *bytes, "{}", fixture.path);
        assert_eq!(&logical_sha256(&chain), sha256, "{}", fixture.path);
    }
}

#[test]
fn what_must_not_be_served_is_refused_with_its_reason() {
    let all = Unpacked { root: fixture::unpack() };
    let refused = |path: &str| {
        let (volumes, name) = all.place(path);
        Chain::open(&volumes, &name).map(drop).unwrap_err()
    };
    assert!(matches!(refused("sub/child.vhd").kind(), Error::ParentOutside { .. }));
    assert!(matches!(refused("wrong-parent-uuid.vhd").kind(), Error::ParentMismatch { .. }));
    assert!(matches!(refused("resize-crashed.vhd").kind(), Error::Poisoned));
}

#[test]
fn every_image_checks_as_recorded() {
    let all = Unpacked { root: fixture::unpack() };
    for fixture in images() {
        let differs = CHECK_DIFFERS.iter().find(|(path, _)| *path == fixture.path).map(|(_, passes)| *passes);
        let Some(passes) = differs.or(fixture.check_passes) else {
            continue;
        };
        let (volumes, name) = all.place(&fixture.path);
        let volume = volumes.open(&name, Access::Read).unwrap();
        let options = Options { parents: Some(&volumes), read_data: true, ..Options::default() };
        let report = check(volume.as_ref(), &options).unwrap();
        assert_eq!(report.is_sound(), passes, "{}: {:?}", fixture.path, report.problems);
    }
}

#[test]
fn problems_are_named_as_the_reference_names_them() {
    let first = |path: &str| {
        let report = check(&Mem::new(fixture::bytes(path)), &Options::default()).unwrap();
        report.problems.first().map(Problem::to_string).unwrap_or_default()
    };
    assert_eq!(first("crashed-writer.vhd"), "primary footer invalid: invalid cookie");
    assert_eq!(first("qemu-dyn-forcesize.vhd"), "primary footer invalid: geometry too large");
    assert_eq!(first("overlap-bat.vhd"), "block 0 (offset 0x7) clobbers block 1 (offset 0x7)");
    assert_eq!(first("torn-batmap.vhd"), "batmap invalid: invalid checksum");
}

#[test]
fn footers_are_found_wherever_one_is_left() {
    let state = |path: &str| Meta::read(&Mem::new(fixture::bytes(path))).unwrap().footer_state;
    assert_eq!(state("dyn-data-16m.vhd"), FooterState::Settled);
    assert_eq!(state("short-footer.vhd"), FooterState::Settled);
    assert_eq!(state("crashed-writer.vhd"), FooterState::EndMissing);
    assert_eq!(state("crashed-after-resume.vhd"), FooterState::EndMissing);
    assert_eq!(state("fixed-2m.vhd"), FooterState::Settled);
}

#[test]
fn repair_makes_every_readable_image_sound() {
    let all = Unpacked { root: fixture::unpack() };
    let fresh = uuid::Uuid::from_u128(7);
    for path in ["crashed-writer.vhd", "crashed-after-resume.vhd", "torn-batmap.vhd", "short-footer.vhd"] {
        let (volumes, name) = all.place(path);
        let volume = volumes.open(&name, Access::Write).unwrap();
        assert!(!repair(volume.as_ref(), fresh).unwrap().is_empty(), "{path}");
        assert_eq!(repair(volume.as_ref(), fresh).unwrap(), [], "{path}");
        assert!(check(volume.as_ref(), &Options::default()).unwrap().is_sound(), "{path}");
        let chain = Chain::open(&volumes, &name).unwrap();
        let fixture = images().find(|f| f.path == path).unwrap();
        assert_eq!(logical_sha256(&chain), fixture.logical.unwrap().1, "{path}");
    }
}

#[test]
fn a_torn_batmap_is_rebuilt_as_it_was() {
    let volume = Mem::new(fixture::bytes("torn-batmap.vhd"));
    assert_eq!(repair(&volume, uuid::Uuid::nil()).unwrap(), [Repaired::Batmap]);
    assert_eq!(volume.bytes(), fixture::bytes("dyn-data-16m.vhd"));
}

#[test]
fn overlapping_blocks_are_not_repaired() {
    let volume = Mem::new(fixture::bytes("overlap-bat.vhd"));
    assert!(matches!(repair(&volume, uuid::Uuid::nil()), Err(Error::BadBat { .. })));
    assert!(volume.ops().is_empty());
}

#[test]
fn revert_gives_back_the_image_before_the_resize() {
    let volume = Mem::new(fixture::bytes("resize-crashed.vhd"));
    let journal = Mem::new(fixture::bytes("resize-crashed.journal"));
    resize::revert(&volume, &journal).unwrap();
    assert_eq!(volume.bytes(), fixture::bytes("resize-before.vhd"));
    let other = Mem::new(fixture::bytes("dyn-data-16m.vhd"));
    assert!(matches!(resize::revert(&other, &journal), Err(Error::BadJournal { .. })));
    assert!(other.ops().is_empty());
}

/// A fixture made anew, with its own uuid and times.
fn made_again(path: &str, kind: NewKind, hidden: bool) -> Vec<u8> {
    let meta = Meta::read(&Mem::new(fixture::bytes(path))).unwrap();
    let volume = Mem::new(Vec::new());
    let new = NewImage {
        uuid: meta.uuid(),
        virtual_bytes: meta.virtual_bytes(),
        kind,
        bat_entries_max: None,
        hidden,
        timestamp_s: meta.footer.timestamp,
    };
    create(&volume, &new).unwrap();
    volume.bytes()
}

#[test]
fn new_images_are_the_reference_s_byte_for_byte() {
    assert_eq!(made_again("dyn-empty-64m.vhd", NewKind::Dynamic, false), fixture::bytes("dyn-empty-64m.vhd"));
    let child = fixture::bytes("chain3-leaf.vhd");
    let header = Meta::read(&Mem::new(child.clone())).unwrap().header.unwrap();
    let parent = ParentLink {
        uuid: header.parent_uuid,
        volume: VolumeName::new("chain3-mid.vhd").unwrap(),
        timestamp_s: header.parent_timestamp,
    };
    let made = made_again("chain3-leaf.vhd", NewKind::Child { parent }, false);
    assert_eq!(made.len(), 5120);
    // But for the blocks written later, and the BAT that names them.
    assert_eq!(made[..1536], child[..1536]);
    assert_eq!(made[2048..4608], child[2048..4608]);
    assert_eq!(made[4608..], child[child.len() - 512..]);
}

#[test]
fn the_marker_is_kept_and_set() {
    let volume = Mem::new(fixture::bytes("marker-5.vhd"));
    let mut meta = Meta::read(&volume).unwrap();
    assert_eq!(marker(&volume, &meta), Some(5));
    resize::grow(&volume, &mut meta, 1 << 30).unwrap();
    assert_eq!(marker(&volume, &meta), Some(5));
    set_marker(&volume, &meta, 9).unwrap();
    assert_eq!(marker(&volume, &meta), Some(9));
    assert!(check(&volume, &Options::default()).unwrap().is_sound());
}

#[test]
fn a_fixed_image_whose_guest_wrote_a_whole_dynamic_image_is_not_believed() {
    let mut bytes = fixture::bytes("fixed-2m.vhd");
    let inner = fixture::bytes("dyn-empty-64m.vhd");
    bytes[..inner.len()].copy_from_slice(&inner);
    let refused = Meta::read(&Mem::new(bytes)).unwrap_err();
    assert!(matches!(refused, Error::FootersDisagree { what: "type" }));
}

#[test]
fn a_footer_forged_in_the_last_sector_of_a_block_is_refused() {
    // As after a crash of the reference: the file ends with a block, whose
    // last sector is the guest's.
    let mut bytes = fixture::bytes("crashed-writer.vhd");
    let end = bytes.len() - 512;
    let footer = bytes[..512].to_vec();
    bytes[end..].copy_from_slice(&footer);
    let volume = Mem::new(bytes);
    let meta = Meta::read(&volume).unwrap();
    let refused = vhd::bat::read_bat(&volume, &meta.layout.unwrap()).unwrap_err();
    assert!(matches!(refused, Error::BadBat { reason: "it covers the footer", .. }));
}

#[test]
fn a_block_the_reference_died_in_may_stick_out() {
    let mut bytes = fixture::bytes("crashed-writer.vhd");
    bytes.truncate(bytes.len() - 4096);
    let volume = Mem::new(bytes);
    let layout = Meta::read(&volume).unwrap().layout.unwrap();
    assert!(vhd::bat::read_bat(&volume, &layout).is_ok());
    // Not where it has sectors past the end: 9000 is sector 808 of block 2.
    let mut bytes = volume.bytes();
    bytes.truncate(bytes.len() - 512 * 3500);
    assert!(vhd::bat::read_bat(&Mem::new(bytes), &layout).is_err());
}

#[test]
fn a_device_may_be_longer_than_its_image() {
    let mut bytes = fixture::bytes("dyn-data-16m.vhd");
    let footer = bytes.split_off(bytes.len() - 512);
    bytes.resize(12 << 20, 0xA5);
    bytes.extend(footer);
    let device = Mem::device(bytes);
    assert!(check(&device, &Options::default()).unwrap().is_sound());
    assert_eq!(repair(&device, uuid::Uuid::nil()).unwrap(), []);
    assert_eq!(device.len().unwrap(), (12 << 20) + 512);
}
