//! The VHD image format: fixed, dynamic and differencing images, on files and
//! on block devices.
//!
//! | where | what |
//! |---|---|
//! | [`footer`], [`header`], [`locator`], [`bat`], [`batmap`], [`bitmap`] | one on-disk struct each |
//! | [`meta`] | everything small about one image: open, validate |
//! | [`create`], [`reparent`], [`resize`], [`repair`] | changes to an image's metadata |
//! | [`rw`] | an image open for writing, as data: allocation, what waits for a flush |
//! | [`writer`] | the same with blocking I/O |
//! | [`build`] | a new image with its content, in one go |
//! | [`stream`] | disks as streams: exports and imports |
//! | [`chain`] | THE walk: a chain flattened to one block map; guest range to extents |
//! | [`placed`] | where a disk's bytes lie; in what two disks can differ |
//! | [`merge`] | what of N goes into P, in which order; no I/O of its own |
//! | [`check`] | every format invariant, as a checker |
//! | [`storage`] | the one door to the outside world; feature `sim`: the crash simulator |
//!
//! Bytes from disk are untrusted. Absent on purpose: async, sockets, clocks,
//! logging set-up, and any knowledge of who uses an image.

pub mod bat;
pub mod batmap;
pub mod bitmap;
pub mod build;
pub mod chain;
pub mod check;
pub mod create;
pub mod error;
pub mod footer;
pub mod header;
pub mod hidden;
pub mod limits;
pub mod locator;
pub mod merge;
pub mod meta;
mod owners;
pub mod placed;
pub mod record;
mod record_files;
pub mod repair;
pub mod reparent;
mod replay;
pub mod resize;
pub mod rw;
mod settle;
pub mod slots;
pub mod storage;
pub mod stream;
pub mod units;
pub mod writer;

pub use error::{Error, Result};
