//! Disks that leave one repository as a stream and enter another, or their
//! own: full, and as deltas over any node.

#![allow(clippy::unwrap_used, reason = "a helper of tests fails by panicking")]

mod support;

use std::io::Read;
use std::sync::Arc;

use sm::journal::SiblingKind;
use sm::ops::{self, Format, ImportWanted, Wanted};
use sm::progress::Progress;
use sm::reading::Reading;
use sm::{Error, Repo, identity, scan};
use support::{FakeHost, assert_clean, byte, fill, repo};
use uuid::Uuid;
use vhd::storage::{FileVolumes, PosixFs};
use vhd::units::BLOCK_BYTES;

struct Sr {
    repo: Repo,
    _folder: tempfile::TempDir,
}

fn sr(number: u64) -> Sr {
    let folder = tempfile::tempdir().unwrap();
    let open = || Arc::new(FileVolumes::new(Arc::new(PosixFs::new(folder.path().to_owned()))));
    let host = FakeHost::new(open());
    Sr { repo: repo(open(), &host, number), _folder: folder }
}

fn export(repo: &Repo, vdi: Uuid, base: Option<Uuid>, format: Format) -> sm::Result<Vec<u8>> {
    let (mut bytes, mut expected) = (Vec::new(), 0);
    let progress = Progress::default();
    let mut sink = |part: &[u8]| {
        bytes.extend_from_slice(part);
        Ok(())
    };
    ops::export(repo, vdi, base, format, &progress, |total| expected = total, &mut sink)?;
    if format == Format::Vhd {
        assert_eq!((bytes.len() as u64, progress.done_bytes()), (expected, expected));
    }
    Ok(bytes)
}

fn import(repo: &Repo, base: Option<Uuid>, format: Format, mut bytes: &[u8]) -> sm::Result<Uuid> {
    let wanted = ImportWanted { name: "came", format, base };
    ops::import(repo, &wanted, &mut bytes, &Progress::default(), || ())
}

fn vhd_in(repo: &Repo, base: Option<Uuid>, bytes: &[u8]) -> sm::Result<Uuid> {
    import(repo, base, Format::Vhd, bytes)
}

fn snapshot(repo: &Repo, vdi: Uuid) -> Uuid {
    let wanted = [Wanted { vdi, name: "snap".into() }];
    ops::snapshot(repo, SiblingKind::Snapshot, &wanted).unwrap()[0]
}

fn content(repo: &Repo, vdi: Uuid) -> Vec<u8> {
    let reading = Reading::open(repo, vdi, true).unwrap();
    let mut bytes = vec![0; reading.chain.virtual_bytes() as usize];
    reading.chain.read_at(&mut bytes, 0).unwrap();
    bytes
}

/// A disk with two snapshots, written before, between and after.
fn disk(repo: &Repo) -> (Uuid, Uuid, Uuid) {
    let vdi = ops::create(repo, "web", 4 * BLOCK_BYTES).unwrap();
    fill(repo, vdi, 0, 0x11);
    fill(repo, vdi, 2, 0x12);
    let first = snapshot(repo, vdi);
    fill(repo, vdi, 0, 0x21);
    fill(repo, vdi, 1, 0x22);
    let second = snapshot(repo, vdi);
    fill(repo, vdi, 3, 0x31);
    (vdi, first, second)
}

#[test]
fn every_format_goes_round_between_repositories() {
    let (from, to) = (sr(1), sr(2));
    let (vdi, first, _) = disk(&from.repo);
    for format in [Format::Raw, Format::Extents, Format::Vhd] {
        for of in [vdi, first] {
            let bytes = export(&from.repo, of, None, format).unwrap();
            let came = import(&to.repo, None, format, &bytes).unwrap();
            assert_eq!(content(&to.repo, came), content(&from.repo, of), "{format:?}");
            // Zeros are not stored.
            let stored = sm::image::allocated_bytes(&to.repo, &vhd::storage::VolumeName::vhd(came)).unwrap();
            assert_eq!(stored, if of == vdi { 4 } else { 2 } * BLOCK_BYTES, "{format:?}");
        }
    }
    assert_clean(&to.repo);
    assert_clean(&from.repo);
}

#[test]
fn deltas_follow_each_other_into_another_repository() {
    let (from, to) = (sr(1), sr(2));
    let (vdi, first, second) = disk(&from.repo);
    let full = vhd_in(&to.repo, None, &export(&from.repo, first, None, Format::Vhd).unwrap()).unwrap();
    let delta = export(&from.repo, second, Some(first), Format::Vhd).unwrap();
    let next = vhd_in(&to.repo, Some(full), &delta).unwrap();
    let last = export(&from.repo, vdi, Some(second), Format::Vhd).unwrap();
    let last = vhd_in(&to.repo, Some(next), &last).unwrap();
    for (came, of) in [(full, first), (next, second), (last, vdi)] {
        assert_eq!(content(&to.repo, came), content(&from.repo, of));
    }
    let tree = scan::scan(&to.repo).unwrap().tree;
    let hidden = tree.nodes.iter().filter(|node| node.is_hidden()).count();
    assert_eq!(hidden, 2, "each base was divided once");
    assert_clean(&to.repo);
    // Back again, onto the very snapshot it was taken of.
    let back = export(&to.repo, next, Some(full), Format::Vhd).unwrap();
    let back = vhd_in(&from.repo, Some(first), &back).unwrap();
    assert_eq!(content(&from.repo, back), content(&from.repo, second));
    assert_clean(&from.repo);
}

#[test]
fn a_delta_between_siblings_holds_what_either_changed_zeros_included() {
    let (from, to) = (sr(1), sr(2));
    let (vdi, first, _) = disk(&from.repo);
    let wanted = [Wanted { vdi: first, name: "a".into() }];
    let a = ops::snapshot(&from.repo, SiblingKind::Clone, &wanted).unwrap()[0];
    fill(&from.repo, a, 2, 0x55);
    fill(&from.repo, a, 3, 0x56);
    for (of, base) in [(a, vdi), (vdi, a)] {
        let full = vhd_in(&to.repo, None, &export(&from.repo, base, None, Format::Vhd).unwrap()).unwrap();
        let delta = export(&from.repo, of, Some(base), Format::Vhd).unwrap();
        let came = vhd_in(&to.repo, Some(full), &delta).unwrap();
        assert_eq!(content(&to.repo, came), content(&from.repo, of));
        // And next to the original.
        let beside = vhd_in(&from.repo, Some(base), &delta).unwrap();
        assert_eq!(content(&from.repo, beside), content(&from.repo, of));
    }
    assert_clean(&to.repo);
    assert_clean(&from.repo);
}

#[test]
fn a_hidden_node_is_a_base_too() {
    let from = sr(1);
    let (vdi, first, second) = disk(&from.repo);
    let tree = scan::scan(&from.repo).unwrap().tree;
    for node in tree.nodes.iter().filter(|node| node.is_hidden()) {
        for of in [vdi, first, second] {
            let delta = export(&from.repo, of, Some(node.uuid), Format::Vhd).unwrap();
            let came = vhd_in(&from.repo, Some(node.uuid), &delta).unwrap();
            assert_eq!(content(&from.repo, came), content(&from.repo, of));
            ops::delete(&from.repo, came).unwrap();
        }
    }
    assert_clean(&from.repo);
}

#[test]
fn a_wrong_base_is_refused() {
    let (from, to) = (sr(1), sr(2));
    let (vdi, first, second) = disk(&from.repo);
    let full = export(&from.repo, first, None, Format::Vhd).unwrap();
    let came = vhd_in(&to.repo, None, &full).unwrap();
    let other = ops::create(&to.repo, "other", 4 * BLOCK_BYTES).unwrap();
    let delta = export(&from.repo, second, Some(first), Format::Vhd).unwrap();
    let refused = |outcome: sm::Result<Uuid>| {
        let error = outcome.unwrap_err();
        assert_eq!(error.code(), "WRONG_BASE", "{error}");
        error.to_string()
    };
    let told = refused(vhd_in(&to.repo, Some(other), &delta));
    assert!(told.contains(&first.to_string()) && told.contains(&other.to_string()), "{told}");
    refused(vhd_in(&to.repo, None, &delta));
    refused(vhd_in(&to.repo, Some(came), &full));
    refused(vhd_in(&from.repo, Some(vdi), &delta));
    // Changed since: attached for writing once.
    ops::attach(&to.repo, came, false).unwrap();
    ops::detach(&to.repo, came, false).unwrap();
    refused(vhd_in(&to.repo, Some(came), &delta));
    assert_eq!(import(&to.repo, Some(came), Format::Raw, &[0; 512]).unwrap_err().code(), "UNSUPPORTED");
    assert_clean(&to.repo);
    assert_eq!(scan::scan(&to.repo).unwrap().tree.nodes.len(), 2, "nothing was left");
}

#[test]
fn what_a_disk_holds_keeps_its_name_until_it_can_change() {
    let sr = sr(1);
    let (vdi, first, _) = disk(&sr.repo);
    let id = |vdi| identity::of(&sr.repo, vdi).unwrap();
    assert_eq!((id(vdi), id(first)), (None, Some(first)));
    export(&sr.repo, vdi, None, Format::Vhd).unwrap();
    let named = id(vdi).unwrap();
    export(&sr.repo, vdi, None, Format::Vhd).unwrap();
    let copy = snapshot(&sr.repo, vdi);
    assert_eq!((id(vdi), id(copy)), (Some(named), Some(named)));
    ops::attach(&sr.repo, vdi, true).unwrap();
    ops::detach(&sr.repo, vdi, false).unwrap();
    assert_eq!(id(vdi), Some(named));
    ops::resize(&sr.repo, vdi, 6 * BLOCK_BYTES).unwrap();
    assert_eq!((id(vdi), id(copy)), (None, Some(named)));
    ops::delete(&sr.repo, copy).unwrap();
    assert_eq!(sr.repo.labels.content_id(copy).unwrap(), None);
}

#[test]
fn an_attached_disk_is_not_exported_and_a_snapshot_of_it_is() {
    let sr = sr(1);
    let (vdi, first, _) = disk(&sr.repo);
    ops::attach(&sr.repo, vdi, false).unwrap();
    let refused = export(&sr.repo, vdi, None, Format::Vhd).unwrap_err();
    assert_eq!(refused.code(), "IN_USE");
    assert!(refused.to_string().contains("take a snapshot"), "{refused}");
    assert_eq!(export(&sr.repo, first, Some(vdi), Format::Vhd).unwrap_err().code(), "IN_USE");
    export(&sr.repo, first, None, Format::Vhd).unwrap();
}

#[test]
fn nothing_of_a_broken_stream_stays() {
    let (from, to) = (sr(1), sr(2));
    let (_, first, second) = disk(&from.repo);
    let full = export(&from.repo, first, None, Format::Vhd).unwrap();
    let delta = export(&from.repo, second, Some(first), Format::Vhd).unwrap();
    let base = vhd_in(&to.repo, None, &full).unwrap();
    let before = content(&to.repo, base);
    for cut in [0, 100, 600, 1600, full.len() / 2, full.len() - 1] {
        assert_eq!(vhd_in(&to.repo, None, &full[..cut]).unwrap_err().code(), "BAD_IMAGE", "cut at {cut}");
    }
    for cut in [delta.len() / 2, delta.len() - 1] {
        assert_eq!(vhd_in(&to.repo, Some(base), &delta[..cut]).unwrap_err().code(), "BAD_IMAGE");
    }
    let extents = export(&from.repo, first, None, Format::Extents).unwrap();
    for cut in [0, 5, extents.len() / 2, extents.len() - 1] {
        let outcome = import(&to.repo, None, Format::Extents, &extents[..cut]);
        assert_eq!(outcome.unwrap_err().code(), "BAD_IMAGE", "cut at {cut}");
    }
    assert_eq!(import(&to.repo, None, Format::Raw, &[]).unwrap_err().code(), "BAD_SIZE");
    assert_eq!(content(&to.repo, base), before);
    assert_clean(&to.repo);
    assert_eq!(scan::scan(&to.repo).unwrap().tree.nodes.len(), 1);
}

#[test]
fn a_raw_stream_of_any_length_becomes_whole_blocks() {
    let sr = sr(1);
    for len in [1, 512, BLOCK_BYTES as usize, BLOCK_BYTES as usize + 7] {
        let bytes = vec![0x7E; len];
        let came = import(&sr.repo, None, Format::Raw, &bytes).unwrap();
        let now = content(&sr.repo, came);
        assert_eq!(now.len() as u64, (len as u64).next_multiple_of(BLOCK_BYTES));
        assert!(now[..len] == bytes && now[len..].iter().all(|byte| *byte == 0));
    }
}

/// Gives some bytes, then has the job cancelled.
struct Cancels<'a>(&'a [u8], &'a Progress);

impl Read for Cancels<'_> {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        let got = self.0.read(buf)?;
        if got == 0 {
            self.1.cancel();
        }
        Ok(got)
    }
}

#[test]
fn a_cancelled_import_or_export_ends_and_leaves_nothing() {
    let sr = sr(1);
    let (_, first, _) = disk(&sr.repo);
    let full = export(&sr.repo, first, None, Format::Vhd).unwrap();
    let nodes = scan::scan(&sr.repo).unwrap().tree.nodes.len();
    let progress = Progress::default();
    let wanted = ImportWanted { name: "came", format: Format::Vhd, base: None };
    let mut stream = Cancels(&full[..full.len() / 2], &progress);
    let ended = ops::import(&sr.repo, &wanted, &mut stream, &progress, || ());
    assert!(matches!(ended, Err(Error::Cancelled)), "{ended:?}");
    // A raw stream is whole wherever it ends.
    let progress = Progress::default();
    let wanted = ImportWanted { name: "came", format: Format::Raw, base: None };
    let ended = ops::import(&sr.repo, &wanted, &mut Cancels(&[7; 9000], &progress), &progress, || ());
    assert!(matches!(ended, Err(Error::Cancelled)), "{ended:?}");
    let progress = Progress::default();
    let mut sink = |_: &[u8]| {
        progress.cancel();
        Ok(())
    };
    let ended = ops::export(&sr.repo, first, None, Format::Vhd, &progress, |_| (), &mut sink);
    assert!(matches!(ended, Err(Error::Cancelled)), "{ended:?}");
    assert_eq!(scan::scan(&sr.repo).unwrap().tree.nodes.len(), nodes);
    assert_clean(&sr.repo);
}

#[test]
fn a_delta_of_a_smaller_disk_than_its_base_stands_alone() {
    let from = sr(1);
    let large = ops::create(&from.repo, "large", 4 * BLOCK_BYTES).unwrap();
    let small = ops::create(&from.repo, "small", 2 * BLOCK_BYTES).unwrap();
    (0..4).for_each(|block| fill(&from.repo, large, block, 0x40 + block as u8));
    fill(&from.repo, small, 1, 0x77);
    let delta = export(&from.repo, small, Some(large), Format::Vhd).unwrap();
    let came = vhd_in(&from.repo, Some(large), &delta).unwrap();
    assert_eq!(content(&from.repo, came), content(&from.repo, small));
    // Nothing comes back from below, and nobody was divided for it.
    ops::resize(&from.repo, came, 4 * BLOCK_BYTES).unwrap();
    assert_eq!(content(&from.repo, came)[2 * BLOCK_BYTES as usize..], vec![0; 2 * BLOCK_BYTES as usize]);
    assert_eq!(support::volumes(&from.repo).len(), 3);
    assert_clean(&from.repo);
}

#[test]
fn a_delta_onto_an_empty_disk_divides_it_all_the_same() {
    let (from, to) = (sr(1), sr(2));
    let vdi = ops::create(&from.repo, "web", 2 * BLOCK_BYTES).unwrap();
    let empty = snapshot(&from.repo, vdi);
    fill(&from.repo, vdi, 1, 0x33);
    let base = vhd_in(&to.repo, None, &export(&from.repo, empty, None, Format::Vhd).unwrap()).unwrap();
    let delta = export(&from.repo, vdi, Some(empty), Format::Vhd).unwrap();
    let came = vhd_in(&to.repo, Some(base), &delta).unwrap();
    assert_eq!((byte(&to.repo, came, 1), byte(&to.repo, base, 1)), (0x33, 0));
    assert_clean(&to.repo);
}

/// Gives some bytes; between them somebody scans the repository.
struct Scans<'a>(&'a [u8], &'a Repo);

impl Read for Scans<'_> {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        sm::recover::recover(self.1, sm::recover::Scope::All).unwrap();
        sm::recover::sweep(self.1).unwrap();
        let visible = scan::scan(self.1).unwrap().tree.nodes.len();
        assert_eq!(visible, 0, "nothing shows before all of it is there");
        self.0.read(buf)
    }
}

#[test]
fn a_scan_made_meanwhile_leaves_an_import_alone() {
    let (from, to) = (sr(1), sr(2));
    let (_, first, _) = disk(&from.repo);
    let full = export(&from.repo, first, None, Format::Vhd).unwrap();
    let wanted = ImportWanted { name: "came", format: Format::Vhd, base: None };
    let mut stream = Scans(&full, &to.repo);
    let came = ops::import(&to.repo, &wanted, &mut stream, &Progress::default(), || ()).unwrap();
    assert_eq!(content(&to.repo, came), content(&from.repo, first));
    assert_clean(&to.repo);
}
