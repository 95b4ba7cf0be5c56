//! Leaf coalesce: a visible leaf L goes into its hidden parent P, which then
//! takes L's name.
//!
//! | step | what | record |
//! |---|---|---|
//! | 1 | check, record | `Merging`, in one hold of the SR lock |
//! | 2 | L's blocks move to P window by window | |
//! | 3 | L is durably empty: record | `Committing`, unless somebody stopped us |
//! | 4 | P unhidden, durably, then given L's name, synced | |
//! | 5 | the lease's chain; what stepped aside goes; clear the record | - |
//!
//! This file is the only place where a leaf that is attached (its tapdisk
//! does 2 and 4) differs from one that is not (we do, under its lock).
//!
//! Why a crash at any instruction is harmless:
//! * In 2 leaf over parent is a correct image at every instant. What a dead
//!   merge needs is L and P settled, which recovery does before anyone opens
//!   L; the next merge carries on with what L has left.
//! * 3 follows the last clear's flush, so in `Committing` P alone is the disk.
//!   Its flag is cleared before the rename, so L's name never leads to a
//!   hidden image; until the rename the record tells scans that P is no VDI.
//!   The rename is atomic, or it is two and L's name is free between them (see
//!   `sm::naming`); found done, half done or not done, the rest is repeated.
//! * Others may stop a merge before 3, under the SR lock, and remove its
//!   record. We look for it under that lock before we write `Committing`.

use sm::image;
use sm::journal::{self, Intent, LeafMergeIntent, LeafMergeState};
use sm::naming::{Found, NameSwap};
use tapdisk_control::{ClientError, MergePhase, MergeStatus, Refusal, Reply, Request};
use uuid::Uuid;
use vhd::merge::forecast;
use vhd::rw::Presence;
use vhd::units::BLOCK_BYTES;
use vhd::writer::Writer;

use crate::copy::{Copying, format, leaf_slice, settle_if_needed};
use crate::job::{Job, Result, Stop, io};
use crate::limits;
use crate::run::update_lease;
use crate::sources::Sources;
use crate::watch::Event;

/// Who moves the blocks and renames the parent.
trait LeafMerger {
    /// Step 2: returns when the leaf is durably empty.
    fn empty(&mut self) -> Result<()>;
    /// Ends step 2 early: both images are settled when this returns.
    fn stop(&mut self) -> Result<()>;
    /// Step 4, as often as it takes.
    fn commit(&mut self) -> Result<()>;
}

impl Job<'_> {
    /// One match over the recorded state: recovery is the same as going on.
    pub(crate) fn leaf(&self, intent: &mut LeafMergeIntent) -> Result<()> {
        let mut merger = self.merger(intent)?;
        match intent.state {
            LeafMergeState::Merging => {
                if let Err(stop) = merger.empty() {
                    if let Stop::Unfinished(_) = stop {
                        return Err(stop);
                    }
                    // If it cannot be stopped either, the record stays.
                    merger.stop()?;
                    self.clear(intent.id, "leaf merge: record cleared, stopped")?;
                    return Err(stop);
                }
                self.record_commit(intent)?;
                merger.commit()?;
            }
            LeafMergeState::Committing => merger.commit()?,
        }
        drop(merger);
        let _lock = self.lock()?;
        if survey_has(self, intent.vdi)? {
            update_lease(self, intent.vdi)?;
        }
        intent.name_swap()?.drop_aside(self.repo)?;
        self.clear(intent.id, "leaf merge: record cleared")
    }

    fn merger(&self, intent: &LeafMergeIntent) -> Result<Box<dyn LeafMerger + '_>> {
        let tap = io("reach a tapdisk", self.repo.host.tap(intent.vdi))?;
        Ok(match tap {
            Some(tap) => {
                let intent = intent.clone();
                Box::new(Live { job: self, intent, tap, parent_before: None, rate: None, extra_bytes: None })
            }
            None => Box::new(Offline { job: self, intent: intent.clone() }),
        })
    }

    /// Step 3.
    fn record_commit(&self, intent: &mut LeafMergeIntent) -> Result<()> {
        let _lock = self.lock()?;
        let stands = journal::load(self.repo.volumes.as_ref())?.iter().any(|s| s.intent.id() == intent.id);
        if !stands {
            return Err(Stop::Later("another operation stopped it".into()));
        }
        intent.state = LeafMergeState::Committing;
        self.put(&Intent::LeafMerge(intent.clone()), "leaf merge: record commit")
    }

    /// How far the parent is in taking the leaf's name.
    fn naming(&self, intent: &LeafMergeIntent) -> Result<(NameSwap, Found)> {
        let swap = intent.name_swap()?;
        let found = swap.found(self.repo)?;
        Ok((swap, found))
    }
}

fn survey_has(job: &Job<'_>, vdi: Uuid) -> Result<bool> {
    Ok(crate::survey::leases(job.repo)?.iter().any(|lease| lease.serves(vdi)))
}

/// The leaf's tapdisk does it; we watch.
struct Live<'a> {
    job: &'a Job<'a>,
    intent: LeafMergeIntent,
    tap: Box<dyn sm::host::Tap>,
    /// Bytes of blocks the parent had in the beginning.
    parent_before: Option<u64>,
    /// Bytes per second its tapdisk was told last.
    rate: Option<u64>,
    /// Room it may take before it gives any back, in bytes, if we told it.
    extra_bytes: Option<u64>,
}

impl Live<'_> {
    fn call(&mut self, request: Request) -> Result<Reply> {
        let vdi = self.intent.vdi;
        self.tap.call(request).map_err(|source| Stop::Tap { vdi, source })
    }

    fn status(&mut self) -> Result<MergeStatus> {
        match self.call(Request::MergeStatus)? {
            Reply::Merge(status) => Ok(status),
            other => Err(self.odd(&other)),
        }
    }

    /// Starts it, or finds it running since before a crash of ours.
    fn start(&mut self) -> Result<()> {
        match self.status()?.phase {
            MergePhase::Starting | MergePhase::Moving | MergePhase::Empty => return Ok(()),
            MergePhase::Committing | MergePhase::Stopping => {
                return Err(Stop::Later("its tapdisk is ending a merge".into()));
            }
            MergePhase::None | MergePhase::Failed => {}
        }
        if self.job.resumed {
            // One that failed while nobody watched still stands there, with
            // the parent unsettled.
            self.stop()?;
            // As for an inner merge: see `Job::copy`.
            self.job.tell_readers([&self.intent.parent])?;
        }
        let leaf = self.job.volume(&self.intent.leaf)?;
        let parent = self.job.volume(&self.intent.parent)?;
        settle_if_needed(self.job.repo, &parent)?;
        let size = image::meta(self.job.repo, &leaf)?.virtual_bytes();
        self.job.grow(&self.intent.parent, &parent, size)?;
        let rate = self.job.watch.rate();
        let free = io("free space", self.job.repo.volumes.space())?.free;
        let held = self.leaf_blocks()? * BLOCK_BYTES;
        let (windows, extra_bytes) = leaf_slice(free, held);
        let order = Request::MergeStart {
            leaf: self.intent.leaf.clone(),
            parent: self.intent.parent.clone(),
            rate_bytes_per_s: rate,
            extra_blocks_max: windows.gained_max,
        };
        self.call(order)?;
        self.rate = Some(rate);
        self.extra_bytes = Some(extra_bytes);
        Ok(())
    }

    /// Blocks the leaf has at this moment, its tapdisk's memory included.
    fn leaf_blocks(&mut self) -> Result<u64> {
        match self.call(Request::Stats)? {
            Reply::Stats(stats) => Ok(stats.leaf_blocks),
            other => Err(self.odd(&other)),
        }
    }

    fn odd(&self, answer: &Reply) -> Stop {
        let source = ClientError::Io(std::io::Error::other(format!("answered {answer:?}")));
        Stop::Tap { vdi: self.intent.vdi, source }
    }

    /// The budget changes while a merge runs: by a person, with the number of
    /// merges, or because guests suffer.
    fn follow_rate(&mut self) {
        let rate = self.job.watch.rate();
        if Some(rate) == self.rate {
            return;
        }
        // Refused while another order is under way: told the next time.
        match self.call(Request::MergeRate { rate_bytes_per_s: rate }) {
            Ok(_) => self.rate = Some(rate),
            Err(error) => {
                tracing::debug!(sr = %self.job.repo.uuid, vdi = %self.intent.vdi, %error, "merge rate")
            }
        }
    }

    fn note(&self, before: &MergeStatus, now: &MergeStatus) {
        let watch = self.job.watch;
        let cloned = now.bytes_cloned.saturating_sub(before.bytes_cloned);
        let moved = now.bytes_copied.saturating_sub(before.bytes_copied);
        let copied = moved.saturating_sub(cloned);
        watch.moved(moved);
        watch.note(Event::Copied { bytes: copied, cloned: false });
        watch.note(Event::Copied { bytes: cloned, cloned: true });
    }
}

impl LeafMerger for Live<'_> {
    fn empty(&mut self) -> Result<()> {
        let parent = self.job.volume(&self.intent.parent)?;
        self.parent_before = Some(image::allocated_bytes(self.job.repo, &parent)?);
        self.start()?;
        let mut last = MergeStatus {
            phase: MergePhase::Starting,
            blocks_total: 0,
            blocks_done: 0,
            bytes_copied: 0,
            bytes_cloned: 0,
            bytes_freed: 0,
            longest_wait_us: 0,
            error: None,
        };
        let mut moved_at = self.job.watch.now();
        loop {
            let now = self.status()?;
            self.note(&last, &now);
            if now.blocks_total > last.blocks_total {
                let more = (now.blocks_total - last.blocks_total) * BLOCK_BYTES;
                self.job.watch.note(Event::Total(more));
                // Of one that was begun before us nobody knows.
                let most = self.extra_bytes.unwrap_or(limits::ROOMY_SLICE_BYTES_MAX);
                self.job.watch.note(Event::Peak(more.min(most)));
            }
            if now.blocks_done != last.blocks_done || now.phase != last.phase {
                moved_at = self.job.watch.now();
            }
            match now.phase {
                MergePhase::Empty => {
                    self.job.watch.note(Event::Freed(now.blocks_total * BLOCK_BYTES));
                    return Ok(());
                }
                MergePhase::Starting | MergePhase::Moving => self.follow_rate(),
                MergePhase::None | MergePhase::Stopping | MergePhase::Committing => {
                    return Err(Stop::Later("another operation stopped it".into()));
                }
                MergePhase::Failed => {
                    let what = now.error.unwrap_or_else(|| "its tapdisk gives no reason".into());
                    let source = ClientError::Refused(Refusal::Failed { detail: what });
                    return Err(Stop::Tap { vdi: self.intent.vdi, source });
                }
            }
            if self.job.watch.now().saturating_sub(moved_at) >= limits::STALL_MAX {
                return Err(Stop::Later(format!("nothing moved for {} s", limits::STALL_MAX.as_secs())));
            }
            last = now;
            self.job.watch.sleep(limits::STATUS_POLL)?;
        }
    }

    fn stop(&mut self) -> Result<()> {
        self.call(Request::MergeStop).map(drop)
    }

    fn commit(&mut self) -> Result<()> {
        let (swap, found) = self.job.naming(&self.intent)?;
        if found != Found::Done {
            let (leaf, parent) = (self.intent.leaf.clone(), self.intent.parent.clone());
            let aside = Some(swap.aside.as_str().to_owned());
            self.call(Request::MergeCommit { leaf, parent, aside })?;
        }
        // Its tapdisk goes on though it could not sync them.
        io("take the leaf's name", self.job.repo.volumes.sync("leaf merge: live, name"))?;
        if let (Some(before), Ok(Reply::Stats(stats))) = (self.parent_before, self.call(Request::Stats)) {
            let gained = (stats.leaf_blocks * BLOCK_BYTES).saturating_sub(before);
            // The room was paid for window by window as the leaf shrank.
            self.job.watch.note(Event::Gained(gained));
        }
        Ok(())
    }
}

/// We do it, with the leaf's and the parent's lock.
struct Offline<'a> {
    job: &'a Job<'a>,
    intent: LeafMergeIntent,
}

impl LeafMerger for Offline<'_> {
    fn empty(&mut self) -> Result<()> {
        let (repo, watch) = (self.job.repo, self.job.watch);
        let leaf = self.job.volume(&self.intent.leaf)?;
        let parent = self.job.volume(&self.intent.parent)?;
        // The leaf's lock first: with it nobody can attach the disk.
        let open = |name| Writer::open(repo.volumes.as_ref(), name, repo.host.records()).map_err(format);
        let emptied = vec![open(&leaf)?];
        settle_if_needed(repo, &parent)?;
        let size = image::meta(repo, &leaf)?.virtual_bytes();
        self.job.grow(&self.intent.parent, &parent, size)?;
        let sources = Sources::open(repo, std::slice::from_ref(&leaf), &parent)?;
        watch.note(Event::Total(sources.allocated_bytes()));
        // Nobody reads a leaf that we hold the lock of.
        let parent = open(&parent)?;
        parent.go_direct().map_err(format)?;
        let gained = forecast(&sources, |block| parent.presence(block) != Presence::Absent).blocks_gained;
        let free = io("free space", repo.volumes.space())?.free;
        let (windows, _) = leaf_slice(free, gained * BLOCK_BYTES);
        let mut copying = Copying::new(watch, windows, sources, parent, emptied, &|| Ok(()));
        // Writers that failed are not to be trusted with settling: on an error
        // the images are opened anew ([`Self::stop`]).
        copying.run()?;
        copying.settle()
    }

    fn stop(&mut self) -> Result<()> {
        for image in [&self.intent.leaf, &self.intent.parent] {
            settle_if_needed(self.job.repo, &self.job.volume(image)?)?;
        }
        Ok(())
    }

    fn commit(&mut self) -> Result<()> {
        let repo = self.job.repo;
        let leaf = journal::volume_of(&self.intent.leaf)?;
        let (swap, found) = self.job.naming(&self.intent)?;
        if found == Found::Before {
            // After the death of the tapdisk that was committing, acknowledged
            // writes may wait in the parent's record.
            let parent = self.job.volume(&self.intent.parent)?;
            settle_if_needed(repo, &leaf)?;
            settle_if_needed(repo, &parent)?;
            if image::allocated_bytes(repo, &leaf)? != 0 {
                return Err(Stop::Later(format!("{leaf} is being committed but is not empty")));
            }
            image::set_hidden(repo, &parent, false)?;
        }
        swap.carry_out(repo)?;
        io("take the leaf's name", repo.volumes.sync("leaf merge: name"))?;
        io("pending record", repo.host.records().remove(self.intent.leaf.footer))
    }
}
