//! The host's own segments for results: warm, recycled, and writable by the host alone.
//!
//! Faulting in fresh pages dominates a result's cost. So a result segment is made once,
//! mapped writable once, then lent to the host for good (`F_SEAL_FUTURE_WRITE`, `SHRINK`,
//! `GROW`, `SEAL`): nobody else can write it, and the host's own mapping still can. When its
//! last holder is gone it waits, warm, for the next result of the same [`RecyclingKey`].
//!
//! Results that a caller wants sealed for good are made without those seals, and are
//! sealed with `F_SEAL_WRITE` when they are complete. They are never recycled.
//!
//! Those that another process fills it maps, and this one does not. They take one seal more (no `SEAL`): before
//! anybody else is to see one, that process unmaps it, and it is sealed, too ([`Ending`]).
//!
//! The body of a large result is [born in huge pages](HugeBirths).
//!
//! # Size classes
//! A capacity is the asked size rounded up to whole guest pages (64 KiB), and above 512 KiB
//! to an eighth of the power of two below it: 1 MiB, 1.125 MiB, 1.25 MiB, … So at most an
//! eighth is spare, and results of nearly equal size share a class.

mod segment;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::{Mutex, MutexGuard};

use crate::budget::Reclaim;
use crate::idle::Idle;
use crate::result_pages::born;
use crate::{
    Budget, BudgetExceeded, Charge, GUEST_PAGE, HugeBirths, MemoryError, Open, ParkError, Segment,
};

pub use segment::{Author, Ending, Filler, PoolSegment};

use segment::{Counted, Held, Warm, Writer};

/// The share of the system's mappings that a pool may have: one for each segment.
const MAPPINGS_SHARE: u64 = 8;

/// Who may see what an earlier result left in a recycled segment's pages: it goes only to a result of an equal
/// key. The host makes one of all that decides it, the principal and the plugin, by a hash without collisions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RecyclingKey(pub [u8; 32]);

/// Makes, recycles and bounds result segments.
#[derive(Debug)]
pub struct ResultPool {
    budget: Arc<Budget>,
    // Count of live segments, and their bytes (the latter only to be counted).
    segments: Arc<Budget>,
    bytes: Arc<Budget>,
    idle_bytes_max: u64,
    // By key and capacity.
    idle: Mutex<Idle<(RecyclingKey, u64), Warm>>,
    recycled: AtomicU64,
    created: AtomicU64,
    births: HugeBirths,
}

/// Counts of a [`ResultPool`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolStats {
    /// Segments that live, in use or idle.
    pub segments: u64,
    /// Their capacity.
    pub bytes: u64,
    /// Segments that wait for reuse.
    pub idle_segments: u64,
    /// Their capacity.
    pub idle_bytes: u64,
    /// How often an idle segment was used again.
    pub recycled: u64,
    /// How often a segment was made.
    pub created: u64,
    /// Bytes that were to be born in huge pages, since the start.
    pub huge_asked_bytes: u64,
    /// Those of them that were.
    pub huge_bytes: u64,
}

impl ResultPool {
    /// A pool whose segments are charged to children of `budget` (or to itself), and of which at most
    /// `idle_bytes_max` bytes wait for reuse. Idle segments stay charged to whom they were made for, and make
    /// room as soon as that budget or the parent is full.
    pub fn new(budget: Arc<Budget>, idle_bytes_max: u64) -> Arc<Self> {
        let segments_max = crate::process::mappings_max() / MAPPINGS_SHARE;
        let pool = Arc::new(Self {
            budget: Arc::clone(&budget),
            segments: Budget::new("result segments", segments_max),
            bytes: Budget::new("result bytes", u64::MAX),
            idle_bytes_max,
            idle: Mutex::new(Idle::default()),
            recycled: AtomicU64::new(0),
            created: AtomicU64::new(0),
            births: HugeBirths::new(),
        });
        let as_reclaim: Arc<dyn Reclaim> = Arc::clone(&pool) as _;
        budget.add_reclaimer(Arc::downgrade(&as_reclaim));
        pool
    }

    /// What [`Self::new`] was given.
    pub fn budget(&self) -> &Arc<Budget> {
        &self.budget
    }

    /// A segment of at least `bytes`, charged to `budget`. It holds zeros, or what an earlier result of the
    /// same key and budget left there.
    ///
    /// # Errors
    /// [`MemoryError::Budget`], [`MemoryError::Park`], [`MemoryError::System`].
    pub fn take(
        self: &Arc<Self>,
        bytes: u64,
        key: RecyclingKey,
        budget: &Arc<Budget>,
    ) -> Result<PoolSegment, MemoryError> {
        let capacity = capacity_for(bytes)?;
        let warm = match self.take_warm(capacity, key, budget, None) {
            Some(warm) => warm,
            None => self.make_lent(capacity, bytes, budget)?,
        };
        Ok(PoolSegment::warm(self, warm, key))
    }

    /// As [`Self::take`], to be filled by the process `process`: it has it mapped already, or is to be
    /// given [a descriptor](PoolSegment::new_fd) and then [lent it](PoolSegment::lend_to).
    ///
    /// # Errors
    /// [`MemoryError::Budget`], [`MemoryError::Park`], [`MemoryError::System`].
    pub fn take_for(
        self: &Arc<Self>,
        process: u64,
        bytes: u64,
        key: Option<RecyclingKey>,
        budget: &Arc<Budget>,
    ) -> Result<PoolSegment, MemoryError> {
        let capacity = capacity_for(bytes)?;
        let warm = key.and_then(|key| self.take_warm(capacity, key, budget, Some(process)));
        if let (Some(warm), Some(key)) = (warm, key) {
            return Ok(PoolSegment::warm(self, warm, key));
        }
        let (segment, mut counted, place) = self.make(capacity, budget)?;
        counted._segment = Some(place);
        let held = match key {
            Some(key) => Held::Unlent(segment, key),
            None => Held::Sealable(segment),
        };
        Ok(PoolSegment::elsewhere(self, held, counted))
    }

    /// What [`Self::take_for`] gives if it need not make a segment.
    pub fn warm_for(
        self: &Arc<Self>,
        process: u64,
        bytes: u64,
        key: RecyclingKey,
        budget: &Arc<Budget>,
    ) -> Option<PoolSegment> {
        let capacity = capacity_for(bytes).ok()?;
        let warm = self.take_warm(capacity, key, budget, Some(process))?;
        Some(PoolSegment::warm(self, warm, key))
    }

    fn take_warm(
        &self,
        capacity: u64,
        key: RecyclingKey,
        budget: &Arc<Budget>,
        process: Option<u64>,
    ) -> Option<Warm> {
        let fits = |warm: &Warm| warm.charged_to(budget) && warm.is_for(process);
        let warm = self.lock().take((key, capacity), fits)?;
        self.recycled.fetch_add(1, Ordering::Relaxed);
        Some(warm)
    }

    /// A segment of at least `bytes` zeros, charged to `budget`, that is going to be [sealed](PoolSegment::seal).
    ///
    /// # Errors
    /// [`MemoryError::Budget`], [`MemoryError::Park`], [`MemoryError::System`].
    pub fn take_sealable(
        self: &Arc<Self>,
        bytes: u64,
        budget: &Arc<Budget>,
    ) -> Result<PoolSegment, MemoryError> {
        let (segment, counted, mapping) = self.make(capacity_for(bytes)?, budget)?;
        let parked = born(&segment, bytes, mapping, &self.births)?;
        Ok(PoolSegment::new(
            self,
            Held::Sealable(segment),
            Some(parked),
            counted,
        ))
    }

    /// Frees the idle segments that the process `process` would have filled: it is gone.
    pub fn forget(&self, process: u64) {
        let its = |warm: &Warm| matches!(&warm.writer, Writer::There(filler) if filler.process() == process);
        loop {
            let Some(warm) = self.lock().take_oldest_where(its) else {
                return;
            };
            warm.free(&self.budget);
        }
    }

    /// Counts as of now.
    pub fn stats(&self) -> PoolStats {
        let idle = self.lock();
        PoolStats {
            segments: self.segments.used(),
            bytes: self.bytes.used(),
            idle_segments: idle.len() as u64,
            idle_bytes: idle.bytes(),
            recycled: self.recycled.load(Ordering::Relaxed),
            created: self.created.load(Ordering::Relaxed),
            huge_asked_bytes: self.births.asked_bytes(),
            huge_bytes: self.births.huge_bytes(),
        }
    }

    fn make_lent(
        &self,
        capacity: u64,
        bytes: u64,
        budget: &Arc<Budget>,
    ) -> Result<Warm, MemoryError> {
        let (segment, counted, mapping) = self.make(capacity, budget)?;
        let parked = born(&segment, bytes, mapping, &self.births)?;
        // The mapping is there already: it is the one that can still write.
        let segment = segment.lend_to_host().map_err(|refused| refused.error)?;
        Ok(Warm {
            writer: Writer::Here(parked),
            segment,
            counted,
        })
    }

    /// A segment of `capacity`, and the place of its one writable mapping.
    fn make(
        &self,
        capacity: u64,
        budget: &Arc<Budget>,
    ) -> Result<(Segment<Open>, Counted, Charge), MemoryError> {
        let mapping = self.charge_segment().map_err(ParkError::TooMany)?;
        let segment = Segment::create(capacity, budget)?;
        let counted = Counted {
            _bytes: self.bytes.try_reserve(capacity)?,
            _segment: None,
        };
        self.created.fetch_add(1, Ordering::Relaxed);
        Ok((segment, counted, mapping))
    }

    fn charge_segment(&self) -> Result<Charge, BudgetExceeded> {
        loop {
            let exceeded = match self.segments.try_reserve(1) {
                Ok(charge) => return Ok(charge),
                Err(exceeded) => exceeded,
            };
            let evicted = self.lock().take_oldest();
            if evicted.is_none() {
                return Err(exceeded);
            }
        }
    }

    fn keep(&self, warm: Warm, key: RecyclingKey) {
        let capacity = warm.segment.bytes();
        let mut evicted = Vec::new();
        let mut idle = self.lock();
        idle.push((key, capacity), warm, capacity);
        while idle.bytes() > self.idle_bytes_max {
            evicted.extend(idle.take_oldest());
        }
        // Freeing pages takes long enough to do it without the lock.
        drop(idle);
        for warm in evicted {
            warm.free(&self.budget);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Idle<(RecyclingKey, u64), Warm>> {
        self.idle.lock()
    }
}

impl Reclaim for ResultPool {
    fn reclaim(&self, full: &Budget, bytes: u64, segments: u64) -> bool {
        let (mut freed_bytes, mut freed) = (0, 0);
        let counts = |warm: &Warm| warm.segment.backing().counts_in(full);
        while freed_bytes < bytes || freed < segments {
            let Some(oldest) = self.lock().take_oldest_where(counts) else {
                break;
            };
            freed_bytes += oldest.segment.bytes();
            freed += 1;
        }
        freed > 0
    }
}

fn capacity_for(bytes: u64) -> Result<u64, MemoryError> {
    let below = bytes.max(1).ilog2();
    let step = (1_u64 << below) / 8;
    bytes
        .max(1)
        .checked_next_multiple_of(step.max(GUEST_PAGE))
        .ok_or_else(|| MemoryError::system("sizing a result", bytes, rustix::io::Errno::FBIG))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_are_guest_pages_and_at_most_an_eighth_too_big() {
        for (bytes, capacity) in [
            (0, 65_536),
            (1, 65_536),
            (65_537, 131_072),
            (512 << 10, 512 << 10),
            ((512 << 10) + 1, 576 << 10),
            ((1 << 20) + 1, 9 << 17),
            (100 << 20, 104 << 20),
        ] {
            assert_eq!(capacity_for(bytes).expect("small"), capacity, "{bytes}");
        }
        for bytes in (0..10_000_000).step_by(12_345) {
            let capacity = capacity_for(bytes).expect("small");
            assert!(capacity >= bytes && capacity.is_multiple_of(GUEST_PAGE));
            assert!(
                capacity - bytes <= GUEST_PAGE.max(bytes / 8),
                "{bytes} {capacity}"
            );
        }
        assert!(capacity_for(u64::MAX).is_err());
    }
}
