//! This machine, as operations see it: locks, leases, running tapdisks.
//!
//! ```text
//!   ops, recover, gc                      (blocking, no clock, no process)
//!        |
//!   Host, LeaseHold, Tap                  this file: traits only
//!     /            \
//!  run_folder.rs   the crash simulator's
//! ```
//!
//! One `Host` serves one SR. Everything behind it survives the process that
//! uses it, not the power: the run folder is on tmpfs.

use std::fmt::Debug;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

use tapdisk_control::{Answer, Client, ClientError, ImageRef, Reply, Request};
use uuid::Uuid;
use vhd::record::RecordStore;

use crate::lease::Lease;
use crate::wanted::Wanted;

/// Held until dropped, or until the process dies.
pub type Guard = Box<dyn Send>;

/// The run folder of this machine, for one SR.
pub trait Host: Send + Sync + Debug {
    /// Takes the SR lock: one holder among all processes of the host. Held
    /// for milliseconds, never while data is copied or a guest request is
    /// waited for, and taken before a pause, never inside one.
    ///
    /// # Errors
    /// `WouldBlock` when it was not free within a stated time.
    fn lock_sr(&self) -> io::Result<Guard>;

    /// Marks an intent as worked on by this process, so that nobody else
    /// recovers it. `None` when somebody alive works on it.
    ///
    /// # Errors
    /// I/O errors.
    fn hold_intent(&self, id: Uuid) -> io::Result<Option<Guard>>;

    /// All live leases of the SR; dead ones are reaped. The caller holds the
    /// SR lock.
    ///
    /// # Errors
    /// I/O errors, and a live lease that cannot be read: nothing may then be
    /// changed.
    fn leases(&self) -> io::Result<Vec<Lease>>;

    /// Whether a VDI has a live lease of a tapdisk, be it one that is only
    /// being started. The caller holds the SR lock.
    ///
    /// # Errors
    /// I/O errors.
    fn is_served(&self, vdi: Uuid) -> io::Result<bool> {
        Ok(self.leases()?.iter().any(|lease| lease.serves(vdi)))
    }

    /// Makes a lease, locked by us. The caller holds the SR lock and has
    /// checked that the VDI has none.
    ///
    /// # Errors
    /// I/O errors; then there is no lease.
    fn make_lease(&self, lease: &Lease) -> io::Result<Box<dyn LeaseHold>>;

    /// Makes a lease of this process's own, for reading a chain with the map
    /// it has, to the end. It ends when dropped, or with the process. The
    /// caller holds the SR lock.
    ///
    /// # Errors
    /// `WouldBlock` above a stated number of readers, I/O errors; then there
    /// is no lease.
    fn make_reader(&self, lease: &Lease) -> io::Result<Guard>;

    /// Asks those to leave who read a VDI for a purpose that can wait, and
    /// waits for it with a stated limit. Not under the SR lock. Returns
    /// whether there were any, and all have left.
    ///
    /// # Errors
    /// I/O errors.
    fn ask_to_leave(&self, _vdi: Uuid) -> io::Result<bool> {
        Ok(false)
    }

    /// Whether somebody waits for such readers of a VDI to leave.
    fn is_asked_to_leave(&self, _vdi: Uuid) -> bool {
        false
    }

    /// Rewrites the chain of a tapdisk's live lease, after it has refreshed
    /// its map. The caller holds the SR lock.
    ///
    /// # Errors
    /// I/O errors; the old lease then stands.
    fn update_lease(&self, vdi: Uuid, chain: &[ImageRef]) -> io::Result<()>;

    /// A control connection to the live tapdisk of a VDI; `None` if it has
    /// no live lease.
    ///
    /// # Errors
    /// The tapdisk lives but cannot be reached.
    fn tap(&self, vdi: Uuid) -> io::Result<Option<Box<dyn Tap>>>;

    /// Where the tapdisk of a VDI is asked and told things; `None` where that
    /// is no socket.
    fn control_socket(&self, _vdi: Uuid) -> Option<PathBuf> {
        None
    }

    /// Where the reader of a live lease serves.
    fn endpoint(&self, lease: &Lease) -> Endpoint;

    /// Waits, with a stated limit, until the reader of a VDI is gone; then
    /// reaps its lease. Returns false when it is still there.
    ///
    /// # Errors
    /// I/O errors.
    fn wait_gone(&self, vdi: Uuid) -> io::Result<bool>;

    /// VDIs of the SR that are to be served until they are detached; see
    /// [`crate::wanted`]. A host that brings nothing back knows of none.
    ///
    /// # Errors
    /// I/O errors.
    fn wanted(&self) -> io::Result<Vec<Wanted>> {
        Ok(Vec::new())
    }

    /// One of them.
    ///
    /// # Errors
    /// I/O errors.
    fn wanted_one(&self, vdi: Uuid) -> io::Result<Option<Wanted>> {
        Ok(self.wanted()?.into_iter().find(|wanted| wanted.vdi == vdi))
    }

    /// Notes that a VDI is to be served. The caller holds the SR lock.
    ///
    /// # Errors
    /// I/O errors.
    fn want(&self, _wanted: &Wanted) -> io::Result<()> {
        Ok(())
    }

    /// Notes that it is not any more. The caller holds the SR lock.
    ///
    /// # Errors
    /// I/O errors.
    fn unwant(&self, _vdi: Uuid) -> io::Result<()> {
        Ok(())
    }

    /// Blocks until the reader of a VDI is gone; returns at once when there is
    /// none. For a thread that has nothing else to do.
    ///
    /// # Errors
    /// I/O errors.
    fn until_gone(&self, _vdi: Uuid) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Pending records of the SR's images.
    fn records(&self) -> &dyn RecordStore;
}

/// A lease made and not yet handed to its reader. Dropped, it is dead.
pub trait LeaseHold: Send {
    /// Starts a tapdisk that inherits the lease, and waits, with a stated
    /// limit, until it serves.
    ///
    /// # Errors
    /// It did not come up; the message says what it said last. The lease is
    /// dead then.
    fn start_tap(self: Box<Self>) -> io::Result<Endpoint>;
}

/// Where a tapdisk serves its disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// The NBD socket.
    pub socket: PathBuf,
    /// The export's name there.
    pub export: String,
    /// The process.
    pub pid: u32,
    /// The TCP address, if it listens on one and has just been started.
    pub listen: Option<SocketAddr>,
}

impl Endpoint {
    /// The NBD URI.
    #[must_use]
    pub fn nbd_uri(&self) -> String {
        format!("nbd+unix:///{}?socket={}", self.export, self.socket.display())
    }
}

/// A control connection to one tapdisk. Dropping it ends a pause it holds.
pub trait Tap: Send {
    /// Asks and waits for the last answer.
    ///
    /// # Errors
    /// A refusal, or no answer within the limit.
    fn call(&mut self, request: Request) -> Result<Reply, ClientError>;
    /// Asks and waits for the first answer.
    ///
    /// # Errors
    /// No answer within the limit.
    fn begin(&mut self, request: Request) -> Result<Answer, ClientError>;
    /// Waits for the next answer to call `id`.
    ///
    /// # Errors
    /// No answer within the limit.
    fn next_answer(&mut self, id: u64) -> Result<Answer, ClientError>;
}

impl Tap for Client {
    fn call(&mut self, request: Request) -> Result<Reply, ClientError> {
        Client::call(self, request)
    }

    fn begin(&mut self, request: Request) -> Result<Answer, ClientError> {
        Client::begin(self, request)
    }

    fn next_answer(&mut self, id: u64) -> Result<Answer, ClientError> {
        Client::next_answer(self, id)
    }
}
