//! Floats in JSON, which has no word for those that are not finite.

use serde_json::Value;

/// `number` as strait's JSON has it: a number, or `"nan"`, `"inf"`, `"-inf"`.
#[must_use]
pub fn real_to_json(number: f64) -> Value {
    match number {
        _ if number.is_nan() => "nan".into(),
        f64::INFINITY => "inf".into(),
        f64::NEG_INFINITY => "-inf".into(),
        _ => number.into(),
    }
}

/// The float that one of those words stands for.
#[must_use]
pub fn real_from_word(word: &str) -> Option<f64> {
    match word {
        "nan" => Some(f64::NAN),
        "inf" => Some(f64::INFINITY),
        "-inf" => Some(f64::NEG_INFINITY),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_json_lacks_has_a_word_and_back() {
        for number in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            let json = real_to_json(number);
            let back = real_from_word(json.as_str().expect("a word")).expect("one of ours");
            assert_eq!(back.to_string(), number.to_string());
        }
        for number in [0.0, -0.0, 1.5, f64::MAX, f64::MIN_POSITIVE] {
            let back = real_to_json(number).as_f64().expect("a number");
            assert_eq!(back.to_bits(), number.to_bits());
        }
        for word in ["NaN", "Infinity", "+inf", "1", ""] {
            assert_eq!(real_from_word(word), None, "{word}");
        }
    }
}
