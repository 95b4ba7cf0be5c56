//! Options that say where disks are served besides this host, and what
//! protects them there.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::PathBuf;

use clap::Args;

use crate::failure::{Failure, Outcome};

/// The port of NBD, where none is said.
const NBD_PORT: u16 = 10809;

/// An address, with or without a port.
fn listen_address(text: &str) -> Result<SocketAddr, String> {
    let bare = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text);
    match (text.parse(), bare.parse()) {
        (Ok(address), _) => Ok(address),
        (_, Ok(ip)) => Ok(SocketAddr::new(ip, NBD_PORT)),
        _ => Err("not an address such as 127.0.0.1, [::1] or 10.0.0.1:10809".to_owned()),
    }
}

/// Where every disk is offered.
#[derive(Debug, Args)]
pub struct OfferArgs {
    /// Offer disks on this TCP address too, unless their attach names another
    ///
    /// Each disk gets a port of its own: the first free one from PORT on
    /// [default: 10809], or any if PORT is 0; `coppice vdi attach` and `vdi
    /// show` print the URI. Only this host's own addresses (127.0.0.1, ::1)
    /// are offered without TLS, unless --insecure says so. Disks that an
    /// earlier `up` left attached stay where they are served.
    #[arg(long, value_name = "ADDRESS[:PORT]", value_parser = listen_address)]
    pub listen: Option<SocketAddr>,
    /// How it is protected.
    #[command(flatten)]
    pub tls: TlsArgs,
}

/// Where else a disk is served.
#[derive(Debug, Args)]
pub struct RemoteArgs {
    /// Serve it on this TCP address too, such as 10.0.0.1:10809
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub listen: Option<SocketAddr>,
    /// How it is protected.
    #[command(flatten)]
    pub tls: TlsArgs,
}

/// What protects a disk that others can reach.
#[derive(Debug, Args)]
pub struct TlsArgs {
    /// A folder with server-cert.pem and server-key.pem: TCP clients must use
    /// TLS. Files that are replaced count for connections that begin some
    /// seconds later
    #[arg(long, value_name = "DIR", requires = "listen")]
    pub tls_certificates: Option<PathBuf>,
    /// Let in only clients with a certificate signed by the folder's ca-cert.pem
    #[arg(long, requires = "tls_certificates")]
    pub tls_verify_peer: bool,
    /// A file of pre-shared keys, in lines `user:key`, for TLS without certificates
    #[arg(long, value_name = "FILE", requires = "listen")]
    pub tls_psk: Option<PathBuf>,
    /// Serve it without TLS also where other hosts can reach the address
    #[arg(long, requires = "listen")]
    pub insecure: bool,
}

impl TlsArgs {
    /// Whether there is no TLS, and nobody said that none is needed.
    pub fn protects_nothing(&self) -> bool {
        self.tls_certificates.is_none() && self.tls_psk.is_none() && !self.insecure
    }

    /// The same with files named from the root: the daemons have another
    /// folder to start from.
    pub fn from_root(&self) -> std::io::Result<Self> {
        let whole = |path: &Option<PathBuf>| path.as_deref().map(std::path::absolute).transpose();
        Ok(Self {
            tls_certificates: whole(&self.tls_certificates)?,
            tls_psk: whole(&self.tls_psk)?,
            tls_verify_peer: self.tls_verify_peer,
            insecure: self.insecure,
        })
    }
}

impl OfferArgs {
    /// Refuses what others could reach with nothing to protect it, though
    /// nobody said that they may.
    pub fn check(&self) -> Outcome<()> {
        match self.listen {
            Some(listen) if self.tls.protects_nothing() && !listen.ip().is_loopback() => {
                let message = format!(
                    "{listen} can be reached from other hosts and nothing protects the disks: give \
                    --tls-certificates or --tls-psk, or, if the network itself is safe, --insecure"
                );
                Err(Failure::new("BAD_REQUEST", message))
            }
            _ => Ok(()),
        }
    }

    /// What smd is told of where to offer disks.
    pub fn daemon_args(&self) -> std::io::Result<Vec<OsString>> {
        let Some(listen) = self.listen else { return Ok(Vec::new()) };
        let tls = self.tls.from_root()?;
        let mut args: Vec<OsString> = vec!["--listen".into(), listen.to_string().into()];
        for (name, path) in [("--tls-certificates", tls.tls_certificates), ("--tls-psk", tls.tls_psk)] {
            args.extend(path.into_iter().flat_map(|path| [name.into(), path.into()]));
        }
        for (name, set) in [("--tls-verify-peer", tls.tls_verify_peer), ("--insecure", tls.insecure)] {
            args.extend(set.then(|| name.into()));
        }
        Ok(args)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_to_listen_on_needs_no_port() {
        for (text, address) in [
            ("127.0.0.1", "127.0.0.1:10809"),
            ("[::1]", "[::1]:10809"),
            ("::1", "[::1]:10809"),
            ("10.0.0.1:7", "10.0.0.1:7"),
            ("[::]:0", "[::]:0"),
        ] {
            assert_eq!(listen_address(text).unwrap(), address.parse().unwrap(), "{text}");
        }
        assert!(listen_address("10809").is_err() && listen_address("host:1").is_err());
    }
}
