//! Telling systemd how we are: its notify protocol is a datagram of lines to
//! a socket that it names in our environment.
//!
//! Without such a socket everything here does nothing.

use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::Path;
use std::time::Duration;

/// Where the service manager listens.
#[derive(Debug, Default)]
pub struct Notifier {
    to: Option<(UnixDatagram, SocketAddr)>,
    watchdog: Option<Duration>,
}

impl Notifier {
    /// As our environment says.
    #[must_use]
    pub fn from_env() -> Self {
        let socket = std::env::var_os("NOTIFY_SOCKET");
        let number = |name: &str| std::env::var(name).ok()?.parse::<u64>().ok();
        let ours = number("WATCHDOG_PID").is_none_or(|pid| pid == u64::from(std::process::id()));
        let watchdog_us = number("WATCHDOG_USEC").filter(|us| ours && *us > 0);
        match socket.map(|socket| Self::to(socket.as_bytes(), watchdog_us.map(Duration::from_micros))) {
            Some(Ok(notifier)) => notifier,
            Some(Err(error)) => {
                tracing::warn!(%error, "the service manager cannot be told anything");
                Self::default()
            }
            None => Self::default(),
        }
    }

    /// To a socket: a path, or an abstract name that begins with `@`.
    ///
    /// # Errors
    /// It is no name of a socket, or we are out of descriptors.
    pub fn to(socket: &[u8], watchdog: Option<Duration>) -> io::Result<Self> {
        let address = match socket.split_first() {
            Some((b'@', name)) => SocketAddr::from_abstract_name(name)?,
            _ => SocketAddr::from_pathname(Path::new(std::ffi::OsStr::from_bytes(socket)))?,
        };
        Ok(Self { to: Some((UnixDatagram::unbound()?, address)), watchdog })
    }

    fn say(&self, lines: &str) {
        let Some((socket, address)) = &self.to else {
            return;
        };
        if let Err(error) = socket.send_to_addr(lines.as_bytes(), address) {
            tracing::debug!(%error, "the service manager does not listen");
        }
    }

    /// We serve.
    pub fn ready(&self, status: &str) {
        self.say(&format!("READY=1\nSTATUS={status}"));
    }

    /// We end.
    pub fn stopping(&self) {
        self.say("STOPPING=1");
    }

    /// We live; to be said at least as often as [`Notifier::pace`].
    pub fn alive(&self) {
        self.say("WATCHDOG=1");
    }

    /// How often it wants to hear that, halved to be on the safe side; `None`
    /// if it does not.
    #[must_use]
    pub fn pace(&self) -> Option<Duration> {
        self.watchdog.filter(|_| self.to.is_some()).map(|limit| limit / 2)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_arrives_by_path_and_by_abstract_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notify");
        let name = format!("coppice-test-{}", std::process::id());
        let listeners = [
            (UnixDatagram::bind(&path).unwrap(), path.as_os_str().as_bytes().to_vec()),
            (
                UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap(),
                format!("@{name}").into_bytes(),
            ),
        ];
        for (listener, socket) in listeners {
            let notifier = Notifier::to(&socket, Some(Duration::from_secs(10))).unwrap();
            assert_eq!(notifier.pace(), Some(Duration::from_secs(5)));
            let mut buffer = [0; 64];
            notifier.ready("2 repositories");
            let len = listener.recv(&mut buffer).unwrap();
            assert_eq!(&buffer[..len], b"READY=1\nSTATUS=2 repositories");
            notifier.alive();
            notifier.stopping();
            let mut said = |n| {
                let len = listener.recv(&mut buffer).unwrap();
                assert_eq!(len, n);
            };
            said("WATCHDOG=1".len());
            said("STOPPING=1".len());
        }
    }

    #[test]
    fn without_a_service_manager_nothing_is_said() {
        let nobody = Notifier::default();
        nobody.ready("x");
        assert_eq!(nobody.pace(), None);
    }
}
