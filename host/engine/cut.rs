//! Where a job's rows are cut into slices. Numbers only.
//!
//! ```text
//! rows 0 ───────────┬─────────────────┬───────────▶ rows          of each tensor that is cut
//!                   └─ at 2 MiB, or else 64 KiB, in all of them
//! ```
//! A slice's tensors are windows like any others: each starts at a guest page of its file, and moves with whole page tables
//! where that is a multiple of 2 MiB.

use std::ops::Range;

use strait_memory::{GUEST_PAGE, HUGE};

/// Most bytes of the tensors of one slice that are cut, where they do not all fit one guest.
const SLICE_BYTES_MAX: u64 = 1 << 30;
/// Most slices of one job.
const SLICES_MAX: u64 = 1 << 12;

/// What is to be cut.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Tensors {
    /// Of each tensor that is cut.
    pub(super) rows: u64,
    /// Bytes of one row of each.
    pub(super) row_bytes: Vec<u64>,
    /// Bytes of what comes whole with every slice.
    pub(super) whole_bytes: u64,
    /// Cuts fall on multiples of so many rows.
    pub(super) multiple: u64,
}

/// How many slices there are to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Wanted {
    /// As many as that, if they can be cut so.
    pub(super) slices: u64,
    /// Bytes of tensors that one guest can have.
    pub(super) guest_bytes: u64,
}

impl Tensors {
    /// Bytes of all of them together.
    pub(super) fn bytes(&self) -> u64 {
        self.cut_bytes().saturating_add(self.whole_bytes)
    }

    /// Bytes of those that are cut.
    pub(super) fn cut_bytes(&self) -> u64 {
        self.row().saturating_mul(self.rows)
    }

    /// Bytes of the largest of those that are cut.
    pub(super) fn largest(&self) -> u64 {
        let row = self.row_bytes.iter().max().copied().unwrap_or(0);
        row.saturating_mul(self.rows)
    }

    fn row(&self) -> u64 {
        let row_bytes = self.row_bytes.iter();
        row_bytes.fold(0, |sum, bytes| sum.saturating_add(*bytes))
    }

    /// The rows of each slice, or none if there is to be one, or cannot be more.
    pub(super) fn cut(&self, wanted: Wanted) -> Option<Vec<Range<u64>>> {
        let row = self.row();
        if row == 0 || self.rows == 0 {
            return None;
        }
        let room = wanted.guest_bytes.checked_sub(self.whole_bytes)?;
        let fits = self.cut_bytes() <= room;
        let most = match fits {
            // Whoever asks for no more than one gets one.
            true => u64::MAX,
            false => room.min(SLICE_BYTES_MAX) / row,
        };
        let least = self.rows.div_ceil(most.max(1));
        let even = self.rows.div_ceil(wanted.slices.max(least));
        // What is not cut into whole page tables moves more slowly, but slices of different sizes wait for the largest.
        let even_enough = |each: &u64| *each <= even + even / 4;
        let by = |align| self.each(align, even, most);
        let each = by(HUGE).filter(even_enough).or_else(|| by(GUEST_PAGE))?;
        let count = self.rows.div_ceil(each);
        if !(2..=SLICES_MAX).contains(&count) {
            return None;
        }
        let starts = (0..count).map(|index| index * each);
        let ranges = starts.map(|start| start..(start + each).min(self.rows));
        Some(ranges.collect())
    }

    /// Rows of one slice: `even` or a few more, at most `most`, so that all tensors are cut at multiples of `align`.
    fn each(&self, align: u64, even: u64, most: u64) -> Option<u64> {
        // All are powers of two: the largest is a multiple of the others.
        let granules = self
            .row_bytes
            .iter()
            .map(|bytes| align / gcd(*bytes, align));
        let granule = granules.max()?;
        let multiple = self.multiple.max(1);
        let granule = (multiple / gcd(multiple, granule)).checked_mul(granule)?;
        let up = even.checked_next_multiple_of(granule)?;
        let each = match up <= most {
            true => up,
            false => most / granule * granule,
        };
        (each > 0).then_some(each)
    }
}

/// The greatest number that divides both; `b` is not 0.
fn gcd(a: u64, b: u64) -> u64 {
    let (mut a, mut b) = (a, b);
    while a != 0 {
        (a, b) = (b % a, a);
    }
    b
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MIB: u64 = 1 << 20;

    fn tensors(rows: u64, row_bytes: &[u64]) -> Tensors {
        Tensors {
            rows,
            row_bytes: row_bytes.to_vec(),
            whole_bytes: 0,
            multiple: 1,
        }
    }

    fn wanted(slices: u64) -> Wanted {
        Wanted {
            slices,
            guest_bytes: u64::MAX,
        }
    }

    #[test]
    fn large_tensors_are_cut_at_2_mib() {
        let rows = 100 * MIB / 8;
        let cut = tensors(rows, &[8, 8]).cut(wanted(2));
        let at = 50 * MIB / 8;
        assert_eq!(cut, Some(vec![0..at, at..rows]));
        // Of the narrower one, too.
        let cut = tensors(rows, &[8, 2]).cut(wanted(2));
        let at = 56 * MIB / 8;
        assert_eq!(cut, Some(vec![0..at, at..rows]));
    }

    #[test]
    fn small_ones_at_guest_pages_and_tiny_ones_not_at_all() {
        let cut = tensors(100_003, &[8]).cut(wanted(3));
        assert_eq!(cut, Some(vec![0..40_960, 40_960..81_920, 81_920..100_003]));
        assert_eq!(tensors(8192, &[8, 8]).cut(wanted(7)), None);
        // Rows of an odd number of bytes.
        assert_eq!(tensors(65_536, &[3]).cut(wanted(2)), None);
        assert_eq!(
            tensors(65_537, &[3]).cut(wanted(2)),
            Some(vec![0..65_536, 65_536..65_537])
        );
        assert_eq!(tensors(1000, &[0]).cut(wanted(2)), None);
        assert_eq!(tensors(0, &[8]).cut(wanted(2)), None);
    }

    #[test]
    fn what_does_not_fit_one_guest_is_cut_until_it_does() {
        let guest_bytes = 4 * MIB;
        let one = Wanted {
            slices: 1,
            guest_bytes,
        };
        let mut ten = tensors(10 * MIB / 8, &[8, 8]);
        let cut = ten.cut(one).expect("it can be cut");
        assert_eq!((cut.len(), cut[0].clone()), (5, 0..2 * MIB / 8));
        ten.whole_bytes = 3 * MIB;
        assert_eq!(ten.cut(one).expect("it can be cut").len(), 20);
        ten.whole_bytes = 4 * MIB;
        assert_eq!(ten.cut(one), None);
        ten.whole_bytes = 5 * MIB;
        assert_eq!(ten.cut(one), None);
        // A row that is too large for one.
        assert_eq!(tensors(2, &[5 * MIB]).cut(one), None);
    }

    proptest! {
        #[test]
        fn slices_are_all_rows_in_order_and_start_at_guest_pages(
            rows in 0..5_000_000_u64,
            row_bytes in prop::collection::vec(prop_oneof![Just(0), Just(1), Just(8), Just(2048), 0..20_000_u64], 1..4),
            multiple in prop_oneof![Just(1), 1..5000_u64],
            slices in 1..9_u64,
            guest_bytes in prop_oneof![Just(u64::MAX), 1..100 * MIB],
        ) {
            let tensors = Tensors { multiple, ..tensors(rows, &row_bytes) };
            let Some(cut) = tensors.cut(Wanted { slices, guest_bytes }) else { return Ok(()) };
            prop_assert!(cut.len() > 1);
            let bytes: u64 = row_bytes.iter().map(|bytes| bytes * rows).sum();
            prop_assert!(bytes > guest_bytes || cut.len() as u64 <= slices);
            prop_assert_eq!((cut[0].start, cut[cut.len() - 1].end), (0, rows));
            for pair in cut.windows(2) {
                prop_assert_eq!(pair[0].end, pair[1].start);
            }
            for slice in &cut {
                prop_assert!(slice.start < slice.end && slice.start.is_multiple_of(multiple));
                let bytes: u64 = row_bytes.iter().map(|bytes| bytes * (slice.end - slice.start)).sum();
                prop_assert!(bytes <= guest_bytes);
                for bytes in &row_bytes {
                    prop_assert!((bytes * slice.start).is_multiple_of(GUEST_PAGE));
                }
            }
        }
    }
}
