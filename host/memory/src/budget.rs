//! How much of something the host may hold at once: segment bytes, or mappings.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};

use crate::freeing::Freeing;

/// From this size on it is worth a wake-up to free something elsewhere: about a millisecond.
const FREED_ELSEWHERE_MIN: u64 = 8 << 20;

/// Something that can give up idle holdings when a budget is full.
pub(crate) trait Reclaim: Send + Sync {
    /// Lets go of idle segments that are charged to the budget: at least `bytes` of them and at least
    /// `segments` of them, if there are as many. False if there were none.
    fn reclaim(&self, bytes: u64, segments: u64) -> bool;
}

/// A limit, and how much of it is taken.
pub struct Budget {
    what: &'static str,
    limit: u64,
    used: AtomicU64,
    // How many segments may share this one. None: as many as fit.
    segments: Option<Arc<Budget>>,
    // Unset: everything is freed where it is let go of.
    freeing: OnceLock<Freeing>,
    // Taken only after a reservation failed, and never while another lock of this crate is
    // held: a reclaimer takes its own lock and drops `Charge`s.
    reclaimers: Mutex<Vec<Weak<dyn Reclaim>>>,
}

/// A reservation did not fit.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{what}: {requested} more would exceed the budget of {limit} by {} ({used} are in use); release what is no longer needed, or raise the budget",
    requested.saturating_sub(limit - used)
)]
pub struct BudgetExceeded {
    /// What is counted, with its unit: "segment bytes".
    pub what: &'static str,
    /// How much was asked for.
    pub requested: u64,
    /// How much was taken at that moment.
    pub used: u64,
    /// The most that may be taken.
    pub limit: u64,
}

impl Budget {
    /// A budget of `limit`; `what` says in errors what is counted, with its unit.
    pub fn new(what: &'static str, limit: u64) -> Arc<Self> {
        Arc::new(Self::limited(what, limit, None))
    }

    /// A budget of `bytes` for at most `segments` segments: each of them holds a descriptor,
    /// used or idle.
    pub fn for_segments(bytes: u64, segments: u64) -> Arc<Self> {
        let segments = Arc::new(Self::limited("segments", segments, None));
        Arc::new(Self::limited("segment bytes", bytes, Some(segments)))
    }

    fn limited(what: &'static str, limit: u64, segments: Option<Arc<Self>>) -> Self {
        Self {
            what,
            limit,
            used: AtomicU64::new(0),
            segments,
            freeing: OnceLock::new(),
            reclaimers: Mutex::new(Vec::new()),
        }
    }

    /// From now on what is big, and charged to this, is freed on a thread of its own.
    ///
    /// # Errors
    /// If Linux gives no thread.
    pub fn free_elsewhere(&self) -> io::Result<()> {
        // A second thread, if somebody was quicker, ends at once.
        let _ = self.freeing.set(Freeing::start()?);
        Ok(())
    }

    /// Drops `garbage`, which holds up to `bytes` bytes: here, or elsewhere if that takes long.
    pub fn free<T: Send + 'static>(&self, bytes: u64, garbage: T) {
        match self.freeing.get() {
            Some(freeing) if bytes >= FREED_ELSEWHERE_MIN => freeing.free(Box::new(garbage)),
            _ => drop(garbage),
        }
    }

    /// Whether `bytes` more would fit without waiting for what is being freed, or freeing idle
    /// segments first.
    pub fn has_room(&self, bytes: u64) -> bool {
        let places = self.segments.as_ref();
        bytes <= self.limit.saturating_sub(self.used())
            && places.is_none_or(|places| places.used() < places.limit)
    }

    /// The most that may be taken.
    pub fn limit(&self) -> u64 {
        self.limit
    }

    /// How much is taken now.
    pub fn used(&self) -> u64 {
        self.used.load(Relaxed)
    }

    /// Takes `amount` until the [`Charge`] is dropped. When it does not fit, this waits for what
    /// is being freed; then idle holdings that are charged to this budget (recyclable results) are
    /// freed.
    ///
    /// # Errors
    /// [`BudgetExceeded`] if it does not fit even so.
    pub fn try_reserve(self: &Arc<Self>, amount: u64) -> Result<Charge, BudgetExceeded> {
        self.reserve_or_reclaim(self, amount, |missing| (missing, 0))
    }

    /// As [`Self::try_reserve`], for one segment of `bytes` bytes.
    pub(crate) fn try_reserve_segment(
        self: &Arc<Self>,
        bytes: u64,
    ) -> Result<SegmentCharge, BudgetExceeded> {
        let place = match &self.segments {
            None => None,
            Some(segments) => Some(self.reserve_or_reclaim(segments, 1, |missing| (0, missing))?),
        };
        Ok(SegmentCharge {
            bytes: self.try_reserve(bytes)?,
            _place: place,
        })
    }

    pub(crate) fn add_reclaimer(&self, reclaimer: Weak<dyn Reclaim>) {
        let mut reclaimers = self.lock_reclaimers();
        reclaimers.retain(|known| known.strong_count() > 0);
        reclaimers.push(reclaimer);
    }

    /// `amount` of `budget`, which is this one or that of its segments. What is missing is asked back from
    /// the reclaimers, as (bytes, segments), for as long as they have something: others may be quicker to take it.
    fn reserve_or_reclaim(
        &self,
        budget: &Arc<Self>,
        amount: u64,
        to_reclaim: impl Fn(u64) -> (u64, u64),
    ) -> Result<Charge, BudgetExceeded> {
        loop {
            let exceeded = match self.reserve_when_freed(budget, amount) {
                Err(exceeded) if amount <= budget.limit => exceeded,
                result => return result,
            };
            let missing = amount.saturating_sub(budget.limit - exceeded.used);
            let (bytes, segments) = to_reclaim(missing);
            if !self.ask_to_reclaim(bytes, segments) {
                return self.reserve_when_freed(budget, amount);
            }
        }
    }

    /// `amount` of `budget`, as soon as what is being freed leaves room for it.
    fn reserve_when_freed(
        &self,
        budget: &Arc<Self>,
        amount: u64,
    ) -> Result<Charge, BudgetExceeded> {
        loop {
            let before = self.freeing.get().map(|freeing| (freeing, freeing.now()));
            let reserved = budget.reserve_now(amount);
            match before {
                Some((freeing, moment))
                    if reserved.is_err()
                        && amount <= budget.limit
                        && freeing.freed_since(moment) => {}
                _ => return reserved,
            }
        }
    }

    fn reserve_now(self: &Arc<Self>, amount: u64) -> Result<Charge, BudgetExceeded> {
        let fits = |used: u64| used.checked_add(amount).filter(|sum| *sum <= self.limit);
        match self.used.try_update(Relaxed, Relaxed, fits) {
            Ok(_) => Ok(Charge {
                budget: Arc::clone(self),
                amount,
            }),
            Err(used) => Err(BudgetExceeded {
                what: self.what,
                requested: amount,
                used,
                limit: self.limit,
            }),
        }
    }

    fn ask_to_reclaim(&self, bytes: u64, segments: u64) -> bool {
        let asked: Vec<_> = self
            .lock_reclaimers()
            .iter()
            .filter_map(Weak::upgrade)
            .collect();
        let mut any = false;
        for reclaimer in asked {
            any |= reclaimer.reclaim(bytes, segments);
        }
        any
    }

    fn lock_reclaimers(&self) -> std::sync::MutexGuard<'_, Vec<Weak<dyn Reclaim>>> {
        // A list of weak references is never left half-changed.
        self.reclaimers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for Budget {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Budget")
            .field("what", &self.what)
            .field("limit", &self.limit)
            .field("used", &self.used())
            .finish_non_exhaustive()
    }
}

/// A part of a [`Budget`], given back when dropped.
#[derive(Debug)]
pub struct Charge {
    budget: Arc<Budget>,
    amount: u64,
}

impl Charge {
    /// How much of the budget this holds.
    pub fn amount(&self) -> u64 {
        self.amount
    }

    /// Takes over what `other`, of the same budget, holds.
    ///
    /// # Panics
    /// If it is of another budget.
    pub fn absorb(&mut self, mut other: Charge) {
        assert!(
            Arc::ptr_eq(&self.budget, &other.budget),
            "charges of two budgets"
        );
        self.amount += std::mem::take(&mut other.amount);
    }
}

/// What one segment takes of a [`Budget`].
#[derive(Debug)]
pub(crate) struct SegmentCharge {
    bytes: Charge,
    _place: Option<Charge>,
}

impl SegmentCharge {
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes.amount
    }

    /// Drops `garbage`, which is what this was charged for.
    pub(crate) fn free<T: Send + 'static>(&self, garbage: T) {
        self.bytes.budget.free(self.bytes.amount, garbage);
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.budget.used.fetch_sub(self.amount, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_charge_is_given_back() {
        let budget = Budget::new("things", 10);
        let seven = budget.try_reserve(7).expect("7 of 10");
        assert_eq!(
            budget.try_reserve(4).expect_err("11 of 10").to_string(),
            "things: 4 more would exceed the budget of 10 by 1 (7 are in use); release what is no longer needed, or raise the budget"
        );
        drop(seven);
        assert_eq!(budget.used(), 0);
        assert_eq!(budget.try_reserve(10).expect("10 of 10").amount(), 10);
    }

    #[test]
    fn charges_become_one() {
        let budget = Budget::new("things", 10);
        let mut sum = budget.try_reserve(3).expect("3 of 10");
        sum.absorb(budget.try_reserve(4).expect("7 of 10"));
        assert_eq!((sum.amount(), budget.used()), (7, 7));
        drop(sum);
        assert_eq!(budget.used(), 0);
    }

    #[test]
    fn a_segment_takes_bytes_and_a_place() {
        let budget = Budget::for_segments(100, 2);
        let first = budget.try_reserve_segment(10).expect("the first of 2");
        assert!(budget.try_reserve_segment(91).is_err(), "101 of 100 bytes");
        let _second = budget
            .try_reserve_segment(90)
            .expect("a refused one leaves no place taken");
        assert_eq!(
            budget
                .try_reserve_segment(0)
                .expect_err("3 of 2")
                .to_string(),
            "segments: 1 more would exceed the budget of 2 by 1 (2 are in use); release what is no longer needed, or raise the budget"
        );
        drop(first);
        assert_eq!(budget.used(), 90);
        assert!(budget.try_reserve_segment(10).is_ok());
    }

    #[test]
    fn an_amount_near_the_largest_integer_does_not_wrap() {
        let budget = Budget::new("things", u64::MAX);
        let _one = budget.try_reserve(1).expect("1");
        assert!(budget.try_reserve(u64::MAX).is_err());
    }
}
