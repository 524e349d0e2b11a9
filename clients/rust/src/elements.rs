//! Elements of this process that a prepared call brings.

use strait_tensor::{Dtype, TensorSpec};

use crate::element::{self, Element};
use crate::error::Error;

/// Elements that a call brings.
#[derive(Clone, Copy, Debug)]
pub struct Elements<'a> {
    pub(crate) bytes: &'a [u8],
    /// None: all that was prepared.
    pub(crate) shape: Option<&'a [u64]>,
    pub(crate) kind: Kind,
}

/// What elements are.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Kind {
    /// Of a Rust type: whether that fits an input of that name and dtype.
    Typed(fn(&str, Dtype) -> Result<(), Error>),
    Dtype(Dtype),
    /// Whatever was prepared.
    Any,
}

impl Kind {
    pub(crate) fn check(self, name: &str, dtype: Dtype) -> Result<(), Error> {
        match self {
            Self::Typed(check) => check(name, dtype),
            Self::Dtype(own) if own != dtype => Err(Error::Dtype {
                name: name.to_owned(),
                dtype,
                asked: own,
            }),
            Self::Dtype(_) | Self::Any => Ok(()),
        }
    }
}

impl<'a, T: Element> From<&'a [T]> for Elements<'a> {
    fn from(elements: &'a [T]) -> Self {
        Self {
            bytes: bytemuck::cast_slice(elements),
            shape: None,
            kind: Kind::Typed(element::check::<T>),
        }
    }
}

impl<'a, T: Element> From<&'a Vec<T>> for Elements<'a> {
    fn from(elements: &'a Vec<T>) -> Self {
        elements.as_slice().into()
    }
}

impl<'a> Elements<'a> {
    /// Of any dtype: little-endian, row-major, contiguous.
    #[must_use]
    pub fn of_bytes(bytes: &'a [u8]) -> Self {
        Self {
            bytes,
            shape: None,
            kind: Kind::Any,
        }
    }

    /// Of a tensor of that dtype and shape: little-endian, row-major, contiguous.
    #[must_use]
    pub fn of_tensor(spec: &'a TensorSpec, bytes: &'a [u8]) -> Self {
        Self {
            bytes,
            shape: Some(&spec.shape),
            kind: Kind::Dtype(spec.dtype),
        }
    }

    /// Of fewer than was prepared: `shape` is at most that along each axis.
    #[must_use]
    pub fn shaped(self, shape: &'a [u64]) -> Self {
        Self {
            shape: Some(shape),
            ..self
        }
    }
}
