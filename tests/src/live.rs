//! Real processes, real files, other people's NBD clients.
//!
//! Every test has a host of its own: folders, smd and gcd. Nothing is
//! mocked; what a test needs beyond our own programs it names, and is skipped
//! loudly without (never in CI).

mod bad_input;
mod contract;
mod deep_chain;
mod disks;
mod exclusive;
mod exported;
mod filesystems;
mod groups;
mod inspect;
mod kicked;
mod killed;
mod kills;
mod main_job;
mod metrics;
mod power;
mod receipts;
mod remote;
mod revived;
mod scale;
mod soak;
mod space;
mod stalls;
mod stuck;
mod transfer;
mod units;
mod workload;
mod zeros;
