//! The ring against real files and sockets; skipped, loudly, where the kernel
//! offers none.

use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use vhd::storage::{Access, FileVolumes, Fs, PosixFs, Volumes};

use super::*;
use crate::buffer::{Buffer, Pool};
use crate::disk::Files;
use crate::driver::exec::{Tables, prepare};
use crate::engine::{BufferRange, Op, RequestId};

struct Bench {
    _folder: tempfile::TempDir,
    ring: Uring,
    pool: Pool,
    files: Files,
    volumes: Arc<dyn Volumes>,
    file: FileId,
}

const FILE_BYTES: u64 = 1 << 20;

impl Bench {
    fn new() -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("disk.raw"), vec![9; FILE_BYTES as usize]).unwrap();
        let fs: Arc<dyn Fs> = Arc::new(PosixFs::new(folder.path().to_path_buf()));
        let files = Files::default();
        let file = files.add_direct(fs.open("disk.raw", Access::Write).unwrap()).unwrap();
        let (pool, arena) = Pool::with_arena().unwrap();
        let ring = match Uring::new(Some(arena)) {
            Ok(ring) => ring,
            Err(error) => {
                eprintln!("!! SKIPPED: this kernel offers no io_uring: {error}");
                return None;
            }
        };
        let volumes = Arc::new(FileVolumes::new(fs));
        Some(Self { _folder: folder, ring, pool, files, volumes, file })
    }

    fn start(&mut self, id: u64, op: Op, buffer: &Buffer) -> Result<(), Work> {
        let tables = Tables { files: &self.files, volumes: &self.volumes };
        let work = prepare(op, &tables, |_| Some(buffer.clone())).unwrap();
        self.ring.start(OpId(id), work)
    }

    fn write(&self, offset: u64, buffer: &Buffer) -> Op {
        Op::WriteGuest { file: self.file, offset, from: whole(buffer) }
    }

    fn read(&self, offset: u64, buffer: &Buffer) -> Op {
        Op::ReadGuest { file: self.file, offset, into: whole(buffer) }
    }

    fn events(&mut self, count: usize) -> Vec<Event> {
        let mut events = Vec::new();
        while events.len() < count {
            self.ring.wait(Some(Duration::from_secs(10))).unwrap();
            events.extend(std::iter::from_fn(|| self.ring.next_event()));
        }
        events
    }
}

fn whole(buffer: &Buffer) -> BufferRange {
    BufferRange { request: RequestId(0), at: 0, len: u32::try_from(buffer.len()).unwrap() }
}

#[test]
fn many_transfers_each_land_in_their_place() {
    let Some(mut bench) = Bench::new() else { return };
    // More than the arena has, and some too large for it.
    let buffers: Vec<Buffer> =
        (0..40_usize).map(|i| bench.pool.take([512, 4096, 16 << 10][i % 3]).unwrap()).collect();
    for (i, buffer) in buffers.iter().enumerate() {
        buffer.lend_mut(0, buffer.len()).unwrap().fill(u8::try_from(i).unwrap());
        let op = bench.write((i as u64) << 14, buffer);
        bench.start(i as u64, op, buffer).unwrap();
    }
    let mut ended: Vec<u64> = Vec::new();
    for event in bench.events(buffers.len()) {
        match event {
            Event::Ended(OpId(id), Ok(Completion::Done)) => ended.push(id),
            other => panic!("{other:?}"),
        }
    }
    ended.sort_unstable();
    assert_eq!(ended, (0..40).collect::<Vec<_>>());
    let back = bench.pool.take(40 << 14).unwrap();
    let op = bench.read(0, &back);
    bench.start(99, op, &back).unwrap();
    assert!(matches!(bench.events(1)[..], [Event::Ended(OpId(99), Ok(_))]));
    let back = back.lend(0, back.len()).unwrap();
    for (i, buffer) in buffers.iter().enumerate() {
        let place = &back[i << 14..(i + 1) << 14];
        let (own, rest) = place.split_at(buffer.len());
        assert!(own.iter().all(|byte| usize::from(*byte) == i) && rest.iter().all(|byte| *byte == 9), "{i}");
    }
}

#[test]
fn what_the_ring_cannot_do_comes_back() {
    let Some(mut bench) = Bench::new() else { return };
    let buffer = bench.pool.take(4096).unwrap();
    let flush = Op::Flush { file: bench.file, why: "test" };
    assert!(bench.start(1, flush, &buffer).is_err(), "a flush is no transfer");
    // Off the unit of direct transfers.
    let op = bench.read(100, &buffer);
    assert!(bench.start(2, op, &buffer).is_err());
    // Only half of it is there.
    let op = bench.read(FILE_BYTES - 2048, &buffer);
    bench.start(3, op, &buffer).unwrap();
    let Some(Event::Again(OpId(3), work)) = bench.events(1).pop() else { panic!("half a read") };
    assert!(buffer.lend(0, 1).is_none(), "its memory is still on loan");
    assert!(work.run().is_err());
    assert!(buffer.lend(0, 1).is_some());
}

#[test]
fn a_lock_ends_with_the_file_whatever_the_ring_keeps() {
    let Some(mut bench) = Bench::new() else { return };
    let buffer = bench.pool.take(4096).unwrap();
    let op = bench.read(0, &buffer);
    bench.start(1, op, &buffer).unwrap();
    bench.events(1);
    bench.files.close(bench.file);
    let name = vhd::storage::VolumeName::new("disk.raw").unwrap();
    bench.volumes.open(&name, Access::Write).unwrap();
}

#[test]
fn sockets_are_reported_for_what_is_asked() {
    let Some(mut bench) = Bench::new() else { return };
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let watch = Watch::new(7).unwrap();
    bench.ring.watch(watch, ours.as_fd(), PollFlags::POLLIN);
    bench.ring.watch(watch, ours.as_fd(), PollFlags::POLLIN);
    bench.ring.wait(Some(Duration::from_millis(1))).unwrap();
    assert!(bench.ring.next_event().is_none());
    bench.ring.watch(watch, ours.as_fd(), PollFlags::POLLIN | PollFlags::POLLOUT);
    let events = bench.events(1);
    assert!(
        matches!(events[..], [Event::Ready(w, flags)] if w == watch && flags == PollFlags::POLLOUT),
        "{events:?}"
    );
    theirs.write_all(b"x").unwrap();
    let events = bench.events(1);
    assert!(
        matches!(events[..], [Event::Ready(_, flags)] if flags.contains(PollFlags::POLLIN)),
        "{events:?}"
    );
    // Nothing asked for: a hang-up is told all the same.
    bench.ring.watch(watch, ours.as_fd(), PollFlags::empty());
    drop(theirs);
    let events = bench.events(1);
    assert!(
        matches!(events[..], [Event::Ready(_, flags)] if flags.contains(PollFlags::POLLHUP)),
        "{events:?}"
    );
}

#[test]
fn a_file_that_is_only_read_is_registered_until_it_is_forgotten() {
    let Some(mut bench) = Bench::new() else { return };
    let name = vhd::storage::VolumeName::new("disk.raw").unwrap();
    let file = bench.files.add_read_only(bench.volumes.open(&name, Access::Read).unwrap()).unwrap();
    let buffer = bench.pool.take(4096).unwrap();
    for id in 0..3 {
        let op = Op::ReadGuest { file, offset: 4096 * id, into: whole(&buffer) };
        bench.start(id, op, &buffer).unwrap();
        assert!(matches!(bench.events(1)[..], [Event::Ended(_, Ok(_))]));
    }
    assert!(bench.ring.files.slots.contains_key(&file));
    bench.ring.forget(file);
    assert!(bench.ring.files.slots.is_empty());
}
