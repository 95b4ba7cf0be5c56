//! The data path: one process per attached disk.
//!
//! | where | what |
//! |---|---|
//! | [`nbd`] | the NBD protocol as a state machine without I/O |
//! | [`engine`] | guest requests and completions in, operations and answers out; no I/O |
//! | [`buffer`] | guest memory, lent piece by piece |
//! | [`driver`] | what carries out operations, and the interface of the core to it |
//! | [`server`] | the thread that owns the core and all sockets |
//! | [`limits`] | every limit, in one place |

pub mod buffer;
pub mod driver;
pub mod engine;
pub mod limits;
pub mod nbd;
pub mod server;
