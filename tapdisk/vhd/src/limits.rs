//! Every limit of the format crate (invariant 12).

/// Levels a chain may have.
pub const CHAIN_NODES_MAX: usize = 200;
/// Memory for bitmaps that an image open for writing keeps although the file has
/// them: room for a disk of 100 GiB with a few runs in every block, or for some
/// 19,000 blocks as scattered as can be.
pub const CLEAN_BITMAPS_BYTES_MAX: usize = 12 << 20;
/// What each takes of it besides its bits: its place in the table and in the order
/// of use, and what two allocations cost.
pub const CLEAN_BITMAP_BYTES: usize = 128;
/// A filesystem has plenty of space while one part in so many is free: only then
/// is any taken that may never be written.
pub const PLENTY_SHARE: u64 = 8;
/// Bytes of a parent locator's text.
pub const LOCATOR_BYTES_MAX: u32 = 4096;
/// Bytes of a BAT or BATmap read at once while looking for something.
pub const SCAN_BYTES: usize = 64 * 1024;
/// Entries of a BAT that are read: 16 MiB of it. More than 2040 GiB of 2 MiB
/// blocks has; foreign images of smaller blocks are smaller.
pub const BAT_ENTRIES_MAX: u32 = 1 << 22;
/// Entries of a reference resize journal: blocks move from under at most a
/// few MiB of metadata.
pub const JOURNAL_ENTRIES_MAX: u64 = 4096;
/// Bytes one entry of such a journal restores: a whole BAT at most.
pub const JOURNAL_PAYLOAD_MAX: u32 = 8 << 20;
/// Problems a check lists before it stops looking.
pub const PROBLEMS_MAX: usize = 100;
