//! The tests that need more than one crate, in one binary.
//!
//! - `crash`: every state a power cut or a kill leaves, recovered from
//! - `model`: random operations against a plain model
//! - `interop`: our images read by others, and theirs by us
//! - `soak`: all of that at once, for as long as one likes
//! - `live`: real processes and real NBD clients, killed at random

#[cfg(test)]
mod crash;
#[cfg(test)]
mod interop;
#[cfg(test)]
mod live;
#[cfg(test)]
mod model;
#[cfg(test)]
mod soak;
#[cfg(test)]
mod support;
