//! `fir`: a filter with given taps down the columns.

use crate::columns::quiet;
use strait_plugin::prelude::*;

/// y\[i\] = taps\[0\]*x\[i\] + taps\[1\]*x\[i-1\] + … + taps\[k-1\]*x\[i-k+1\] along axis 0, for each column: what
/// `scipy.signal.lfilter(taps, 1, x, axis=0)` gives, and `numpy.convolve(x, taps)[:len(x)]` of one column.
///
/// There is nothing before row 0: those terms are left out, so that the first rows have fewer. Products and sums are f64,
/// each rounded, from taps\[0\] on; y is that sum rounded once to x's dtype. A NaN or an infinity spoils only the k rows that
/// see it; a NaN is written as the positive quiet one.
#[derive(Debug)]
pub struct Fir {
    taps: Vec<f64>,
}

impl Kernel for Fir {
    const NAME: &str = "fir";
    const DOC: &str = "Finite impulse response along axis 0: y[i] is the sum of taps[j] * x[i-j].";
    const INPUTS: &[Port] = &[
        Port::new(
            "x",
            &[Dtype::Float32, Dtype::Float64],
            "At least one axis; each column is filtered for itself.",
        )
        .rank(1, Port::RANK_MAX),
        Port::new(
            "taps",
            &[Dtype::Float32, Dtype::Float64],
            "One axis, at least one element; the first is for the newest row.",
        )
        .rank(1, 1)
        .whole(),
    ];
    const OUTPUTS: &[Port] = &[Port::new(
        "y",
        &[Dtype::Float32, Dtype::Float64],
        "Dtype and shape of x.",
    )
    .rank(1, Port::RANK_MAX)];
    const SIGNATURE: &str = "(),(k)->()";
    const STREAMING: Streaming = Streaming::Rows;
    const COST_HINT: f64 = 5.0;
    type Parameters = ();

    fn open((): (), inputs: &[Spec]) -> Result<(Self, Vec<Spec>), Error> {
        let taps = inputs[1].elements().unwrap_or(0);
        if taps == 0 {
            return Err(Error::bad_argument(
                "taps",
                "it has no elements: give at least one",
            ));
        }
        Ok((
            Self {
                taps: vec![0.0; taps],
            },
            vec![inputs[0].clone()],
        ))
    }

    fn history(&self) -> usize {
        self.taps.len() - 1
    }

    fn run(&mut self, call: &mut Call<'_>) -> Result<(), Error> {
        dispatch!(call.input_spec(1).dtype, T in [f32, f64] => {
            map(&call.input::<T>(1)?, &mut self.taps, T::to_f64);
            Ok(())
        })?;
        dispatch!(call.input_spec(0).dtype, T in [f32, f64] => {
            let x = call.input::<T>(0)?;
            let mut y = call.output::<T>(0)?;
            let width = x.row_len();
            filter(&x, x.lead() * width, width, &self.taps, &mut y);
            Ok(())
        })
    }
}

/// Elements of y that are summed at a time, in the first-level cache.
const BLOCK: usize = 512;

/// Fills `y`, whose first element stands at `lead` in `x`. A row back is `width` elements back.
fn filter<T: Real>(x: &[T], lead: usize, width: usize, taps: &[f64], y: &mut [T]) {
    let mut buffer = [0.0; BLOCK];
    let mut start = lead;
    for y in y.chunks_mut(BLOCK) {
        let sums = &mut buffer[..y.len()];
        // Nothing but -0.0 is what adds nothing to every number.
        sums.fill(-0.0);
        for (index, tap) in taps.iter().enumerate() {
            let back = index.saturating_mul(width);
            let before_row_0 = back.saturating_sub(start);
            let Some(sums) = sums.get_mut(before_row_0..) else {
                break;
            };
            let x = &x[start + before_row_0 - back..];
            for (sum, x) in sums.iter_mut().zip(x) {
                *sum += tap * x.to_f64();
            }
        }
        map(sums, y, |sum| T::from_f64(quiet(sum)));
        start += y.len();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filtered(x: &[f64], shape: &[u64], taps: &[f64]) -> Result<Vec<f64>, Error> {
        let inputs = [Tensor::shaped(x, shape), Tensor::new(taps)];
        Ok(testing::invoke::<Fir>(&[], &inputs)?.outputs[0].values())
    }

    #[test]
    fn equals_the_sums_of_its_definition() {
        // Small integers: every order of summation is exact.
        let x: Vec<f64> = (0..1500u32).map(|i| f64::from(i * i % 17)).collect();
        let all_taps: Vec<f64> = (0..40u32).map(|i| f64::from(i % 5) - 2.0).collect();
        for width in [1usize, 3, 750] {
            let rows = x.len() / width;
            for taps in [1, 2, 7, 40] {
                let taps = &all_taps[..taps];
                let expected: Vec<f64> = (0..x.len())
                    .map(|at| {
                        let back = 0..taps.len().min(at / width + 1);
                        back.map(|j| taps[j] * x[at - j * width]).sum()
                    })
                    .collect();
                assert_eq!(
                    filtered(&x, &[rows as u64, width as u64], taps),
                    Ok(expected),
                    "{width} columns, {} taps",
                    taps.len()
                );
            }
        }
    }

    #[test]
    fn a_nan_spoils_as_many_rows_as_there_are_taps() {
        let mut x = [1.0; 12];
        x[4] = f64::NAN;
        let y = filtered(&x, &[12], &[0.0, 1.0, -1.0]).expect("valid");
        for (row, y) in y.iter().enumerate() {
            assert_eq!(y.is_nan(), (4..=6).contains(&row), "{row}");
        }
        // Before row 0 there is nothing, and not 0 times infinity.
        let y = filtered(&[1.0, 2.0], &[2], &[1.0, f64::INFINITY]).expect("valid");
        assert_eq!(y, [1.0, f64::INFINITY]);
    }

    #[test]
    fn no_taps_are_refused() {
        let Err(Error::BadArgument(bad)) = filtered(&[1.0], &[1], &[]) else {
            panic!("no taps were taken")
        };
        assert_eq!(
            (&*bad.name, &*bad.reason),
            ("taps", "it has no elements: give at least one")
        );
    }
}
