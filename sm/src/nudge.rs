//! A nudge to the collector: all that we know of it.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use uuid::Uuid;

/// How long a nudge may take; the collector also looks on its own.
const LIMIT: Duration = Duration::from_secs(2);

/// Where the collector listens, if anywhere.
#[derive(Debug, Clone)]
pub struct Nudge {
    socket: PathBuf,
}

impl Nudge {
    /// Nudges will go to this socket.
    #[must_use]
    pub fn new(socket: PathBuf) -> Self {
        Self { socket }
    }

    /// Tells it that an SR has changed. Best effort and in the background:
    /// without a collector everything else works.
    pub fn kick(&self, sr: Uuid) {
        let socket = self.socket.clone();
        let kick = move || {
            if let Err(error) = post_kick(&socket, sr) {
                tracing::debug!(%sr, %error, "no collector nudged");
            }
        };
        if let Err(error) = std::thread::Builder::new().name("nudge".into()).spawn(kick) {
            tracing::warn!(%sr, %error, "nudge");
        }
    }
}

fn post_kick(socket: &std::path::Path, sr: Uuid) -> io::Result<()> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(LIMIT))?;
    stream.set_write_timeout(Some(LIMIT))?;
    let body = format!("{{\"sr\":\"{sr}\"}}");
    write!(
        stream,
        "POST /kick HTTP/1.1\r\nhost: gcd\r\nconnection: close\r\n\
         content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )?;
    // Read the first bytes of the answer: closing before would lose the nudge.
    let mut start = [0; 64];
    stream.read(&mut start).map(drop)
}
