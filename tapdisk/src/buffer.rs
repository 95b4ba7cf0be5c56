//! Guest buffers: page-aligned, pooled, and lent piece by piece.
//!
//! A request's data is received into, or sent from, the one buffer that the
//! disk operations use; several workers may fill different pieces of it at
//! the same time. Each access is a loan of a range, checked when it is made:
//! two loans that overlap are refused unless both only read. So the safety of
//! the few lines of `unsafe` here rests on nothing outside this file.
//!
//! Memory goes back to its pool when the last handle or loan is dropped, on
//! whichever thread that happens.
//!
//! Small buffers come from one [`Arena`], which a driver may register with the
//! kernel once instead of having every page looked up for every transfer. Large
//! ones lie in memory that is contiguous for the disk, too ([`memory`]).
//!
//! Absent on purpose: knowledge of requests, waiting (a pool that has run out
//! says so), zeroing of reused memory (whoever lends it to a reader filled it).

mod memory;

use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

pub use memory::Arena;

use crate::limits::{BUFFER_BYTES_MAX, POOL_BYTES_MAX, POOL_IDLE_BYTES_MAX, SHEETS_MAX};
use memory::{Kind, Memory, Sheet};

/// Alignment of every buffer and smallest size, in bytes: direct I/O needs it.
pub const BUFFER_ALIGN: usize = 4096;

/// Size classes: powers of two from [`BUFFER_ALIGN`] to [`BUFFER_BYTES_MAX`].
const CLASSES: usize = (BUFFER_BYTES_MAX / BUFFER_ALIGN).ilog2() as usize + 1;

/// Hands out buffers; a clone is another handle on the same pool.
#[derive(Debug, Clone, Default)]
pub struct Pool(Arc<Mutex<Shelves>>);

/// What a pool remembers.
#[derive(Debug, Default)]
struct Shelves {
    /// Where small buffers come from while it lasts.
    arena: Option<Arc<Arena>>,
    /// Bytes of the arena cut off so far; what was cut never goes back, only
    /// to `idle`.
    arena_cut_bytes: usize,
    /// Sheets of which a piece is in use or idle, and some that are gone.
    sheets: Vec<Weak<Sheet>>,
    /// Memory nobody uses, by size class.
    idle: [Vec<Memory>; CLASSES],
    /// Bytes in `idle`.
    idle_bytes: usize,
    /// Bytes in use.
    used_bytes: usize,
}

impl Pool {
    /// A pool whose small buffers come from an arena, and that arena. `None`
    /// when the system has no memory.
    #[must_use]
    pub fn with_arena() -> Option<(Self, Arc<Arena>)> {
        let arena = Arc::new(Arena::new()?);
        let shelves = Shelves { arena: Some(Arc::clone(&arena)), ..Shelves::default() };
        Some((Self(Arc::new(Mutex::new(shelves))), arena))
    }

    /// A buffer of `len_bytes`, its content unspecified. `None` when it is
    /// larger than [`BUFFER_BYTES_MAX`], when [`POOL_BYTES_MAX`] are in use,
    /// or when the system has no memory.
    #[must_use]
    pub fn take(&self, len_bytes: usize) -> Option<Buffer> {
        let class = class_of(len_bytes)?;
        let bytes = class_bytes(class);
        let memory = {
            let mut shelves = lock(&self.0);
            if shelves.used_bytes + bytes > POOL_BYTES_MAX {
                return None;
            }
            shelves.used_bytes += bytes;
            let memory = shelves.idle.get_mut(class).and_then(Vec::pop);
            if memory.is_some() {
                shelves.idle_bytes -= bytes;
            }
            memory.or_else(|| shelves.cut(class))
        };
        let Some(memory) = memory.or_else(|| Memory::alone(class)) else {
            lock(&self.0).used_bytes -= bytes;
            return None;
        };
        let inner =
            Inner { memory: Some(memory), len_bytes, loans: Mutex::new(Vec::new()), home: self.clone() };
        Some(Buffer(Arc::new(inner)))
    }

    /// Bytes handed out and not returned, rounded up to size classes.
    #[must_use]
    pub fn used_bytes(&self) -> usize {
        lock(&self.0).used_bytes
    }

    fn put_back(&self, memory: Memory) {
        let bytes = class_bytes(memory.class);
        let mut shelves = lock(&self.0);
        shelves.used_bytes -= bytes;
        // A cut of the arena has no other place to go to; its sum is limited.
        let keep = memory.is_of_arena() || shelves.idle_bytes + bytes <= POOL_IDLE_BYTES_MAX;
        if keep && let Some(shelf) = shelves.idle.get_mut(memory.class) {
            shelf.push(memory);
            shelves.idle_bytes += bytes;
        }
    }
}

impl Shelves {
    /// Memory of the arena or of a sheet for one more buffer of a class.
    fn cut(&mut self, class: usize) -> Option<Memory> {
        match Kind::of(class) {
            Kind::Small => {
                let memory = self.arena.as_ref()?.cut(self.arena_cut_bytes, class)?;
                self.arena_cut_bytes += class_bytes(class);
                Some(memory)
            }
            Kind::Piece => self.cut_sheet(class),
            Kind::Large => None,
        }
    }

    /// The first piece of a new sheet; the others are idle.
    fn cut_sheet(&mut self, class: usize) -> Option<Memory> {
        self.sheets.retain(|sheet| sheet.strong_count() > 0);
        if self.sheets.len() >= SHEETS_MAX {
            // Pieces of other sizes, which perhaps nobody wants any more, may
            // be all that keeps some.
            self.forget_idle_pieces();
            self.sheets.retain(|sheet| sheet.strong_count() > 0);
        }
        if self.sheets.len() >= SHEETS_MAX {
            return None;
        }
        let sheet = Sheet::new()?;
        self.sheets.push(Arc::downgrade(&sheet));
        let mut pieces = sheet.pieces(class);
        let first = pieces.pop();
        if let Some(shelf) = self.idle.get_mut(class) {
            self.idle_bytes += pieces.len() * class_bytes(class);
            shelf.extend(pieces);
        }
        first
    }

    fn forget_idle_pieces(&mut self) {
        let shelves = self.idle.iter_mut().enumerate();
        for (class, shelf) in shelves.filter(|(class, _)| Kind::of(*class) == Kind::Piece) {
            self.idle_bytes -= shelf.len() * class_bytes(class);
            shelf.clear();
        }
    }
}

fn class_of(len_bytes: usize) -> Option<usize> {
    (len_bytes <= BUFFER_BYTES_MAX)
        .then(|| (len_bytes.max(BUFFER_ALIGN).next_power_of_two() / BUFFER_ALIGN).ilog2() as usize)
}

fn class_bytes(class: usize) -> usize {
    BUFFER_ALIGN << class
}

/// Nothing here panics while it holds a lock, so a poisoned one is sound.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A handle on one buffer; clones are handles on the same bytes.
#[derive(Debug, Clone)]
pub struct Buffer(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    /// Always there until the drop gives it back.
    memory: Option<Memory>,
    len_bytes: usize,
    loans: Mutex<Vec<Span>>,
    home: Pool,
}

/// A range on loan.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Span {
    at: usize,
    len: usize,
    exclusive: bool,
}

impl Buffer {
    /// Length in bytes, as asked for.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len_bytes
    }

    /// Whether it has no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.len_bytes == 0
    }

    /// Lends `len` bytes at `at` for reading. `None` if they are not all in
    /// the buffer, or part of them is on loan for writing.
    #[must_use]
    pub fn lend(&self, at: usize, len: usize) -> Option<Shared> {
        self.loan(Span { at, len, exclusive: false }).map(Shared)
    }

    /// Lends `len` bytes at `at` for writing. `None` if they are not all in
    /// the buffer, or part of them is on loan.
    #[must_use]
    pub fn lend_mut(&self, at: usize, len: usize) -> Option<Exclusive> {
        self.loan(Span { at, len, exclusive: true }).map(Exclusive)
    }

    fn loan(&self, span: Span) -> Option<Loan> {
        let end = span.at.checked_add(span.len)?;
        if end > self.0.len_bytes {
            return None;
        }
        let start = self.0.memory.as_ref()?.start();
        let mut loans = lock(&self.0.loans);
        let clash = loans.iter().any(|other| {
            span.at < other.at + other.len && other.at < end && (span.exclusive || other.exclusive)
        });
        if clash {
            return None;
        }
        loans.push(span);
        Some(Loan { owner: self.0.clone(), span, start })
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if let Some(memory) = self.memory.take() {
            self.home.put_back(memory);
        }
    }
}

/// An entry in `owner.loans`, removed when this is dropped.
#[derive(Debug)]
struct Loan {
    owner: Arc<Inner>,
    span: Span,
    /// Start of the owner's memory.
    start: NonNull<u8>,
}

impl Drop for Loan {
    fn drop(&mut self) {
        let mut loans = lock(&self.owner.loans);
        if let Some(i) = loans.iter().position(|span| *span == self.span) {
            loans.swap_remove(i);
        }
    }
}

// SAFETY: the pointer leads to memory that `owner` keeps alive, and the table
// of loans gives this loan's range to it alone, or to readers only.
unsafe impl Send for Loan {}
// SAFETY: a shared reference to a loan only gives `&[u8]`.
unsafe impl Sync for Loan {}

/// Bytes on loan for reading.
#[derive(Debug)]
pub struct Shared(Loan);

impl Deref for Shared {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        let Loan { span, start, .. } = &self.0;
        // SAFETY: `loan` checked that the range lies in the memory, which is
        // initialised and kept alive by the owner; while this loan stands no
        // exclusive loan overlaps it.
        unsafe { std::slice::from_raw_parts(start.as_ptr().add(span.at), span.len) }
    }
}

/// Bytes on loan for writing.
#[derive(Debug)]
pub struct Exclusive(Loan);

impl Deref for Exclusive {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        let Loan { span, start, .. } = &self.0;
        // SAFETY: as for `Shared`; this loan is the only one of its range.
        unsafe { std::slice::from_raw_parts(start.as_ptr().add(span.at), span.len) }
    }
}

impl DerefMut for Exclusive {
    fn deref_mut(&mut self) -> &mut [u8] {
        let Loan { span, start, .. } = &self.0;
        // SAFETY: in bounds and alive as for `Shared`; no other loan overlaps
        // this one, and `&mut self` makes this the only slice from it.
        unsafe { std::slice::from_raw_parts_mut(start.as_ptr().add(span.at), span.len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::{ARENA_BUFFER_BYTES_MAX, ARENA_BYTES};

    #[test]
    fn loans_that_overlap_are_refused_unless_both_read() {
        let buffer = Pool::default().take(8192).unwrap();
        let mut low = buffer.lend_mut(0, 4096).unwrap();
        assert!(buffer.lend(4095, 2).is_none());
        assert!(buffer.lend_mut(0, 1).is_none());
        let mut high = buffer.lend_mut(4096, 4096).unwrap();
        low.fill(1);
        high.fill(2);
        drop((low, high));
        let all = buffer.lend(0, 8192).unwrap();
        assert!(buffer.lend(100, 100).is_some());
        assert!(buffer.lend_mut(100, 100).is_none());
        assert_eq!((all[4095], all[4096]), (1, 2));
    }

    #[test]
    fn ranges_outside_are_refused() {
        let buffer = Pool::default().take(512).unwrap();
        assert!(buffer.lend(0, 513).is_none());
        assert!(buffer.lend(512, 1).is_none());
        assert!(buffer.lend(usize::MAX, 2).is_none());
        assert!(buffer.lend(512, 0).is_some());
    }

    #[test]
    fn memory_returns_with_the_last_loan_and_is_reused() {
        let pool = Pool::default();
        let buffer = pool.take(5000).unwrap();
        let loan = buffer.lend(0, 10).unwrap();
        let place = loan.as_ptr();
        drop(buffer);
        assert_eq!(pool.used_bytes(), 8192);
        drop(loan);
        assert_eq!(pool.used_bytes(), 0);
        let again = pool.take(8192).unwrap();
        assert_eq!(again.lend(0, 1).unwrap().as_ptr(), place);
    }

    #[test]
    fn small_buffers_come_from_the_arena_while_it_lasts() {
        let (pool, arena) = Pool::with_arena().unwrap();
        let inside = |buffer: &Buffer| {
            let all = buffer.lend(0, buffer.len()).unwrap();
            arena.contains(all.as_ptr(), all.len())
        };
        let mut held: Vec<_> = (0..ARENA_BYTES / 4096).map(|_| pool.take(4096).unwrap()).collect();
        assert!(held.iter().all(inside));
        assert!(!inside(&pool.take(4096).unwrap()));
        assert!(!inside(&pool.take(ARENA_BUFFER_BYTES_MAX * 2).unwrap()));
        drop(held.pop());
        let mut two = [pool.take(4096).unwrap(), pool.take(4096).unwrap()];
        two.sort_by_key(|buffer| !inside(buffer));
        assert!(inside(&two[0]) && !inside(&two[1]));
    }

    #[test]
    fn large_buffers_are_whole_zeroed_and_their_own() {
        let pool = Pool::default();
        let sizes = [200 << 10, 1 << 20, 1 << 20, (1 << 20) + 1024, 2 << 20, 5 << 20];
        let held: Vec<_> = sizes.iter().map(|len| pool.take(*len).unwrap()).collect();
        for (n, buffer) in held.iter().enumerate() {
            let mut all = buffer.lend_mut(0, buffer.len()).unwrap();
            assert!((all.as_ptr() as usize).is_multiple_of(BUFFER_ALIGN));
            assert!(all.iter().all(|byte| *byte == 0), "nobody else's bytes: {n}");
            all.fill(n as u8 + 1);
        }
        for (n, buffer) in held.iter().enumerate() {
            assert!(buffer.lend(0, buffer.len()).unwrap().iter().all(|byte| *byte == n as u8 + 1));
        }
    }

    #[test]
    fn buffers_of_half_a_huge_page_share_one_and_lie_whole_in_it() {
        let pool = Pool::default();
        let (one, two) = (pool.take(1 << 20).unwrap(), pool.take(1 << 20).unwrap());
        let page = |buffer: &Buffer| buffer.lend(0, 1).unwrap().as_ptr() as usize >> 21;
        assert_eq!(page(&one), page(&two));
        let large = pool.take(2 << 20).unwrap();
        assert!((large.lend(0, 1).unwrap().as_ptr() as usize).is_multiple_of(2 << 20));
    }

    #[test]
    fn sheets_have_an_end_and_serve_another_size_once_nobody_uses_them() {
        let pool = Pool::default();
        let live = || lock(&pool.0).sheets.iter().filter(|sheet| sheet.strong_count() > 0).count();
        let held: Vec<_> = (0..SHEETS_MAX * 2 + 3).map(|_| pool.take(1 << 20).unwrap()).collect();
        assert_eq!(live(), SHEETS_MAX);
        // Idle pieces, one in each of as many sheets as may be kept.
        drop(held);
        assert!(lock(&pool.0).idle_bytes <= POOL_IDLE_BYTES_MAX);
        let held: Vec<_> = (0..SHEETS_MAX * 8).map(|_| pool.take(256 << 10).unwrap()).collect();
        assert_eq!(live(), SHEETS_MAX);
        assert_eq!(lock(&pool.0).idle_bytes, 0);
        drop(held);
        assert_eq!(pool.used_bytes(), 0);
    }

    #[test]
    fn the_pool_has_an_end() {
        let pool = Pool::default();
        assert!(pool.take(BUFFER_BYTES_MAX + 1).is_none());
        let held: Vec<_> = std::iter::from_fn(|| pool.take(BUFFER_BYTES_MAX)).take(1000).collect();
        assert_eq!(held.len(), POOL_BYTES_MAX / BUFFER_BYTES_MAX);
        drop(held);
        assert_eq!(pool.used_bytes(), 0);
    }
}
