//! The catalog is filled again from the images: what has no label gets one,
//! and labels of what is gone are dropped.

use std::collections::BTreeMap;

use uuid::Uuid;

use crate::catalog::Label;
use crate::error::{IoContext, Result};
use crate::journal;
use crate::repo::Repo;
use crate::scan;

/// Labels what has none, and drops labels of what is gone. While an image
/// cannot be read nothing is dropped. The caller does not hold the SR lock.
///
/// # Errors
/// The SR, its journal or its catalog cannot be read or written.
pub(crate) fn label_images(repo: &Repo) -> Result<()> {
    let tree = scan::scan(repo)?.tree;
    let mut labels = repo.labels.all()?;
    let mut doubtful = false;
    for node in &tree.nodes {
        doubtful |= node.broken().is_some();
        if labels.remove(&node.uuid).is_some() || node.is_hidden() {
            continue;
        }
        let name = node.uuid.to_string();
        let label = Label { name, created_s: node.created_s, ..Label::default() };
        repo.labels.put(node.uuid, &label)?;
    }
    // What is prepared may be on its way to the name of such a label.
    if !doubtful && tree.prepared.is_empty() && !labels.is_empty() {
        drop_labels(repo, labels)?;
    }
    Ok(())
}

/// Drops those of these labels that belong to nothing. What was seen without
/// the SR lock may be old: a disk that is made gets its label before its name,
/// both under the lock. So under it a label without an image, where nothing is
/// half done, is one of nothing.
fn drop_labels(repo: &Repo, labels: BTreeMap<Uuid, Label>) -> Result<()> {
    let _sr = repo.host.lock_sr().during(|| format!("lock of SR {}", repo.name))?;
    let half_done = |intent: &journal::Intent| !intent.is_merge();
    if journal::load(repo.volumes.as_ref())?.iter().any(|stored| half_done(&stored.intent)) {
        return Ok(());
    }
    let names = repo.volumes.list().during(|| format!("list SR {}", repo.name))?;
    let there: std::collections::BTreeSet<Uuid> = names.iter().filter_map(|name| name.uuid()).collect();
    for vdi in labels.into_keys().filter(|vdi| !there.contains(vdi)) {
        repo.labels.remove(vdi)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;
    use crate::attached::AttachedSr;
    use crate::catalog::{Event, Labels, MemoryLabels};
    use crate::ops;
    use crate::owner::{HostId, Owner};
    use crate::state::SrType;

    /// Somebody makes a disk after the images and before the labels are read.
    #[derive(Debug)]
    struct MadeMeanwhile {
        inner: Arc<MemoryLabels>,
        repo: Repo,
        done: AtomicBool,
    }

    impl Labels for MadeMeanwhile {
        fn all(&self) -> Result<BTreeMap<Uuid, Label>> {
            if !self.done.swap(true, Ordering::Relaxed) {
                ops::create(&self.repo, "made meanwhile", 4 << 20)?;
            }
            self.inner.all()
        }
        fn get(&self, vdi: Uuid) -> Result<Option<Label>> {
            self.inner.get(vdi)
        }
        fn put(&self, vdi: Uuid, label: &Label) -> Result<()> {
            self.inner.put(vdi, label)
        }
        fn remove(&self, vdi: Uuid) -> Result<()> {
            self.inner.remove(vdi)
        }
        fn content_id(&self, vdi: Uuid) -> Result<Option<Uuid>> {
            self.inner.content_id(vdi)
        }
        fn set_content_id(&self, vdi: Uuid, id: Option<Uuid>) -> Result<()> {
            self.inner.set_content_id(vdi, id)
        }
        fn note(&self, event: &Event) -> Result<()> {
            self.inner.note(event)
        }
    }

    #[test]
    fn a_disk_made_beside_it_keeps_its_label_and_what_is_gone_loses_it() {
        let folder = tempfile::tempdir().unwrap();
        let (path, run) = (folder.path().join("sr"), folder.path().join("run"));
        std::fs::create_dir(&path).unwrap();
        let id = HostId { host: Uuid::from_u128(1), boot: Uuid::from_u128(2) };
        let owner = Owner::acquire(&path, id).unwrap();
        let (name, kind, epoch) = ("sr".into(), SrType::File, owner.epoch);
        let attached = AttachedSr { uuid: Uuid::from_u128(3), name, kind, path, epoch, id };
        let mut repo = attached.open_owned(&run, owner, None).unwrap().repo;
        let inner = Arc::new(MemoryLabels::default());
        repo.labels = inner.clone();
        let gone = Uuid::from_u128(4);
        inner.put(gone, &Label::default()).unwrap();
        let meanwhile =
            MadeMeanwhile { inner: inner.clone(), repo: repo.clone(), done: AtomicBool::new(false) };
        repo.labels = Arc::new(meanwhile);
        label_images(&repo).unwrap();
        let labels = inner.all().unwrap();
        let names: Vec<&str> = labels.values().map(|label| label.name.as_str()).collect();
        assert_eq!(names, ["made meanwhile"], "{labels:?}");
    }
}
