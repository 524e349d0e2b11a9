//! Address space for guest memories.

use std::io;
use std::ops::Range;
use std::sync::{Arc, Weak};

use parking_lot::{Mutex, MutexGuard};

use crate::pages::{Cover, Reservation};
use crate::{HUGE_USIZE, PAGE_USIZE, ParkError};

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
