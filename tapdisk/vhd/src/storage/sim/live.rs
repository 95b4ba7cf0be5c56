//! The running simulated machine behind a lock: its state, its log, and what
//! is set up to go wrong.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::{Arc, Mutex};

use super::super::Why;
use super::crash::UNLIMITED;
use super::effect::{Ino, Lasting, folder_of};
use super::log::{Cursor, Event, Op, OpNo, Outcome, What};
use super::sabotage::{Fault, OpClass, Sabotage, Step};
use super::sector::SECTOR;
use super::state::State;

/// Shared by a disk and all states made from it: which steps were seen in the
/// run and its recoveries, and which one is left out in all of them.
#[derive(Default)]
pub(super) struct Family {
    pub(super) whys: Mutex<BTreeSet<(Step, Why)>>,
    pub(super) sabotage: Mutex<Vec<Sabotage>>,
}

/// The label of renames that were given none.
pub(super) const RENAME: Why = "rename";

impl Family {
    /// Notes a labelled step; says whether it is sabotaged this way.
    pub(super) fn meets(&self, step: Step, why: Why) -> bool {
        super::locked(&self.whys).insert((step, why));
        super::locked(&self.sabotage).iter().any(|sabotage| sabotage.hits(step, why))
    }
}

/// How many more operations a simulated process gets to begin.
#[derive(Clone, Copy)]
pub(super) struct Life(pub(super) Option<u64>);

/// Most machines are made to be recovered once and looked at; only those that
/// crash again need a cursor.
enum Past {
    Base(State),
    Walked(Cursor),
}

pub(super) struct Live {
    pub(super) family: Arc<Family>,
    pub(super) state: State,
    pub(super) log: Vec<Event>,
    /// The state the log began with, or where the last look back ended.
    past: Past,
    pub(super) lives: Vec<Life>,
    /// Holder of each exclusive lock: token and process.
    pub(super) locks: BTreeMap<Ino, (u64, usize)>,
    next_token: u64,
    /// Open handles: a file without a name takes up space until closed.
    pub(super) open: BTreeMap<Ino, u64>,
    pub(super) faults: Vec<Fault>,
    /// Sectors the filesystem holds in all.
    pub(super) capacity: u64,
    next_op: u64,
}

impl Live {
    pub(super) fn new(base: State, family: Arc<Family>) -> Self {
        Self {
            family,
            state: base.clone(),
            past: Past::Base(base),
            log: Vec::new(),
            lives: vec![Life(None)],
            locks: BTreeMap::new(),
            next_token: 0,
            open: BTreeMap::new(),
            faults: Vec::new(),
            capacity: UNLIMITED,
            next_op: 0,
        }
    }

    /// The state after the first `prefix` events.
    pub(super) fn at(&mut self, prefix: usize) -> &State {
        if let Past::Base(base) = &mut self.past {
            self.past = Past::Walked(Cursor::new(std::mem::take(base)));
        }
        match &mut self.past {
            Past::Base(base) => base,
            Past::Walked(cursor) => cursor.seek(&self.log, prefix),
        }
    }

    /// Length of a device; `None` for a file.
    pub(super) fn device_len(&self, ino: Ino) -> Option<u64> {
        self.state.devices.contains(&ino).then(|| self.state.content(ino).len)
    }

    /// Records an event and lets it happen.
    pub(super) fn push(&mut self, event: Event) {
        self.state.apply(&event);
        self.log.push(event);
    }

    pub(super) fn alive(&self, process: usize) -> io::Result<()> {
        match self.lives.get(process) {
            Some(Life(Some(0))) => {
                let message = "this simulated process was killed";
                Err(io::Error::new(io::ErrorKind::ConnectionAborted, message))
            }
            _ => Ok(()),
        }
    }

    /// Counts a change about to be made by this process.
    pub(super) fn step(&mut self, process: usize) -> io::Result<()> {
        self.alive(process)?;
        if let Some(Life(Some(left))) = self.lives.get_mut(process) {
            *left -= 1;
            if *left == 0 {
                self.drop_locks(process);
            }
        }
        Ok(())
    }

    pub(super) fn drop_locks(&mut self, process: usize) {
        self.locks.retain(|_, (_, holder)| *holder != process);
    }

    /// Takes the exclusive lock of a file.
    pub(super) fn lock(&mut self, ino: Ino, process: usize) -> io::Result<u64> {
        if self.locks.contains_key(&ino) {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        self.next_token += 1;
        self.locks.insert(ino, (self.next_token, process));
        Ok(self.next_token)
    }

    pub(super) fn unlock(&mut self, ino: Ino, token: u64) {
        if self.locks.get(&ino).is_some_and(|(held, _)| *held == token) {
            self.locks.remove(&ino);
        }
    }

    /// Issues and completes an operation at once. A prefix of the log may
    /// still end between the two.
    pub(super) fn run(&mut self, process: usize, what: What, why: Why) -> io::Result<()> {
        let no = self.begin(process, what, why)?;
        self.end(no)
    }

    pub(super) fn begin(&mut self, process: usize, what: What, why: Why) -> io::Result<OpNo> {
        self.step(process)?;
        let void = match &what {
            What::Flush { .. } => self.family.meets(Step::Flush, why),
            What::SyncNames { .. } => self.family.meets(Step::SyncNames, why),
            // Those without a label of their own have one where they come
            // from, or belong to a record.
            What::Rename { .. } | What::Lasting(Lasting::Rename { .. }) if why != RENAME => {
                self.family.meets(Step::Name, why)
            }
            _ => false,
        };
        let no = OpNo(self.next_op);
        self.next_op += 1;
        self.push(Event::Begin(no, Arc::new(Op { what, why, void })));
        Ok(no)
    }

    /// Completes an operation, or lets it fail as set up.
    pub(super) fn end(&mut self, no: OpNo) -> io::Result<()> {
        let Some(flight) = self.state.in_flight.get(&no) else {
            return Err(io::Error::other("operation completed twice"));
        };
        let op = flight.op.clone();
        let checked = self.fault(OpClass::of(&op.what)).and_then(|()| self.possible(&op.what));
        let outcome = if checked.is_ok() { Outcome::Done } else { Outcome::Failed };
        self.push(Event::End(no, outcome));
        checked
    }

    /// Counts this operation against the faults set up.
    pub(super) fn fault(&mut self, class: OpClass) -> io::Result<()> {
        for fault in &mut self.faults {
            if fault.class.is_some_and(|wanted| wanted != class) || fault.times == 0 {
                continue;
            }
            if fault.after > 0 {
                fault.after -= 1;
            } else {
                fault.times -= 1;
                return Err(io::Error::from_raw_os_error(fault.errno));
            }
        }
        Ok(())
    }

    /// What the filesystem itself would refuse now.
    fn possible(&self, what: &What) -> io::Result<()> {
        let found = |path: &str| match self.state.names.contains_key(path) {
            true => Ok(()),
            false => Err(io::Error::from(io::ErrorKind::NotFound)),
        };
        let free = |path: &str| match found(path) {
            Ok(()) => Err(io::Error::from(io::ErrorKind::AlreadyExists)),
            Err(_) => self.folder_exists(folder_of(path)),
        };
        match what {
            What::Write { ino, offset, bytes } => self.room(*ino, *offset, bytes.len() as u64),
            What::Copy { from, from_at, to, to_at, len } => {
                if *len > 0 && from_at.saturating_add(*len) > self.state.content(*from).len {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                self.room(*to, *to_at, *len)
            }
            What::Create { path, .. } => free(path),
            What::Lasting(change) => self.manageable(change),
            What::Link { from, to } => found(from).and_then(|()| free(to)),
            What::Rename { from, to } => found(from).and_then(|()| self.folder_exists(folder_of(to))),
            What::Unlink { path } => found(path),
            What::SyncNames { folder } => self.folder_exists(folder),
            What::SetLen { ino, .. } if self.state.devices.contains(ino) => {
                Err(io::ErrorKind::Unsupported.into())
            }
            _ => Ok(()),
        }
    }

    /// What the volume manager would refuse now.
    fn manageable(&self, change: &Lasting) -> io::Result<()> {
        let names = &self.state.names;
        let free = |path| match names.contains_key(path) {
            true => Err(io::Error::from(io::ErrorKind::AlreadyExists)),
            false => Ok(()),
        };
        let known = |path| match names.contains_key(path) {
            true => Ok(()),
            false => Err(io::Error::from(io::ErrorKind::NotFound)),
        };
        let more = |now: u64, len: u64| {
            let sectors = len.saturating_sub(now) / SECTOR;
            let room = self.capacity == UNLIMITED || sectors <= self.capacity.saturating_sub(self.used());
            if room || sectors == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(nix::libc::ENOSPC)) }
        };
        match change {
            Lasting::Make { path, len, .. } => free(path).and_then(|()| more(0, *len)),
            Lasting::Resize { ino, len } => more(self.state.content(*ino).len, *len),
            Lasting::Rename { from, to } => known(from).and_then(|()| free(to)),
            Lasting::Remove { path } => known(path),
            Lasting::RenameRecord { from, .. } if !self.state.records.contains_key(from) => {
                Err(io::ErrorKind::NotFound.into())
            }
            Lasting::PutRecord { .. } | Lasting::RenameRecord { .. } | Lasting::RemoveRecord { .. } => Ok(()),
        }
    }

    pub(super) fn folder_exists(&self, folder: &str) -> io::Result<()> {
        match folder.is_empty() || self.state.folders.contains(folder) {
            true => Ok(()),
            false => Err(io::ErrorKind::NotFound.into()),
        }
    }

    /// Whether the holes in a range can be filled. All or nothing: a real
    /// filesystem may write a part, but no caller may rely on either.
    fn room(&self, ino: Ino, offset: u64, len: u64) -> io::Result<()> {
        let full = || Err(io::Error::from_raw_os_error(nix::libc::ENOSPC));
        if self.state.devices.contains(&ino) {
            let inside = offset.saturating_add(len) <= self.state.content(ino).len;
            return if inside { Ok(()) } else { full() };
        }
        if self.capacity == UNLIMITED || len == 0 {
            return Ok(());
        }
        let (first, end) = (offset / SECTOR, (offset + len).div_ceil(SECTOR));
        let set = self.state.content(ino).set_within(first, end).len() as u64;
        if end - first - set > self.capacity.saturating_sub(self.used()) {
            return full();
        }
        Ok(())
    }

    /// Sectors in use by files that have a name or are open.
    pub(super) fn used(&self) -> u64 {
        let mut held: BTreeSet<Ino> = self.state.names.values().copied().collect();
        held.extend(self.open.keys().copied());
        held.iter().map(|ino| self.state.content(*ino).allocated()).sum()
    }
}
