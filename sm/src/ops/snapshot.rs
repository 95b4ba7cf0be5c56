//! Snapshot and clone, of one VDI or of several at one instant.
//!
//! ```text
//!   before                 after
//!   P <- L                 P <- B <- L          B: L's former image, hidden
//!                                 \- S          S: snapshot or clone, empty
//!
//!   P <- L (holds nothing) P <- L, P <- S       no node is added
//! ```
//!
//! The steps, for all members together; `[lock]` is the SR lock.
//!
//! ```text
//!  [lock]
//!   1  record `pending`, durable
//!   2  <B> becomes a second name of L's image, where it can have two; new leaf
//!      and S are created under temporary names, flushed
//!   3  names synced
//!  [no lock] attached members:
//!   4  Prepare: the tapdisk opens its new leaf
//!   5  Pause, all of them: nothing is in flight anywhere
//!   6  record renamed to `decided`: THE INSTANT
//!   7  Resume with swap: new leaf renamed over L (or L renamed to <B>, then
//!      the new leaf to L: see `naming`), writes go on
//!   8  swaps synced, then the decision
//!   9  SettleBase: B settled, then hidden
//!  [lock]
//!  10  the same for unattached members (swap, sync, settle, hide), S renamed
//!      to its name, synced, labels, leases, record removed
//! ```
//!
//! Crash argument. Up to 6 nothing that exists has changed: the second name
//! and the temporaries are garbage, and while the record says so no scan
//! shows them. Power may be lost with the record's rename to `decided` not
//! durable but a swap durable; so a swap that is found, or the first half of
//! one, decides, too. No swap is ever durable before step 3 was, so what a swap needs is there. S gets
//! its name, and B its flag, only after swaps and decision are durable: a
//! snapshot that is taken back never had either. From `decided` on every step
//! is idempotent and recovery repeats them from 7; its one `match` is in
//! [`crate::recover`], the steps in `snapshot_steps`.
//!
//! If we vanish between 5 and 7 each tapdisk tries to rename the record to
//! `void`; only one rename of `pending` can win, so all of them resume the
//! same way.
//!
//! Inside the pause there are one rename and, in each tapdisk, another, or two;
//! nothing is read and nothing synced.

use tapdisk_control::{Reply, Request};
use uuid::Uuid;
use vhd::storage::VolumeName;

use super::Locked;
use super::snapshot_steps::{self as steps, Decision};
use crate::chain::Link;
use crate::error::{Error, IoContext, Result};
use crate::host::Tap;
use crate::image::{self, NewVhd};
use crate::journal::{
    self, ImageRef, Intent, Member, RecordName, Shape, Sibling, SiblingKind, SnapshotIntent,
};
use crate::limits::GROUP_MEMBERS_MAX;
use crate::progress::Progress;
use crate::repo::Repo;

/// One VDI to snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// The VDI.
    pub vdi: Uuid,
    /// Name of the new snapshot or clone.
    pub name: String,
}

/// An image with content of its own that becomes the sibling of its base,
/// instead of an empty one.
#[derive(Debug, Clone)]
pub(crate) struct Filled {
    /// Its temporary name; settled, and nobody has it open.
    pub volume: VolumeName,
    /// Its footer uuid.
    pub footer: Uuid,
    /// The VDI it becomes.
    pub vdi: Uuid,
    /// Name of that VDI.
    pub name: String,
}

/// How a snapshot is made.
#[derive(Clone, Copy)]
struct How<'a> {
    kind: SiblingKind,
    /// Divide leaves that look empty too.
    divide_all: bool,
    filled: Option<&'a Filled>,
    progress: &'a Progress,
}

/// A VDI with the tapdisk that serves it for writing.
struct Target<'a> {
    wanted: &'a Wanted,
    live: Option<Live>,
}

struct Live {
    tap: Box<dyn Tap>,
    /// Whether its leaf held nothing when asked. It may since.
    empty: bool,
    /// Why it could not swap, if so.
    stuck: Option<Error>,
}

/// Makes a sibling of each VDI, all at one instant, all or none. Returns the
/// siblings' uuids in the order asked for.
///
/// # Errors
/// [`Error::ChainTooLong`], [`Error::NoSpace`], [`Error::Busy`] and whatever
/// breaks a chain, before anything has changed; [`Error::Busy`] when a guest
/// did not drain in time: nothing has changed then either. An error after
/// the decision leaves the record: recovery finishes the snapshot.
pub fn snapshot(repo: &Repo, kind: SiblingKind, wanted: &[Wanted]) -> Result<Vec<Uuid>> {
    snapshot_watched(repo, kind, wanted, &Progress::default())
}

/// As [`snapshot`], stopping at the last moment before anything is paused if
/// asked to. Reaches `taken` when the instant is over and all members run.
///
/// # Errors
/// As [`snapshot`], and [`Error::Cancelled`]: nothing has changed then.
pub fn snapshot_watched(
    repo: &Repo,
    kind: SiblingKind,
    wanted: &[Wanted],
    progress: &Progress,
) -> Result<Vec<Uuid>> {
    check(wanted)?;
    // A leaf that looked empty may have been written to before the pause;
    // then all members are divided, which is right for an empty one as well.
    let how = How { kind, divide_all: false, filled: None, progress };
    match attempt(repo, how, wanted)? {
        Attempt::Done(siblings) => Ok(siblings),
        Attempt::NotEmptyAnyMore => match attempt(repo, How { divide_all: true, ..how }, wanted)? {
            Attempt::Done(siblings) => Ok(siblings),
            Attempt::NotEmptyAnyMore => {
                Err(Error::Busy { reason: "the leaf changes while it is looked at".into() })
            }
        },
    }
}

/// A clone of `base` that is not empty: an image whose content is a delta over
/// the base's becomes the sibling. The caller keeps the base from changing.
///
/// # Errors
/// As [`snapshot`]. Up to the decision the image is deleted with the rest.
pub(crate) fn adopt(repo: &Repo, base: Uuid, filled: &Filled) -> Result<()> {
    let wanted = [Wanted { vdi: base, name: filled.name.clone() }];
    let progress = &Progress::default();
    let how = How { kind: SiblingKind::Clone, divide_all: false, filled: Some(filled), progress };
    match attempt(repo, how, &wanted)? {
        Attempt::Done(_) => Ok(()),
        Attempt::NotEmptyAnyMore => Err(Error::Busy { reason: format!("VDI {base} changes") }),
    }
}

enum Attempt {
    Done(Vec<Uuid>),
    NotEmptyAnyMore,
}

fn check(wanted: &[Wanted]) -> Result<()> {
    let bad = |reason: String| Err(Error::BadRequest { reason });
    if wanted.is_empty() || wanted.len() > GROUP_MEMBERS_MAX {
        return bad(format!("a snapshot has 1 to {GROUP_MEMBERS_MAX} VDIs"));
    }
    for (at, one) in wanted.iter().enumerate() {
        super::check_label(&one.name)?;
        if wanted[..at].iter().any(|other| other.vdi == one.vdi) {
            return bad(format!("VDI {} is named twice", one.vdi));
        }
    }
    Ok(())
}

fn attempt(repo: &Repo, how: How<'_>, wanted: &[Wanted]) -> Result<Attempt> {
    let mut targets = wanted.iter().map(|w| target(repo, w)).collect::<Result<Vec<_>>>()?;
    let id = repo.ids.uuid();
    let held = repo.host.hold_intent(id).during(|| format!("hold intent {id}"))?;
    let _held = held.ok_or_else(|| Error::Busy { reason: format!("intent {id} is taken") })?;
    let intent = prepare(repo, id, how, &mut targets)?;
    let siblings = intent.members.iter().map(|member| member.sibling.vdi).collect();
    match decide(repo, &intent, &mut targets, how.progress) {
        Ok(Decided::Yes) => how.progress.reach("taken"),
        Ok(Decided::NotEmptyAnyMore) => {
            take_back(repo, &intent)?;
            return Ok(Attempt::NotEmptyAnyMore);
        }
        Err(error) => {
            take_back(repo, &intent)?;
            return Err(error);
        }
    }
    let durable = steps::make_decision_durable(repo);
    // Not to be asked for again: it happens, once the disk can go on.
    if let Some(stuck) = targets.iter_mut().find_map(|target| target.live.as_mut()?.stuck.take()) {
        return Err(stuck);
    }
    durable?;
    for (member, target) in intent.members.iter().zip(&mut targets) {
        if let Some(live) = &mut target.live {
            steps::settle_base_live(repo, member, live.tap.as_mut())?;
        }
    }
    let _sr = repo.host.lock_sr().during(|| format!("lock of SR {}", repo.name))?;
    steps::finish(repo, &intent)?;
    Ok(Attempt::Done(siblings))
}

/// Connects to the tapdisk of a VDI, outside the lock: one that hangs then
/// keeps nobody waiting but us.
fn target<'a>(repo: &Repo, wanted: &'a Wanted) -> Result<Target<'a>> {
    let lost =
        |reason: String| Error::NotRunning { what: format!("the tapdisk of VDI {}", wanted.vdi), reason };
    let Some(mut tap) = repo.host.tap(wanted.vdi).map_err(|e| lost(e.to_string()))? else {
        return Ok(Target { wanted, live: None });
    };
    let Reply::Stats(stats) = tap.call(Request::Stats).map_err(|e| lost(e.to_string()))? else {
        return Err(lost("an answer to another question".into()));
    };
    let empty = stats.leaf_blocks == 0 && stats.record_entries == 0;
    // One that only reads changes nothing and need not be paused.
    let live = (!stats.read_only).then_some(Live { tap, empty, stuck: None });
    Ok(Target { wanted, live })
}

/// Steps 1 to 3. On an error everything is taken back.
fn prepare(repo: &Repo, id: Uuid, how: How<'_>, targets: &mut [Target<'_>]) -> Result<SnapshotIntent> {
    let vdis: Vec<Uuid> = targets.iter().map(|target| target.wanted.vdi).collect();
    let locked = super::lock(repo, &vdis)?;
    let mut members = Vec::new();
    let mut leaves = Vec::new();
    for target in targets {
        let chain = super::visible_chain(repo, target.wanted.vdi)?;
        members.push(plan(repo, id, &locked, target, &chain, how, &mut leaves)?);
        leaves.push(chain);
    }
    let intent = SnapshotIntent { id, kind: how.kind, members };
    let record = Intent::Snapshot(intent.clone());
    let made = journal::put(repo.volumes.as_ref(), &record, "snapshot: record pending")
        .and_then(|_| make_images(repo, &intent, &leaves, how.filled));
    if let Err(error) = made {
        // Nobody has been asked to swap: this cannot lose against anybody.
        steps::decide(repo, id, Decision::Void)?;
        steps::take_back(repo, &intent)?;
        return Err(error);
    }
    Ok(intent)
}

/// Checks one member and says how its tree will change. Changes nothing but
/// settling an image that a killed holder left.
fn plan(
    repo: &Repo,
    id: Uuid,
    locked: &Locked,
    target: &mut Target<'_>,
    chain: &[Link],
    how: How<'_>,
    before: &mut [Vec<Link>],
) -> Result<Member> {
    let vdi = target.wanted.vdi;
    let leaf = &chain[0];
    if leaf.volume.is_raw() {
        return Err(Error::Unsupported { what: format!("snapshot of raw VDI {vdi}") });
    }
    locked.no_operation_on(leaf)?;
    let writer = locked.lease(vdi).filter(|lease| !lease.read_only);
    if writer.is_some() != target.live.is_some() {
        let reason = format!("VDI {vdi} is just being attached or detached");
        return Err(Error::Busy { reason });
    }
    steps::stop_leaf_merge(repo, locked, leaf, target.live.as_mut().map(|live| &mut live.tap))?;
    let empty = match &target.live {
        Some(live) => live.empty && !how.divide_all,
        None => {
            // Settled when it was attached for reading; not while it is read.
            if locked.lease(vdi).is_none() {
                image::settle(repo, &leaf.volume)?;
            }
            // A delta needs something to stand on.
            let alone = how.filled.is_some() && chain.len() == 1;
            !alone && image::allocated_bytes(repo, &leaf.volume)? == 0
        }
    };
    let depth = u32::try_from(chain.len()).unwrap_or(u32::MAX);
    if depth >= repo.limits.chain_max && !empty {
        return Err(Error::ChainTooLong { vdi, depth, depth_max: repo.limits.chain_max });
    }
    if !empty && locked.lease(vdi).is_some() && writer.is_none() {
        let reason = "it is attached read-only and holds data of its own".into();
        return Err(Error::InUse { what: format!("VDI {vdi}"), reason });
    }
    let at = u32::try_from(2 * before.len()).unwrap_or(u32::MAX);
    let prepared = |n: u32| ImageRef {
        volume: VolumeName::temporary(id, at + n).as_str().to_owned(),
        footer: repo.ids.uuid(),
    };
    let shape =
        if empty { Shape::Empty } else { Shape::Divide { base: repo.ids.uuid(), new_leaf: prepared(0) } };
    let name = target.wanted.name.clone();
    let sibling = match how.filled {
        None => Sibling { image: prepared(1), vdi: repo.ids.uuid(), name, filled: false },
        Some(filled) => {
            let image = ImageRef { footer: filled.footer, ..prepared(1) };
            Sibling { image, vdi: filled.vdi, name, filled: true }
        }
    };
    Ok(Member { vdi, leaf_footer: leaf.head.footer, shape, sibling })
}

/// Steps 2 and 3.
fn make_images(
    repo: &Repo,
    intent: &SnapshotIntent,
    chains: &[Vec<Link>],
    filled: Option<&Filled>,
) -> Result<()> {
    for (member, chain) in intent.members.iter().zip(chains) {
        let virtual_bytes = chain[0].head.virtual_bytes;
        let make = |image: &ImageRef, parent: Option<(&VolumeName, Uuid)>| {
            let volume = journal::volume_of(image)?;
            let new = NewVhd { volume: &volume, footer: image.footer, virtual_bytes, parent };
            image::create(repo, &new).map(drop)
        };
        let sibling = |image: &ImageRef, parent: Option<(&VolumeName, Uuid)>| match (filled, parent) {
            (Some(filled), Some((parent, footer))) => take_over(repo, filled, image, parent, footer),
            _ => make(image, parent),
        };
        match &member.shape {
            Shape::Divide { base, new_leaf } => {
                let base = VolumeName::vhd(*base);
                if let Some(swap) = member.name_swap()? {
                    swap.prepare(repo)?;
                }
                let parent = Some((&base, member.leaf_footer));
                make(new_leaf, parent)?;
                sibling(&member.sibling.image, parent)?;
            }
            Shape::Empty => {
                let parent = chain.get(1).map(|link| (&link.volume, link.head.footer));
                sibling(&member.sibling.image, parent)?;
            }
        }
    }
    repo.volumes.sync("snapshot: children and second names").during(|| "names of a snapshot's images".into())
}

/// A filled image becomes the prepared sibling, on the parent it shall have.
fn take_over(
    repo: &Repo,
    filled: &Filled,
    image: &ImageRef,
    parent: &VolumeName,
    footer: Uuid,
) -> Result<()> {
    image::set_parent(repo, &filled.volume, parent, footer)?;
    repo.volumes
        .rename(&filled.volume, &journal::volume_of(image)?)
        .during(|| format!("prepare {}", filled.volume))
}

enum Decided {
    Yes,
    NotEmptyAnyMore,
}

/// Steps 4 to 7. On an error, and when a leaf is not empty any more, the
/// record is `void` and everybody goes on as before.
fn decide(
    repo: &Repo,
    intent: &SnapshotIntent,
    targets: &mut [Target<'_>],
    progress: &Progress,
) -> Result<Decided> {
    let paused = progress.go_on().and_then(|()| pause_all(repo, intent, targets));
    let outcome = match &paused {
        Ok(Decided::Yes) => steps::decide(repo, intent.id, Decision::Swap),
        Ok(Decided::NotEmptyAnyMore) | Err(_) => steps::decide(repo, intent.id, Decision::Void),
    };
    // An unknown outcome: dropping the connections makes each tapdisk find
    // out for itself, and recovery does the same for us.
    let decision = outcome?;
    let names = RecordName::of_snapshot(intent.id);
    for target in &mut *targets {
        let Some(live) = &mut target.live else {
            continue;
        };
        let swap = decision == Decision::Swap;
        // Refused or unanswered: it has resumed by itself, as the record
        // says, or it is dead; `finish` looks at what became of the leaf.
        if let Err(error) = live.tap.call(Request::Resume { intent: names.clone(), swap }) {
            tracing::warn!(sr = %repo.uuid, vdi = %target.wanted.vdi, %error, "resume");
            live.stuck = super::unstick::why(target.wanted.vdi, &error);
        }
    }
    match (paused?, decision) {
        (Decided::Yes, Decision::Void) => {
            let reason = "the pause lasted too long; nothing was changed".into();
            Err(Error::Busy { reason })
        }
        (decided, _) => Ok(decided),
    }
}

/// Steps 4 and 5.
fn pause_all(repo: &Repo, intent: &SnapshotIntent, targets: &mut [Target<'_>]) -> Result<Decided> {
    let names = RecordName::of_snapshot(intent.id);
    let failed = |vdi: Uuid, error: tapdisk_control::ClientError| Error::Busy {
        reason: format!("the tapdisk of VDI {vdi} cannot pause: {error}"),
    };
    for (member, target) in intent.members.iter().zip(&mut *targets) {
        let Some(live) = &mut target.live else {
            continue;
        };
        let leaf =
            ImageRef { volume: VolumeName::vhd(member.vdi).as_str().to_owned(), footer: member.leaf_footer };
        let (child, base) = match &member.shape {
            Shape::Divide { new_leaf, base } => {
                (Some(new_leaf.clone()), Some(VolumeName::vhd(*base).as_str().to_owned()))
            }
            Shape::Empty => (None, None),
        };
        let request = Request::Prepare { intent: names.clone(), leaf, child, base };
        live.tap.call(request).map_err(|e| failed(member.vdi, e))?;
    }
    for (member, target) in intent.members.iter().zip(targets) {
        let Some(live) = &mut target.live else {
            continue;
        };
        let limit_ms = repo.limits.pause_ms_max;
        let request = Request::Pause { intent: names.clone(), limit_ms };
        let reply = live.tap.call(request).map_err(|e| failed(member.vdi, e))?;
        let now_empty = matches!(reply, Reply::Paused { leaf_is_empty: true });
        if member.shape == Shape::Empty && !now_empty {
            return Ok(Decided::NotEmptyAnyMore);
        }
    }
    Ok(Decided::Yes)
}

/// Cleans up after a snapshot that did not happen.
fn take_back(repo: &Repo, intent: &SnapshotIntent) -> Result<()> {
    let _sr = repo.host.lock_sr().during(|| format!("lock of SR {}", repo.name))?;
    steps::take_back(repo, intent)
}
