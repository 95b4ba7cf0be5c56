use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use vhd::storage::via::{Delegate, Via};
use vhd::storage::{FileVolumes, PosixFs};

use super::*;

fn image(n: u128) -> ImageRef {
    ImageRef { volume: VolumeName::vhd(Uuid::from_u128(n)).to_string(), footer: Uuid::from_u128(n) }
}

fn snapshot(id: u128, shape: Shape) -> Intent {
    let sibling =
        Sibling { image: image(5), vdi: Uuid::from_u128(6), name: "mon\"day".into(), filled: false };
    let member = Member { vdi: Uuid::from_u128(1), leaf_footer: Uuid::from_u128(2), shape, sibling };
    let kind = SiblingKind::Clone;
    Intent::Snapshot(SnapshotIntent { id: Uuid::from_u128(id), kind, members: vec![member] })
}

fn inner(id: u128, state: JobState) -> Intent {
    let (nodes, parent) = (vec![image(11), image(12)], image(13));
    Intent::Inner(InnerIntent { id: Uuid::from_u128(id), nodes, parent, state })
}

fn leaf_merge(id: u128, state: LeafMergeState) -> Intent {
    let (vdi, leaf, parent) = (Uuid::from_u128(21), image(21), image(22));
    Intent::LeafMerge(LeafMergeIntent { id: Uuid::from_u128(id), vdi, leaf, parent, state })
}

fn every_intent() -> Vec<Intent> {
    vec![
        snapshot(101, Shape::Empty),
        snapshot(102, Shape::Divide { base: Uuid::from_u128(3), new_leaf: image(4) }),
        inner(103, JobState::Copying),
        inner(104, JobState::Relinking { children: vec![image(14)] }),
        inner(105, JobState::Refreshing),
        inner(106, JobState::Deleting),
        leaf_merge(107, LeafMergeState::Merging),
        leaf_merge(108, LeafMergeState::Committing),
    ]
}

fn folder() -> (tempfile::TempDir, FileVolumes) {
    let folder = tempfile::tempdir().unwrap();
    let fs = PosixFs::new(folder.path().to_owned());
    (folder, FileVolumes::new(Arc::new(fs)))
}

#[test]
fn every_intent_comes_back_as_it_was() {
    let (_folder, volumes) = folder();
    for intent in every_intent() {
        put(&volumes, &intent, "test").unwrap();
    }
    let stored: Vec<Intent> = load(&volumes).unwrap().into_iter().map(|s| s.intent).collect();
    assert_eq!(stored, every_intent());
    for intent in every_intent() {
        let state = match intent {
            Intent::Snapshot(_) => RecordState::Pending,
            _ => RecordState::Job,
        };
        remove(&volumes, RecordName { id: intent.id(), state }, "test").unwrap();
    }
    assert_eq!(load(&volumes).unwrap(), []);
}

#[test]
fn the_name_of_a_record_is_its_state() {
    let (_folder, volumes) = folder();
    put(&volumes, &snapshot(101, Shape::Empty), "test").unwrap();
    let names = RecordName::of_snapshot(Uuid::from_u128(101));
    assert!(volumes.rename_record(&names.pending, &names.decided).unwrap());
    assert!(!volumes.rename_record(&names.pending, &names.void).unwrap(), "only one can win");
    assert_eq!(load(&volumes).unwrap()[0].name.state, RecordState::Decided);
    for state in [RecordState::Pending, RecordState::Decided, RecordState::Void, RecordState::Job] {
        let name = RecordName { id: Uuid::from_u128(9), state };
        assert_eq!(RecordName::parse(&name.to_string()), Some(name));
    }
}

#[test]
fn a_record_under_a_wrong_name_is_refused() {
    let id = Uuid::from_u128(103);
    let job = serde_json::to_vec(&inner(103, JobState::Copying)).unwrap();
    for (name, bytes) in [
        (format!("{id}.pending"), job.clone()),
        (format!("{}.job", Uuid::from_u128(9)), job.clone()),
        (format!("{id}.job.old"), job.clone()),
        ("coalesce_x".to_owned(), job),
        (format!("{id}.job"), b"{\"intent\": \"unheard of\"}".to_vec()),
        (format!("{id}.job"), Vec::new()),
    ] {
        let (_folder, volumes) = folder();
        volumes.put_record(&name, &bytes, "test").unwrap();
        assert_eq!(load(&volumes).unwrap_err().code(), "BAD_JOURNAL", "{name}");
    }
}

#[test]
fn an_intent_names_images_by_volume_and_by_footer() {
    let names = |intent: &Intent, n: u128, footer: u128| {
        intent.names(&VolumeName::vhd(Uuid::from_u128(n)), Uuid::from_u128(footer))
    };
    let divide = snapshot(101, Shape::Divide { base: Uuid::from_u128(3), new_leaf: image(4) });
    for n in [1, 3, 4, 5, 6] {
        assert!(names(&divide, n, 99), "volume {n}");
    }
    assert!(names(&divide, 99, 2), "the leaf under its new name");
    assert!(!names(&divide, 99, 99));
    let relinking = inner(102, JobState::Relinking { children: vec![image(14)] });
    assert!(names(&relinking, 14, 99) && names(&relinking, 13, 99) && names(&relinking, 99, 11));
    assert!(!names(&inner(103, JobState::Copying), 14, 14));
}

#[test]
fn a_record_cannot_lead_out_of_the_repository() {
    let outside = ImageRef { volume: "../x.vhd".into(), footer: Uuid::nil() };
    assert_eq!(volume_of(&outside).unwrap_err().code(), "BAD_JOURNAL");
}

/// A snapshot is decided while the first listing runs, which shows the name
/// the record had before, or none of the two.
#[derive(Debug)]
struct DecidedMeanwhile {
    inner: FileVolumes,
    names: IntentNames,
    shows_old_name: bool,
    listings: AtomicU32,
}

impl Delegate for DecidedMeanwhile {
    fn inner(&self) -> &dyn Volumes {
        &self.inner
    }
    fn records(&self) -> io::Result<Vec<String>> {
        let mut names = self.inner.records()?;
        if self.listings.fetch_add(1, Ordering::Relaxed) == 0 {
            assert!(self.inner.rename_record(&self.names.pending, &self.names.decided)?);
            names.retain(|_| self.shows_old_name);
        }
        Ok(names)
    }
}

/// A sweep that did not see the record would delete the snapshot's images.
#[test]
fn a_snapshot_decided_while_the_journal_is_read_is_found() {
    for shows_old_name in [true, false] {
        let (_folder, inner) = folder();
        let intent = snapshot(9, Shape::Empty);
        put(&inner, &intent, "test").unwrap();
        let names = RecordName::of_snapshot(intent.id());
        let volumes = Via(DecidedMeanwhile { inner, names, shows_old_name, listings: AtomicU32::new(0) });
        let found = load(&volumes).unwrap();
        assert_eq!(found.len(), 1, "old name shown: {shows_old_name}");
        assert_eq!((found[0].name.state, &found[0].intent), (RecordState::Decided, &intent));
    }
}
