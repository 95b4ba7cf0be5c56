//! A simulated host for one SR: locks, leases and tapdisks that die with it.
#![allow(dead_code, reason = "each test binary uses a part of it")]
#![allow(clippy::unwrap_used, reason = "a helper of tests fails by panicking")]

pub mod folder;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::{Arc, Mutex};

use sm::catalog::MemoryLabels;
use sm::host::{Endpoint, Guard, Host, LeaseHold, Tap};
use sm::ids::CountedIds;
use sm::lease::Lease;
use sm::limits::Limits;
use sm::{Repo, image, journal};
use tapdisk_control::{Answer, ClientError, Extent, ImageRef, IntentNames, Refusal, Reply, Request, Stats};
use uuid::Uuid;
use vhd::chain::Chain;
use vhd::meta::Meta;
use vhd::placed::Placed;
use vhd::record::{Owner, PendingRecord, RECORD_WORDS, RecordStore, Words};
use vhd::storage::{Access, VolumeName, Volumes};
use vhd::units::{BLOCK_BYTES, BlockNo, SectorRun};
use vhd::writer::Writer;

#[derive(Debug, Clone)]
struct Memory(Arc<Mutex<Vec<u64>>>);

impl Words for Memory {
    fn load(&self, index: usize) -> u64 {
        self.0.lock().unwrap()[index]
    }
    fn store(&mut self, index: usize, value: u64) {
        self.0.lock().unwrap()[index] = value;
    }
}

/// Pending records in memory.
#[derive(Debug, Default)]
pub struct MemoryRecords(Mutex<BTreeMap<Uuid, Memory>>);

fn owner(footer: Uuid) -> Owner {
    Owner { boot: Uuid::from_u128(1), footer, epoch: 1 }
}

impl RecordStore for MemoryRecords {
    fn existing(&self, footer: Uuid) -> io::Result<Option<PendingRecord>> {
        let words = self.0.lock().unwrap().get(&footer).cloned();
        Ok(words.and_then(|words| PendingRecord::existing(Box::new(words), owner(footer))))
    }
    fn create(&self, footer: Uuid) -> io::Result<PendingRecord> {
        let words = Memory(Arc::new(Mutex::new(vec![0; RECORD_WORDS])));
        self.0.lock().unwrap().insert(footer, words.clone());
        Ok(PendingRecord::format(Box::new(words), owner(footer)))
    }
    fn remove(&self, footer: Uuid) -> io::Result<()> {
        self.0.lock().unwrap().remove(&footer);
        Ok(())
    }
}

/// What a tapdisk does when asked to pause.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mood {
    /// Does as it is told.
    #[default]
    Willing,
    /// Refuses to pause.
    Refuses,
    /// Its guest writes between the statistics and the pause.
    WritesFirst,
    /// Refuses to stop: it is at something else.
    Occupied,
    /// Refuses to stop: clients are connected.
    HasClients,
    /// The pause runs out of time before anything is decided.
    TimesOut,
    /// Told to swap its leaf, it cannot.
    Stuck,
}

/// The host; clones are the same one.
#[derive(Debug, Clone)]
pub struct FakeHost(Arc<Fake>);

/// What is on it.
#[derive(Debug)]
pub struct Fake {
    /// What the tapdisks do I/O through: they are processes of their own.
    taps_volumes: Arc<dyn Volumes>,
    records: MemoryRecords,
    pub leases: Mutex<Vec<Lease>>,
    held: Mutex<BTreeSet<Uuid>>,
    pub mood: Mutex<Mood>,
    /// What a tapdisk could not swap in.
    stuck: Mutex<Option<(ImageRef, String)>>,
    /// Requests the tapdisks got, by name.
    pub heard: Mutex<Vec<String>>,
}

impl FakeHost {
    pub fn new(taps_volumes: Arc<dyn Volumes>) -> Self {
        Self(Arc::new(Fake {
            taps_volumes,
            records: MemoryRecords::default(),
            leases: Mutex::default(),
            held: Mutex::default(),
            mood: Mutex::default(),
            stuck: Mutex::default(),
            heard: Mutex::default(),
        }))
    }
}

impl std::ops::Deref for FakeHost {
    type Target = Fake;

    fn deref(&self) -> &Fake {
        &self.0
    }
}

impl Host for FakeHost {
    fn lock_sr(&self) -> io::Result<Guard> {
        Ok(Box::new(()))
    }
    fn hold_intent(&self, id: Uuid) -> io::Result<Option<Guard>> {
        let mine = self.held.lock().unwrap().insert(id);
        Ok(mine.then(|| Box::new(HeldIntent { host: self.clone(), id }) as Guard))
    }
    fn leases(&self) -> io::Result<Vec<Lease>> {
        Ok(self.leases.lock().unwrap().clone())
    }
    fn make_lease(&self, lease: &Lease) -> io::Result<Box<dyn LeaseHold>> {
        Ok(Box::new(FakeHold { host: self.clone(), lease: lease.clone() }))
    }
    fn make_reader(&self, lease: &Lease) -> io::Result<Guard> {
        self.leases.lock().unwrap().push(lease.clone());
        Ok(Box::new(FakeReader { host: self.clone(), lease: lease.clone() }))
    }
    fn update_lease(&self, vdi: Uuid, chain: &[ImageRef]) -> io::Result<()> {
        for lease in self.leases.lock().unwrap().iter_mut().filter(|lease| lease.serves(vdi)) {
            lease.chain = chain.to_vec();
        }
        Ok(())
    }
    fn tap(&self, vdi: Uuid) -> io::Result<Option<Box<dyn Tap>>> {
        let lease = self.leases.lock().unwrap().iter().find(|lease| lease.serves(vdi)).cloned();
        Ok(lease.map(|lease| {
            Box::new(FakeTap { host: self.clone(), lease, child: None, paused: None }) as Box<dyn Tap>
        }))
    }
    fn endpoint(&self, lease: &Lease) -> Endpoint {
        Endpoint { socket: "fake".into(), export: lease.vdi.to_string(), pid: lease.pid, listen: None }
    }
    fn wait_gone(&self, vdi: Uuid) -> io::Result<bool> {
        self.leases.lock().unwrap().retain(|lease| lease.vdi != vdi);
        Ok(true)
    }
    fn records(&self) -> &dyn RecordStore {
        &self.records
    }
}

struct HeldIntent {
    host: FakeHost,
    id: Uuid,
}

impl Drop for HeldIntent {
    fn drop(&mut self) {
        self.host.held.lock().unwrap().remove(&self.id);
    }
}

struct FakeReader {
    host: FakeHost,
    lease: Lease,
}

impl Drop for FakeReader {
    fn drop(&mut self) {
        let mut leases = self.host.leases.lock().unwrap();
        let at = leases.iter().position(|lease| *lease == self.lease);
        at.map(|at| leases.remove(at));
    }
}

struct FakeHold {
    host: FakeHost,
    lease: Lease,
}

impl LeaseHold for FakeHold {
    fn start_tap(self: Box<Self>) -> io::Result<Endpoint> {
        let lease = Lease { pid: 7, ..self.lease };
        self.host.leases.lock().unwrap().push(lease.clone());
        Ok(self.host.endpoint(&lease))
    }
}

/// A tapdisk as far as tree changes see it. Its image is only open during a
/// request, which is enough for these tests.
struct FakeTap {
    host: FakeHost,
    lease: Lease,
    child: Option<(ImageRef, String)>,
    paused: Option<IntentNames>,
}

impl FakeTap {
    fn leaf(&self) -> VolumeName {
        VolumeName::vhd(self.lease.vdi)
    }

    fn open(&self, name: &VolumeName) -> Writer {
        Writer::open(self.host.taps_volumes.as_ref(), name, &self.host.records).unwrap()
    }

    fn answer(&mut self, request: Request) -> Result<Reply, Refusal> {
        let said = format!("{request:?}");
        let word = said.split([' ', '{']).next().unwrap_or_default().to_owned();
        self.host.heard.lock().unwrap().push(word);
        let mood = *self.host.mood.lock().unwrap();
        let busy = || Refusal::Busy { detail: "in a bad mood".into() };
        match request {
            Request::Stats => {
                let leaf = self.open(&self.leaf());
                Ok(Reply::Stats(Box::new(Stats {
                    virtual_bytes: leaf.meta().virtual_bytes(),
                    leaf_blocks: leaf.blocks().len() as u64,
                    read_only: self.lease.read_only,
                    ..Stats::default()
                })))
            }
            Request::Prepare { child, base, .. } => {
                self.child = child.zip(base);
                Ok(Reply::Done)
            }
            Request::Pause { .. } if mood == Mood::Refuses => Err(busy()),
            Request::Pause { intent, .. } => {
                if mood == Mood::WritesFirst {
                    write(self.host.taps_volumes.as_ref(), &self.leaf(), &self.host.records, 0, 0xEE);
                }
                let leaf_is_empty = self.open(&self.leaf()).blocks().is_empty();
                self.paused = Some(intent);
                if mood == Mood::TimesOut {
                    self.end_lease();
                }
                Ok(Reply::Paused { leaf_is_empty })
            }
            Request::Resume { swap: true, .. } if mood == Mood::Stuck => {
                self.host.stuck.lock().unwrap().get_or_insert_with(|| self.child.take().unwrap());
                self.paused = None;
                Err(Refusal::Failed { detail: "new.vhd cannot take the name: no space".into() })
            }
            // It is told again, and can.
            Request::Resume { swap: true, .. } if self.host.stuck.lock().unwrap().is_some() => {
                self.child = self.host.stuck.lock().unwrap().take();
                self.resume(true);
                Ok(Reply::Done)
            }
            Request::Resume { swap, .. } => {
                if self.paused.take().is_none() {
                    return Err(Refusal::Voided);
                }
                self.resume(swap);
                Ok(Reply::Done)
            }
            Request::SettleBase { base } => {
                let name = VolumeName::new(&base.volume).unwrap();
                match self.open(&name).settle(Some(true)) {
                    Ok(()) => Ok(Reply::Done),
                    Err(error) => Err(Refusal::Failed { detail: error.to_string() }),
                }
            }
            Request::Grow { virtual_bytes, .. } => {
                let volume = self.host.taps_volumes.open(&self.leaf(), Access::Write).unwrap();
                let mut meta = Meta::read(volume.as_ref()).unwrap();
                match vhd::resize::grow(volume.as_ref(), &mut meta, virtual_bytes) {
                    Ok(()) => Ok(Reply::Done),
                    Err(error) => Err(Refusal::Failed { detail: error.to_string() }),
                }
            }
            Request::MergeStop => Ok(Reply::Done),
            Request::Extents { offset, length } => {
                let chain = Chain::open(self.host.taps_volumes.as_ref(), &self.leaf()).unwrap();
                let runs = chain.placed(BlockNo::of_byte(offset)).unwrap();
                let runs = runs.iter().filter_map(|run| run.within(offset, offset + length));
                let extent =
                    |run: Placed| Extent { length: run.len, at: run.at.map(|at| (at.image, at.offset)) };
                Ok(Reply::Extents { extents: runs.map(extent).collect() })
            }
            Request::LeafBlocks { from } => {
                // One run an answer, so that callers must ask on.
                let blocks = self.open(&self.leaf()).blocks();
                let mut left = blocks.iter().map(|block| block.0).filter(|block| *block >= from);
                let runs = left.next().map(|block| (block, 1)).into_iter().collect();
                Ok(Reply::Blocks { runs, next: left.next() })
            }
            Request::Stop { .. } if mood == Mood::Occupied => Err(busy()),
            Request::Stop { force: false } if mood == Mood::HasClients => {
                Err(Refusal::InUse { detail: "2 NBD clients are connected".into() })
            }
            Request::Stop { .. } => {
                self.host.leases.lock().unwrap().retain(|lease| lease.vdi != self.lease.vdi);
                Ok(Reply::Done)
            }
            other => Err(Refusal::Bad { detail: format!("{other:?}") }),
        }
    }

    fn resume(&mut self, swap: bool) {
        if let (true, Some((child, base))) = (swap, self.child.take()) {
            let (child, base) = (VolumeName::new(&child.volume).unwrap(), VolumeName::new(&base).unwrap());
            // Fails only when the machine is dead.
            let _ = self.host.taps_volumes.swap(&child, &self.leaf(), &base);
        }
    }

    /// What a real tapdisk does when the pauser is gone or out of time.
    fn end_lease(&mut self) {
        let Some(intent) = self.paused.take() else {
            return;
        };
        let volumes = &self.host.taps_volumes;
        let voided = volumes.rename_record(&intent.pending, &intent.void);
        let decided = volumes.record(&intent.decided);
        let swap = matches!(voided, Ok(false)) && matches!(decided, Ok(Some(_)));
        self.resume(swap);
    }
}

impl Drop for FakeTap {
    fn drop(&mut self) {
        self.end_lease();
    }
}

impl Tap for FakeTap {
    fn call(&mut self, request: Request) -> Result<Reply, ClientError> {
        Ok(self.answer(request)?)
    }
    fn begin(&mut self, request: Request) -> Result<Answer, ClientError> {
        Ok(Answer { id: 1, last: true, outcome: self.answer(request) })
    }
    fn next_answer(&mut self, _id: u64) -> Result<Answer, ClientError> {
        Err(io::Error::from(io::ErrorKind::UnexpectedEof).into())
    }
}

/// An SR over `volumes`; `process` keeps the uuids of two processes apart.
pub fn repo(volumes: Arc<dyn Volumes>, host: &FakeHost, process: u64) -> Repo {
    Repo {
        uuid: Uuid::from_u128(99),
        name: "sr".into(),
        volumes,
        host: Arc::new(host.clone()),
        labels: Arc::new(MemoryLabels::default()),
        heads: Arc::default(),
        ids: Arc::new(CountedIds::from(process * 10_000)),
        limits: Limits { scan_threads: 1, ..Limits::default() },
    }
}

/// Fills the first sectors of a block and commits.
pub fn write(volumes: &dyn Volumes, leaf: &VolumeName, records: &dyn RecordStore, block: u32, byte: u8) {
    let below = Chain::open(volumes, leaf).unwrap().nodes().len() > 1;
    let mut writer = Writer::open(volumes, leaf, records).unwrap();
    let run = SectorRun { first: 0, count: 8 };
    writer.write(BlockNo(block), run, &[byte; 4096], below).unwrap();
    writer.commit().unwrap();
    writer.settle(None).unwrap();
}

/// As [`write`], through a repo.
pub fn fill(repo: &Repo, vdi: Uuid, block: u32, byte: u8) {
    let leaf = VolumeName::vhd(vdi);
    write(repo.volumes.as_ref(), &leaf, repo.host.records(), block, byte);
}

/// The first byte of a block as the VDI reads it.
pub fn byte(repo: &Repo, vdi: Uuid, block: u32) -> u8 {
    let chain = Chain::open(repo.volumes.as_ref(), &VolumeName::vhd(vdi)).unwrap();
    let mut buffer = [0; 512];
    chain.read_at(&mut buffer, u64::from(block) * BLOCK_BYTES).unwrap();
    buffer[0]
}

/// Names of all volumes.
pub fn volumes(repo: &Repo) -> Vec<String> {
    repo.volumes.list().unwrap().iter().map(ToString::to_string).collect()
}

/// Nothing is half done, and nothing is left over.
pub fn assert_clean(repo: &Repo) {
    assert_eq!(journal::load(repo.volumes.as_ref()).unwrap(), []);
    let left: Vec<String> = volumes(repo).into_iter().filter(|v| v.starts_with("tmp-")).collect();
    assert_eq!(left, [""; 0]);
    for volume in repo.volumes.list().unwrap() {
        let meta = image::meta(repo, &volume).unwrap();
        assert!(!meta.footer.poisoned);
    }
}
