//! The garbage collector: deletes what nobody needs and merges what need not
//! be apart, while everything is in use.
//!
//! | where | what |
//! |---|---|
//! | [`forest`], [`survey`] | what stands on an SR, as data; where it comes from |
//! | [`candidates`], [`plan`], [`reason`] | what to do next and why the rest waits (pure) |
//! | [`job`] | a merge's record: how it begins, how it is carried on |
//! | [`run`], [`leaf`], [`garbage`] | inner coalesce, leaf coalesce, deletion |
//! | [`unwritten`] | space that nobody wrote, given back |
//! | [`collector`], [`progress`], [`retry`] | the thread that keeps one SR collected |
//! | [`receipt`](mod@receipt) | what disks read before and after a merge, compared |
//! | [`cost`], [`offline`], [`report`] | what a merge costs; predictions |
//! | [`service`], [`api`], [`run`](fn@run) | the daemon |
//! | [`budget`], [`backoff`], [`watch`], [`limits`] | pace, progress, every bound |
//!
//! Everything blocks and reaches the world only through [`sm::Repo`] and
//! [`watch::Watch`], so that the crash simulator runs whole jobs. Absent on
//! purpose: the data path (a live leaf is merged by its tapdisk), labels, and
//! any knowledge of backends.

pub mod api;
pub mod backoff;
pub mod budget;
pub mod candidates;
pub mod collector;
mod copy;
pub mod cost;
mod daemon;
pub mod forest;
pub mod garbage;
mod grow;
pub mod job;
mod job_watch;
mod latency;
pub mod leaf;
pub mod limits;
pub mod offline;
pub mod openapi;
pub mod plan;
pub mod progress;
pub mod reason;
pub mod receipt;
pub mod report;
pub mod retry;
pub mod run;
pub mod service;
mod sources;
pub mod survey;
pub mod unwritten;
pub mod watch;

pub use daemon::run;
