//! Every limit of the format crate (invariant 12).

/// Levels a chain may have.
pub const CHAIN_NODES_MAX: usize = 200;
/// Clean bitmaps an image open for writing keeps in memory (512 bytes each).
pub const CLEAN_BITMAPS_MAX: usize = 16 * 1024;
/// Bytes of a parent locator's text.
pub const LOCATOR_BYTES_MAX: u32 = 4096;
/// Bytes of a BAT or BATmap read at once while looking for something.
pub const SCAN_BYTES: usize = 64 * 1024;
