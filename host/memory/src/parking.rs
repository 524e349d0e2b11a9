//! Warm mappings in the host, and their moves into guests and back.
//!
//! Page faults, not the sandbox, are what a kernel call over a big tensor costs. So a
//! segment is mapped once, in the host, and stays warm at its *home*; for an invocation the
//! mapping moves with its page tables into the guest's memory, and afterwards it moves home.
//!
//! At every moment each address of a home and of a guest's reservation is mapped by us: what
//! a move leaves behind is covered in one step, with nothing accessible at home, and with
//! fresh read-write memory in the guest (where a missing page would kill the host as soon as
//! host code touches it on the guest's behalf).

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use crate::dirty::Dirty;
use crate::idle::Idle;
use crate::pages::{
    Cover, FileAccess, Reservation, cover_in_signal, lay_fresh_in_signal, lay_in_signal,
};
use crate::scrap::{SCRAP_BYTES, Scrap};
use crate::segment::{Backing, Reader, guest_pages};
use crate::{
    Budget, BudgetExceeded, Charge, GUEST_PAGE, HUGE, HUGE_USIZE, HugeBirths, Inode, Open,
    PAGE_USIZE, Parkable, Segment, to_usize,
};

/// What a parked mapping lets a guest do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// A kernel's input: private and read-only, so that even a store that the host lets
    /// through never reaches the segment.
    ReadOnly,
    /// A kernel's output: shared.
    ReadWrite,
}

/// Why a segment was not parked or a parked mapping not moved.
#[derive(Debug, thiserror::Error)]
pub enum ParkError {
    /// Not whole guest pages of what there is.
    #[error(
        "bytes {} to {} must be whole pages of {GUEST_PAGE} bytes within the {bytes} bytes of segment {inode}",
        range.start, range.end
    )]
    NotGuestPages {
        /// What was asked for.
        range: Range<u64>,
        /// Bytes that there are.
        bytes: u64,
        /// Which segment.
        inode: Inode,
    },
    /// The budget of mappings is full and none of them is idle.
    #[error(transparent)]
    TooMany(#[from] BudgetExceeded),
    /// The mapping was dirtied or lost in a guest.
    #[error(
        "the parked mapping of segment {inode} was written or lost in a guest; park the segment anew"
    )]
    Spent {
        /// Which segment.
        inode: Inode,
    },
    /// The destination is not guest memory that is accessible.
    #[error(
        "addresses {at:#x} to {end:#x} are not whole pages of the guest's memory at {from:#x} to {to:#x}",
        end = u128::from(*at as u64) + u128::from(*bytes as u64)
    )]
    OutsideGuest {
        /// First address asked for.
        at: usize,
        /// Bytes asked for.
        bytes: usize,
        /// First address of the accessible memory.
        from: usize,
        /// One past its last address.
        to: usize,
    },
    /// Another window is there.
    #[error("addresses {at:#x} to {end:#x} meet the window at {other_at:#x}; move it home first")]
    Occupied {
        /// First address asked for.
        at: usize,
        /// One past the last address asked for.
        end: usize,
        /// First address of the window that is there.
        other_at: usize,
    },
    /// An earlier move failed half-way in this guest.
    #[error("the guest's memory at {at:#x} is poisoned by a move that failed; drop the instance")]
    Poisoned {
        /// First address of the reservation.
        at: usize,
    },
    /// The operating system refused.
    #[error("{operation} of {bytes} bytes failed: {source}")]
    System {
        /// What was tried.
        operation: &'static str,
        /// On how many bytes.
        bytes: u64,
        /// The operating system's answer.
        source: io::Error,
    },
}

impl ParkError {
    fn system(operation: &'static str, bytes: usize) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::System {
            operation,
            bytes: bytes as u64,
            source,
        }
    }
}

/// A move into a guest was refused; the mapping is at home.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub struct MoveRefused {
    /// What was to be moved, unchanged.
    pub parked: Parked,
    /// Why. If the guest's memory was touched, it [is poisoned](GuestSpace::is_poisoned).
    #[source]
    pub error: ParkError,
}

/// A move home went wrong. The guest's memory is poisoned: it may still show the segment,
/// so drop the instance without running it again. It is never used for another one.
#[derive(Debug, thiserror::Error)]
#[error("the guest's memory is poisoned: {error}")]
pub struct Poisoned {
    /// The mapping, if it came home.
    pub parked: Option<Parked>,
    /// What went wrong.
    #[source]
    pub error: ParkError,
}

/// Address space for one guest memory: [reserved](GuestSpaces::take) as a whole, made
/// accessible from the front as the guest grows, and covered with nothing when it ends.
///
/// This type hands out addresses only. Whoever makes references from them (the engine's
/// linear memory) must hold none into a range that a [`Window`] enters or leaves.
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
    /// Address of the first byte: a multiple of [`HUGE`].
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
    fn enter(&self, at: usize, bytes: usize) -> Result<usize, ParkError> {
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

    fn leave(&self, offset: usize) {
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

    fn reservation(&self) -> &Reservation {
        self.reservation
            .as_ref()
            .expect("only drop takes the reservation")
    }

    fn lock(&self) -> MutexGuard<'_, SpaceState> {
        // A panic between two changes cannot happen: nothing under this lock panics.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for GuestSpace {
    fn drop(&mut self) {
        let Some(reservation) = self.reservation.take() else {
            return;
        };
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
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
        // A list of reservations is never left half-changed.
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A mapping of a part of a segment, warm and at home in the host. Dropping it unmaps it.
///
/// Its home address equals its file offset modulo [`HUGE`].
#[derive(Debug)]
pub struct Parked {
    home: Reservation,
    file: Range<u64>,
    access: Access,
    // Bytes of this mapping that somebody may have written, if it can be written.
    dirty: Dirty,
    spent: bool,
    reader: Option<Reader>,
    lot: Weak<ParkingLot>,
    backing: Arc<Backing>,
    // One mapping.
    _charge: Charge,
}

impl Parked {
    /// The whole of a segment that only the host can write, for the result pool.
    pub(crate) fn whole(segment: &Segment<Open>, charge: Charge) -> Result<Self, ParkError> {
        let file = 0..segment.bytes();
        let parked = Self::map(segment, file, Access::ReadWrite, Weak::new(), charge)?;
        Ok(parked)
    }

    fn map<K>(
        segment: &Segment<K>,
        file: Range<u64>,
        access: Access,
        lot: Weak<ParkingLot>,
        charge: Charge,
    ) -> Result<Self, ParkError> {
        let bytes = to_usize(file.end - file.start);
        let home = Reservation::new(bytes, HUGE_USIZE, to_usize(file.start % HUGE))
            .map_err(ParkError::system("reserving a home", bytes))?;
        let (file_access, reader) = match access {
            Access::ReadOnly => (
                FileAccess::PrivateRead,
                Some(Reader::new(segment.backing())),
            ),
            Access::ReadWrite => (FileAccess::SharedReadWrite, None),
        };
        home.map_file(0..bytes, segment.fd(), file.start, file_access)
            .map_err(ParkError::system("mmap", bytes))?;
        Ok(Self {
            home,
            file,
            access,
            dirty: Dirty::default(),
            spent: false,
            reader,
            lot,
            backing: Arc::clone(segment.backing()),
            _charge: charge,
        })
    }

    /// Backs `range` (bytes of this mapping), which nobody has written yet, with huge pages.
    pub(crate) fn back_with_huge_pages(&mut self, range: Range<u64>, births: &HugeBirths) {
        assert!(
            !self.spent && self.access == Access::ReadWrite,
            "not writable"
        );
        let range = to_usize(range.start)..to_usize(range.end.min(self.bytes()));
        if !range.is_empty() {
            // SAFETY: as in `copy_out`; the mapping is shared and writable, and its home address
            // equals the file's offset modulo a huge page (see the type).
            unsafe { births.back(&self.home, range) };
        }
    }

    /// Where its first byte is at home.
    pub fn address(&self) -> usize {
        self.home.start()
    }

    /// How many bytes of the segment it maps.
    pub fn bytes(&self) -> u64 {
        self.file.end - self.file.start
    }

    /// Where in the segment its first byte is.
    pub fn file_offset(&self) -> u64 {
        self.file.start
    }

    /// Which segment it maps.
    pub fn inode(&self) -> Inode {
        self.backing.inode
    }

    /// What a guest can do with it.
    pub fn access(&self) -> Access {
        self.access
    }

    /// True if it was dirtied or lost in a guest: it will not be moved or kept again.
    pub fn is_spent(&self) -> bool {
        self.spent
    }

    pub(crate) fn backing_id(&self) -> u64 {
        self.backing.id
    }

    /// Moves `part` (bytes within this mapping, whole guest pages) to address `at` of
    /// `space`, replacing what is there. `at` is a page multiple in accessible memory; the
    /// move is cheapest where it equals the home address of the part modulo [`HUGE`].
    ///
    /// # Errors
    /// [`MoveRefused`], with the mapping back at home.
    pub fn move_into(
        mut self,
        part: Range<u64>,
        space: &Arc<GuestSpace>,
        at: usize,
    ) -> Result<Window, Box<MoveRefused>> {
        let refuse = |parked, error| Err(Box::new(MoveRefused { parked, error }));
        let inode = self.inode();
        if self.spent {
            return refuse(self, ParkError::Spent { inode });
        }
        if !guest_pages(&part, self.bytes()) {
            let bytes = self.bytes();
            let range = part;
            return refuse(
                self,
                ParkError::NotGuestPages {
                    range,
                    bytes,
                    inode,
                },
            );
        }
        let part = to_usize(part.start)..to_usize(part.end);
        let offset = match space.enter(at, part.len()) {
            Ok(offset) => offset,
            Err(error) => return refuse(self, error),
        };
        let moved = self
            .home
            .transfer(part.clone(), space.reservation(), offset, Cover::ReadWrite);
        if let Err(source) = moved {
            space.leave(offset);
            if space.reservation().is_suspect() {
                space.poison();
            }
            return refuse(
                self,
                ParkError::system("mremap into the guest", part.len())(source),
            );
        }
        // A refusal leaves the segment's own mapping here, with empty page tables: right and
        // harmless, since the way back replaces it.
        drop(self.home.cover(part.clone(), Cover::Nothing));
        if self.access == Access::ReadWrite {
            self.dirty.add(part.clone());
        }
        Ok(Window {
            parked: Some(self),
            part,
            offset,
            inode,
            written: Box::new(AtomicU8::new(CLEAN)),
            space: Arc::clone(space),
        })
    }

    /// Copies out of `offset`, through the mapping. The caller checked the range.
    pub(crate) fn copy_out(&self, offset: u64, into: &mut [u8]) {
        assert!(!self.spent, "a spent mapping has no bytes");
        // SAFETY: a mapping that is not spent is whole and at home (a part is away only
        // inside a `Window`, which owns the `Parked`), and of a memfd that only the host can
        // resize, which it never does.
        unsafe { self.home.copy_out(to_usize(offset), into) }
    }

    /// Copies to `offset`, through the mapping. The caller checked the range.
    pub(crate) fn copy_in(&mut self, offset: u64, bytes: &[u8]) {
        assert!(
            !self.spent && self.access == Access::ReadWrite,
            "not writable"
        );
        let offset = to_usize(offset);
        self.dirty.add(offset..offset + bytes.len());
        // SAFETY: as in `copy_out`, and the mapping is read-write.
        unsafe { self.home.copy_in(offset, bytes) }
    }

    /// Zeroes what may be other than zero in `range`, through the mapping. The caller checked the range.
    pub(crate) fn zero(&mut self, range: Range<u64>) {
        assert!(
            !self.spent && self.access == Access::ReadWrite,
            "not writable"
        );
        for part in self.dirty.take(to_usize(range.start)..to_usize(range.end)) {
            // SAFETY: as in `copy_out`, and the mapping is read-write.
            unsafe { self.home.zero(part) }
        }
    }
}

// States of a window's pages; each fault goes one further, so that faults end.
const CLEAN: u8 = 0;
const DIVERTED: u8 = 1;
const COVERED: u8 = 2;

/// A part of a parked mapping that is in a guest. Dropping it moves it home and unmaps it.
#[derive(Debug)]
pub struct Window {
    // None only after `move_home`.
    parked: Option<Parked>,
    part: Range<usize>,
    offset: usize,
    inode: Inode,
    // Boxed for its address, which fault handlers know.
    written: Box<AtomicU8>,
    // Last: the reservation outlives the move home.
    space: Arc<GuestSpace>,
}

impl Window {
    /// Where its first byte is in the guest's memory, as a host address.
    pub fn address(&self) -> usize {
        self.space.base() + self.offset
    }

    /// How many bytes are in the guest.
    pub fn bytes(&self) -> u64 {
        self.part.len() as u64
    }

    /// Which segment it shows.
    pub fn inode(&self) -> Inode {
        self.inode
    }

    /// True if a guest stored into a read-only window.
    pub fn is_dirty(&self) -> bool {
        self.written.load(Ordering::Acquire) != CLEAN
    }

    /// Says that a read-only window was written: its pages are dropped, never parked again.
    pub fn set_dirty(&self) {
        self.written.fetch_max(DIVERTED, Ordering::AcqRel);
    }

    /// What a fault handler needs to know. Valid while this window is in the guest.
    pub fn fault_range(&self) -> FaultRange {
        let start = self.address();
        let writable = self
            .parked
            .as_ref()
            .is_some_and(|parked| parked.access == Access::ReadWrite);
        FaultRange {
            start,
            end: start + self.part.len(),
            read_only: !writable,
            written: &raw const *self.written,
        }
    }

    /// Moves the pages home and covers where they were with fresh read-write memory. A
    /// read-only window that was written comes home spent.
    ///
    /// # Errors
    /// [`Poisoned`] if the guest's memory could not be covered or the pages did not come home.
    pub fn move_home(mut self) -> Result<Parked, Box<Poisoned>> {
        let parked = self.parked.take().expect("only move_home and drop take it");
        self.bring_home(parked)
    }

    fn bring_home(&self, mut parked: Parked) -> Result<Parked, Box<Poisoned>> {
        let guest = self.space.reservation();
        let range = self.offset..self.offset + self.part.len();
        let lost = if parked.access == Access::ReadOnly && self.is_dirty() {
            // What was laid over the segment's pages must not come back as the segment's.
            parked.spent = true;
            None
        } else {
            guest
                .transfer(range.clone(), &parked.home, self.part.start, Cover::Nothing)
                .err()
        };
        let covered = guest.cover(range.clone(), Cover::ReadWrite);
        if lost.is_some() || covered.is_err() {
            self.space.poison();
        }
        self.space.leave(self.offset);
        match (lost, covered) {
            (Some(source), _) => Err(Box::new(Poisoned {
                parked: None,
                error: ParkError::system("mremap out of the guest", range.len())(source),
            })),
            (None, Err(source)) => Err(Box::new(Poisoned {
                parked: Some(parked),
                error: ParkError::system("mmap over the guest's memory", range.len())(source),
            })),
            (None, Ok(())) => Ok(parked),
        }
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        if let Some(parked) = self.parked.take() {
            // Either way the mapping goes and a poisoned reservation is not used again.
            drop(self.bring_home(parked));
        }
    }
}

/// Where a window is, for a fault handler: plain data that can be read in a signal.
#[derive(Clone, Copy, Debug)]
pub struct FaultRange {
    /// First address.
    pub start: usize,
    /// One past the last address.
    pub end: usize,
    /// True for an input: the guest must not write here.
    pub read_only: bool,
    written: *const AtomicU8,
}

// SAFETY: the pointer is only followed in `divert_in_signal`, whose caller promises
// that the window lives, and what it points to is atomic.
unsafe impl Send for FaultRange {}
// SAFETY: as for Send.
unsafe impl Sync for FaultRange {}

impl FaultRange {
    /// True if `address` is in the window.
    pub fn contains(&self, address: usize) -> bool {
        (self.start..self.end).contains(&address)
    }

    /// Lets a store into this input go on where it cannot be made a trap: `scrap` lies over the
    /// whole window from now on, or fresh zero pages if that is refused, and the window is
    /// dirty. The segment itself does not change. False if nothing (more) can be done; then the
    /// process must end, since going on would fault for ever.
    ///
    /// Async-signal-safe: atomics and bare system calls, no `errno`.
    ///
    /// # Safety
    /// The window is still in its guest, and the calling thread is the one that runs it.
    pub unsafe fn divert_in_signal(self, scrap: &Scrap) -> bool {
        if !self.read_only {
            return false;
        }
        // SAFETY: the window lives (caller), and owns what this points to.
        let written = unsafe { &*self.written };
        let before = written.fetch_add(1, Ordering::AcqRel);
        if before >= COVERED {
            written.store(COVERED, Ordering::Release);
            return false;
        }
        let addresses = self.start..self.end;
        if before == CLEAN {
            let addresses = addresses.clone();
            let laid = match scrap.in_signal() {
                // SAFETY: the window lives (caller), so the range is inside its guest's reservation,
                // and nobody has references there (`GuestSpace`).
                Some(fd) => unsafe { lay_in_signal(addresses, fd, SCRAP_BYTES) },
                None => {
                    scrap.add_fresh(SCRAP_BYTES.min(addresses.len()));
                    // SAFETY: as above.
                    unsafe { lay_fresh_in_signal(addresses, SCRAP_BYTES) }
                }
            };
            if laid {
                return true;
            }
        }
        // SAFETY: as above.
        unsafe { cover_in_signal(addresses) }
    }
}

/// Idle warm mappings of live segments, to be used again as kernel inputs.
///
/// Bounded twice: by the number of mappings that it made and that live (idle or in use), and
/// by the bytes of the idle ones. The oldest idle mapping goes first; all mappings of a
/// segment go with the segment.
#[derive(Debug)]
pub struct ParkingLot {
    mappings: Arc<Budget>,
    idle_bytes_max: u64,
    idle: Mutex<Idle<u64, Parked>>,
    reused: AtomicU64,
    mapped: AtomicU64,
}

/// Counts of a [`ParkingLot`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LotStats {
    /// Mappings that live, idle or in use.
    pub mappings: u64,
    /// Mappings that wait for reuse.
    pub idle_mappings: u64,
    /// Their bytes.
    pub idle_bytes: u64,
    /// How often an idle mapping was used again.
    pub reused: u64,
    /// How often a segment was mapped anew.
    pub mapped: u64,
}

impl ParkingLot {
    /// A lot of at most `mappings_max` mappings, of which idle ones have at most
    /// `idle_bytes_max` bytes.
    pub fn new(mappings_max: u64, idle_bytes_max: u64) -> Arc<Self> {
        Arc::new(Self {
            mappings: Budget::new("parked mappings", mappings_max),
            idle_bytes_max,
            idle: Mutex::new(Idle::default()),
            reused: AtomicU64::new(0),
            mapped: AtomicU64::new(0),
        })
    }

    /// A read-only mapping of `range` (bytes, whole guest pages) of `segment`: an idle one,
    /// or a new one.
    ///
    /// It does not hinder sealing: it is private.
    ///
    /// # Errors
    /// [`ParkError::NotGuestPages`], [`ParkError::TooMany`], [`ParkError::System`].
    pub fn take_input<K: Parkable>(
        self: &Arc<Self>,
        segment: &Segment<K>,
        range: Range<u64>,
    ) -> Result<Parked, ParkError> {
        if !guest_pages(&range, segment.bytes()) {
            return Err(ParkError::NotGuestPages {
                range,
                bytes: segment.bytes(),
                inode: segment.inode(),
            });
        }
        let backing = segment.backing();
        let idle = self.lock().take(backing.id, |parked| parked.file == range);
        if let Some(mut parked) = idle {
            parked.reader = Some(Reader::new(backing));
            self.reused.fetch_add(1, Ordering::Relaxed);
            return Ok(parked);
        }
        let charge = self.charge()?;
        backing.parked_in(self);
        self.mapped.fetch_add(1, Ordering::Relaxed);
        Parked::map(
            segment,
            range,
            Access::ReadOnly,
            Arc::downgrade(self),
            charge,
        )
    }

    /// Keeps `parked` for the next invocation, unless it is spent, not from here, or its
    /// segment is gone.
    pub fn give_back(&self, mut parked: Parked) {
        if parked.spent || !std::ptr::eq(parked.lot.as_ptr(), self) {
            return;
        }
        let mut evicted = Vec::new();
        let mut idle = self.lock();
        // Under the lock: a segment that goes now will find the mapping and forget it.
        if parked.backing.is_gone() {
            evicted.push(parked);
        } else {
            parked.reader = None;
            let (id, bytes) = (parked.backing.id, parked.bytes());
            idle.push(id, parked, bytes);
        }
        while idle.bytes() > self.idle_bytes_max {
            evicted.extend(idle.take_oldest());
        }
        // Unmapping takes long enough to do it without the lock.
        drop(idle);
        drop(evicted);
    }

    /// Unmaps every idle mapping of the segment with `inode`. A segment does this itself
    /// when it is dropped.
    pub fn forget(&self, inode: Inode) {
        let mut idle = self.lock();
        let gone: Vec<_> = idle
            .keys_where(|parked| parked.backing.inode == inode)
            .into_iter()
            .flat_map(|id| idle.take_all(id))
            .collect();
        drop(idle);
        drop(gone);
    }

    /// Counts as of now.
    pub fn stats(&self) -> LotStats {
        let idle = self.lock();
        LotStats {
            mappings: self.mappings.used(),
            idle_mappings: idle.len() as u64,
            idle_bytes: idle.bytes(),
            reused: self.reused.load(Ordering::Relaxed),
            mapped: self.mapped.load(Ordering::Relaxed),
        }
    }

    /// The idle mappings of a segment that goes.
    pub(crate) fn take_backing(&self, id: u64) -> Vec<Parked> {
        self.lock().take_all(id)
    }

    fn charge(&self) -> Result<Charge, BudgetExceeded> {
        loop {
            let exceeded = match self.mappings.try_reserve(1) {
                Ok(charge) => return Ok(charge),
                Err(exceeded) => exceeded,
            };
            let evicted = self.lock().take_oldest();
            if evicted.is_none() {
                return Err(exceeded);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Idle<u64, Parked>> {
        // Nothing under this lock panics.
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
