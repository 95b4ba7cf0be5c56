//! A swap that was decided and whose rename fails: the disk stands still, says
//! so, and goes on once it can.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use tapdisk_control::{ClientError, ImageRef, IntentNames, Refusal, Reply, Request};
use uuid::Uuid;
use vhd::create::{NewImage, NewKind, ParentLink, create};
use vhd::storage::{VolumeName, Volumes};

use super::support::*;

/// A folder whose names cannot change, not even by root.
struct Frozen<'a>(&'a Path);

impl<'a> Frozen<'a> {
    fn new(folder: &'a Path) -> Option<Self> {
        set(folder, "+i").then_some(Self(folder))
    }
}

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        assert!(set(self.0, "-i"));
    }
}

fn set(folder: &Path, flag: &str) -> bool {
    Command::new("chattr").arg(flag).arg(folder).output().is_ok_and(|done| done.status.success())
}

/// The prepared leaf and the second name of the present one.
fn prepare(place: &Place, leaf: &ImageRef) -> (ImageRef, VolumeName) {
    let (base, volumes) = (VolumeName::vhd(Uuid::from_u128(40)), place.volumes());
    volumes.lay_aside(&VolumeName::vhd(VDI), &base).unwrap();
    let child = VolumeName::temporary(Uuid::from_u128(50), 0);
    let image = NewImage {
        uuid: Uuid::from_u128(41),
        virtual_bytes: DISK_BYTES,
        kind: NewKind::Child {
            parent: ParentLink { uuid: leaf.footer, volume: base.clone(), timestamp_s: 0 },
        },
        bat_entries_max: None,
        hidden: false,
        timestamp_s: 0,
    };
    create(volumes.create(&child).unwrap().as_ref(), &image).unwrap();
    (ImageRef { volume: child.as_str().to_owned(), footer: image.uuid }, base)
}

fn names(of: &str) -> IntentNames {
    let name = |state| format!("{of}.{state}");
    IntentNames { pending: name("pending"), decided: name("decided"), void: name("void") }
}

fn why(refused: ClientError) -> String {
    match refused {
        ClientError::Refused(Refusal::Failed { detail }) => detail,
        other => panic!("{other}"),
    }
}

#[test]
fn a_disk_whose_swap_fails_says_so_and_goes_on_when_it_can() {
    let place = Place::new();
    let _tapdisk = place.ready();
    let mut socket = place.nbd();
    assert_eq!(write(&mut socket, 0, &[1; 512]), 0);
    let leaf = place.stats().leaf.unwrap();
    let (child, base) = prepare(&place, &leaf);
    let intent = names("intent");
    let mut control = place.control();
    let base = Some(base.as_str().to_owned());
    let order = Request::Prepare { intent: intent.clone(), leaf, child: Some(child.clone()), base };
    assert_eq!(control.call(order).unwrap(), Reply::Done);
    let pause = Request::Pause { intent: intent.clone(), limit_ms: 60_000 };
    assert!(matches!(control.call(pause).unwrap(), Reply::Paused { .. }));

    let folder = place.path("sr");
    let Some(frozen) = Frozen::new(&folder) else {
        eprintln!("!! SKIPPED: this test needs root, and a filesystem with chattr +i");
        assert!(std::env::var("CI").as_deref() != Ok("true"), "in CI nothing is skipped");
        return;
    };
    let resume = Request::Resume { intent, swap: true };
    let told = why(control.call(resume.clone()).unwrap_err());
    assert!(told.contains(&child.volume) && told.contains("not permitted"), "{told}");
    let state = place.stats().state;
    assert!(state.starts_with(&format!("stuck: {} cannot take the name", child.volume)), "{state}");
    // Whoever asked may be gone; anybody may ask again, and for nothing else.
    drop(control);
    let again = why(place.control().call(resume.clone()).unwrap_err());
    assert!(again.contains("not permitted"), "{again}");
    let other = Request::Pause { intent: names("other"), limit_ms: 1 };
    assert!(place.control().call(other).is_err());

    std::thread::scope(|scope| {
        let guest = scope.spawn(|| write(&mut socket, 4096, &[2; 512]));
        let deadline = Instant::now() + Duration::from_secs(20);
        while place.stats().held == 0 {
            assert!(Instant::now() < deadline, "the write is held");
            std::thread::sleep(Duration::from_millis(5));
        }
        assert!(!guest.is_finished(), "a snapshot must not change");
        drop(frozen);
        assert_eq!(place.control().call(resume).unwrap(), Reply::Done);
        assert_eq!(guest.join().unwrap(), 0);
    });
    let stats = place.stats();
    assert_eq!((stats.state.as_str(), stats.leaf.unwrap().footer), ("running", child.footer));
    assert_eq!(read(&mut place.nbd(), 0, 512), [1; 512]);
    assert_eq!(read(&mut place.nbd(), 4096, 512), [2; 512]);
}
