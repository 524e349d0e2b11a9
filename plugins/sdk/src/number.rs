//! [`Number`]: compared and converted without going through `f64`.

use crate::Number;
use core::cmp::Ordering;
use core::fmt;

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    reason = "float to integer cuts towards zero and saturates, integer to float is exact or rounded once"
)]
impl Number {
    /// Order by value, exact across the variants; `None` if one of them is NaN.
    #[must_use]
    pub fn compare(self, other: Self) -> Option<Ordering> {
        match (self.integer(), other.integer()) {
            (Ok(a), Ok(b)) => Some(a.cmp(&b)),
            (Err(a), Err(b)) => a.partial_cmp(&b),
            (Ok(a), Err(b)) => compare(a, b),
            (Err(a), Ok(b)) => compare(b, a).map(Ordering::reverse),
        }
    }

    /// The nearest `f64` (even at a tie).
    #[must_use]
    pub fn to_f64(self) -> f64 {
        self.integer()
            .map_or_else(|real| real, |integer| integer as f64)
    }

    /// The least integer that is not below it. Beyond the range of `i128` its limit; 0 for NaN.
    #[must_use]
    pub fn ceil(self) -> i128 {
        self.integer().unwrap_or_else(|real| {
            let whole = real as i128;
            whole.saturating_add(i128::from((whole as f64) < real))
        })
    }

    /// The greatest integer that is not above it. Beyond the range of `i128` its limit; 0 for NaN.
    #[must_use]
    pub fn floor(self) -> i128 {
        self.integer().unwrap_or_else(|real| {
            let whole = real as i128;
            whole.saturating_sub(i128::from((whole as f64) > real))
        })
    }

    fn integer(self) -> Result<i128, f64> {
        match self {
            Self::Integer(integer) => Ok(integer.into()),
            Self::Unsigned(integer) => Ok(integer.into()),
            Self::Real(real) => Err(real),
        }
    }
}

/// `integer` has at most 65 bits, so that it compares with an `i128`'s limit as with what lies beyond it.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    reason = "cuts towards zero and saturates; what was cut off a float is a float"
)]
fn compare(integer: i128, real: f64) -> Option<Ordering> {
    if real.is_nan() {
        return None;
    }
    let whole = real as i128;
    match integer.cmp(&whole) {
        Ordering::Equal => (whole as f64).partial_cmp(&real),
        unequal => Some(unequal),
    }
}

impl From<i64> for Number {
    fn from(integer: i64) -> Self {
        Self::Integer(integer)
    }
}

impl From<i32> for Number {
    fn from(integer: i32) -> Self {
        Self::Integer(integer.into())
    }
}

impl From<u64> for Number {
    fn from(integer: u64) -> Self {
        i64::try_from(integer).map_or(Self::Unsigned(integer), Self::Integer)
    }
}

impl From<f64> for Number {
    fn from(real: f64) -> Self {
        Self::Real(real)
    }
}

impl fmt::Display for Number {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Integer(integer) => integer.fmt(f),
            Self::Unsigned(integer) => integer.fmt(f),
            Self::Real(real) => real.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TWO_53: i64 = 1 << 53;

    #[test]
    fn order_is_exact_where_floats_are_not() {
        // Ascending; neighbours in one f64's reach among them.
        let ascending: [Number; 15] = [
            f64::NEG_INFINITY.into(),
            (-1e300).into(),
            i64::MIN.into(),
            (i64::MIN + 1).into(),
            (-TWO_53 - 1).into(),
            (-(TWO_53 as f64)).into(),
            (-0.5).into(),
            0.into(),
            0.5.into(),
            TWO_53.into(),
            (TWO_53 + 1).into(),
            i64::MAX.into(),
            (1u64 << 63).into(),
            u64::MAX.into(),
            (u64::MAX as f64).into(),
        ];
        for (i, a) in ascending.iter().enumerate() {
            for (j, b) in ascending.iter().enumerate() {
                assert_eq!(a.compare(*b), Some(i.cmp(&j)), "{a} {b}");
            }
            assert_eq!(a.compare(f64::NAN.into()), None);
            assert_eq!(Number::from(f64::NAN).compare(*a), None);
        }
        assert_eq!(
            Number::from(TWO_53).compare((TWO_53 as f64).into()),
            Some(Ordering::Equal)
        );
    }

    #[test]
    fn whole_neighbours() {
        for (number, floor, ceil) in [
            (Number::from(-2.5), -3, -2),
            (2.5.into(), 2, 3),
            (7.0.into(), 7, 7),
            (
                (TWO_53 + 1).into(),
                9_007_199_254_740_993,
                9_007_199_254_740_993,
            ),
            (u64::MAX.into(), u64::MAX.into(), u64::MAX.into()),
            (1e300.into(), i128::MAX, i128::MAX),
            (f64::NEG_INFINITY.into(), i128::MIN, i128::MIN),
        ] {
            assert_eq!((number.floor(), number.ceil()), (floor, ceil), "{number}");
        }
    }

    #[test]
    fn each_integer_is_written_in_one_way() {
        assert_eq!(Number::from(5u64), Number::Integer(5));
        assert_eq!(Number::from(1u64 << 63), Number::Unsigned(1 << 63));
    }
}
