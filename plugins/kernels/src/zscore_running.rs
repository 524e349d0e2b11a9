//! `zscore-running`: each row against all rows up to it.

use crate::columns::{self, Tile};
use strait_plugin::prelude::*;
use strait_plugin::sqrt;

/// y\[i\] = (x\[i\] - mean) / standard deviation of x\[0\] … x\[i\] along axis 0, for each column, with the population's deviation
/// (divisor i+1).
///
/// Computed in f64; floats give their own dtype, rounded once, integers and `bool8` float64. Mean and sum of squared
/// deviations go on from row to row as Welford has it (Technometrics 4, 1962): d = x - mean, mean += d / n,
/// squares += d * (x - mean), each operation rounded; y = (x - mean) / sqrt(squares / n). Where all values up to a row are equal,
/// as in row 0, y is 0/0, NaN. A NaN or an infinity makes all y of its column NaN from there on; a NaN is written as the
/// positive quiet one. The state is two rows of f64.
#[derive(Debug)]
pub struct ZScoreRunning {
    mean: Vec<f64>,
    squares: Vec<f64>,
}

impl Kernel for ZScoreRunning {
    const NAME: &str = "zscore-running";
    const DOC: &str =
        "(x - mean) / population standard deviation of the rows up to each, along axis 0.";
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
    const COST_HINT: f64 = 6.0;
    type Parameters = ();

    fn open((): (), inputs: &[Spec]) -> Result<(Self, Vec<Spec>), Error> {
        let x = &inputs[0];
        let width = columns::width(x)?;
        let kernel = Self {
            mean: vec![0.0; width],
            squares: vec![0.0; width],
        };
        Ok((kernel, vec![x.with_dtype(columns::result_dtype(x.dtype))]))
    }

    fn run(&mut self, call: &mut Call<'_>) -> Result<(), Error> {
        columns::in_tiles(call, &mut |tile| self.scores(tile))
    }
}

impl ZScoreRunning {
    fn scores(&mut self, tile: Tile<'_>) {
        let Tile {
            row,
            columns,
            elements,
        } = tile;
        let (mean, squares) = (&mut self.mean[columns.clone()], &mut self.squares[columns]);
        for (row, elements) in (row..).zip(elements.chunks_exact_mut(mean.len())) {
            let count = (row + 1) as f64;
            let state = mean.iter_mut().zip(&mut *squares);
            for (element, (mean, squares)) in elements.iter_mut().zip(state) {
                let distance = *element - *mean;
                *mean += distance / count;
                let rest = *element - *mean;
                *squares += distance * rest;
                *element = rest / sqrt(*squares / count);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scores<T: Element>(x: &[T], shape: &[u64]) -> Tensor {
        let y = testing::invoke::<ZScoreRunning>(&[], &[Tensor::shaped(x, shape)]);
        y.expect("valid").outputs[0].clone()
    }

    #[test]
    fn equals_the_scores_of_each_prefix() {
        let x: Vec<f64> = (0..300).map(|i| f64::from(i * 37 % 101) + 1e3).collect();
        for width in [1, 3, 100] {
            let y = scores(&x, &[(x.len() / width) as u64, width as u64]);
            for (at, y) in y.values::<f64>().into_iter().enumerate() {
                let column: Vec<f64> = (at % width..=at).step_by(width).map(|i| x[i]).collect();
                let count = column.len() as f64;
                let mean = column.iter().sum::<f64>() / count;
                let squares = column.iter().map(|x| (x - mean) * (x - mean));
                let expected = (x[at] - mean) / (squares.sum::<f64>() / count).sqrt();
                assert_eq!(y.is_nan(), at < width, "{at}");
                assert!(y.is_nan() || (y - expected).abs() < 1e-9, "{y} {expected}");
            }
        }
    }

    #[test]
    fn equal_values_and_what_is_not_finite() {
        let y = scores(&[0.1; 5], &[5]).values::<f64>();
        assert!(y.iter().all(|y| y.is_nan()));
        let x = [1.0, 5.0, 2.0, 6.0, f64::INFINITY, 7.0, 1.0, 8.0];
        let y = scores(&x, &[4, 2]).values::<f64>();
        let nan: Vec<bool> = y.iter().map(|y| y.is_nan()).collect();
        assert_eq!(nan, [true, true, false, false, true, false, true, false]);
    }

    #[test]
    fn dtypes() {
        assert_eq!(scores(&[1i64, 3], &[2]).values::<f64>()[1], 1.0);
        assert_eq!(scores(&[1.0f32, 3.0], &[2]).values::<f32>()[1], 1.0);
        assert_eq!(scores(&[Bool8(0), Bool8(9)], &[2]).values::<f64>()[1], 1.0);
    }
}
