//! `matmul`: the product of two matrices.

use core::ops::{Add, Mul};
use strait_plugin::prelude::*;

/// y\[i, j\] = a\[i, 0\]*b\[0, j\] + a\[i, 1\]*b\[1, j\] + … + a\[i, k-1\]*b\[k-1, j\]: `numpy.matmul(a, b)` of two matrices.
///
/// Computed in the inputs' own precision, each product and each sum rounded. The terms are added in blocks of 256,
/// counted from term 0: within a block in their order, to a sum that starts with 0; then the blocks' sums in theirs. So each
/// element depends on its row of a and its column of b only, bit for bit, whatever the shapes and however the rows are cut.
/// (BLAS adds in an order of its own choice.) NaN and infinities come out as in numpy, and every NaN is the positive quiet one.
/// No terms, k = 0, are 0; no rows or no columns are an empty y.
///
/// a may come in chunks of rows; b is there whole.
#[derive(Debug)]
pub struct MatMul;

impl Kernel for MatMul {
    const NAME: &str = "matmul";
    const DOC: &str = "The matrix product a @ b, in the precision of a and b.";
    const INPUTS: &[Port] = &[
        Port::new("a", FLOATS, "Shape (m, k).").rank(2, 2),
        Port::new("b", FLOATS, "Shape (k, n), dtype of a.")
            .rank(2, 2)
            .whole(),
    ];
    const OUTPUTS: &[Port] = &[Port::new("y", FLOATS, "Shape (m, n), dtype of a.").rank(2, 2)];
    const SIGNATURE: &str = "(m,k),(k,n)->(m,n)";
    const SPLIT_AXIS: Option<u32> = Some(0);
    const STREAMING: Streaming = Streaming::Rows;
    const COST_HINT: f64 = 50.0;
    type Parameters = ();

    fn open((): (), inputs: &[Spec]) -> Result<(Self, Vec<Spec>), Error> {
        let (a, b) = (&inputs[0], &inputs[1]);
        if a.dtype != b.dtype {
            let (a, b) = (a.dtype.name(), b.dtype.name());
            return Err(Error::bad_argument(
                "b",
                format!("it is {b}, a is {a}: cast one of them"),
            ));
        }
        Ok((Self, vec![Spec::new(a.dtype, [a.shape[0], b.shape[1]])]))
    }

    fn run(&mut self, call: &mut Call<'_>) -> Result<(), Error> {
        dispatch!(call.input_spec(0).dtype, T in [f32, f64] => {
            let (a, b) = (call.input::<T>(0)?, call.input::<T>(1)?);
            let mut y = call.output::<T>(0)?;
            let (terms, width) = (a.row_len(), y.row_len());
            multiply(&a, &b, &mut y, terms, width);
            Ok(())
        })
    }
}

const FLOATS: &[Dtype] = &[Dtype::Float32, Dtype::Float64];

/// Terms that are added before their sum is added to those of others. Part of the result: see [`MatMul`].
const TERMS: usize = 256;
/// Columns of y that are computed at a time.
const COLUMNS: usize = 256;
/// From so many rows on a block of b is copied to lie in one piece, which takes as long as multiplying one row.
const ROWS_TO_PACK: usize = 8;

trait Float: Real + Add<Output = Self> + Mul<Output = Self> {
    /// Which of two NaNs a sum is would be the compiler's choice.
    fn quiet(self) -> Self;
}

macro_rules! floats {
    ($($type:ty),+) => {
        $(
            impl Float for $type {
                #[inline]
                fn quiet(self) -> Self {
                    if self.is_nan() { <$type>::NAN } else { self }
                }
            }
        )+
    };
}
floats!(f32, f64);

/// Some rows and columns of b.
struct Block<'b, T> {
    elements: &'b [T],
    /// Elements from one row to the next.
    stride: usize,
    width: usize,
}

impl<'b, T> Block<'b, T> {
    #[inline]
    fn row(&self, term: usize) -> &'b [T] {
        &self.elements[term * self.stride..][..self.width]
    }
}

/// Block by block of b, which stays in the second-level cache while all rows of a go by.
fn multiply<T: Float>(a: &[T], b: &[T], y: &mut [T], terms: usize, width: usize) {
    if y.is_empty() {
        return;
    }
    let zero = T::default();
    if terms == 0 {
        y.fill(zero);
        return;
    }
    let rows = y.len() / width;
    let mut packed = Vec::new();
    let mut sums = vec![zero; 4 * COLUMNS.min(width)];
    for column in (0..width).step_by(COLUMNS) {
        let columns = COLUMNS.min(width - column);
        for term in (0..terms).step_by(TERMS) {
            let count = TERMS.min(terms - term);
            let b = &b[term * width + column..];
            let block = if rows < ROWS_TO_PACK {
                Block {
                    elements: b,
                    stride: width,
                    width: columns,
                }
            } else {
                packed.clear();
                for row in b.chunks(width).take(count) {
                    packed.extend_from_slice(&row[..columns]);
                }
                Block {
                    elements: &packed,
                    stride: columns,
                    width: columns,
                }
            };
            let is_first = term == 0;
            let a = a.chunks(4 * terms).map(|rows| &rows[term..]);
            for (a, y) in a.zip(y.chunks_mut(4 * width)) {
                let rows = y.len() / width;
                let sums = &mut sums[..rows * columns];
                sums.fill(zero);
                match rows {
                    4 => of_four(a, terms, count, &block, sums),
                    _ => {
                        for (row, sums) in sums.chunks_mut(columns).enumerate() {
                            of_one(&a[row * terms..][..count], &block, sums);
                        }
                    }
                }
                for (y, sums) in y.chunks_mut(width).zip(sums.chunks(columns)) {
                    put(sums, &mut y[column..][..columns], is_first);
                }
            }
        }
    }
}

/// Four rows of a, `stride` elements apart, `count` of each.
fn of_four<T: Float>(a: &[T], stride: usize, count: usize, b: &Block<'_, T>, sums: &mut [T]) {
    let (s0, s1) = sums.split_at_mut(2 * b.width);
    let ((s0, s1), (s2, s3)) = (s0.split_at_mut(b.width), s1.split_at_mut(b.width));
    let (a0, a1) = (&a[..count], &a[stride..][..count]);
    let (a2, a3) = (&a[2 * stride..][..count], &a[3 * stride..][..count]);
    let mut term = 0;
    while term + 2 <= count {
        let two = |a: &[T]| [a[term], a[term + 1]];
        let factors = [two(a0), two(a1), two(a2), two(a3)];
        four_by_two(&factors, b.row(term), b.row(term + 1), s0, s1, s2, s3);
        term += 2;
    }
    if term < count {
        for (a, sums) in [a0, a1, a2, a3].into_iter().zip([s0, s1, s2, s3]) {
            one_by_one(a[term], b.row(term), sums);
        }
    }
}

fn of_one<T: Float>(a: &[T], b: &Block<'_, T>, sums: &mut [T]) {
    let mut term = 0;
    while term + 4 <= a.len() {
        let factors = [a[term], a[term + 1], a[term + 2], a[term + 3]];
        let rows = [
            b.row(term),
            b.row(term + 1),
            b.row(term + 2),
            b.row(term + 3),
        ];
        one_by_four(factors, rows, sums);
        term += 4;
    }
    for (term, factor) in a.iter().enumerate().skip(term) {
        one_by_one(*factor, b.row(term), sums);
    }
}

// Functions of their own, so that the compiler knows of slices that do not overlap: then each loop is SIMD code.

#[inline(never)]
fn four_by_two<T: Float>(
    factors: &[[T; 2]; 4],
    b0: &[T],
    b1: &[T],
    s0: &mut [T],
    s1: &mut [T],
    s2: &mut [T],
    s3: &mut [T],
) {
    let [f0, f1, f2, f3] = *factors;
    let width = s0.len();
    let (b0, b1) = (&b0[..width], &b1[..width]);
    let (s1, s2, s3) = (&mut s1[..width], &mut s2[..width], &mut s3[..width]);
    for j in 0..width {
        s0[j] = s0[j] + f0[0] * b0[j] + f0[1] * b1[j];
        s1[j] = s1[j] + f1[0] * b0[j] + f1[1] * b1[j];
        s2[j] = s2[j] + f2[0] * b0[j] + f2[1] * b1[j];
        s3[j] = s3[j] + f3[0] * b0[j] + f3[1] * b1[j];
    }
}

#[inline(never)]
fn one_by_four<T: Float>(factors: [T; 4], b: [&[T]; 4], sums: &mut [T]) {
    let width = sums.len();
    let [b0, b1, b2, b3] = b.map(|b| &b[..width]);
    let [f0, f1, f2, f3] = factors;
    for j in 0..width {
        sums[j] = sums[j] + f0 * b0[j] + f1 * b1[j] + f2 * b2[j] + f3 * b3[j];
    }
}

#[inline(never)]
fn one_by_one<T: Float>(factor: T, b: &[T], sums: &mut [T]) {
    for (sum, b) in sums.iter_mut().zip(b) {
        *sum = *sum + factor * *b;
    }
}

/// Adds the sums of a block of terms to those of the blocks before.
#[inline(never)]
fn put<T: Float>(sums: &[T], y: &mut [T], is_first: bool) {
    for (y, sum) in y.iter_mut().zip(sums) {
        *y = (if is_first { *sum } else { *y + *sum }).quiet();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn product<T: Element>(a: (&[T], [u64; 2]), b: (&[T], [u64; 2])) -> Result<Tensor, Error> {
        let inputs = [Tensor::shaped(a.0, &a.1), Tensor::shaped(b.0, &b.1)];
        Ok(testing::invoke::<MatMul>(&[], &inputs)?.outputs.remove(0))
    }

    /// What the documentation says, in the plainest way.
    fn reference<T: Float>(a: &[T], b: &[T], [rows, terms, columns]: [usize; 3]) -> Vec<T> {
        let element = |row: usize, column: usize| {
            let blocks = (0..terms).step_by(256).map(|first| {
                let in_block = first..terms.min(first + 256);
                in_block.fold(T::default(), |sum, term| {
                    sum + a[row * terms + term] * b[term * columns + column]
                })
            });
            blocks.reduce(|sum, block| sum + block).unwrap_or_default()
        };
        let all = (0..rows).flat_map(|row| (0..columns).map(move |column| (row, column)));
        all.map(|(row, column)| element(row, column)).collect()
    }

    fn numbers<T: Float>(count: usize, seed: u64) -> Vec<T> {
        let mut state = seed;
        let next = |_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            T::from_f64((state >> 11) as f64 / (1u64 << 53) as f64 - 0.5)
        };
        (0..count).map(next).collect()
    }

    fn agrees<T: Float>(shape: [usize; 3]) {
        let [rows, terms, columns] = shape;
        let (a, b) = (numbers(rows * terms, 1), numbers(terms * columns, 2));
        let y = product::<T>(
            (&a, [rows as u64, terms as u64]),
            (&b, [terms as u64, columns as u64]),
        )
        .expect("valid");
        assert_eq!(y.shape, [rows as u64, columns as u64]);
        assert_eq!(y.values::<T>(), reference(&a, &b, shape), "{shape:?}");
    }

    #[test]
    fn adds_in_the_order_that_it_promises() {
        for rows in [1, 2, 3, 4, 5, 7, 8, 9, 33] {
            for terms in [1, 2, 3, 5, 255, 256, 257, 515] {
                for columns in [1, 2, 9, 67] {
                    agrees::<f64>([rows, terms, columns]);
                    agrees::<f32>([rows, terms, columns]);
                }
            }
        }
        for shape in [[9, 70, 255], [5, 300, 256], [3, 259, 257], [17, 513, 530]] {
            agrees::<f64>(shape);
            agrees::<f32>(shape);
        }
    }

    #[test]
    fn empty_axes() {
        for (shape, expected) in [
            ([2, 0, 3], &[0.0; 6][..]),
            ([0, 4, 3], &[]),
            ([2, 4, 0], &[]),
            ([0, 0, 0], &[]),
        ] {
            let [rows, terms, columns] = shape;
            let (a, b) = ([1.0; 8], [1.0; 12]);
            let (a, b) = (&a[..rows * terms], &b[..terms * columns]);
            let (m, k, n) = (rows as u64, terms as u64, columns as u64);
            let y = product::<f64>((a, [m, k]), (b, [k, n])).expect("valid");
            assert_eq!(y.shape, [m, n]);
            assert_eq!(y.values::<f64>(), expected);
        }
    }

    #[test]
    fn what_is_not_finite() {
        let (inf, nan) = (f64::INFINITY, f64::NAN);
        let a = [1.0, 0.0, inf, 1.0, -nan, 2.0, inf, 1.0];
        let y = product((&a[..], [4, 2]), (&[1.0, -1.0, 0.0, inf, 1.0, 2.0], [2, 3]));
        let y = y.expect("valid").values::<f64>();
        let expected = [
            nan, -1.0, 0.0, inf, -inf, nan, nan, nan, nan, inf, -inf, nan,
        ];
        for (index, (y, expected)) in y.iter().zip(expected).enumerate() {
            assert_eq!(y.to_bits(), expected.to_bits(), "{index}");
        }
        // No fused multiply-add, and no sum in more than its own precision.
        let (a, x) = (1.0 + f64::EPSILON, 1.0 - f64::EPSILON);
        let y = product((&[-1.0, a], [1, 2]), (&[1.0, x], [2, 1])).expect("valid");
        assert_eq!(y.values::<f64>(), [-1.0 + a * x]);
        let y = product((&[1e8f32, 1.0], [1, 2]), (&[1.0f32, 1.0], [2, 1])).expect("valid");
        assert_eq!(y.values::<f32>(), [1e8]);
    }

    #[test]
    fn two_dtypes_are_refused() {
        let inputs = [
            Tensor::shaped(&[1.0f32], &[1, 1]),
            Tensor::shaped(&[1.0], &[1, 1]),
        ];
        let Err(Error::BadArgument(bad)) = testing::invoke::<MatMul>(&[], &inputs) else {
            panic!("float32 by float64 was taken")
        };
        assert_eq!(
            (&*bad.name, &*bad.reason),
            ("b", "it is float64, a is float32: cast one of them")
        );
    }
}
