//! How much of something may be held at once: segment bytes, mappings, leases. By the host in all, and of
//! that by each principal.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, OnceLock, Weak};

use parking_lot::{Mutex, MutexGuard};

use crate::freeing::Freeing;

/// From this size on it is worth a wake-up to free something elsewhere: about a millisecond.
const FREED_ELSEWHERE_MIN: u64 = 8 << 20;

/// Something that can give up idle holdings when a budget is full.
pub(crate) trait Reclaim: Send + Sync {
    /// Lets go of idle segments that are [charged to](Charge::counts_in) `full`: at least `bytes` of them
    /// and at least `segments` of them, if there are as many. False if there were none.
    fn reclaim(&self, full: &Budget, bytes: u64, segments: u64) -> bool;
}

/// A limit, and how much of it is taken. A [child](Self::child) is one principal's part of its parent: what it
/// takes counts in both.
pub struct Budget {
    what: &'static str,
    // The principal that this is the quota of. None for the host's own.
    whose: Option<Arc<str>>,
    limit: AtomicU64,
    used: AtomicU64,
    peak: AtomicU64,
    refused: AtomicU64,
    parent: Option<Arc<Budget>>,
    // Part of `used`.
    elsewhere_segments: AtomicU64,
    elsewhere_bytes: AtomicU64,
    // How many segments may share this one. None: as many as fit.
    segments: Option<Arc<Budget>>,
    // Unset: everything is freed where it is let go of. Only the host's own has one.
    freeing: OnceLock<Freeing<Self>>,
    // Taken only after a reservation failed, and never while another lock of this crate is
    // held: a reclaimer takes its own lock and drops `Charge`s. Only the host's own has any.
    reclaimers: Mutex<Vec<Weak<dyn Reclaim>>>,
}

/// A reservation did not fit.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{}: {requested} more would exceed {} of {limit} by {} ({used} are in use); release what is no longer needed, or {}",
    self.subject(),
    if self.is_quota() { "its quota" } else { "the budget" },
    (u128::from(*used) + u128::from(*requested)).saturating_sub(u128::from(*limit)),
    if self.is_quota() { "ask the operator to raise the quota" } else { "raise the budget" },
)]
pub struct BudgetExceeded {
    /// What is counted, with its unit: "segment bytes".
    pub what: &'static str,
    /// Whose quota is full. None: the host's own budget is.
    pub whose: Option<Arc<str>>,
    /// How much was asked for.
    pub requested: u64,
    /// How much was taken at that moment.
    pub used: u64,
    /// The most that may be taken.
    pub limit: u64,
}

impl BudgetExceeded {
    /// True if a principal's quota is full, false if the host's own budget is.
    pub fn is_quota(&self) -> bool {
        self.whose.is_some()
    }

    fn subject(&self) -> String {
        match &self.whose {
            Some(whose) => format!("{} of {whose}", self.what),
            None => self.what.to_owned(),
        }
    }
}

/// Which budget had no room, of the one that was asked and its parent.
struct Full {
    budget: Arc<Budget>,
    used: u64,
    limit: u64,
}

impl Budget {
    /// A budget of `limit`; `what` says in errors what is counted, with its unit.
    pub fn new(what: &'static str, limit: u64) -> Arc<Self> {
        Arc::new(Self::limited(what, limit, None))
    }

    /// A budget of `bytes` for at most `segments` segments: each of them holds a descriptor,
    /// used or idle.
    pub fn for_segments(bytes: u64, segments: u64) -> Arc<Self> {
        let segments = Self::new("segments", segments);
        Arc::new(Self::limited("segment bytes", bytes, Some(segments)))
    }

    /// The part of this budget that `whose` (a principal) may take: at most `limit`.
    pub fn child(self: &Arc<Self>, whose: &Arc<str>, limit: u64) -> Arc<Self> {
        self.child_for_segments(whose, limit, u64::MAX)
    }

    /// As [`Self::child`], of a budget [for segments](Self::for_segments): at most `segments` of them.
    pub fn child_for_segments(
        self: &Arc<Self>,
        whose: &Arc<str>,
        bytes: u64,
        segments: u64,
    ) -> Arc<Self> {
        let places = self.segments.as_ref();
        let places = places.map(|places| places.child(whose, segments));
        Arc::new(Self {
            whose: Some(Arc::clone(whose)),
            parent: Some(Arc::clone(self)),
            ..Self::limited(self.what, bytes, places)
        })
    }

    fn limited(what: &'static str, limit: u64, segments: Option<Arc<Self>>) -> Self {
        Self {
            what,
            whose: None,
            limit: AtomicU64::new(limit),
            used: AtomicU64::new(0),
            peak: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            parent: None,
            elsewhere_segments: AtomicU64::new(0),
            elsewhere_bytes: AtomicU64::new(0),
            segments,
            freeing: OnceLock::new(),
            reclaimers: Mutex::new(Vec::new()),
        }
    }

    /// From now on what is big, and charged to this or a child of it, is freed on a thread of its own.
    ///
    /// # Errors
    /// If Linux gives no thread.
    pub fn free_elsewhere(&self) -> io::Result<()> {
        // A second thread, if somebody was quicker, ends at once.
        let _ = self.root().freeing.set(Freeing::start()?);
        Ok(())
    }

    /// Drops `garbage`, which holds up to `bytes` bytes: here, or elsewhere if that takes long.
    pub fn free<T: Send + 'static>(&self, bytes: u64, garbage: T) {
        match self.freeing() {
            Some(freeing) if bytes >= FREED_ELSEWHERE_MIN => freeing.free(Box::new(garbage)),
            _ => drop(garbage),
        }
    }

    /// Drops `garbage`, which waits for another process: not here, if there is a thread for it.
    pub fn free_slowly<T: Send + 'static>(&self, garbage: T) {
        match self.freeing() {
            Some(freeing) => freeing.free(Box::new(garbage)),
            None => drop(garbage),
        }
    }

    /// Whether `bytes` more would fit without waiting for what is being freed, or freeing idle
    /// segments first.
    pub fn has_room(&self, bytes: u64) -> bool {
        self.chain().all(|budget| {
            let places = budget.segments.as_ref();
            bytes <= budget.limit().saturating_sub(budget.used())
                && places.is_none_or(|places| places.used() < places.limit())
        })
    }

    /// The most that may be taken.
    pub fn limit(&self) -> u64 {
        self.limit.load(Relaxed)
    }

    /// Changes the most that may be taken from now on. What is taken already stays.
    pub fn set_limit(&self, limit: u64) {
        self.limit.store(limit, Relaxed);
    }

    /// How much is taken now.
    pub fn used(&self) -> u64 {
        self.used.load(Relaxed)
    }

    /// The most that was taken at once since the start.
    pub fn peak(&self) -> u64 {
        self.peak.load(Relaxed)
    }

    /// How many reservations this one had no room for.
    pub fn refused(&self) -> u64 {
        self.refused.load(Relaxed)
    }

    /// What of it the host itself has let go of, and somebody else still has open or mapped.
    pub fn elsewhere(&self) -> Elsewhere {
        Elsewhere {
            segments: self.elsewhere_segments.load(Relaxed),
            bytes: self.elsewhere_bytes.load(Relaxed),
        }
    }

    /// How many segments share this one, if it counts them.
    pub fn segments(&self) -> Option<&Arc<Budget>> {
        self.segments.as_ref()
    }

    /// Takes `amount`, here and of the parent, until the [`Charge`] is dropped. When it does not fit, this waits
    /// for what is being freed; then idle holdings that are charged to the full budget (recyclable results) are
    /// freed: a principal whose quota is full loses its own, a full host anybody's.
    ///
    /// # Errors
    /// [`BudgetExceeded`] if it does not fit even so.
    pub fn try_reserve(self: &Arc<Self>, amount: u64) -> Result<Charge, BudgetExceeded> {
        self.reserve_or_reclaim(self, amount, |missing| (missing, 0))
    }

    pub(crate) fn add_reclaimer(&self, reclaimer: Weak<dyn Reclaim>) {
        let mut reclaimers = self.lock_reclaimers();
        reclaimers.retain(|known| known.strong_count() > 0);
        reclaimers.push(reclaimer);
    }

    /// `amount` of `budget`, which is this one or that of its segments. What is missing is asked back from
    /// the reclaimers, as (bytes, segments), for as long as they have something: others may be quicker to take it.
    pub(crate) fn reserve_or_reclaim(
        &self,
        budget: &Arc<Self>,
        amount: u64,
        to_reclaim: impl Fn(u64) -> (u64, u64),
    ) -> Result<Charge, BudgetExceeded> {
        loop {
            let full = match self.reserve_when_freed(budget, amount) {
                Ok(charge) => return Ok(charge),
                Err(full) => full,
            };
            let missing = amount.saturating_sub(full.limit.saturating_sub(full.used));
            let (bytes, segments) = to_reclaim(missing);
            let may_fit = amount <= full.limit;
            if may_fit && self.free_gone(&full.budget) {
                continue;
            }
            if !may_fit || !self.root().ask_to_reclaim(&full.budget, bytes, segments) {
                return self
                    .reserve_when_freed(budget, amount)
                    .map_err(|full| full.refuse(amount));
            }
        }
    }

    /// `amount` of `budget`, as soon as what is being freed leaves room for it.
    fn reserve_when_freed(&self, budget: &Arc<Self>, amount: u64) -> Result<Charge, Full> {
        let freeing = self.freeing();
        loop {
            let before = freeing.map(|freeing| (freeing, freeing.now()));
            match (budget.reserve_now(amount), before) {
                (Err(full), Some((freeing, moment)))
                    if amount <= full.limit && freeing.freed_since(moment) => {}
                (reserved, _) => return reserved,
            }
        }
    }

    /// Takes `amount` of this one and all above it, or of none.
    fn reserve_now(self: &Arc<Self>, amount: u64) -> Result<Charge, Full> {
        // From here upwards, so that a full quota never takes room from others, not for an instant.
        let mut budget = self;
        loop {
            if let Err(full) = budget.take(amount) {
                for taken in self
                    .chain()
                    .take_while(|taken| !std::ptr::eq(*taken, &**budget))
                {
                    taken.used.fetch_sub(amount, Relaxed);
                }
                return Err(full);
            }
            match &budget.parent {
                Some(parent) => budget = parent,
                None => break,
            }
        }
        Ok(Charge {
            budget: Arc::clone(self),
            amount,
        })
    }

    fn take(self: &Arc<Self>, amount: u64) -> Result<(), Full> {
        let limit = self.limit();
        let fits = |used: u64| used.checked_add(amount).filter(|sum| *sum <= limit);
        match self.used.try_update(Relaxed, Relaxed, fits) {
            Ok(before) => {
                self.peak.fetch_max(before + amount, Relaxed);
                Ok(())
            }
            Err(used) => Err(Full {
                budget: Arc::clone(self),
                used,
                limit,
            }),
        }
    }

    /// Frees what was open elsewhere and is not any more. False if there is none of it.
    fn free_gone(&self, full: &Budget) -> bool {
        let freeing = self.freeing();
        freeing.is_some_and(|freeing| freeing.free_gone(full))
    }

    fn ask_to_reclaim(&self, full: &Budget, bytes: u64, segments: u64) -> bool {
        let asked: Vec<_> = self
            .lock_reclaimers()
            .iter()
            .filter_map(Weak::upgrade)
            .collect();
        let mut any = false;
        for reclaimer in asked {
            any |= reclaimer.reclaim(full, bytes, segments);
        }
        any
    }

    /// This one, its parent, and so on up to the host's own.
    fn chain(&self) -> impl Iterator<Item = &Budget> {
        std::iter::successors(Some(self), |budget| budget.parent.as_deref())
    }

    /// Where what is charged to this is freed, if not where it is let go of.
    pub(crate) fn freeing(&self) -> Option<&Freeing<Self>> {
        self.root().freeing.get()
    }

    /// Counts a segment of `bytes` bytes as held [elsewhere](Self::elsewhere).
    pub(crate) fn add_elsewhere(&self, bytes: u64) {
        for budget in self.chain() {
            budget.elsewhere_segments.fetch_add(1, Relaxed);
            budget.elsewhere_bytes.fetch_add(bytes, Relaxed);
        }
    }

    /// Takes [`Self::add_elsewhere`] back.
    pub(crate) fn remove_elsewhere(&self, bytes: u64) {
        for budget in self.chain() {
            budget.elsewhere_segments.fetch_sub(1, Relaxed);
            budget.elsewhere_bytes.fetch_sub(bytes, Relaxed);
        }
    }

    fn root(&self) -> &Budget {
        self.chain().last().unwrap_or(self)
    }

    fn lock_reclaimers(&self) -> MutexGuard<'_, Vec<Weak<dyn Reclaim>>> {
        self.reclaimers.lock()
    }
}

/// Counts of segments that others still have open or mapped after the host has let go of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Elsewhere {
    /// How many.
    pub segments: u64,
    /// Their bytes.
    pub bytes: u64,
}

impl Full {
    fn refuse(self, requested: u64) -> BudgetExceeded {
        self.budget.refused.fetch_add(1, Relaxed);
        BudgetExceeded {
            what: self.budget.what,
            whose: self.budget.whose.clone(),
            requested,
            used: self.used,
            limit: self.limit,
        }
    }
}

impl std::fmt::Debug for Budget {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Budget")
            .field("what", &self.what)
            .field("whose", &self.whose)
            .field("limit", &self.limit())
            .field("used", &self.used())
            .finish_non_exhaustive()
    }
}

/// A part of a [`Budget`] and of its parent, given back when dropped.
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

    /// Gives back what it holds beyond `amount`.
    pub(crate) fn reduce(&mut self, amount: u64) {
        let more = self.amount.saturating_sub(amount);
        self.amount -= more;
        drop(Self {
            budget: Arc::clone(&self.budget),
            amount: more,
        });
    }

    /// Leaves nothing here.
    pub(crate) fn take(&mut self) -> Self {
        Self {
            budget: Arc::clone(&self.budget),
            amount: std::mem::take(&mut self.amount),
        }
    }

    pub(crate) fn budget(&self) -> &Arc<Budget> {
        &self.budget
    }

    /// Whether `budget` has more room once this is given back.
    pub(crate) fn counts_in(&self, budget: &Budget) -> bool {
        self.budget.chain().any(|known| std::ptr::eq(known, budget))
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        for budget in self.budget.chain() {
            budget.used.fetch_sub(self.amount, Relaxed);
        }
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
    fn an_amount_near_the_largest_integer_does_not_wrap() {
        let budget = Budget::new("things", u64::MAX);
        let _one = budget.try_reserve(1).expect("1");
        assert!(budget.try_reserve(u64::MAX).is_err());
    }

    #[test]
    fn a_limit_below_what_is_used_refuses_only_what_is_new() {
        let budget = Budget::new("leases", 10).child(&"uid:7".into(), 10);
        let held = budget.try_reserve(8).expect("8 of 10");
        budget.set_limit(3);
        let error = budget.try_reserve(1).expect_err("9 of 3");
        assert_eq!(
            error.to_string(),
            "leases of uid:7: 1 more would exceed its quota of 3 by 6 (8 are in use); release what is no longer needed, or ask the operator to raise the quota"
        );
        assert!(!budget.has_room(1));
        drop(held);
        assert!(budget.try_reserve(3).is_ok());
    }

    proptest::proptest! {
        /// Reserving, giving back and changing limits at random: the host's budget is the sum of its children.
        #[test]
        fn the_host_holds_the_sum_of_its_children(
            steps in proptest::collection::vec((0..3_usize, 0..5_u8, 0..40_u64), 1..200)
        ) {
            let host = Budget::new("things", 100);
            let children: Vec<_> = (0..3)
                .map(|uid| host.child(&format!("uid:{uid}").into(), 50))
                .collect();
            let mut held: Vec<Vec<Charge>> = (0..3).map(|_| Vec::new()).collect();
            for (child, step, amount) in steps {
                let sums: Vec<u64> = held
                    .iter()
                    .map(|charges| charges.iter().map(Charge::amount).sum())
                    .collect();
                let all: u64 = sums.iter().sum();
                match step {
                    0 => drop(held[child].pop()),
                    1 => children[child].set_limit(amount * 2),
                    _ => {
                        let fits_child = sums[child] + amount <= children[child].limit();
                        match children[child].try_reserve(amount) {
                            Ok(charge) => {
                                proptest::prop_assert!(fits_child && all + amount <= 100);
                                held[child].push(charge);
                            }
                            Err(error) => {
                                proptest::prop_assert_eq!(error.is_quota(), !fits_child);
                                proptest::prop_assert!(!fits_child || all + amount > 100);
                            }
                        }
                    }
                }
                let sum: u64 = children.iter().map(|child| child.used()).sum();
                let expected: u64 = held.iter().flatten().map(Charge::amount).sum();
                proptest::prop_assert_eq!((sum, host.used()), (expected, expected));
            }
            drop(held);
            proptest::prop_assert_eq!(host.used(), 0);
        }
    }
}
