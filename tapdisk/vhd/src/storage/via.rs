//! Volumes that pass everything on to others, but for what a test wants to
//! see or to change.

use std::fmt::Debug;
use std::io;
use std::sync::Arc;

use super::{Access, Space, Stamp, Volume, VolumeName, Volumes, Why};

/// What a test wants to see or to change; all else is passed on.
pub trait Delegate: Send + Sync + Debug {
    /// Where everything goes.
    fn inner(&self) -> &dyn Volumes;

    /// A volume is about to be opened.
    fn opening(&self, _name: &VolumeName) {}

    /// A record was deleted.
    fn record_deleted(&self, _name: &str) {}

    /// Names of the records.
    ///
    /// # Errors
    /// As [`Volumes::records`].
    fn records(&self) -> io::Result<Vec<String>> {
        self.inner().records()
    }

    /// Room on the repository.
    ///
    /// # Errors
    /// As [`Volumes::space`].
    fn space(&self) -> io::Result<Space> {
        self.inner().space()
    }
}

/// The volumes of a [`Delegate`].
#[derive(Debug)]
pub struct Via<T>(pub T);

impl<T: Delegate> Volumes for Via<T> {
    fn list(&self) -> io::Result<Vec<VolumeName>> {
        self.0.inner().list()
    }
    fn create(&self, name: &VolumeName) -> io::Result<Arc<dyn Volume>> {
        self.0.inner().create(name)
    }
    fn open(&self, name: &VolumeName, access: Access) -> io::Result<Arc<dyn Volume>> {
        self.0.opening(name);
        self.0.inner().open(name, access)
    }
    fn rename(&self, from: &VolumeName, to: &VolumeName) -> io::Result<()> {
        self.0.inner().rename(from, to)
    }
    fn lay_aside(&self, over: &VolumeName, aside: &VolumeName) -> io::Result<()> {
        self.0.inner().lay_aside(over, aside)
    }
    fn swap(&self, new: &VolumeName, over: &VolumeName, aside: &VolumeName) -> io::Result<()> {
        self.0.inner().swap(new, over, aside)
    }
    fn delete(&self, name: &VolumeName) -> io::Result<()> {
        self.0.inner().delete(name)
    }
    fn same(&self, a: &VolumeName, b: &VolumeName) -> io::Result<bool> {
        self.0.inner().same(a, b)
    }
    fn sync(&self, why: Why) -> io::Result<()> {
        self.0.inner().sync(why)
    }
    fn space(&self) -> io::Result<Space> {
        self.0.space()
    }
    fn stamp(&self, name: &VolumeName) -> io::Result<Option<Stamp>> {
        self.0.inner().stamp(name)
    }
    fn records(&self) -> io::Result<Vec<String>> {
        self.0.records()
    }
    fn record(&self, name: &str) -> io::Result<Option<Vec<u8>>> {
        self.0.inner().record(name)
    }
    fn put_record(&self, name: &str, bytes: &[u8], why: Why) -> io::Result<()> {
        self.0.inner().put_record(name, bytes, why)
    }
    fn rename_record(&self, from: &str, to: &str) -> io::Result<bool> {
        self.0.inner().rename_record(from, to)
    }
    fn delete_record(&self, name: &str, why: Why) -> io::Result<()> {
        self.0.inner().delete_record(name, why)?;
        self.0.record_deleted(name);
        Ok(())
    }
    fn sync_records(&self, why: Why) -> io::Result<()> {
        self.0.inner().sync_records(why)
    }
}
