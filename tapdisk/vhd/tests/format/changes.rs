//! Changes of an image's metadata, whole and torn: at every write the image
//! reads as before.

use uuid::Uuid;
use vhd::bat::{BAT_FREE, data_end, read_bat};
use vhd::bitmap::SectorBitmap;
use vhd::check::{Options, check};
use vhd::footer::Footer;
use vhd::hidden::set_hidden;
use vhd::meta::Meta;
use vhd::repair::repair;
use vhd::reparent::{ParentLink, set_parent};
use vhd::resize::{grow, needs_moving, shrink};
use vhd::storage::{Volume, VolumeName};
use vhd::writer::reopen;
use vhd::{Error, resize};

use crate::crash::each_state;
use crate::fixture;
use crate::mem::Mem;

const MIB: u64 = 1 << 20;

/// What an image itself has, up to `bytes` of its disk; zero where it has
/// nothing.
fn contents(volume: &dyn Volume, bytes: u64) -> Vec<u8> {
    let meta = Meta::read(volume).unwrap();
    let bat = read_bat(volume, meta.layout.as_ref().unwrap()).unwrap();
    let mut disk = vec![0; bytes as usize];
    for (block, entry) in bat.iter().enumerate().filter(|(_, entry)| **entry != BAT_FREE) {
        let at = u64::from(*entry) * 512;
        let mut bitmap = [0; 512];
        volume.read_at(&mut bitmap, at).unwrap();
        for run in SectorBitmap::from_bytes(&bitmap).present() {
            let from = block * (2 << 20) + run.first as usize * 512;
            let to = (from + run.bytes() as usize).min(disk.len());
            if from < to {
                volume.read_at(&mut disk[from..to], at + 512 + u64::from(run.first) * 512).unwrap();
            }
        }
    }
    disk
}

/// Grows a fixture; every state a power cut could leave reads as before, and
/// can be grown again and settled.
fn grown(path: &str, to: u64) -> Mem {
    let before = fixture::bytes(path);
    let volume = Mem::new(before.clone());
    let mut meta = Meta::read(&volume).unwrap();
    let old_bytes = meta.virtual_bytes();
    let old = contents(&volume, old_bytes);
    grow(&volume, &mut meta, to).unwrap();
    assert_eq!(meta, Meta::read(&volume).unwrap());
    assert_eq!(meta.virtual_bytes(), to);
    let report = check(&volume, &Options::default()).unwrap();
    assert!(report.is_sound(), "{path}: {:?}", report.problems);
    let new = contents(&volume, to.min(64 * MIB));
    assert!(new[..old.len()] == old && new[old.len()..].iter().all(|byte| *byte == 0));
    each_state(&before, &volume, |n, bytes| {
        let torn = Mem::new(bytes);
        let mut meta = Meta::read(&torn).unwrap_or_else(|e| panic!("{path}, operation {n}: {e}"));
        assert!(contents(&torn, old_bytes) == old, "{path}, operation {n}: other content");
        grow(&torn, &mut meta, to).unwrap();
        repair(&torn, Uuid::nil()).unwrap();
        assert!(
            contents(&torn, old_bytes) == old,
            "{path}, operation {n}: other content after growing again"
        );
        assert!(check(&torn, &Options::default()).unwrap().is_sound());
    });
    volume
}

#[test]
fn growing_within_spare_entries_changes_no_header() {
    let volume = grown("prealloc-fast.vhd", 4096 * MIB);
    assert_eq!(volume.bytes()[512..1536], fixture::bytes("prealloc-fast.vhd")[512..1536]);
}

#[test]
fn growing_within_the_last_sector_moves_nothing() {
    let meta = Meta::read(&Mem::new(fixture::bytes("resize-before.vhd"))).unwrap();
    assert!(!needs_moving(&meta, 256 * MIB) && needs_moving(&meta, 258 * MIB));
    let volume = grown("resize-before.vhd", 256 * MIB);
    assert_eq!(volume.len().unwrap(), fixture::bytes("resize-before.vhd").len() as u64);
}

#[test]
fn growing_further_moves_blocks_out_of_the_way() {
    let volume = grown("resize-before.vhd", 600 * MIB);
    assert_eq!(Meta::read(&volume).unwrap().layout.unwrap().table_offset, 3072);
    // And once more, from where the BAT lies now.
    let mut meta = Meta::read(&volume).unwrap();
    let old = contents(&volume, 16 * MIB);
    grow(&volume, &mut meta, 40 * 1024 * MIB).unwrap();
    assert!(contents(&volume, 16 * MIB) == old);
    assert!(check(&volume, &Options::default()).unwrap().is_sound());
}

#[test]
fn an_empty_image_grows() {
    grown("dyn-empty-64m.vhd", 8192 * MIB);
}

#[test]
fn a_child_grows_and_keeps_its_locators() {
    let volume = grown("chain3-leaf.vhd", 1024 * MIB);
    let parent = Meta::read(&volume).unwrap().parent.unwrap();
    assert_eq!(parent.paths, ["./chain3-mid.vhd"; 3]);
}

#[test]
fn stale_entries_behind_a_bat_do_not_come_to_life() {
    let mut bytes = fixture::bytes("prealloc-fast.vhd");
    bytes[1536 + 40 * 4..1536 + 44 * 4].copy_from_slice(&[0, 0, 0, 0x17].repeat(4));
    let volume = Mem::new(bytes);
    let mut meta = Meta::read(&volume).unwrap();
    grow(&volume, &mut meta, 128 * MIB).unwrap();
    let bat = read_bat(&volume, meta.layout.as_ref().unwrap()).unwrap();
    assert_eq!(bat.iter().filter(|entry| **entry != BAT_FREE).count(), 2);
}

#[test]
fn shrinking_loses_no_data() {
    let before = fixture::bytes("dyn-data-16m.vhd");
    let volume = Mem::new(before.clone());
    let mut meta = Meta::read(&volume).unwrap();
    assert!(matches!(shrink(&volume, &mut meta, 8 * MIB), Err(Error::BadSize { .. })));
    assert!(volume.ops().is_empty());
    // Sector 32767, the only one past 14 MiB, becomes zero.
    let layout = meta.layout.clone().unwrap();
    let last = read_bat(&volume, &layout).unwrap()[7];
    volume.zero((u64::from(last) + 1 + 4095) * 512, 512).unwrap();
    let before = volume.bytes();
    let volume = Mem::new(before.clone());
    let old = contents(&volume, 8 * MIB);
    shrink(&volume, &mut meta, 8 * MIB).unwrap();
    assert_eq!(meta.virtual_bytes(), 8 * MIB);
    assert!(volume.len().unwrap() < before.len() as u64);
    assert!(check(&volume, &Options::default()).unwrap().is_sound());
    each_state(&before, &volume, |n, bytes| {
        let torn = Mem::new(bytes);
        let mut meta = Meta::read(&torn).unwrap_or_else(|e| panic!("operation {n}: {e}"));
        assert!(contents(&torn, 8 * MIB) == old, "operation {n}");
        shrink(&torn, &mut meta, 8 * MIB).unwrap();
        assert!(contents(&torn, 8 * MIB) == old, "operation {n}");
    });
}

/// The last block ends with what a guest wrote to look like this image's
/// footer, with another size. `behind` is what follows that block in the file.
fn forged_in_its_last_sector(behind: &[u8]) -> Vec<u8> {
    let volume = Mem::new(fixture::bytes("dyn-data-16m.vhd"));
    let meta = Meta::read(&volume).unwrap();
    let layout = meta.layout.as_ref().unwrap();
    let bat = read_bat(&volume, layout).unwrap();
    let slot = bat.iter().filter(|entry| **entry != BAT_FREE).max().unwrap();
    let forged = Footer { virtual_bytes: 4096 * MIB, ..meta.footer.clone() };
    let end = data_end(&bat, layout);
    volume.write_at(&[0xff], u64::from(*slot) * 512 + 511).unwrap();
    volume.write_at(&forged.to_bytes(), end - 512).unwrap();
    let mut bytes = volume.bytes();
    bytes.truncate(end as usize);
    bytes.extend_from_slice(behind);
    bytes
}

#[test]
fn at_no_moment_of_opening_does_an_image_end_with_what_a_guest_wrote_or_an_older_footer() {
    let footer = fixture::bytes("dyn-data-16m.vhd")[..512].to_vec();
    let old = Footer { virtual_bytes: 2 * MIB, ..Footer::parse(footer.first_chunk().unwrap()).unwrap() };
    let longer = [old.to_bytes().as_slice(), &[0; 8192]].concat();
    for behind in [footer, longer] {
        let before = forged_in_its_last_sector(&behind);
        let volume = Mem::new(before.clone());
        let (meta, _) = reopen(&volume).unwrap();
        assert_eq!(meta.virtual_bytes(), 16 * MIB);
        let old = contents(&volume, 16 * MIB);
        each_state(&before, &volume, |n, bytes| {
            let torn = Mem::new(bytes);
            let meta = Meta::read(&torn).unwrap_or_else(|e| panic!("operation {n}: {e}"));
            assert_eq!(meta.virtual_bytes(), 16 * MIB, "operation {n}");
            assert!(contents(&torn, 16 * MIB) == old, "operation {n}");
        });
    }
}

#[test]
fn children_and_foreign_images_do_not_shrink() {
    for path in ["chain3-leaf.vhd", "qemu-dyn-chs.vhd", "fixed-2m.vhd"] {
        let volume = Mem::new(fixture::bytes(path));
        let mut meta = Meta::read(&volume).unwrap();
        assert!(shrink(&volume, &mut meta, 1).is_err() || path == "fixed-2m.vhd");
        assert!(volume.ops().is_empty());
    }
}

#[test]
fn a_torn_revert_is_finished_by_another() {
    let before = fixture::bytes("resize-crashed.vhd");
    let journal = Mem::new(fixture::bytes("resize-crashed.journal"));
    let volume = Mem::new(before.clone());
    resize::revert(&volume, &journal).unwrap();
    each_state(&before, &volume, |n, bytes| {
        let torn = Mem::new(bytes);
        resize::revert(&torn, &journal).unwrap_or_else(|e| panic!("operation {n}: {e}"));
        assert!(torn.bytes() == fixture::bytes("resize-before.vhd"), "operation {n}");
    });
}

fn link(name: &str, uuid: u128) -> ParentLink {
    ParentLink { uuid: Uuid::from_u128(uuid), volume: VolumeName::new(name).unwrap(), timestamp_s: 9 }
}

#[test]
fn at_every_write_of_a_reparenting_old_or_new_parent_is_named() {
    let before = fixture::bytes("chain3-leaf.vhd");
    let volume = Mem::new(before.clone());
    let mut meta = Meta::read(&volume).unwrap();
    let old = meta.parent.clone().unwrap().uuid;
    let new = link("chain3-new.vhd", 0xABC);
    set_parent(&volume, &mut meta, &new).unwrap();
    assert_eq!(meta, Meta::read(&volume).unwrap());
    assert_eq!(meta.parent.as_ref().unwrap().candidates().unwrap(), std::slice::from_ref(&new.volume));
    let third = link("chain3-3rd.vhd", 0xDEF);
    each_state(&before, &volume, |n, bytes| {
        let torn = Mem::new(bytes.clone());
        assert_leads(&torn, n, &[(old, "chain3-mid.vhd"), (new.uuid, "chain3-new.vhd")]);
        // Recovery may link it elsewhere, and be cut off as well.
        let mut meta = Meta::read(&torn).unwrap();
        set_parent(&torn, &mut meta, &third).unwrap();
        each_state(&bytes, &torn, |_, bytes| {
            let parents =
                [(old, "chain3-mid.vhd"), (new.uuid, "chain3-new.vhd"), (third.uuid, "chain3-3rd.vhd")];
            assert_leads(&Mem::new(bytes), n, &parents);
        });
    });
}

/// The image names one of the parents by its uuid, and a locator leads there.
fn assert_leads(volume: &Mem, n: usize, parents: &[(Uuid, &str)]) {
    let parent = Meta::read(volume).unwrap_or_else(|e| panic!("operation {n}: {e}")).parent.unwrap();
    let names: Vec<_> = parent.candidates().unwrap().iter().map(ToString::to_string).collect();
    let (_, wanted) = parents.iter().find(|(uuid, _)| *uuid == parent.uuid).unwrap();
    assert!(names.iter().any(|name| name == wanted), "operation {n}: {names:?}, not {wanted}");
}

#[test]
fn a_shorter_parent_name_is_padded_and_a_longer_one_refused() {
    let volume = Mem::new(fixture::bytes("chain3-leaf.vhd"));
    let mut meta = Meta::read(&volume).unwrap();
    set_parent(&volume, &mut meta, &link("p.vhd", 5)).unwrap();
    let parent = Meta::read(&volume).unwrap().parent.unwrap();
    assert_eq!(parent.parent_volume().unwrap().as_str(), "p.vhd");
    assert!(set_parent(&volume, &mut meta, &link("a-much-longer-name.vhd", 6)).is_err());
    assert_eq!(Meta::read(&volume).unwrap().parent.unwrap().uuid, Uuid::from_u128(5));
}

#[test]
fn at_every_write_the_hidden_flag_is_old_or_new() {
    let before = fixture::bytes("dyn-data-16m.vhd");
    let volume = Mem::new(before.clone());
    let mut meta = Meta::read(&volume).unwrap();
    set_hidden(&volume, &mut meta, true).unwrap();
    assert!(Meta::read(&volume).unwrap().hidden());
    assert!(check(&volume, &Options::default()).unwrap().is_sound());
    each_state(&before, &volume, |n, bytes| {
        let torn = Mem::new(bytes);
        let mut meta = Meta::read(&torn).unwrap_or_else(|e| panic!("operation {n}: {e}"));
        set_hidden(&torn, &mut meta, true).unwrap();
        assert!(torn.bytes() == volume.bytes(), "operation {n}");
    });
    set_hidden(&volume, &mut meta, false).unwrap();
    assert!(volume.bytes() == before);
}
