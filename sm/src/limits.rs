//! Every limit of this crate (invariant 12).

/// Limits an operator may change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Images in a chain, leaf and root included; more is refused.
    pub chain_max: u32,
    /// How long a snapshot may hold a pause, in milliseconds. After that the
    /// tapdisk voids the snapshot and goes on.
    pub pause_ms_max: u64,
    /// Threads that read headers in a scan.
    pub scan_threads: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { chain_max: 30, pause_ms_max: 10_000, scan_threads: 8 }
    }
}

/// VDIs in one snapshot group. All of them are paused at once.
pub const GROUP_MEMBERS_MAX: usize = 64;
/// Bytes of a name or description.
pub const LABEL_BYTES_MAX: usize = 4096;
/// How long the SR lock is waited for, in milliseconds.
pub const SR_LOCK_WAIT_MS_MAX: u64 = 30_000;
/// How long a tapdisk may take to start serving, in milliseconds. A record
/// of a killed predecessor is replayed in that time.
pub const TAP_START_MS_MAX: u64 = 60_000;
/// How long a tapdisk may take to answer a control request, in milliseconds.
pub const TAP_ANSWER_MS_MAX: u64 = 60_000;
/// How long a tapdisk may take to tell its figures, in milliseconds; after
/// that they are missing.
pub const TAP_FIGURES_MS_MAX: u64 = 400;
/// Tapdisks asked for their figures at one time.
pub const TAP_FIGURES_AT_ONCE_MAX: usize = 128;
/// How long a stopped tapdisk may take to be gone, in milliseconds.
pub const TAP_STOP_MS_MAX: u64 = 10_000;
/// How long the API retries an operation that found another one under way,
/// in milliseconds.
pub const BUSY_RETRY_MS_MAX: u64 = 5_000;
/// Times a lease is read that somebody was just writing.
pub const LEASE_READS_MAX: u32 = 16;
/// And how long between.
pub const LEASE_REREAD: std::time::Duration = std::time::Duration::from_millis(1);
/// How often a disk's figures are begun anew because an image of its chain was
/// merged away meanwhile.
pub const STAT_LOOKS_MAX: u32 = 8;
/// Ports tried for a disk where all are offered on one address.
pub const OFFER_PORTS_MAX: usize = 1024;
/// Attempts to bring back a tapdisk that died, in one row; then an operator
/// has to attach the disk.
pub const REVIVE_ATTEMPTS_MAX: u32 = 16;
/// Wait before the second attempt, in milliseconds; each later one is twice as
/// long as the last. The first is at once.
pub const REVIVE_WAIT_MS_FIRST: u64 = 100;
/// Longest wait between two attempts, in milliseconds.
pub const REVIVE_WAIT_MS_MAX: u64 = 30_000;
/// How long a tapdisk must live before its death begins a new row of
/// attempts, in milliseconds.
pub const REVIVE_STEADY_MS: u64 = 60_000;
/// Tapdisks being brought back at one time.
pub const REVIVES_AT_ONCE_MAX: usize = 8;
/// How often attached VDIs are looked at, in milliseconds. The death of a
/// tapdisk that is watched already is noticed at once.
pub const CARETAKER_LOOK_MS: u64 = 1_000;
/// Snapshots left below the chain limit at which a chain counts as near it.
pub const CHAIN_WARN_LEFT: u32 = 5;
/// Rows of each kind in the health of an SR; the rest is counted.
pub const HEALTH_ROWS_MAX: usize = 100;
/// Images remembered per SR; more are read each time.
pub const KNOWN_IMAGES_MAX: usize = 200_000;
/// How long after its last change a file's stamp is trusted, in nanoseconds:
/// clocks of filesystems tick in steps, those of old network ones by seconds.
pub const STAMP_SETTLES_NS: i128 = 1_100_000_000;
/// Rows of the last verified record written in one hold of the SR lock.
pub const NOTED_PER_LOCK_MAX: usize = 500;
/// Longest text of a refusal by the router that is handed on, in bytes.
pub const REFUSAL_BYTES_MAX: usize = 4 << 10;
/// Bytes of a refused request that are read and thrown away, so that its sender
/// lives to read the answer.
pub const UNREAD_BYTES_MAX: usize = 4 << 20;
/// And for how long, in milliseconds.
pub const UNREAD_MS_MAX: u64 = 1_000;
/// Bytes of an API request body.
pub const BODY_BYTES_MAX: usize = 1 << 20;
/// Requests the API works on at once; more wait.
pub const REQUESTS_AT_ONCE_MAX: usize = 64;
/// Operations that work on one VDI or wait for it; more are refused.
pub const TURNS_WAITING_MAX: usize = 64;
/// How long a request waits for its turn on a VDI, in milliseconds. A job
/// waits until it is cancelled.
pub const TURN_WAIT_MS_MAX: u64 = 60_000;
/// Jobs that work or wait; more are refused.
pub const JOBS_MAX: usize = 256;
/// Jobs that work at once; more wait.
pub const JOBS_AT_ONCE_MAX: usize = 16;
/// Ended jobs that are remembered; the oldest goes first.
pub const JOBS_KEPT_MAX: usize = 256;
/// How long a snapshot holds for its caller, who freezes guests meanwhile, in
/// milliseconds.
pub const HOLD_MS_MAX: u64 = 300_000;
/// Pieces of a stream between the socket and the disk, of 2 MiB or some more
/// at the front of a VHD.
pub const STREAM_PIECES_MAX: usize = 4;
/// How long a look at a job may wait for its end, in milliseconds.
pub const JOB_LOOK_MS_MAX: u64 = 60_000;
/// Bytes a copy reads at a time.
pub const COPY_PIECE_BYTES: usize = 1 << 20;
/// Bytes a copy writes before it makes them durable: what it keeps in memory
/// of bitmaps, and the system of pages, is bounded by it.
pub const COPY_COMMIT_BYTES: u64 = 256 << 20;
/// Bytes of the disk that one answer about its map, or about what changed,
/// looks at: at most so many bitmaps are read for it.
pub const LOOK_BYTES_MAX: u64 = 128 << 30;
/// Extents in one answer about a map; the next one goes on from there.
pub const MAP_EXTENTS_MAX: usize = 16_384;
/// Ranges in one answer about what changed, likewise.
pub const CHANGED_RANGES_MAX: usize = 65_536;
/// Copies, exports and comparisons of one SR at a time: each holds a lease.
pub const READERS_MAX: usize = 256;
/// How long those who read for a purpose that can wait have to leave, in
/// milliseconds: some reads of a block.
pub const LEAVE_MS_MAX: u64 = 5_000;
/// Rows kept in the operation history of an SR.
pub const HISTORY_ROWS_MAX: u32 = 10_000;
/// Bytes of documents kept beside the history of an SR.
pub const PAPER_BYTES_MAX: u32 = 64 << 20;
/// Bytes of the leases, owner files and other small files of the run folder.
pub const SMALL_FILE_BYTES_MAX: u64 = 1 << 20;
