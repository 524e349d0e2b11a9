//! How much of something the host may hold at once: segment bytes, or mappings.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// Something that can give up idle holdings when a budget is full.
pub(crate) trait Reclaim: Send + Sync {
    /// Frees idle holdings that are charged to the budget, at least `amount` if it has as much.
    fn reclaim(&self, amount: u64);
}

/// A limit, and how much of it is taken.
pub struct Budget {
    what: &'static str,
    limit: u64,
    used: AtomicU64,
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
        Arc::new(Self {
            what,
            limit,
            used: AtomicU64::new(0),
            reclaimers: Mutex::new(Vec::new()),
        })
    }

    /// The most that may be taken.
    pub fn limit(&self) -> u64 {
        self.limit
    }

    /// How much is taken now.
    pub fn used(&self) -> u64 {
        self.used.load(Relaxed)
    }

    /// Takes `amount` until the [`Charge`] is dropped. When it does not fit, idle holdings
    /// that are charged to this budget (recyclable results) are freed first.
    ///
    /// # Errors
    /// [`BudgetExceeded`] if it does not fit even so.
    pub fn try_reserve(self: &Arc<Self>, amount: u64) -> Result<Charge, BudgetExceeded> {
        match self.reserve_now(amount) {
            Err(exceeded) if amount <= self.limit => {
                let missing = amount.saturating_sub(self.limit - exceeded.used);
                self.ask_to_reclaim(missing);
                self.reserve_now(amount)
            }
            result => result,
        }
    }

    pub(crate) fn add_reclaimer(&self, reclaimer: Weak<dyn Reclaim>) {
        let mut reclaimers = self.lock_reclaimers();
        reclaimers.retain(|known| known.strong_count() > 0);
        reclaimers.push(reclaimer);
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

    fn ask_to_reclaim(&self, amount: u64) {
        let asked: Vec<_> = self
            .lock_reclaimers()
            .iter()
            .filter_map(Weak::upgrade)
            .collect();
        for reclaimer in asked {
            reclaimer.reclaim(amount);
        }
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
    fn an_amount_near_the_largest_integer_does_not_wrap() {
        let budget = Budget::new("things", u64::MAX);
        let _one = budget.try_reserve(1).expect("1");
        assert!(budget.try_reserve(u64::MAX).is_err());
    }
}
