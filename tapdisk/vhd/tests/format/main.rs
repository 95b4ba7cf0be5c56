//! Whole images: the golden fixtures, changes of metadata torn by crashes,
//! and mutated images.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

mod changes;
mod crash;
mod entry;
mod fixture;
mod golden;
mod mem;
mod mutate;
