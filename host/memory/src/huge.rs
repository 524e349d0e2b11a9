//! Huge pages for memory that is about to be filled.
//!
//! Faulting in 4 KiB pages is most of what the first fill of a segment costs, and of what each
//! consumer's first pass costs again. Linux collapses a nearly empty range of a shared-memory object into
//! huge pages in a tenth of that time (`MADV_COLLAPSE`, from 6.1 on), however
//! `shmem_enabled` is set; a full one it would have to copy. So it is done at birth.
//!
//! Where Linux refuses, or is slow because the machine has no free huge pages at hand, the rest
//! stays in small pages: slower and otherwise the same.

use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::pages::{FileAccess, HUGE_WORTH_BYTES, Reservation};
use crate::{HUGE_USIZE, to_usize};

/// Bytes collapsed between two looks at the clock.
const STEP_BYTES: usize = 8 << 20;
/// A step that took longer is the last one.
const STEP_MAX: Duration = Duration::from_millis(50);
/// Likewise when all steps together took longer than this for each MiB.
const MIB_MAX: Duration = Duration::from_millis(2);

/// Counts bytes that were to be backed by huge pages at birth, and those that were.
#[derive(Debug, Default)]
pub struct HugeBirths {
    asked: AtomicU64,
    huge: AtomicU64,
}

impl HugeBirths {
    /// Nothing yet.
    pub const fn new() -> Self {
        Self {
            asked: AtomicU64::new(0),
            huge: AtomicU64::new(0),
        }
    }

    /// Bytes in whole huge pages that were asked for.
    pub fn asked_bytes(&self) -> u64 {
        self.asked.load(Ordering::Relaxed)
    }

    /// Those of them that are in huge pages.
    pub fn huge_bytes(&self) -> u64 {
        self.huge.load(Ordering::Relaxed)
    }

    /// Backs `range` (bytes) of `file`, which has `bytes`, by a mapping made for that. Before anybody has written there: what is
    /// there is kept, but copied.
    ///
    /// # Safety
    /// The file does not get shorter during the call.
    pub(crate) unsafe fn back_file(&self, file: BorrowedFd<'_>, bytes: u64, range: Range<u64>) {
        let range = to_usize(range.start)..to_usize(range.end.min(bytes));
        if range.len() < HUGE_WORTH_BYTES {
            return;
        }
        // Without a mapping there are small pages: slower and otherwise the same.
        if let Ok(pages) = Reservation::of_file(file, to_usize(bytes), FileAccess::SharedReadWrite)
        {
            // SAFETY: just mapped shared and writable, at a multiple of a huge page for what is large enough to have
            // one; the rest by the caller.
            unsafe { self.back(&pages, range) };
        }
    }

    /// Backs the whole huge pages of `range` (offsets, 4 MiB and more) with memory. Takes a tenth of a second for a
    /// gigabyte at best: not for a thread that others wait for.
    ///
    /// # Safety
    /// The range is mapped shared and writable, of a file that cannot shrink, with addresses
    /// that equal the file's offsets modulo [`crate::HUGE`]; nothing moves or covers it during the call.
    pub(crate) unsafe fn back(&self, pages: &Reservation, range: Range<usize>) {
        if range.len() < HUGE_WORTH_BYTES {
            return;
        }
        let address = pages.start();
        let start = (address + range.start).next_multiple_of(HUGE_USIZE) - address;
        let end = ((address + range.end) / HUGE_USIZE * HUGE_USIZE).saturating_sub(address);
        if start >= end {
            return;
        }
        self.asked
            .fetch_add((end - start) as u64, Ordering::Relaxed);
        let begin = Instant::now();
        for from in (start..end).step_by(STEP_BYTES) {
            let step = from..end.min(from + STEP_BYTES);
            let before = begin.elapsed();
            // SAFETY: the caller's requirements, for a part of the range.
            if !unsafe { pages.collapse(step.clone()) } {
                return;
            }
            self.huge.fetch_add(step.len() as u64, Ordering::Relaxed);
            let after = begin.elapsed();
            let mib = u32::try_from((step.end - start) >> 20).unwrap_or(u32::MAX);
            if after - before > STEP_MAX || after > MIB_MAX * mib {
                return;
            }
        }
    }
}
