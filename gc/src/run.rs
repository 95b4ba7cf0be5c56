//! Inner coalesce: hidden nodes N go into their hidden parent P.
//!
//! | step | what | SR lock |
//! |---|---|---|
//! | 1 | check and record the intent, naming footer uuids | held ([`Job::begin`]) |
//! | 2 | settle what a dead process left; grow P if N is larger | - |
//! | 3 | copy N's sectors into P | - |
//! | 4 | flush and settle P | - |
//! | 5 | record `Relinking` with every child | held |
//! | 6 | each child's parent becomes P | held |
//! | 7 | record `Refreshing`; wait until no reader's map has N | - |
//! | 8 | record `Deleting`; delete N | held |
//! | 9 | clear the record | - |
//!
//! Why a crash at any instruction is harmless:
//! * In 2 to 4 everything written into P is shadowed by N (see
//!   [`vhd::merge`]), and P grows only where nothing lies below it. Carrying
//!   on repeats it. Giving up needs only P settled.
//! * P is durable before any child is told of it (4 before 5). In 6 some
//!   children read N over P and others P alone: both read the same, because
//!   P has by now everything N has.
//! * The children are recorded before the first one moves; from there on only
//!   forward is right. A snapshot of a child made while we
//!   were dead hangs new images on N; they are found before N is deleted, and
//!   moved like the others. An attach of a recorded child writes its new parent
//!   first, so nobody new learns of N.
//! * N is deleted only after, under the SR lock, no header and no lease names
//!   it (invariant 8). The record still stands then, so an N whose deletion
//!   was not durable is found and deleted again. The topmost goes first and
//!   durably: no image is ever left whose parent is gone.

use sm::image;
use sm::journal::{InnerIntent, Intent, JobState, volume_of};
use tapdisk_control::{ClientError, ImageRef, Reply, Request};
use uuid::Uuid;
use vhd::storage::VolumeName;
use vhd::units::BLOCK_BYTES;
use vhd::writer::Writer;

use crate::copy::{self, Copying, format, settle_if_needed};
use crate::forest::Forest;
use crate::job::{Job, Result, Stop, io};
use crate::limits;
use crate::sources::Sources;
use crate::survey;
use crate::watch::Event;

/// A reader that was told to refresh and has not answered for the last time.
struct Draining {
    vdi: Uuid,
    tap: Box<dyn sm::host::Tap>,
    call: u64,
    /// Whether the first answer was the last already.
    last: bool,
}

impl Job<'_> {
    /// One match over the recorded state: recovery is the same as going on.
    pub(crate) fn inner(&self, intent: &mut InnerIntent) -> Result<()> {
        let mut draining = Vec::new();
        // Each further round needs a snapshot that came between a crash of
        // ours and now; nobody makes them faster than they are moved.
        for _ in 0..limits::RELINK_ROUNDS_MAX {
            if intent.state == JobState::Copying {
                self.copy(intent).map_err(|stop| self.give_up(intent, stop))?;
                draining = self.record_children(intent).map_err(|stop| {
                    if intent.state == JobState::Copying { self.give_up(intent, stop) } else { stop }
                })?;
            }
            if matches!(intent.state, JobState::Relinking { .. }) {
                draining.extend(self.relink(intent)?);
            }
            let moved = intent.state != JobState::Refreshing
                || self.refresh(intent, std::mem::take(&mut draining))?;
            if moved && self.delete(intent)? {
                return Ok(());
            }
            draining = self.record_children(intent)?;
        }
        Err(Stop::Later("children keep coming to the merged node".into()))
    }

    /// Steps 2 to 4.
    fn copy(&self, intent: &InnerIntent) -> Result<()> {
        if self.resumed {
            // A former holder may have moved blocks of P, or cleared some of
            // N, and died before every reader knew; opening an image for
            // writing gives the old room away.
            self.tell_readers(intent.nodes.iter().chain([&intent.parent]))?;
        }
        let parent = self.volume(&intent.parent)?;
        let nodes = intent.nodes.iter().map(|node| self.volume(node)).collect::<Result<Vec<_>>>()?;
        for name in nodes.iter().chain([&parent]) {
            settle_if_needed(self.repo, name)?;
        }
        if let Some(top) = nodes.first() {
            let size = image::meta(self.repo, top)?.virtual_bytes();
            self.grow(&intent.parent, &parent, size)?;
        }
        let sources = Sources::open(self.repo, &nodes, &parent)?;
        let writer =
            Writer::open(self.repo.volumes.as_ref(), &parent, self.repo.host.records()).map_err(format)?;
        let forecast =
            vhd::merge::forecast(&sources, |block| writer.presence(block) != vhd::rw::Presence::Absent);
        writer.go_direct().map_err(format)?;
        self.watch.note(Event::Total(forecast.bytes_max));
        let gained = forecast.blocks_gained * BLOCK_BYTES;
        let emptied = if self.fits(gained)? {
            Vec::new()
        } else {
            // Slice by slice. Nothing was cleared yet, so a reader that
            // cannot be told is a reason to wait, not to hold on.
            self.tell_readers(&intent.nodes).map_err(|stop| match stop {
                Stop::Unfinished(why) => Stop::Later(format!("no space, and {why}")),
                other => other,
            })?;
            self.open_all(&nodes)?
        };
        let tell_readers = || self.tell_readers(&intent.nodes);
        let windows = if emptied.is_empty() { copy::WINDOW } else { copy::SLICE };
        let mut copying = Copying::new(self.watch, windows, sources, writer, emptied, &tell_readers);
        copying.run()?;
        copying.settle()
    }

    fn fits(&self, gained: u64) -> Result<bool> {
        let space = io("free space", self.repo.volumes.space())?;
        Ok(gained == 0 || gained.saturating_add(limits::RESERVE_BYTES) <= space.free)
    }

    fn open_all(&self, names: &[VolumeName]) -> Result<Vec<Writer>> {
        let open =
            |name| Writer::open(self.repo.volumes.as_ref(), name, self.repo.host.records()).map_err(format);
        names.iter().map(open).collect()
    }

    /// Ends a merge that only copied: P is settled and the record cleared,
    /// and what was copied is shadowed for ever. If P cannot be settled now
    /// the record stays, so that nobody opens P before it is.
    fn give_up(&self, intent: &InnerIntent, stop: Stop) -> Stop {
        if let Stop::Unfinished(_) = stop {
            return stop;
        }
        let settled = intent
            .nodes
            .iter()
            .chain([&intent.parent])
            .try_for_each(|node| copy::settle_if_needed(self.repo, &self.volume(node)?));
        match settled.and_then(|()| self.clear(intent.id, "inner: record cleared, given up")) {
            Ok(()) => stop,
            Err(worse) => worse,
        }
    }

    /// Step 5, and 6 in the same hold of the lock. An operation under way on
    /// a child ends first.
    fn record_children(&self, intent: &mut InnerIntent) -> Result<Vec<Draining>> {
        let begun = self.watch.now();
        loop {
            let lock = self.lock()?;
            let forest = survey::survey(self.repo, &survey::leases(self.repo)?)?;
            match movable_children(&forest, intent) {
                Ok(children) => {
                    intent.state = JobState::Relinking { children };
                    self.put(&Intent::Inner(intent.clone()), "inner: record relink")?;
                    return self.relink_locked(intent);
                }
                Err(stop) if self.watch.now().saturating_sub(begun) >= limits::LEAVE_WAIT_MAX => {
                    return Err(stop);
                }
                Err(_) => {}
            }
            drop(lock);
            self.watch.sleep(limits::LEAVE_POLL)?;
        }
    }

    fn relink(&self, intent: &mut InnerIntent) -> Result<Vec<Draining>> {
        let _lock = self.lock()?;
        self.relink_locked(intent)
    }

    /// Step 6. The caller holds the SR lock.
    fn relink_locked(&self, intent: &mut InnerIntent) -> Result<Vec<Draining>> {
        let JobState::Relinking { children } = &intent.state else {
            return Ok(Vec::new());
        };
        let readers = survey::leases(self.repo)?;
        let parent = self.volume(&intent.parent)?;
        let mut draining = Vec::new();
        for child in children {
            let writer = readers
                .iter()
                .find(|r| !r.read_only && r.chain.first().is_some_and(|leaf| leaf.footer == child.footer));
            let tap = match writer {
                Some(reader) => {
                    io("reach a tapdisk", self.repo.host.tap(reader.vdi))?.map(|tap| (reader.vdi, tap))
                }
                None => None,
            };
            match tap {
                Some((vdi, tap)) => {
                    self.repo.heads.expect(
                        self.repo,
                        &sm::journal::volume_of(child)?,
                        intent.parent.footer,
                    )?;
                    let order = Request::Refresh { leaf: child.clone(), parent: Some(intent.parent.clone()) };
                    draining.push(begin_refresh(vdi, tap, order)?);
                }
                None => self.relink_unattached(child, &parent, intent)?,
            }
        }
        intent.state = JobState::Refreshing;
        self.put(&Intent::Inner(intent.clone()), "inner: record refresh")?;
        Ok(draining)
    }

    fn relink_unattached(&self, child: &ImageRef, parent: &VolumeName, intent: &InnerIntent) -> Result<()> {
        let name = match self.volume(child) {
            Ok(name) => name,
            // It was deleted meanwhile, or reverted: nothing to move.
            Err(Stop::Failed(sm::Error::NotFound { .. }) | Stop::Later(_)) => return Ok(()),
            Err(stop) => return Err(stop),
        };
        let meta = image::meta(self.repo, &name)?;
        if meta.parent.as_ref().is_some_and(|now| now.uuid == intent.parent.footer) {
            return Ok(());
        }
        settle_if_needed(self.repo, &name)?;
        Ok(image::set_parent(self.repo, &name, parent, intent.parent.footer)?)
    }

    /// Step 7: every reader drops the map in which N was, one after the
    /// other; what cannot be told to is waited for. False, its state as
    /// before, if something stands on N that is to be moved first.
    fn refresh(&self, intent: &mut InnerIntent, draining: Vec<Draining>) -> Result<bool> {
        for reader in draining {
            self.drained(reader)?;
        }
        let begun = self.watch.now();
        loop {
            let (readers, late) = {
                let _lock = self.lock()?;
                let readers = survey::leases(self.repo)?;
                (readers.clone(), late_child(&survey::survey(self.repo, &readers)?, intent)?)
            };
            // It reads what was merged until it is moved, too.
            if late {
                return Ok(false);
            }
            let on = |r: &&sm::lease::Lease| intent.nodes.iter().any(|node| names(&r.chain, node));
            let Some(reader) = readers.iter().find(on) else {
                break;
            };
            if let Err(stop) = self.ask_to_refresh(reader)
                && self.watch.now().saturating_sub(begun) >= limits::LEAVE_WAIT_MAX
            {
                return Err(stop);
            }
            if self.watch.now().saturating_sub(begun) >= limits::LEAVE_WAIT_MAX {
                return Err(Stop::Later(format!("{} still reads what was merged", reader.vdi)));
            }
            self.watch.sleep(limits::LEAVE_POLL)?;
        }
        intent.state = JobState::Deleting;
        self.put(&Intent::Inner(intent.clone()), "inner: record delete")?;
        Ok(true)
    }

    /// Has a reader drop its map for a new one. False if it is just starting,
    /// or is no tapdisk.
    pub(crate) fn ask_to_refresh(&self, reader: &sm::lease::Lease) -> Result<bool> {
        let vdi = reader.vdi;
        if !reader.serves(vdi) {
            return Ok(false);
        }
        let Some(tap) = io("reach a tapdisk", self.repo.host.tap(vdi))? else {
            return Ok(false);
        };
        let chain = sm::chain::read(self.repo, vdi)?;
        let Some(leaf) = chain.first() else {
            return Ok(false);
        };
        let order = Request::Refresh { leaf: leaf.image_ref(), parent: None };
        self.drained(begin_refresh(vdi, tap, order)?)?;
        Ok(true)
    }

    /// Waits for a reader's last answer, then notes its new chain in its
    /// lease, which until then counts as a child of N.
    fn drained(&self, mut reader: Draining) -> Result<()> {
        let vdi = reader.vdi;
        while !reader.last {
            let answer = reader.tap.next_answer(reader.call).map_err(|source| Stop::Tap { vdi, source })?;
            answer.outcome.map_err(|refusal| Stop::Tap { vdi, source: refusal.into() })?;
            reader.last = answer.last;
        }
        let _lock = self.lock()?;
        update_lease(self, vdi)
    }

    /// Steps 8 and 9. False, with nothing done, if something stands on a node
    /// after all: see [`late_child`].
    fn delete(&self, intent: &mut InnerIntent) -> Result<bool> {
        {
            let _lock = self.lock()?;
            let forest = survey::survey(self.repo, &survey::leases(self.repo)?)?;
            if late_child(&forest, intent)? {
                return Ok(false);
            }
            let nodes: Vec<Uuid> = intent.nodes.iter().filter_map(|n| node_uuid(&forest, n)).collect();
            for uuid in &nodes {
                if let Some(lease) = forest.leases_on(*uuid).next() {
                    return Err(Stop::Later(format!("{} still reads {uuid}", lease.vdi)));
                }
            }
            for node in &intent.nodes {
                self.delete_node(node)?;
            }
        }
        self.clear(intent.id, "inner: record cleared")?;
        Ok(true)
    }

    fn delete_node(&self, node: &ImageRef) -> Result<()> {
        let name = volume_of(node)?;
        if image::footer_of(self.repo, &name)? != Some(node.footer) {
            return Ok(());
        }
        let freed = image::allocated_bytes(self.repo, &name)?;
        io("delete a merged node", self.repo.volumes.delete(&name))?;
        io("delete a merged node", self.repo.volumes.sync("inner: node deleted"))?;
        io("pending record", self.repo.host.records().remove(node.footer))?;
        if let Some(uuid) = name.uuid() {
            self.repo.labels.remove(uuid)?;
        }
        self.watch.note(Event::Freed(freed));
        Ok(())
    }

    /// The volume an image was recorded under, if it still is that image.
    pub(crate) fn volume(&self, image: &ImageRef) -> Result<VolumeName> {
        let name = volume_of(image)?;
        match image::footer_of(self.repo, &name)? {
            Some(footer) if footer == image.footer => Ok(name),
            Some(_) => Err(Stop::Later(format!("{name} is another image by now"))),
            None => Err(sm::Error::NotFound { what: format!("volume {name}") }.into()),
        }
    }
}

/// Reads a VDI's chain anew for its lease. The caller holds the SR lock.
pub(crate) fn update_lease(job: &Job<'_>, vdi: Uuid) -> Result<()> {
    let chain: Vec<ImageRef> =
        sm::chain::read(job.repo, vdi)?.iter().map(sm::chain::Link::image_ref).collect();
    match job.repo.host.update_lease(vdi, &chain) {
        // It detached meanwhile.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        other => io("update a lease", other),
    }
}

/// Starts a refresh and waits until the header, if one is to be written, is
/// durable.
fn begin_refresh(vdi: Uuid, mut tap: Box<dyn sm::host::Tap>, order: Request) -> Result<Draining> {
    let answer = tap.begin(order).map_err(|source| Stop::Tap { vdi, source })?;
    match answer.outcome {
        Ok(Reply::HeaderDurable | Reply::Drained | Reply::Done) => {}
        Ok(other) => {
            let source = ClientError::Io(std::io::Error::other(format!("answered {other:?}")));
            return Err(Stop::Tap { vdi, source });
        }
        Err(refusal) => {
            return Err(Stop::Tap { vdi, source: refusal.into() });
        }
    }
    Ok(Draining { vdi, tap, call: answer.id, last: answer.last })
}

/// Whether something stands on a merged node that was not moved: a snapshot that
/// was made while nobody worked on this job.
fn late_child(forest: &Forest, intent: &InnerIntent) -> Result<bool> {
    parents_known(forest)?;
    let nodes: Vec<Uuid> = intent.nodes.iter().filter_map(|node| node_uuid(forest, node)).collect();
    Ok(nodes.iter().any(|node| forest.children(*node).any(|child| !nodes.contains(&child.uuid))))
}

/// Invariant 11.
fn parents_known(forest: &Forest) -> Result<()> {
    match forest.unknown_parents() {
        Some((node, why)) => Err(Stop::Later(format!("{} cannot be read: {why}", node.uuid))),
        None => Ok(()),
    }
}

/// Everything that stands on the topmost node, prepared images included.
fn movable_children(forest: &Forest, intent: &InnerIntent) -> Result<Vec<ImageRef>> {
    parents_known(forest)?;
    let top = intent.nodes.first().and_then(|node| node_uuid(forest, node));
    let Some(top) = top else {
        return Err(Stop::Later("the merged node is gone".into()));
    };
    forest
        .children(top)
        .map(|child| {
            match forest.claims.iter().find(|c| c.id != intent.id && c.nodes.contains(&child.uuid)) {
                Some(claim) => Err(Stop::Later(format!("operation {} holds {}", claim.id, child.uuid))),
                None => Ok(ImageRef {
                    volume: VolumeName::vhd(child.uuid).as_str().to_owned(),
                    footer: child.footer,
                }),
            }
        })
        .collect()
}

fn node_uuid(forest: &Forest, image: &ImageRef) -> Option<Uuid> {
    let uuid = VolumeName::new(&image.volume)?.uuid()?;
    forest.node(uuid).filter(|node| node.footer == image.footer).map(|node| node.uuid)
}

fn names(chain: &[ImageRef], image: &ImageRef) -> bool {
    chain.iter().any(|link| link.footer == image.footer)
}
