//! Where clients and peers come in.
//!
//! When nobody can be let in, because descriptors or memory have run out,
//! those who wait would keep the loop awake for nothing: then nobody is
//! listened to for [`ACCEPT_PAUSE`].

use std::io;
use std::net::TcpListener;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixListener;
use std::time::Instant;

use super::reactor::Source;
use crate::limits::ACCEPT_PAUSE;

/// All doors.
#[derive(Debug)]
pub struct Doors {
    /// NBD clients of this host.
    pub nbd: UnixListener,
    /// NBD clients from anywhere.
    pub tcp: Option<TcpListener>,
    /// Control peers.
    pub control: UnixListener,
    /// Shut until then.
    shut_until: Option<Instant>,
}

impl Doors {
    /// Open ones.
    ///
    /// # Errors
    /// What the system says.
    pub fn new(nbd: UnixListener, tcp: Option<TcpListener>, control: UnixListener) -> io::Result<Self> {
        nbd.set_nonblocking(true)?;
        control.set_nonblocking(true)?;
        if let Some(tcp) = &tcp {
            tcp.set_nonblocking(true)?;
        }
        Ok(Self { nbd, tcp, control, shut_until: None })
    }

    /// What to wait for.
    pub fn sources(&self, now: Instant) -> impl Iterator<Item = (Source, BorrowedFd<'_>)> {
        let tcp = self.tcp.as_ref().map(|tcp| (Source::NbdTcp, tcp.as_fd()));
        let all = [(Source::Nbd, self.nbd.as_fd()), (Source::Control, self.control.as_fd())];
        let open = self.opens(now).is_none();
        all.into_iter().chain(tcp).filter(move |_| open)
    }

    /// Takes note of how letting in went.
    pub fn heed(&mut self, outcome: io::Result<()>) {
        if let Err(error) = outcome {
            let pause_ms = ACCEPT_PAUSE.as_millis();
            tracing::warn!(%error, pause_ms, "nobody can be let in");
            self.shut_until = Some(Instant::now() + ACCEPT_PAUSE);
        }
    }

    /// When they open again, if they are shut.
    pub fn opens(&self, now: Instant) -> Option<Instant> {
        self.shut_until.filter(|until| *until > now)
    }
}

/// The next one, or `None` if nobody is there.
///
/// # Errors
/// Nobody can be taken now. One who went away while waiting is no error.
pub fn accepted<S, A>(result: io::Result<(S, A)>) -> io::Result<Option<S>> {
    use io::ErrorKind::{ConnectionAborted, Interrupted, WouldBlock};
    match result {
        Ok((socket, _)) => Ok(Some(socket)),
        // The socket stays ready if there are more.
        Err(error) if matches!(error.kind(), WouldBlock | Interrupted | ConnectionAborted) => Ok(None),
        Err(error) => Err(error),
    }
}
