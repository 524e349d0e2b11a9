//! What a segment takes of a budget, for as long as its memory is not free.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::freeing::Held;
use crate::held::Holders;
use crate::{Budget, BudgetExceeded, Charge};

/// What one segment takes of a [`Budget`].
#[derive(Debug)]
pub(crate) struct SegmentCharge {
    bytes: Charge,
    place: Option<Charge>,
}

impl SegmentCharge {
    /// Of `budget`, for one segment of `bytes` bytes: see [`Budget::try_reserve`].
    pub(crate) fn reserve(budget: &Arc<Budget>, bytes: u64) -> Result<Self, BudgetExceeded> {
        let place = Self::place(budget)?;
        Ok(Self {
            bytes: budget.try_reserve(bytes)?,
            place,
        })
    }

    /// For one segment of the bytes that `bytes` holds, and leaves nothing there.
    pub(crate) fn of(bytes: &mut Charge) -> Result<Self, BudgetExceeded> {
        let place = Self::place(bytes.budget())?;
        Ok(Self {
            bytes: bytes.take(),
            place,
        })
    }

    fn place(budget: &Arc<Budget>) -> Result<Option<Charge>, BudgetExceeded> {
        let reserve = |places| budget.reserve_or_reclaim(places, 1, |missing| (0, missing));
        budget.segments().map(reserve).transpose()
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.bytes.amount()
    }

    /// The budget of bytes that this was reserved of.
    pub(crate) fn budget(&self) -> &Arc<Budget> {
        self.bytes.budget()
    }

    /// Whether `budget`, of bytes or of segments, has more room once this is gone.
    pub(crate) fn counts_in(&self, budget: &Budget) -> bool {
        let place = self.place.as_ref();
        self.bytes.counts_in(budget) || place.is_some_and(|place| place.counts_in(budget))
    }

    /// Leaves nothing here.
    pub(crate) fn take(&mut self) -> Self {
        Self {
            bytes: self.bytes.take(),
            place: self.place.as_mut().map(Charge::take),
        }
    }

    /// Keeps this until nobody has the file of `handed_out` open or mapped any more. (Where nothing is freed
    /// elsewhere, there is nobody to ask again, and this ends here.)
    pub(crate) fn keep_until_gone(self, handed_out: Arc<OwnedFd>) {
        let budget = Arc::clone(self.budget());
        if let Some(freeing) = budget.freeing()
            && let Some(holders) = Holders::of(handed_out)
        {
            let mut held = HeldSegment {
                holders,
                counted: HeldCount::new(self),
            };
            if held.is_held() {
                freeing.keep(Box::new(held));
            }
        }
    }

    /// Drops `garbage`, which is what this was charged for.
    pub(crate) fn free<T: Send + 'static>(&self, garbage: T) {
        self.budget().free(self.bytes(), garbage);
    }
}

/// A segment that the host itself has let go of, but for the descriptor to ask with.
struct HeldSegment {
    holders: Holders,
    // The pages go with the descriptor, and then they are not charged any more.
    counted: HeldCount,
}

impl Held<Budget> for HeldSegment {
    fn is_held(&mut self) -> bool {
        self.holders.are_any()
    }

    fn counts_in(&self, budget: &Budget) -> bool {
        self.counted.0.counts_in(budget)
    }
}

/// A charge for what others still have: counted as such, too.
struct HeldCount(SegmentCharge);

impl HeldCount {
    fn new(charge: SegmentCharge) -> Self {
        charge.budget().add_elsewhere(charge.bytes());
        Self(charge)
    }
}

impl Drop for HeldCount {
    fn drop(&mut self) {
        self.0.budget().remove_elsewhere(self.0.bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_segment_takes_bytes_and_a_place() {
        let budget = Budget::for_segments(100, 2);
        let first = SegmentCharge::reserve(&budget, 10).expect("the first of 2");
        assert!(
            SegmentCharge::reserve(&budget, 91).is_err(),
            "101 of 100 bytes"
        );
        let _second =
            SegmentCharge::reserve(&budget, 90).expect("a refused one leaves no place taken");
        assert_eq!(
            SegmentCharge::reserve(&budget, 0)
                .expect_err("3 of 2")
                .to_string(),
            "segments: 1 more would exceed the budget of 2 by 1 (2 are in use); release what is no longer needed, or raise the budget"
        );
        drop(first);
        assert_eq!(budget.used(), 90);
        assert!(SegmentCharge::reserve(&budget, 10).is_ok());
    }

    #[test]
    fn a_quota_takes_of_the_host_and_says_whose_limit_was_hit() {
        let host = Budget::for_segments(100, 3);
        let mine = host.child_for_segments(&"uid:1000".into(), 60, 2);
        let theirs = host.child_for_segments(&"uid:1001".into(), 60, 3);
        let first = SegmentCharge::reserve(&mine, 50).expect("50 of 60");
        let quota = SegmentCharge::reserve(&mine, 11).expect_err("61 of 60");
        assert!(quota.is_quota());
        assert_eq!(
            quota.to_string(),
            "segment bytes of uid:1000: 11 more would exceed its quota of 60 by 1 (50 are in use); release what is no longer needed, or ask the operator to raise the quota"
        );
        let second = SegmentCharge::reserve(&theirs, 50).expect("100 of 100");
        let budget = SegmentCharge::reserve(&theirs, 1).expect_err("101 of 100");
        assert!(!budget.is_quota());
        assert_eq!(
            (budget.limit, budget.used, theirs.used(), host.used()),
            (100, 100, 50, 100)
        );
        assert_eq!(
            (mine.refused(), theirs.refused(), host.refused()),
            (1, 0, 1)
        );
        drop((first, second));
        let _two = [(); 2].map(|()| SegmentCharge::reserve(&mine, 1).expect("2 of 2"));
        let places = SegmentCharge::reserve(&mine, 1).expect_err("3 of 2 segments");
        assert_eq!((places.what, places.is_quota()), ("segments", true));
        assert_eq!((host.used(), host.peak(), mine.peak()), (2, 100, 50));
    }
}
