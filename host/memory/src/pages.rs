//! Owned ranges of the address space, and the moving of mappings between them.
//!
//! A [`Reservation`] is mapped by us from its first to its last byte for as long as it
//! lives: every change replaces pages in one system call, so that no other thread's `mmap`
//! can land inside it. It gives out addresses and no references. Whoever makes a reference
//! from an address (only `segment.rs` and `mapping.rs` do) owns the reservation and changes
//! nothing while the reference lives; everything else copies through raw pointers.

use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::ptr::{null_mut, with_exposed_provenance_mut};

use parking_lot::{Mutex, MutexGuard};
use rustix::mm::{self, Advice, MapFlags, MprotectFlags, MremapFlags, ProtFlags};
use rustix::process::Resource;

use crate::{HUGE_USIZE, PAGE_USIZE};

/// What an address range without a segment's pages is mapped as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cover {
    /// No access: a stray load or store is a fault.
    Nothing,
    /// Fresh zero pages that can be read and written.
    ReadWrite,
}

impl Cover {
    fn protection(self) -> ProtFlags {
        match self {
            Self::Nothing => ProtFlags::empty(),
            Self::ReadWrite => ProtFlags::READ | ProtFlags::WRITE,
        }
    }
}

/// How a file is mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FileAccess {
    PrivateRead,
    /// What is written goes to a copy of the page that nobody else sees.
    PrivateReadWrite,
    SharedRead,
    SharedReadWrite,
}

impl FileAccess {
    fn flags(self) -> (ProtFlags, MapFlags) {
        match self {
            Self::PrivateRead => (ProtFlags::READ, QUIET),
            Self::PrivateReadWrite => (ProtFlags::READ | ProtFlags::WRITE, QUIET),
            Self::SharedRead => (ProtFlags::READ, MapFlags::SHARED),
            Self::SharedReadWrite => (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED),
        }
    }
}

/// No swap is promised for ranges that are mostly never touched; equal flags everywhere
/// also let neighbouring ranges merge, which keeps the count of mappings low.
const QUIET: MapFlags = MapFlags::PRIVATE.union(MapFlags::NORESERVE);

/// Linux 6.1 and later; libc does not name it yet.
const MADV_COLLAPSE: libc::c_int = 25;

/// Less than this stays in small pages: a huge page more or less would be too much of it.
pub(crate) const HUGE_WORTH_BYTES: usize = 2 * HUGE_USIZE;

#[derive(Debug)]
pub(crate) struct Reservation {
    start: usize,
    bytes: usize,
    // Ranges that a failed move may have left as a hole, and that another thread's mapping
    // may have filled since: never touched again, not even to unmap them.
    suspect: Mutex<Vec<Range<usize>>>,
}

impl Reservation {
    /// Reserves `bytes`, without access, at an address that is `phase` modulo `align`.
    /// `bytes` and `phase` are page multiples, `align` is a power of two of at least a page.
    pub(crate) fn new(bytes: usize, align: usize, phase: usize) -> io::Result<Self> {
        assert!(
            bytes > 0 && bytes.is_multiple_of(PAGE_USIZE) && phase.is_multiple_of(PAGE_USIZE),
            "a reservation of {bytes} bytes at phase {phase} does not count in pages"
        );
        assert!(
            align.is_power_of_two() && align >= PAGE_USIZE && phase < align,
            "alignment {align} with phase {phase}"
        );
        let all = bytes
            .checked_add(align)
            .ok_or_else(|| io::Error::from(io::ErrorKind::OutOfMemory))?;
        // SAFETY: a null address lets the operating system choose unused addresses.
        let base = unsafe { mm::mmap_anonymous(null_mut(), all, ProtFlags::empty(), QUIET) }?
            .expose_provenance();
        let start = base + (phase + align - base % align) % align;
        unmap(base..start);
        unmap(start + bytes..base + all);
        Ok(Self {
            start,
            bytes,
            suspect: Mutex::new(Vec::new()),
        })
    }

    /// Maps the first `bytes` (page multiple) of `fd` at unused addresses: where it may be in huge
    /// pages, those of a multiple of [`crate::HUGE`], as its offsets are.
    pub(crate) fn of_file(
        fd: BorrowedFd<'_>,
        bytes: usize,
        access: FileAccess,
    ) -> io::Result<Self> {
        if bytes >= HUGE_WORTH_BYTES {
            let mapped = Self::new(bytes, HUGE_USIZE, 0)?;
            mapped.map_file(0..bytes, fd, 0, access)?;
            return Ok(mapped);
        }
        let (protection, sharing) = access.flags();
        // SAFETY: a null address lets the operating system choose unused addresses.
        let start =
            unsafe { mm::mmap(null_mut(), bytes, protection, sharing, fd, 0) }?.expose_provenance();
        Ok(Self {
            start,
            bytes,
            suspect: Mutex::new(Vec::new()),
        })
    }

    pub(crate) fn start(&self) -> usize {
        self.start
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Replaces `range` (offsets, page multiples) in one step.
    pub(crate) fn cover(&self, range: Range<usize>, cover: Cover) -> io::Result<()> {
        let (at, bytes) = self.checked(range);
        // SAFETY: `checked` holds the range inside this reservation, which is ours and into
        // which nobody has references (module invariant).
        unsafe {
            mm::mmap_anonymous(
                with_exposed_provenance_mut(at),
                bytes,
                cover.protection(),
                QUIET | MapFlags::FIXED,
            )
        }?;
        Ok(())
    }

    /// Maps `fd` from `file_offset` over `range` (offsets, page multiples) in one step.
    pub(crate) fn map_file(
        &self,
        range: Range<usize>,
        fd: BorrowedFd<'_>,
        file_offset: u64,
        access: FileAccess,
    ) -> io::Result<()> {
        let (at, bytes) = self.checked(range);
        let (protection, sharing) = access.flags();
        // SAFETY: `checked` holds the range inside this reservation, which is ours and into
        // which nobody has references (module invariant).
        unsafe {
            mm::mmap(
                with_exposed_provenance_mut(at),
                bytes,
                protection,
                sharing | MapFlags::FIXED,
                fd,
                file_offset,
            )
        }?;
        Ok(())
    }

    /// Makes `range` (offsets, page multiples) readable and writable.
    pub(crate) fn allow_access(&self, range: Range<usize>) -> io::Result<()> {
        let (at, bytes) = self.checked(range);
        // SAFETY: `checked` holds the range inside this reservation; more rights on our own
        // pages break no reference.
        unsafe {
            mm::mprotect(
                with_exposed_provenance_mut(at),
                bytes,
                MprotectFlags::READ | MprotectFlags::WRITE,
            )
        }?;
        Ok(())
    }

    /// Backs `range` (offsets of whole huge pages) with huge pages; false if Linux refuses.
    ///
    /// # Safety
    /// As for [`Self::copy_in`], and what is there is not needed: a zero goes into each huge page.
    pub(crate) unsafe fn collapse(&self, range: Range<usize>) -> bool {
        let (at, bytes) = self.checked(range);
        for page in (at..at + bytes).step_by(HUGE_USIZE) {
            // Linux collapses no page that is a hole all through.
            // SAFETY: `checked` holds the address inside this reservation, the caller has it writable.
            unsafe { with_exposed_provenance_mut::<u8>(page).write_volatile(0) };
        }
        // SAFETY: `checked` holds the range inside this reservation; this advice changes how the
        // pages are kept, not what they hold.
        let collapsed =
            unsafe { libc::madvise(with_exposed_provenance_mut(at), bytes, MADV_COLLAPSE) };
        collapsed == 0
    }

    /// What is in `range` (offsets, page multiples) of pages of this process alone is lost: it is what it was when it was
    /// mapped.
    pub(crate) fn discard(&self, range: Range<usize>) -> io::Result<()> {
        let (at, bytes) = self.checked(range);
        // SAFETY: `checked` holds the range inside this reservation, into which nobody has references (module invariant).
        unsafe {
            mm::madvise(
                with_exposed_provenance_mut(at),
                bytes,
                Advice::LinuxDontNeed,
            )
        }?;
        Ok(())
    }

    /// A child made by `fork` does not get `range`.
    pub(crate) fn keep_from_children(&self, range: Range<usize>) -> io::Result<()> {
        let (at, bytes) = self.checked(range);
        // SAFETY: `checked` holds the range inside this reservation; this advice changes
        // nothing in the calling process.
        unsafe {
            mm::madvise(
                with_exposed_provenance_mut(at),
                bytes,
                Advice::LinuxDontFork,
            )
        }?;
        Ok(())
    }

    /// Moves the pages of `range` (offsets, page multiples) to `offset` in `to`, with their
    /// page tables. `range` stays mapped as it was, without pages, until it is covered.
    ///
    /// On an error `to` may have lost what it had there; it is then covered with `cover`, or
    /// marked suspect if that cannot be done for sure.
    pub(crate) fn transfer(
        &self,
        range: Range<usize>,
        to: &Reservation,
        offset: usize,
        cover: Cover,
    ) -> io::Result<()> {
        let (from, bytes) = self.checked(range);
        let (at, _) = to.checked(offset..offset + bytes);
        // SAFETY: `checked` holds both ranges inside reservations of ours, into which nobody
        // has references (module invariant), and they are different reservations or at
        // least different ranges (the operating system refuses overlapping ones).
        let moved = unsafe {
            mm::mremap_fixed(
                with_exposed_provenance_mut(from),
                bytes,
                bytes,
                MremapFlags::MAYMOVE | MremapFlags::DONTUNMAP,
                with_exposed_provenance_mut(at),
            )
        };
        moved.map(drop).map_err(|error| {
            to.mend(offset..offset + bytes, cover);
            error.into()
        })
    }

    /// True if a failed move left a range that may not be ours any more.
    pub(crate) fn is_suspect(&self) -> bool {
        !self.lock_suspect().is_empty()
    }

    /// Copies out of `offset`. The caller knows that the bytes are mapped readable.
    ///
    /// # Safety
    /// The pages are mapped readable, their file cannot shrink, and nothing moves or covers
    /// them during the call.
    pub(crate) unsafe fn copy_out(&self, offset: usize, into: &mut [u8]) {
        self.check_bytes(offset, into.len());
        let from = with_exposed_provenance_mut::<u8>(self.start + offset);
        // SAFETY: `check_bytes` holds the source inside this reservation, the caller has it
        // readable; a slice of ours cannot overlap it, since we give out no references.
        unsafe { std::ptr::copy_nonoverlapping(from, into.as_mut_ptr(), into.len()) }
    }

    /// Copies to `offset`.
    ///
    /// # Safety
    /// The pages are mapped writable, their file cannot shrink, and nothing moves or covers
    /// them during the call.
    pub(crate) unsafe fn copy_in(&self, offset: usize, bytes: &[u8]) {
        self.check_bytes(offset, bytes.len());
        let to = with_exposed_provenance_mut::<u8>(self.start + offset);
        // SAFETY: `check_bytes` holds the destination inside this reservation, the caller
        // has it writable; a slice of ours cannot overlap it, since we give out no references.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) }
    }

    /// Writes zeros to `range` (offsets, bytes).
    ///
    /// # Safety
    /// As for [`Self::copy_in`].
    pub(crate) unsafe fn zero(&self, range: Range<usize>) {
        self.check_bytes(range.start, range.len());
        let to = with_exposed_provenance_mut::<u8>(self.start + range.start);
        // SAFETY: `check_bytes` holds the range inside this reservation, the caller has it
        // writable, and we give out no references.
        unsafe { std::ptr::write_bytes(to, 0, range.len()) }
    }

    /// Address and length of a range that was granted earlier: a range outside is our own bug.
    fn checked(&self, range: Range<usize>) -> (usize, usize) {
        assert!(
            range.start < range.end
                && range.end <= self.bytes
                && range.start.is_multiple_of(PAGE_USIZE)
                && range.end.is_multiple_of(PAGE_USIZE),
            "pages {range:?} of a reservation of {} bytes",
            self.bytes
        );
        (self.start + range.start, range.len())
    }

    fn check_bytes(&self, offset: usize, bytes: usize) {
        assert!(
            offset <= self.bytes && bytes <= self.bytes - offset,
            "{bytes} bytes at {offset} of a reservation of {} bytes",
            self.bytes
        );
    }

    /// After a failed move: `mremap` unmaps the destination before its last checks, so it
    /// may be a hole now, into which another thread may have mapped something.
    fn mend(&self, range: Range<usize>, cover: Cover) {
        let (at, bytes) = self.checked(range.clone());
        // Where there is no hole the move was refused before the destination was touched
        // (too many mappings). The one other way, that the hole was filled exactly in
        // between, needs a refusal after it, for which there is one cause: a limit on the
        // address space.
        if is_mapped(at, bytes) && rustix::process::getrlimit(Resource::As).current.is_none() {
            return;
        }
        // SAFETY: FIXED_NOREPLACE maps unused addresses only.
        let mended = unsafe {
            mm::mmap_anonymous(
                with_exposed_provenance_mut(at),
                bytes,
                cover.protection(),
                QUIET | MapFlags::FIXED_NOREPLACE,
            )
        };
        if mended.is_err() {
            self.lock_suspect().push(range);
        }
    }

    fn lock_suspect(&self) -> MutexGuard<'_, Vec<Range<usize>>> {
        self.suspect.lock()
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let mut suspect = std::mem::take(&mut *self.lock_suspect());
        suspect.sort_by_key(|range| range.start);
        let mut from = 0;
        for range in suspect {
            if range.start > from {
                unmap(self.start + from..self.start + range.start);
            }
            from = from.max(range.end);
        }
        unmap(self.start + from..self.start + self.bytes);
    }
}

/// True if something is mapped at every page of the range.
fn is_mapped(at: usize, bytes: usize) -> bool {
    let mut resident = vec![0; bytes / PAGE_USIZE];
    // SAFETY: the vector has a byte for each page, and the call reads nothing at the address.
    let result = unsafe {
        libc::mincore(
            with_exposed_provenance_mut(at),
            bytes,
            resident.as_mut_ptr(),
        )
    };
    result == 0
}

/// Gives back addresses of a reservation of ours.
fn unmap(addresses: Range<usize>) {
    if addresses.is_empty() {
        return;
    }
    // SAFETY: only called with parts of a reservation that is being built or dropped, so no
    // reference into it exists.
    let unmapped = unsafe {
        mm::munmap(
            with_exposed_provenance_mut(addresses.start),
            addresses.len(),
        )
    };
    // Fails only where a split would exceed the system's number of mappings. The range
    // then stays reserved: addresses are lost, nothing else, and nobody can act on it here.
    let _ = unmapped;
}

/// Lays the first `bytes` of `fd` over `addresses`, again and again, from inside a signal
/// handler. False if that could not be done for all of them.
///
/// # Safety
/// `addresses` is a page-multiple range inside a reservation that outlives the call, and nobody
/// has references into it; `bytes` is a page multiple, not 0.
pub(crate) unsafe fn lay_in_signal(
    addresses: Range<usize>,
    fd: BorrowedFd<'_>,
    bytes: usize,
) -> bool {
    addresses.clone().step_by(bytes).all(|at| {
        // SAFETY: the caller's requirements: the range is ours, so replacing it touches nobody
        // else's mapping; a bare system call, so async-signal-safe.
        let laid = unsafe {
            mm::mmap(
                with_exposed_provenance_mut(at),
                bytes.min(addresses.end - at),
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED | MapFlags::FIXED,
                fd,
                0,
            )
        };
        laid.is_ok()
    })
}

/// As [`lay_in_signal`] with fresh zero pages, for want of a descriptor.
///
/// # Safety
/// As for [`lay_in_signal`].
pub(crate) unsafe fn lay_fresh_in_signal(addresses: Range<usize>, bytes: usize) -> bool {
    let first = bytes.min(addresses.len());
    // SAFETY: the caller's requirements, as in `lay_in_signal`.
    let made = unsafe {
        mm::mmap_anonymous(
            with_exposed_provenance_mut(addresses.start),
            first,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::SHARED | MapFlags::FIXED,
        )
    };
    let rest = addresses.start + first..addresses.end;
    made.is_ok()
        && rest.step_by(bytes).all(|at| {
            // What is moved from a length of 0 stays, and is mapped once more.
            // SAFETY: as above.
            let laid = unsafe {
                mm::mremap_fixed(
                    with_exposed_provenance_mut(addresses.start),
                    0,
                    bytes.min(addresses.end - at),
                    MremapFlags::MAYMOVE,
                    with_exposed_provenance_mut(at),
                )
            };
            laid.is_ok()
        })
}

/// Replaces `addresses` by fresh zero pages from inside a signal handler. False if that could
/// not be done.
///
/// # Safety
/// As for [`lay_in_signal`].
pub(crate) unsafe fn cover_in_signal(addresses: Range<usize>) -> bool {
    // SAFETY: the caller's requirements: the range is ours, so replacing it touches nobody
    // else's mapping; a bare system call, so async-signal-safe.
    let covered = unsafe {
        mm::mmap_anonymous(
            with_exposed_provenance_mut(addresses.start),
            addresses.len(),
            Cover::ReadWrite.protection(),
            QUIET | MapFlags::FIXED,
        )
    };
    covered.is_ok()
}

/// How `fd` can be mapped for reading: shared, or private where that is refused.
///
/// Some versions of Linux refuse a shared mapping of a write-sealed memfd; a private one
/// that nobody writes shows the same pages.
pub(crate) fn reading_access(fd: BorrowedFd<'_>) -> FileAccess {
    match Reservation::of_file(fd, PAGE_USIZE, FileAccess::SharedRead) {
        Ok(_) => FileAccess::SharedRead,
        Err(_) => FileAccess::PrivateRead,
    }
}

/// Maps the first `bytes` of `fd` for reading.
pub(crate) fn map_for_reading(fd: BorrowedFd<'_>, bytes: usize) -> io::Result<Reservation> {
    let bytes = bytes.next_multiple_of(PAGE_USIZE);
    Reservation::of_file(fd, bytes, FileAccess::SharedRead)
        .or_else(|_| Reservation::of_file(fd, bytes, FileAccess::PrivateRead))
}
