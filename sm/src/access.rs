//! Who may talk to a daemon: root, the daemon's own user, and one group if it
//! was told of one.
//!
//! The kernel says who connects; nothing that the peer sends counts. The
//! socket's mode keeps others out already, this check does so too where a
//! folder's or socket's mode was widened by hand.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use nix::unistd::{Gid, Group, Uid, User, chown, getgrouplist};
use tokio::net::unix::SocketAddr;
use tokio::net::{UnixListener, UnixStream};

/// Pause after a failed accept (out of descriptors, say).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Who is let in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rights {
    own_uid: u32,
    group: Option<u32>,
}

impl Rights {
    /// Root and ourselves, and the members of a group given by name or number.
    ///
    /// # Errors
    /// There is no such group.
    pub fn new(group: Option<&str>) -> io::Result<Self> {
        let own_uid = nix::unistd::geteuid().as_raw();
        let Some(name) = group else {
            return Ok(Self { own_uid, group: None });
        };
        let found = match name.parse::<u32>() {
            Ok(gid) => Some(gid),
            Err(_) => Group::from_name(name)?.map(|group| group.gid.as_raw()),
        };
        let missing = || io::Error::new(io::ErrorKind::NotFound, format!("there is no group {name:?}"));
        Ok(Self { own_uid, group: Some(found.ok_or_else(missing)?) })
    }

    /// Whether a user is let in who is in these groups.
    #[must_use]
    pub fn admits(&self, uid: u32, groups: &[u32]) -> bool {
        uid == 0 || uid == self.own_uid || self.group.is_some_and(|group| groups.contains(&group))
    }

    fn admits_peer(&self, stream: &UnixStream) -> bool {
        let Ok(peer) = stream.peer_cred() else {
            return false;
        };
        let mut groups = vec![peer.gid()];
        if self.group.is_some() {
            groups.extend(groups_of(peer.uid(), peer.gid()));
        }
        self.admits(peer.uid(), &groups)
    }
}

/// The groups the user database has a user in.
fn groups_of(uid: u32, gid: u32) -> Vec<u32> {
    let user = User::from_uid(Uid::from_raw(uid)).ok().flatten();
    let name = user.and_then(|user| std::ffi::CString::new(user.name).ok());
    let groups = name.and_then(|name| getgrouplist(&name, Gid::from_raw(gid)).ok());
    groups.unwrap_or_default().into_iter().map(Gid::as_raw).collect()
}

/// A listener that turns strangers away.
#[derive(Debug)]
pub struct Checked {
    inner: UnixListener,
    rights: Rights,
}

impl Checked {
    /// Binds, taking the place of a socket nobody listens on.
    ///
    /// # Errors
    /// Somebody else listens there, I/O errors.
    pub fn bind(socket: &Path, rights: Rights) -> io::Result<Self> {
        if std::os::unix::net::UnixStream::connect(socket).is_ok() {
            return Err(io::ErrorKind::AddrInUse.into());
        }
        match std::fs::remove_file(socket) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let inner = UnixListener::bind(socket)?;
        let mode = match rights.group {
            Some(group) => {
                chown(socket, None, Some(Gid::from_raw(group)))?;
                0o660
            }
            None => 0o600,
        };
        std::fs::set_permissions(socket, std::fs::Permissions::from_mode(mode))?;
        Ok(Self { inner, rights })
    }
}

impl axum::serve::Listener for Checked {
    type Io = UnixStream;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (UnixStream, SocketAddr) {
        loop {
            match self.inner.accept().await {
                Ok((stream, address)) if self.rights.admits_peer(&stream) => return (stream, address),
                Ok((stream, _)) => {
                    let uid = stream.peer_cred().ok().map(|peer| peer.uid());
                    tracing::warn!(uid, "a stranger was turned away");
                }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_oneself_and_the_group_are_let_in_and_nobody_else() {
        let plain = Rights { own_uid: 7, group: None };
        let grouped = Rights { own_uid: 7, group: Some(70) };
        for (uid, groups, by_plain, by_grouped) in [
            (0, &[][..], true, true),
            (7, &[1][..], true, true),
            (8, &[70][..], false, true),
            (8, &[1, 70][..], false, true),
            (8, &[7][..], false, false),
        ] {
            assert_eq!((plain.admits(uid, groups), grouped.admits(uid, groups)), (by_plain, by_grouped));
        }
        assert!(Rights::new(Some("no such group, surely")).is_err());
        assert_eq!(Rights::new(Some("0")).unwrap().group, Some(0));
    }

    #[tokio::test]
    async fn the_socket_is_ours_alone_unless_a_group_was_named() {
        let folder = tempfile::tempdir().unwrap();
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        let (one, two) = (folder.path().join("one"), folder.path().join("two"));
        let listener = Checked::bind(&one, Rights::new(None).unwrap()).unwrap();
        assert_eq!(mode(&one), 0o600);
        assert!(Checked::bind(&one, Rights::new(None).unwrap()).is_err(), "somebody listens");
        let own = nix::unistd::getegid().to_string();
        let _other = Checked::bind(&two, Rights::new(Some(&own)).unwrap()).unwrap();
        assert_eq!(mode(&two), 0o660);
        drop(listener);
        assert!(Checked::bind(&one, Rights::new(None).unwrap()).is_ok(), "nobody listens any more");
    }
}
