//! Every bound of the collector, in one place (invariant 12).

use std::time::Duration;

/// Most images merged in one pass. A chain is not longer than that unless
/// its limit was raised.
pub const SOURCES_MAX: usize = 32;
/// Bytes of runs that are copied all at once: for so long nobody looks at the
/// abort flag.
pub const BATCH_BYTES_MAX: u64 = 32 << 20;
/// Bytes copied by one window, before the parent is durable.
pub const WINDOW_BYTES_MAX: u64 = 64 << 20;
/// Blocks of one.
pub const WINDOW_BLOCKS_MAX: u32 = 256;
/// Bitmaps of a source that are read together, so that one need not wait for
/// the other.
pub const BITMAPS_AHEAD: usize = 128;
/// Runs up to this long are copied many at a time; about the limit below which
/// extents are not shared.
pub const SHORT_RUN_BYTES_MAX: u64 = 60 << 10;
/// Bytes copied before the parent is flushed; those that were shared are not
/// to be written out.
pub const UNFLUSHED_BYTES_MAX: u64 = 256 << 20;
/// Blocks taken in before the parent is flushed, their bitmaps being in memory
/// until then.
pub const UNFLUSHED_BLOCKS_MAX: u32 = 4096;
/// Bytes of one slice when space is short.
pub const SLICE_BYTES_MAX: u64 = 32 << 20;
/// Merges are held back to no less than this, in bytes per second.
pub const BACKOFF_FLOOR: u64 = 16 << 20;
/// A limit that has grown to this is none, in bytes per second.
pub const BACKOFF_CEILING: u64 = 4 << 30;
/// A disk answering in this mean time, in microseconds, does not suffer
/// whatever it did before.
pub const BACKOFF_FREE_US: f64 = 5_000.0;
/// Requests in one interval that tell something about a disk's latency.
pub const BACKOFF_REQUESTS_MIN: u64 = 20;
/// Factor over a disk's calm latency at which merges step back, by default.
pub const LATENCY_FACTOR: f64 = 4.0;
/// Largest factor that can be asked for.
pub const LATENCY_FACTOR_MAX: f64 = 1000.0;
/// Between two looks at the latency of attached disks.
pub const LATENCY_EVERY: Duration = Duration::from_secs(1);
/// Blocks the parent gains in one slice: no more than its bytes.
pub const SLICE_GAINED_MAX: u32 = 16;
/// Bytes of one slice of a leaf merge where there is room: each ends with
/// flushes of both images. Of an attached leaf, what its tapdisk may have in
/// the parent and not yet given back.
pub const ROOMY_SLICE_BYTES_MAX: u64 = 256 << 20;
/// Blocks the parent gains in such a slice.
pub const ROOMY_SLICE_GAINED_MAX: u32 = 128;
const _: () = assert!(ROOMY_SLICE_GAINED_MAX <= tapdisk_control::MERGE_EXTRA_BLOCKS_MAX);
/// Space that blocks took and nobody wrote is given back once less than this
/// part of a repository is free: before disks in use take no more of it.
pub const SHORT_SHARE: u64 = vhd::limits::PLENTY_SHARE / 2;
/// Bytes of an image looked at for that before anything else is.
pub const GIVE_BACK_BYTES: u64 = 64 << 20;
/// Time after which it lets go of the SR lock, and for which it then does.
pub const GIVE_BACK_LOCKED: Duration = Duration::from_millis(50);
/// Time spent on it before the next look at the repository.
pub const GIVE_BACK_TIME: Duration = Duration::from_secs(1);
/// Free space the collector leaves to the guests, unless a merge needs none.
pub const RESERVE_BYTES: u64 = 64 << 20;
/// Chains at least this near their limit are shortened before others.
pub const NEAR_LIMIT: usize = 6;
/// Longest chain by default.
pub const CHAIN_MAX: usize = 30;
/// Merges at one time in one repository, by default.
pub const PARALLEL: usize = 2;
/// Most merges at one time that can be asked for.
pub const PARALLEL_MAX: usize = 16;
/// How long a merge waits for readers to leave what it wants to delete,
/// before it steps aside and is planned again.
pub const LEAVE_WAIT_MAX: Duration = Duration::from_secs(60);
/// How often it looks whether they did.
pub const LEAVE_POLL: Duration = Duration::from_millis(50);
/// How often a running leaf merge is asked how far it is.
pub const STATUS_POLL: Duration = Duration::from_millis(100);
/// A leaf merge that moved nothing for this long has failed.
pub const STALL_MAX: Duration = Duration::from_secs(120);
/// Attempts before a node is set aside.
pub const ATTEMPTS_MAX: u32 = 6;
/// Wait before the second attempt; doubles with each.
pub const RETRY_FIRST: Duration = Duration::from_secs(5);
/// Longest wait between attempts.
pub const RETRY_MAX: Duration = Duration::from_secs(600);
/// Between two looks of its own at each repository, by default.
pub const LOOK_EVERY: Duration = Duration::from_secs(30);
/// Most seconds between two of them that can be asked for.
pub const LOOK_EVERY_MAX_S: u64 = 24 * 3600;
/// Failures kept for the report.
pub const FAILURES_KEPT: usize = 256;
/// Times an inner merge looks for children that came late.
pub const RELINK_ROUNDS_MAX: u32 = 8;
/// Quiet time after somebody aborted.
pub const ABORT_QUIET: Duration = Duration::from_secs(30);
/// Finished jobs kept for the status.
pub const DONE_KEPT: usize = 256;
/// A prediction that takes longer than this is not made before a collection
/// that was asked for: work begins within 5 s of a kick all the same, and who
/// waits need not wait much longer for the figures.
pub const PREDICT_FIRST_MAX: Duration = Duration::from_secs(4);
/// Attempts that somebody who waits for a collection waits for.
pub const AWAITED_ATTEMPTS: u32 = 3;
/// Bytes of an API request body.
pub const BODY_BYTES_MAX: usize = 64 << 10;
/// Requests that wait for a collection at the same time.
pub const WAITERS_MAX: usize = 64;
/// Between two looks for SRs that were attached or detached; a kick looks at
/// once.
pub const ATTEND_EVERY: Duration = Duration::from_secs(2);
/// Disks of one job that are read for its receipt.
pub const RECEIPT_DISKS_MAX: usize = 1024;
/// Blocks with data in them that one job keeps the hashes of, 36 bytes each in
/// memory: 4 TiB of data.
pub const RECEIPT_HASHES_MAX: usize = 2 << 20;
/// Blocks that differ and are named; the rest is counted.
pub const RECEIPT_BLOCKS_NAMED: usize = 32;
/// Times a disk is looked at that is attached and detached meanwhile.
pub const RECEIPT_ATTEMPTS_MAX: u32 = 4;
/// How long a reading waits for an operation on the disk.
pub const RECEIPT_BUSY_MAX: Duration = Duration::from_secs(20);
/// How long it waits for a tapdisk's answer.
pub const RECEIPT_READ_MAX: Duration = Duration::from_secs(60);
/// Between two looks at the abort flag meanwhile.
pub const RECEIPT_LOOK: Duration = Duration::from_millis(250);
/// Looks at an SR that somebody who waits for a collection waits for, while
/// they fail in a way that may pass.
pub const AWAITED_LOOKS: u32 = 3;
/// Between two of them.
pub const AWAITED_LOOK_WAIT: Duration = Duration::from_secs(1);
/// Nodes that the page of metrics tells of one by one, of all SRs together:
/// those being merged first, then what is blocked, then what waits. Each has
/// at most five series; how many are left out is one of its own.
pub const METRIC_NODES_MAX: usize = 2000;
