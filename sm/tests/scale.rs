//! Large SRs: what an operation reads is counted, not timed.
//!
//! `COPPICE_SCALE_VDIS` says how many disks; CI takes few.

#![allow(clippy::unwrap_used, reason = "a helper of tests fails by panicking")]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use sm::attached::AttachedSr;
use sm::heads::Heads;
use sm::owner::{HostId, Owner};
use sm::state::SrType;
use sm::verified::Verified;
use sm::views::Look;
use sm::{Repo, ops, scan};
use uuid::Uuid;
use vhd::storage::via::{Delegate, Via};
use vhd::storage::{VolumeName, Volumes};

/// Longer than a stamp must be old to be trusted.
const SETTLED: Duration = Duration::from_millis(1300);

fn disks() -> usize {
    std::env::var("COPPICE_SCALE_VDIS").map_or(2000, |text| text.parse().unwrap())
}

/// Counts the images that are opened.
#[derive(Debug)]
struct Counting {
    inner: Arc<dyn Volumes>,
    opened: Arc<AtomicU64>,
}

impl Delegate for Counting {
    fn inner(&self) -> &dyn Volumes {
        self.inner.as_ref()
    }
    fn opening(&self, _name: &VolumeName) {
        self.opened.fetch_add(1, Ordering::Relaxed);
    }
}

struct Sr {
    _folder: tempfile::TempDir,
    path: PathBuf,
    repo: Repo,
    opened: Arc<AtomicU64>,
}

impl Sr {
    fn new() -> Self {
        // Where syncs cost nothing; it must keep times of birth.
        let folder = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
        let (path, run) = (folder.path().join("sr"), folder.path().join("run"));
        std::fs::create_dir(&path).unwrap();
        let id = HostId { host: Uuid::from_u128(1), boot: Uuid::from_u128(2) };
        let owner = Owner::acquire(&path, id).unwrap();
        let (name, kind, epoch) = ("large".into(), SrType::File, owner.epoch);
        let attached = AttachedSr { uuid: Uuid::from_u128(3), name, kind, path: path.clone(), epoch, id };
        let mut repo = attached.open_owned(&run, owner, None).unwrap().repo;
        let opened = Arc::new(AtomicU64::new(0));
        repo.volumes = Arc::new(Via(Counting { inner: repo.volumes, opened: opened.clone() }));
        Self { _folder: folder, path, repo, opened }
    }

    fn image(&self, vdi: Uuid) -> PathBuf {
        self.path.join(format!("{vdi}.vhd"))
    }

    /// How many images `work` opens.
    fn opens<T>(&self, work: impl FnOnce(&Repo) -> T) -> (T, u64) {
        let before = self.opened.load(Ordering::Relaxed);
        let done = work(&self.repo);
        (done, self.opened.load(Ordering::Relaxed) - before)
    }

    /// As another process would start: nothing is known.
    fn forget(&mut self) {
        self.repo.heads = Arc::new(Heads::with(Verified::open(&self.path.join(".coppice")).unwrap()));
    }
}

/// Changes a byte that no header holds, as a guest's write would.
fn touch(image: &Path) {
    let bytes = std::fs::read(image).unwrap();
    std::fs::write(image, bytes).unwrap();
}

#[test]
fn scans_lists_and_single_looks_read_in_proportion_to_what_changed() {
    let mut sr = Sr::new();
    let n = disks();
    let (made, opens) = sr.opens(|repo| {
        (0..n).map(|i| ops::create(repo, &format!("disk {i}"), 4 << 20).unwrap()).collect::<Vec<_>>()
    });
    assert!(opens <= 2 * n as u64, "creating {n} disks opened {opens}");
    std::thread::sleep(SETTLED);
    sr.forget();

    let (found, opens) = sr.opens(|repo| scan::scan(repo).unwrap().tree.nodes.len());
    assert_eq!((found, opens), (n, n as u64), "the first scan opens each image once");
    let (_, opens) = sr.opens(|repo| scan::scan(repo).unwrap());
    assert_eq!(opens, 0, "nothing has changed");
    let (listed, opens) = sr.opens(|repo| Look::at(repo).unwrap().vdis(false).len());
    assert_eq!((listed, opens), (n, n as u64), "the first list reads each block table once");
    let (_, opens) = sr.opens(|repo| {
        let look = Look::at(repo).unwrap();
        (look.vdis(false), look.roots())
    });
    assert_eq!(opens, 0);

    touch(&sr.image(made[n / 2]));
    std::fs::remove_file(sr.image(made[0])).unwrap();
    std::thread::sleep(SETTLED);
    let (found, opens) = sr.opens(|repo| scan::scan(repo).unwrap().tree.nodes.len());
    assert_eq!((found, opens), (n - 1, 1), "one image has changed, one is gone");

    let snapshot = |repo: &Repo| {
        let wanted = [ops::Wanted { vdi: made[1], name: "s".into() }];
        ops::snapshot(repo, sm::journal::SiblingKind::Snapshot, &wanted).unwrap()[0]
    };
    let (s, opens) = sr.opens(snapshot);
    assert!(opens < 40, "a snapshot opened {opens}");
    let (view, opens) = sr.opens(|repo| Look::of(repo, s).unwrap().one(s).unwrap());
    assert!(opens < 10, "showing one disk opened {opens}");
    assert_eq!((view.name.as_str(), view.depth), ("s", 1));
    let (_, opens) = sr.opens(|repo| ops::delete(repo, s).unwrap());
    assert!(opens < 20, "a delete opened {opens}");
}

#[test]
fn what_changed_just_now_is_not_trusted_to_its_stamp() {
    let sr = Sr::new();
    let vdi = ops::create(&sr.repo, "d", 4 << 20).unwrap();
    let hidden = |repo: &Repo| {
        let tree = scan::scan(repo).unwrap().tree;
        tree.nodes[tree.by_uuid(vdi).unwrap()].is_hidden()
    };
    for round in 0..20 {
        let want = round % 2 == 0;
        sm::image::set_hidden(&sr.repo, &VolumeName::vhd(vdi), want).unwrap();
        assert_eq!(hidden(&sr.repo), want, "round {round}");
    }
}

/// Two trees; an image of the first becomes unreadable.
#[test]
fn an_unreadable_image_holds_back_only_what_it_stood_on() {
    let mut sr = Sr::new();
    let make = |name: &str| {
        let vdi = ops::create(&sr.repo, name, 4 << 20).unwrap();
        // An image that holds something is divided by a snapshot.
        let owner = |repo: &Repo| {
            let mut writer =
                vhd::writer::Writer::open(repo.volumes.as_ref(), &VolumeName::vhd(vdi), repo.host.records())
                    .unwrap();
            let run = vhd::units::SectorRun { first: 0, count: 1 };
            writer.write(vhd::units::BlockNo(0), run, &[7; 512], false).unwrap();
            writer.commit().unwrap();
            writer.settle(None).unwrap();
        };
        owner(&sr.repo);
        let wanted = [ops::Wanted { vdi, name: "s".into() }];
        let s = ops::snapshot(&sr.repo, sm::journal::SiblingKind::Snapshot, &wanted).unwrap()[0];
        (vdi, s)
    };
    let ((one, _), (two, _)) = (make("one"), make("two"));
    std::thread::sleep(SETTLED);
    scan::scan(&sr.repo).unwrap();
    sr.repo.heads.note(&sr.repo).unwrap();

    let folder = sr.path.clone();
    let smear = |vdi: Uuid| {
        let path = folder.join(format!("{vdi}.vhd"));
        let mut bytes = std::fs::read(&path).unwrap();
        bytes.fill(0xEE);
        std::fs::write(path, bytes).unwrap();
    };
    smear(one);
    let tree = scan::scan(&sr.repo).unwrap().tree;
    let node = &tree.nodes[tree.by_uuid(one).unwrap()];
    let base = tree.nodes.iter().position(|node| node.is_hidden() && node.children.len() == 1).unwrap();
    assert_eq!(node.may_stand_on, Some(vec![base]), "its own base, by the record");
    assert_eq!(tree.parents_unknown().count(), 0);

    // Another process knows it too; a parent that was to be written counts.
    sr.forget();
    let other = tree.nodes[tree.nodes[tree.by_uuid(two).unwrap()].parent.unwrap()].clone();
    sr.repo.heads.expect(&sr.repo, &VolumeName::vhd(one), other.footer).unwrap();
    let tree = scan::scan(&sr.repo).unwrap().tree;
    let maybe = tree.nodes[tree.by_uuid(one).unwrap()].may_stand_on.clone().unwrap();
    assert_eq!(maybe.len(), 2);

    // A file that somebody put in its place is another image.
    let path = sr.image(one);
    let bytes = std::fs::read(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, bytes).unwrap();
    assert_eq!(scan::scan(&sr.repo).unwrap().tree.parents_unknown().count(), 1);

    // And so is everything once the SR may have been elsewhere.
    smear(two);
    assert_eq!(scan::scan(&sr.repo).unwrap().tree.parents_unknown().count(), 1);
    sr.repo.heads.void().unwrap();
    assert_eq!(scan::scan(&sr.repo).unwrap().tree.parents_unknown().count(), 2);
}
