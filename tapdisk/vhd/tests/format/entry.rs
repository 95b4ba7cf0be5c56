//! What the fuzz targets and the mutation test run: whatever the bytes are,
//! no panic, no endless loop, no allocation past what the limits say.

use vhd::bat::{BAT_FREE, read_bat};
use vhd::batmap::read_batmap;
use vhd::check::{Options, check};
use vhd::footer::Footer;
use vhd::header::DynHeader;
use vhd::meta::Meta;
use vhd::repair::repair;
use vhd::resize::{grow, revert, shrink};
use vhd::storage::Volume;
use vhd::stream::import::{Block, Import};

use crate::mem::Mem;

/// A footer: what parses is written back as it was read.
pub fn footer(data: &[u8]) {
    let Some(bytes) = data.first_chunk::<512>() else {
        return;
    };
    if let Ok(footer) = Footer::parse(bytes) {
        assert_eq!(Footer::parse(&footer.to_bytes()).ok(), Some(footer));
    }
}

/// A header, and locators that lie behind it.
pub fn header(data: &[u8]) {
    let Some(bytes) = data.first_chunk::<1024>() else {
        return;
    };
    let Ok(header) = DynHeader::parse(bytes) else {
        return;
    };
    let volume = Mem::new(data.to_vec());
    for locator in &header.locators {
        if let Ok(Some(path)) = locator.read(&volume) {
            let _ = vhd::locator::volume_of(&path);
        }
    }
    // A name that is not UTF-16 does not come back; everything else does.
    if let Ok(again) = header.to_bytes() {
        assert!(DynHeader::parse(&again).is_ok_and(|again| again.max_entries == header.max_entries));
    }
}

/// Opening: footers, header, parent, BAT, BATmap. What a BAT names lies
/// inside the file.
pub fn open(data: &[u8]) {
    let volume = Mem::new(data.to_vec());
    let Ok(meta) = Meta::read_poisoned(&volume) else {
        return;
    };
    if let Some(parent) = &meta.parent {
        let _ = parent.candidates();
    }
    let _ = read_batmap(&volume, &meta);
    let Some(layout) = &meta.layout else { return };
    if let Ok(bat) = read_bat(&volume, layout) {
        assert_eq!(bat.len(), layout.entries as usize);
        let end = data.len() as u64;
        assert!(bat.iter().all(|entry| *entry == BAT_FREE || u64::from(*entry) * 512 < end));
    }
}

/// A check writes nothing.
pub fn check_image(data: &[u8]) {
    let volume = Mem::new(data.to_vec());
    let options = Options { now_s: Some(800_000_000), read_data: true, ..Options::default() };
    let _ = check(&volume, &options);
    assert!(volume.ops().is_empty());
}

/// What repair accepts is then an image that opens, and it leaves nothing to
/// repair.
pub fn repair_image(data: &[u8]) {
    let volume = Mem::new(data.to_vec());
    let fresh = uuid::Uuid::from_u128(1);
    if repair(&volume, fresh).is_ok() {
        assert!(repair(&volume, fresh).is_ok_and(|done| done.is_empty()));
    }
}

/// Growing, then shrinking back.
pub fn resize(data: &[u8]) {
    let volume = Mem::new(data.to_vec());
    let Ok(mut meta) = Meta::read(&volume) else {
        return;
    };
    let before = meta.virtual_bytes();
    if grow(&volume, &mut meta, before.saturating_add(40 << 30)).is_ok() {
        let _ = shrink(&volume, &mut meta, before);
        assert!(Meta::read(&volume).is_ok());
    }
}

/// A resize journal and the image it claims to be of: the first 4 KiB of the
/// input are the image's beginning, the rest is the journal.
pub fn journal(data: &[u8]) {
    let (image, journal) = data.split_at(data.len().min(4096));
    let volume = Mem::new(image.to_vec());
    if revert(&volume, &Mem::new(journal.to_vec())).is_err() {
        return;
    }
    assert!(volume.len().is_ok());
}

/// An import: a stream that is accepted was read to its end, and gave out
/// blocks of the disk it says it is, each once.
pub fn stream(data: &[u8]) {
    let mut bytes = data;
    let Ok(mut import) = Import::open(&mut bytes) else {
        return;
    };
    let (mut block, mut seen) = (Block::default(), std::collections::HashSet::new());
    loop {
        match import.next_block(&mut block) {
            Ok(true) => assert!(seen.insert(block.number), "a block comes twice"),
            Ok(false) => break,
            Err(_) => return,
        }
    }
    assert_eq!(import.position(), data.len() as u64);
    let blocks = import.head().virtual_bytes.map(|bytes| bytes.div_ceil(2 << 20));
    assert!(blocks.is_some_and(|blocks| seen.iter().all(|block| u64::from(block.0) < blocks)));
}
