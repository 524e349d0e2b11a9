//! What the demo computes, and whether that is what came.

use serde::{Deserialize, Serialize};

/// `y = a*x + b`; another one in each round, so that no old result can pass for a new one.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct Formula {
    pub(super) a: f64,
    pub(super) b: f64,
}

impl Formula {
    #[expect(clippy::cast_precision_loss, reason = "rounds are few")]
    pub(super) fn of_round(number: usize) -> Self {
        Self {
            a: 2.0 + number as f64 / 4.0,
            b: 1.0 - number as f64,
        }
    }

    /// What element `index` of the result must be, from nothing but the rule for x.
    pub(super) fn expected(self, index: usize) -> f64 {
        self.a * x_of(index) + self.b
    }
}

/// The rule for x: no two neighbours are alike, and no value is out of reach of the others.
#[expect(clippy::cast_precision_loss, reason = "below a million")]
pub(super) fn x_of(index: usize) -> f64 {
    (index.wrapping_mul(48_271) % 999_983) as f64 / 7.0 - 70_000.0
}

/// Elements held against what they must be, bit by bit.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Compared {
    pub(super) elements: u64,
    pub(super) wrong: u64,
    /// Index, value and what it should be of the first wrong one.
    pub(super) first_wrong: Option<(u64, f64, f64)>,
}

impl Compared {
    /// Compares the elements that follow those compared so far.
    pub(super) fn add(&mut self, values: &[f64], formula: Formula) {
        let start = usize::try_from(self.elements).unwrap_or(usize::MAX);
        for (index, value) in (start..).zip(values) {
            let expected = formula.expected(index);
            if value.to_bits() != expected.to_bits() {
                self.wrong += 1;
                self.first_wrong
                    .get_or_insert((index as u64, *value, expected));
            }
        }
        self.elements += values.len() as u64;
    }
}
