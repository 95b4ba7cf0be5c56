//! Deleting hidden nodes that nobody needs.
//!
//! Under the SR lock headers, leases and records are read again; only what
//! is garbage in that picture too is deleted (invariant 8). Children go
//! before their parents, each generation durably before the next: a crash
//! leaves fewer nodes, never one whose parent is gone. So no record is
//! needed; the next pass goes on.

use std::collections::BTreeMap;

use sm::{Repo, image};
use uuid::Uuid;
use vhd::storage::VolumeName;

use crate::forest::{Forest, Health, Role};
use crate::job::{Result, Stop, io};
use crate::survey;
use crate::watch::{Event, Watch};

/// What came of a deletion.
#[derive(Debug, Default)]
pub struct Deleted {
    /// Nodes that are gone.
    pub gone: Vec<Uuid>,
    /// Nodes that could not be deleted, and why.
    pub failed: Vec<(Uuid, String)>,
}

/// Deletes `nodes`, children first; what is not garbage any more stays
/// without a word.
///
/// # Errors
/// The SR cannot be looked at.
pub fn delete(repo: &Repo, watch: &dyn Watch, nodes: &[Uuid]) -> Result<Deleted> {
    let _lock = io("lock the SR", repo.host.lock_sr())?;
    let forest = survey::survey(repo, &survey::leases(repo)?)?;
    let mut done = Deleted::default();
    if let Some((node, why)) = forest.unknown_parents() {
        return Err(Stop::Later(format!("{} cannot be read: {why}", node.uuid)));
    }
    let mut generations: BTreeMap<usize, Vec<Uuid>> = BTreeMap::new();
    for uuid in nodes {
        generations.entry(forest.depth(*uuid)).or_default().push(*uuid);
    }
    for generation in generations.values().rev() {
        let before = done.gone.len();
        for uuid in generation {
            if !is_garbage(&forest, *uuid, &done.gone) {
                continue;
            }
            match delete_one(repo, &forest, *uuid) {
                Ok(freed) => {
                    watch.note(Event::Freed(freed));
                    done.gone.push(*uuid);
                }
                Err(stop) => done.failed.push((*uuid, stop.to_string())),
            }
        }
        if done.gone.len() > before {
            io("delete garbage", repo.volumes.sync("garbage: generation deleted"))?;
        }
    }
    for uuid in &done.gone {
        if let Some(node) = forest.node(*uuid) {
            io("pending record", repo.host.records().remove(node.footer))?;
        }
        repo.labels.remove(*uuid)?;
    }
    Ok(done)
}

fn is_garbage(forest: &Forest, uuid: Uuid, gone: &[Uuid]) -> bool {
    forest.node(uuid).is_some_and(|node| {
        node.role == Role::Hidden
            && !matches!(node.health, Health::Broken(_))
            && forest.children(uuid).all(|child| gone.contains(&child.uuid))
            && forest.claim_on(uuid).is_none()
            && forest.leases_on(uuid).next().is_none()
    })
}

/// Removes the name, with the image locked: somebody without a lease may
/// have it open for writing. Returns the bytes of its blocks.
fn delete_one(repo: &Repo, forest: &Forest, uuid: Uuid) -> Result<u64> {
    let name = VolumeName::vhd(uuid);
    let footer = forest.node(uuid).map(|node| node.footer);
    if image::footer_of(repo, &name)? != footer {
        return Err(Stop::Later(format!("{name} is another image by now")));
    }
    let freed = image::allocated_bytes(repo, &name)?;
    let _locked = image::open(repo, &name, vhd::storage::Access::Write)?;
    io("delete garbage", repo.volumes.delete(&name))?;
    Ok(freed)
}
