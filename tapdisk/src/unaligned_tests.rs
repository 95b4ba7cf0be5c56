//! Random requests against a byte vector, with an engine that does each of
//! its operations at any time and in any order.

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::*;

const DISK_BYTES: u64 = 16 * SECTOR_BYTES;

/// The front end, the engine and the disk.
struct World {
    rng: SmallRng,
    unaligned: Unaligned,
    pool: Pool,
    disk: Vec<u8>,
    /// What the disk must hold once nothing is in flight.
    model: Vec<u8>,
    next_id: u64,
    asked: BTreeMap<RequestId, Asked>,
    /// With the engine; and whether it has had its effect.
    engine: Vec<(Request, bool)>,
    /// Requests that had to wait or to be read first.
    slow: usize,
}

struct Asked {
    kind: RequestKind,
    offset: u64,
    len: u32,
    data: Option<Buffer>,
}

impl World {
    fn new(seed: u64) -> Self {
        let pool = Pool::default();
        Self {
            rng: SmallRng::seed_from_u64(seed),
            unaligned: Unaligned::new(pool.clone()),
            pool,
            disk: vec![0; DISK_BYTES as usize],
            model: vec![0; DISK_BYTES as usize],
            next_id: 0,
            asked: BTreeMap::new(),
            engine: Vec::new(),
            slow: 0,
        }
    }

    /// Asks for something whose bytes nothing in flight changes: what two
    /// changes of one byte leave there is anybody's guess.
    fn ask(&mut self) {
        let (offset, end) = if self.rng.random_bool(0.3) {
            let first = self.rng.random_range(0..DISK_BYTES / SECTOR_BYTES);
            (first * SECTOR_BYTES, (first + 1) * SECTOR_BYTES)
        } else {
            let offset = self.rng.random_range(0..DISK_BYTES);
            let most = [20, 600, 3000][self.rng.random_range(0..3)];
            (offset, (offset + self.rng.random_range(1..most)).min(DISK_BYTES))
        };
        let clash = self
            .asked
            .values()
            .any(|other| other.offset < end && offset < other.offset + u64::from(other.len));
        if clash {
            return;
        }
        let fua = self.rng.random();
        let kind = match self.rng.random_range(0..5) {
            0 => RequestKind::WriteZeroes { fua, no_hole: self.rng.random() },
            1 => RequestKind::Trim { fua },
            _ => RequestKind::Write { fua },
        };
        self.submit(kind, offset, (end - offset) as u32);
    }

    fn submit(&mut self, kind: RequestKind, offset: u64, len: u32) {
        let id = RequestId(self.next_id);
        self.next_id += 1;
        let bytes = offset as usize..offset as usize + len as usize;
        let cut = Cut::new(offset, len.into());
        let mut data = None;
        match kind {
            RequestKind::Write { .. } => {
                let fill = self.rng.random_range(1..=255);
                let buffer = self.pool.take(cut.len() as usize).unwrap();
                let mut all = buffer.lend_mut(0, buffer.len()).unwrap();
                all.fill(0xee); // what was in the buffer before
                all[(offset - cut.start) as usize..][..len as usize].fill(fill);
                drop(all);
                self.model[bytes].fill(fill);
                data = Some(buffer);
            }
            RequestKind::WriteZeroes { .. } => self.model[bytes].fill(0),
            _ => {
                let inside = cut.inside();
                self.model[inside.start as usize..inside.end as usize].fill(0);
            }
        }
        self.asked.insert(id, Asked { kind, offset, len, data: data.clone() });
        let all = &self.asked;
        let in_flight = || all.iter().filter_map(|(id, a)| Some((*id, changes(a.kind, a.offset, a.len)?)));
        self.unaligned.submit(Request { id, kind, offset, len }, data, in_flight);
        self.follow();
    }

    fn follow(&mut self) {
        while let Some(step) = self.unaligned.next_step() {
            match step {
                Step::Start(request) => {
                    assert_eq!((request.offset | u64::from(request.len)) % SECTOR_BYTES, 0);
                    assert!(request.len > 0);
                    self.slow += usize::from(request.id.0 & PART != 0);
                    self.engine.push((request, false));
                }
                Step::Done(id, result) => {
                    assert_eq!(result, Ok(()));
                    self.finished(id);
                }
            }
        }
    }

    fn finished(&mut self, id: RequestId) {
        assert!(self.asked.remove(&id).is_some(), "answered twice");
        let all = &self.asked;
        let in_flight = || all.iter().filter_map(|(id, a)| Some((*id, changes(a.kind, a.offset, a.len)?)));
        self.unaligned.finished(id, in_flight);
    }

    /// Some operation of the engine has its effect, or is answered.
    fn advance(&mut self) {
        if self.engine.is_empty() {
            return;
        }
        let n = self.rng.random_range(0..self.engine.len());
        if !std::mem::replace(&mut self.engine[n].1, true) {
            return self.carry_out(n);
        }
        let (request, _) = self.engine.swap_remove(n);
        if !self.unaligned.part_done(request.id, Ok(())) {
            self.finished(request.id);
        }
        self.follow();
    }

    fn carry_out(&mut self, n: usize) {
        let Request { id, kind, offset, len } = self.engine[n].0;
        let bytes = &mut self.disk[offset as usize..][..len as usize];
        let own = self.asked.get(&id).and_then(|asked| asked.data.as_ref());
        let buffer = self.unaligned.buffer_of(id).or(own);
        match kind {
            RequestKind::Read => {
                buffer.unwrap().lend_mut(0, len as usize).unwrap().copy_from_slice(bytes);
            }
            RequestKind::Write { .. } => {
                bytes.copy_from_slice(&buffer.unwrap().lend(0, len as usize).unwrap())
            }
            _ => bytes.fill(0),
        }
    }
}

#[test]
fn any_mixture_in_any_order_leaves_what_a_byte_vector_holds() {
    let mut slow = 0;
    for seed in 0..400 {
        let mut world = World::new(seed);
        for _ in 0..300 {
            if world.rng.random_bool(0.3) {
                world.ask();
            } else {
                world.advance();
            }
        }
        while !world.engine.is_empty() {
            world.advance();
        }
        assert!(world.asked.is_empty(), "seed {seed}: {} were never answered", world.asked.len());
        assert!(world.disk == world.model, "seed {seed}");
        assert!(world.unaligned.is_idle() && world.unaligned.parts.is_empty());
        assert_eq!(world.pool.used_bytes(), 0, "seed {seed}");
        slow += world.slow;
    }
    assert!(slow > 10_000, "hardly anything was unaligned: {slow}");
}

#[test]
fn a_cut_names_the_sectors_in_part() {
    for (offset, len, start, end, head, tail) in [
        (0, 512, 0, 512, None, None),
        (1024, 4096, 1024, 5120, None, None),
        (1, 511, 0, 512, Some(0), None),
        (0, 511, 0, 512, Some(0), None),
        (5, 6, 0, 512, Some(0), None),
        (512, 513, 512, 1536, None, Some(1024)),
        (511, 2, 0, 1024, Some(0), Some(512)),
        (1, 1024, 0, 1536, Some(0), Some(1024)),
    ] {
        let cut = Cut::new(offset, len);
        assert_eq!(cut, Cut { start, end, head, tail }, "{offset} {len}");
    }
    assert_eq!(Cut::new(1, 1024).inside(), Cut::new(512, 512));
    assert!(Cut::new(5, 6).inside().is_empty());
    assert!(Cut::new(511, 2).inside().is_empty());
}

#[test]
fn a_failed_read_changes_nothing_and_lets_the_next_one_go_on() {
    let mut world = World::new(1);
    world.submit(RequestKind::Write { fua: true }, 100, 10);
    world.submit(RequestKind::Write { fua: false }, 0, 512);
    assert_eq!(world.engine.len(), 1);
    let (read, _) = world.engine.remove(0);
    assert!(world.unaligned.part_done(read.id, Err(libc::EIO)));
    assert_eq!(world.unaligned.next_step(), Some(Step::Done(RequestId(0), Err(libc::EIO))));
    world.finished(RequestId(0));
    world.follow();
    assert_eq!(world.engine.len(), 1);
    assert_eq!(world.engine[0].0.id, RequestId(1));
    assert!(world.unaligned.is_idle());
}

#[test]
fn fua_is_kept_and_reads_pass() {
    let mut world = World::new(1);
    for (kind, parts) in
        [(RequestKind::Write { fua: true }, 1), (RequestKind::WriteZeroes { fua: true, no_hole: true }, 3)]
    {
        world.submit(kind, 100, 2000);
        assert_eq!(world.engine.len(), 2);
        for _ in 0..2 {
            let (read, _) = world.engine.remove(0);
            assert_eq!(read.kind, RequestKind::Read);
            assert!(world.unaligned.part_done(read.id, Ok(())));
        }
        world.follow();
        assert_eq!(world.engine.len(), parts);
        for (write, _) in std::mem::take(&mut world.engine) {
            let fua = match write.kind {
                RequestKind::Write { fua } | RequestKind::WriteZeroes { fua, no_hole: true } => fua,
                _ => false,
            };
            assert!(fua, "{:?}", write.kind);
            assert!(world.unaligned.part_done(write.id, Ok(())));
        }
        world.follow();
        assert!(world.asked.is_empty());
    }
    world.unaligned.submit(
        Request { id: RequestId(77), kind: RequestKind::Read, offset: 0, len: 512 },
        None,
        std::iter::empty,
    );
    assert!(matches!(world.unaligned.next_step(), Some(Step::Start(_))));
}
