//! The data path: one process per attached disk.
//!
//! | where | what |
//! |---|---|
//! | [`nbd`] | the NBD protocol as a state machine without I/O |
//! | [`unaligned`] | requests that begin or end within a sector |
//! | [`engine`] | guest requests and completions in, operations and answers out; no I/O |
//! | [`disk`] | from names of volumes to what the engine works on |
//! | [`service`] | control calls become orders to the engine and background jobs |
//! | [`datapath`] | engine and service together |
//! | [`driver`] | what carries out operations, and how the core looks from there |
//! | [`server`] | the thread that owns the core and all sockets |
//! | [`tls`] | certificates and keys for clients from other hosts |
//! | [`buffer`] | guest memory, lent piece by piece |
//! | [`cli`] | the process |
//! | [`limits`] | every limit, in one place |
//!
//! A guest read goes down this list: `nbd` parses it, `engine` finds who has
//! the bytes in the chain's map, `driver` reads them into the `buffer`, and
//! `nbd` sends that.

pub mod buffer;
pub mod cli;
pub mod datapath;
pub mod disk;
pub mod driver;
pub mod engine;
pub mod limits;
pub mod nbd;
pub mod server;
pub mod service;
pub mod tls;
pub mod unaligned;

pub use cli::run;
