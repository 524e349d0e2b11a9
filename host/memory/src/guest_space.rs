//! Address space for guest memories.

use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::{Arc, Weak};

use parking_lot::{Mutex, MutexGuard};

use rustix::fs::MemfdFlags;

use crate::pages::{Cover, FileAccess, Reservation};
use crate::{HUGE_USIZE, PAGE_USIZE, ParkError, SCRAP_BYTES};

/// Address space for one guest memory: [reserved](GuestSpaces::take) as a whole, made
/// accessible from the front as the guest grows, and covered with nothing when it ends.
///
/// This type hands out addresses only. Whoever makes references from them (the engine's
/// linear memory) must hold none into a range that a [`Window`](crate::Window) enters or leaves.
#[derive(Debug)]
pub struct GuestSpace {
    // Taken by `drop` only.
    reservation: Option<Reservation>,
    state: Mutex<SpaceState>,
    pool: Weak<GuestSpaces>,
}

#[derive(Debug, Default)]
struct SpaceState {
    /// Hull of the offsets that were made accessible.
    accessible: Range<usize>,
    /// Offsets where windows are.
    windows: Vec<Range<usize>>,
    poisoned: bool,
}

impl GuestSpace {
    /// Address of the first byte: a multiple of [`HUGE`](crate::HUGE).
    pub fn base(&self) -> usize {
        self.reservation().start()
    }

    /// Bytes that are reserved.
    pub fn bytes(&self) -> usize {
        self.reservation().bytes()
    }

    /// Makes the bytes from offset `from` to offset `to` readable and writable (zero where
    /// they never were). Both count from [`Self::base`] in pages of the machine.
    ///
    /// # Errors
    /// [`ParkError::OutsideGuest`] if they are not within the reservation,
    /// [`ParkError::Occupied`] if a window is there, [`ParkError::Poisoned`],
    /// [`ParkError::System`] if the operating system has no memory to promise.
    pub fn make_accessible(&self, from: usize, to: usize) -> Result<(), ParkError> {
        if from > to
            || to > self.bytes()
            || !from.is_multiple_of(PAGE_USIZE)
            || !to.is_multiple_of(PAGE_USIZE)
        {
            return Err(ParkError::OutsideGuest {
                at: self.base().saturating_add(from),
                bytes: to.saturating_sub(from),
                from: self.base(),
                to: self.base() + self.bytes(),
            });
        }
        let mut state = self.lock();
        self.check_free(&state, from..to)?;
        if from == to {
            return Ok(());
        }
        self.reservation()
            .allow_access(from..to)
            .map_err(ParkError::system("mprotect", to - from))?;
        state.accessible = if state.accessible.is_empty() {
            from..to
        } else {
            state.accessible.start.min(from)..state.accessible.end.max(to)
        };
        Ok(())
    }

    /// Keeps what the first `bytes` hold now: [`Self::restore`] brings it back, whatever was written there since.
    /// `bytes` counts in pages of the machine.
    ///
    /// # Errors
    /// [`ParkError::OutsideGuest`] if they are not all accessible, [`ParkError::Occupied`] if a window is there,
    /// [`ParkError::Poisoned`]; [`ParkError::System`] if the operating system has no memory for it.
    pub fn keep(&self, bytes: usize) -> Result<(), ParkError> {
        let state = self.lock();
        self.check_own(&state, bytes)?;
        // In pieces: a process that runs kernels for a host may have no larger file (its limit is that of scrap memory).
        (0..bytes).step_by(SCRAP_BYTES).try_for_each(|from| {
            let piece = from..bytes.min(from + SCRAP_BYTES);
            let kept = self.keep_piece(piece);
            kept.map_err(ParkError::system("keeping a guest memory", bytes))
        })
    }

    /// Lays what is at `piece` over itself, as pages of a file that nobody else has: what is written there from now on goes to
    /// copies of them.
    fn keep_piece(&self, piece: Range<usize>) -> io::Result<()> {
        let file = rustix::fs::memfd_create(c"strait-kept", MemfdFlags::CLOEXEC)?;
        rustix::fs::ftruncate(&file, piece.len() as u64)?;
        let kept = Reservation::of_file(file.as_fd(), piece.len(), FileAccess::SharedReadWrite)?;
        let mut page = [0; PAGE_USIZE];
        for at in (0..piece.len()).step_by(PAGE_USIZE) {
            // SAFETY: the caller has found all of it accessible and holds the lock; these are pages of no file that could
            // shrink.
            unsafe { self.reservation().copy_out(piece.start + at, &mut page) };
            if page.iter().any(|byte| *byte != 0) {
                // SAFETY: mapped writable just now; nobody else has the file, nor this mapping of it.
                unsafe { kept.copy_in(at, &page) };
            }
        }
        self.reservation()
            .map_file(piece, file.as_fd(), 0, FileAccess::PrivateReadWrite)
    }

    /// The first `bytes` are again what they were when they were [kept](Self::keep), and `zeroed` (offsets) is zero.
    ///
    /// # Errors
    /// As [`Self::keep`].
    pub fn restore(&self, bytes: usize, zeroed: &[Range<usize>]) -> Result<(), ParkError> {
        /// Beyond this pages are given back and not overwritten.
        const OVERWRITTEN_BYTES: usize = 128 << 10;
        let state = self.lock();
        self.check_own(&state, bytes)?;
        self.reservation()
            .discard(0..bytes)
            .map_err(ParkError::system("restoring a guest memory", bytes))?;
        for range in zeroed {
            self.check_free(&state, range.clone())?;
            if range.start > range.end || range.end > state.accessible.end {
                return Err(self.outside(range.start, range.len(), &state.accessible));
            }
            let pages =
                range.start.next_multiple_of(PAGE_USIZE)..range.end / PAGE_USIZE * PAGE_USIZE;
            let overwritten = match pages.len() > OVERWRITTEN_BYTES {
                true => {
                    self.reservation()
                        .discard(pages.clone())
                        .map_err(ParkError::system("clearing a guest memory", pages.len()))?;
                    [range.start..pages.start, pages.end..range.end]
                }
                false => [range.clone(), range.end..range.end],
            };
            for range in overwritten {
                // SAFETY: it is accessible (checked above), no window is there, and nothing moves or covers it while the lock
                // is held.
                unsafe { self.reservation().zero(range) };
            }
        }
        Ok(())
    }

    /// Whether the first `bytes` are the guest's own, from the first on.
    fn check_own(&self, state: &SpaceState, bytes: usize) -> Result<(), ParkError> {
        let accessible = &state.accessible;
        if bytes == 0
            || !bytes.is_multiple_of(PAGE_USIZE)
            || accessible.start != 0
            || bytes > accessible.end
        {
            return Err(self.outside(0, bytes, accessible));
        }
        self.check_free(state, 0..bytes)
    }

    fn outside(&self, offset: usize, bytes: usize, accessible: &Range<usize>) -> ParkError {
        ParkError::OutsideGuest {
            at: self.base().saturating_add(offset),
            bytes,
            from: self.base() + accessible.start,
            to: self.base() + accessible.end,
        }
    }

    /// Takes this reservation out of use: when its last user drops it, it is unmapped and
    /// never serves another guest.
    pub fn poison(&self) {
        self.lock().poisoned = true;
    }

    /// True if it will never serve another guest.
    pub fn is_poisoned(&self) -> bool {
        self.lock().poisoned
    }

    /// Enters a window at address `at`; answers its offset.
    pub(crate) fn enter(&self, at: usize, bytes: usize) -> Result<usize, ParkError> {
        let mut state = self.lock();
        let base = self.base();
        let outside = ParkError::OutsideGuest {
            at,
            bytes,
            from: base + state.accessible.start,
            to: base + state.accessible.end,
        };
        let Some(offset) = at.checked_sub(base) else {
            return Err(outside);
        };
        let within = offset
            .checked_add(bytes)
            .is_some_and(|end| offset >= state.accessible.start && end <= state.accessible.end);
        if !within || !offset.is_multiple_of(PAGE_USIZE) {
            return Err(outside);
        }
        self.check_free(&state, offset..offset + bytes)?;
        state.windows.push(offset..offset + bytes);
        Ok(offset)
    }

    pub(crate) fn leave(&self, offset: usize) {
        self.lock().windows.retain(|window| window.start != offset);
    }

    fn check_free(&self, state: &SpaceState, range: Range<usize>) -> Result<(), ParkError> {
        let base = self.base();
        if state.poisoned {
            return Err(ParkError::Poisoned { at: base });
        }
        let meets = |window: &&Range<usize>| window.start < range.end && range.start < window.end;
        match state.windows.iter().find(meets) {
            None => Ok(()),
            Some(window) => Err(ParkError::Occupied {
                at: base + range.start,
                end: base + range.end,
                other_at: base + window.start,
            }),
        }
    }

    pub(crate) fn reservation(&self) -> &Reservation {
        self.reservation
            .as_ref()
            .expect("only drop takes the reservation")
    }

    fn lock(&self) -> MutexGuard<'_, SpaceState> {
        // A panic between two changes cannot happen: nothing under this lock panics.
        self.state.lock()
    }
}

impl Drop for GuestSpace {
    fn drop(&mut self) {
        let Some(reservation) = self.reservation.take() else {
            return;
        };
        let state = self.state.get_mut();
        let accessible = state.accessible.clone();
        if state.poisoned || reservation.is_suspect() {
            return;
        }
        let clean = accessible.is_empty() || reservation.cover(accessible, Cover::Nothing).is_ok();
        if let (true, Some(pool)) = (clean, self.pool.upgrade()) {
            pool.put(reservation);
        }
    }
}

/// Idle reservations for guest memories: reserving anew costs more than covering.
#[derive(Debug)]
pub struct GuestSpaces {
    idle_max: usize,
    idle: Mutex<Vec<Reservation>>,
}

impl GuestSpaces {
    /// Keeps at most `idle_max` reservations for reuse.
    pub fn new(idle_max: usize) -> Arc<Self> {
        Arc::new(Self {
            idle_max,
            idle: Mutex::new(Vec::new()),
        })
    }

    /// A reservation of `total_bytes` (rounded up to pages of the machine), nothing of it
    /// accessible, and not a byte of an earlier guest in it.
    ///
    /// # Errors
    /// [`ParkError::System`] if there is no address space left.
    pub fn take(self: &Arc<Self>, total_bytes: usize) -> Result<Arc<GuestSpace>, ParkError> {
        let bytes = total_bytes
            .max(1)
            .checked_next_multiple_of(PAGE_USIZE)
            .ok_or_else(|| ParkError::System {
                operation: "reserving a guest memory",
                bytes: total_bytes as u64,
                source: io::ErrorKind::OutOfMemory.into(),
            })?;
        let reservation = match self.take_idle(bytes) {
            Some(reservation) => reservation,
            None => Reservation::new(bytes, HUGE_USIZE, 0)
                .map_err(ParkError::system("reserving a guest memory", bytes))?,
        };
        Ok(Arc::new(GuestSpace {
            reservation: Some(reservation),
            state: Mutex::new(SpaceState::default()),
            pool: Arc::downgrade(self),
        }))
    }

    /// Reservations that wait for reuse.
    pub fn idle(&self) -> usize {
        self.lock().len()
    }

    fn take_idle(&self, bytes: usize) -> Option<Reservation> {
        let mut idle = self.lock();
        let index = idle.iter().rposition(|known| known.bytes() == bytes)?;
        Some(idle.swap_remove(index))
    }

    fn put(&self, reservation: Reservation) {
        let mut idle = self.lock();
        let evicted = if idle.len() < self.idle_max {
            idle.push(reservation);
            None
        } else {
            Some(reservation)
        };
        drop(idle);
        drop(evicted);
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Reservation>> {
        self.idle.lock()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: usize = 1 << 20;

    /// Accessible from the first byte on.
    fn space(bytes: usize) -> (Arc<GuestSpaces>, Arc<GuestSpace>) {
        let spaces = GuestSpaces::new(1);
        let space = spaces.take(16 * MIB).expect("address space");
        space.make_accessible(0, bytes).expect("memory");
        (spaces, space)
    }

    fn write(space: &GuestSpace, at: usize, bytes: &[u8]) {
        // SAFETY: the tests write and read what they made accessible, on one thread.
        unsafe { space.reservation().copy_in(at, bytes) };
    }

    fn read(space: &GuestSpace, at: usize) -> [u8; 4] {
        let mut bytes = [0; 4];
        // SAFETY: as in `write`.
        unsafe { space.reservation().copy_out(at, &mut bytes) };
        bytes
    }

    #[test]
    fn what_was_kept_comes_back_whatever_was_written() {
        let (_spaces, space) = space(5 * MIB);
        // Two pieces of it.
        let kept = 3 * MIB;
        write(&space, 8, b"kept");
        write(&space, kept - 4, b"last");
        space.keep(kept).expect("memory");
        for round in 0..3_u8 {
            for (at, was) in [(8, b"kept"), (kept - 4, b"last"), (MIB, &[0; 4])] {
                assert_eq!(read(&space, at), *was, "round {round}");
                write(&space, at, &[round; 4]);
            }
            // Few and many bytes to be cleared, not at the ends of pages, and what lies around them.
            let cleared = [kept + 10..kept + 20, kept + 5000..kept + 700_001];
            for at in [kept, kept + 9, kept + 20, kept + 4996, kept + 700_001] {
                write(&space, at, b"stay");
            }
            for at in [kept + 10, kept + 5000, kept + 400_000, kept + 699_997] {
                write(&space, at, b"gone");
            }
            write(&space, kept + 9, b"s");
            write(&space, kept + 20, b"stay");
            space.restore(kept, &cleared).expect("restored");
            assert_eq!(read(&space, kept), *b"stay");
            assert_eq!(read(&space, kept + 9), *b"s\0\0\0");
            assert_eq!(read(&space, kept + 20), *b"stay");
            assert_eq!(read(&space, kept + 4996), *b"stay");
            assert_eq!(read(&space, kept + 700_001), *b"stay");
            for at in [kept + 10, kept + 5000, kept + 400_000, kept + 699_997] {
                assert_eq!(read(&space, at), [0; 4], "{}", at - kept);
            }
        }
    }

    #[test]
    fn what_is_not_there_is_neither_kept_nor_restored() {
        let (spaces, space) = space(MIB);
        for bytes in [0, 100, MIB + PAGE_USIZE, usize::MAX] {
            let refused = space.keep(bytes).expect_err("refused");
            assert!(
                matches!(refused, ParkError::OutsideGuest { .. }),
                "{refused}"
            );
        }
        space.keep(MIB).expect("memory");
        write(&space, 0, b"gone");
        let beyond = std::slice::from_ref(&(MIB..MIB + 1));
        let refused = space.restore(MIB, beyond).expect_err("refused");
        assert!(
            matches!(refused, ParkError::OutsideGuest { .. }),
            "{refused}"
        );
        // Nor does anything of it reach the next guest.
        write(&space, 0, b"gone");
        drop(space);
        assert_eq!(spaces.idle(), 1);
        let next = spaces.take(16 * MIB).expect("address space");
        next.make_accessible(0, MIB).expect("memory");
        assert_eq!(read(&next, 0), [0; 4]);
    }
}
