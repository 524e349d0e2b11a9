//! `scale-shift`: a*x + b.

use core::ops::{Add, Mul};
use strait_plugin::prelude::*;

parameters! {
    /// Parameters of `scale-shift`.
    pub struct Parameters {
        /// Factor.
        pub a: f64 = 1.0,
        /// Summand.
        pub b: f64 = 0.0,
    }
}

/// y = a*x + b in x's own precision, as numpy computes it: a and b are rounded to x's dtype first, the
/// product is rounded before the sum.
#[derive(Debug)]
pub struct ScaleShift(Parameters);

impl Kernel for ScaleShift {
    const NAME: &str = "scale-shift";
    const DOC: &str = "y = a*x + b, in the precision of x.";
    const INPUTS: &[Port] = &[Port::new(
        "x",
        &[Dtype::Float32, Dtype::Float64],
        "Any shape.",
    )];
    const OUTPUTS: &[Port] = &[Port::new(
        "y",
        &[Dtype::Float32, Dtype::Float64],
        "Dtype and shape of x.",
    )];
    const SIGNATURE: &str = "()->()";
    const SPLIT_AXIS: Option<u32> = Some(0);
    const STREAMING: Streaming = Streaming::Rows;
    const COST_HINT: f64 = 1.0;
    type Parameters = Parameters;

    fn open(parameters: Parameters, inputs: &[Spec]) -> Result<(Self, Vec<Spec>), Error> {
        Ok((Self(parameters), inputs.to_vec()))
    }

    fn run(&mut self, call: &mut Call<'_>) -> Result<(), Error> {
        dispatch!(call.input_spec(0).dtype, T in [f32, f64] => {
            let x = call.input::<T>(0)?;
            let mut y = call.output::<T>(0)?;
            scale_shift(&x, &mut y, T::from_f64(self.0.a), T::from_f64(self.0.b));
            Ok(())
        })
    }
}

fn scale_shift<T: Copy + Mul<Output = T> + Add<Output = T>>(x: &[T], y: &mut [T], a: T, b: T) {
    map(x, y, |x| a * x + b);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn product_and_sum_are_rounded_each() {
        // With a fused multiply-add the first would be 2^-60, and f32 arithmetic differs from f64 in the second.
        let (a, x) = (1.0 + f64::EPSILON, 1.0 - f64::EPSILON);
        let parameters = [
            ("a", Value::Number(a.into())),
            ("b", Value::Number((-1.0).into())),
        ];
        let y =
            testing::invoke::<ScaleShift>(&parameters, &[Tensor::new(&[x, 1.0])]).expect("valid");
        assert_eq!(y.outputs[0].values::<f64>(), [a * x - 1.0, f64::EPSILON]);

        let parameters = [
            ("a", Value::Number(0.1.into())),
            ("b", Value::Number(0.2.into())),
        ];
        let y =
            testing::invoke::<ScaleShift>(&parameters, &[Tensor::new(&[0.3f32])]).expect("valid");
        assert_eq!(y.outputs[0].values::<f32>(), [0.1f32 * 0.3 + 0.2]);
    }

    #[test]
    fn every_rank_and_an_empty_tensor() {
        for shape in [&[][..], &[0], &[3, 0, 2], &[7], &[2, 3, 5]] {
            let count: u64 = shape.iter().product();
            let elements: Vec<f64> = (0..count).map(|i| i as f64).collect();
            let x = Tensor::shaped(&elements, shape);
            let y = testing::invoke::<ScaleShift>(&[("b", Value::Number(1.0.into()))], &[x])
                .expect("valid");
            assert_eq!(y.outputs[0].shape, shape);
            let expected: Vec<f64> = elements.iter().map(|x| x + 1.0).collect();
            assert_eq!(y.outputs[0].values::<f64>(), expected);
        }
    }

    #[test]
    fn other_dtypes_are_refused() {
        let refused = testing::invoke::<ScaleShift>(&[], &[Tensor::new(&[1i32])]);
        let Err(Error::BadArgument(bad)) = refused else {
            panic!("{refused:?}")
        };
        assert_eq!(
            (bad.name.as_str(), bad.reason.as_str()),
            ("x", "it takes float32, float64; given: int32")
        );
    }
}
