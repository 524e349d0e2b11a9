//! What a tensor is, where it lies, and why it cannot lie there.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{Dtype, METADATA_BYTES_MAX};

/// The most axes a tensor may have.
pub const RANK_MAX: usize = 8;

/// A tensor without its bytes: contiguous, row-major, the last axis fastest.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct TensorSpec {
    /// The type of the elements.
    pub dtype: Dtype,
    /// The sizes of the axes, in elements. Empty: one element (0-d). A size of 0 is legal.
    pub shape: Vec<u64>,
}

impl TensorSpec {
    /// The number of elements.
    ///
    /// # Errors
    /// [`LayoutError::Rank`] above [`RANK_MAX`] axes; [`LayoutError::Overflow`] if the bytes of
    /// that many elements, or one of the sizes, exceed `i64`, which is what Arrow counts in. A
    /// shape with a zero dimension is 0 elements.
    pub fn elements(&self) -> Result<u64, LayoutError> {
        let size = self.dtype.size();
        self.bytes().map(|bytes| bytes / size)
    }

    /// Rows of the table column that it is: the first axis, or 1 if it is 0-d.
    #[must_use]
    pub fn rows(&self) -> u64 {
        self.shape.first().copied().unwrap_or(1)
    }

    /// The number of bytes.
    ///
    /// # Errors
    /// As [`TensorSpec::elements`].
    pub fn bytes(&self) -> Result<u64, LayoutError> {
        if self.shape.len() > RANK_MAX {
            return Err(LayoutError::Rank {
                rank: self.shape.len(),
            });
        }
        let bytes = if self.shape.contains(&0) {
            Some(0)
        } else {
            self.shape
                .iter()
                .try_fold(self.dtype.size(), |bytes, &n| bytes.checked_mul(n))
        };
        let largest = self.shape.iter().copied().max().unwrap_or(0);
        match bytes {
            Some(bytes) if bytes.max(largest) <= i64::MAX.cast_unsigned() => Ok(bytes),
            _ => Err(LayoutError::Overflow { spec: self.clone() }),
        }
    }
}

impl fmt::Display for TensorSpec {
    /// As in `float64[2, 3]`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{:?}", self.dtype, self.shape)
    }
}

/// A tensor in a segment. Its JSON is *tensor* in `docs/protocol.md`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TensorPlace {
    /// The column's name, unique within the segment.
    pub name: String,
    /// dtype and shape.
    #[serde(flatten)]
    pub spec: TensorSpec,
    /// Bytes from the start of the segment to the first element.
    pub offset: u64,
    /// Bytes of the elements: what [`TensorSpec::bytes`] answers for a valid place.
    pub length: u64,
}

/// Tensors that cannot be laid out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// More axes than [`RANK_MAX`].
    #[error("a tensor of {rank} axes; at most {RANK_MAX} are possible: merge some of them")]
    Rank {
        /// The number of axes asked for.
        rank: usize,
    },
    /// More bytes than can be counted.
    #[error("{spec} has more than {max} bytes, or an axis longer than that", max = i64::MAX)]
    Overflow {
        /// The tensor.
        spec: TensorSpec,
    },
    /// The columns together have more bytes than can be counted.
    #[error("the columns up to {name:?} need more than {max} bytes together", max = i64::MAX)]
    FileOverflow {
        /// The first column that does not fit.
        name: String,
    },
    /// A file without tensors.
    #[error("a segment needs at least one tensor")]
    NoTensors,
    /// Two columns of one name.
    #[error("two tensors are called {name:?}; within one segment names must differ")]
    NameTwice {
        /// The name.
        name: String,
    },
    /// Columns whose leading axes differ: they cannot be one record batch.
    #[error(
        "{first:?} has {first_rows} rows and {name:?} has {rows}; tensors of one segment share their \
         leading axis (a 0-d tensor is one row): put them into segments of their own"
    )]
    RowsDiffer {
        /// The first column.
        first: String,
        /// Its rows.
        first_rows: u64,
        /// The column that differs.
        name: String,
        /// Its rows.
        rows: u64,
    },
    /// Arrow counts the elements of a row in 31 bits.
    #[error(
        "each row of {name:?}, {spec}, has {elements} values; Arrow holds at most {max} in a row: \
         reshape it so that the leading axis is longer",
        max = i32::MAX
    )]
    RowTooLong {
        /// The column.
        name: String,
        /// What it is.
        spec: TensorSpec,
        /// Values in a row (two for each complex element); `u128` because shapes with a zero axis
        /// may go beyond 64 bits.
        elements: u128,
    },
    /// `reserve_bytes` below the size of the tensor.
    #[error("{name:?} reserves {reserve_bytes} bytes but {spec} needs {bytes}")]
    ReserveTooSmall {
        /// The column.
        name: String,
        /// What was reserved.
        reserve_bytes: u64,
        /// The tensor.
        spec: TensorSpec,
        /// What it needs.
        bytes: u64,
    },
    /// Too many columns, or too long names.
    #[error(
        "the names and types of {columns} columns need up to {bytes} bytes of header; at most {max} \
         are possible: use fewer columns or shorter names",
        max = METADATA_BYTES_MAX
    )]
    HeaderTooLarge {
        /// The number of columns.
        columns: usize,
        /// The bound on the header.
        bytes: u64,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(dtype: Dtype, shape: &[u64]) -> TensorSpec {
        TensorSpec {
            dtype,
            shape: shape.to_vec(),
        }
    }

    #[test]
    fn sizes() {
        let top = i64::MAX.cast_unsigned();
        for (dtype, shape, bytes) in [
            (Dtype::Float64, &[][..], Some(8)),
            (Dtype::Float64, &[0], Some(0)),
            (Dtype::Complex128, &[2, 3], Some(96)),
            (Dtype::Bool8, &[2, 3, 4], Some(24)),
            (Dtype::Float32, &[1 << 20, 1 << 20], Some(1 << 42)),
            (Dtype::Int8, &[top], Some(top)),
            (Dtype::Int8, &[top + 1], None),
            (Dtype::Int8, &[top + 1, 0], None),
            (Dtype::Int8, &[top, top, 0], Some(0)),
            (Dtype::Int16, &[top], None),
            (Dtype::Int8, &[u64::MAX, u64::MAX], None),
            (Dtype::Int8, &[1; 8], Some(1)),
        ] {
            let spec = spec(dtype, shape);
            assert_eq!(spec.bytes().ok(), bytes, "{spec}");
            assert_eq!(
                spec.elements().ok(),
                bytes.map(|b| b / dtype.size()),
                "{spec}"
            );
        }
    }

    #[test]
    fn size_errors_have_their_numbers() {
        let text = |spec: TensorSpec| spec.bytes().expect_err("too large").to_string();
        assert!(text(spec(Dtype::Int8, &[1; 9])).contains("9 axes"));
        let text = text(spec(Dtype::Float64, &[1 << 40, 1 << 30]));
        assert!(
            text.contains("float64[1099511627776, 1073741824]"),
            "{text}"
        );
    }

    #[test]
    fn a_place_is_the_tensor_of_the_protocol() {
        let json = r#"{"name":"x","dtype":"float64","shape":[2,3],"offset":65536,"length":48}"#;
        let place: TensorPlace = serde_json::from_str(json).expect("the protocol's example");
        assert_eq!(place.spec, spec(Dtype::Float64, &[2, 3]));
        assert_eq!((place.offset, place.length), (65536, 48));
        assert_eq!(serde_json::to_string(&place).expect("serialises"), json);
    }
}
