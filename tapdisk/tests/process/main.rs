//! The program itself, as its starter, its controllers and its clients see it.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

mod handshake;
mod hostile;
mod interop;
mod life;
mod oversize;
mod peer;
mod refresh;
mod stuck;
mod support;
mod tls;
mod trace;
