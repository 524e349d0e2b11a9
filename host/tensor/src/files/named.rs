//! What is written.

use crate::TensorSpec;

/// A tensor to be written.
#[derive(Debug, Clone, Copy)]
pub struct NamedTensor<'a> {
    /// Unique within the file.
    pub name: &'a str,
    /// What it is.
    pub spec: &'a TensorSpec,
    /// Its elements: row-major, little-endian.
    pub bytes: &'a [u8],
}
