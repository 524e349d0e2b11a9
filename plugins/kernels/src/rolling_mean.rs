//! `rolling-mean`: means of a window that goes down the columns.

use crate::columns::{self, Tile};
use core::ops::Range;
use strait_plugin::prelude::*;

parameters! {
    /// Parameters of `rolling-mean`.
    pub struct Parameters {
        /// Rows of one mean: each row and those before it.
        #[minimum(1)]
        pub window: i64,
    }
}

/// y\[i\] = (x\[i-window+1\] + … + x\[i\]) / window along axis 0, for each column; the first window-1 rows, which have too few
/// before them, are NaN: `pandas.Series.rolling(window).mean()`.
///
/// Computed in f64; floats give their own dtype, rounded once, integers and `bool8` float64. The rows are seen as blocks of
/// `window` ones, counted from row 0. A window is the end of one block and the start of the next: the end is summed upwards
/// from the block's last row, the start downwards from its first one, and the two sums are added and divided. So each row costs
/// the same for every window; nothing is ever subtracted, a NaN or an infinity spoils only the windows that hold it; and
/// no sum depends on how the rows were cut. The state is window+1 rows of f64. A NaN is written as the positive quiet one.
#[derive(Debug)]
pub struct RollingMean {
    window: u64,
    /// The window in rows; none: there is no row whose window is full.
    rows: Option<usize>,
    width: usize,
    /// window+1 rows. Above the place that this block has come to: its x. From there on: the sums of the block before,
    /// from each of its rows to its end. The last row is [`NOTHING`].
    block: Vec<f64>,
    /// The sums of this block, so far.
    start: Vec<f64>,
}

impl Kernel for RollingMean {
    const NAME: &str = "rolling-mean";
    const DOC: &str =
        "Mean of each row and the window-1 before it, along axis 0; the first window-1 are NaN.";
    const INPUTS: &[Port] =
        &[Port::new("x", dtypes::REALS, "At least one axis.").rank(1, Port::RANK_MAX)];
    const OUTPUTS: &[Port] = &[Port::new(
        "y",
        dtypes::FLOATS,
        "Shape of x; its dtype if that is a float, else float64.",
    )
    .rank(1, Port::RANK_MAX)];
    const SIGNATURE: &str = "()->()";
    const STREAMING: Streaming = Streaming::Rows;
    const COST_HINT: f64 = 3.0;
    type Parameters = Parameters;

    fn open(parameters: Parameters, inputs: &[Spec]) -> Result<(Self, Vec<Spec>), Error> {
        let x = &inputs[0];
        let width = columns::width(x)?;
        // The declaration has it at least 1.
        let window = parameters.window.unsigned_abs();
        let rows = usize::try_from(window).ok();
        // What is longer than the tensor is perhaps never full.
        let block_rows = match window <= x.rows() {
            true => window + 1,
            false => 0,
        };
        let block = Spec::new(Dtype::Float64, [block_rows, width as u64]);
        let Some(block) = block.elements() else {
            return Err(Error::bad_argument(
                "window",
                format!("{window} rows of x in f64 are more than a kernel can keep: give fewer"),
            ));
        };
        let kernel = Self {
            window,
            rows,
            width,
            block: vec![NOTHING; block],
            start: vec![NOTHING; width],
        };
        Ok((kernel, vec![x.with_dtype(columns::result_dtype(x.dtype))]))
    }

    fn run(&mut self, call: &mut Call<'_>) -> Result<(), Error> {
        let mut kept = true;
        columns::in_tiles(call, &mut |tile| {
            let end = tile.row + (tile.elements.len() / tile.columns.len().max(1)) as u64;
            kept &= self.grow(end);
            match self.rows {
                Some(rows) if kept => self.means(tile, rows),
                Some(_) | None => tile.elements.fill(f64::NAN),
            }
        })?;
        match kept {
            true => Ok(()),
            false => Err(Error::failed(format!(
                "{} rows of x in f64 are more than a kernel can keep: give a smaller window",
                self.window
            ))),
        }
    }
}

/// What adds nothing to every number, -0.0 among them.
const NOTHING: f64 = -0.0;

impl RollingMean {
    /// Makes room in the block for all rows before row `end`, as far as they are of one window. False if there is none.
    fn grow(&mut self, end: u64) -> bool {
        let rows = end.min(self.window);
        let needed = usize::try_from(rows)
            .ok()
            .and_then(|rows| rows.checked_add(1)?.checked_mul(self.width));
        let Some(needed) = needed else {
            return false;
        };
        let more = needed.saturating_sub(self.block.len());
        if self.block.try_reserve(more).is_err() {
            return false;
        }
        self.block.resize(self.block.len() + more, NOTHING);
        true
    }

    fn means(&mut self, tile: Tile<'_>, rows: usize) {
        let Tile {
            row,
            columns,
            elements,
        } = tile;
        let mut place = usize::try_from(row % self.window).unwrap_or(0);
        let mut before = self.window - 1 - (self.window - 1).min(row);
        let mut rest = elements;
        while !rest.is_empty() {
            let count = (rows - place).min(rest.len() / columns.len());
            let (run, others) = rest.split_at_mut(count * columns.len());
            rest = others;
            self.add(run, place, columns.clone());
            let unfilled = usize::try_from(before).unwrap_or(usize::MAX).min(count);
            run[..unfilled * columns.len()].fill(f64::NAN);
            before -= unfilled as u64;
            place += count;
            if place == rows {
                self.close(rows, columns.clone());
                place = 0;
            }
        }
    }

    /// Rows from `place` on, all in one block, become the means of their windows.
    fn add(&mut self, run: &mut [f64], place: usize, columns: Range<usize>) {
        let window = self.window as f64;
        let width = self.width;
        if let [start] = &mut *self.start {
            // In a register.
            let mut sum = *start;
            let block = &mut self.block[place..];
            for (index, element) in run.iter_mut().enumerate() {
                block[index] = *element;
                sum += *element;
                *element = (block[index + 1] + sum) / window;
            }
            *start = sum;
            return;
        }
        let start = &mut self.start[columns.clone()];
        for (index, row) in run.chunks_exact_mut(columns.len()).enumerate() {
            let at = (place + index) * width;
            let (this, next) = self.block[at..].split_at_mut(width);
            let (this, next) = (&mut this[columns.clone()], &next[columns.clone()]);
            let sums = start.iter_mut().zip(next).zip(this);
            for (element, ((start, next), this)) in row.iter_mut().zip(sums) {
                *this = *element;
                *start += *element;
                *element = (next + *start) / window;
            }
        }
    }

    /// The block is full: its rows become the sums from each to its end.
    fn close(&mut self, rows: usize, columns: Range<usize>) {
        for row in (0..rows).rev() {
            let (this, next) = self.block[row * self.width..].split_at_mut(self.width);
            let next = &next[columns.clone()];
            for (this, next) in this[columns.clone()].iter_mut().zip(next) {
                *this += next;
            }
        }
        self.start[columns].fill(NOTHING);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn means(x: &Tensor, window: i64) -> Result<Tensor, Error> {
        let parameters = [("window", Value::Number(window.into()))];
        let outcome = testing::invoke::<RollingMean>(&parameters, std::slice::from_ref(x))?;
        Ok(outcome.outputs[0].clone())
    }

    #[test]
    fn equals_the_plain_means() {
        // Small integers: every order of summation is exact.
        for (rows, width) in [(1, 1), (50, 1), (50, 3), (7, 1100)] {
            let x: Vec<f64> = (0..rows * width).map(|i| (i * 31 % 17) as f64).collect();
            for window in 1..=rows + 2 {
                let y = means(
                    &Tensor::shaped(&x, &[rows as u64, width as u64]),
                    window as i64,
                );
                let y = y.expect("valid").values::<f64>();
                for (at, y) in y.iter().enumerate() {
                    let (row, column) = (at / width, at % width);
                    if row + 1 < window {
                        assert_eq!(y.to_bits(), f64::NAN.to_bits(), "{window}: {row}");
                        continue;
                    }
                    let rows = row + 1 - window..=row;
                    let sum: f64 = rows.map(|row| x[row * width + column]).sum();
                    assert_eq!(*y, sum / window as f64, "{window}: {row}, {column}");
                }
            }
        }
    }

    #[test]
    fn a_window_that_cannot_be_kept_is_refused_before_it_is_full() {
        let y = means(&Tensor::new(&[1.0, 2.0]), i64::MAX).expect("never full");
        assert!(y.values::<f64>().iter().all(|y| y.is_nan()));
    }

    #[test]
    fn what_is_not_finite_spoils_only_the_windows_that_hold_it() {
        let mut x = [1.0; 20];
        x[7] = f64::NAN;
        x[13] = f64::INFINITY;
        let y = means(&Tensor::new(&x), 4).expect("valid").values::<f64>();
        for (row, mean) in y.iter().enumerate() {
            let expected = match row {
                0..3 | 7..=10 => f64::NAN,
                13..=16 => f64::INFINITY,
                _ => 1.0,
            };
            assert_eq!(mean.to_bits(), expected.to_bits(), "{row}");
        }
    }

    #[test]
    fn dtypes() {
        let y = means(&Tensor::new(&[1i8, 2, 4]), 2).expect("valid");
        assert_eq!(y.values::<f64>()[1..], [1.5, 3.0]);
        let y = means(&Tensor::new(&[F16::from_f64(1.0); 2]), 2).expect("valid");
        assert_eq!(y.values::<F16>()[1], F16::from_f64(1.0));
        let y = means(&Tensor::new(&[-0.0f32]), 1).expect("valid");
        assert_eq!(y.values::<f32>()[0].to_bits(), (-0.0f32).to_bits());
        let Err(Error::BadArgument(bad)) = means(&Tensor::new(&[1.0]), 0) else {
            panic!("a window of 0 was taken")
        };
        assert_eq!(bad.name, "window");
    }
}
