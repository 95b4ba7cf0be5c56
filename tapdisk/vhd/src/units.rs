//! Units that must not mix: sectors, blocks, places in a file.

/// Bytes in a sector, on every VHD.
pub const SECTOR_BYTES: u64 = 512;
/// Sectors in a block of the size we write (2 MiB).
pub const BLOCK_SECTORS: u32 = 4096;
/// Bytes in a block of the size we write.
pub const BLOCK_BYTES: u64 = BLOCK_SECTORS as u64 * SECTOR_BYTES;
/// The largest virtual size: 2040 GiB, so that every block's place fits a
/// 32-bit sector number.
pub const VIRTUAL_BYTES_MAX: u64 = 2040 << 30;

/// A block of the virtual disk, counted from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockNo(pub u32);

impl BlockNo {
    /// The block that holds a byte of the virtual disk (2 MiB blocks).
    #[must_use]
    pub fn of_byte(offset: u64) -> Self {
        Self(u32::try_from(offset / BLOCK_BYTES).unwrap_or(u32::MAX))
    }

    /// First byte of the block on the virtual disk (2 MiB blocks).
    #[must_use]
    pub fn first_byte(self) -> u64 {
        u64::from(self.0) * BLOCK_BYTES
    }

    /// For indexing.
    #[must_use]
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// Where a block lies in its image: the sector number of its bitmap, as a BAT
/// entry says it. Data follows the bitmap.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slot(pub u32);

impl Slot {
    /// Byte offset of the block's bitmap in the file.
    #[must_use]
    pub fn bitmap_offset(self) -> u64 {
        u64::from(self.0) * SECTOR_BYTES
    }

    /// Byte offset in the file of a sector of the block (one-sector bitmap).
    #[must_use]
    pub fn data_offset(self, sector_in_block: u32) -> u64 {
        (u64::from(self.0) + 1 + u64::from(sector_in_block)) * SECTOR_BYTES
    }
}

/// Sectors inside one block: `first .. first + count`, never past the block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SectorRun {
    /// First sector in the block, 0..4096.
    pub first: u32,
    /// Number of sectors, at least 1.
    pub count: u32,
}

impl SectorRun {
    /// The whole of a 2 MiB block.
    pub const BLOCK: Self = Self { first: 0, count: BLOCK_SECTORS };

    /// One past the last sector.
    #[must_use]
    pub fn end(self) -> u32 {
        self.first + self.count
    }

    /// Length in bytes.
    #[must_use]
    pub fn bytes(self) -> u64 {
        u64::from(self.count) * SECTOR_BYTES
    }
}

/// Rounds up to a multiple of `to` (a power of two); saturates.
#[must_use]
pub fn round_up(value: u64, to: u64) -> u64 {
    value.saturating_add(to - 1) & !(to - 1)
}
