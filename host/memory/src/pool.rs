//! The host's own segments for results: warm, recycled, and writable by the host alone.
//!
//! Faulting in fresh pages dominates a result's cost. So a result segment is made once,
//! mapped writable once, then lent to the host for good (`F_SEAL_FUTURE_WRITE`, `SHRINK`,
//! `GROW`, `SEAL`): nobody else can write it, and the host's own mapping still can. When its
//! last holder is gone it waits, warm, for the next result of the same owner.
//!
//! Results that a caller wants sealed for good are made without those seals, and are
//! sealed with `F_SEAL_WRITE` when they are complete. They are never recycled.
//!
//! The body of a large result is [born in huge pages](HugeBirths).
//!
//! # Size classes
//! A capacity is the asked size rounded up to whole guest pages (64 KiB), and above 512 KiB
//! to an eighth of the power of two below it: 1 MiB, 1.125 MiB, 1.25 MiB, … So at most an
//! eighth is spare, and results of nearly equal size share a class.

use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::budget::Reclaim;
use crate::idle::Idle;
use crate::segment::Backing;
use crate::{
    Budget, BudgetExceeded, Charge, Copied, GUEST_PAGE, HUGE, Host, HugeBirths, Inode, Lent,
    MemoryError, Open, ParkError, Parked, ParkingLot, Refused, Sealed, Seals, Segment,
};

/// The share of the system's mappings that a pool may have: one for each segment.
const MAPPINGS_SHARE: u64 = 8;

/// Where a large result's body starts: before it is a header of a page or two.
const HUGE_FROM: u64 = HUGE;

/// Makes, recycles and bounds result segments.
#[derive(Debug)]
pub struct ResultPool {
    budget: Arc<Budget>,
    // Count of live segments, and their bytes (the latter only to be counted).
    segments: Arc<Budget>,
    bytes: Arc<Budget>,
    idle_bytes_max: u64,
    // By owner and capacity.
    idle: Mutex<Idle<(u64, u64), Warm>>,
    recycled: AtomicU64,
    created: AtomicU64,
    births: HugeBirths,
}

#[derive(Debug)]
struct Warm {
    segment: Segment<Lent<Host>>,
    parked: Parked,
    counted: Counted,
}

#[derive(Debug)]
struct Counted {
    _bytes: Charge,
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
    /// A pool whose segments are charged to `budget` and of which at most `idle_bytes_max`
    /// bytes wait for reuse. Idle segments make room as soon as the budget is full.
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

    /// A segment of at least `bytes` for `owner` (an id of a principal). It holds zeros, or
    /// what an earlier result of the same owner left there.
    ///
    /// # Errors
    /// [`MemoryError::Budget`], [`MemoryError::Park`], [`MemoryError::System`].
    pub fn take(self: &Arc<Self>, bytes: u64, owner: u64) -> Result<PoolSegment, MemoryError> {
        let capacity = capacity_for(bytes)?;
        let idle = self.lock().take((owner, capacity), |_| true);
        let warm = match idle {
            Some(warm) => {
                self.recycled.fetch_add(1, Ordering::Relaxed);
                warm
            }
            None => self.make_lent(capacity, bytes)?,
        };
        Ok(PoolSegment {
            held: Some(Held::Lent(warm.segment, owner)),
            parked: Some(warm.parked),
            counted: Some(warm.counted),
            recyclable: AtomicBool::new(true),
            pool: Arc::clone(self),
        })
    }

    /// A segment of at least `bytes` zeros that is going to be [sealed](PoolSegment::seal).
    ///
    /// # Errors
    /// [`MemoryError::Budget`], [`MemoryError::Park`], [`MemoryError::System`].
    pub fn take_sealable(self: &Arc<Self>, bytes: u64) -> Result<PoolSegment, MemoryError> {
        let (segment, parked, counted) = self.make(capacity_for(bytes)?, bytes)?;
        Ok(PoolSegment {
            held: Some(Held::Sealable(segment)),
            parked: Some(parked),
            counted: Some(counted),
            recyclable: AtomicBool::new(false),
            pool: Arc::clone(self),
        })
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

    fn make_lent(&self, capacity: u64, bytes: u64) -> Result<Warm, MemoryError> {
        let (segment, parked, counted) = self.make(capacity, bytes)?;
        // The mapping is there already: it is the one that can still write.
        let segment = segment.lend_to_host().map_err(|refused| refused.error)?;
        Ok(Warm {
            segment,
            parked,
            counted,
        })
    }

    /// A segment of `capacity` of which `bytes` were asked for.
    fn make(
        &self,
        capacity: u64,
        bytes: u64,
    ) -> Result<(Segment<Open>, Parked, Counted), MemoryError> {
        let mapping = self.charge_segment().map_err(ParkError::TooMany)?;
        let segment = Segment::create(capacity, &self.budget)?;
        let counted = Counted {
            _bytes: self.bytes.try_reserve(capacity)?,
        };
        let mut parked = Parked::whole(&segment, mapping)?;
        if bytes > HUGE_FROM {
            parked.back_with_huge_pages(HUGE_FROM..bytes, &self.births);
        }
        self.created.fetch_add(1, Ordering::Relaxed);
        Ok((segment, parked, counted))
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

    fn keep(&self, warm: Warm, owner: u64) {
        let capacity = warm.segment.bytes();
        let mut evicted = Vec::new();
        let mut idle = self.lock();
        idle.push((owner, capacity), warm, capacity);
        while idle.bytes() > self.idle_bytes_max {
            evicted.extend(idle.take_oldest());
        }
        // Freeing pages takes long enough to do it without the lock.
        drop(idle);
        for warm in evicted {
            self.budget.free(warm.segment.bytes(), warm);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Idle<(u64, u64), Warm>> {
        // Nothing under this lock panics.
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Reclaim for ResultPool {
    fn reclaim(&self, bytes: u64, segments: u64) -> bool {
        let (mut freed_bytes, mut freed) = (0, 0);
        while freed_bytes < bytes || freed < segments {
            let Some(oldest) = self.lock().take_oldest() else {
                break;
            };
            freed_bytes += oldest.segment.bytes();
            freed += 1;
        }
        freed > 0
    }
}

/// A result's segment, writable by the host alone, or [sealable](ResultPool::take_sealable).
///
/// Dropping it gives it back to the pool, or frees it if it must not be recycled.
#[derive(Debug)]
pub struct PoolSegment {
    // Both taken by `drop` and `seal` only.
    held: Option<Held>,
    counted: Option<Counted>,
    // None while its pages are with a guest, or were lost there.
    parked: Option<Parked>,
    recyclable: AtomicBool,
    pool: Arc<ResultPool>,
}

#[derive(Debug)]
enum Held {
    /// With its owner.
    Lent(Segment<Lent<Host>>, u64),
    Sealable(Segment<Open>),
}

impl Held {
    fn backing(&self) -> &Arc<Backing> {
        match self {
            Self::Lent(segment, _) => segment.backing(),
            Self::Sealable(segment) => segment.backing(),
        }
    }
}

impl PoolSegment {
    /// Its capacity: at least what was asked for, and a multiple of [`GUEST_PAGE`].
    pub fn bytes(&self) -> u64 {
        self.backing().bytes()
    }

    /// Which shared-memory object it is.
    pub fn inode(&self) -> Inode {
        self.backing().inode
    }

    /// A descriptor for a consumer. It can neither write nor be made to.
    ///
    /// # Errors
    /// [`MemoryError::MissingSeals`] for a sealable segment: seal it first.
    pub fn readonly_fd(&self) -> Result<Arc<OwnedFd>, MemoryError> {
        self.lent("sending a descriptor")?.readonly_fd()
    }

    /// Copies `bytes` to `offset`. Nobody may hold a mapping of this segment yet.
    ///
    /// # Errors
    /// [`MemoryError::OutOfRange`]; [`MemoryError::Away`] while its pages are with a guest.
    pub fn write_at(
        &mut self,
        offset: u64,
        bytes: &[u8],
        copied: &Copied,
    ) -> Result<(), MemoryError> {
        self.parked_for(offset, bytes.len() as u64)?
            .copy_in(offset, bytes);
        copied.add(bytes.len() as u64);
        Ok(())
    }

    /// Copies out of `offset`.
    ///
    /// # Errors
    /// [`MemoryError::OutOfRange`]; [`MemoryError::Away`] while its pages are with a guest.
    pub fn read_at(
        &self,
        offset: u64,
        into: &mut [u8],
        copied: &Copied,
    ) -> Result<(), MemoryError> {
        self.backing().check_range(offset, into.len() as u64)?;
        let inode = self.inode();
        let parked = self.parked.as_ref().ok_or(MemoryError::Away { inode })?;
        parked.copy_out(offset, into);
        copied.add(into.len() as u64);
        Ok(())
    }

    /// Writes zeros to `range` (bytes). Nobody may hold a mapping of this segment yet.
    ///
    /// # Errors
    /// [`MemoryError::OutOfRange`]; [`MemoryError::Away`] while its pages are with a guest.
    pub fn zero(&mut self, range: Range<u64>) -> Result<(), MemoryError> {
        let length = range.end.saturating_sub(range.start);
        let parked = self.parked_for(range.start, length)?;
        parked.zero(range.start..range.start + length);
        Ok(())
    }

    /// The mapping of the whole segment, to be moved into a guest. Without it the segment
    /// can neither be written nor recycled. None if it was taken already.
    pub fn take_parked(&mut self) -> Option<Parked> {
        self.parked.take()
    }

    /// Takes back what [`Self::take_parked`] gave. A spent mapping, or one of another
    /// segment, is dropped.
    pub fn put_parked(&mut self, parked: Parked) {
        if !parked.is_spent() && parked.backing_id() == self.backing().id && self.parked.is_none() {
            self.parked = Some(parked);
        }
    }

    /// A read-only mapping of `range` (bytes, whole guest pages), to use this result as a
    /// kernel's input.
    ///
    /// # Errors
    /// [`MemoryError::MissingSeals`] for a sealable segment: seal it first. [`MemoryError::Park`].
    pub fn park_as_input(
        &self,
        lot: &Arc<ParkingLot>,
        range: Range<u64>,
    ) -> Result<Parked, MemoryError> {
        Ok(lot.take_input(self.lent("use as an input")?, range)?)
    }

    /// Forbids recycling: somebody may go on reading it (a lease expired without a release,
    /// or another principal mapped it).
    pub fn never_recycle(&self) {
        self.recyclable.store(false, Ordering::Relaxed);
    }

    /// Ends all writing, for everybody. Only for a [sealable](ResultPool::take_sealable) segment.
    ///
    /// # Errors
    /// [`MemoryError::SealsLocked`] for a segment that is lent for good,
    /// [`MemoryError::StillWritable`] if its pages are in a guest; the segment comes back.
    pub fn seal(mut self) -> Result<Segment<Sealed>, Box<Refused<Self>>> {
        let segment = match self.held.take() {
            Some(Held::Sealable(segment)) => segment,
            held => {
                self.held = held;
                let inode = self.inode();
                let seals = Seals::LENT_FOR_GOOD;
                return Err(Box::new(Refused {
                    segment: self,
                    error: MemoryError::SealsLocked { inode, seals },
                }));
            }
        };
        self.parked = None;
        segment.seal().map_err(|refused| {
            self.held = Some(Held::Sealable(refused.segment));
            Box::new(Refused {
                segment: self,
                error: refused.error,
            })
        })
    }

    fn backing(&self) -> &Arc<Backing> {
        let held = self.held.as_ref().expect("only drop and seal take it");
        held.backing()
    }

    fn lent(&self, operation: &'static str) -> Result<&Segment<Lent<Host>>, MemoryError> {
        match self.held.as_ref().expect("only drop and seal take it") {
            Held::Lent(segment, _) => Ok(segment),
            Held::Sealable(segment) => Err(MemoryError::MissingSeals {
                operation,
                inode: segment.inode(),
                seals: segment.seals()?,
                needed: Seals::SEALED,
            }),
        }
    }

    fn parked_for(&mut self, offset: u64, length: u64) -> Result<&mut Parked, MemoryError> {
        self.backing().check_range(offset, length)?;
        let inode = self.inode();
        self.parked.as_mut().ok_or(MemoryError::Away { inode })
    }
}

impl Drop for PoolSegment {
    fn drop(&mut self) {
        let (held, counted, parked) = (self.held.take(), self.counted.take(), self.parked.take());
        let Some(held) = held else {
            return;
        };
        let recyclable = self.recyclable.load(Ordering::Relaxed);
        match (held, counted, parked) {
            (Held::Lent(segment, owner), Some(counted), Some(parked))
                if recyclable && !segment.backing().has_readers() =>
            {
                self.pool.keep(
                    Warm {
                        segment,
                        parked,
                        counted,
                    },
                    owner,
                );
            }
            (held, counted, parked) => {
                let bytes = held.backing().bytes();
                self.pool.budget.free(bytes, (held, counted, parked));
            }
        }
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
