//! `cumsum`: running sums down the columns.

use crate::columns::{self, Tile};
use strait_plugin::prelude::*;

/// y\[i\] = x\[0\] + x\[1\] + … + x\[i\] along axis 0, for each column: `numpy.cumsum(x, axis=0)`.
///
/// Integers give int64, unsigned ones uint64 and `bool8` int64, and wrap, as numpy's do. Floats keep their dtype; the sum is
/// kept in f64 and added to in the order of the rows, one addition a row, and each y is that sum rounded once: the same
/// bits as numpy's for float64, more exact than numpy's for the narrower ones. What is not a number stays one from there
/// on: NaN, or infinities of both signs; it is written as the positive quiet NaN. A sum of nothing but -0.0 is -0.0.
/// The state is one row of 64-bit sums.
#[derive(Debug)]
pub struct CumSum(Sums);

/// Of each column, so far.
#[derive(Debug)]
enum Sums {
    Floats(Vec<f64>),
    /// The same bits for both kinds: they wrap.
    Integers(Vec<u64>),
}

impl Kernel for CumSum {
    const NAME: &str = "cumsum";
    const DOC: &str = "Running sums along axis 0, kept in f64 or 64-bit integers.";
    const INPUTS: &[Port] =
        &[Port::new("x", dtypes::REALS, "At least one axis.").rank(1, Port::RANK_MAX)];
    const OUTPUTS: &[Port] = &[Port::new(
        "y",
        dtypes::REALS,
        "Shape of x; its dtype if that is a float, else int64, or uint64 of unsigned integers.",
    )
    .rank(1, Port::RANK_MAX)];
    const SIGNATURE: &str = "()->()";
    const STREAMING: Streaming = Streaming::Rows;
    const COST_HINT: f64 = 1.5;
    type Parameters = ();

    fn open((): (), inputs: &[Spec]) -> Result<(Self, Vec<Spec>), Error> {
        let x = &inputs[0];
        let width = columns::width(x)?;
        let (sums, dtype) = match x.dtype {
            // What 0 is for other sums: it changes no number, not even -0.0.
            float if dtypes::FLOATS.contains(&float) => (Sums::Floats(vec![-0.0; width]), float),
            Dtype::Uint8 | Dtype::Uint16 | Dtype::Uint32 | Dtype::Uint64 => {
                (Sums::Integers(vec![0; width]), Dtype::Uint64)
            }
            _ => (Sums::Integers(vec![0; width]), Dtype::Int64),
        };
        Ok((Self(sums), vec![x.with_dtype(dtype)]))
    }

    fn run(&mut self, call: &mut Call<'_>) -> Result<(), Error> {
        match &mut self.0 {
            Sums::Floats(sums) => columns::in_tiles(call, &mut |tile| {
                let Tile {
                    columns, elements, ..
                } = tile;
                down(&mut sums[columns], elements, |sum, x| sum + x);
            }),
            Sums::Integers(sums) => {
                dispatch!(call.input_spec(0).dtype, T in [Bool8, i8, i16, i32, i64, u8, u16, u32, u64] => {
                    integers::<T>(sums, call)
                })
            }
        }
    }
}

/// Replaces each element by the sum of it and those above it.
#[inline]
fn down<T: Copy>(sums: &mut [T], elements: &mut [T], add: impl Fn(T, T) -> T) {
    if let [sum] = sums {
        // In a register.
        let mut running = *sum;
        for element in elements {
            running = add(running, *element);
            *element = running;
        }
        *sum = running;
        return;
    }
    for row in elements.chunks_exact_mut(sums.len().max(1)) {
        for (element, sum) in row.iter_mut().zip(&mut *sums) {
            *sum = add(*sum, *element);
            *element = *sum;
        }
    }
}

fn integers<T: Whole>(sums: &mut [u64], call: &mut Call<'_>) -> Result<(), Error> {
    let x = call.input::<T>(0)?;
    let mut y = call.output::<T::Sum>(0)?;
    let rows = x.chunks(sums.len().max(1));
    for (x, y) in rows.zip(y.chunks_mut(sums.len().max(1))) {
        for ((x, y), sum) in x.iter().zip(y).zip(&mut *sums) {
            *sum = sum.wrapping_add(x.bits());
            *y = T::sum(*sum);
        }
    }
    Ok(())
}

/// An integer, as 64 bits with its sign.
trait Whole: Element {
    type Sum: Element;
    fn bits(self) -> u64;
    fn sum(bits: u64) -> Self::Sum;
}

macro_rules! whole {
    ($($type:ty => $sum:ty, |$x:ident| $bits:expr, $of_bits:expr;)+) => {
        $(
            impl Whole for $type {
                type Sum = $sum;

                #[inline]
                fn bits(self) -> u64 {
                    let $x = self;
                    $bits
                }

                #[inline]
                fn sum(bits: u64) -> $sum {
                    $of_bits(bits)
                }
            }
        )+
    };
}

whole! {
    Bool8 => i64, |x| x.get().into(), u64::cast_signed;
    i8 => i64, |x| i64::from(x).cast_unsigned(), u64::cast_signed;
    i16 => i64, |x| i64::from(x).cast_unsigned(), u64::cast_signed;
    i32 => i64, |x| i64::from(x).cast_unsigned(), u64::cast_signed;
    i64 => i64, |x| x.cast_unsigned(), u64::cast_signed;
    u8 => u64, |x| x.into(), core::convert::identity;
    u16 => u64, |x| x.into(), core::convert::identity;
    u32 => u64, |x| x.into(), core::convert::identity;
    u64 => u64, |x| x, core::convert::identity;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sums<T: Element, O: Element>(x: &[T], shape: &[u64]) -> Vec<O> {
        let y = testing::invoke::<CumSum>(&[], &[Tensor::shaped(x, shape)]).expect("valid");
        assert_eq!(y.outputs[0].shape, shape);
        y.outputs[0].values()
    }

    #[test]
    fn columns_are_summed_each_for_itself() {
        let x = [1.0, 10.0, 2.0, 20.0, 3.0, 30.0];
        assert_eq!(
            sums::<f64, f64>(&x, &[3, 2]),
            [1.0, 10.0, 3.0, 30.0, 6.0, 60.0]
        );
        assert_eq!(
            sums::<f64, f64>(&x, &[6]),
            [1.0, 11.0, 13.0, 33.0, 36.0, 66.0]
        );
        assert_eq!(sums::<f64, f64>(&x, &[1, 6]), x);
        assert_eq!(sums::<f64, f64>(&[], &[0, 6]), []);
        assert_eq!(sums::<f64, f64>(&[], &[6, 0]), []);
    }

    #[test]
    fn zeros_keep_their_sign_and_nan_stays() {
        let x = [-0.0, -0.0, 0.0, f64::INFINITY, f64::NEG_INFINITY, 1.0];
        let y: Vec<u64> = sums::<f64, f64>(&x, &[6])
            .iter()
            .map(|y| y.to_bits())
            .collect();
        let expected = [-0.0, -0.0, 0.0, f64::INFINITY, f64::NAN, f64::NAN];
        assert_eq!(y, expected.map(f64::to_bits));
    }

    #[test]
    fn narrow_floats_are_summed_in_f64() {
        // In f32 the ones would be lost.
        let big = (1u32 << 24) as f32;
        assert_eq!(
            sums::<f32, f32>(&[big, 1.0, 1.0], &[3]),
            [big, big, big + 2.0]
        );
        let x = [
            F16::from_f64(2048.0),
            F16::from_f64(1.0),
            F16::from_f64(1.0),
        ];
        assert_eq!(sums::<F16, F16>(&x, &[3])[2], F16::from_f64(2050.0));
    }

    #[test]
    fn integers_become_64_bits_wide_and_wrap() {
        assert_eq!(sums::<i8, i64>(&[127, 127, -128], &[3]), [127, 254, 126]);
        assert_eq!(
            sums::<u16, u64>(&[65535; 3], &[3]),
            [65535, 131_070, 196_605]
        );
        assert_eq!(
            sums::<Bool8, i64>(&[Bool8(1), Bool8(7), Bool8(0)], &[3]),
            [1, 2, 2]
        );
        assert_eq!(sums::<i64, i64>(&[i64::MAX, 1], &[2]), [i64::MAX, i64::MIN]);
        assert_eq!(sums::<u64, u64>(&[u64::MAX, 2], &[2]), [u64::MAX, 1]);
    }
}
