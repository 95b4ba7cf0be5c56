//! A flattened copy of a VDI, in the same SR or another.
//!
//! ```text
//!   lease on the whole chain of the source (invariant 8)   dies with us
//!     -> a new VDI, filled under a temporary name          see `making`
//!          block by block: what any level has, zeros left out
//!     -> its name
//! ```
//!
//! The source is not attached for writing: its tapdisk alone may read it
//! then, and reading a whole disk through it would be no instant of it. A
//! snapshot is one, and copying that is what an operator is told to do.

use uuid::Uuid;
use vhd::chain::{Chain, Owner, OwnerRun};
use vhd::storage::CopyKind;
use vhd::units::{BLOCK_BYTES, BLOCK_SECTORS, BlockNo, SECTOR_BYTES, SectorRun};
use vhd::writer::Writer;

use crate::error::{Error, IoContext, Result};
use crate::image;
use crate::limits::{COPY_COMMIT_BYTES, COPY_PIECE_BYTES};
use crate::making::{Making, NewVdi};
use crate::progress::Progress;
use crate::reading::Reading;
use crate::repo::Repo;

/// Sectors in which extents can be shared: 4 KiB.
const SHARE_SECTORS: u32 = 8;

/// Copies `vdi` of one SR to a new VDI called `name` in another, or the same;
/// returns the copy. `guarded` is called once a lease and an intent keep
/// others from what is read and written.
///
/// # Errors
/// [`Error::InUse`] while the VDI is attached for writing; [`Error::NoSpace`],
/// [`Error::Cancelled`], what breaks its chain: nothing of the copy stays.
pub fn copy(
    from: &Repo,
    vdi: Uuid,
    to: &Repo,
    name: &str,
    progress: &Progress,
    guarded: impl FnOnce(),
) -> Result<Uuid> {
    let reading = Reading::open(from, vdi, false)?;
    let label = from.labels.get(vdi)?.unwrap_or_default();
    let virtual_bytes = super::create::checked_size(reading.chain.virtual_bytes())?;
    let new = NewVdi { name, description: &label.description, virtual_bytes, operation: "copy" };
    let making = Making::begin(to, &new)?;
    guarded();
    let mut filling = Filling {
        chain: &reading.chain,
        writer: making.writer()?,
        shares: from.uuid == to.uuid,
        unflushed_bytes: 0,
        progress,
    };
    filling.run()?;
    drop(filling);
    making.finish()
}

struct Filling<'a> {
    chain: &'a Chain,
    writer: Writer,
    /// Whether the repository shares extents, as far as we know.
    shares: bool,
    unflushed_bytes: u64,
    progress: &'a Progress,
}

impl Filling<'_> {
    fn run(&mut self) -> Result<()> {
        let blocks = || (0..self.chain.blocks()).map(BlockNo).filter(|block| self.chain.map().has(*block));
        self.progress.expect(blocks().count() as u64 * BLOCK_BYTES);
        let todo: Vec<BlockNo> = blocks().collect();
        let mut buffer = vec![0; COPY_PIECE_BYTES];
        for block in todo {
            self.progress.go_on()?;
            for part in self.chain.owners(block).map_err(|e| self.bad(e))? {
                self.part(block, part, &mut buffer)?;
            }
            self.progress.add(BLOCK_BYTES);
            if self.unflushed_bytes >= COPY_COMMIT_BYTES {
                self.writer.commit().map_err(|e| self.bad(e))?;
                self.unflushed_bytes = 0;
            }
        }
        self.writer.settle(None).map_err(|e| self.bad(e))
    }

    fn part(&mut self, block: BlockNo, part: OwnerRun, buffer: &mut [u8]) -> Result<()> {
        let Owner::Node { node, slot } = part.owner else {
            return Ok(());
        };
        let chain = self.chain;
        let Some(source) = chain.map().node(node) else {
            return Ok(());
        };
        let piece_sectors = u32::try_from(buffer.len() as u64 / SECTOR_BYTES).unwrap_or(BLOCK_SECTORS);
        let mut first = part.run.first;
        while first < part.run.end() {
            let run = SectorRun { first, count: (part.run.end() - first).min(piece_sectors) };
            first = run.end();
            let offset = source.data_offset(block, slot, run.first);
            let len = usize::try_from(run.bytes()).unwrap_or(0);
            let Some(bytes) = buffer.get_mut(..len) else {
                continue;
            };
            source.volume.read_at(bytes, offset).during(|| format!("read {}", source.name))?;
            if bytes.iter().all(|byte| *byte == 0) {
                continue;
            }
            // A device's new space is not zero: only what is written counts.
            let below = self.writer.volume().is_device();
            if self.shares && is_shareable(run, offset) {
                let kind = self.writer.copy_in(block, run, source.volume.as_ref(), offset, below);
                self.shares = kind.map_err(|e| self.bad(e))? == CopyKind::Cloned;
            } else {
                self.writer.write(block, run, bytes, below).map_err(|e| self.bad(e))?;
            }
            self.unflushed_bytes += run.bytes();
        }
        Ok(())
    }

    /// The error names the image it is about; if it does not, the source.
    fn bad(&self, error: vhd::error::Error) -> Error {
        match self.chain.nodes().next() {
            Some(top) => image::bad(&top.name, error),
            None => Error::NotFound { what: "chain to copy".into() },
        }
    }
}

fn is_shareable(run: SectorRun, offset: u64) -> bool {
    run.first.is_multiple_of(SHARE_SECTORS)
        && run.count.is_multiple_of(SHARE_SECTORS)
        && offset.is_multiple_of(u64::from(SHARE_SECTORS) * SECTOR_BYTES)
}
