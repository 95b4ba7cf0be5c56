//! The simulated machine as others see it: an [`Fs`] with a log.

use std::fmt;
use std::io;
use std::sync::{Arc, Mutex};

use super::super::path::{parts, split};
use super::super::{Access, Fs, Space, Volume, Volumes, Why};
use super::crash::UNLIMITED;
use super::devices::SimDevices;
use super::effect::{Ino, Lasting, folder_of};
use super::live::{Family, Life, Live, RENAME};
use super::locked;
use super::log::{Event, What};
use super::run::SimRun;
use super::sabotage::{Fault, Sabotage, SimVolumes, Step};
use super::sector::{Litter, SECTOR};
use super::state::State;
use super::volume::SimVolume;

/// A handle to a simulated machine; clones lead to the same one.
///
/// A handle belongs to a simulated process (a clone to the same one), which
/// can be killed alone with [`SimDisk::kill_process`].
#[derive(Clone)]
pub struct SimDisk {
    live: Arc<Mutex<Live>>,
    pub(super) process: usize,
}

impl fmt::Debug for SimDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SimDisk(process {})", self.process)
    }
}

impl Default for SimDisk {
    fn default() -> Self {
        Self::new()
    }
}

impl SimDisk {
    /// An empty machine with an empty log.
    #[must_use]
    pub fn new() -> Self {
        Self::over(State::default(), Arc::default())
    }

    /// An empty machine whose volumes are devices, as a volume manager's. New
    /// space holds litter as `seed` has it, with `more` in it.
    #[must_use]
    pub fn with_devices(seed: u64, more: &[[u8; 512]]) -> Self {
        let litter = Some(Litter::new(seed, more));
        Self::over(State { litter, ..State::default() }, Arc::default())
    }

    /// Whether volumes are devices here.
    #[must_use]
    pub fn has_devices(&self) -> bool {
        self.with(|live| live.state.litter.is_some())
    }

    pub(super) fn over(base: State, family: Arc<Family>) -> Self {
        Self { live: Arc::new(Mutex::new(Live::new(base, family))), process: 0 }
    }

    pub(super) fn with<T>(&self, act: impl FnOnce(&mut Live) -> T) -> T {
        act(&mut locked(&self.live))
    }

    /// A repository over this machine, of files or of devices, in which
    /// journal steps can be left out too.
    #[must_use]
    pub fn volumes(&self) -> Arc<dyn Volumes> {
        match self.has_devices() {
            true => Arc::new(SimDevices::new(self.clone())),
            false => Arc::new(SimVolumes::new(self.clone())),
        }
    }

    /// The run folder of this machine.
    #[must_use]
    pub fn run(&self) -> SimRun {
        SimRun::new(self.clone())
    }

    /// A handle for another process on the same machine.
    #[must_use]
    pub fn new_process(&self) -> Self {
        let process = self.with(|live| {
            live.lives.push(Life(None));
            live.lives.len() - 1
        });
        Self { live: self.live.clone(), process }
    }

    /// Kills the process of this handle: its locks are gone, whatever it does
    /// from now on fails with `ConnectionAborted`. What it has in flight may
    /// still be completed, as the kernel would.
    pub fn kill_process(&self) {
        self.kill_process_after(0);
    }

    /// Whether the process of this handle can still do anything.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        self.with(|live| live.alive(self.process).is_ok())
    }

    /// Kills the process of this handle once it has begun `changes` more
    /// changes (reads do not count); the last of them still happens.
    pub fn kill_process_after(&self, changes: u64) {
        self.with(|live| {
            if let Some(life) = live.lives.get_mut(self.process) {
                *life = Life(Some(changes));
            }
            if changes == 0 {
                live.drop_locks(self.process);
            }
        });
    }

    /// Number of events so far; every number up to this is an instant at
    /// which [`SimDisk::crash`] can strike.
    #[must_use]
    pub fn log_len(&self) -> usize {
        self.with(|live| live.log.len())
    }

    /// Appends a mark of the scenario's own to the log.
    pub fn mark(&self, mark: u64) {
        self.with(|live| live.push(Event::Mark(mark)));
    }

    /// All marks and their places: mark `m` at place `p` is before instant
    /// `k` if `p < k`.
    #[must_use]
    pub fn marks(&self) -> Vec<(usize, u64)> {
        self.with(|live| {
            let marked = |(at, event): (usize, &Event)| match event {
                Event::Mark(mark) => Some((at, *mark)),
                _ => None,
            };
            live.log.iter().enumerate().filter_map(marked).collect()
        })
    }

    /// The log in words, one line per event, for the report of a failure.
    #[must_use]
    pub fn log_text(&self, events: std::ops::Range<usize>) -> String {
        use fmt::Write;
        self.with(|live| {
            let mut text = String::new();
            let shown = events.start.min(live.log.len())..events.end.min(live.log.len());
            for (at, event) in shown.clone().zip(&live.log[shown]) {
                let _ = writeln!(text, "{at:6} {event}");
            }
            text
        })
    }

    /// A hash of everything that can be read now: names, links, lengths,
    /// bytes (holes are zeros) and the run folder. Costs a few steps per file.
    #[must_use]
    pub fn state_hash(&self) -> u128 {
        self.with(|live| live.state.hash())
    }

    /// [`SimDisk::state_hash`] together with what only a later crash could
    /// tell apart: the durable state and everything not yet certain. Two
    /// machines of the same one leave the same states after the same run.
    #[must_use]
    pub fn full_hash(&self) -> u128 {
        self.with(|live| live.state.full_hash())
    }

    /// Leaves a step out, here and in every state made from this machine
    /// before or after. May be called several times.
    pub fn sabotage(&self, sabotage: Sabotage) {
        self.with(|live| locked(&live.family.sabotage).push(sabotage));
    }

    /// Every labelled step met so far by this machine and all made from it.
    #[must_use]
    pub fn whys(&self) -> std::collections::BTreeSet<(Step, Why)> {
        self.with(|live| locked(&live.family.whys).clone())
    }

    /// Lets operations fail; see [`Fault`].
    pub fn inject(&self, fault: Fault) {
        self.with(|live| live.faults.push(fault));
    }

    /// Forgets all faults not met yet.
    pub fn clear_faults(&self) {
        self.with(|live| live.faults.clear());
    }

    /// Bytes that can still be allocated, from now on; `None` for no limit.
    pub fn set_free_bytes(&self, free_bytes: Option<u64>) {
        self.with(|live| {
            let room = |bytes: u64| live.used() + bytes / SECTOR;
            live.capacity = free_bytes.map_or(UNLIMITED, room);
        });
    }

    /// Makes a block device, durably and at once as a volume manager does. It
    /// is full of garbage that looks like pieces of images.
    pub fn create_device(&self, path: &str, len_bytes: u64) -> io::Result<()> {
        split(path)?;
        self.with(|live| {
            let (path, ino) = (path.into(), Ino(live.state.next_ino));
            let what = What::Lasting(Lasting::Make { path, ino, len: len_bytes });
            live.run(self.process, what, "make device")
        })
    }

    /// Gives a block device another length, durably and at once; new space
    /// is garbage, but for its last sector, which is zeros.
    pub fn resize_device(&self, path: &str, len_bytes: u64) -> io::Result<()> {
        self.with(|live| {
            let ino = *live.state.names.get(path).ok_or(io::ErrorKind::NotFound)?;
            let what = What::Lasting(Lasting::Resize { ino, len: len_bytes });
            live.run(self.process, what, "resize device")
        })
    }

    pub(super) fn change(&self, what: What, why: Why) -> io::Result<()> {
        self.with(|live| live.run(self.process, what, why))
    }

    pub(super) fn handle(&self, live: &mut Live, ino: Ino, access: Access) -> io::Result<Arc<dyn Volume>> {
        live.alive(self.process)?;
        let token = match access {
            Access::Read => None,
            Access::Write => Some(live.lock(ino, self.process)?),
        };
        *live.open.entry(ino).or_default() += 1;
        Ok(Arc::new(SimVolume { disk: self.clone(), ino, token }))
    }
}

impl Fs for SimDisk {
    fn open(&self, path: &str, access: Access) -> io::Result<Arc<dyn Volume>> {
        split(path)?;
        self.with(|live| {
            live.alive(self.process)?;
            let ino = *live.state.names.get(path).ok_or(io::ErrorKind::NotFound)?;
            self.handle(live, ino, access)
        })
    }

    fn create(&self, path: &str) -> io::Result<Arc<dyn Volume>> {
        split(path)?;
        self.with(|live| {
            let ino = Ino(live.state.next_ino);
            live.run(self.process, What::Create { path: path.into(), ino }, "create")?;
            self.handle(live, ino, Access::Write)
        })
    }

    fn link(&self, from: &str, to: &str) -> io::Result<()> {
        split(to)?;
        self.change(What::Link { from: from.into(), to: to.into() }, "link")
    }

    // As rename(2): nothing happens if both names lead to one file.
    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        split(to)?;
        if self.same_file(from, to)? {
            return Ok(());
        }
        self.change(What::Rename { from: from.into(), to: to.into() }, RENAME)
    }

    fn unlink(&self, path: &str) -> io::Result<()> {
        self.change(What::Unlink { path: path.into() }, "unlink")
    }

    fn list(&self, folder: &str) -> io::Result<Vec<String>> {
        self.with(|live| {
            live.alive(self.process)?;
            live.folder_exists(folder)?;
            let inside = live.state.names.keys().filter(|path| folder_of(path) == folder);
            let base = |path: &Arc<str>| path.rsplit('/').next().unwrap_or("").to_owned();
            let mut names: Vec<String> = inside.map(base).collect();
            names.sort_unstable();
            Ok(names)
        })
    }

    // Durable when it returns, as the real one syncs the parent itself.
    fn make_folder(&self, folder: &str) -> io::Result<()> {
        parts(folder)?;
        let ends = folder.match_indices('/').map(|(at, _)| at).chain([folder.len()]);
        for part in ends.map(|end| &folder[..end]) {
            if self.with(|live| live.folder_exists(part)).is_err() {
                self.change(What::MakeFolder { folder: part.into() }, "make folder")?;
            }
        }
        Ok(())
    }

    fn sync_names(&self, folder: &str, why: Why) -> io::Result<()> {
        self.change(What::SyncNames { folder: folder.into() }, why)
    }

    fn same_file(&self, a: &str, b: &str) -> io::Result<bool> {
        self.with(|live| {
            live.alive(self.process)?;
            let names = &live.state.names;
            Ok(matches!((names.get(a), names.get(b)), (Some(a), Some(b)) if a == b))
        })
    }

    fn space(&self) -> io::Result<Space> {
        self.with(|live| {
            live.alive(self.process)?;
            let free = live.capacity.saturating_sub(live.used());
            Ok(Space { total: live.capacity * SECTOR, free: free * SECTOR })
        })
    }
}
