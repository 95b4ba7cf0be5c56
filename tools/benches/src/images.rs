//! The image sets on disk: VHD chains through the `vhd` crate, qcow2 chains
//! through qemu, raw files. Nothing here is timed.
//!
//! Everything lies in one folder that goes away with this value. After a set
//! is written it leaves the page cache, so that no contender finds its data
//! there.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use uuid::Uuid;
use vhd::bat::BAT_FREE;
use vhd::bitmap::SectorBitmap;
use vhd::create::{NewImage, NewKind, ParentLink, create};
use vhd::meta::Meta;
use vhd::record::TmpfsRecords;
use vhd::slots::Slots;
use vhd::storage::{FileVolumes, PosixFs, Volume, VolumeName, Volumes};
use vhd::units::{BlockNo, SECTOR_BYTES, SectorRun};
use vhd::writer::{Settled, Writer, settle_files};

use crate::sets::{self, BLOCK_BYTES, Patch};

/// How a level of a chain is filled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fill {
    /// Level `n` of S: see [`sets::patches`].
    Level(u32),
    /// So many 4 KiB runs all over it: see [`sets::scattered`].
    Scattered(u32),
    /// Nothing.
    Empty,
    /// Every block whole, its data left as holes; no bitmaps on disk, which
    /// nothing reads while the BATmap says whole.
    Holes,
    /// Level `n` of S, its data left as holes.
    LevelHoles(u32),
    /// As [`Fill::Holes`], only blocks whose number is `n` modulo `of`.
    HolesEvery {
        /// Which of them.
        n: u32,
        /// Of how many.
        of: u32,
    },
}

/// A VHD image of the repository.
#[derive(Debug, Clone)]
pub struct Image {
    /// Its volume.
    pub volume: VolumeName,
    /// Its footer uuid.
    pub footer: Uuid,
}

/// A folder for images, removed at the end.
#[derive(Debug)]
pub struct Images {
    folder: tempfile::TempDir,
    /// Sockets and pending records, in memory.
    run: tempfile::TempDir,
    /// Kept small by the records: none outlives a build.
    records: TmpfsRecords,
    volumes: FileVolumes,
}

impl Images {
    /// A new folder below `dir`, which must take O_DIRECT.
    ///
    /// # Errors
    /// It cannot be made, or its filesystem takes no O_DIRECT.
    pub fn new(dir: &Path) -> Result<Self> {
        let folder = tempfile::Builder::new()
            .prefix("coppice-bench-")
            .tempdir_in(dir)
            .with_context(|| format!("a folder in {}", dir.display()))?;
        direct_io(folder.path())?;
        let run = tempfile::Builder::new().prefix("coppice-bench-").tempdir_in("/dev/shm")?;
        let (sr, records) = (folder.path().join("sr"), run.path().join("records"));
        std::fs::create_dir(&sr)?;
        std::fs::create_dir(&records)?;
        Ok(Self {
            volumes: FileVolumes::new(Arc::new(PosixFs::new(sr))),
            records: TmpfsRecords::new(records, Uuid::nil(), 1),
            folder,
            run,
        })
    }

    /// The repository's folder.
    #[must_use]
    pub fn repository(&self) -> PathBuf {
        self.folder.path().join("sr")
    }

    /// The repository.
    #[must_use]
    pub fn volumes(&self) -> &FileVolumes {
        &self.volumes
    }

    /// A folder for sockets.
    #[must_use]
    pub fn run_folder(&self) -> &Path {
        self.run.path()
    }

    /// Where tapdisks keep their pending records.
    #[must_use]
    pub fn records_folder(&self) -> PathBuf {
        self.run.path().join("records")
    }

    /// Path of a file that is not in the repository.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A chain, bottom first, upon `base` if there is one; its leaf is the
    /// last image returned.
    ///
    /// # Errors
    /// What the disk said.
    pub fn chain(
        &self,
        name: &str,
        virtual_bytes: u64,
        base: Option<&Image>,
        levels: impl IntoIterator<Item = Fill>,
    ) -> Result<Vec<Image>> {
        let mut images: Vec<Image> = Vec::new();
        for (n, fill) in levels.into_iter().enumerate() {
            let parent = images.last().or(base);
            images.push(self.image(&format!("{name}-{n}.vhd"), virtual_bytes, fill, parent)?);
        }
        Ok(images)
    }

    /// Where an image lies. Peers read it as if it were a raw file, so that
    /// all contenders read the same bytes: files of one size differ in speed
    /// by where they happen to lie.
    #[must_use]
    pub fn file(&self, image: &Image) -> PathBuf {
        self.repository().join(image.volume.as_str())
    }

    /// One image, settled.
    ///
    /// # Errors
    /// What the disk said.
    pub fn image(&self, name: &str, virtual_bytes: u64, fill: Fill, parent: Option<&Image>) -> Result<Image> {
        let volume = VolumeName::new(name).context("a volume name")?;
        let kind = match parent {
            None => NewKind::Dynamic,
            Some(parent) => NewKind::Child {
                parent: ParentLink { uuid: parent.footer, volume: parent.volume.clone(), timestamp_s: 0 },
            },
        };
        let uuid = Uuid::new_v4();
        let new =
            NewImage { uuid, virtual_bytes, kind, bat_entries_max: None, hidden: false, timestamp_s: 0 };
        let file = self.volumes.create(&volume)?;
        let mut meta = create(file.as_ref(), &new)?;
        match fill {
            Fill::Empty => {}
            Fill::Level(level) => {
                drop(file);
                self.fill(&volume, level, parent.is_some())?;
            }
            Fill::Scattered(runs) => {
                drop(file);
                self.scatter(&volume, runs)?;
            }
            Fill::Holes => whole_without_data(file.as_ref(), &mut meta, |_| true)?,
            Fill::HolesEvery { n, of } => whole_without_data(file.as_ref(), &mut meta, |b| b % of == n)?,
            Fill::LevelHoles(level) => patched_without_data(file.as_ref(), &mut meta, level)?,
        }
        drop_from_cache(&self.repository().join(name))?;
        Ok(Image { volume, footer: uuid })
    }

    fn fill(&self, volume: &VolumeName, level: u32, below: bool) -> Result<()> {
        let mut writer = Writer::open(&self.volumes, volume, &self.records)?;
        let blocks = u32::try_from(writer.meta().virtual_bytes() / BLOCK_BYTES)?;
        let mut buf = vec![0; BLOCK_BYTES as usize];
        for patch in sets::patches(level, blocks) {
            let data = &mut buf[..patch.bytes as usize];
            sets::content(level, patch.offset(), data);
            writer.write(BlockNo(patch.block), sectors(&patch)?, data, below)?;
        }
        writer.settle(None)?;
        Ok(())
    }

    fn scatter(&self, volume: &VolumeName, runs: u32) -> Result<()> {
        let mut writer = Writer::open(&self.volumes, volume, &self.records)?;
        let mut data = [0; sets::RUN_BYTES as usize];
        for at in sets::scattered(writer.meta().virtual_bytes(), runs) {
            sets::content(1, at, &mut data);
            let block = BlockNo(u32::try_from(at / BLOCK_BYTES)?);
            let patch = Patch { block: block.0, at: at % BLOCK_BYTES, bytes: sets::RUN_BYTES };
            writer.write(block, sectors(&patch)?, &data, true)?;
        }
        writer.settle(None)?;
        Ok(())
    }

    /// Removes an image.
    ///
    /// # Errors
    /// What the disk said.
    pub fn remove(&self, image: &Image) -> Result<()> {
        Ok(self.volumes.delete(&image.volume)?)
    }

    /// A raw file with the content of S(1), every byte written.
    ///
    /// # Errors
    /// What the disk said.
    pub fn raw(&self, name: &str, bytes: u64) -> Result<PathBuf> {
        let path = self.path(name);
        let file = File::create(&path)?;
        let mut buf = vec![0; BLOCK_BYTES as usize];
        for patch in sets::patches(0, u32::try_from(bytes / BLOCK_BYTES)?) {
            sets::content(0, patch.offset(), &mut buf);
            file.write_all_at(&buf, patch.offset())?;
        }
        file.sync_all()?;
        drop_from_cache(&path)?;
        Ok(path)
    }
}

/// Makes the blocks that `has` names whole, without writing any data.
fn whole_without_data(file: &dyn Volume, meta: &mut Meta, has: impl Fn(u32) -> bool) -> Result<()> {
    let layout = meta.layout.clone().context("a dynamic image")?;
    let (mut slots, _) = Slots::survey(&[], layout.data_start);
    let mut bat = vec![BAT_FREE; layout.entries as usize];
    let mut whole = Vec::new();
    for block in (0..layout.entries).filter(|block| has(*block)) {
        bat[block as usize] = slots.take()?.0;
        whole.push(BlockNo(block));
    }
    settle_without_data(file, meta, &bat, slots.end_bytes(), whole)
}

/// Gives every block what the bitmaps of a level of S say, and no data.
fn patched_without_data(file: &dyn Volume, meta: &mut Meta, level: u32) -> Result<()> {
    let layout = meta.layout.clone().context("a dynamic image")?;
    let (mut slots, _) = Slots::survey(&[], layout.data_start);
    let mut bat = Vec::with_capacity(layout.entries as usize);
    for patch in sets::patches(level, layout.entries) {
        let slot = slots.take()?;
        let mut bitmap = SectorBitmap::EMPTY;
        bitmap.set(sectors(&patch)?);
        file.write_at(&bitmap.to_bytes(), slot.bitmap_offset())?;
        bat.push(slot.0);
    }
    settle_without_data(file, meta, &bat, slots.end_bytes(), Vec::new())
}

fn settle_without_data(
    file: &dyn Volume,
    meta: &mut Meta,
    bat: &[u32],
    data_end: u64,
    whole: Vec<BlockNo>,
) -> Result<()> {
    let layout = meta.layout.clone().context("a dynamic image")?;
    let bytes: Vec<u8> = bat.iter().flat_map(|entry| entry.to_be_bytes()).collect();
    file.set_len(data_end + SECTOR_BYTES)?;
    file.write_at(&bytes, layout.table_offset)?;
    file.flush("bench: a set")?;
    settle_files(file, meta, &Settled::new(layout.entries, whole, data_end), None)?;
    Ok(())
}

fn sectors(patch: &Patch) -> Result<SectorRun> {
    let first = u32::try_from(patch.at / SECTOR_BYTES)?;
    Ok(SectorRun { first, count: u32::try_from(patch.bytes / SECTOR_BYTES)? })
}

/// Whether files here can be opened past the page cache.
fn direct_io(folder: &Path) -> Result<()> {
    use std::os::unix::fs::OpenOptionsExt;
    let path = folder.join("probe");
    File::create(&path)?.write_all(&[0; 4096])?;
    let direct = nix::libc::O_DIRECT;
    File::options().read(true).custom_flags(direct).open(&path).with_context(|| {
        let folder = folder.display();
        format!("{folder}: its filesystem takes no O_DIRECT; give --dir on a real disk (ext4, XFS, btrfs)")
    })?;
    Ok(std::fs::remove_file(&path)?)
}

/// Writes a file out and drops it from the page cache.
///
/// # Errors
/// What the disk said.
pub fn drop_from_cache(path: &Path) -> Result<()> {
    let file = File::open(path)?;
    file.sync_all()?;
    posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
    Ok(())
}
