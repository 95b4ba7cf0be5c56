//! A repository that is a folder of image files.
//!
//! ```text
//!   <root>/<uuid>.vhd            a volume
//!   <root>/tmp-<intent>-0.vhd    a prepared volume
//!   <root>/.coppice/journal/<record>
//!   <root>/.coppice/journal/.<record>.tmp   half a record: ignored, cleaned
//! ```
//!
//! Written once over [`Fs`], so that the crash simulator runs this very code.
//!
//! Absent on purpose: what a record says, and locks wider than one file.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::{Access, Fs, Space, Stamp, Volume, VolumeName, Volumes, Why};

/// Where records live.
const JOURNAL: &str = ".coppice/journal";
/// The largest record that is read; ours are a few KiB even for a group
/// snapshot of hundreds of disks.
const RECORD_BYTES_MAX: u64 = 16 << 20;
/// The longest record name, so that its temporary name fits in 255 bytes.
const RECORD_NAME_BYTES_MAX: usize = 240;

/// The volumes and records of a file repository.
#[derive(Debug)]
pub struct FileVolumes {
    fs: Arc<dyn Fs>,
    journal_made: AtomicBool,
}

impl FileVolumes {
    /// Over the folder that is the root of `fs`. Touches nothing yet.
    #[must_use]
    pub fn new(fs: Arc<dyn Fs>) -> Self {
        Self { fs, journal_made: AtomicBool::new(false) }
    }

    /// The filesystem below.
    #[must_use]
    pub fn fs(&self) -> &Arc<dyn Fs> {
        &self.fs
    }

    fn make_journal(&self) -> io::Result<()> {
        if !self.journal_made.load(Ordering::Acquire) {
            self.fs.make_folder(JOURNAL)?;
            self.journal_made.store(true, Ordering::Release);
        }
        Ok(())
    }

    /// A locked, empty file under the temporary name. A leftover of a crash
    /// is taken over; one that somebody is writing now is `WouldBlock`.
    fn temporary(&self, path: &str) -> io::Result<Arc<dyn Volume>> {
        match self.fs.create(path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                let file = self.fs.open(path, Access::Write)?;
                file.set_len(0)?;
                Ok(file)
            }
            other => other,
        }
    }

    /// Removes half-written records. Whoever is writing one holds its lock,
    /// and looks after locking whether the name is still there. Best effort:
    /// what stays is ignored.
    fn clean(&self, leftovers: &[String]) {
        for name in leftovers {
            let path = format!("{JOURNAL}/{name}");
            if let Ok(lock) = self.fs.open(&path, Access::Write) {
                let _ = self.fs.unlink(&path);
                drop(lock);
            }
        }
    }
}

/// The path of a record; refused if the name could lead elsewhere or be taken
/// for a temporary one.
fn record_path(name: &str) -> io::Result<String> {
    if VolumeName::new(name).is_none() || name.len() > RECORD_NAME_BYTES_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a record name"));
    }
    Ok(format!("{JOURNAL}/{name}"))
}

fn is_temporary(name: &str) -> bool {
    name.starts_with('.')
}

/// `false` instead of `NotFound`.
fn found(result: io::Result<()>) -> io::Result<bool> {
    match result {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

impl Volumes for FileVolumes {
    fn list(&self) -> io::Result<Vec<VolumeName>> {
        let names = self.fs.list("")?;
        let image = |name: &String| name.ends_with(".vhd") || name.ends_with(".raw");
        Ok(names.iter().filter(|name| image(name)).filter_map(|n| VolumeName::new(n)).collect())
    }

    fn create(&self, name: &VolumeName) -> io::Result<Arc<dyn Volume>> {
        self.fs.create(name.as_str())
    }

    fn open(&self, name: &VolumeName, access: Access) -> io::Result<Arc<dyn Volume>> {
        self.fs.open(name.as_str(), access)
    }

    // rename(2) of two names of one file does nothing and keeps both; here
    // `from` must be gone afterwards, whatever it led to.
    fn rename(&self, from: &VolumeName, to: &VolumeName) -> io::Result<()> {
        if from != to && self.fs.same_file(from.as_str(), to.as_str())? {
            return self.fs.unlink(from.as_str());
        }
        self.fs.rename(from.as_str(), to.as_str())
    }

    fn lay_aside(&self, over: &VolumeName, aside: &VolumeName) -> io::Result<()> {
        self.fs.link(over.as_str(), aside.as_str())
    }

    fn swap(&self, new: &VolumeName, over: &VolumeName, _aside: &VolumeName) -> io::Result<()> {
        self.rename(new, over)
    }

    fn delete(&self, name: &VolumeName) -> io::Result<()> {
        found(self.fs.unlink(name.as_str())).map(|_| ())
    }

    fn same(&self, a: &VolumeName, b: &VolumeName) -> io::Result<bool> {
        self.fs.same_file(a.as_str(), b.as_str())
    }

    fn sync(&self, why: Why) -> io::Result<()> {
        self.fs.sync_names("", why)
    }

    fn space(&self) -> io::Result<Space> {
        self.fs.space()
    }

    fn stamp(&self, name: &VolumeName) -> io::Result<Option<Stamp>> {
        self.fs.stamp(name.as_str())
    }

    fn records(&self) -> io::Result<Vec<String>> {
        let names = match self.fs.list(JOURNAL) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            names => names?,
        };
        let (leftovers, records): (Vec<_>, Vec<_>) = names.into_iter().partition(|name| is_temporary(name));
        self.clean(&leftovers);
        Ok(records)
    }

    fn record(&self, name: &str) -> io::Result<Option<Vec<u8>>> {
        let file = match self.fs.open(&record_path(name)?, Access::Read) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            file => file?,
        };
        let len = file.len()?;
        if len > RECORD_BYTES_MAX {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "record too large"));
        }
        let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
        file.read_at(&mut bytes, 0)?;
        Ok(Some(bytes))
    }

    // Whole or not at all, at every instant:
    //   1. the bytes go to a temporary name, which no reader considers;
    //      crash: a leftover, cleaned by the next `records`.
    //   2. flush: from here on the file's content is certain, so whichever
    //      name leads to it leads to all of it.
    //   3. rename: readers see old or new. Power cut: old or new, since a
    //      rename is atomic on disk as well, and new is whole by step 2.
    //   4. names synced: new. Only now the caller may rely on it.
    fn put_record(&self, name: &str, bytes: &[u8], why: Why) -> io::Result<()> {
        let path = record_path(name)?;
        let temporary = format!("{JOURNAL}/.{name}.tmp");
        self.make_journal()?;
        let file = self.temporary(&temporary)?;
        file.write_at(bytes, 0)?;
        file.flush(why)?;
        self.fs.rename(&temporary, &path)?;
        self.fs.sync_names(JOURNAL, why)
    }

    fn rename_record(&self, from: &str, to: &str) -> io::Result<bool> {
        found(self.fs.rename(&record_path(from)?, &record_path(to)?))
    }

    // Synced also if it was gone: whoever removed it may have died before
    // syncing, and our caller is told "durable".
    fn delete_record(&self, name: &str, why: Why) -> io::Result<()> {
        self.make_journal()?;
        found(self.fs.unlink(&record_path(name)?))?;
        self.fs.sync_names(JOURNAL, why)
    }

    fn sync_records(&self, why: Why) -> io::Result<()> {
        self.make_journal()?;
        self.fs.sync_names(JOURNAL, why)
    }
}
