//! A nudge to the collector: all that we know of it.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use uuid::Uuid;

/// How long a nudge may take; the collector also looks on its own.
const LIMIT: Duration = Duration::from_secs(2);

/// Where the collector listens, if anywhere.
#[derive(Debug, Clone)]
pub struct Nudge {
    socket: PathBuf,
    /// A request to make way is on its way: one at a time is enough.
    asking: Arc<AtomicBool>,
}

impl Nudge {
    /// Nudges will go to this socket.
    #[must_use]
    pub fn new(socket: PathBuf) -> Self {
        Self { socket, asking: Arc::default() }
    }

    /// Tells it that an SR has changed. Best effort and in the background:
    /// without a collector everything else works.
    pub fn kick(&self, sr: Uuid) {
        let body = format!("{{\"sr\":\"{sr}\"}}");
        self.in_background(sr, "/kick", body, || ());
    }

    /// Asks it to stop what it does with one VDI's tree, or with the whole
    /// SR, so that an operation that found it busy can go first. Best effort
    /// and in the background; the operation is tried again meanwhile.
    pub fn make_way(&self, sr: Uuid, vdi: Option<Uuid>) {
        if self.asking.swap(true, Ordering::Relaxed) {
            return;
        }
        let asking = self.asking.clone();
        let vdi = vdi.map_or_else(|| "null".to_owned(), |vdi| format!("\"{vdi}\""));
        let body = format!("{{\"sr\":\"{sr}\",\"vdi\":{vdi}}}");
        self.in_background(sr, "/abort", body, move || asking.store(false, Ordering::Relaxed));
    }

    fn in_background(
        &self,
        sr: Uuid,
        path: &'static str,
        body: String,
        after: impl FnOnce() + Send + 'static,
    ) {
        let socket = self.socket.clone();
        let ask = move || {
            if let Err(error) = post(&socket, path, &body) {
                tracing::debug!(%sr, %path, %error, "no collector nudged");
            }
            after();
        };
        if let Err(error) = std::thread::Builder::new().name("nudge".into()).spawn(ask) {
            tracing::warn!(%sr, %error, "nudge");
        }
    }
}

fn post(socket: &Path, path: &str, body: &str) -> io::Result<()> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(LIMIT))?;
    stream.set_write_timeout(Some(LIMIT))?;
    write!(
        stream,
        "POST {path} HTTP/1.1\r\nhost: gcd\r\nconnection: close\r\n\
         content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )?;
    // Read the first bytes of the answer: closing before would lose the nudge.
    let mut start = [0; 64];
    stream.read(&mut start).map(drop)
}
