//! What the tests of this binary share.

pub mod callers;
pub mod forge;
pub mod guest;
pub mod host;
pub mod libvhdi;
pub mod machine;
pub mod pace;
pub mod programs;
pub mod receipts;
pub mod sectors;
pub mod small_fs;
pub mod tap;
pub mod verifier;
