//! Tensors as bytes of a mapped segment.

use std::ops::Range;

use strait_tensor::{Dtype, TensorPlace};

use crate::element::{self, Element};
use crate::error::Error;
use crate::wire::Mapping;

/// Tensors start on page boundaries; this much of it is enough for every element type, and is
/// checked so that no cast to a slice can fail later.
const ALIGN_BYTES: u64 = 64;

/// A tensor in a mapped segment.
#[derive(Clone, Copy, Debug)]
pub struct TensorView<'a> {
    place: &'a TensorPlace,
    bytes: &'a [u8],
}

impl<'a> TensorView<'a> {
    pub(crate) fn of(place: &'a TensorPlace, all: &'a [u8]) -> Self {
        Self {
            place,
            bytes: all.get(range(place)).unwrap_or_default(),
        }
    }

    /// Its name in the segment.
    #[must_use]
    pub fn name(&self) -> &'a str {
        &self.place.name
    }

    /// The type of its elements.
    #[must_use]
    pub fn dtype(&self) -> Dtype {
        self.place.spec.dtype
    }

    /// The sizes of its axes, the last one fastest. Empty: one element.
    #[must_use]
    pub fn shape(&self) -> &'a [u64] {
        &self.place.spec.shape
    }

    /// Its bytes: little-endian, row-major, contiguous.
    #[must_use]
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// Its elements, row-major.
    ///
    /// # Errors
    /// [`Error::Dtype`] if they are not `T`.
    pub fn as_slice<T: Element>(&self) -> Result<&'a [T], Error> {
        element::check::<T>(self.name(), self.dtype())?;
        Ok(cast(self.bytes))
    }
}

/// Holds the host's word against itself, so that later no tensor reaches out of its segment.
pub(crate) fn check(mapping: &Mapping) -> Result<(), Error> {
    let wrong = |what: String| {
        Err(Error::Protocol(format!(
            "mapping of segment {}: {what}",
            mapping.segment
        )))
    };
    if mapping.strait_mmap != 1 {
        return wrong(format!(
            "its version is {}, known is 1",
            mapping.strait_mmap
        ));
    }
    for TensorPlace {
        name,
        spec,
        offset,
        length,
    } in &mapping.tensors
    {
        match spec.bytes() {
            Ok(bytes) if bytes == *length => {}
            Ok(bytes) => {
                return wrong(format!(
                    "tensor {name:?} is {spec} with {bytes} bytes, not {length}"
                ));
            }
            Err(error) => return wrong(format!("tensor {name:?}: {error}")),
        }
        if offset
            .checked_add(*length)
            .is_none_or(|end| end > mapping.bytes)
        {
            return wrong(format!(
                "tensor {name:?} has {length} bytes at {offset}, the segment {} in all",
                mapping.bytes
            ));
        }
        if *length > 0 && offset % ALIGN_BYTES != 0 {
            return wrong(format!(
                "tensor {name:?} is at {offset}, no multiple of {ALIGN_BYTES}"
            ));
        }
    }
    Ok(())
}

pub(crate) fn find<'a>(mapping: &'a Mapping, name: &str) -> Result<&'a TensorPlace, Error> {
    mapping
        .tensors
        .iter()
        .find(|place| place.name == name)
        .ok_or_else(|| Error::NoTensor {
            name: name.to_owned(),
            known: mapping
                .tensors
                .iter()
                .map(|place| place.name.clone())
                .collect(),
        })
}

pub(crate) fn length(mapping: &Mapping) -> Result<usize, Error> {
    usize::try_from(mapping.bytes).map_err(|_| {
        Error::Protocol(format!(
            "a segment of {} bytes, more than there are addresses",
            mapping.bytes
        ))
    })
}

/// Within the mapped bytes: [`check`] saw to it, and both mappings cover `mapping.bytes`.
pub(crate) fn range(place: &TensorPlace) -> Range<usize> {
    // A place in mapped memory is an address offset, so it fits.
    let at = |offset: u64| usize::try_from(offset).unwrap_or(usize::MAX);
    at(place.offset)..at(place.offset + place.length)
}

/// An empty tensor may lie anywhere, the others are aligned: [`check`] saw to it.
fn cast<T: Element>(bytes: &[u8]) -> &[T] {
    if bytes.is_empty() {
        &[]
    } else {
        bytemuck::cast_slice(bytes)
    }
}

pub(crate) fn cast_mut<T: Element>(bytes: &mut [u8]) -> &mut [T] {
    if bytes.is_empty() {
        &mut []
    } else {
        bytemuck::cast_slice_mut(bytes)
    }
}

#[cfg(test)]
mod tests {
    use strait_tensor::TensorSpec;

    use super::*;
    use crate::wire::Writers;

    fn mapping(shape: &[u64], offset: u64, length: u64) -> Mapping {
        let spec = TensorSpec {
            dtype: Dtype::Float64,
            shape: shape.to_vec(),
        };
        Mapping {
            strait_mmap: 1,
            host_id: String::new(),
            socket: String::new(),
            segment: "0123".into(),
            generation: 1,
            bytes: 1 << 17,
            writers: Writers::None,
            tensors: vec![TensorPlace {
                name: "x".into(),
                spec,
                offset,
                length,
            }],
        }
    }

    #[test]
    fn places_that_reach_out_are_refused() {
        let text = |shape: &[u64], offset, length| {
            check(&mapping(shape, offset, length))
                .err()
                .map(|error| error.to_string())
        };
        assert_eq!(text(&[8192], 1 << 16, 1 << 16), None);
        assert_eq!(
            text(&[0, 5], (1 << 17) - 1, 0),
            None,
            "an empty tensor may lie anywhere"
        );
        for (shape, offset, length, says) in [
            (
                &[8193][..],
                1 << 16,
                65544,
                "65544 bytes at 65536, the segment 131072 in all",
            ),
            (&[8192], 1 << 16, 1 << 17, "with 65536 bytes, not 131072"),
            (&[1], u64::MAX - 7, 8, "at 18446744073709551608"),
            (&[1], 65544, 8, "no multiple of 64"),
            (&[u64::MAX, u64::MAX], 0, 8, "float64"),
        ] {
            let text = text(shape, offset, length).unwrap_or_default();
            assert!(text.contains(says), "{text:?} does not say {says:?}");
        }
        let newer = Mapping {
            strait_mmap: 2,
            ..mapping(&[1], 0, 8)
        };
        assert!(check(&newer).is_err());
    }

    #[test]
    fn a_missing_tensor_is_answered_with_those_that_there_are() {
        let error = find(&mapping(&[1], 0, 8), "y").expect_err("there is only x");
        assert_eq!(
            error.to_string(),
            "no tensor \"y\" in the segment; it has x"
        );
    }
}
