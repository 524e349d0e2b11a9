//! What is in a tensor, for people: least and greatest, mean, a histogram.

use crate::Dtype;
use crate::element::{Element, for_each};

/// A number as exact as its dtype: integers do not go through floats.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Number {
    /// Of an integer or `bool8` tensor.
    Integer(i128),
    /// Of any other.
    Real(f64),
}

impl Number {
    /// The nearest float.
    #[must_use]
    #[expect(
        clippy::cast_precision_loss,
        reason = "the nearest float is what is asked for"
    )]
    pub fn to_f64(self) -> f64 {
        match self {
            Number::Integer(integer) => integer as f64,
            Number::Real(real) => real,
        }
    }
}

/// Counts of a tensor's elements. Truth values count as 0 and 1, a complex number as its magnitude.
#[derive(Debug, Clone)]
pub struct Statistics {
    dtype: Dtype,
    count: u64,
    nan: u64,
    infinite: u64,
    /// Of all that is not NaN.
    range: Option<(Number, Number)>,
    /// Of all that is finite.
    finite: Option<(f64, f64)>,
    sum: f64,
}

impl Statistics {
    /// Of no elements so far.
    #[must_use]
    pub fn new(dtype: Dtype) -> Statistics {
        Statistics {
            dtype,
            count: 0,
            nan: 0,
            infinite: 0,
            range: None,
            finite: None,
            sum: 0.0,
        }
    }

    /// Counts whole little-endian elements in. The order of calls does not matter but to the last digits of the mean.
    pub fn add(&mut self, bytes: &[u8]) {
        // Sums of parts lose less than one long sum.
        for part in bytes.chunks(1 << 16) {
            self.add_part(part);
        }
    }

    fn add_part(&mut self, bytes: &[u8]) {
        let (mut low, mut high) = (i128::MAX, i128::MIN);
        let (mut least, mut greatest) = (f64::INFINITY, f64::NEG_INFINITY);
        let (mut sum, mut integer_sum) = (0.0, 0_i128);
        let (mut reals, mut integers, mut nan, mut infinite) = (0_u64, 0_u64, 0_u64, 0_u64);
        for_each(self.dtype, bytes, |element| match scalar(element) {
            Number::Integer(integer) => {
                integers += 1;
                low = low.min(integer);
                high = high.max(integer);
                integer_sum += integer;
            }
            Number::Real(real) if real.is_finite() => {
                reals += 1;
                least = least.min(real);
                greatest = greatest.max(real);
                sum += real;
            }
            Number::Real(real) if real.is_nan() => nan += 1,
            Number::Real(real) => {
                infinite += 1;
                let ends = (Number::Real(real), Number::Real(real));
                self.range = Some(self.range.map_or(ends, |range| hull(range, ends)));
            }
        });
        self.count += integers + reals + nan + infinite;
        self.nan += nan;
        self.infinite += infinite;
        let ends = match (integers, reals) {
            (0, 0) => return,
            (0, _) => (Number::Real(least), Number::Real(greatest)),
            _ => (Number::Integer(low), Number::Integer(high)),
        };
        self.sum += sum + Number::Integer(integer_sum).to_f64();
        self.range = Some(self.range.map_or(ends, |range| hull(range, ends)));
        let (least, greatest) = (ends.0.to_f64(), ends.1.to_f64());
        self.finite = Some(self.finite.map_or((least, greatest), |(low, high)| {
            (low.min(least), high.max(greatest))
        }));
    }

    /// Elements.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Elements that are not a number; complex ones of which a part is none.
    #[must_use]
    pub fn nan(&self) -> u64 {
        self.nan
    }

    /// Elements that are infinite.
    #[must_use]
    pub fn infinite(&self) -> u64 {
        self.infinite
    }

    /// The least and the greatest of all that is not NaN, infinities included.
    #[must_use]
    pub fn range(&self) -> Option<(Number, Number)> {
        self.range
    }

    /// The mean of the finite elements.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "a mean is rounded anyway")]
    pub fn mean(&self) -> Option<f64> {
        let finite = self.count - self.nan - self.infinite;
        (finite > 0).then(|| self.sum / finite as f64)
    }
}

fn hull(one: (Number, Number), other: (Number, Number)) -> (Number, Number) {
    let least = |a: Number, b: Number| match (a, b) {
        (Number::Integer(a), Number::Integer(b)) => Number::Integer(a.min(b)),
        _ => Number::Real(a.to_f64().min(b.to_f64())),
    };
    let greatest = |a: Number, b: Number| match (a, b) {
        (Number::Integer(a), Number::Integer(b)) => Number::Integer(a.max(b)),
        _ => Number::Real(a.to_f64().max(b.to_f64())),
    };
    (least(one.0, other.0), greatest(one.1, other.1))
}

#[inline]
fn scalar(element: Element) -> Number {
    match element {
        Element::Boolean(truth) => Number::Integer(truth.into()),
        Element::Integer(integer) => Number::Integer(integer),
        Element::Single(real) => Number::Real(real.into()),
        Element::Double(real) => Number::Real(real),
        // hypot makes infinity of (inf, NaN).
        Element::Complex(re, im) if re.is_nan() || im.is_nan() => Number::Real(f64::NAN),
        Element::Complex(re, im) => Number::Real(re.hypot(im)),
    }
}

/// How many of the finite elements lie in each of equal parts of their range. The last part has its upper end.
#[derive(Debug, Clone)]
pub struct Histogram {
    dtype: Dtype,
    low: f64,
    high: f64,
    is_discrete: bool,
    counts: Vec<u64>,
}

impl Histogram {
    /// Of no elements so far, over what `statistics` found: `parts` parts, or one for each integer if these are fewer.
    /// `None` if nothing is finite.
    #[must_use]
    pub fn new(statistics: &Statistics, parts: usize) -> Option<Histogram> {
        let (low, high) = statistics.finite?;
        let span = match statistics.range {
            Some((Number::Integer(low), Number::Integer(high))) => usize::try_from(high - low)
                .ok()
                .and_then(|span| span.checked_add(1)),
            _ => None,
        };
        let discrete = span.filter(|&span| span <= parts);
        let parts = match discrete {
            Some(span) => span,
            None if low == high => 1,
            None => parts.max(1),
        };
        Some(Histogram {
            dtype: statistics.dtype,
            low,
            high,
            is_discrete: discrete.is_some(),
            counts: vec![0; parts],
        })
    }

    /// Counts whole little-endian elements in: those that the statistics were made of.
    pub fn add(&mut self, bytes: &[u8]) {
        let parts = self.counts.len();
        // Halves, lest the difference of the ends overflows.
        let (low, width) = (self.low / 2.0, self.high / 2.0 - self.low / 2.0);
        for_each(self.dtype, bytes, |element| {
            let number = scalar(element).to_f64();
            if number.is_finite() {
                let place = (number / 2.0 - low) / width;
                self.counts[part(place, parts)] += 1;
            }
        });
    }

    /// The lower and the upper end of each part, and how many lie there.
    pub fn parts(&self) -> impl Iterator<Item = (f64, f64, u64)> {
        let share = |index: usize| {
            let place = real(index) / real(self.counts.len());
            self.low * (1.0 - place) + self.high * place
        };
        self.counts.iter().enumerate().map(move |(index, &count)| {
            if self.is_discrete {
                let integer = self.low + real(index);
                return (integer, integer, count);
            }
            (share(index), share(index + 1), count)
        })
    }

    /// Whether each part is one integer.
    #[must_use]
    pub fn is_discrete(&self) -> bool {
        self.is_discrete
    }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a float becomes the nearest index there is, and NaN (of a range without width) 0"
)]
fn part(place: f64, parts: usize) -> usize {
    ((place * real(parts)) as usize).min(parts - 1)
}

#[expect(clippy::cast_precision_loss, reason = "a number of parts is small")]
fn real(count: usize) -> f64 {
    count as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(dtype: Dtype, bytes: &[u8], parts: usize) -> (Statistics, Option<Histogram>) {
        let mut statistics = Statistics::new(dtype);
        statistics.add(bytes);
        let mut histogram = Histogram::new(&statistics, parts);
        if let Some(histogram) = &mut histogram {
            histogram.add(bytes);
        }
        (statistics, histogram)
    }

    fn of_f64(numbers: &[f64], parts: usize) -> (Statistics, Vec<u64>) {
        let bytes: Vec<u8> = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
        let (statistics, histogram) = of(Dtype::Float64, &bytes, parts);
        let counts = histogram.map_or_else(Vec::new, |h| h.parts().map(|(_, _, n)| n).collect());
        (statistics, counts)
    }

    #[test]
    fn floats_with_and_without_values() {
        let (found, counts) = of_f64(&[1.0, f64::NAN, 3.0, 2.0, f64::INFINITY, -0.0], 3);
        assert_eq!((found.count(), found.nan(), found.infinite()), (6, 1, 1));
        assert_eq!(
            found.range(),
            Some((Number::Real(0.0), Number::Real(f64::INFINITY)))
        );
        assert_eq!(found.mean(), Some(1.5));
        assert_eq!(counts, [1, 1, 2]);

        let (found, counts) = of_f64(&[f64::NAN, f64::NEG_INFINITY], 4);
        assert_eq!((found.mean(), counts.len()), (None, 0));
        let (found, counts) = of_f64(&[], 4);
        assert_eq!((found.range(), found.mean(), counts.len()), (None, None, 0));
        let (_, counts) = of_f64(&[7.0, 7.0], 4);
        assert_eq!(counts, [2]);
        let (_, counts) = of_f64(&[-f64::MAX, f64::MAX, 0.0, f64::MAX], 4);
        assert_eq!(counts, [1, 0, 1, 2]);
    }

    #[test]
    fn integers_stay_exact_and_few_have_a_part_each() {
        let ends = [i64::MIN, i64::MAX, i64::MAX - 1];
        let bytes: Vec<u8> = ends.iter().flat_map(|x| x.to_le_bytes()).collect();
        let (found, _) = of(Dtype::Int64, &bytes, 8);
        assert_eq!(
            found.range(),
            Some((
                Number::Integer(i64::MIN.into()),
                Number::Integer(i64::MAX.into())
            ))
        );
        for (values, parts) in [(0..=6_u8, 8), (250..=255, 8), (9..=9, 8), (0..=99, 100)] {
            let mut bytes: Vec<u8> = values.clone().collect();
            bytes.push(*values.end());
            let (_, histogram) = of(Dtype::Uint8, &bytes, parts);
            let histogram = histogram.expect("there are values");
            assert!(histogram.is_discrete());
            let expected: Vec<_> = values
                .clone()
                .map(|x| {
                    (
                        f64::from(x),
                        f64::from(x),
                        1 + u64::from(x == *values.end()),
                    )
                })
                .collect();
            assert_eq!(histogram.parts().collect::<Vec<_>>(), expected);
        }
    }

    #[test]
    fn truth_and_magnitude() {
        let (found, histogram) = of(Dtype::Bool8, &[0, 1, 1, 1], 16);
        assert_eq!(found.mean(), Some(0.75));
        let counts: Vec<_> = histogram.expect("values").parts().collect();
        assert_eq!(counts, [(0.0, 0.0, 1), (1.0, 1.0, 3)]);
        let numbers = [3.0_f64, -4.0, f64::INFINITY, f64::NAN];
        let bytes: Vec<u8> = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
        let (found, _) = of(Dtype::Complex128, &bytes, 16);
        assert_eq!((found.count(), found.nan()), (2, 1));
        assert_eq!(found.range(), Some((Number::Real(5.0), Number::Real(5.0))));
    }
}
