//! Mean and sum of squared deviations of many columns at once.
//!
//! The numbers are the same for the same shape, whatever the machine: blocks of rows are reduced in two passes
//! in the first-level cache, and the blocks' moments are merged along a binary tree (Chan, Golub, LeVeque), so
//! that rounding errors grow with the logarithm of the number of rows. A column of equal values
//! has exactly that mean and exactly 0 deviations.

use strait_plugin::prelude::*;

/// Columns of one tile: 4 KiB of each row.
pub(crate) const WIDTH_MAX: usize = 512;
/// Fewer columns than this are no work for SIMD code: then several rows are taken as one (see [`fold`]).
pub(crate) const NARROW: usize = 64;
/// Elements of one tile: 32 KiB of `f64`.
pub(crate) const TILE: usize = 4096;

/// Moments of `width` columns.
#[derive(Debug)]
struct Columns {
    rows: usize,
    mean: Vec<f64>,
    /// Sum of squared deviations from the mean.
    squares: Vec<f64>,
}

impl Columns {
    fn new(width: usize) -> Self {
        Self {
            rows: 0,
            mean: vec![0.0; width],
            squares: vec![0.0; width],
        }
    }

    /// Never allocates: `width` is at most what `new` was given.
    fn resize(&mut self, width: usize) {
        self.mean.resize(width, 0.0);
        self.squares.resize(width, 0.0);
    }

    /// Moments of the rows of both.
    fn merge(&mut self, other: &Self) {
        merge(
            (self.rows, &mut self.mean, &mut self.squares),
            (other.rows, &other.mean, &other.squares),
        );
        self.rows += other.rows;
    }
}

/// Puts b's moments into a's, column by column. Each is: rows, means, sums of squared deviations.
#[inline(never)]
pub(crate) fn merge(
    (a_rows, a_mean, a_squares): (usize, &mut [f64], &mut [f64]),
    (b_rows, b_mean, b_squares): (usize, &[f64], &[f64]),
) {
    if b_rows == 0 {
        return;
    }
    let (a, b) = (a_rows as f64, b_rows as f64);
    let share = b / (a + b);
    let weight = a * share;
    let b = b_mean.iter().zip(b_squares);
    for ((a_mean, a_squares), (b_mean, b_squares)) in a_mean.iter_mut().zip(a_squares).zip(b) {
        let distance = b_mean - *a_mean;
        *a_mean += distance * share;
        *a_squares += b_squares + distance * distance * weight;
    }
}

/// Scratch memory for [`Moments::of`].
#[derive(Debug)]
pub(crate) struct Moments {
    tile: Vec<f64>,
    sums: Vec<f64>,
    block: Columns,
    /// Level i: the merged moments of 2^i blocks, if that bit is set in the number of blocks.
    levels: Vec<Columns>,
}

/// A tile with its moments.
#[derive(Debug)]
pub(crate) struct Tile<'a> {
    pub(crate) elements: &'a mut [f64],
    pub(crate) mean: &'a [f64],
    /// Sums of squared deviations.
    pub(crate) squares: &'a mut [f64],
}

/// A matrix in a row-major tensor: some columns of it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct View<'a, T> {
    /// The first element of the first row and all that follow.
    pub(crate) elements: &'a [T],
    pub(crate) rows: usize,
    /// Elements from one row to the next.
    pub(crate) stride: usize,
    /// Columns, at most [`WIDTH_MAX`].
    pub(crate) width: usize,
}

impl Moments {
    /// For matrices of up to that many rows and columns.
    pub(crate) fn new(rows_max: usize, width_max: usize) -> Self {
        let blocks = rows_max.div_ceil(block_rows(width_max));
        let levels = (usize::BITS - blocks.leading_zeros()) as usize;
        Self {
            tile: vec![0.0; TILE],
            sums: vec![0.0; width_max],
            block: Columns::new(width_max),
            levels: (0..levels).map(|_| Columns::new(width_max)).collect(),
        }
    }

    /// Mean and sum of squared deviations of each column; `rows` is not 0.
    pub(crate) fn of<T: Real>(&mut self, view: View<'_, T>) -> (&[f64], &[f64]) {
        let View {
            elements,
            rows,
            stride,
            width,
        } = view;
        let block_rows = block_rows(width);
        self.resize(width);
        for (index, first) in (0..rows).step_by(block_rows).enumerate() {
            let count = block_rows.min(rows - first);
            let tile = &mut self.tile[..count * width];
            for (row, target) in tile.chunks_exact_mut(width).enumerate() {
                let start = (first + row) * stride;
                map(&elements[start..start + width], target, T::to_f64);
            }
            reduce(tile, &mut self.sums, &mut self.block);
            self.push(index);
        }
        self.collect(rows.div_ceil(block_rows));
        (&self.block.mean, &self.block.squares)
    }

    /// Moments of a matrix of `rows` rows (not 0) that is one tile; `fill` writes its elements.
    pub(crate) fn of_tile(
        &mut self,
        rows: usize,
        width: usize,
        fill: impl FnOnce(&mut [f64]),
    ) -> Tile<'_> {
        self.sums.resize(width, 0.0);
        self.block.resize(width);
        let elements = &mut self.tile[..rows * width];
        fill(elements);
        reduce(elements, &mut self.sums, &mut self.block);
        Tile {
            elements,
            mean: &self.block.mean,
            squares: &mut self.block.squares,
        }
    }

    fn resize(&mut self, width: usize) {
        self.sums.resize(width, 0.0);
        for columns in self.levels.iter_mut().chain([&mut self.block]) {
            columns.resize(width);
        }
    }

    /// Adds the block with that index to the tree.
    fn push(&mut self, index: usize) {
        let level = index.trailing_ones() as usize;
        for earlier in &mut self.levels[..level] {
            earlier.merge(&self.block);
            core::mem::swap(earlier, &mut self.block);
        }
        core::mem::swap(&mut self.levels[level], &mut self.block);
    }

    /// Merges what the tree holds after that many blocks into `block`.
    fn collect(&mut self, blocks: usize) {
        let mut set = (0..self.levels.len()).filter(|level| blocks >> level & 1 == 1);
        let Some(lowest) = set.next() else { return };
        core::mem::swap(&mut self.levels[lowest], &mut self.block);
        for level in set {
            let earlier = &mut self.levels[level];
            earlier.merge(&self.block);
            core::mem::swap(earlier, &mut self.block);
        }
    }
}

fn block_rows(width: usize) -> usize {
    (TILE / width.max(1)).max(1)
}

/// Moments of one block of rows, in two passes: the second one's deviations are from a mean that is right to
/// the last bits.
fn reduce(tile: &[f64], sums: &mut [f64], moments: &mut Columns) {
    let width = sums.len();
    let Columns {
        rows,
        mean,
        squares,
    } = moments;
    *rows = tile.len() / width;
    // Deviations from the first row: equal values add up to exactly 0.
    mean.copy_from_slice(&tile[..width]);
    sums.fill(0.0);
    accumulate(tile, mean, sums, |deviation| deviation);
    let count = *rows as f64;
    for (mean, sum) in mean.iter_mut().zip(&*sums) {
        *mean += sum / count;
    }
    squares.fill(0.0);
    accumulate(tile, mean, squares, |deviation| deviation * deviation);
}

/// Adds `f(element - origin)` of each row to `sums`; four rows at a time, so that the sums are loaded and stored
/// a quarter as often.
#[inline]
fn accumulate(tile: &[f64], origin: &[f64], sums: &mut [f64], f: impl Fn(f64) -> f64) {
    let width = sums.len();
    let mut fours = tile.chunks_exact(4 * width);
    for four in &mut fours {
        let (upper, lower) = four.split_at(2 * width);
        let ((r0, r1), (r2, r3)) = (upper.split_at(width), lower.split_at(width));
        let rows = r0.iter().zip(r1).zip(r2.iter().zip(r3));
        for ((sum, origin), ((r0, r1), (r2, r3))) in sums.iter_mut().zip(origin).zip(rows) {
            *sum += (f(r0 - origin) + f(r1 - origin)) + (f(r2 - origin) + f(r3 - origin));
        }
    }
    for row in fours.remainder().chunks_exact(width) {
        for ((sum, origin), element) in sums.iter_mut().zip(origin).zip(row) {
            *sum += f(element - origin);
        }
    }
}

/// Merges groups of neighbouring columns: columns c, c + inner, c + 2*inner, … of `rows` rows each become column c.
/// Pairs the halves, so that this too is a tree. At most [`NARROW`] groups.
pub(crate) fn fold(rows: usize, mean: &mut [f64], squares: &mut [f64], inner: usize) {
    let mut groups = mean.len() / inner;
    let mut weights = [rows; NARROW];
    while groups > 1 {
        let kept = groups.div_ceil(2);
        for index in 0..groups - kept {
            let (a, b) = (index * inner, (index + kept) * inner);
            let (a_mean, b_mean) = mean.split_at_mut(b);
            let (a_squares, b_squares) = squares.split_at_mut(b);
            merge(
                (
                    weights[index],
                    &mut a_mean[a..a + inner],
                    &mut a_squares[a..a + inner],
                ),
                (weights[index + kept], &b_mean[..inner], &b_squares[..inner]),
            );
            weights[index] += weights[index + kept];
        }
        groups = kept;
    }
}
