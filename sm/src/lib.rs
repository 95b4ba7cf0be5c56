//! The storage manager: VDI operations on repositories of VHD trees.
//!
//! | where | what |
//! |---|---|
//! | [`repo`] | one attached SR: volumes, host, labels, limits |
//! | [`host`], [`lease`] | this machine: locks, leases, tapdisks |
//! | [`journal`] | what is half done |
//! | [`tree`] | which image stands on which (pure) |
//!
//! Absent on purpose: the data path (reached only through its control
//! socket) and the choice of what to coalesce (the `gc` crate).

pub mod catalog;
pub mod error;
pub mod host;
pub mod ids;
pub mod journal;
pub mod lease;
pub mod limits;
pub mod repo;
pub mod tree;

pub use error::{Error, Result};
pub use repo::Repo;
