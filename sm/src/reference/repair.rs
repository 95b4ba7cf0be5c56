//! Finishing or taking back what the reference left half done.
//!
//! Runs under the SR lock when an SR is attached, and only while it has no
//! leases: the reference held the guests of whatever it was changing.
//!
//! ```text
//!   found                 then
//!   .journal-<uuid>       the image is poisoned: reverted by it; else the resize
//!                         had not begun or was complete. The journal goes.
//!   leaf_<uuid>           taken back or done, see [`LeafCase`]
//!   OLD_<uuid>.vhd        goes once `<uuid>.vhd` is the parent it was merged into
//!   <uuid>.vhd.new        goes if it holds nothing; a second name of the disk
//!                         that nothing stands on goes with it
//!   coalesce_<uuid>       goes: merging again writes the same bytes
//!   relink_<uuid>         no child moved yet: goes, like that. Else it becomes a
//!                         record of ours, and the collector goes on relinking.
//! ```
//!
//! Crash argument: each file is handled by idempotent steps and goes last,
//! after a sync of what was done because of it; so a crash anywhere leaves a
//! folder that the next attach handles the same way. What is unclear is left
//! as it is and said, also when only one file is: the rest goes on
//! (invariant 11).

use uuid::Uuid;
use vhd::storage::{Access, Fs, VolumeName};

use super::names::{LeafCase, Leftover, old_leaf};
use crate::error::{Error, IoContext, Result};
use crate::image;
use crate::journal::{self, ImageRef, InnerIntent, Intent, JobState};
use crate::repo::Repo;
use crate::scan;
use crate::tree::{Head, VdiTree};

/// The longest journal of the reference that is read: it holds a uuid or two.
const JOURNAL_BYTES_MAX: u64 = 4096;

/// What became of one file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Repaired {
    /// The file.
    pub name: String,
    /// What was done, or why nothing could be.
    pub outcome: std::result::Result<&'static str, String>,
}

/// Handles every leftover in the SR folder `fs`. The caller holds the SR lock
/// and has seen that there are no leases.
///
/// # Errors
/// The folder cannot be listed.
pub fn repair(repo: &Repo, fs: &dyn Fs) -> Result<Vec<Repaired>> {
    let names = fs.list("").during(|| format!("list SR {}", repo.name))?;
    let mut found: Vec<(u8, String, Leftover)> = names
        .into_iter()
        .filter_map(|name| {
            let leftover = Leftover::of(&name).filter(|leftover| leftover.needs_repair())?;
            Some((order(leftover), name, leftover))
        })
        .collect();
    found.sort_by(|a, b| (a.0, &a.1).cmp(&(b.0, &b.1)));
    let mut done = Vec::new();
    for (_, name, leftover) in found {
        let outcome = one(repo, fs, &name, leftover).map_err(|error| error.to_string());
        match &outcome {
            Ok(what) => tracing::info!(sr = %repo.uuid, name, what, "leftover of the reference"),
            Err(error) => tracing::warn!(sr = %repo.uuid, name, error, "leftover of the reference stays"),
        }
        done.push(Repaired { name, outcome });
    }
    Ok(done)
}

/// Poisoned images cannot be read, and a leaf must have its name back before
/// anything is made of trees.
fn order(leftover: Leftover) -> u8 {
    match leftover {
        Leftover::ResizeJournal { .. } => 0,
        Leftover::LeafJournal { .. } => 1,
        Leftover::OldLeaf { .. } | Leftover::SnapshotChild { .. } => 2,
        _ => 3,
    }
}

fn one(repo: &Repo, fs: &dyn Fs, name: &str, leftover: Leftover) -> Result<&'static str> {
    let said = match leftover {
        Leftover::ResizeJournal { of } => resize(repo, fs, name, of)?,
        Leftover::LeafJournal { of } => leaf(repo, fs, name, of)?,
        Leftover::OldLeaf { of } => return old(repo, of),
        Leftover::SnapshotChild { of } => child(repo, fs, name, of)?,
        Leftover::CoalesceJournal { .. } => "the merge is done again",
        Leftover::RelinkJournal { of } => relink(repo, of)?,
        Leftover::CbtLog { .. } | Leftover::Cache { .. } | Leftover::Note => return Ok("left alone"),
    };
    let what = || format!("remove {name}");
    fs.sync_names("", "reference: what was done before its journal goes").during(what)?;
    fs.unlink(name).during(what)?;
    fs.sync_names("", "reference: journal gone").during(what)?;
    Ok(said)
}

fn resize(repo: &Repo, fs: &dyn Fs, name: &str, of: Uuid) -> Result<&'static str> {
    let volume = VolumeName::vhd(of);
    match image::meta(repo, &volume) {
        Ok(_) => return Ok("the resize had not begun or was complete"),
        Err(Error::NotFound { .. }) => return Ok("its image is gone"),
        Err(_) => {}
    }
    let journal = fs.open(name, Access::Read).during(|| format!("open {name}"))?;
    let opened = image::open(repo, &volume, Access::Write)?;
    vhd::resize::revert(opened.as_ref(), journal.as_ref()).map_err(|e| image::bad(&volume, e))?;
    Ok("the resize was taken back")
}

fn exists(repo: &Repo, volume: &VolumeName) -> Result<bool> {
    match image::open(repo, volume, Access::Read) {
        Ok(_) => Ok(true),
        Err(Error::NotFound { .. }) => Ok(false),
        Err(error) => Err(error),
    }
}

fn unclear(name: &str, reason: &str) -> Error {
    Error::Journal { record: name.to_owned(), reason: reason.to_owned() }
}

fn leaf(repo: &Repo, fs: &dyn Fs, name: &str, of: Uuid) -> Result<&'static str> {
    let old = old_leaf(of).ok_or_else(|| unclear(name, "no name for the old leaf"))?;
    let leaf = VolumeName::vhd(of);
    let (has_leaf, has_old) = (exists(repo, &leaf)?, exists(repo, &old)?);
    let holder = if has_old { &old } else { &leaf };
    let parent = match parent_in(fs, name)? {
        Some(parent) => VolumeName::vhd(parent),
        // An empty journal, of a crash as it was made: then nothing was
        // renamed, and the leaf itself knows.
        None => match head(repo, holder)?.parent.and_then(|parent| parent.candidates.into_iter().next()) {
            Some(parent) => parent,
            None => return Ok("the merge is done"),
        },
    };
    match LeafCase::of(has_leaf, has_old, exists(repo, &parent)?) {
        LeafCase::Done => return Ok("the merge is done"),
        LeafCase::Unclear => {
            return Err(unclear(name, "the images it names are neither where they were nor where they go"));
        }
        LeafCase::BeforeRenames => belongs(repo, name, &leaf, &parent)?,
        LeafCase::LeafRenamed => {
            belongs(repo, name, &old, &parent)?;
            rename(repo, &old, &leaf)?;
        }
        LeafCase::BothRenamed => {
            belongs(repo, name, &old, &leaf)?;
            rename(repo, &leaf, &parent)?;
            rename(repo, &old, &leaf)?;
        }
    }
    // The leaf is shown last: until then its tree shows as not attachable.
    image::settle(repo, &parent)?;
    image::set_hidden(repo, &parent, true)?;
    image::settle(repo, &leaf)?;
    image::set_hidden(repo, &leaf, false)?;
    Ok("the merge was taken back")
}

/// The leaf stands on that image, by its footer's uuid.
fn belongs(repo: &Repo, name: &str, leaf: &VolumeName, parent: &VolumeName) -> Result<()> {
    let wanted = head(repo, leaf)?.parent.map(|parent| parent.footer);
    if wanted == Some(head(repo, parent)?.footer) {
        return Ok(());
    }
    Err(unclear(name, &format!("{leaf} does not stand on {parent}")))
}

fn rename(repo: &Repo, from: &VolumeName, to: &VolumeName) -> Result<()> {
    let what = || format!("rename {from} to {to}");
    repo.volumes.rename(from, to).during(what)?;
    repo.volumes.sync("reference: name given back").during(what)
}

pub(super) fn head(repo: &Repo, volume: &VolumeName) -> Result<Head> {
    let missing = || Error::NotFound { what: format!("volume {volume}") };
    let seen = image::look(repo, volume).ok_or_else(missing)?;
    seen.head.map_err(|reason| Error::BadImage { volume: volume.clone(), reason })
}

/// The first uuid that a journal says.
pub(super) fn parent_in(fs: &dyn Fs, name: &str) -> Result<Option<Uuid>> {
    let what = || format!("read {name}");
    let file = fs.open(name, Access::Read).during(what)?;
    let len = file.len().during(what)?.min(JOURNAL_BYTES_MAX);
    let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
    file.read_at(&mut bytes, 0).during(what)?;
    let text = String::from_utf8_lossy(&bytes);
    let words = text.split(|c: char| !(c.is_ascii_hexdigit() || c == '-'));
    Ok(words.filter(|word| word.len() == 36).find_map(|word| Uuid::try_parse(word).ok()))
}

/// The emptied leaf of a merge that is done: hidden, and the disk's name leads
/// to the very parent it names. Anything else is left for an operator.
fn old(repo: &Repo, of: Uuid) -> Result<&'static str> {
    let old = old_leaf(of).ok_or_else(|| unclear("OLD_", "no name"))?;
    if !exists(repo, &old)? {
        return Ok("it has its name back");
    }
    let (emptied, disk) = (head(repo, &old)?, head(repo, &VolumeName::vhd(of))?);
    let merged_into = emptied.parent.map(|parent| parent.footer);
    if !emptied.hidden || merged_into != Some(disk.footer) || disk.hidden {
        return Err(unclear(old.as_str(), "the disk is not the parent it was merged into"));
    }
    repo.volumes.delete(&old).during(|| format!("delete {old}"))?;
    repo.volumes.sync("reference: emptied leaf gone").during(|| format!("delete {old}"))?;
    Ok("it was merged into the disk, and goes")
}

/// A snapshot that had not given the child its name. The base is then a second
/// name of the disk's own image, and the child the only image that knows it.
fn child(repo: &Repo, fs: &dyn Fs, name: &str, of: Uuid) -> Result<&'static str> {
    let file = fs.open(name, Access::Read).during(|| format!("open {name}"))?;
    let Ok(meta) = vhd::meta::Meta::read(file.as_ref()) else {
        return Ok("half made, it holds nothing, and goes");
    };
    if let Some(layout) = &meta.layout {
        let bat = vhd::bat::read_bat(file.as_ref(), layout)
            .map_err(|e| Error::Journal { record: name.to_owned(), reason: e.to_string() })?;
        if bat.iter().any(|entry| *entry != vhd::bat::BAT_FREE) {
            return Err(unclear(name, "it holds data"));
        }
    }
    let disk = VolumeName::vhd(of);
    let bases = meta.parent.as_ref().and_then(|parent| parent.candidates().ok()).unwrap_or_default();
    for base in bases.iter().filter(|base| **base != disk) {
        if repo.volumes.same(base, &disk).during(|| format!("compare {base} and {disk}"))? {
            repo.volumes.delete(base).during(|| format!("delete {base}"))?;
        }
    }
    Ok("the snapshot was taken back")
}

/// What stands on the merged node and has not been moved yet.
fn relink(repo: &Repo, of: Uuid) -> Result<&'static str> {
    let found = scan::scan(repo)?;
    let known = |stored: &journal::Stored| stored.intent.names(&VolumeName::vhd(of), Uuid::nil());
    if found.intents.iter().any(known) {
        return Ok("the collector goes on relinking");
    }
    let Some(intent) = relink_intent(repo, &found.tree, of) else {
        return Ok("nothing was relinked yet: the merge is done again");
    };
    let parent = journal::volume_of(&intent.parent)?;
    image::settle(repo, &parent)?;
    let opened = image::open(repo, &parent, Access::Write)?;
    opened.flush("reference: merged data before it is relied on").during(|| format!("flush {parent}"))?;
    journal::put(repo.volumes.as_ref(), &Intent::Inner(intent), "reference: relink taken over")?;
    Ok("the collector goes on relinking")
}

fn relink_intent(repo: &Repo, tree: &VdiTree, of: Uuid) -> Option<InnerIntent> {
    let ix = tree.by_uuid(of)?;
    let node = &tree.nodes[ix];
    let parent = &tree.nodes[node.parent?];
    let moved = parent.children.iter().any(|child| *child != ix);
    if !node.is_hidden() || !parent.is_hidden() || !moved {
        return None;
    }
    let named = |ix: usize| {
        let node = &tree.nodes[ix];
        ImageRef { volume: node.volume.as_str().to_owned(), footer: node.footer }
    };
    Some(InnerIntent {
        id: repo.ids.uuid(),
        nodes: vec![named(ix)],
        parent: named(node.parent?),
        state: JobState::Relinking { children: node.children.iter().map(|child| named(*child)).collect() },
    })
}
