//! Numbers as a caller wrote them: an integer stays exact from JSON to the kernel.

use serde::{Deserialize, Serialize};
use std::cmp::Ordering;
use std::fmt;

use serde_json::Value as Json;

/// A number. Each integer has one form.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub enum Number {
    /// Below 2^63.
    Integer(i64),
    /// From 2^63 on.
    Unsigned(u64),
    /// Written with a fraction or an exponent, or not finite.
    Real(f64),
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    reason = "float to integer cuts towards zero and saturates, integer to float rounds once"
)]
impl Number {
    /// From a JSON number, or a word for what JSON has none for: `"nan"`, `"inf"`, `"-inf"`. An
    /// integer beyond 64 bits is a float there.
    pub(super) fn from_json(json: &Json) -> Option<Self> {
        match json {
            Json::Number(v) => match (v.as_i64(), v.as_u64()) {
                (Some(integer), _) => Some(Self::Integer(integer)),
                (None, Some(integer)) => Some(Self::Unsigned(integer)),
                (None, None) => v.as_f64().map(Self::Real),
            },
            Json::String(word) => strait_protocol::real_from_word(word).map(Self::Real),
            _ => None,
        }
    }

    /// The inverse of [`Number::from_json`].
    pub(super) fn to_json(self) -> Json {
        match self {
            Self::Real(v) => strait_protocol::real_to_json(v),
            Self::Integer(v) => v.into(),
            Self::Unsigned(v) => v.into(),
        }
    }

    /// As JSON has it; `None` for what is not finite.
    #[must_use]
    pub fn to_json_number(self) -> Option<serde_json::Number> {
        match self.to_json() {
            Json::Number(v) => Some(v),
            _ => None,
        }
    }

    /// The nearest float.
    pub(super) fn to_f64(self) -> f64 {
        match self {
            Self::Integer(v) => v as f64,
            Self::Unsigned(v) => v as f64,
            Self::Real(v) => v,
        }
    }

    /// The same value as an integer; `None` if it has a fraction or more than 64 bits. A float
    /// counts, for languages that write `2.0`.
    pub(super) fn to_integer(self) -> Option<Self> {
        match self {
            Self::Real(v) if v.fract() == 0.0 => {
                let whole = v as i128;
                i64::try_from(whole)
                    .map(Self::Integer)
                    .or_else(|_| u64::try_from(whole).map(Self::Unsigned))
                    .ok()
            }
            Self::Real(_) => None,
            Self::Integer(_) | Self::Unsigned(_) => Some(self),
        }
    }

    /// Order by value, exact across the variants; `None` if one of them is NaN.
    pub(super) fn compare(self, other: Self) -> Option<Ordering> {
        match (self.parts(), other.parts()) {
            (Ok(a), Ok(b)) => Some(a.cmp(&b)),
            (Err(a), Err(b)) => a.partial_cmp(&b),
            (Ok(a), Err(b)) => compare(a, b),
            (Err(a), Ok(b)) => compare(b, a).map(Ordering::reverse),
        }
    }

    fn parts(self) -> Result<i128, f64> {
        match self {
            Self::Integer(v) => Ok(v.into()),
            Self::Unsigned(v) => Ok(v.into()),
            Self::Real(v) => Err(v),
        }
    }
}

/// `integer` has at most 65 bits, so that it compares with an `i128`'s limit as with what lies
/// beyond it.
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

impl From<u64> for Number {
    fn from(integer: u64) -> Self {
        i64::try_from(integer).map_or(Self::Unsigned(integer), Self::Integer)
    }
}

impl fmt::Display for Number {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Integer(v) => v.fmt(f),
            Self::Unsigned(v) => v.fmt(f),
            // 1e300 has 301 digits otherwise.
            Self::Real(v) if v.is_finite() && v.abs() >= 1e17 => write!(f, "{v:e}"),
            Self::Real(v) => v.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const ODD: i64 = (1 << 53) + 1;

    fn number(json: Json) -> Number {
        Number::from_json(&json).unwrap_or_else(|| panic!("{json} is no number"))
    }

    #[test]
    fn json_integers_keep_every_bit() {
        for text in [
            "0",
            "-9223372036854775808",
            "9007199254740993",
            "9223372036854775807",
            "9223372036854775808",
            "18446744073709551615",
            "0.1",
            "1e300",
            "\"nan\"",
            "\"-inf\"",
        ] {
            let json: Json = serde_json::from_str(text).expect("JSON");
            assert_eq!(number(json.clone()).to_json(), json);
        }
        assert_eq!(number(json!(1_u64 << 63)), Number::Unsigned(1 << 63));
        assert_eq!(number(json!(5_u64)), Number::Integer(5));
        assert_eq!(Number::from_json(&json!("1")), None);
        assert_eq!(Number::from_json(&json!(true)), None);
    }

    #[test]
    fn order_is_exact_where_floats_are_not() {
        let ascending = [
            number(json!("-inf")),
            number(json!(i64::MIN)),
            number(json!(-ODD)),
            number(json!(-9_007_199_254_740_992.0)),
            number(json!(-0.5)),
            number(json!(0)),
            number(json!(0.5)),
            number(json!(ODD - 1)),
            number(json!(ODD)),
            number(json!(i64::MAX)),
            number(json!(9_223_372_036_854_775_808.0)),
            number(json!((1_u64 << 63) + 1)),
            number(json!(u64::MAX)),
            number(json!(18_446_744_073_709_551_616.0)),
        ];
        for (i, a) in ascending.iter().enumerate() {
            for (j, b) in ascending.iter().enumerate() {
                assert_eq!(a.compare(*b), Some(i.cmp(&j)), "{a} {b}");
            }
            assert_eq!(a.compare(number(json!("nan"))), None);
        }
    }

    #[test]
    fn a_whole_float_is_an_integer_too() {
        for (json, integer) in [
            (json!(2.0), Some(Number::Integer(2))),
            (json!(-0.0), Some(Number::Integer(0))),
            (
                json!(1e18),
                Some(Number::Integer(1_000_000_000_000_000_000)),
            ),
            (
                json!(1e19),
                Some(Number::Unsigned(10_000_000_000_000_000_000)),
            ),
            (json!(1e20), None),
            (json!(-1e19), None),
            (json!(2.5), None),
            (json!("inf"), None),
            (json!("nan"), None),
        ] {
            assert_eq!(number(json.clone()).to_integer(), integer, "{json}");
        }
    }
}
