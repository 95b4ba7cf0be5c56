//! What leftovers of the reference are about, told without touching them.

use uuid::Uuid;
use vhd::storage::Fs;

use super::names::{Leftover, old_leaf};
use super::repair::{head, parent_in};
use crate::error::{IoContext, Result};
use crate::repo::Repo;

/// A leftover that the next attach puts right before anything is collected in
/// the trees it is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Touched {
    /// The file.
    pub name: String,
    /// The node it names.
    pub of: Uuid,
    /// That and others it is about, as far as they can be told.
    pub nodes: Vec<Uuid>,
    /// What it means.
    pub why: String,
}

/// All of them in the SR folder `fs`. An interrupted merge of hidden nodes
/// that had not begun to relink is none: it is merged like any other.
///
/// # Errors
/// The folder cannot be listed.
pub fn touched(repo: &Repo, fs: &dyn Fs) -> Result<Vec<Touched>> {
    let names = fs.list("").during(|| format!("list SR {}", repo.name))?;
    let found = names.into_iter().filter_map(|name| {
        let leftover = Leftover::of(&name).filter(|leftover| leftover.needs_repair())?;
        let (of, others) = about(repo, fs, &name, leftover)?;
        let nodes = std::iter::once(of).chain(others).collect();
        Some(Touched { name, of, nodes, why: leftover.explain() })
    });
    Ok(found.collect())
}

/// What cannot be read is explained when the SR is attached.
fn about(repo: &Repo, fs: &dyn Fs, name: &str, leftover: Leftover) -> Option<(Uuid, Vec<Uuid>)> {
    let parents_of_old = |of: Uuid| {
        let head = old_leaf(of).and_then(|old| head(repo, &old).ok());
        let candidates = head.and_then(|head| head.parent).map(|parent| parent.candidates);
        candidates.into_iter().flatten().filter_map(|volume| volume.uuid()).collect::<Vec<_>>()
    };
    match leftover {
        Leftover::LeafJournal { of } => {
            let named = parent_in(fs, name).ok().flatten();
            Some((of, named.into_iter().chain(parents_of_old(of)).collect()))
        }
        Leftover::OldLeaf { of } => Some((of, parents_of_old(of))),
        Leftover::ResizeJournal { of } | Leftover::RelinkJournal { of } | Leftover::SnapshotChild { of } => {
            Some((of, Vec::new()))
        }
        Leftover::CoalesceJournal { .. }
        | Leftover::CbtLog { .. }
        | Leftover::Cache { .. }
        | Leftover::Note => None,
    }
}
