//! Random trees leave as streams and come back; streams that are not what
//! they say are refused.

use std::sync::Arc;

use uuid::Uuid;

use super::export::{Export, Identity};
use super::import::{Block, Import};
use super::*;
use crate::build::Builder;
use crate::chain::Chain;
use crate::check::{Options, check};
use crate::create::{NewImage, NewKind, ParentLink};
use crate::error::{Error, Result};
use crate::footer::Footer;
use crate::placed::tests::{Random, Tree, content};
use crate::storage::{Access, FileVolumes, PosixFs, VolumeName, Volumes};
use crate::units::BLOCK_BYTES;

fn id(node: usize) -> Uuid {
    Uuid::from_u128(node as u128 + 5001)
}

fn export(disk: &Chain, node: usize, base: Option<(&Chain, usize)>) -> Vec<u8> {
    let link = |node| ParentLink { uuid: id(node), volume: Tree::name(node), timestamp_s: 0 };
    let identity = Identity { uuid: id(node), parent: base.map(|(_, node)| link(node)), timestamp_s: 0 };
    let export = Export::plan(disk, base.map(|(chain, _)| chain), &identity).unwrap();
    let mut bytes = Vec::new();
    let mut sink = |part: &[u8]| {
        bytes.extend_from_slice(part);
        Ok(())
    };
    export.write(&mut sink).unwrap();
    assert_eq!(bytes.len() as u64, export.bytes(), "the length was known before");
    bytes
}

struct Folder {
    volumes: FileVolumes,
    _folder: tempfile::TempDir,
}

impl Folder {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let volumes = FileVolumes::new(Arc::new(PosixFs::new(folder.path().to_owned())));
        Self { volumes, _folder: folder }
    }

    /// The stream as a file, as another program would keep it.
    fn store(&self, node: usize, bytes: &[u8]) -> Chain {
        self.volumes.create(&Tree::name(node)).unwrap().write_at(bytes, 0).unwrap();
        let volume = self.volumes.open(&Tree::name(node), Access::Read).unwrap();
        let report = check(volume.as_ref(), &Options::default()).unwrap();
        assert!(report.is_sound(), "{report:?}");
        Chain::open(&self.volumes, &Tree::name(node)).unwrap()
    }
}

/// Reads a stream into a new image, as an import does.
fn import(volumes: &dyn Volumes, name: &VolumeName, bytes: &[u8], parent: Option<ParentLink>) -> Result<()> {
    let mut stream = bytes;
    let mut import = Import::open(&mut stream)?;
    let mut builder = Builder::new(volumes.create(name)?, 64);
    let mut block = Block::default();
    while import.next_block(&mut block)? {
        builder.put(block.number, &block.bitmap, &block.data)?;
    }
    let new = NewImage {
        uuid: Uuid::from_u128(77),
        virtual_bytes: import.head().virtual_bytes.unwrap(),
        kind: parent.map_or(NewKind::Dynamic, |parent| NewKind::Child { parent }),
        bat_entries_max: None,
        hidden: false,
        timestamp_s: 0,
    };
    builder.finish(&new).map(drop)
}

fn random_tree(seed: u64) -> Tree {
    let mut random = Random(seed);
    let mut tree = Tree::new();
    tree.grow(&mut random, None);
    for _ in 0..4 {
        let parent = random.below(tree.parents.len() as u64) as usize;
        tree.grow(&mut random, Some(parent));
    }
    tree
}

#[test]
fn a_full_export_reads_as_the_disk() {
    for seed in 0..6 {
        let tree = random_tree(seed);
        let disk = tree.chain(4);
        let bytes = export(&disk, 4, None);
        assert_eq!(content(&Folder::new().store(4, &bytes)), content(&disk), "seed {seed}");
        let there = Folder::new();
        import(&there.volumes, &Tree::name(9), &bytes, None).unwrap();
        let came = Chain::open(&there.volumes, &Tree::name(9)).unwrap();
        assert_eq!(content(&came), content(&disk), "seed {seed}");
    }
}

#[test]
fn a_delta_over_any_other_node_reads_as_the_disk() {
    let mut apart = 0;
    for seed in 0..12 {
        let tree = random_tree(seed);
        let mut random = Random(seed + 100);
        let (a, b) = (random.below(5) as usize, random.below(5) as usize);
        let (disk, base) = (tree.chain(a), tree.chain(b));
        if a == b {
            continue;
        }
        let (full, delta) = (export(&base, b, None), export(&disk, a, Some((&base, b))));
        let there = Folder::new();
        there.store(b, &full);
        assert_eq!(content(&there.store(a, &delta)), content(&disk), "seed {seed}: {a} over {b}");
        let parent = ParentLink { uuid: id(b), volume: Tree::name(b), timestamp_s: 0 };
        import(&there.volumes, &Tree::name(9), &delta, Some(parent)).unwrap();
        let came = Chain::open(&there.volumes, &Tree::name(9)).unwrap();
        assert_eq!(content(&came), content(&disk), "seed {seed}: {a} over {b}");
        apart += u32::from(delta.len() < full.len());
    }
    assert!(apart > 2, "deltas are smaller than what they stand on");
}

#[test]
fn a_raw_stream_leaves_holes_out_and_ends_with_the_size() {
    let tree = random_tree(3);
    let disk = tree.chain(4);
    let (mut sparse, mut plain) = (Vec::new(), Vec::new());
    let mut passed = 0;
    extents::write(&disk, &mut |part| io_push(&mut sparse, part), &mut |at| passed = at).unwrap();
    extents::write_plain(&disk, &mut |part| io_push(&mut plain, part), &mut |_| ()).unwrap();
    assert_eq!(plain, content(&disk));
    let mut stream = &sparse[..];
    let mut came = Vec::new();
    loop {
        match extents::next(&mut stream, came.len() as u64).unwrap() {
            extents::Piece::Data { offset, len } => {
                came.resize(offset as usize, 0);
                let (data, rest) = stream.split_at(len as usize);
                came.extend_from_slice(data);
                stream = rest;
            }
            extents::Piece::End { virtual_bytes } => break came.resize(virtual_bytes as usize, 0),
        }
    }
    assert_eq!(came, plain);
    assert!(stream.is_empty() && sparse.len() < plain.len() && passed <= plain.len() as u64);
    let mut cut = &sparse[..sparse.len() - 1];
    let told = std::iter::from_fn(|| Some(extents::next(&mut cut, 0))).find(std::result::Result::is_err);
    assert!(told.is_some());
}

fn io_push(to: &mut Vec<u8>, part: &[u8]) -> std::io::Result<()> {
    to.extend_from_slice(part);
    Ok(())
}

fn read_all(mut bytes: &[u8]) -> Result<u64> {
    let mut import = Import::open(&mut bytes)?;
    let mut block = Block::default();
    let mut blocks = 0;
    while import.next_block(&mut block)? {
        blocks += 1;
    }
    Ok(blocks)
}

#[test]
fn a_stream_cut_anywhere_is_refused() {
    let tree = random_tree(3);
    let bytes = export(&tree.chain(4), 4, None);
    assert!(read_all(&bytes).unwrap() > 0);
    for cut in (0..bytes.len()).step_by(99_991).chain([511, 512, bytes.len() - 512, bytes.len() - 1]) {
        assert!(read_all(&bytes[..cut]).is_err(), "cut at {cut} of {}", bytes.len());
    }
}

#[test]
fn what_a_stream_says_wrongly_is_told() {
    let tree = random_tree(3);
    let bytes = export(&tree.chain(4), 4, None);
    let said = |place: usize, with: &[u8]| {
        let mut bytes = bytes.clone();
        bytes[place..place + with.len()].copy_from_slice(with);
        read_all(&bytes).unwrap_err().to_string()
    };
    let entry = |n: usize| u32::from_be_bytes(bytes[1536 + 4 * n..][..4].try_into().unwrap());
    let used: Vec<usize> = (0..4).filter(|n| entry(*n) != u32::MAX).collect();
    assert!(used.len() > 1, "a tree of several blocks");
    let (first, second) = (used[0], used[1]);
    assert!(said(1536 + 4 * first, &[0, 0, 0, 1]).contains("inside the headers"));
    let over = (entry(first) + 8).to_be_bytes();
    assert!(said(1536 + 4 * second, &over).contains("overlaps"));
    assert!(said(1536 + 4 * first, &[0x7F; 4]).contains("ends before"));
    assert!(said(520, b"xxxx").contains("bad header"));
    // Another image's footer at the end.
    let mut other = Footer::parse(bytes[..512].try_into().unwrap()).unwrap();
    other.uuid = Uuid::from_u128(1);
    assert!(said(bytes.len() - 512, &other.to_bytes()).contains("disagree in uuid"));
    assert!(said(bytes.len() - 512, &[0; 512]).contains("not a VHD"));
}

#[test]
fn a_fixed_image_is_read_too_whatever_its_guest_wrote_at_its_front() {
    let tree = random_tree(3);
    let dynamic = export(&tree.chain(4), 4, None);
    for (size, front) in [(BLOCK_BYTES, 0), (2 * BLOCK_BYTES + 4096, 0), (512, 0), (3 * BLOCK_BYTES, 9)] {
        let mut bytes: Vec<u8> = (0..size).map(|n| (n / 512 % 251) as u8).collect();
        bytes[..front].copy_from_slice(&dynamic[..front]);
        let mut footer = Footer::parse(dynamic[..512].try_into().unwrap()).unwrap();
        (footer.disk_type, footer.virtual_bytes, footer.data_offset) =
            (crate::footer::DiskType::Fixed, size, u64::MAX);
        let data = bytes.clone();
        bytes.extend(footer.to_bytes());
        let (mut stream, mut came, mut block) = (&bytes[..], Vec::new(), Block::default());
        let mut import = Import::open(&mut stream).unwrap();
        while import.next_block(&mut block).unwrap() {
            came.extend_from_slice(&block.data);
        }
        assert_eq!(import.head().virtual_bytes, Some(size));
        assert_eq!(came[..data.len()], data);
        assert!(came[data.len()..].iter().all(|byte| *byte == 0));
        assert!(read_all(&bytes[..bytes.len() - 512]).is_err(), "without its footer");
        assert!(read_all(&bytes[512..]).is_err(), "without its first sector");
    }
    // A guest that wrote a whole dynamic image: its end is not that image's.
    let mut bytes = dynamic.clone();
    let mut footer = Footer::parse(dynamic[..512].try_into().unwrap()).unwrap();
    footer.disk_type = crate::footer::DiskType::Fixed;
    bytes.extend(footer.to_bytes());
    assert!(matches!(read_all(&bytes), Err(Error::FootersDisagree { .. })));
}
