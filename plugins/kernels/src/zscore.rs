//! `zscore`: standard scores along an axis.

use crate::columns::result_dtype;
use crate::moments::{Moments, NARROW, TILE, Tile, View, WIDTH_MAX, fold, merge};
use strait_plugin::prelude::*;
use strait_plugin::{AxisSplit, sqrt};

parameters! {
    /// Parameters of `zscore`.
    pub struct Parameters {
        /// The axis along which mean and deviation are taken; 0 is the first and slowest.
        pub axis: Axis = Axis(0),
    }
}

/// (x - mean) / standard deviation along one axis, with the population's deviation (divisor n).
///
/// Computed in f64 for every dtype; floats give their own dtype, rounded once, integers and `bool8` give
/// float64. Where all values along the axis are equal the result is 0/0, NaN, as in numpy. Values whose squares
/// an f64 cannot hold are scaled first, where numpy gives NaN or infinity.
#[derive(Debug)]
pub struct ZScore {
    split: AxisSplit,
    scratch: Scratch,
}

impl Kernel for ZScore {
    const NAME: &str = "zscore";
    const DOC: &str =
        "(x - mean) / population standard deviation along `axis`; integers give float64.";
    const INPUTS: &[Port] =
        &[Port::new("x", dtypes::REALS, "At least one axis.").rank(1, Port::RANK_MAX)];
    const OUTPUTS: &[Port] = &[Port::new(
        "y",
        dtypes::FLOATS,
        "Shape of x; its dtype if that is a float, else float64.",
    )
    .rank(1, Port::RANK_MAX)];
    const SIGNATURE: &str = "()->()";
    const COST_HINT: f64 = 3.0;
    type Parameters = Parameters;

    fn open(parameters: Parameters, inputs: &[Spec]) -> Result<(Self, Vec<Spec>), Error> {
        let x = &inputs[0];
        let split = parameters.axis.split("x", x)?;
        Ok((
            Self {
                split,
                scratch: Scratch::new(split),
            },
            vec![x.with_dtype(result_dtype(x.dtype))],
        ))
    }

    fn run(&mut self, call: &mut Call<'_>) -> Result<(), Error> {
        let (from, to) = (call.input_spec(0).dtype, call.output_spec(0).dtype);
        if from == to {
            dispatch!(from, T in floats => { self.standardise::<T, T>(call) })
        } else {
            dispatch!(from, T in [Bool8, i8, i16, i32, i64, u8, u16, u32, u64] => {
                self.standardise::<T, f64>(call)
            })
        }
    }
}

impl ZScore {
    fn standardise<T: Real, O: Real>(&mut self, call: &mut Call<'_>) -> Result<(), Error> {
        let x = call.input::<T>(0)?;
        let mut y = call.output::<O>(0)?;
        let AxisSplit {
            outer,
            length,
            inner,
        } = self.split;
        if x.is_empty() {
            return Ok(());
        }
        if outer > 1 && length * inner <= SHORT {
            self.scratch.short(&x, &mut y, length, inner);
            return Ok(());
        }
        for (x, y) in x.chunks(length * inner).zip(y.chunks_mut(length * inner)) {
            if inner < NARROW {
                self.scratch.narrow(x, y, length, inner);
            } else {
                self.scratch.wide(x, y, length, inner);
            }
        }
        Ok(())
    }
}

/// Blocks of at most that many elements are not worth a pass of their own: several share a tile.
const SHORT: usize = TILE / 8;

#[derive(Debug)]
struct Scratch {
    moments: Moments,
    /// A tile's worth of elements in the tensor's order.
    flat: Vec<f64>,
    mean: Vec<f64>,
    /// Sums of squared deviations, then standard deviations.
    deviation: Vec<f64>,
}

impl Scratch {
    fn new(split: AxisSplit) -> Self {
        let (rows, width) = if split.length.saturating_mul(split.inner) <= SHORT {
            (split.length, WIDTH_MAX)
        } else if split.inner < NARROW {
            (split.length.div_ceil(rows_in_one(split.inner)), NARROW)
        } else {
            (split.length, split.inner.min(WIDTH_MAX))
        };
        Self {
            moments: Moments::new(rows, width),
            flat: vec![0.0; TILE],
            mean: vec![0.0; width],
            deviation: vec![0.0; width],
        }
    }

    /// Many small matrices: as many as fit a tile lie in it side by side.
    fn short<T: Real, O: Real>(&mut self, x: &[T], y: &mut [O], length: usize, inner: usize) {
        let block = length * inner;
        let taken = (TILE / block).min(WIDTH_MAX / inner);
        for (x, y) in x.chunks(taken * block).zip(y.chunks_mut(taken * block)) {
            let blocks = x.len() / block;
            let flat = &mut self.flat[..x.len()];
            map(x, flat, T::to_f64);
            let fill = |tile: &mut [f64]| swap_axes(flat, tile, blocks, length, inner);
            let Tile {
                elements,
                mean,
                squares,
            } = self.moments.of_tile(length, blocks * inner, fill);
            to_deviations(squares, length);
            for row in elements.chunks_exact_mut(blocks * inner) {
                for (x, (mean, deviation)) in row.iter_mut().zip(mean.iter().zip(&*squares)) {
                    *x = (*x - mean) / deviation;
                }
            }
            swap_axes(elements, flat, length, blocks, inner);
            map(flat, y, O::from_f64);
            for column in out_of_range::<T>(squares) {
                let first = column / inner * block + column % inner;
                rescale(&x[first..], &mut y[first..], length, inner);
            }
        }
    }

    /// A matrix with many columns: tile by tile of columns.
    fn wide<T: Real, O: Real>(&mut self, x: &[T], y: &mut [O], length: usize, inner: usize) {
        for start in (0..inner).step_by(WIDTH_MAX) {
            let width = WIDTH_MAX.min(inner - start);
            let view = View {
                elements: &x[start..],
                rows: length,
                stride: inner,
                width,
            };
            let (mean, squares) = self.moments.of(view);
            let deviation = &mut self.deviation[..width];
            deviation.copy_from_slice(squares);
            to_deviations(deviation, length);
            for (x, y) in x.chunks(inner).zip(y.chunks_mut(inner)) {
                scores(
                    &x[start..start + width],
                    &mut y[start..start + width],
                    mean,
                    deviation,
                );
            }
            for column in out_of_range::<T>(deviation) {
                let first = start + column;
                rescale(&x[first..], &mut y[first..], length, inner);
            }
        }
    }

    /// A matrix with few columns: several rows are taken as one, and their columns' moments merged.
    fn narrow<T: Real, O: Real>(&mut self, x: &[T], y: &mut [O], length: usize, inner: usize) {
        let taken = rows_in_one(inner).min(length);
        let width = taken * inner;
        let (mean, deviation) = (&mut self.mean[..width], &mut self.deviation[..width]);
        let rows = length / taken;
        let (m, s) = self.moments.of(View {
            elements: x,
            rows,
            stride: width,
            width,
        });
        mean.copy_from_slice(m);
        deviation.copy_from_slice(s);
        fold(rows, mean, deviation, inner);
        let rest = length % taken;
        if rest > 0 {
            let view = View {
                elements: &x[rows * width..],
                rows: rest,
                stride: inner,
                width: inner,
            };
            let (m, s) = self.moments.of(view);
            merge(
                (rows * taken, &mut mean[..inner], &mut deviation[..inner]),
                (rest, m, s),
            );
        }
        to_deviations(&mut deviation[..inner], length);
        for column in inner..width {
            mean[column] = mean[column - inner];
            deviation[column] = deviation[column - inner];
        }
        for (x, y) in x.chunks(width).zip(y.chunks_mut(width)) {
            scores(x, y, mean, deviation);
        }
        for column in out_of_range::<T>(&deviation[..inner]) {
            rescale(&x[column..], &mut y[column..], length, inner);
        }
    }
}

fn rows_in_one(inner: usize) -> usize {
    NARROW / inner.max(1)
}

/// From shape (a, b, inner) to shape (b, a, inner).
#[inline(never)]
fn swap_axes(from: &[f64], to: &mut [f64], a: usize, b: usize, inner: usize) {
    for (j, row) in to.chunks_exact_mut(a * inner).enumerate() {
        if inner == 1 {
            for (to, from) in row.iter_mut().zip(from[j..].iter().step_by(b)) {
                *to = *from;
            }
        } else {
            let pieces = from[j * inner..].chunks(b * inner);
            for (to, from) in row.chunks_exact_mut(inner).zip(pieces) {
                for (to, from) in to.iter_mut().zip(from) {
                    *to = *from;
                }
            }
        }
    }
}

#[inline(never)]
fn to_deviations(squares: &mut [f64], count: usize) {
    for value in squares {
        *value = sqrt(*value / count as f64);
    }
}

/// One row of scores; `y` may be shorter than the columns.
#[inline(never)]
fn scores<T: Real, O: Real>(x: &[T], y: &mut [O], mean: &[f64], deviation: &[f64]) {
    for ((y, x), (mean, deviation)) in y.iter_mut().zip(x).zip(mean.iter().zip(deviation)) {
        *y = O::from_f64((x.to_f64() - mean) / deviation);
    }
}

/// Columns in which squared deviations may have been infinite, or so small that they lost bits. Of all dtypes only
/// float64 has such values.
fn out_of_range<T: Real>(deviation: &[f64]) -> impl Iterator<Item = usize> + '_ {
    const LEAST: f64 = f64::from_bits((1023 - 400) << 52);
    let is_in_range = |deviation: f64| (LEAST..f64::INFINITY).contains(&deviation);
    // Without an early exit this is SIMD code, and nearly always all that there is to do.
    let none = T::DTYPE != Dtype::Float64
        || deviation
            .iter()
            .fold(true, |all, &deviation| all & is_in_range(deviation));
    let looked_at = if none { &[][..] } else { deviation };
    let columns = looked_at.iter().enumerate();
    columns.filter_map(move |(column, &deviation)| (!is_in_range(deviation)).then_some(column))
}

/// The scores of one column: every `stride`th of the elements, `rows` of them. They are scaled by a power of two,
/// which is exact, so that the largest is near 1. Columns of equal values, or with infinities or NaN, are left alone.
#[inline(never)]
fn rescale<T: Real, O: Real>(x: &[T], y: &mut [O], rows: usize, stride: usize) {
    let column = || x.iter().step_by(stride).take(rows).map(|x| x.to_f64());
    let (mut least, mut largest, mut is_finite) = (f64::INFINITY, f64::NEG_INFINITY, true);
    for x in column() {
        (least, largest) = (least.min(x), largest.max(x));
        is_finite &= x.is_finite();
    }
    if !is_finite || least == largest {
        return;
    }
    let scale = reciprocal_power(largest.max(-least));
    let scaled = || column().map(|x| x * scale);
    let origin = least * scale;
    let mean = origin + sum(scaled().map(|x| x - origin)) / rows as f64;
    let squares = sum(scaled().map(|x| (x - mean) * (x - mean)));
    let deviation = sqrt(squares / rows as f64);
    for (y, x) in y.iter_mut().step_by(stride).zip(scaled()) {
        *y = O::from_f64((x - mean) / deviation);
    }
}

/// The power of two that brings a positive number to between 1 and 2, or near that where it would not be normal.
fn reciprocal_power(value: f64) -> f64 {
    let exponent = value.to_bits() >> 52;
    f64::from_bits((2046_u64.saturating_sub(exponent)).clamp(23, 2023) << 52)
}

/// Compensated (Neumaier): it is right to the last bits for any number of values.
fn sum(values: impl Iterator<Item = f64>) -> f64 {
    let (mut sum, mut lost) = (0.0f64, 0.0f64);
    for value in values {
        let next = sum + value;
        lost += if sum.abs() >= value.abs() {
            (sum - next) + value
        } else {
            (value - next) + sum
        };
        sum = next;
    }
    sum + lost
}

#[cfg(test)]
#[expect(
    clippy::cast_possible_truncation,
    reason = "the tests' tensors are small"
)]
mod tests {
    use super::*;

    /// Along axis `axis`, in the plainest way, with compensated sums.
    fn reference(x: &[f64], shape: &[u64], axis: usize) -> Vec<f64> {
        let length = shape[axis] as usize;
        let inner: usize = shape[axis + 1..].iter().product::<u64>() as usize;
        let mut y = vec![0.0; x.len()];
        let sum = |values: &[f64]| sum(values.iter().copied());
        for start in (0..x.len()).filter(|i| (i / inner).is_multiple_of(length)) {
            let at = |k: usize| start + k * inner;
            let values: Vec<f64> = (0..length).map(|k| x[at(k)]).collect();
            let mean = sum(&values) / length as f64;
            let squares: Vec<f64> = values.iter().map(|x| (x - mean) * (x - mean)).collect();
            let deviation = (sum(&squares) / length as f64).sqrt();
            for (k, value) in values.iter().enumerate() {
                y[at(k)] = (value - mean) / deviation;
            }
        }
        y
    }

    fn zscore<T: Element>(x: &[T], shape: &[u64], axis: u32) -> Tensor {
        let outcome =
            testing::invoke::<ZScore>(&[("axis", Value::Axis(axis))], &[Tensor::shaped(x, shape)]);
        outcome.expect("valid").outputs.remove(0)
    }

    fn numbers(count: usize) -> Vec<f64> {
        let mut state = 1u64;
        (0..count)
            .map(|_| {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1_442_695_040_888_963_407);
                (state >> 11) as f64 / (1u64 << 53) as f64 * 3.0 + 10.0
            })
            .collect()
    }

    /// Each goes another way through the tiles along one of its axes.
    const SHAPES: &[&[u64]] = &[
        &[1],
        &[2],
        &[63],
        &[64],
        &[65],
        &[4096],
        &[10_000],
        &[7, 1],
        &[1, 7],
        &[500, 3],
        &[3, 500],
        &[9, 513],
        &[17, 1025],
        &[100, 63],
        &[100, 64],
        &[300, 33],
        &[2, 70, 3],
        &[2, 3, 70],
        &[70, 2, 3],
        &[3, 65, 2, 40],
        &[2, 129, 64],
        &[5000, 3],
        &[3000, 2, 2],
        &[9, 512],
        &[9, 256, 2],
        &[300, 5, 63],
    ];

    #[test]
    fn every_way_through_the_tiles() {
        for shape in SHAPES {
            let x = numbers(shape.iter().product::<u64>() as usize);
            for axis in 0..shape.len() {
                let (y, expected) = (
                    zscore(&x, shape, axis as u32).values::<f64>(),
                    reference(&x, shape, axis),
                );
                for (i, (y, expected)) in y.iter().zip(&expected).enumerate() {
                    let close = (y - expected).abs() <= 1e-12 * expected.abs().max(1.0);
                    assert!(
                        close || (y.is_nan() && expected.is_nan()),
                        "{shape:?} axis {axis}: y[{i}] = {y}, {expected}"
                    );
                }
            }
        }
    }

    #[test]
    fn values_that_cannot_be_squared() {
        assert_eq!(
            zscore(&[1.7e308, -1.7e308], &[2], 0).values::<f64>(),
            [1.0, -1.0]
        );
        assert_eq!(
            zscore(&[f64::MAX, f64::MAX, f64::MIN, f64::MIN], &[2, 2], 0).values::<f64>(),
            [1.0, 1.0, -1.0, -1.0]
        );
        // Multiples of the least number there is.
        let tiny = [1.0, 2.0, 3.0].map(|x| x * f64::from_bits(1));
        let y = zscore(&tiny, &[3], 0).values::<f64>();
        let expected = zscore(&[1.0, 2.0, 3.0], &[3], 0).values::<f64>();
        assert_eq!(y, expected);
        // Scaling by a power of two is exact and must not be seen, column by column.
        let scales = [1019, -1000, 0, 600, -600].map(|power| 2.0f64.powi(power));
        for shape in SHAPES {
            let plain = numbers(shape.iter().product::<u64>() as usize);
            for axis in 0..shape.len() {
                let length = shape[axis] as usize;
                let inner: usize = shape[axis + 1..].iter().product::<u64>() as usize;
                let column = |i: usize| i / (length * inner) * inner + i % inner;
                let scale = |i: usize| scales[column(i) % scales.len()];
                let x: Vec<f64> = plain
                    .iter()
                    .enumerate()
                    .map(|(i, x)| x * scale(i))
                    .collect();
                let y = zscore(&x, shape, axis as u32).values::<f64>();
                let expected = reference(&plain, shape, axis);
                for (i, (y, expected)) in y.iter().zip(&expected).enumerate() {
                    let close = (y - expected).abs() <= 1e-12 * expected.abs().max(1.0);
                    assert!(
                        close || (y.is_nan() && expected.is_nan()),
                        "{shape:?} axis {axis}: y[{i}] = {y}, {expected}"
                    );
                }
            }
        }
    }

    #[test]
    fn far_from_zero() {
        // Next to 2^40 numbers are 2^-12 apart: the mean cannot be had better than that, in no way.
        let x: Vec<f64> = numbers(100_000)
            .iter()
            .map(|x| x + 2.0f64.powi(40))
            .collect();
        let (y, expected) = (
            zscore(&x, &[100_000], 0).values::<f64>(),
            reference(&x, &[100_000], 0),
        );
        let deviation = 3.0 / 12.0f64.sqrt();
        for (y, expected) in y.iter().zip(&expected) {
            assert!(
                (y - expected).abs() <= 2.0 * 2.0f64.powi(-12) / deviation,
                "{y} {expected}"
            );
        }
    }

    #[test]
    fn equal_values_are_nan_whatever_the_value() {
        for value in [0.1, 0.0, 1e-300, -3.3e17, 1.0 / 3.0, -1.7e308] {
            for shape in [
                &[3][..],
                &[1000],
                &[100_000],
                &[700, 70],
                &[70, 700],
                &[333, 5],
            ] {
                let count = shape.iter().product::<u64>() as usize;
                let y = zscore(&vec![value; count], shape, 0).values::<f64>();
                assert!(
                    y.iter().all(|y| y.is_nan()),
                    "{value} {shape:?}: {:?}",
                    &y[..3]
                );
            }
        }
    }

    #[test]
    fn dtypes_of_the_result() {
        let expected = [-1.224_744_871_391_589, 0.0, 1.224_744_871_391_589];
        let f64s = |y: Tensor| y.values::<f64>();
        let close = |y: Vec<f64>| y.iter().zip(expected).all(|(y, e)| (y - e).abs() < 1e-15);
        assert!(close(f64s(zscore(&[1i8, 2, 3], &[3], 0))));
        assert!(close(f64s(zscore(&[10u64, 20, 30], &[3], 0))));
        assert_eq!(f64s(zscore(&[Bool8(0), Bool8(9)], &[2], 0)), [-1.0, 1.0]);
        assert_eq!(
            zscore(&[1.0f32, 2.0, 3.0], &[3], 0).values::<f32>(),
            expected.map(|y| y as f32)
        );
        let narrow = |values: [f64; 3]| values.map(Bf16::from_f64);
        assert_eq!(
            zscore(&narrow([1.0, 2.0, 3.0]), &[3], 0).values::<Bf16>(),
            narrow(expected)
        );
        assert_eq!(zscore::<f64>(&[], &[0, 4], 0).values::<f64>(), []);
        assert_eq!(zscore::<f64>(&[], &[4, 0], 0).values::<f64>(), []);
    }

    #[test]
    fn nan_and_infinity_spoil_their_own_column() {
        for scale in [1.0, 5e307, 1e-200] {
            let x = [1.0, 1.0, 1.0, 2.0, f64::NAN, f64::INFINITY, 3.0, 3.0, 3.0];
            let y = zscore(&x.map(|x| x * scale), &[3, 3], 0).values::<f64>();
            for (i, y) in y.iter().enumerate() {
                assert_eq!(y.is_nan(), i % 3 != 0, "{i}");
            }
        }
    }

    #[test]
    fn an_axis_that_is_not_there_is_refused() {
        let refused = testing::invoke::<ZScore>(
            &[("axis", Value::Axis(2))],
            &[Tensor::shaped(&[0.0; 4], &[2, 2])],
        );
        let Err(Error::BadArgument(bad)) = refused else {
            panic!("{refused:?}")
        };
        assert_eq!(
            (bad.name.as_str(), bad.reason.as_str()),
            ("axis", "axis 2 of x, which has 2 axes: give one below 2")
        );
    }
}
