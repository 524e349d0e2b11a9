//! The payloads of CALL and of the OK to it: which bytes are which tensor's.
//!
//! ```text
//! sizes of tensor 0 │ sizes of tensor 1 │ … │ tensor 0 │ gap │ tensor 1 │ …
//! ```
//! Sizes are eight u64s, little-endian, those beyond the tensor's rank 0. Each tensor starts at a multiple of
//! [`crate::PAYLOAD_ALIGN`], with room for the largest that it can be. So a payload is always as long as PREPARE has said.

use crate::frame::padded;

/// Bytes of one tensor's sizes.
pub const SIZES_BYTES: usize = 64;

/// Offsets in a payload with tensors of at most so many bytes, and the payload's length. None if that is no number.
#[must_use]
pub fn places(bytes: impl ExactSizeIterator<Item = u64>) -> Option<(Vec<u64>, u64)> {
    let mut end = (bytes.len() * SIZES_BYTES) as u64;
    let mut offsets = Vec::with_capacity(bytes.len());
    for bytes in bytes {
        offsets.push(end);
        end = padded(end.checked_add(bytes)?)?;
    }
    Some((offsets, end))
}

/// The sizes of a tensor as they stand in a payload; a tensor has at most 8.
#[must_use]
pub fn sizes(shape: &[u64]) -> [u8; SIZES_BYTES] {
    let mut bytes = [0; SIZES_BYTES];
    for (to, size) in bytes.chunks_exact_mut(8).zip(shape) {
        to.copy_from_slice(&size.to_le_bytes());
    }
    bytes
}

/// The shape that `bytes` say of a tensor with `rank` axes; none if they are not sizes of that.
#[must_use]
pub fn shape(bytes: &[u8], rank: usize) -> Option<Vec<u64>> {
    let bytes: &[u8; SIZES_BYTES] = bytes.try_into().ok()?;
    let word = |at: &[u8]| {
        let mut word = [0; 8];
        word.copy_from_slice(at);
        u64::from_le_bytes(word)
    };
    let mut sizes: Vec<u64> = bytes.chunks_exact(8).map(word).collect();
    if rank > sizes.len() || sizes[rank..].iter().any(|size| *size != 0) {
        return None;
    }
    sizes.truncate(rank);
    Some(sizes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensors_lie_apart_after_their_sizes() {
        assert_eq!(places([].into_iter()), Some((Vec::new(), 0)));
        let (offsets, all) = places([1024, 1, 0, 65].into_iter()).expect("a number");
        assert_eq!(offsets, [256, 1280, 1344, 1344]);
        assert_eq!(all, 1344 + 128);
        assert_eq!(places([u64::MAX].into_iter()), None);
        assert_eq!(places([u64::MAX - 100].into_iter()), None);
    }

    #[test]
    fn sizes_are_those_of_the_rank() {
        for shape_of in [&[][..], &[3], &[0, u64::MAX], &[1, 2, 3, 4, 5, 6, 7, 8]] {
            let bytes = sizes(shape_of);
            assert_eq!(shape(&bytes, shape_of.len()).as_deref(), Some(shape_of));
        }
        assert_eq!(shape(&sizes(&[3, 4]), 1), None);
        assert_eq!(shape(&sizes(&[3]), 2), Some(vec![3, 0]));
        assert_eq!(shape(&sizes(&[3]), 9), None);
        assert_eq!(shape(&[0; 63], 1), None);
    }
}
