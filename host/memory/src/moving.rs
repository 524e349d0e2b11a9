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

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use crate::backing::{Backing, InUse};
use crate::dirty::Dirty;
use crate::pages::{
    Cover, FileAccess, Reservation, cover_in_signal, lay_fresh_in_signal, lay_in_signal,
};
use crate::scrap::{SCRAP_BYTES, Scrap};
use crate::{
    Budget, Charge, GUEST_PAGE, GuestSpace, HUGE, HUGE_USIZE, HugeBirths, Inode, Open, ParkError,
    Parkable, Segment, to_usize,
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

/// Where a mapping is at home. The parts of one that was cut share it: its addresses are given back with the last of them.
#[derive(Debug)]
struct Home {
    reservation: Reservation,
    // One mapping, of the lot or the pool that made it.
    charge: Charge,
}

/// A mapping of a part of a segment, warm and at home in the host. Dropping it unmaps it.
///
/// Its home address equals its file offset modulo [`HUGE`].
#[derive(Debug)]
pub struct Parked {
    home: Arc<Home>,
    // Where in `home` its first byte is; no other part has any of its addresses.
    at: usize,
    file: Range<u64>,
    access: Access,
    // Bytes of this mapping that somebody may have written, if it can be written.
    dirty: Dirty,
    spent: bool,
    reader: Option<InUse>,
    backing: Arc<Backing>,
}

impl Parked {
    /// The whole of a segment that only the host can write, for the result pool.
    pub(crate) fn whole(segment: &Segment<Open>, charge: Charge) -> Result<Self, ParkError> {
        let file = 0..segment.bytes();
        Self::map(segment, file, Access::ReadWrite, charge)
    }

    /// `range` (bytes, whole guest pages) of a segment that cannot shrink, for a [`Lot`](crate::Lot).
    pub(crate) fn input<K: Parkable>(
        segment: &Segment<K>,
        range: Range<u64>,
        charge: Charge,
    ) -> Result<Self, ParkError> {
        Self::map(segment, range, Access::ReadOnly, charge)
    }

    /// The whole of a link, for one of its readers.
    pub(crate) fn of_link(segment: &Segment<Open>, charge: Charge) -> Result<Self, ParkError> {
        Self::map(segment, 0..segment.bytes(), Access::ReadOnly, charge)
    }

    fn map<K>(
        segment: &Segment<K>,
        file: Range<u64>,
        access: Access,
        charge: Charge,
    ) -> Result<Self, ParkError> {
        let bytes = to_usize(file.end - file.start);
        let home = Reservation::new(bytes, HUGE_USIZE, to_usize(file.start % HUGE))
            .map_err(ParkError::system("reserving a home", bytes))?;
        let (file_access, reader) = match access {
            Access::ReadOnly => (FileAccess::PrivateRead, Some(InUse::new(segment.backing()))),
            Access::ReadWrite => (FileAccess::SharedReadWrite, None),
        };
        home.map_file(0..bytes, segment.fd(), file.start, file_access)
            .map_err(ParkError::system("mmap", bytes))?;
        Ok(Self {
            home: Arc::new(Home {
                reservation: home,
                charge,
            }),
            at: 0,
            file,
            access,
            dirty: Dirty::default(),
            spent: false,
            reader,
            backing: Arc::clone(segment.backing()),
        })
    }

    /// Cuts it at `cuts` (bytes of the segment within it, whole guest pages, in order), so that its parts can be in
    /// different guests at the same time. [`Self::join`] undoes it; a part that is dropped is lost, and with it the whole.
    ///
    /// # Errors
    /// [`ParkError::Spent`], [`ParkError::NotGuestPages`], with the mapping as it was.
    pub fn split(self, cuts: &[u64]) -> Result<Vec<Self>, Box<MoveRefused>> {
        let (inode, bytes) = (self.inode(), self.bytes());
        let refuse = |parked, error| Err(Box::new(MoveRefused { parked, error }));
        if self.spent {
            return refuse(self, ParkError::Spent { inode });
        }
        let (start, end) = (self.file.start, self.file.end);
        let starts = std::iter::once(start).chain(cuts.iter().copied());
        let ends = cuts.iter().copied().chain([end]);
        let parts: Vec<_> = starts.zip(ends).map(|(start, end)| start..end).collect();
        let wrong = parts.iter().find(|part| {
            !(part.start < part.end && part.end <= end && part.end.is_multiple_of(GUEST_PAGE))
        });
        if let Some(range) = wrong.cloned() {
            return refuse(
                self,
                ParkError::NotGuestPages {
                    range,
                    bytes,
                    inode,
                },
            );
        }
        let part = |file: Range<u64>| {
            let within = to_usize(file.start - start)..to_usize(file.end - start);
            Self {
                home: Arc::clone(&self.home),
                at: self.at + within.start,
                dirty: self.dirty.part(within),
                file,
                access: self.access,
                spent: false,
                reader: self.reader.as_ref().map(|_| InUse::new(&self.backing)),
                backing: Arc::clone(&self.backing),
            }
        };
        Ok(parts.into_iter().map(part).collect())
    }

    /// The mapping that `parts` were [cut](Self::split) from, or as much of it as they are: each begins where the one before
    /// it ends. None, and they are lost, if they do not, or one of them is spent.
    #[must_use]
    pub fn join(parts: Vec<Self>) -> Option<Self> {
        let mut parts = parts.into_iter();
        let mut whole = parts.next()?;
        for part in parts {
            let follows = Arc::ptr_eq(&whole.home, &part.home)
                && whole.at + to_usize(whole.bytes()) == part.at
                && !part.spent;
            if !follows {
                return None;
            }
            whole.dirty.append(part.dirty, to_usize(whole.bytes()));
            whole.file.end = part.file.end;
        }
        (!whole.spent).then_some(whole)
    }

    /// Backs `range` (bytes of this mapping), which nobody has written yet, with huge pages.
    pub(crate) fn back_with_huge_pages(&mut self, range: Range<u64>, births: &HugeBirths) {
        assert!(
            !self.spent && self.access == Access::ReadWrite && self.at == 0,
            "not writable, or a part"
        );
        let range = to_usize(range.start)..to_usize(range.end.min(self.bytes()));
        if !range.is_empty() {
            // SAFETY: as in `copy_out`; the mapping is shared and writable, and its home address
            // equals the file's offset modulo a huge page (see the type).
            unsafe { births.back(&self.home.reservation, range) };
        }
    }

    /// Where its first byte is at home.
    pub fn address(&self) -> usize {
        self.home.reservation.start() + self.at
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

    pub(crate) fn backing(&self) -> &Backing {
        &self.backing
    }

    /// Which bytes of the segment it maps.
    pub(crate) fn file_range(&self) -> &Range<u64> {
        &self.file
    }

    pub(crate) fn is_charged_to(&self, budget: &Arc<Budget>) -> bool {
        Arc::ptr_eq(self.home.charge.budget(), budget)
    }

    /// An invocation has it now, or has it no more: see [`InUse`].
    pub(crate) fn set_in_use(&mut self, in_use: bool) {
        self.reader = in_use.then(|| InUse::new(&self.backing));
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
        let at_home = self.at + part.start..self.at + part.end;
        let moved = self.home.reservation.transfer(
            at_home.clone(),
            space.reservation(),
            offset,
            Cover::ReadWrite,
        );
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
        drop(self.home.reservation.cover(at_home, Cover::Nothing));
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
        unsafe {
            self.home
                .reservation
                .copy_out(self.at + to_usize(offset), into)
        }
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
        unsafe { self.home.reservation.copy_in(self.at + offset, bytes) }
    }

    /// Zeroes what may be other than zero in `range`, through the mapping. The caller checked the range.
    pub(crate) fn zero(&mut self, range: Range<u64>) {
        assert!(
            !self.spent && self.access == Access::ReadWrite,
            "not writable"
        );
        for part in self.dirty.take(to_usize(range.start)..to_usize(range.end)) {
            let part = self.at + part.start..self.at + part.end;
            // SAFETY: as in `copy_out`, and the mapping is read-write.
            unsafe { self.home.reservation.zero(part) }
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
            let home = &parked.home.reservation;
            let at = parked.at + self.part.start;
            guest
                .transfer(range.clone(), home, at, Cover::Nothing)
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

/// True if `range` is whole guest pages within a segment, or a mapping, of `bytes` bytes.
pub(crate) fn guest_pages(range: &Range<u64>, bytes: u64) -> bool {
    range.start < range.end
        && range.start.is_multiple_of(GUEST_PAGE)
        && range.end.is_multiple_of(GUEST_PAGE)
        && range.end <= bytes
}
