//! What buffers are made of.
//!
//! ```text
//!   to 128 KiB    cut from the arena, which the kernel knows
//!   to 1 MiB      a piece of a sheet: one huge page, cut into equal pieces
//!   from 2 MiB    huge pages of its own
//! ```
//!
//! A disk takes a transfer as a list of physically contiguous parts, and a
//! list has a limit: 1 MiB in pages of 4 KiB wherever they happen to lie is up
//! to 256 parts, more than some devices take in one request. In a huge page it
//! is one part. On a virtio disk, eight reads of 1 MiB at a time were two to
//! three times as fast so. The system gives huge pages as it can: without
//! any, all works as before.
//!
//! Absent on purpose: who may touch which bytes (loans), and when memory is
//! kept (the pool).

use std::alloc::Layout;
use std::num::NonZeroUsize;
use std::ptr::NonNull;
use std::sync::Arc;

use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap_anonymous, munmap};

use super::{BUFFER_ALIGN, class_bytes};
use crate::limits::{ARENA_BUFFER_BYTES_MAX, ARENA_BYTES};

/// Size of a huge page, in bytes, on the machines this runs on. Where it is
/// another one, memory is aligned for nothing.
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// Where memory of a class comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// The arena while it lasts.
    Small,
    /// A sheet, while there are not too many.
    Piece,
    /// Pages of its own.
    Large,
}

impl Kind {
    /// That of a size class.
    pub(super) fn of(class: usize) -> Self {
        match class_bytes(class) {
            0..=ARENA_BUFFER_BYTES_MAX => Self::Small,
            bytes if bytes < HUGE_PAGE_BYTES => Self::Piece,
            _ => Self::Large,
        }
    }
}

/// Zeroed memory of the system's, in huge pages where it has them. Pages come
/// when they are first touched, so a client that announces much and sends
/// nothing costs next to nothing.
#[derive(Debug)]
struct Pages {
    start: NonNull<u8>,
    bytes: usize,
}

// SAFETY: plain bytes; who may touch which is governed by loans.
unsafe impl Send for Pages {}
// SAFETY: a shared reference gives no access to the bytes.
unsafe impl Sync for Pages {}

impl Pages {
    /// `bytes` of it, a multiple of [`BUFFER_ALIGN`] but not zero, which begin
    /// on the border of a huge page if they fill one. `None` when the system
    /// has no memory.
    fn new(bytes: usize) -> Option<Self> {
        let align = if bytes < HUGE_PAGE_BYTES { BUFFER_ALIGN } else { HUGE_PAGE_BYTES };
        let mapped = bytes.checked_add(align - BUFFER_ALIGN)?;
        let (access, kind) = (ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_PRIVATE);
        // SAFETY: a new mapping of no file, at a place of the system's choice.
        let area = unsafe { mmap_anonymous(None, NonZeroUsize::new(mapped)?, access, kind) }.ok()?;
        let before = area.as_ptr().cast::<u8>().align_offset(align);
        let after = mapped - bytes - before;
        // SAFETY: the border is at most `align - BUFFER_ALIGN` bytes into the
        // mapping, which is so much longer than `bytes`.
        let start = unsafe { area.cast::<u8>().add(before) };
        for (at, len) in [(0, before), (before + bytes, after)] {
            if len > 0 {
                // SAFETY: whole pages of the mapping just made, which nobody
                // has seen. A failure leaves them mapped, untouched.
                let _ = unsafe { munmap(area.byte_add(at), len) };
            }
        }
        if bytes >= HUGE_PAGE_BYTES {
            // SAFETY: advice about that mapping; it changes no byte of it.
            let _ = unsafe { madvise(start.cast(), bytes, MmapAdvise::MADV_HUGEPAGE) };
        }
        Some(Self { start, bytes })
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: mapped in `new`, unmapped once; whoever had a pointer into it
        // kept this alive.
        let _ = unsafe { munmap(self.start.cast(), self.bytes) };
    }
}

/// Memory that a driver may register with the kernel, whole.
#[derive(Debug)]
pub struct Arena(Pages);

impl Arena {
    /// `None` when the system has no memory.
    pub(super) fn new() -> Option<Self> {
        Some(Self(Pages::new(ARENA_BYTES)?))
    }

    /// Its first byte and its length in bytes.
    #[must_use]
    pub fn span(&self) -> (*mut u8, usize) {
        (self.0.start.as_ptr(), self.0.bytes)
    }

    /// Whether `len` bytes at `at` all lie in it.
    #[must_use]
    pub fn contains(&self, at: *const u8, len: usize) -> bool {
        let start = self.0.start.as_ptr() as usize;
        (at as usize).checked_sub(start).is_some_and(|offset| offset + len <= self.0.bytes)
    }

    /// Memory of a class at `at`; `None` when there is not so much.
    pub(super) fn cut(self: &Arc<Self>, at: usize, class: usize) -> Option<Memory> {
        if at + class_bytes(class) > self.0.bytes {
            return None;
        }
        // SAFETY: the offset is below the size of the arena, as just checked.
        let start = unsafe { self.0.start.add(at) };
        Some(Memory { start, class, home: Home::Arena(Arc::clone(self)) })
    }
}

/// One huge page, cut into pieces of one class. It goes with the last of them.
#[derive(Debug)]
pub(super) struct Sheet(Pages);

impl Sheet {
    /// `None` when the system has no memory.
    pub(super) fn new() -> Option<Arc<Self>> {
        Some(Arc::new(Self(Pages::new(HUGE_PAGE_BYTES)?)))
    }

    /// All of it, in pieces; to be called once.
    pub(super) fn pieces(self: &Arc<Self>, class: usize) -> Vec<Memory> {
        let piece = |n: usize| {
            // SAFETY: so many pieces lie in the sheet.
            let start = unsafe { self.0.start.add(n * class_bytes(class)) };
            Memory { start, class, home: Home::Sheet(Arc::clone(self)) }
        };
        (0..self.0.bytes / class_bytes(class)).map(piece).collect()
    }
}

/// Memory of a size class.
#[derive(Debug)]
pub(super) struct Memory {
    start: NonNull<u8>,
    pub(super) class: usize,
    home: Home,
}

/// What keeps memory alive.
#[derive(Debug)]
enum Home {
    Arena(#[expect(dead_code, reason = "held for its drop")] Arc<Arena>),
    Sheet(#[expect(dead_code, reason = "held for its drop")] Arc<Sheet>),
    Alone(#[expect(dead_code, reason = "held for its drop")] Pages),
    /// An allocation of its own, for a small buffer that found the arena used
    /// up.
    Heap(Layout),
}

// SAFETY: plain bytes, owned by this value; access is governed by loans.
unsafe impl Send for Memory {}
// SAFETY: a shared reference gives no access to the bytes.
unsafe impl Sync for Memory {}

impl Memory {
    /// Memory that shares nothing with other buffers. `None` when the system
    /// has no memory.
    pub(super) fn alone(class: usize) -> Option<Self> {
        let bytes = class_bytes(class);
        if Kind::of(class) != Kind::Small {
            let pages = Pages::new(bytes)?;
            return Some(Self { start: pages.start, class, home: Home::Alone(pages) });
        }
        let layout = Layout::from_size_align(bytes, BUFFER_ALIGN).ok()?;
        // Zeroed so that the bytes are initialised.
        // SAFETY: the layout has a size of at least `BUFFER_ALIGN`.
        let start = NonNull::new(unsafe { std::alloc::alloc_zeroed(layout) })?;
        Some(Self { start, class, home: Home::Heap(layout) })
    }

    /// Its first byte.
    pub(super) fn start(&self) -> NonNull<u8> {
        self.start
    }

    /// Whether it can only ever be a buffer again.
    pub(super) fn is_of_arena(&self) -> bool {
        matches!(self.home, Home::Arena(_))
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if let Home::Heap(layout) = &self.home {
            // SAFETY: allocated in `alone` with this very layout, freed once.
            unsafe { std::alloc::dealloc(self.start.as_ptr(), *layout) };
        }
    }
}
