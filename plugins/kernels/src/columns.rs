//! Kernels that go down the columns of a tensor, row by row: in f64, whatever the dtype, and the same however the rows
//! are cut.

use core::ops::Range;
use strait_plugin::prelude::*;

/// Elements that are converted at a time: 8 KiB, which stay in the first-level cache.
const BLOCK: usize = 1024;

/// Whole rows, or a part of one row.
#[derive(Debug)]
pub(crate) struct Tile<'t> {
    /// Index of its first row in the whole tensor.
    pub(crate) row: u64,
    /// Its elements of each row: all of them, if it has several rows.
    pub(crate) columns: Range<usize>,
    /// What came; what is to go out, afterwards.
    pub(crate) elements: &'t mut [f64],
}

/// The dtype of what is computed in f64 from x: x's if that is a float, else float64.
pub(crate) fn result_dtype(x: Dtype) -> Dtype {
    match dtypes::FLOATS.contains(&x) {
        true => x,
        false => Dtype::Float64,
    }
}

/// Elements of one row, so that there can be a state for each of them.
pub(crate) fn width(x: &Spec) -> Result<usize, Error> {
    let row = Spec::new(x.dtype, x.shape.get(1..).unwrap_or_default());
    // Without rows there is nothing to have a state.
    let elements = if x.rows() == 0 {
        Some(0)
    } else {
        row.elements()
    };
    elements.ok_or_else(|| {
        Error::bad_argument("x", format!("its rows, {:?}, are too large", row.shape))
    })
}

/// The one NaN that we write. Which of two NaNs a sum is, and so its sign and payload, is the compiler's choice, and
/// may be another one in another loop.
pub(crate) fn quiet(value: f64) -> f64 {
    if value.is_nan() { f64::NAN } else { value }
}

/// Hands input 0 to `each` tile by tile, from its first row on, and what that makes of it to output 0, of dtype
/// [`result_dtype`].
pub(crate) fn in_tiles(call: &mut Call<'_>, each: &mut dyn FnMut(Tile<'_>)) -> Result<(), Error> {
    let from = call.input_spec(0).dtype;
    if from == result_dtype(from) {
        dispatch!(from, T in floats => { tiles::<T, T>(call, each) })
    } else {
        dispatch!(from, T in [Bool8, i8, i16, i32, i64, u8, u16, u32, u64] => {
            tiles::<T, f64>(call, each)
        })
    }
}

fn tiles<T: Real, O: Real>(
    call: &mut Call<'_>,
    each: &mut dyn FnMut(Tile<'_>),
) -> Result<(), Error> {
    let x = call.input::<T>(0)?;
    let mut y = call.output::<O>(0)?;
    if x.is_empty() {
        return Ok(());
    }
    let (width, mut buffer) = (x.row_len(), [0.0; BLOCK]);
    let mut part = |row, columns: Range<usize>, x: &[T], y: &mut [O]| {
        let elements = &mut buffer[..x.len()];
        map(x, elements, T::to_f64);
        each(Tile {
            row,
            columns,
            elements: &mut *elements,
        });
        map(elements, y, |value| O::from_f64(quiet(value)));
    };
    let mut row = x.first_row();
    if width <= BLOCK {
        let rows = BLOCK / width;
        for (x, y) in x.chunks(rows * width).zip(y.chunks_mut(rows * width)) {
            part(row, 0..width, x, y);
            row += rows as u64;
        }
        return Ok(());
    }
    for (x, y) in x.chunks(width).zip(y.chunks_mut(width)) {
        let mut first = 0;
        for (x, y) in x.chunks(BLOCK).zip(y.chunks_mut(BLOCK)) {
            part(row, first..first + x.len(), x, y);
            first += x.len();
        }
        row += 1;
    }
    Ok(())
}
