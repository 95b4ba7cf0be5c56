//! The program itself, as its starter, its controllers and its clients see it.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

mod hostile;
mod interop;
mod life;
mod stuck;
mod support;
mod tls;
