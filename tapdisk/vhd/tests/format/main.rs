//! Whole images: the golden fixtures, changes of metadata torn by crashes,
//! and mutated images.

mod changes;
mod crash;
mod entry;
mod fixture;
mod golden;
mod mem;
mod mutate;
