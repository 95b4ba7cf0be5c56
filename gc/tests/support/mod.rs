//! An SR on real files, made image by image, and its collection.

#![allow(clippy::unwrap_used, reason = "helpers of tests are not test functions")]
#![allow(dead_code, reason = "not every test binary uses all of it")]

pub mod served;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use gc::collector::{Collector, Scope};
use gc::plan::Settings;
use gc::report::Report;
use sm::attached::AttachedSr;
use sm::owner::{HostId, Owner};
use sm::state::SrType;
use sm::{Repo, image};
use uuid::Uuid;
use vhd::chain::Chain;
use vhd::create::{NewImage, NewKind, ParentLink};
use vhd::storage::VolumeName;
use vhd::units::{BLOCK_BYTES, BlockNo, SectorRun};
use vhd::writer::Writer;

/// An SR in a folder of its own.
pub struct Sr {
    _folder: tempfile::TempDir,
    pub attached: AttachedSr,
    pub run: PathBuf,
    pub repo: Repo,
}

impl Sr {
    pub fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (path, run) = (folder.path().join("sr"), folder.path().join("run"));
        std::fs::create_dir(&path).unwrap();
        std::fs::create_dir_all(run.join("sr")).unwrap();
        let id = HostId { host: Uuid::from_u128(1), boot: Uuid::from_u128(2) };
        let owner = Owner::acquire(&path, id).unwrap();
        let attached = AttachedSr {
            uuid: Uuid::from_u128(0xAB),
            name: "test".into(),
            kind: SrType::File,
            path,
            epoch: owner.epoch,
            id,
        };
        let repo = attached.open_owned(&run, owner, None).unwrap().repo;
        Self { _folder: folder, attached, run, repo }
    }

    pub fn path(&self) -> &Path {
        &self.attached.path
    }

    /// A node of `blocks` blocks over `parent` (0: none).
    pub fn image(&self, n: u128, parent: u128, hidden: bool, blocks: u64) {
        let name = VolumeName::vhd(id(n));
        let volume = self.repo.volumes.create(&name).unwrap();
        let kind = match parent {
            0 => NewKind::Dynamic,
            parent => {
                let volume = VolumeName::vhd(id(parent));
                NewKind::Child { parent: ParentLink { uuid: footer(parent), volume, timestamp_s: 0 } }
            }
        };
        let new = NewImage {
            uuid: footer(n),
            virtual_bytes: blocks * BLOCK_BYTES,
            kind,
            bat_entries_max: None,
            hidden,
            timestamp_s: 0,
        };
        vhd::create::create(volume.as_ref(), &new).unwrap();
    }

    pub fn write(&self, n: u128, writes: &[(u32, SectorRun, u8)]) {
        let name = VolumeName::vhd(id(n));
        let (volumes, records) = (self.repo.volumes.as_ref(), self.repo.host.records());
        let mut writer = Writer::open(volumes, &name, records).unwrap();
        for (block, run, value) in writes {
            let data = vec![*value; run.bytes() as usize];
            // Sparse everywhere: every sector that was not written is absent.
            writer.write(BlockNo(*block), *run, &data, true).unwrap();
        }
        writer.settle(None).unwrap();
    }

    pub fn read(&self, n: u128) -> Vec<u8> {
        let chain = Chain::open(self.repo.volumes.as_ref(), &VolumeName::vhd(id(n))).unwrap();
        let mut bytes = vec![0; chain.virtual_bytes() as usize];
        chain.read_at(&mut bytes, 0).unwrap();
        bytes
    }

    pub fn depth(&self, n: u128) -> usize {
        Chain::open(self.repo.volumes.as_ref(), &VolumeName::vhd(id(n))).unwrap().nodes().len()
    }

    pub fn volumes(&self) -> usize {
        self.repo.volumes.list().unwrap().len()
    }

    pub fn allocated(&self) -> u64 {
        let names = self.repo.volumes.list().unwrap();
        names.iter().filter_map(|name| image::allocated_bytes(&self.repo, name).ok()).sum()
    }

    /// Runs a collector until nothing is left to be done.
    pub fn collect_with(&self, collector: &Arc<Collector>, scope: Scope) -> Report {
        let asking = collector.clone();
        let asked = collector.state().asked;
        let asker = std::thread::spawn(move || {
            let report = asking.collect_as_predicted(scope).unwrap();
            asking.close();
            report
        });
        // Only then is everything done counted as done for the asker.
        while collector.state().asked == asked {
            std::thread::yield_now();
        }
        collector.work();
        asker.join().unwrap()
    }

    /// Predicts, collects, and compares both with what is on disk.
    pub fn collect(&self, scope: Scope) -> Report {
        let collector = Collector::new(self.repo.clone(), Settings::default(), 0);
        let predicted = collector.predict(scope).unwrap();
        let before = self.allocated();
        let report = self.collect_with(&collector, scope);
        assert!(self.repo.volumes.records().unwrap().is_empty(), "records are left");
        assert_eq!(report.predicted.as_deref(), Some(&predicted));
        assert_eq!(report.bytes_freed, before - self.allocated(), "{report:?}");
        assert_eq!(predicted.bytes_freed, report.bytes_freed, "{predicted:?}\n{report:?}");
        assert_eq!(
            (predicted.coalesced, predicted.leaf_coalesced, predicted.deleted),
            (report.coalesced, report.leaf_coalesced, report.deleted)
        );
        assert!(predicted.bytes_copied >= report.bytes_copied, "{predicted:?}\n{report:?}");
        assert!(predicted.bytes_cloned >= report.bytes_cloned);
        assert!(predicted.peak_extra_bytes >= report.peak_extra_bytes, "{predicted:?}\n{report:?}");
        report
    }
}

pub fn id(n: u128) -> Uuid {
    Uuid::from_u128(n)
}

pub fn footer(n: u128) -> Uuid {
    Uuid::from_u128(n + 0x1_0000)
}

pub fn run(first: u32, count: u32) -> SectorRun {
    SectorRun { first, count }
}
