//! Serving a VDI to other hosts too: its tapdisk listens on TCP, with TLS.
//!
//! Part of how a VDI is attached, and kept with [`crate::wanted`]: a tapdisk
//! that replaces a dead one listens where that did. Files are named, never
//! copied: keys stay where the administrator has them.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Where to listen, and whom to let in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Remote {
    /// Address and port; port 0 takes any, once.
    pub listen: SocketAddr,
    /// A folder with `server-cert.pem`, `server-key.pem` and, to verify
    /// clients, `ca-cert.pem`.
    #[serde(default)]
    pub tls_certificates: Option<PathBuf>,
    /// Clients must have a certificate of that authority.
    #[serde(default)]
    pub tls_verify_peer: bool,
    /// A file of pre-shared keys, in lines `user:key`.
    #[serde(default)]
    pub tls_psk: Option<PathBuf>,
    /// Without TLS, though not only this host can reach the address.
    #[serde(default)]
    pub insecure: bool,
}

impl Remote {
    /// The tapdisk's arguments for it.
    #[must_use]
    pub fn args(&self) -> Vec<OsString> {
        let mut args = vec!["--listen".into(), self.listen.to_string().into()];
        for (name, path) in [("--tls-certificates", &self.tls_certificates), ("--tls-psk", &self.tls_psk)] {
            if let Some(path) = path {
                args.extend([name.into(), path.into()]);
            }
        }
        for (name, set) in [("--tls-verify-peer", self.tls_verify_peer), ("--insecure", self.insecure)] {
            if set {
                args.push(name.into());
            }
        }
        args
    }

    /// Whether others could reach the disk with nothing to protect it, though
    /// nobody said that they may. The tapdisk refuses that too.
    #[must_use]
    pub fn is_open_by_mistake(&self) -> bool {
        let tls = self.tls_certificates.is_some() || self.tls_psk.is_some();
        !(tls || self.insecure || self.listen.ip().is_loopback())
    }

    /// Refuses what is open by mistake.
    ///
    /// # Errors
    /// [`Error::BadRequest`] with what to say instead.
    pub fn refuse_open_by_mistake(&self) -> Result<()> {
        if !self.is_open_by_mistake() {
            return Ok(());
        }
        let reason = format!(
            "{} can be reached from other hosts and nothing protects the disk: give a folder \
            of certificates or a file of keys, or, if the network itself is safe, say `insecure`",
            self.listen
        );
        Err(Error::BadRequest { reason })
    }

    /// The NBD URI for clients elsewhere, without what only they know: their
    /// certificate, or their name and key.
    #[must_use]
    pub fn nbd_uri(&self, export: &str) -> String {
        let tls = self.tls_certificates.is_some() || self.tls_psk.is_some();
        format!("{}://{}/{export}", if tls { "nbds" } else { "nbd" }, self.listen)
    }

    /// Whether this, being served, is what `asked` wants. Port 0 is any.
    #[must_use]
    pub fn serves(&self, asked: &Self) -> bool {
        let mut asked = asked.clone();
        if asked.listen.port() == 0 {
            asked.listen.set_port(self.listen.port());
        }
        *self == asked
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn remote(listen: &str) -> Remote {
        Remote {
            listen: listen.parse().unwrap(),
            tls_certificates: None,
            tls_verify_peer: false,
            tls_psk: Some("/etc/keys".into()),
            insecure: false,
        }
    }

    #[test]
    fn any_port_is_the_one_that_was_taken() {
        let served = remote("127.0.0.1:1234");
        assert!(served.serves(&remote("127.0.0.1:0")) && served.serves(&remote("127.0.0.1:1234")));
        assert!(!served.serves(&remote("127.0.0.1:1")) && !served.serves(&remote("127.0.0.2:0")));
        assert!(!served.serves(&Remote { insecure: true, ..served.clone() }));
    }

    #[test]
    fn only_this_host_is_served_without_tls_unless_told() {
        let plain = |listen| Remote { tls_psk: None, ..remote(listen) };
        assert!(plain("10.0.0.1:0").is_open_by_mistake() && plain("[::]:0").is_open_by_mistake());
        assert!(!plain("127.0.0.1:0").is_open_by_mistake() && !plain("[::1]:0").is_open_by_mistake());
        assert!(!remote("10.0.0.1:0").is_open_by_mistake());
        assert!(!Remote { insecure: true, ..plain("10.0.0.1:0") }.is_open_by_mistake());
    }

    #[test]
    fn what_was_asked_reaches_the_tapdisk_and_the_client() {
        let served = Remote { tls_verify_peer: true, ..remote("[::1]:10809") };
        assert_eq!(served.args(), ["--listen", "[::1]:10809", "--tls-psk", "/etc/keys", "--tls-verify-peer"]);
        assert_eq!(served.nbd_uri("x"), "nbds://[::1]:10809/x");
        assert_eq!(Remote { tls_psk: None, ..served }.nbd_uri("x"), "nbd://[::1]:10809/x");
    }
}
