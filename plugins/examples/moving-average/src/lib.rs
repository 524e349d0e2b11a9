//! A plugin as a third party would write it: one kernel with one parameter.

#![cfg_attr(target_arch = "wasm32", no_std)]
#![forbid(unsafe_code)]

use strait_plugin::prelude::*;

parameters! {
    /// Parameters of `moving-average`.
    pub struct Parameters {
        /// Elements in each mean.
        #[minimum(1)]
        pub window: i64 = 5,
    }
}

/// The mean of each `window` neighbouring elements: n elements give n - window + 1 means.
///
/// Sums are in f64, whatever the dtype.
#[derive(Debug)]
pub struct MovingAverage {
    window: usize,
    /// Sums from each element of a block to the block's end; as long as the window.
    to_end: Vec<f64>,
}

const FLOATS: &[Dtype] = &[Dtype::Float32, Dtype::Float64];

impl Kernel for MovingAverage {
    const NAME: &str = "moving-average";
    const DOC: &str = "The mean of each `window` neighbouring elements.";
    const INPUTS: &[Port] = &[Port::new("x", FLOATS, "At least `window` elements.").rank(1, 1)];
    const OUTPUTS: &[Port] =
        &[Port::new("y", FLOATS, "n - window + 1 means, in x's dtype.").rank(1, 1)];
    const SIGNATURE: &str = "(n)->(m)";
    const COST_HINT: f64 = 2.0;
    type Parameters = Parameters;

    fn open(parameters: Parameters, inputs: &[Spec]) -> Result<(Self, Vec<Spec>), Error> {
        let (x, window) = (&inputs[0], parameters.window);
        let length = x.shape[0];
        match usize::try_from(window) {
            Ok(count) if count as u64 <= length => {
                let y = Spec::new(x.dtype, [length - count as u64 + 1]);
                Ok((
                    Self {
                        window: count,
                        to_end: vec![0.0; count],
                    },
                    vec![y],
                ))
            }
            _ => Err(Error::bad_argument(
                "window",
                format!(
                    "{window} is more than the {length} elements of x: give one from 1 to {length}"
                ),
            )),
        }
    }

    fn run(&mut self, call: &mut Call<'_>) -> Result<(), Error> {
        dispatch!(call.input_spec(0).dtype, T in [f32, f64] => {
            let x = call.input::<T>(0)?;
            let mut y = call.output::<T>(0)?;
            average(&x, &mut y, self.window, &mut self.to_end);
            Ok(())
        })
    }
}

/// Each window is the end of one block of `window` elements and the start of the next: two partial sums that
/// grow by one element at a time. No element is ever subtracted, so a NaN or a huge value leaves the sums
/// when it leaves the window.
fn average<T: Real>(x: &[T], y: &mut [T], window: usize, to_end: &mut [f64]) {
    let count = window as f64;
    let starts = y.len();
    for start in (0..starts).step_by(window) {
        let end = starts.min(start + window);
        let block = &x[start..start + window];
        let mut sum = 0.0;
        for (to_end, x) in to_end.iter_mut().zip(block).rev() {
            sum += x.to_f64();
            *to_end = sum;
        }
        y[start] = T::from_f64(to_end[0] / count);
        let next = &x[start + window..end + window - 1];
        let mut from_start = 0.0;
        for ((y, to_end), x) in y[start + 1..end].iter_mut().zip(&to_end[1..]).zip(next) {
            from_start += x.to_f64();
            *y = T::from_f64((to_end + from_start) / count);
        }
    }
}

strait_plugin::export!("moving-average", [MovingAverage]);

#[cfg(test)]
mod tests {
    use super::*;

    fn invoke(x: &[f64], window: i64) -> Result<Vec<f64>, Error> {
        let outcome = testing::invoke::<MovingAverage>(
            &[("window", Value::Number(window.into()))],
            &[Tensor::new(x)],
        )?;
        Ok(outcome.outputs[0].values())
    }

    #[test]
    fn equals_the_plain_sums() {
        // Small integers: every order of summation is exact.
        let x: Vec<f64> = (0..50u32).map(|i| f64::from(i * i % 17)).collect();
        for length in 1..=x.len() {
            for window in 1..=length {
                let expected: Vec<f64> = x[..length]
                    .windows(window)
                    .map(|w| w.iter().sum::<f64>() / window as f64)
                    .collect();
                assert_eq!(
                    invoke(&x[..length], window as i64),
                    Ok(expected),
                    "{window} of {length}"
                );
            }
        }
    }

    #[test]
    fn a_nan_spoils_only_the_windows_that_hold_it() {
        let mut x = [1.0; 20];
        x[7] = f64::NAN;
        let y = invoke(&x, 4).expect("valid");
        for (start, mean) in y.iter().enumerate() {
            assert_eq!(mean.is_nan(), (4..=7).contains(&start), "{start}");
        }
    }

    #[test]
    fn a_window_longer_than_the_input_is_refused() {
        let Err(Error::BadArgument(bad)) = invoke(&[1.0, 2.0], 3) else {
            panic!("3 of 2 was taken")
        };
        assert_eq!(bad.name, "window");
        assert_eq!(
            bad.reason,
            "3 is more than the 2 elements of x: give one from 1 to 2"
        );
    }
}
