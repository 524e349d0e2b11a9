//! Warm mappings that wait for the next invocation.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::{Mutex, MutexGuard};

use crate::backing::KeepsMappings;
use crate::idle::Idle;
use crate::moving::guest_pages;
use crate::{Budget, BudgetExceeded, Charge, Inode, ParkError, Parkable, Parked, Segment};

/// Idle warm mappings of live segments, to be used again as kernel inputs.
///
/// Bounded twice: by the number of mappings that it made and that live (idle or in use), and
/// by the bytes of the idle ones. The oldest idle mapping goes first; all mappings of a
/// segment go with the segment.
#[derive(Debug)]
pub struct Lot {
    // Its own, so that what is charged to it is from here.
    mappings: Arc<Budget>,
    idle_bytes_max: u64,
    idle: Mutex<Idle<u64, Parked>>,
    reused: AtomicU64,
    mapped: AtomicU64,
}

/// Counts of a [`Lot`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
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

impl Lot {
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
        let idle = self
            .lock()
            .take(backing.id, |parked| *parked.file_range() == range);
        if let Some(mut parked) = idle {
            parked.set_in_use(true);
            self.reused.fetch_add(1, Ordering::Relaxed);
            return Ok(parked);
        }
        let charge = self.charge()?;
        let as_keeper: Arc<dyn KeepsMappings> = Arc::clone(self) as _;
        backing.parked_in(&as_keeper);
        self.mapped.fetch_add(1, Ordering::Relaxed);
        Parked::input(segment, range, charge)
    }

    /// Keeps `parked` for the next invocation, unless it is spent, not from here, or its
    /// segment is gone.
    pub fn give_back(&self, mut parked: Parked) {
        if parked.is_spent() || !parked.is_charged_to(&self.mappings) {
            return;
        }
        let mut evicted = Vec::new();
        let mut idle = self.lock();
        // Under the lock: a segment that goes now will find the mapping and forget it.
        if parked.backing().is_gone() {
            evicted.push(parked);
        } else {
            parked.set_in_use(false);
            let (id, bytes) = (parked.backing().id, parked.bytes());
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
            .keys_where(|parked| parked.inode() == inode)
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
        self.idle.lock()
    }
}

impl KeepsMappings for Lot {
    fn let_go(&self, backing_id: u64) -> Box<dyn Send> {
        let idle = self.lock().take_all(backing_id);
        Box::new(idle)
    }
}
