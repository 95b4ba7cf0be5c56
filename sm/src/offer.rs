//! An address on which every disk is offered that is attached without one of
//! its own: what a host with few disks wants instead of saying it each time.
//!
//! A tapdisk serves one disk, so each gets a port: the first free one from
//! the given port on. It stays with the disk until that is detached, also
//! through deaths of its tapdisk. Disks that are attached already stay where
//! they are.

use std::collections::BTreeSet;
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::error::{Error, IoContext, Result};
use crate::limits::OFFER_PORTS_MAX;
use crate::manager::Manager;
use crate::remote::Remote;

/// Options of smd for it.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct OfferArgs {
    /// Serve disks on this TCP address too if their attach names none: each on
    /// the first free port from this one on, or any if it is 0
    #[arg(long, value_name = "ADDRESS:PORT")]
    listen: Option<SocketAddr>,
    /// A folder with server-cert.pem and server-key.pem: TCP clients must use TLS
    #[arg(long, value_name = "DIR", requires = "listen")]
    tls_certificates: Option<PathBuf>,
    /// Let in only clients with a certificate signed by the folder's ca-cert.pem
    #[arg(long, requires = "tls_certificates")]
    tls_verify_peer: bool,
    /// A file of pre-shared keys, in lines `user:key`
    #[arg(long, value_name = "FILE", requires = "listen")]
    tls_psk: Option<PathBuf>,
    /// Serve without TLS also where other hosts can reach the address
    #[arg(long, requires = "listen")]
    insecure: bool,
}

impl OfferArgs {
    /// What is asked for, if anything.
    ///
    /// # Errors
    /// [`Error::BadRequest`] for an address that is open by mistake.
    pub(crate) fn remote(&self) -> Result<Option<Remote>> {
        let Some(listen) = self.listen else { return Ok(None) };
        let remote = Remote {
            listen,
            tls_certificates: self.tls_certificates.clone(),
            tls_verify_peer: self.tls_verify_peer,
            tls_psk: self.tls_psk.clone(),
            insecure: self.insecure,
        };
        remote.refuse_open_by_mistake()?;
        Ok(Some(remote))
    }
}

/// The address, and the ports that attaches under way have chosen.
#[derive(Debug)]
pub struct Offer {
    remote: Remote,
    claimed: Mutex<BTreeSet<u16>>,
}

/// A port that nobody else is given while this lives: until the attach it was
/// made for has ended, and with it is noted or free again.
#[derive(Debug)]
pub struct Claim<'a> {
    offer: &'a Offer,
    remote: Remote,
}

impl Offer {
    /// Disks are offered there.
    #[must_use]
    pub fn new(remote: Remote) -> Self {
        Self { remote, claimed: Mutex::new(BTreeSet::new()) }
    }

    /// A place for one more disk; `taken` are the ports of those served, or to
    /// be served again, already.
    ///
    /// # Errors
    /// [`Error::Held`] when no port is free among [`OFFER_PORTS_MAX`]; what
    /// the system says of an address that this host does not have.
    pub fn claim(&self, taken: &BTreeSet<u16>) -> Result<Claim<'_>> {
        let first = self.remote.listen.port();
        if first == 0 {
            return Ok(Claim { offer: self, remote: self.remote.clone() });
        }
        let mut claimed = self.claimed();
        for port in (first..=u16::MAX).take(OFFER_PORTS_MAX) {
            let listen = SocketAddr::new(self.remote.listen.ip(), port);
            if taken.contains(&port) || claimed.contains(&port) || !is_free(listen)? {
                continue;
            }
            claimed.insert(port);
            return Ok(Claim { offer: self, remote: Remote { listen, ..self.remote.clone() } });
        }
        let reason = format!("no port is free among the {OFFER_PORTS_MAX} from {first} on");
        Err(Error::Held {
            what: format!("address {}", self.remote.listen.ip()),
            reason,
            next: "name a free address and port: `coppice vdi attach --listen`",
        })
    }

    fn claimed(&self) -> MutexGuard<'_, BTreeSet<u16>> {
        // A set of numbers is whole at any moment.
        self.claimed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Claim<'_> {
    /// Where the disk is to be served.
    #[must_use]
    pub fn remote(&self) -> &Remote {
        &self.remote
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        self.offer.claimed().remove(&self.remote.listen.port());
    }
}

impl Manager {
    /// A place for a disk that is about to be attached, where all are offered.
    ///
    /// # Errors
    /// As [`Offer::claim`]; a run folder that cannot be read.
    pub fn claim_offer(&self) -> Result<Option<Claim<'_>>> {
        let Some(offer) = self.offer() else { return Ok(None) };
        let mut taken = BTreeSet::new();
        for known in self.known().iter().filter(|known| known.attached) {
            let wanted = self.open_sr(known.uuid)?.repo.host.wanted().during(|| "run folder".into())?;
            taken.extend(wanted.into_iter().filter_map(|one| one.remote).map(|remote| remote.listen.port()));
        }
        offer.claim(&taken).map(Some)
    }
}

/// Whether somebody else listens there. Asked again by the tapdisk, which
/// says so if that changes in between.
fn is_free(address: SocketAddr) -> Result<bool> {
    match TcpListener::bind(address) {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => Ok(false),
        Err(error) => Err(error).during(|| format!("listen on {address}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offer(port: u16) -> Offer {
        Offer::new(Remote {
            listen: SocketAddr::new([127, 0, 0, 1].into(), port),
            tls_certificates: None,
            tls_verify_peer: false,
            tls_psk: None,
            insecure: false,
        })
    }

    /// A port that was free a moment ago, with free ones behind it.
    fn base() -> u16 {
        let tried = (20_000..60_000).step_by(16).find(|port| {
            (*port..port + 8).all(|port| is_free(SocketAddr::new([127, 0, 0, 1].into(), port)).unwrap())
        });
        tried.unwrap()
    }

    #[test]
    fn each_disk_gets_the_first_port_that_nobody_has() {
        let first = base();
        let offer = offer(first);
        let _foreign = TcpListener::bind(("127.0.0.1", first)).unwrap();
        let taken = BTreeSet::from([first + 1]);
        let one = offer.claim(&taken).unwrap();
        let two = offer.claim(&taken).unwrap();
        assert_eq!((one.remote().listen.port(), two.remote().listen.port()), (first + 2, first + 3));
        drop(one);
        assert_eq!(offer.claim(&taken).unwrap().remote().listen.port(), first + 2, "free again");
    }

    #[test]
    fn port_zero_is_left_to_the_system_for_each() {
        let offer = offer(0);
        let (one, two) = (offer.claim(&BTreeSet::new()).unwrap(), offer.claim(&BTreeSet::new()).unwrap());
        assert_eq!((one.remote().listen.port(), two.remote().listen.port()), (0, 0));
    }

    #[test]
    fn ports_run_out_and_say_so() {
        let offer = offer(u16::MAX);
        let taken = BTreeSet::from([u16::MAX]);
        assert!(matches!(offer.claim(&taken), Err(Error::Held { .. })));
    }
}
