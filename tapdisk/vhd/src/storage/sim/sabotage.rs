//! What can be made to go wrong on purpose: the simulator's teeth.
//!
//! A test enumerates [`SimDisk::whys`](super::SimDisk::whys) of a good run,
//! leaves out one step at a time, and demands that some crash state then
//! fails. A step that can be left out unpunished is either not needed or not
//! tested.

use std::io;
use std::sync::Arc;

use super::super::{Access, FileVolumes, Space, Volume, VolumeName, Volumes, Why};
use super::disk::SimDisk;
use super::effect::Lasting;
use super::log::What;

/// Kinds of labelled step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Step {
    /// [`Volume::flush`], or a flush in flight.
    Flush,
    /// [`Fs::sync_names`](super::super::Fs::sync_names) and what ends in it.
    SyncNames,
    /// [`Volumes::put_record`] or [`Volumes::delete_record`], as a whole.
    Record,
    /// A change of names, as a whole: [`Volumes::rename`], [`Volumes::swap`],
    /// [`Volumes::lay_aside`], [`Volumes::delete`],
    /// [`Volumes::rename_record`], or a rename in flight. Of a swap that is two
    /// renames, either.
    /// The callers give no label; what is named tells.
    Name,
    /// Waiting for the completion of an operation that was begun with
    /// [`SimDisk::begin`].
    Wait,
    /// What a [`Volume::copy_from`] copies beyond a block: the bitmaps and the
    /// data of its neighbours.
    Neighbours,
}

/// A step left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Sabotage {
    /// A flush of this label makes nothing durable.
    SkipFlush(Why),
    /// A sync of names of this label makes nothing durable.
    SkipSyncNames(Why),
    /// A record of this label is not written, or not deleted.
    SkipRecord(Why),
    /// A change of names of this label is reported done and is not.
    SkipName(Why),
    /// An operation begun with this label is reported complete at once
    /// ([`SimOp::early`](super::SimOp::early)), while it stays in flight.
    EarlyCompletion(Why),
    /// A copy of several blocks of this label copies the first alone.
    ShortCopy(Why),
}

impl Sabotage {
    /// What leaves out this step.
    #[must_use]
    pub fn of(step: Step, why: Why) -> Self {
        match step {
            Step::Flush => Self::SkipFlush(why),
            Step::SyncNames => Self::SkipSyncNames(why),
            Step::Record => Self::SkipRecord(why),
            Step::Name => Self::SkipName(why),
            Step::Wait => Self::EarlyCompletion(why),
            Step::Neighbours => Self::ShortCopy(why),
        }
    }

    pub(super) fn hits(&self, step: Step, why: Why) -> bool {
        *self == Self::of(step, why)
    }
}

/// Classes of operation, for [`Fault`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum OpClass {
    /// Reading bytes.
    Read,
    /// Writing bytes.
    Write,
    /// Zeroing or punching.
    Zero,
    /// Setting a length, a device's too.
    SetLen,
    /// Copying between files.
    Copy,
    /// Flushing a file.
    Flush,
    /// Creating, linking, renaming, unlinking, making a folder or device.
    Name,
    /// Syncing names.
    SyncNames,
}

impl OpClass {
    pub(super) fn of(what: &What) -> Self {
        match what {
            What::Write { .. } => Self::Write,
            What::Zero { .. } => Self::Zero,
            What::SetLen { .. } | What::Lasting(Lasting::Resize { .. }) => Self::SetLen,
            What::Copy { .. } => Self::Copy,
            What::Flush { .. } => Self::Flush,
            What::SyncNames { .. } => Self::SyncNames,
            What::Create { .. }
            | What::Link { .. }
            | What::Rename { .. }
            | What::Unlink { .. }
            | What::MakeFolder { .. }
            | What::Lasting(_) => Self::Name,
        }
    }
}

/// Operations that fail: after `after` more of the class, the next `times` of
/// them end with `errno` and have no effect. A failed flush drops what it
/// should have covered, as Linux does: no later flush writes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    /// Which operations; `None` for all.
    pub class: Option<OpClass>,
    /// How many of them go well first.
    pub after: u64,
    /// How many fail then.
    pub times: u64,
    /// With what, such as `libc::EIO`.
    pub errno: i32,
}

/// A [`FileVolumes`] whose records and changes of names can be left out.
#[derive(Debug)]
pub(super) struct SimVolumes {
    files: FileVolumes,
    disk: SimDisk,
}

impl SimVolumes {
    pub(super) fn new(disk: SimDisk) -> Self {
        Self { files: FileVolumes::new(Arc::new(disk.clone())), disk }
    }

    fn left_out(&self, why: Why) -> bool {
        self.disk.with(|live| live.family.meets(Step::Record, why))
    }

    fn unnamed(&self, why: Why) -> bool {
        self.disk.with(|live| live.family.meets(Step::Name, why))
    }
}

impl Volumes for SimVolumes {
    fn list(&self) -> io::Result<Vec<VolumeName>> {
        self.files.list()
    }

    fn create(&self, name: &VolumeName) -> io::Result<Arc<dyn Volume>> {
        self.files.create(name)
    }

    fn open(&self, name: &VolumeName, access: Access) -> io::Result<Arc<dyn Volume>> {
        self.files.open(name, access)
    }

    fn rename(&self, from: &VolumeName, to: &VolumeName) -> io::Result<()> {
        match self.unnamed("a prepared image gets its name") {
            true => Ok(()),
            false => self.files.rename(from, to),
        }
    }

    fn lay_aside(&self, over: &VolumeName, aside: &VolumeName) -> io::Result<()> {
        match self.unnamed("an image gets a second name") {
            true => Ok(()),
            false => self.files.lay_aside(over, aside),
        }
    }

    fn swap(&self, new: &VolumeName, over: &VolumeName, aside: &VolumeName) -> io::Result<()> {
        let why = match new.temporary_of() {
            Some(_) => "a prepared image takes a disk's name",
            None => "a parent takes its leaf's name",
        };
        match self.unnamed(why) {
            true => Ok(()),
            false => self.files.swap(new, over, aside),
        }
    }

    fn delete(&self, name: &VolumeName) -> io::Result<()> {
        let why = if name.temporary_of().is_some() { "a leftover goes" } else { "an image goes" };
        match self.unnamed(why) {
            true => Ok(()),
            false => self.files.delete(name),
        }
    }

    fn same(&self, a: &VolumeName, b: &VolumeName) -> io::Result<bool> {
        self.files.same(a, b)
    }

    fn sync(&self, why: Why) -> io::Result<()> {
        self.files.sync(why)
    }

    fn space(&self) -> io::Result<Space> {
        self.files.space()
    }

    fn records(&self) -> io::Result<Vec<String>> {
        self.files.records()
    }

    fn record(&self, name: &str) -> io::Result<Option<Vec<u8>>> {
        self.files.record(name)
    }

    fn put_record(&self, name: &str, bytes: &[u8], why: Why) -> io::Result<()> {
        match self.left_out(why) {
            true => Ok(()),
            false => self.files.put_record(name, bytes, why),
        }
    }

    fn rename_record(&self, from: &str, to: &str) -> io::Result<bool> {
        let why = if to.ends_with("void") { "a record becomes void" } else { "a record is decided" };
        match self.unnamed(why) {
            true => Ok(true),
            false => self.files.rename_record(from, to),
        }
    }

    fn delete_record(&self, name: &str, why: Why) -> io::Result<()> {
        match self.left_out(why) {
            true => Ok(()),
            false => self.files.delete_record(name, why),
        }
    }

    fn sync_records(&self, why: Why) -> io::Result<()> {
        self.files.sync_records(why)
    }
}
