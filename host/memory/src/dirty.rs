//! Which bytes of a recycled segment may be other than zero.
//!
//! A result is padded with zeros up to whole pages. Most of that padding is zero already, and
//! zeroing it again would be most of what a small result costs.

use std::ops::Range;

/// More ranges than this are merged into one around all of them.
const RANGES_MAX: usize = 8;

/// Ranges in order that do not touch.
#[derive(Debug, Default)]
pub(crate) struct Dirty(Vec<Range<usize>>);

impl Dirty {
    /// `range` may have been written.
    pub(crate) fn add(&mut self, mut range: Range<usize>) {
        if range.is_empty() {
            return;
        }
        self.0.retain(|known| {
            let apart = known.end < range.start || range.end < known.start;
            if !apart {
                range = range.start.min(known.start)..range.end.max(known.end);
            }
            apart
        });
        let at = self.0.partition_point(|known| known.start < range.start);
        self.0.insert(at, range);
        if self.0.len() > RANGES_MAX {
            let hull = self.0[0].start..self.0[RANGES_MAX].end;
            self.0.clear();
            self.0.push(hull);
        }
    }

    /// What of it is in `range`, counted from there.
    pub(crate) fn part(&self, range: Range<usize>) -> Self {
        let mut part = Self::default();
        for known in &self.0 {
            let (start, end) = (known.start.max(range.start), known.end.min(range.end));
            if start < end {
                part.add(start - range.start..end - range.start);
            }
        }
        part
    }

    /// Adds what `other` counts from `offset` on.
    pub(crate) fn append(&mut self, other: Self, offset: usize) {
        for known in other.0 {
            self.add(known.start + offset..known.end + offset);
        }
    }

    /// The parts of `range` that may be other than zero; they count as zero from now on.
    pub(crate) fn take(&mut self, range: Range<usize>) -> Vec<Range<usize>> {
        if range.is_empty()
            || self
                .0
                .iter()
                .all(|known| known.end <= range.start || range.end <= known.start)
        {
            return Vec::new();
        }
        let mut taken = Vec::new();
        let mut rest = Vec::with_capacity(self.0.len() + 1);
        for known in self.0.drain(..) {
            let part = known.start.max(range.start)..known.end.min(range.end);
            if part.is_empty() {
                rest.push(known);
                continue;
            }
            rest.extend(
                [known.start..part.start, part.end..known.end]
                    .into_iter()
                    .filter(|r| !r.is_empty()),
            );
            taken.push(part);
        }
        self.0 = rest;
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BYTES: usize = 64;

    fn range() -> impl Strategy<Value = Range<usize>> {
        (0..=BYTES, 0..=BYTES).prop_map(|(a, b)| a.min(b)..a.max(b))
    }

    proptest! {
        #[test]
        fn no_written_byte_is_missed(steps in proptest::collection::vec((any::<bool>(), range()), 0..60)) {
            let (mut dirty, mut written) = (Dirty::default(), [false; BYTES]);
            for (write, range) in steps {
                if write {
                    written[range.clone()].fill(true);
                    dirty.add(range);
                } else {
                    for part in dirty.take(range.clone()) {
                        prop_assert!(range.start <= part.start && part.end <= range.end && !part.is_empty());
                        written[part].fill(false);
                    }
                    prop_assert!(written[range].iter().all(|written| !written));
                }
                let covered = |at: &usize| dirty.0.iter().any(|known| known.contains(at));
                prop_assert!((0..BYTES).filter(|at| written[*at]).all(|at| covered(&at)));
                prop_assert!(dirty.0.windows(2).all(|pair| pair[0].end <= pair[1].start));
                prop_assert!(dirty.0.len() <= RANGES_MAX + 1);
            }
        }
    }

    #[test]
    fn parts_are_what_the_whole_was() {
        let mut dirty = Dirty::default();
        dirty.add(10..20);
        dirty.add(40..50);
        let (front, back) = (dirty.part(0..44), dirty.part(44..64));
        assert_eq!(
            (front.0.as_slice(), back.0.len()),
            (&[10..20, 40..44][..], 1)
        );
        let mut joined = front;
        joined.append(back, 44);
        assert_eq!(joined.0, dirty.0);
    }

    #[test]
    fn what_is_clean_is_left_alone() {
        let mut dirty = Dirty::default();
        dirty.add(10..20);
        dirty.add(40..50);
        dirty.add(20..22);
        assert_eq!(dirty.take(0..10), []);
        assert_eq!(dirty.take(15..45), [15..22, 40..45]);
        assert_eq!(dirty.take(0..64), [10..15, 45..50]);
        assert_eq!(dirty.take(0..64), []);
    }
}
