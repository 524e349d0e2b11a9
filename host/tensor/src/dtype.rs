//! Element types.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The type of a tensor's elements, by numpy's and ml_dtypes' names. Always little-endian.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// One byte: 0 is false, any other true.
    Bool8,
    /// Signed, 8 bits.
    Int8,
    /// Signed, 16 bits.
    Int16,
    /// Signed, 32 bits.
    Int32,
    /// Signed, 64 bits.
    Int64,
    /// Unsigned, 8 bits.
    Uint8,
    /// Unsigned, 16 bits.
    Uint16,
    /// Unsigned, 32 bits.
    Uint32,
    /// Unsigned, 64 bits.
    Uint64,
    /// IEEE 754 binary16.
    Float16,
    /// The upper half of a binary32.
    Bfloat16,
    /// OCP 8-bit float, 4 exponent and 3 mantissa bits, finite values and NaN only.
    #[serde(rename = "float8_e4m3fn")]
    Float8E4m3fn,
    /// OCP 8-bit float, 5 exponent and 2 mantissa bits, with infinities.
    #[serde(rename = "float8_e5m2")]
    Float8E5m2,
    /// IEEE 754 binary32.
    Float32,
    /// IEEE 754 binary64.
    Float64,
    /// A pair of `Float32`: real, imaginary.
    Complex64,
    /// A pair of `Float64`: real, imaginary.
    Complex128,
}

/// A text that is no dtype's name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown dtype {0:?}; known are {known}", known = Dtype::ALL.map(Dtype::name).join(", "))]
pub struct UnknownDtype(pub String);

impl Dtype {
    /// Every dtype, in the order of the WIT enumeration.
    pub const ALL: [Dtype; 17] = [
        Dtype::Bool8,
        Dtype::Int8,
        Dtype::Int16,
        Dtype::Int32,
        Dtype::Int64,
        Dtype::Uint8,
        Dtype::Uint16,
        Dtype::Uint32,
        Dtype::Uint64,
        Dtype::Float16,
        Dtype::Bfloat16,
        Dtype::Float8E4m3fn,
        Dtype::Float8E5m2,
        Dtype::Float32,
        Dtype::Float64,
        Dtype::Complex64,
        Dtype::Complex128,
    ];

    /// The name in JSON, on the command line and in Arrow metadata.
    pub const fn name(self) -> &'static str {
        match self {
            Dtype::Bool8 => "bool8",
            Dtype::Int8 => "int8",
            Dtype::Int16 => "int16",
            Dtype::Int32 => "int32",
            Dtype::Int64 => "int64",
            Dtype::Uint8 => "uint8",
            Dtype::Uint16 => "uint16",
            Dtype::Uint32 => "uint32",
            Dtype::Uint64 => "uint64",
            Dtype::Float16 => "float16",
            Dtype::Bfloat16 => "bfloat16",
            Dtype::Float8E4m3fn => "float8_e4m3fn",
            Dtype::Float8E5m2 => "float8_e5m2",
            Dtype::Float32 => "float32",
            Dtype::Float64 => "float64",
            Dtype::Complex64 => "complex64",
            Dtype::Complex128 => "complex128",
        }
    }

    /// Bytes of one element.
    pub const fn size(self) -> u64 {
        match self {
            Dtype::Bool8 | Dtype::Int8 | Dtype::Uint8 | Dtype::Float8E4m3fn | Dtype::Float8E5m2 => {
                1
            }
            Dtype::Int16 | Dtype::Uint16 | Dtype::Float16 | Dtype::Bfloat16 => 2,
            Dtype::Int32 | Dtype::Uint32 | Dtype::Float32 => 4,
            Dtype::Int64 | Dtype::Uint64 | Dtype::Float64 | Dtype::Complex64 => 8,
            Dtype::Complex128 => 16,
        }
    }

    /// Whether an element is a number on the real line: an integer or a float, neither a truth
    /// value nor a complex number.
    pub const fn is_real(self) -> bool {
        !matches!(self, Dtype::Bool8) && !self.is_complex()
    }

    /// Whether an element is a pair (real, imaginary).
    pub const fn is_complex(self) -> bool {
        matches!(self, Dtype::Complex64 | Dtype::Complex128)
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Dtype {
    type Err = UnknownDtype;

    fn from_str(name: &str) -> Result<Dtype, UnknownDtype> {
        Dtype::ALL
            .into_iter()
            .find(|dtype| dtype.name() == name)
            .ok_or_else(|| UnknownDtype(name.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_reads_back_and_is_the_json() {
        for dtype in Dtype::ALL {
            assert_eq!(dtype.name().parse(), Ok(dtype));
            let json = serde_json::to_string(&dtype).expect("a unit variant serialises");
            assert_eq!(json, format!("{:?}", dtype.name()));
            assert_eq!(serde_json::from_str::<Dtype>(&json).ok(), Some(dtype));
        }
    }

    #[test]
    fn an_unknown_name_is_answered_with_the_known_ones() {
        let error = "f64".parse::<Dtype>().expect_err("not a name");
        let text = error.to_string();
        assert!(text.contains("\"f64\""), "{text}");
        assert!(
            text.ends_with("float32, float64, complex64, complex128"),
            "{text}"
        );
    }

    #[test]
    fn sizes_follow_from_the_names() {
        for dtype in Dtype::ALL {
            let name = dtype.name().split('_').next().unwrap_or_default();
            let bits: u64 = name
                .trim_start_matches(|c: char| c.is_ascii_alphabetic())
                .parse()
                .expect("names end in their bits");
            assert_eq!(dtype.size() * 8, bits, "{dtype}");
        }
    }
}
