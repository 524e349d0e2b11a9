//! Column-major data into a row-major buffer, without a second whole copy.

use std::io::{self, Read};

/// What is read at a time, unless one column is all that a block can hold.
const BLOCK_BYTES: usize = 256 << 10;

/// Reads the elements of `shape`, of `N` bytes each, in Fortran order (the first axis fastest) and
/// puts them into `destination` in C order. `destination` has exactly their size and `shape` has
/// no zero.
pub(super) fn read_fortran<const N: usize>(
    reader: &mut impl Read,
    shape: &[usize],
    destination: &mut [u8],
) -> io::Result<()> {
    let (destination, _) = destination.as_chunks_mut::<N>();
    let Some((&rows, inner)) = shape.split_first() else {
        return Ok(());
    };
    let row_elements: usize = inner.iter().product();
    // Blocks of whole columns, so that what is written to one row lies together; or, where not
    // even one column fits, of a part of a column.
    let columns_max = (BLOCK_BYTES / N / rows).max(1);
    let rows_max = if columns_max > 1 {
        rows
    } else {
        rows.min(BLOCK_BYTES / N)
    };
    let mut block = vec![[0; N]; columns_max * rows_max];
    let mut columns = FortranOffsets::new(inner);
    let mut offsets = Vec::with_capacity(columns_max);
    let mut left = row_elements;
    while left > 0 {
        let count = left.min(columns_max);
        offsets.clear();
        offsets.extend(columns.by_ref().take(count));
        left -= count;
        for first_row in (0..rows).step_by(rows_max) {
            let height = rows_max.min(rows - first_row);
            let block = &mut block[..count * height];
            reader.read_exact(block.as_flattened_mut())?;
            let target = destination[first_row * row_elements..].chunks_exact_mut(row_elements);
            for (y, row) in target.take(height).enumerate() {
                for (x, &offset) in offsets.iter().enumerate() {
                    row[offset] = block[x * height + y];
                }
            }
        }
    }
    Ok(())
}

/// The row-major offsets of all elements of a shape, in Fortran order. Without end: starts over.
struct FortranOffsets<'a> {
    shape: &'a [usize],
    index: Vec<usize>,
    strides: Vec<usize>,
    offset: usize,
}

impl<'a> FortranOffsets<'a> {
    fn new(shape: &'a [usize]) -> FortranOffsets<'a> {
        let mut strides = vec![1; shape.len()];
        for axis in (1..shape.len()).rev() {
            strides[axis - 1] = strides[axis] * shape[axis];
        }
        FortranOffsets {
            shape,
            index: vec![0; shape.len()],
            strides,
            offset: 0,
        }
    }
}

impl Iterator for FortranOffsets<'_> {
    type Item = usize;

    fn next(&mut self) -> Option<usize> {
        let offset = self.offset;
        for ((index, &size), &stride) in self.index.iter_mut().zip(self.shape).zip(&self.strides) {
            *index += 1;
            self.offset += stride;
            if *index < size {
                break;
            }
            self.offset -= stride * size;
            *index = 0;
        }
        Some(offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The definition, element by element.
    fn expected(shape: &[usize]) -> Vec<u32> {
        let count: usize = shape.iter().product();
        (0..count)
            .map(|linear| {
                let mut rest = linear;
                let mut fortran = 0;
                let mut strides: Vec<usize> = vec![1];
                for &n in &shape[..shape.len() - 1] {
                    strides.push(strides[strides.len() - 1] * n);
                }
                for axis in (0..shape.len()).rev() {
                    fortran += rest % shape[axis] * strides[axis];
                    rest /= shape[axis];
                }
                u32::try_from(fortran).expect("small")
            })
            .collect()
    }

    #[test]
    fn every_element_comes_to_its_place() {
        for shape in [
            &[1][..],
            &[7],
            &[2, 3],
            &[3, 2],
            &[1, 5],
            &[5, 1],
            &[2, 3, 4],
            &[4, 1, 3, 2],
            &[2, 1, 2, 1, 2, 1, 2, 3],
            &[200_000, 3], // one column does not fit into a block
            &[65_536, 3],  // exactly one does
            &[30_000, 5],  // a block of two columns, and one left
            &[3, 50_000],  // many columns in a block
            &[40, 70, 90],
        ] {
            let count: usize = shape.iter().product();
            let file: Vec<u8> = (0..count)
                .flat_map(|i| u32::try_from(i).expect("small").to_le_bytes())
                .collect();
            let mut out = vec![0xff; file.len()];
            read_fortran::<4>(&mut file.as_slice(), shape, &mut out).expect("reads from memory");
            let out: Vec<u32> = out
                .as_chunks()
                .0
                .iter()
                .map(|bytes| u32::from_le_bytes(*bytes))
                .collect();
            assert!(out == expected(shape), "{shape:?}");
        }
    }

    #[test]
    fn too_few_bytes_are_an_error() {
        let mut out = vec![0; 24];
        let error = read_fortran::<4>(&mut &[0; 23][..], &[2, 3], &mut out).expect_err("23 of 24");
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}
