//! Every limit of the data path (invariant 12).

use std::time::Duration;

/// How often [`crate::engine::Engine::tick`] is due, in microseconds.
pub const TICK_US: u64 = 50_000;
/// The same while nothing is under way.
pub const QUIET_TICK_US: u64 = 1_000_000;
/// Metadata waits at most this long for a guest that went quiet.
pub const IDLE_WRITEBACK_US: u64 = 1_000_000;
/// A process told to end tries so long to write metadata that fails to be
/// written; then it goes on serving.
pub const CLOSE_TIME_MAX_US: u64 = 10_000_000;
/// Memory for who owns which sectors of the blocks that no level has whole:
/// room for a disk of 100 GiB with sixty runs in every block.
pub const OWNER_BYTES_MAX: usize = 32 << 20;
/// What each block takes of it besides its runs: its place in the table and
/// in the order of use, and what two allocations cost.
pub const OWNER_BLOCK_BYTES: usize = 128;
/// Attempts of a decided swap whose rename fails; after that there is one
/// whenever somebody asks for it, and guests wait.
pub const SWAP_ATTEMPTS_MAX: u32 = 16;
/// After so many of them, which is some 750 ms, whoever resumed the disk is told
/// that it stands still; attempts go on.
pub const SWAP_ATTEMPTS_TOLD: u32 = 5;
/// Wait after the first of them, in microseconds; each later one is twice as
/// long as the last.
pub const SWAP_WAIT_US_FIRST: u64 = 50_000;
/// Longest wait between two, in microseconds.
pub const SWAP_WAIT_US_MAX: u64 = 20_000_000;
/// Blocks whose owners a refresh takes over from the generation before.
pub const KNOWN_BLOCKS_MAX: usize = 8192;
/// Time a refresh spends on reading those anew that changed; requests go on
/// meanwhile, and what is not read by then is read when it is asked for.
pub const RELEARN_TIME_MAX: Duration = Duration::from_millis(500);
/// Partly present blocks that one block-status or cache request has resolved,
/// each of which may read a bitmap in every level; it is answered shorter.
pub const RESOLVED_BLOCKS_MAX: usize = 128;
/// Blocks of the first batch that a leaf merge copies together.
pub const COPYING_BLOCKS_FIRST: usize = 2;
/// Of any batch.
pub const COPYING_BLOCKS_MAX: usize = 64;
/// Of one whose extents are shared: there is nothing to be written.
pub const COPYING_SHARED_BLOCKS_MAX: usize = 512;
/// A batch that took longer, in microseconds, is followed by smaller ones: for
/// so long a guest's write to one of its blocks may wait.
pub const COPY_TIME_US: u64 = 20_000;
/// Blocks copied at one time while guests are busy. After each it then rests
/// for as long as the copy took, so that guests have the disk to themselves
/// half of the time.
pub const COPYING_BLOCKS_BUSY_MAX: usize = 1;
/// Guests are busy until this long after their last request, in microseconds.
pub const BUSY_US: u64 = 20_000;
/// After so long without a request nobody waits for anything, in microseconds.
pub const ABOUT_US: u64 = 1_000_000;
/// Longest such rest, in microseconds.
pub const REST_US_MAX: u64 = 100_000;
/// Blocks that a leaf merge has under way: being copied or waiting for a flush.
pub const MOVING_BLOCKS_MAX: usize = 192;
/// The same while extents are shared and no guest is busy: a flush then has
/// nothing to write but metadata, so it may cover many.
pub const MOVING_SHARED_BLOCKS_MAX: usize = 1024;
/// Of those that may be under way, copied blocks that are worth a flush of the
/// parent while others are still being copied: one in so many, so that copying,
/// the flush of the parent and that of the leaf go on at the same time.
pub const FLUSH_SHARE: usize = 3;
/// Runs up to this long are copied many at a time; about the limit below which
/// extents are not shared.
pub const SHORT_RUN_BYTES_MAX: u64 = 60 << 10;
/// Freed slots that are zeroed by one operation: what reads and writes of that
/// file may have to wait for.
pub const ZERO_SLOTS_MAX: usize = 4;
/// Blocks that left the leaf of a merge, the parent taking no room for them,
/// whose space may wait to be given back while no guest is about. With twice as
/// many the merge waits.
pub const POSTPONED_SLOTS_MAX: usize = 512;
/// Bytes a leaf merge may copy at once above its rate.
pub const PACE_BURST_BYTES: u64 = 4 << 20;

/// Connected NBD clients, those included whose socket is gone but whose last
/// requests are still being carried out. One more is turned away.
pub const CLIENTS_MAX: usize = 16;
/// Requests of one connection that wait for the disk or for the client to
/// take their reply. At the limit nothing more is read from that client.
pub const CLIENT_REQUESTS_MAX: usize = 128;
/// Bytes of data in those requests: the largest one, and the rest of the
/// sectors it begins and ends in, must fit.
pub const CLIENT_BYTES_MAX: usize = REQUEST_BYTES_MAX + 1024;
/// Data of the largest request: the export's maximum block size.
pub const REQUEST_BYTES_MAX: usize = 32 << 20;
/// Largest buffer: the power of two that holds the largest request wherever
/// in a sector it begins.
pub const BUFFER_BYTES_MAX: usize = 2 * REQUEST_BYTES_MAX;
/// Buffers for the sectors that unaligned writes change in part: two for each
/// request that all clients together may have.
pub const EDGE_BYTES_MAX: usize = 2 * CLIENTS_MAX * CLIENT_REQUESTS_MAX * crate::buffer::BUFFER_ALIGN;
/// Bytes of a request without data that the core has at one time; the rest of
/// a longer one waits its turn. A multiple of the sector.
pub const CORE_BYTES_MAX: u64 = 1 << 30;
/// A refused write's data is read and dropped up to this many bytes, to stay
/// in step; a client that announces more is disconnected.
pub const DISCARD_BYTES_MAX: u32 = 128 << 20;
/// Guest memory of the whole process in use: what all clients together may
/// have, and as much again because buffers are rounded up to powers of two.
pub const POOL_BYTES_MAX: usize = 2 * CLIENTS_MAX * CLIENT_BYTES_MAX + EDGE_BYTES_MAX;
/// Guest memory registered with the kernel, for buffers up to
/// [`ARENA_BUFFER_BYTES_MAX`]; taken once, kept to the end.
pub const ARENA_BYTES: usize = 4 << 20;
/// Largest buffer that comes from there.
pub const ARENA_BUFFER_BYTES_MAX: usize = 128 << 10;
/// Huge pages cut into pieces, for buffers above that and below 2 MiB; a piece
/// keeps its whole page, so this much memory may be in use besides
/// [`POOL_BYTES_MAX`]. When there are as many, such buffers are made of pages as
/// they come.
pub const SHEETS_MAX: usize = 32;
/// Guest memory kept for reuse.
pub const POOL_IDLE_BYTES_MAX: usize = 16 << 20;

/// Bytes taken from one client before the others have their turn.
pub const TURN_BYTES_MAX: usize = 1 << 20;
/// Options a client may send before it must choose the export; so this also
/// bounds the replies that wait for a client that does not read them.
pub const OPTIONS_MAX: u32 = 64;
/// Data of one option; a longer one is skipped and refused.
pub const OPTION_BYTES_MAX: u32 = 8 << 10;
/// Data of an option that is skipped; a longer one ends the connection.
pub const OPTION_SKIP_BYTES_MAX: u32 = 1 << 20;
/// Queries in one metadata context option.
pub const CONTEXT_QUERIES_MAX: u32 = 64;
/// Of the [`CLIENTS_MAX`], those that came over TCP: whoever floods from
/// outside leaves room for this host. When that many are there, a new one takes
/// the place of the one that has been longest in its handshake, if any.
pub const TCP_CLIENTS_MAX: usize = 12;
/// Time after which a silent TCP client is probed, between probes, and probes
/// without an answer until it counts as gone.
pub const TCP_PROBE: (Duration, Duration, u32) = (Duration::from_secs(60), Duration::from_secs(10), 6);
/// Time a TCP client has to acknowledge what was sent to it.
pub const TCP_UNACKNOWLEDGED_MAX: Duration = Duration::from_secs(120);
/// Bytes of data in a TLS record we send: the most the protocol allows.
pub const TLS_RECORD_BYTES: usize = 16 << 10;
/// A file of pre-shared keys.
pub const PSK_FILE_BYTES_MAX: u64 = 1 << 20;
/// Shortest pre-shared key, in bytes.
pub const PSK_KEY_BYTES_MIN: usize = 16;
/// Longest: what the TLS library takes.
pub const PSK_KEY_BYTES_MAX: usize = 256;
/// Time a client has for the whole handshake, that of TLS included.
pub const HANDSHAKE_TIME_MAX: Duration = Duration::from_secs(60);
/// Time a client that was refused has to read why and close: until then the
/// connection is closed on our side only.
pub const LINGER_TIME_MAX: Duration = Duration::from_secs(2);
/// How long nobody is let in after letting in failed for want of descriptors.
pub const ACCEPT_PAUSE: Duration = Duration::from_millis(500);
/// How often files of TLS are looked at for changes.
pub const TLS_LOOK: Duration = Duration::from_secs(2);
/// Extents in one block-status reply and context; the client asks again for
/// the rest.
pub const REPLY_EXTENTS_MAX: usize = 4096;

/// Connected control peers. One more is turned away.
pub const CONTROL_PEERS_MAX: usize = 32;
/// Bytes of answers waiting for a control peer that does not read them; above
/// it, it is disconnected.
pub const CONTROL_OUTPUT_BYTES_MAX: usize = 1 << 20;

/// Entries of the io_uring submission queue. A turn that has more submits
/// twice.
pub const RING_ENTRIES: u32 = 512;
/// Transfers in flight on the ring; more go to the threads.
pub const RING_TRANSFERS_MAX: usize = 2048;
/// Transfers that are handed to the kernel together, so that the disk is at
/// work while the rest of a turn is still looked at.
pub const RING_SUBMIT_BATCH: usize = 4;
/// Files registered with the ring; more are used by descriptor.
pub const RING_FILES_MAX: u32 = 128;
/// Bytes of the disk that one lookup of a control peer looks at.
pub const LOOKUP_BYTES_MAX: u64 = 1 << 30;
/// Extents in one answer to a control peer; it asks again for the rest. A
/// line holds them with room to spare.
pub const CONTROL_EXTENTS_MAX: usize = 512;
/// Runs of blocks in one answer to a control peer, likewise.
pub const CONTROL_RUNS_MAX: usize = 2048;

/// Pieces of metadata that one operation writes.
pub const META_PARTS_MAX: usize = 256;
/// Threads that carry out disk operations. What waits for them is bounded by
/// what the engine has in flight.
pub const WORKERS: usize = 16;
/// Threads that carry out the background jobs of control calls.
pub const JOB_WORKERS: usize = 2;
/// Completions handed to the engine before sockets have their turn.
pub const COMPLETIONS_PER_TURN: usize = 1024;
/// Time control peers have to take their last answers when the process ends.
pub const FAREWELL_TIME_MAX: Duration = Duration::from_secs(1);
/// Time between two attempts to end after a signal, while an operation or a
/// pause stands in the way.
pub const STOP_RETRY: Duration = Duration::from_millis(100);
/// Time after a signal until the process ends all the same, as if killed: it
/// loses nothing that was acknowledged, and the next opening settles.
pub const STOP_TIME_MAX: Duration = Duration::from_secs(60);
/// Time a starting process waits for the lock of its image.
pub const LOCK_WAIT_MAX: Duration = Duration::from_secs(3);
/// And how long between two attempts.
pub const LOCK_RETRY: Duration = Duration::from_millis(5);
/// Failed operations are logged at most this often.
pub const FAILURE_LOG_PAUSE: Duration = Duration::from_secs(1);
