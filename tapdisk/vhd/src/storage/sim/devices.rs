//! A repository whose volumes are devices, as a volume manager keeps them.
//!
//! Fixed lengths that only [`Volume::extend`] and [`Volume::reduce`] change, in
//! whole extents; litter in new space; one name for each device, and no way to
//! take a name that is in use; records beside the volumes. Every change is
//! indivisible and durable at once, so there is nothing to sync.

use std::io;
use std::sync::Arc;

use super::super::{Access, Fs, Space, Volume, VolumeName, Volumes, Why};
use super::disk::SimDisk;
use super::effect::{Ino, Lasting};
use super::live::RENAME;
use super::log::What;
use super::sabotage::Step;

/// Bytes by which a device grows and shrinks.
pub(super) const EXTENT: u64 = 1 << 20;

/// Labels the first rename of a swap.
pub(super) const ASIDE: Why = "what had the name steps aside";

/// See the module.
#[derive(Debug)]
pub(super) struct SimDevices {
    disk: SimDisk,
}

impl SimDevices {
    pub(super) fn new(disk: SimDisk) -> Self {
        Self { disk }
    }

    /// Whether a step of this label is left out.
    fn left_out(&self, step: Step, why: Why) -> bool {
        self.disk.with(|live| live.family.meets(step, why))
    }

    fn change(&self, change: Lasting) -> io::Result<()> {
        self.disk.change(What::Lasting(change), RENAME)
    }

    fn is_there(&self, name: &VolumeName) -> io::Result<bool> {
        self.same(name, name)
    }

    fn rename_as(&self, from: &VolumeName, to: &VolumeName, why: Why) -> io::Result<()> {
        match self.left_out(Step::Name, why) {
            true => Ok(()),
            false => self.change(Lasting::Rename { from: from.as_str().into(), to: to.as_str().into() }),
        }
    }
}

/// `false` instead of `NotFound`.
fn found(result: io::Result<()>) -> io::Result<bool> {
    match result {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

impl Volumes for SimDevices {
    fn list(&self) -> io::Result<Vec<VolumeName>> {
        let names = self.disk.list("")?;
        let image = |name: &String| name.ends_with(".vhd") || name.ends_with(".raw");
        Ok(names.iter().filter(|name| image(name)).filter_map(|n| VolumeName::new(n)).collect())
    }

    // One extent: whoever fills it asks for more.
    fn create(&self, name: &VolumeName) -> io::Result<Arc<dyn Volume>> {
        self.disk.with(|live| {
            let ino = Ino(live.state.next_ino);
            let make = Lasting::Make { path: name.as_str().into(), ino, len: EXTENT };
            live.run(self.disk.process, What::Lasting(make), "make device")?;
            self.disk.handle(live, ino, Access::Write)
        })
    }

    fn open(&self, name: &VolumeName, access: Access) -> io::Result<Arc<dyn Volume>> {
        Fs::open(&self.disk, name.as_str(), access)
    }

    fn rename(&self, from: &VolumeName, to: &VolumeName) -> io::Result<()> {
        self.rename_as(from, to, "a prepared image gets its name")
    }

    // A device has one name.
    fn lay_aside(&self, _over: &VolumeName, _aside: &VolumeName) -> io::Result<()> {
        Ok(())
    }

    // Two renames. What a crash leaves between them is told by the names
    // alone, and calling this again goes on from there.
    fn swap(&self, new: &VolumeName, over: &VolumeName, aside: &VolumeName) -> io::Result<()> {
        if !self.is_there(new)? {
            let done = self.is_there(over)?;
            return if done { Ok(()) } else { Err(io::ErrorKind::NotFound.into()) };
        }
        if self.is_there(over)? {
            self.rename_as(over, aside, ASIDE)?;
        }
        let why = match new.temporary_of() {
            Some(_) => "a prepared image takes a disk's name",
            None => "a parent takes its leaf's name",
        };
        self.rename_as(new, over, why)
    }

    fn delete(&self, name: &VolumeName) -> io::Result<()> {
        let why = if name.temporary_of().is_some() { "a leftover goes" } else { "an image goes" };
        match self.left_out(Step::Name, why) {
            true => Ok(()),
            false => found(self.change(Lasting::Remove { path: name.as_str().into() })).map(drop),
        }
    }

    fn same(&self, a: &VolumeName, b: &VolumeName) -> io::Result<bool> {
        self.disk.same_file(a.as_str(), b.as_str())
    }

    fn sync(&self, _why: Why) -> io::Result<()> {
        Ok(())
    }

    fn space(&self) -> io::Result<Space> {
        self.disk.space()
    }

    fn records(&self) -> io::Result<Vec<String>> {
        self.disk.with(|live| {
            live.alive(self.disk.process)?;
            Ok(live.state.records.keys().map(ToString::to_string).collect())
        })
    }

    fn record(&self, name: &str) -> io::Result<Option<Vec<u8>>> {
        self.disk.with(|live| {
            live.alive(self.disk.process)?;
            Ok(live.state.records.get(name).map(|bytes| bytes.to_vec()))
        })
    }

    fn put_record(&self, name: &str, bytes: &[u8], why: Why) -> io::Result<()> {
        match self.left_out(Step::Record, why) {
            true => Ok(()),
            false => self.change(Lasting::PutRecord { name: name.into(), bytes: bytes.into() }),
        }
    }

    fn rename_record(&self, from: &str, to: &str) -> io::Result<bool> {
        let why = if to.ends_with("void") { "a record becomes void" } else { "a record is decided" };
        match self.left_out(Step::Name, why) {
            true => Ok(true),
            false => found(self.change(Lasting::RenameRecord { from: from.into(), to: to.into() })),
        }
    }

    fn delete_record(&self, name: &str, why: Why) -> io::Result<()> {
        match self.left_out(Step::Record, why) {
            true => Ok(()),
            false => self.change(Lasting::RemoveRecord { name: name.into() }),
        }
    }

    fn sync_records(&self, _why: Why) -> io::Result<()> {
        Ok(())
    }
}
