//! The storage manager: VDI operations on repositories of VHD trees.
//!
//! | where | what |
//! |---|---|
//! | [`repo`] | one attached SR: volumes, host, labels, limits |
//! | [`host`], [`lease`] | this machine: locks, leases, tapdisks |
//! | [`journal`], [`intents`] | what is half done |
//! | [`tree`], [`scan`], [`chain`] | which image stands on which (the first is pure) |
//! | [`ops`] | create, snapshot, clone, delete, attach, detach, one file each |
//! | [`making`] | a new VDI that takes long to fill: copies, imports |
//! | [`recover`] | finishing or undoing what a dead process left |
//! | [`places`] | where the bytes of a VDI lie, attached or not |
//! | [`reading`] | a whole chain, read under a lease by this process |
//! | [`probe`](mod@probe), [`check`](mod@check), [`offline`] | looking at an SR and changing nothing |
//! | [`reference`](mod@reference) | what the reference storage manager leaves behind |
//! | [`heads`], [`verified`] | images known without reading them; what an unreadable one may stand on |
//! | [`image`] | single images: where the format crate is called |
//! | [`identity`] | what names the content of a VDI, for deltas |
//! | [`catalog`], `relabel` | labels and history; labels for images that have none |
//! | [`owner`], [`run_folder`], [`readers`], [`spawn`] | the real host: locks, leases, processes |
//! | [`jobs`], [`turns`], [`progress`] | long operations, whose turn it is, how far they are |
//! | [`remote`], [`offer`] | disks served over TCP: one as it was asked for, all on one address |
//! | [`wanted`], [`caretaker`] | VDIs that are to be served, and bringing back a tapdisk that died |
//! | [`access`], [`sd_notify`] | who may talk to a daemon; telling systemd how it is |
//! | [`manager`], [`api`], [`views`] | smd: SRs, requests, what is shown |
//!
//! Absent on purpose: the data path (reached only through its control
//! socket) and the choice of what to coalesce (the `gc` crate).

pub mod access;
pub mod api;
pub mod attached;
pub mod caretaker;
pub mod catalog;
pub mod chain;
pub mod check;
mod daemon;
pub mod error;
pub mod heads;
pub mod host;
pub mod identity;
pub mod ids;
pub mod image;
pub mod intents;
pub mod jobs;
pub mod journal;
pub mod lease;
pub mod limits;
pub mod making;
pub mod manager;
pub mod naming;
pub mod nudge;
pub mod offer;
pub mod offline;
pub mod ops;
pub mod owner;
pub mod places;
pub mod probe;
pub mod progress;
pub mod readers;
pub mod reading;
pub mod recover;
pub mod reference;
mod relabel;
pub mod remote;
pub mod repo;
pub mod run_folder;
pub mod scan;
pub mod sd_notify;
pub mod spawn;
pub mod state;
pub mod tree;
pub mod turns;
pub mod verified;
pub mod views;
pub mod wanted;

pub use daemon::run;
pub use error::{Error, Result};
pub use repo::Repo;
