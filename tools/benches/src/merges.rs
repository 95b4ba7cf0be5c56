//! Merges to be timed: a repository with a chain to merge, and each way there
//! is to do it, run once from its record to the end.

use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use gc::candidates::Merge;
use gc::job::Job;
use gc::watch::{Aborted, Event, Watch};
use sm::Repo;
use sm::attached::AttachedSr;
use sm::owner::{HostId, Owner};
use sm::state::SrType;
use tapdisk_control::{ImageRef, MergePhase, Reply, Request};
use uuid::Uuid;

use crate::bench::Bench;
use crate::images::{Fill, Image, Images, drop_from_cache};
use crate::procs::Server;

/// Between two looks at a merge that a tapdisk runs.
const POLL: Duration = Duration::from_millis(1);

/// Who merges what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// Hidden into hidden, by the collector.
    Inner,
    /// A leaf nobody has attached, by the collector.
    Detached,
    /// A leaf that is served, by its tapdisk.
    Attached,
}

/// What is merged.
#[derive(Debug, Clone, Copy)]
pub struct Content {
    /// Size of the disk.
    pub virtual_bytes: u64,
    /// What the parent has.
    pub parent: Fill,
    /// What goes into it.
    pub source: Fill,
}

/// Makes the images in a folder below `dir` and merges them. The time is that
/// until the parent has everything durably, as for any copy; that of a
/// tapdisk's merge is the whole, its space given back on the way.
///
/// # Errors
/// What the disk or the merge said.
pub fn time(bench: &Bench, dir: &Path, content: &Content, way: Way) -> anyhow::Result<Duration> {
    let images = Images::new(dir)?;
    let (source, parent, repo) = pair(&images, content)?;
    if way == Way::Inner {
        make(&images, content, Fill::Empty, Some(&source))?;
        sm::image::set_hidden(&repo, &source.volume, true)?;
    }
    for image in [&parent, &source] {
        drop_from_cache(&images.repository().join(image.volume.as_str()))?;
    }
    let uuid = |image: &Image| image.volume.uuid().context("a volume of a VDI");
    match way {
        Way::Inner => {
            by_collector(&repo, &Merge::Inner { sources: vec![uuid(&source)?], parent: uuid(&parent)? })
        }
        Way::Detached => {
            let (vdi, parent) = (uuid(&source)?, uuid(&parent)?);
            by_collector(&repo, &Merge::Leaf { vdi, parent, attached: false })
        }
        Way::Attached => {
            drop(repo);
            by_tapdisk(bench, &images, &source, &parent)
        }
    }
}

fn make(images: &Images, content: &Content, fill: Fill, parent: Option<&Image>) -> anyhow::Result<Image> {
    images.image(&format!("{}.vhd", Uuid::new_v4()), content.virtual_bytes, fill, parent)
}

/// What is merged, what it goes into, which is hidden, and the repository.
fn pair(images: &Images, content: &Content) -> anyhow::Result<(Image, Image, Repo)> {
    let parent = make(images, content, content.parent, None)?;
    let source = make(images, content, content.source, Some(&parent))?;
    let repo = repo(images)?;
    sm::image::set_hidden(&repo, &parent.volume, true)?;
    Ok((source, parent, repo))
}

/// A leaf that can be merged by its tapdisk, and its parent.
///
/// # Errors
/// What the disk said.
pub fn leaf_and_parent(images: &Images, content: &Content) -> anyhow::Result<(Image, Image)> {
    let (leaf, parent, _repo) = pair(images, content)?;
    Ok((leaf, parent))
}

fn by_collector(repo: &Repo, merge: &Merge) -> anyhow::Result<Duration> {
    let watch = CopyWatch::default();
    let (job, intent) = Job::begin(repo, &watch, merge)?;
    job.carry_on(intent)?;
    let clock = watch.clock();
    Ok(clock.copying)
}

/// Adds up the time from the beginning of a copy until it is durable; what is
/// read to choose the first blocks counts, too.
#[derive(Debug, Default)]
struct CopyWatch(Mutex<Clock>);

#[derive(Debug, Default)]
struct Clock {
    copying: Duration,
    /// When what is not durable yet began to be copied.
    since: Option<Instant>,
}

impl CopyWatch {
    fn clock(&self) -> MutexGuard<'_, Clock> {
        // A clock is whole between any two statements.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Watch for CopyWatch {
    fn now(&self) -> Duration {
        Duration::ZERO
    }

    fn sleep(&self, time: Duration) -> Result<(), Aborted> {
        std::thread::sleep(time);
        Ok(())
    }

    fn allow(&self, _bytes: u64) -> Result<(), Aborted> {
        self.clock().since.get_or_insert_with(Instant::now);
        Ok(())
    }

    fn note(&self, event: Event) {
        let mut clock = self.clock();
        match event {
            Event::Total(_) => clock.since = Some(Instant::now()),
            Event::Durable => {
                if let Some(since) = clock.since.take() {
                    clock.copying += since.elapsed();
                }
            }
            _ => {}
        }
    }

    fn rate(&self) -> u64 {
        0
    }
}

fn by_tapdisk(bench: &Bench, images: &Images, leaf: &Image, parent: &Image) -> anyhow::Result<Duration> {
    let server = Server::tapdisk(&bench.tap, images, leaf, &[])?;
    let phases = of_served(&server, leaf, parent)?;
    Ok(phases.committed - phases.began)
}

/// When what of a tapdisk's merge happened.
#[derive(Debug, Clone, Copy)]
pub struct Phases {
    /// It was ordered.
    pub began: Instant,
    /// All was found to have moved, and the commit was ordered.
    pub empty: Instant,
    /// That was answered.
    pub committed: Instant,
}

/// Merges a served leaf into its parent, at full speed.
///
/// # Errors
/// What its tapdisk said.
pub fn of_served(server: &Server, leaf: &Image, parent: &Image) -> anyhow::Result<Phases> {
    let named = |image: &Image| ImageRef { volume: image.volume.as_str().to_owned(), footer: image.footer };
    let (leaf, parent) = (named(leaf), named(parent));
    let mut control = server.control()?;
    let began = Instant::now();
    let (l, p) = (leaf.clone(), parent.clone());
    // As the collector does where there is room.
    let extra_blocks_max = gc::limits::ROOMY_SLICE_GAINED_MAX;
    control.call(Request::MergeStart { leaf: l, parent: p, rate_bytes_per_s: 0, extra_blocks_max })?;
    loop {
        let Reply::Merge(status) = control.call(Request::MergeStatus)? else { bail!("no status of a merge") };
        match status.phase {
            MergePhase::Empty => break,
            MergePhase::Starting | MergePhase::Moving => std::thread::sleep(POLL),
            other => bail!("the merge is {other:?}: {:?}", status.error),
        }
    }
    let empty = Instant::now();
    control.call(Request::MergeCommit { leaf, parent, aside: None })?;
    Ok(Phases { began, empty, committed: Instant::now() })
}

/// The folder as the SR it would be.
fn repo(images: &Images) -> anyhow::Result<Repo> {
    let id = HostId { host: Uuid::from_u128(1), boot: Uuid::from_u128(2) };
    let owner = Owner::acquire(&images.repository(), id)?;
    let run = images.run_folder().join("gc");
    std::fs::create_dir_all(run.join("sr"))?;
    let attached = AttachedSr {
        uuid: Uuid::new_v4(),
        name: "bench".to_owned(),
        kind: SrType::File,
        path: images.repository(),
        epoch: owner.epoch,
        id,
    };
    Ok(attached.open_owned(&run, owner, None)?.repo)
}
