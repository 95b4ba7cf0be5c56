//! What the reference storage manager leaves in an SR folder, and taking it
//! over.
//!
//! | where | what |
//! |---|---|
//! | `names` | which file is what, and which interrupted merge stands where (pure) |
//! | `touched` | which nodes the others should leave alone until then |
//! | `repair` | putting right what the reference would, when the SR is attached |
//!
//! Nothing here runs while a disk of the SR is attached, and nothing is
//! deleted that might hold anything.

mod names;
mod repair;
mod touched;

pub use names::{LeafCase, Leftover, old_leaf};
pub use repair::{Repaired, repair};
pub use touched::{Touched, touched};
