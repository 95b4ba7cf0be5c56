//! What the reference storage manager leaves in an SR folder, and taking it
//! over.
//!
//! | where | what |
//! |---|---|
//! | `names` | which file is what, and which interrupted merge stands where (pure) |
//! | `repair` | putting right what the reference would, when the SR is attached |
//!
//! Nothing here runs while a disk of the SR is attached, and nothing is
//! deleted that might hold anything.

mod names;
mod repair;

pub use names::{LeafCase, Leftover, old_leaf};
pub use repair::{Repaired, repair};
