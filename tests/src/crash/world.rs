//! A simulated machine with an SR on it: what `sm` and `gc` see of the run
//! folder and of running tapdisks, and the guests behind those.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use gc::watch::{Aborted, Event, Watch};
use sm::catalog::MemoryLabels;
use sm::host::{Endpoint, Guard, Host, LeaseHold, Tap};
use sm::ids::CountedIds;
use sm::lease::Lease;
use sm::limits::Limits;
use sm::repo::Repo;
use tapdisk::driver::PeerId;
use tapdisk::driver::sim::{SimRecords, SimTap};
use tapdisk_control::{Answer, ClientError, ImageRef, Reply, Request};
use uuid::Uuid;
use vhd::footer::{CREATOR_TAP, CREATOR_VERSION, DiskType, Footer, Geometry};
use vhd::record::RecordStore;
use vhd::storage::VolumeName;
use vhd::storage::sim::SimDisk;

use super::guest::Guest;
use super::oracle::{Instant, Oracle};

/// Blocks of every disk in these tests.
pub const BLOCKS: u64 = 3;
/// Steps a control call may take.
const STEPS_MAX: usize = 50_000;

/// What volumes are on a simulated machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    /// Files in a folder.
    Files,
    /// Devices of a volume manager.
    Devices,
}

impl Backend {
    pub const ALL: [Self; 2] = [Self::Files, Self::Devices];

    /// An empty machine. On devices others have left things lying about, the
    /// footer of an image of theirs among them.
    pub fn machine(self, seed: u64) -> SimDisk {
        match self {
            Self::Files => SimDisk::new(),
            Self::Devices => SimDisk::with_devices(seed + 1, &[strangers_footer()]),
        }
    }
}

fn strangers_footer() -> [u8; 512] {
    Footer {
        features: 2,
        timestamp: 0,
        creator: CREATOR_TAP,
        creator_version: CREATOR_VERSION,
        creator_os: 0,
        data_offset: 512,
        original_bytes: BLOCKS << 21,
        virtual_bytes: BLOCKS << 21,
        geometry: Geometry::of(BLOCKS << 21),
        disk_type: DiskType::Dynamic,
        uuid: Uuid::from_u128(0x57A6_E125),
        saved: 0,
        hidden: false,
        poisoned: false,
    }
    .to_bytes()
}

/// A guest shared by the scenario and by control connections.
pub type SharedGuest = Arc<Mutex<Guest>>;

/// See the module.
#[derive(Clone)]
pub struct World {
    pub disk: SimDisk,
    pub repo: Repo,
    pub host: Arc<SimHost>,
    /// Windows until the collector is aborted.
    pub patience: Arc<AtomicU32>,
}

impl World {
    /// A machine in a given state, nobody running.
    pub fn over(disk: SimDisk, seed: u64) -> Self {
        let host = Arc::new(SimHost {
            records: SimRecords::new(&disk),
            disk: disk.clone(),
            seed,
            inner: Arc::default(),
        });
        let repo = Repo {
            uuid: Uuid::from_u128(0x5E),
            name: "sim".to_owned(),
            volumes: disk.volumes(),
            host: host.clone(),
            labels: Arc::new(MemoryLabels::default()),
            heads: Arc::default(),
            ids: Arc::new(CountedIds::from(seed << 16 | 1)),
            limits: Limits { scan_threads: 1, ..Limits::default() },
        };
        Self { disk, repo, host, patience: Arc::new(AtomicU32::new(u32::MAX)) }
    }

    /// Attaches a VDI and returns its guest.
    pub fn attach(&self, vdi: Uuid, oracle: Oracle) -> SharedGuest {
        locked(&self.host.inner).oracles.insert(vdi, oracle);
        sm::ops::attach(&self.repo, vdi, false).expect("attach");
        Arc::clone(&locked(&self.host.inner).guests[&vdi])
    }

    /// Attaches a snapshot for reading: a reader that holds its map and reads
    /// all through whatever happens.
    pub fn attach_reader(&self, vdi: Uuid, of: Oracle, instant: Instant) -> SharedGuest {
        locked(&self.host.inner).oracles.insert(vdi, of);
        sm::ops::attach(&self.repo, vdi, true).expect("attach for reading");
        let guest = Arc::clone(&locked(&self.host.inner).guests[&vdi]);
        locked(&guest).snapshot = Some(instant);
        guest
    }

    /// The tapdisk of a VDI dies when it is asked to pause.
    pub fn doom(&self, vdi: Uuid) {
        locked(&self.host.inner).doomed.insert(vdi);
    }

    /// The tapdisk of a VDI dies; what it had in flight never lands.
    pub fn kill(&self, vdi: Uuid) {
        let mut inner = locked(&self.host.inner);
        if let Some(guest) = inner.guests.remove(&vdi) {
            locked(&guest).tap.die();
        }
        inner.leases.remove(&vdi);
    }
}

/// Lets guests work while a job waits.
impl Watch for World {
    fn now(&self) -> Duration {
        Duration::from_millis(self.disk.log_len() as u64)
    }

    fn sleep(&self, _time: Duration) -> Result<(), Aborted> {
        let guests: Vec<SharedGuest> = locked(&self.host.inner).guests.values().cloned().collect();
        for guest in guests {
            for _ in 0..4 {
                locked(&guest).pump();
            }
        }
        Ok(())
    }

    fn allow(&self, _bytes: u64) -> Result<(), Aborted> {
        if self.patience.fetch_sub(1, Ordering::Relaxed) == 0 {
            return Err(Aborted);
        }
        self.sleep(Duration::ZERO)
    }

    fn note(&self, _event: Event) {}

    fn rate(&self) -> u64 {
        0
    }
}

#[derive(Default)]
struct Inner {
    guests: BTreeMap<Uuid, SharedGuest>,
    leases: BTreeMap<Uuid, Lease>,
    readers: BTreeMap<u64, Lease>,
    held: BTreeSet<Uuid>,
    doomed: BTreeSet<Uuid>,
    oracles: BTreeMap<Uuid, Oracle>,
    peers: u64,
    busy_lock: Option<u64>,
}

/// The run folder of the simulated machine.
pub struct SimHost {
    disk: SimDisk,
    records: SimRecords,
    pub seed: u64,
    inner: Arc<Mutex<Inner>>,
}

/// An intent that is worked on.
struct HeldIntent {
    inner: Arc<Mutex<Inner>>,
    id: Uuid,
}

impl Drop for HeldIntent {
    fn drop(&mut self) {
        locked(&self.inner).held.remove(&self.id);
    }
}

/// A lease of the operation's own.
struct Reading {
    inner: Arc<Mutex<Inner>>,
    id: u64,
}

impl Drop for Reading {
    fn drop(&mut self) {
        locked(&self.inner).readers.remove(&self.id);
    }
}

impl SimHost {
    /// The SR lock cannot be had once, after so many times from now; `None`: it
    /// can always. Returns whether that was still to come.
    pub fn set_busy_lock(&self, after: Option<u64>) -> bool {
        std::mem::replace(&mut locked(&self.inner).busy_lock, after).is_some()
    }
}

impl std::fmt::Debug for SimHost {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SimHost")
    }
}

pub fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Host for SimHost {
    fn lock_sr(&self) -> io::Result<Guard> {
        let mut inner = locked(&self.inner);
        match inner.busy_lock.map(|left| left.checked_sub(1)) {
            Some(None) => {
                inner.busy_lock = None;
                Err(io::ErrorKind::WouldBlock.into())
            }
            Some(left) => {
                inner.busy_lock = left;
                Ok(Box::new(()))
            }
            None => Ok(Box::new(())),
        }
    }

    fn hold_intent(&self, id: Uuid) -> io::Result<Option<Guard>> {
        let mine = locked(&self.inner).held.insert(id);
        Ok(mine.then(|| Box::new(HeldIntent { inner: Arc::clone(&self.inner), id }) as Guard))
    }

    fn leases(&self) -> io::Result<Vec<Lease>> {
        let inner = locked(&self.inner);
        Ok(inner.leases.values().chain(inner.readers.values()).cloned().collect())
    }

    fn make_lease(&self, lease: &Lease) -> io::Result<Box<dyn LeaseHold>> {
        locked(&self.inner).leases.insert(lease.vdi, Lease { pid: 1, ..lease.clone() });
        let disk = self.disk.clone();
        let files = disk.volumes();
        let top = VolumeName::new(&lease.chain[0].volume).expect("a volume name");
        let (seed, vdi) = (self.seed, lease.vdi);
        let tap = SimTap::open(&disk, files, &top, lease.read_only, seed).map_err(io::Error::other)?;
        let oracle = locked(&self.inner).oracles.remove(&vdi).unwrap_or_default();
        let guest = Guest::new(tap, disk, BLOCKS, oracle, seed);
        locked(&self.inner).guests.insert(vdi, Arc::new(Mutex::new(guest)));
        Ok(Box::new(Started(self.endpoint(lease))))
    }

    fn make_reader(&self, lease: &Lease) -> io::Result<Guard> {
        let mut inner = locked(&self.inner);
        inner.peers += 1;
        let id = inner.peers;
        inner.readers.insert(id, lease.clone());
        Ok(Box::new(Reading { inner: Arc::clone(&self.inner), id }))
    }

    fn update_lease(&self, vdi: Uuid, chain: &[ImageRef]) -> io::Result<()> {
        if let Some(lease) = locked(&self.inner).leases.get_mut(&vdi) {
            lease.chain = chain.to_vec();
        }
        Ok(())
    }

    fn tap(&self, vdi: Uuid) -> io::Result<Option<Box<dyn Tap>>> {
        let mut inner = locked(&self.inner);
        inner.peers += 1;
        let peer = PeerId(inner.peers);
        let guest = inner.guests.get(&vdi).cloned();
        let doomed = inner.doomed.remove(&vdi);
        Ok(guest.map(|guest| Box::new(Connection { guest, peer, next: 1, doomed }) as Box<dyn Tap>))
    }

    fn endpoint(&self, lease: &Lease) -> Endpoint {
        Endpoint { socket: "sim".into(), export: lease.vdi.to_string(), pid: 1, listen: None }
    }

    fn wait_gone(&self, vdi: Uuid) -> io::Result<bool> {
        let mut inner = locked(&self.inner);
        if let Some(guest) = inner.guests.remove(&vdi) {
            locked(&guest).tap.die();
        }
        inner.leases.remove(&vdi);
        Ok(true)
    }

    fn records(&self) -> &dyn RecordStore {
        &self.records
    }
}

struct Started(Endpoint);

impl LeaseHold for Started {
    fn start_tap(self: Box<Self>) -> io::Result<Endpoint> {
        Ok(self.0)
    }
}

/// A control connection: guests go on while an answer is waited for.
struct Connection {
    guest: SharedGuest,
    peer: PeerId,
    next: u64,
    /// The tapdisk dies when it is asked to pause.
    doomed: bool,
}

impl Tap for Connection {
    fn call(&mut self, request: Request) -> Result<Reply, ClientError> {
        let swapped = matches!(request, Request::Resume { swap: true, .. });
        let mut answer = self.begin(request)?;
        while !answer.last {
            answer = self.next_answer(answer.id)?;
        }
        if swapped && answer.outcome.is_ok() {
            // The caller is slow: a guest's flush comes before its own syncs.
            locked(&self.guest).busy_then_flush(20);
        }
        Ok(answer.outcome?)
    }

    fn begin(&mut self, request: Request) -> Result<Answer, ClientError> {
        let id = self.next;
        self.next += 1;
        if self.doomed && matches!(request, Request::Pause { .. }) {
            locked(&self.guest).tap.die();
            return Err(io::Error::from(io::ErrorKind::BrokenPipe).into());
        }
        locked(&self.guest).tap.call(self.peer, id, request);
        self.next_answer(id)
    }

    fn next_answer(&mut self, _id: u64) -> Result<Answer, ClientError> {
        let mut guest = locked(&self.guest);
        for _ in 0..STEPS_MAX {
            if let Some(answer) = guest.tap.take_answer(self.peer) {
                return Ok(answer);
            }
            guest.pump();
        }
        Err(io::Error::from(io::ErrorKind::TimedOut).into())
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        locked(&self.guest).tap.peer_gone(self.peer);
    }
}
