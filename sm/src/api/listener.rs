//! Who may connect: root, and whoever smd itself runs as.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use tokio::net::unix::SocketAddr;
use tokio::net::{UnixListener, UnixStream};

/// Pause after a failed accept (out of descriptors, say).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A listener that turns strangers away.
#[derive(Debug)]
pub struct Checked {
    inner: UnixListener,
    own_uid: u32,
}

impl Checked {
    /// Binds, taking the place of a socket nobody listens on. The state
    /// folder's lock has shown that no other smd of ours does.
    ///
    /// # Errors
    /// Somebody else listens there, I/O errors.
    pub fn bind(socket: &Path) -> io::Result<Self> {
        if std::os::unix::net::UnixStream::connect(socket).is_ok() {
            return Err(io::ErrorKind::AddrInUse.into());
        }
        match std::fs::remove_file(socket) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let inner = UnixListener::bind(socket)?;
        std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o600))?;
        Ok(Self { inner, own_uid: nix::unistd::geteuid().as_raw() })
    }

    fn admits(&self, stream: &UnixStream) -> bool {
        match stream.peer_cred() {
            Ok(peer) => peer.uid() == 0 || peer.uid() == self.own_uid,
            Err(_) => false,
        }
    }
}

impl axum::serve::Listener for Checked {
    type Io = UnixStream;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (UnixStream, SocketAddr) {
        loop {
            match self.inner.accept().await {
                Ok((stream, address)) if self.admits(&stream) => return (stream, address),
                Ok(_) => tracing::warn!("a stranger was turned away"),
                Err(error) => {
                    tracing::warn!(%error, "accept");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.inner.local_addr()
    }
}
