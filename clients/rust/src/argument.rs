//! What goes into a call: inputs and parameters.

use std::fmt;

use serde_json::Value;

use strait_tensor::TensorSpec;

use crate::element::{self, Element};
use crate::error::Error;
use crate::lease::Lease;
use crate::output::Output;
use crate::segment::{AdoptedSegment, MappedSegment, OpenSegment};
use crate::wire::{Input, real_to_json};

/// A kernel's input: a flight by name (`"x"`, `"x#tensor"`), a segment of this session, or elements of this process, which
/// the call copies: small ones into its frame, others into a segment.
pub struct CallInput<'a> {
    pub(crate) given: Given<'a>,
    pub(crate) lease: Option<&'a Lease>,
}

#[derive(Debug)]
pub(crate) enum Given<'a> {
    Named(Input),
    Elements(TensorSpec, &'a [u8]),
    /// They are not what they were said to be.
    Misfit(Error),
}

impl<'a, T: Element> From<(&TensorSpec, &'a [T])> for CallInput<'a> {
    fn from((spec, elements): (&TensorSpec, &'a [T])) -> Self {
        match element::check::<T>("the input", spec.dtype) {
            Ok(()) => Self::of_bytes(spec, bytemuck::cast_slice(elements)),
            Err(error) => Self {
                given: Given::Misfit(error),
                lease: None,
            },
        }
    }
}

impl<'a> From<&'a Output> for CallInput<'a> {
    fn from(output: &'a Output) -> Self {
        match output {
            Output::Mapped(segment) => segment.into(),
            Output::Inline(tensor) => Self {
                given: Given::Elements(tensor.spec().clone(), tensor.bytes()),
                lease: None,
            },
        }
    }
}

impl From<&str> for CallInput<'_> {
    fn from(name: &str) -> Self {
        Self {
            given: Given::Named(Input::Text(name.to_owned())),
            lease: None,
        }
    }
}

impl From<&String> for CallInput<'_> {
    fn from(name: &String) -> Self {
        name.as_str().into()
    }
}

impl<'a> CallInput<'a> {
    /// Elements of any dtype: little-endian, row-major, contiguous. If they are not as many as `spec` says, the call fails.
    #[must_use]
    pub fn of_bytes(spec: &TensorSpec, bytes: &'a [u8]) -> Self {
        let given = match spec.bytes() {
            Ok(expected) if expected == bytes.len() as u64 => Given::Elements(spec.clone(), bytes),
            Ok(expected) => Given::Misfit(Error::Length {
                spec: spec.clone(),
                expected,
                given: bytes.len() as u64,
            }),
            Err(error) => Given::Misfit(error.into()),
        };
        Self { given, lease: None }
    }

    fn segment(segment: &str, lease: &'a Lease, tensor: Option<&str>) -> Self {
        let tensor = tensor.map(str::to_owned);
        Self {
            given: Given::Named(Input::Segment {
                segment: segment.to_owned(),
                tensor,
            }),
            lease: Some(lease),
        }
    }
}

macro_rules! segment_inputs {
    ($($segment:ty),*) => { $(
        impl<'a> From<&'a $segment> for CallInput<'a> {
            fn from(segment: &'a $segment) -> Self {
                Self::segment(&segment.mapping().segment, segment.lease(), None)
            }
        }

        /// A segment and the name of one of its tensors.
        impl<'a> From<(&'a $segment, &str)> for CallInput<'a> {
            fn from((segment, tensor): (&'a $segment, &str)) -> Self {
                Self::segment(&segment.mapping().segment, segment.lease(), Some(tensor))
            }
        }
    )* };
}

segment_inputs!(OpenSegment, MappedSegment, AdoptedSegment);

impl fmt::Debug for CallInput<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.given.fmt(f)
    }
}

/// A parameter's value: a boolean, a number, a string or a list of numbers.
#[derive(Clone, Debug, PartialEq)]
pub struct Param(pub(crate) Value);

impl From<Value> for Param {
    fn from(value: Value) -> Self {
        Self(value)
    }
}

impl From<f64> for Param {
    fn from(number: f64) -> Self {
        Self(real_to_json(number))
    }
}

impl From<f32> for Param {
    fn from(number: f32) -> Self {
        f64::from(number).into()
    }
}

impl From<&[f64]> for Param {
    fn from(numbers: &[f64]) -> Self {
        Self(
            numbers
                .iter()
                .map(|&number| Param::from(number).0)
                .collect(),
        )
    }
}

impl From<Vec<f64>> for Param {
    fn from(numbers: Vec<f64>) -> Self {
        numbers.as_slice().into()
    }
}

impl<const N: usize> From<[f64; N]> for Param {
    fn from(numbers: [f64; N]) -> Self {
        numbers.as_slice().into()
    }
}

macro_rules! plain_params {
    ($($type:ty),*) => {
        $(impl From<$type> for Param { fn from(value: $type) -> Self { Self(value.into()) } })*
    };
}

plain_params!(
    bool, i8, i16, i32, i64, u8, u16, u32, u64, usize, &str, String
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_that_json_lacks_have_words() {
        let value = |param: Param| param.0;
        assert_eq!(value(f64::NAN.into()), "nan");
        assert_eq!(value(f64::NEG_INFINITY.into()), "-inf");
        assert_eq!(value(0.1.into()), serde_json::json!(0.1));
        assert_eq!(
            value([1.0, f64::INFINITY].into()),
            serde_json::json!([1.0, "inf"])
        );
        assert_eq!(value(1.into()), serde_json::json!(1));
        assert_eq!(value(u64::MAX.into()).to_string(), "18446744073709551615");
        assert_eq!(value(i64::MIN.into()).to_string(), "-9223372036854775808");
        assert_eq!(value(true.into()), serde_json::json!(true));
    }
}
