//! The real [`Host`]: locks, leases and tapdisks in the run folder.
//!
//! ```text
//!   <run>/sr/<sr>.lock             the SR lock
//!   <run>/intents/<intent>         locked while somebody works on the intent
//!   <run>/records/<sr>/<footer>    pending records
//!   <run>/tap/<vdi>/lease          locked by the tapdisk for its whole life
//!                   wanted         there until the VDI is detached
//!                   ctl.sock  nbd.sock  log
//!   <run>/readers/<sr>/…           leases of copies and exports, see readers.rs
//! ```
//!
//! The folder is on tmpfs and outlives us: leases are how a restarted smd
//! finds the tapdisks that went on without it.

use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use tapdisk_control::{Client, ImageRef};
use uuid::Uuid;
use vhd::record::{RecordStore, TmpfsRecords};

use crate::host::{Endpoint, Guard, Host, LeaseHold, Tap};
use crate::lease::Lease;
use crate::limits::{
    LEASE_READS_MAX, LEASE_REREAD, SMALL_FILE_BYTES_MAX, SR_LOCK_WAIT_MS_MAX, TAP_ANSWER_MS_MAX,
    TAP_STOP_MS_MAX,
};
use crate::owner::{HostId, Owner};
use crate::readers::Readers;
use crate::spawn::{self, TapOrder, TapProgram};
use crate::wanted::{Wanted, WantedFiles};

/// How often a lock or a lease that is waited for is looked at.
const POLL: Duration = Duration::from_millis(2);

/// This machine, for one file SR.
#[derive(Debug, Clone)]
pub struct RunFolder {
    run: PathBuf,
    sr: Uuid,
    sr_folder: PathBuf,
    boot: Uuid,
    records: Arc<TmpfsRecords>,
    readers: Readers,
    owner: Arc<Owner>,
    /// `None` for a process that attaches nothing (gcd).
    program: Option<TapProgram>,
}

/// Makes a private folder, with its parents; fine if it is there.
///
/// # Errors
/// I/O errors.
pub fn make_folder(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)
}

impl RunFolder {
    /// Opens the run folder for an SR whose use `owner` proves.
    ///
    /// # Errors
    /// The folders cannot be made.
    pub fn open(
        run: &Path,
        sr: Uuid,
        sr_folder: &Path,
        id: HostId,
        owner: Arc<Owner>,
        program: Option<TapProgram>,
    ) -> io::Result<Self> {
        let records = run.join("records").join(sr.to_string());
        for folder in [&run.join("sr"), &run.join("intents"), &run.join("tap"), &records] {
            make_folder(folder)?;
        }
        let records = Arc::new(TmpfsRecords::new(records, id.boot, owner.epoch));
        let (run, sr_folder) = (run.to_owned(), sr_folder.to_owned());
        let readers = Readers::open(&run, sr)?;
        Ok(Self { run, sr, sr_folder, boot: id.boot, records, readers, owner, program })
    }

    fn tap_folder(&self, vdi: Uuid) -> PathBuf {
        self.run.join("tap").join(vdi.to_string())
    }

    fn on_wanted<T>(&self, work: impl FnOnce(WantedFiles<'_>) -> io::Result<T>) -> io::Result<T> {
        let taps = self.run.join("tap");
        work(WantedFiles { taps: &taps, sr: self.sr, boot: self.boot, epoch: self.owner.epoch })
    }

    fn control(&self, vdi: Uuid) -> PathBuf {
        self.tap_folder(vdi).join("ctl.sock")
    }

    fn order(&self, lease: &Lease) -> io::Result<TapOrder> {
        let leaf = lease.chain.first().ok_or_else(|| io::Error::other("a lease of nothing"))?;
        Ok(TapOrder {
            sr: self.sr,
            boot: self.boot,
            sr_folder: self.sr_folder.clone(),
            vdi: lease.vdi,
            volume: leaf.volume.clone(),
            run_folder: self.tap_folder(lease.vdi),
            records: self.run.join("records").join(self.sr.to_string()),
            epoch: self.owner.epoch,
            read_only: lease.read_only,
            remote: self.wanted_one(lease.vdi)?.and_then(|wanted| wanted.remote),
        })
    }

    /// The lease of a VDI if somebody alive holds it. A dead one is removed
    /// with its sockets when `reap`.
    fn live_lease(&self, vdi: Uuid, reap: bool) -> io::Result<Option<Lease>> {
        let path = self.tap_folder(vdi).join("lease");
        let file = match OpenOptions::new().read(true).write(true).open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        if try_lock(file.try_lock_shared())? {
            if reap {
                for name in ["lease", "ctl.sock", "nbd.sock"] {
                    remove(&self.tap_folder(vdi).join(name))?;
                }
                tracing::info!(sr = %self.sr, %vdi, "lease ended");
            }
            return Ok(None);
        }
        let mut lease = read_lease(&file)?;
        if lease.pid == 0 {
            lease.pid = self.pid_of_server(vdi);
        }
        Ok((lease.sr == self.sr).then_some(lease))
    }

    /// Removes the folder of a VDI that was detached: with thousands of disks
    /// a day every look at the leases would get slower. The caller holds the
    /// SR lock.
    fn tidy(&self, vdi: Uuid) -> io::Result<()> {
        let folder = self.tap_folder(vdi);
        if !folder.join("wanted").exists() {
            remove(&folder.join("log"))?;
            // Something of others in it: then it stays.
            let _ = fs::remove_dir(&folder);
        }
        Ok(())
    }

    /// The process that listens on a VDI's control socket; 0 if none does
    /// yet. For a lease whose maker died before noting it.
    fn pid_of_server(&self, vdi: Uuid) -> u32 {
        let Ok(stream) = UnixStream::connect(self.control(vdi)) else {
            return 0;
        };
        getsockopt(&stream, PeerCredentials).ok().and_then(|peer| u32::try_from(peer.pid()).ok()).unwrap_or(0)
    }

    /// All VDIs that have a folder under `tap`.
    fn known_vdis(&self) -> io::Result<Vec<Uuid>> {
        let mut vdis = Vec::new();
        for entry in fs::read_dir(self.run.join("tap"))? {
            let name = entry?.file_name();
            vdis.extend(name.to_str().and_then(|name| Uuid::try_parse(name).ok()));
        }
        vdis.sort_unstable();
        Ok(vdis)
    }
}

impl Host for RunFolder {
    fn lock_sr(&self) -> io::Result<Guard> {
        let file = lock_file(&self.run.join("sr").join(format!("{}.lock", self.sr)))?;
        let deadline = Instant::now() + Duration::from_millis(SR_LOCK_WAIT_MS_MAX);
        while !try_lock(file.try_lock())? {
            if Instant::now() >= deadline {
                let text = format!("not free within {SR_LOCK_WAIT_MS_MAX} ms");
                return Err(io::Error::new(io::ErrorKind::WouldBlock, text));
            }
            std::thread::sleep(POLL);
        }
        Ok(Box::new(file))
    }

    fn hold_intent(&self, id: Uuid) -> io::Result<Option<Guard>> {
        let path = self.run.join("intents").join(id.to_string());
        let file = lock_file(&path)?;
        if !try_lock(file.try_lock())? {
            return Ok(None);
        }
        // The last holder may have removed it between our open and our lock;
        // whoever comes next would then lock another file.
        match fs::metadata(&path) {
            Ok(there) if there.ino() == file.metadata()?.ino() => {
                Ok(Some(Box::new(HeldIntent { _file: file, path })))
            }
            Ok(_) => Ok(None),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn leases(&self) -> io::Result<Vec<Lease>> {
        let mut leases = Vec::new();
        for vdi in self.known_vdis()? {
            leases.extend(self.live_lease(vdi, true)?);
        }
        leases.extend(self.readers.live()?);
        Ok(leases)
    }

    fn is_served(&self, vdi: Uuid) -> io::Result<bool> {
        Ok(self.live_lease(vdi, false)?.is_some())
    }

    fn make_lease(&self, lease: &Lease) -> io::Result<Box<dyn LeaseHold>> {
        let folder = self.tap_folder(lease.vdi);
        make_folder(&folder)?;
        for name in ["lease.new", "ctl.sock", "nbd.sock"] {
            remove(&folder.join(name))?;
        }
        // Locked before it has its name: it is never seen dead.
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(folder.join("lease.new"))?;
        if !try_lock(file.try_lock())? {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        write_lease(&file, lease)?;
        fs::rename(folder.join("lease.new"), folder.join("lease"))?;
        Ok(Box::new(Held { host: self.clone(), lease: lease.clone(), file }))
    }

    fn make_reader(&self, lease: &Lease) -> io::Result<Guard> {
        self.readers.make(lease)
    }

    fn ask_to_leave(&self, vdi: Uuid) -> io::Result<bool> {
        self.readers.ask_to_leave(vdi)
    }

    fn is_asked_to_leave(&self, vdi: Uuid) -> bool {
        self.readers.is_asked_to_leave(vdi)
    }

    fn update_lease(&self, vdi: Uuid, chain: &[ImageRef]) -> io::Result<()> {
        let path = self.tap_folder(vdi).join("lease");
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        let lease = Lease { chain: chain.to_vec(), ..read_lease(&file)? };
        write_lease(&file, &lease)
    }

    fn tap(&self, vdi: Uuid) -> io::Result<Option<Box<dyn Tap>>> {
        let path = self.tap_folder(vdi).join("lease");
        let file = match File::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        if try_lock(file.try_lock_shared())? {
            return Ok(None);
        }
        let limit = Duration::from_millis(TAP_ANSWER_MS_MAX);
        let client = Client::connect(&self.control(vdi), limit)?;
        Ok(Some(Box::new(client)))
    }

    fn control_socket(&self, vdi: Uuid) -> Option<PathBuf> {
        Some(self.control(vdi))
    }

    fn endpoint(&self, lease: &Lease) -> Endpoint {
        Endpoint {
            socket: self.tap_folder(lease.vdi).join("nbd.sock"),
            export: lease.vdi.to_string(),
            pid: lease.pid,
            listen: None,
        }
    }

    fn wait_gone(&self, vdi: Uuid) -> io::Result<bool> {
        let deadline = Instant::now() + Duration::from_millis(TAP_STOP_MS_MAX);
        loop {
            {
                let _sr = self.lock_sr()?;
                if self.live_lease(vdi, true)?.is_none() {
                    self.tidy(vdi)?;
                    return Ok(true);
                }
            }
            if Instant::now() >= deadline {
                return Ok(false);
            }
            std::thread::sleep(POLL);
        }
    }

    fn wanted(&self) -> io::Result<Vec<Wanted>> {
        let vdis = self.known_vdis()?;
        self.on_wanted(|files| vdis.into_iter().filter_map(|vdi| files.get(vdi).transpose()).collect())
    }

    fn wanted_one(&self, vdi: Uuid) -> io::Result<Option<Wanted>> {
        self.on_wanted(|files| files.get(vdi))
    }

    fn want(&self, wanted: &Wanted) -> io::Result<()> {
        make_folder(&self.tap_folder(wanted.vdi))?;
        self.on_wanted(|files| files.put(wanted))
    }

    fn unwant(&self, vdi: Uuid) -> io::Result<()> {
        self.on_wanted(|files| files.remove(vdi))
    }

    /// A shared lock that is waited for is granted when the last descriptor
    /// of the lease is closed: at the instant the process is gone.
    fn until_gone(&self, vdi: Uuid) -> io::Result<()> {
        match File::open(self.tap_folder(vdi).join("lease")) {
            Ok(lease) => lease.lock_shared(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn records(&self) -> &dyn RecordStore {
        self.records.as_ref()
    }
}

/// An intent somebody works on. Its file goes with it, under its lock.
struct HeldIntent {
    _file: File,
    path: PathBuf,
}

impl Drop for HeldIntent {
    fn drop(&mut self) {
        // A file that stays is only litter: what counts is its lock.
        let _ = fs::remove_file(&self.path);
    }
}

/// A lease we hold for a tapdisk that is not started yet.
struct Held {
    host: RunFolder,
    lease: Lease,
    file: File,
}

impl LeaseHold for Held {
    fn start_tap(self: Box<Self>) -> io::Result<Endpoint> {
        let Self { host, lease, file } = *self;
        let program =
            host.program.as_ref().ok_or_else(|| io::Error::other("this process starts no tapdisks"))?;
        let (pid, listen) = spawn::start(program, &host.order(&lease)?, &file, host.owner.file())?;
        // Leases are read under the SR lock, so that is where they change.
        let _sr = host.lock_sr()?;
        let lease = Lease { pid, ..read_lease(&file)? };
        write_lease(&file, &lease)?;
        Ok(Endpoint { listen, ..host.endpoint(&lease) })
    }
}

/// Reads a lease, live or not. It is written in place, under the lock of its
/// own SR. All SRs keep theirs in one folder, so whoever holds the lock of
/// another SR may see half of that: it looks again.
pub(crate) fn read_lease(file: &File) -> io::Result<Lease> {
    let mut read = read_lease_once(file);
    for _ in 1..LEASE_READS_MAX {
        match &read {
            Err(error)
                if matches!(error.kind(), io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof) =>
            {
                std::thread::sleep(LEASE_REREAD);
                read = read_lease_once(file);
            }
            _ => break,
        }
    }
    read
}

fn read_lease_once(file: &File) -> io::Result<Lease> {
    let len = file.metadata()?.len();
    if len > SMALL_FILE_BYTES_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "a lease too long"));
    }
    let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
    file.read_exact_at(&mut bytes, 0)?;
    serde_json::from_slice(&bytes).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))
}

/// In place: the lock is on this file and no other.
fn write_lease(file: &File, lease: &Lease) -> io::Result<()> {
    let bytes = serde_json::to_vec(lease).map_err(io::Error::other)?;
    file.set_len(bytes.len() as u64)?;
    file.write_all_at(&bytes, 0)
}

fn lock_file(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)
}

fn try_lock(outcome: Result<(), TryLockError>) -> io::Result<bool> {
    match outcome {
        Ok(()) => Ok(true),
        Err(TryLockError::WouldBlock) => Ok(false),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

/// Removes a file; fine if it is gone.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;
    use crate::lease::Reader;

    #[test]
    fn a_lease_that_is_being_written_is_read_whole() {
        let folder = tempfile::tempdir().unwrap();
        let file = lock_file(&folder.path().join("lease")).unwrap();
        let image = |n: u128| ImageRef { volume: Uuid::from_u128(n).to_string(), footer: Uuid::from_u128(n) };
        let lease = |images: u128| Lease {
            vdi: Uuid::from_u128(1),
            sr: Uuid::from_u128(2),
            pid: 3,
            read_only: false,
            reader: Reader::Tapdisk,
            chain: (0..images).map(image).collect(),
        };
        write_lease(&file, &lease(1)).unwrap();
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for _ in 0..1_000 {
                    write_lease(&file, &lease(30)).unwrap();
                    write_lease(&file, &lease(1)).unwrap();
                    // Far more often than any holder, but not always.
                    std::thread::sleep(LEASE_REREAD / 10);
                }
                over.store(true, Ordering::Relaxed);
            });
            let mut torn = 0;
            while !over.load(Ordering::Relaxed) {
                torn += u32::from(read_lease(&file).is_err());
            }
            assert_eq!(torn, 0);
        });
    }
}
