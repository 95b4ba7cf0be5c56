//! Letting go of removed files where nobody waits for it.
//!
//! Whoever closes a removed file last waits until the filesystem has given its
//! space back, extent by extent. For an image of a hundred thousand extents
//! that takes seconds, and minutes where each is also told to the disk (mount
//! option `discard`). Neither a repository's lock nor a guest may wait for
//! that, so a thread closes. Whoever lets go waits for it only as long as
//! ordinary files take: space that was freed can then be counted on, as after
//! a plain close.
//!
//! A crash between removing and closing loses nothing: the filesystem frees
//! what has no name when it is next mounted.

use std::fs::File;
use std::mem::ManuallyDrop;
use std::ops::Deref;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::sync::OnceLock;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread;
use std::time::Duration;

/// Files that wait for the thread; one more is closed by who lets go of it.
const WAITING_MAX: usize = 256;
/// How long who lets go of a removed file waits for its end.
const WAIT_MAX: Duration = Duration::from_millis(20);
/// Files that take less are closed where they are.
const SMALL_BYTES: u64 = 1 << 20;

/// An open file that is not waited for when it was removed.
#[derive(Debug)]
pub(super) struct OpenFile(ManuallyDrop<File>);

impl From<File> for OpenFile {
    fn from(file: File) -> Self {
        Self(ManuallyDrop::new(file))
    }
}

impl Deref for OpenFile {
    type Target = File;

    fn deref(&self) -> &File {
        &self.0
    }
}

impl AsFd for OpenFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Drop for OpenFile {
    fn drop(&mut self) {
        // SAFETY: taken once, by the only drop there is; nothing uses the
        // field after it.
        let file = unsafe { ManuallyDrop::take(&mut self.0) };
        if takes_long(&file, 0) {
            static CLOSER: OnceLock<Option<Closer<File>>> = OnceLock::new();
            match CLOSER.get_or_init(Closer::start) {
                Some(closer) => closer.close(file),
                None => drop(file),
            }
        }
    }
}

/// Whether freeing the file may take long, once it has `names` left and is
/// closed for the last time.
pub(super) fn takes_long(file: &File, names: u64) -> bool {
    // A file that says nothing is closed as any other.
    file.metadata().is_ok_and(|meta| {
        meta.is_file() && meta.nlink() == names && meta.blocks().saturating_mul(512) > SMALL_BYTES
    })
}

/// A thread that drops things, with who waits for each.
struct Closer<T>(SyncSender<(T, SyncSender<()>)>);

impl<T: Send + 'static> Closer<T> {
    /// `None` if there is no thread to be had.
    fn start() -> Option<Self> {
        let (sender, queue) = sync_channel::<(T, SyncSender<()>)>(WAITING_MAX);
        let run = move || {
            for (file, ended) in queue {
                drop(file);
                let _ = ended.try_send(()); // who waited may have gone on
            }
        };
        thread::Builder::new().name("closer".into()).spawn(run).ok().map(|_| Self(sender))
    }

    /// Drops `file`, on the thread unless too much waits for it already.
    fn close(&self, file: T) {
        let (end, ended) = sync_channel(1);
        if self.0.try_send((file, end)).is_ok() {
            let _ = ended.recv_timeout(WAIT_MAX); // it ends later, then
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::Receiver;

    use super::*;

    /// Ends once it may, or its test has failed.
    struct Slow(Receiver<()>, SyncSender<u32>, u32);

    impl Drop for Slow {
        fn drop(&mut self) {
            let _ = self.0.recv();
            let _ = self.1.send(self.2);
        }
    }

    #[test]
    fn nobody_waits_for_one_that_takes_long() {
        let closer = Closer::start().unwrap();
        let (dropped, drops) = sync_channel(2);
        let (first, may_first) = sync_channel(1);
        let (second, may_second) = sync_channel(1);
        closer.close(Slow(may_first, dropped.clone(), 1));
        closer.close(Slow(may_second, dropped, 2));
        assert!(drops.try_recv().is_err(), "closed where it was let go of");
        first.send(()).unwrap();
        assert_eq!(drops.recv(), Ok(1));
        second.send(()).unwrap();
        assert_eq!(drops.recv(), Ok(2));
    }

    #[test]
    fn an_ordinary_one_is_closed_on_return() {
        let closer = Closer::start().unwrap();
        let (dropped, drops) = sync_channel(1);
        let (now, may) = sync_channel(1);
        now.send(()).unwrap();
        closer.close(Slow(may, dropped, 7));
        assert_eq!(drops.recv(), Ok(7));
    }

    #[test]
    fn only_large_removed_files_take_long() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        std::fs::write(&path, vec![1; 2 << 20]).unwrap();
        let file = File::open(&path).unwrap();
        file.sync_all().unwrap();
        assert!(!takes_long(&file, 0), "it has a name");
        assert!(takes_long(&file, 1), "its last name is about to go");
        std::fs::remove_file(&path).unwrap();
        assert!(takes_long(&file, 0));
        let small = folder.path().join("record");
        std::fs::write(&small, b"1").unwrap();
        let small_file = File::open(&small).unwrap();
        std::fs::remove_file(&small).unwrap();
        assert!(!takes_long(&small_file, 0));
    }
}
