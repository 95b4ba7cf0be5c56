//! Files of TLS that change while a disk is served: a certificate is renewed,
//! a key is added or taken away.
//!
//! They are looked at every [`TLS_LOOK`], by a thread of its own, as where they
//! lie may be slow. Connections that begin after a change meet what the files
//! say then; those under way stay as they are. Files that do not fit together,
//! such as a new certificate beside the old key, change nothing: the next
//! change of them is looked at again.

use std::fs::Metadata;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::sync::{PoisonError, RwLock, Weak};

use openssl::ssl::SslContext;

use super::{CA_CERT, SERVER_CERT, SERVER_KEY, Settings, Tls, context};
use crate::limits::TLS_LOOK;

impl Tls {
    /// Follows changes of the files for as long as anybody has this handle.
    /// They were read just now.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn follow(&self, settings: Settings) -> io::Result<()> {
        let mut watcher = Watcher::new(self, settings);
        let look = move || {
            loop {
                std::thread::sleep(TLS_LOOK);
                if !watcher.look() {
                    return;
                }
            }
        };
        std::thread::Builder::new().name("tls-files".into()).spawn(look).map(drop)
    }
}

/// What tells one content of a file from another.
type Stamp = (u64, u64, u64, i64, i64);

struct Watcher {
    settings: Settings,
    /// Of the files as they were last read; of those that are not there, none.
    seen: Vec<Option<Stamp>>,
    current: Weak<RwLock<SslContext>>,
}

impl Watcher {
    fn new(tls: &Tls, settings: Settings) -> Self {
        Self { seen: stamps(&settings), settings, current: std::sync::Arc::downgrade(&tls.0) }
    }

    /// Takes over what changed; whether anybody still wants it.
    fn look(&mut self) -> bool {
        let Some(current) = self.current.upgrade() else { return false };
        // Before they are read: what changes meanwhile is seen next time.
        let stamps = stamps(&self.settings);
        if stamps == self.seen {
            return true;
        }
        self.seen = stamps;
        match context(&self.settings) {
            Ok(Some(fresh)) => {
                *current.write().unwrap_or_else(PoisonError::into_inner) = fresh;
                tracing::info!("files of TLS have changed: new connections meet the new ones");
            }
            Ok(None) => {}
            Err(error) => {
                tracing::warn!(%error, "files of TLS have changed and cannot be used: the former stay");
            }
        }
        true
    }
}

fn stamps(settings: &Settings) -> Vec<Option<Stamp>> {
    let folder = settings.certificates.iter();
    let certificates =
        folder.flat_map(|folder| [SERVER_CERT, SERVER_KEY, CA_CERT].map(|name| folder.join(name)));
    let files = certificates.chain(settings.psk.clone());
    let stamp = |of: Metadata| (of.dev(), of.ino(), of.size(), of.mtime_nsec(), of.ctime() ^ of.ctime_nsec());
    files.map(|path| std::fs::metadata(path).ok().map(stamp)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_files_that_changed_and_fit_are_taken_over() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("keys.psk");
        let write = |text: &str| std::fs::write(&path, text).unwrap();
        let key = "5a".repeat(16);
        write(&format!("alice:{key}\n"));
        let settings = Settings { psk: Some(path.clone()), ..Settings::default() };
        let tls = Tls::load(&settings).unwrap().unwrap();
        let mut watcher = Watcher::new(&tls, settings);
        let context = || std::ptr::from_ref::<openssl::ssl::SslContextRef>(&tls.0.read().unwrap()) as usize;
        let first = context();
        assert!(watcher.look() && context() == first, "nothing changed");
        write("alice:zz\n");
        assert!(watcher.look() && context() == first, "of no use");
        write(&format!("alice:{key}\nbob:{key}\n"));
        assert!(watcher.look() && context() != first, "of use");
        std::fs::remove_file(&path).unwrap();
        let second = context();
        assert!(watcher.look() && context() == second, "gone");
        drop(tls);
        assert!(!watcher.look(), "nobody wants it");
    }
}
