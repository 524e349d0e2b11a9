//! Kernels of every kind of stream, cut at random: what an author relies on.

#![expect(clippy::unwrap_used, reason = "kernels of a test")]

use strait_plugin::prelude::*;
use testing::{Cuts, assert_streams, invoke, invoke_in_chunks};

const F64: &[Dtype] = &[Dtype::Float64];

parameters! {
    struct Count {
        #[minimum(0)]
        count: i64,
    }
}

fn count(count: i64) -> [(&'static str, Value); 1] {
    [("count", Value::Number(count.into()))]
}

fn size(count: i64) -> usize {
    usize::try_from(count).unwrap()
}

fn bits(tensor: &Tensor) -> Vec<u64> {
    tensor.values::<f64>().iter().map(|x| x.to_bits()).collect()
}

/// Tensors of every kind of shape, with values that tell rows apart.
fn tensors() -> Vec<Tensor> {
    [
        &[0][..],
        &[1],
        &[2],
        &[97],
        &[0, 3],
        &[5, 0],
        &[31, 3],
        &[12, 2, 2],
        &[6, 100],
    ]
    .iter()
    .map(|shape| {
        let all: u64 = shape.iter().product();
        let values: Vec<f64> = (0..all).map(|i| i as f64 + 0.5).collect();
        Tensor::shaped(&values, shape)
    })
    .collect()
}

/// The largest of each element and the `count` ones before it in its column.
struct Largest(usize);

impl Kernel for Largest {
    const NAME: &str = "largest";
    const DOC: &str = "";
    const INPUTS: &[Port] = &[Port::new("x", F64, "").rank(1, 8)];
    const OUTPUTS: &[Port] = &[Port::new("y", F64, "").rank(1, 8)];
    const STREAMING: Streaming = Streaming::Rows;
    type Parameters = Count;

    fn open(count: Count, inputs: &[Spec]) -> Result<(Self, Vec<Spec>), Error> {
        Ok((Self(size(count.count)), inputs.to_vec()))
    }

    fn history(&self) -> usize {
        self.0
    }

    fn run(&mut self, call: &mut Call<'_>) -> Result<(), Error> {
        let x = call.input::<f64>(0)?;
        let mut y = call.output::<f64>(0)?;
        let (lead, width) = (x.lead(), x.row_len());
        assert_eq!(lead as u64, x.first_row().min(self.0 as u64));
        assert_eq!(x.len(), lead * width + y.len());
        for (index, y) in y.iter_mut().enumerate() {
            let at = lead * width + index;
            let earlier = (0..=self.0).map_while(|back| at.checked_sub(back * width));
            *y = earlier
                .map(|at| x[at])
                .fold(f64::NEG_INFINITY, |a, b| if a > b { a } else { b });
        }
        Ok(())
    }
}

#[test]
fn windows_overlap_chunks() {
    for mut x in tensors() {
        let values: Vec<f64> = x.values::<f64>().iter().map(|x| (x * 7.3) % 11.0).collect();
        x = Tensor::shaped(&values, &x.shape);
        for back in [0, 1, 2, 5, 30, 1 << 40] {
            assert_streams::<Largest>(&count(back), std::slice::from_ref(&x));
        }
    }
    let x = Tensor::new(&[1.0, 4.0, 2.0, 3.0, 0.0]);
    let y = invoke::<Largest>(&count(2), &[x]).unwrap();
    assert_eq!(y.outputs[0].values::<f64>(), [1.0, 4.0, 4.0, 4.0, 3.0]);
}

/// What stood `count` rows later less what stands: the last rows come when there are no more.
struct Ahead(u64);

impl Kernel for Ahead {
    const NAME: &str = "ahead";
    const DOC: &str = "";
    const INPUTS: &[Port] = &[Port::new("x", F64, "").rank(1, 8)];
    const OUTPUTS: &[Port] = &[Port::new("y", F64, "").rank(1, 8)];
    const STREAMING: Streaming = Streaming::Rows;
    type Parameters = Count;

    fn open(count: Count, inputs: &[Spec]) -> Result<(Self, Vec<Spec>), Error> {
        let lag = u64::try_from(count.count).unwrap().min(inputs[0].rows());
        Ok((Self(lag), inputs.to_vec()))
    }

    fn history(&self) -> usize {
        usize::try_from(self.0).unwrap()
    }

    fn run(&mut self, call: &mut Call<'_>) -> Result<(), Error> {
        let x = call.input::<f64>(0)?;
        let width = x.row_len();
        // The lead is short at the start, and then nothing can be said of its rows yet.
        let rows = x.shape()[0].saturating_sub(self.0);
        let (rows, lag) = (usize::try_from(rows).unwrap(), self.history() * width);
        let rows = rows.min(usize::try_from(x.shape()[0]).unwrap() - x.lead());
        let mut y = call.output::<f64>(0)?;
        let start = x.len() - lag.min(x.len()) - rows * width;
        for (index, y) in y[..rows * width].iter_mut().enumerate() {
            *y = x[start + index + lag] - x[start + index];
        }
        call.written(0, rows)
    }

    fn finish(&mut self, call: &mut Call<'_>) -> Result<(), Error> {
        let x = call.input::<f64>(0)?;
        let mut y = call.output::<f64>(0)?;
        let (left, width) = (self.history(), x.row_len());
        let room = usize::try_from(y.shape()[0]).unwrap();
        let rows = left.min(room);
        let start = x.len() - left * width;
        y[..rows * width].copy_from_slice(&x[start..][..rows * width]);
        self.0 -= rows as u64;
        if rows < left {
            call.more();
        }
        call.written(0, rows)
    }
}

#[test]
fn the_last_rows_come_after_the_last_chunk() {
    for x in tensors() {
        for lag in [0, 1, 3, 50] {
            assert_streams::<Ahead>(&count(lag), std::slice::from_ref(&x));
        }
    }
    let x = Tensor::new(&[1.0, 4.0, 2.0, 3.0, 0.0]);
    let y = invoke::<Ahead>(&count(2), &[x]).unwrap();
    assert_eq!(y.outputs[0].values::<f64>(), [1.0, -1.0, -2.0, 3.0, 0.0]);
}

/// Each row `count` times.
struct Repeat {
    times: usize,
    /// How often the next row was given.
    given: usize,
}

impl Kernel for Repeat {
    const NAME: &str = "repeat";
    const DOC: &str = "";
    const INPUTS: &[Port] = &[Port::new("x", F64, "").rank(1, 8)];
    const OUTPUTS: &[Port] = &[Port::new("y", F64, "").rank(1, 8)];
    const STREAMING: Streaming = Streaming::Free;
    type Parameters = Count;

    fn open(count: Count, inputs: &[Spec]) -> Result<(Self, Vec<Spec>), Error> {
        let times = size(count.count);
        let mut y = inputs[0].clone();
        y.shape[0] *= times as u64;
        Ok((Self { times, given: 0 }, vec![y]))
    }

    fn run(&mut self, call: &mut Call<'_>) -> Result<(), Error> {
        let x = call.input::<f64>(0)?;
        let mut y = call.output::<f64>(0)?;
        let (rows, width) = (usize::try_from(x.shape()[0]).unwrap(), x.row_len());
        let room = usize::try_from(y.shape()[0]).unwrap();
        let (mut row, mut written) = (0, 0);
        while row < rows {
            if self.given == self.times {
                self.given = 0;
                row += 1;
            } else if written < room {
                y[written * width..][..width].copy_from_slice(&x[row * width..][..width]);
                self.given += 1;
                written += 1;
            } else {
                call.more();
                break;
            }
        }
        call.consumed(0, row)?;
        call.written(0, written)
    }
}

#[test]
fn more_rows_than_there_were() {
    for x in tensors() {
        for times in [1, 2, 7] {
            assert_streams::<Repeat>(&count(times), std::slice::from_ref(&x));
        }
        let none = invoke::<Repeat>(&count(0), &[x]).unwrap();
        assert_eq!(none.outputs[0].shape[0], 0);
    }
    let y = invoke::<Repeat>(&count(2), &[Tensor::new(&[1.0, 2.0])]).unwrap();
    assert_eq!(y.outputs[0].values::<f64>(), [1.0, 1.0, 2.0, 2.0]);
}

/// The sum of each `count` rows, and of what is left: rows that are too few yet are not consumed.
struct Groups(usize);

impl Groups {
    fn sums(&self, call: &mut Call<'_>, whole: bool) -> Result<(), Error> {
        let x = call.input::<f64>(0)?;
        let mut y = call.output::<f64>(0)?;
        let (rows, width) = (usize::try_from(x.shape()[0]).unwrap(), x.row_len());
        let room = usize::try_from(y.shape()[0]).unwrap();
        let there = match whole {
            true => rows / self.0,
            false => rows.div_ceil(self.0),
        };
        let groups = there.min(room);
        for group in 0..groups {
            let last = rows.min((group + 1) * self.0);
            for column in 0..width {
                let rows = group * self.0..last;
                y[group * width + column] = rows.map(|row| x[row * width + column]).sum();
            }
        }
        if groups < there {
            call.more();
        }
        if whole {
            call.consumed(0, groups * self.0)?;
        }
        call.written(0, groups)
    }
}

impl Kernel for Groups {
    const NAME: &str = "groups";
    const DOC: &str = "";
    const INPUTS: &[Port] = &[Port::new("x", F64, "").rank(1, 8)];
    const OUTPUTS: &[Port] = &[Port::new("y", F64, "").rank(1, 8)];
    const STREAMING: Streaming = Streaming::Free;
    type Parameters = Count;

    fn open(count: Count, inputs: &[Spec]) -> Result<(Self, Vec<Spec>), Error> {
        let mut y = inputs[0].clone();
        y.shape[0] = y.shape[0].div_ceil(u64::try_from(count.count).unwrap());
        Ok((Self(size(count.count)), vec![y]))
    }

    fn run(&mut self, call: &mut Call<'_>) -> Result<(), Error> {
        self.sums(call, true)
    }

    fn finish(&mut self, call: &mut Call<'_>) -> Result<(), Error> {
        self.sums(call, false)
    }
}

#[test]
fn fewer_rows_and_rows_that_come_again() {
    for x in tensors() {
        for size in [1, 2, 5, 300] {
            assert_streams::<Groups>(&count(size), std::slice::from_ref(&x));
        }
    }
    let y = invoke::<Groups>(&count(2), &[Tensor::new(&[1.0, 2.0, 4.0])]).unwrap();
    assert_eq!(y.outputs[0].values::<f64>(), [3.0, 4.0]);
}

/// x times the first of `by`, which comes whole, plus z; only where that is above 0; and how many those are.
struct Chosen(u64);

impl Kernel for Chosen {
    const NAME: &str = "chosen";
    const DOC: &str = "";
    const INPUTS: &[Port] = &[
        Port::new("x", F64, "").rank(1, 1),
        Port::new("by", F64, "").rank(1, 1).whole(),
        Port::new("z", F64, "").rank(1, 1),
    ];
    const OUTPUTS: &[Port] = &[Port::new("y", F64, "").rank(1, 1)];
    const STREAMING: Streaming = Streaming::Rows;
    type Parameters = ();

    fn open((): (), inputs: &[Spec]) -> Result<(Self, Vec<Spec>), Error> {
        Ok((Self(0), vec![inputs[0].clone()]))
    }

    fn run(&mut self, call: &mut Call<'_>) -> Result<(), Error> {
        let (x, z) = (call.input::<f64>(0)?, call.input::<f64>(2)?);
        let by = call.input::<f64>(1)?;
        let mut y = call.output::<f64>(0)?;
        assert_eq!((by.len(), x.len(), z.len()), (3, y.len(), y.len()));
        let mut chosen = 0;
        for value in x.iter().zip(z.iter()).map(|(x, z)| x * by[2] + z) {
            if value > 0.0 {
                y[chosen] = value;
                chosen += 1;
            }
        }
        self.0 += chosen as u64;
        call.written(0, chosen)
    }

    fn finish(&mut self, call: &mut Call<'_>) -> Result<(), Error> {
        call.note("chosen", format!("{}", self.0));
        Ok(())
    }
}

#[test]
fn several_inputs_and_a_size_that_the_data_decide() {
    let by = Tensor::new(&[0.0, 0.0, 2.0]);
    for rows in [0, 1, 100] {
        let x: Vec<f64> = (0..rows).map(|i| f64::from(i * 37 % 11) - 6.0).collect();
        let z: Vec<f64> = (0..rows).map(|i| f64::from(i % 3)).collect();
        let inputs = [Tensor::new(&x), by.clone(), Tensor::new(&z)];
        assert_streams::<Chosen>(&[], &inputs);
        let all = x.iter().zip(&z).map(|(x, z)| x * 2.0 + z);
        let expected: Vec<f64> = all.filter(|y| *y > 0.0).collect();
        let outcome = invoke::<Chosen>(&[], &inputs).unwrap();
        assert_eq!(outcome.outputs[0].values::<f64>(), expected);
        assert_eq!(outcome.notes[0].text, expected.len().to_string());
    }
    let unequal = [Tensor::new(&[1.0, 2.0]), by, Tensor::new(&[1.0])];
    let Err(Error::BadArgument(bad)) = invoke::<Chosen>(&[], &unequal) else {
        panic!("2 and 1 rows were accepted")
    };
    assert_eq!((&*bad.name, &*bad.reason), ("z", "it has 1 rows, x has 2"));
}

/// The number of rows: one element, when all are through.
struct Rows(f64);

impl Kernel for Rows {
    const NAME: &str = "rows";
    const DOC: &str = "";
    const INPUTS: &[Port] = &[Port::new("x", F64, "")];
    const OUTPUTS: &[Port] = &[Port::new("y", F64, "").rank(0, 0)];
    const STREAMING: Streaming = Streaming::Free;
    type Parameters = ();

    fn open((): (), _: &[Spec]) -> Result<(Self, Vec<Spec>), Error> {
        Ok((Self(0.0), vec![Spec::new(Dtype::Float64, [])]))
    }

    fn run(&mut self, call: &mut Call<'_>) -> Result<(), Error> {
        let x = call.input::<f64>(0)?;
        self.0 += x.shape().first().map_or(1.0, |rows| *rows as f64);
        Ok(())
    }

    fn finish(&mut self, call: &mut Call<'_>) -> Result<(), Error> {
        call.output::<f64>(0)?[0] = self.0;
        call.written(0, 1)
    }
}

#[test]
fn a_result_of_all_rows() {
    for x in tensors() {
        assert_streams::<Rows>(&[], std::slice::from_ref(&x));
        let y = invoke::<Rows>(&[], std::slice::from_ref(&x)).unwrap();
        assert_eq!(bits(&y.outputs[0]), [(x.shape[0] as f64).to_bits()]);
    }
}

/// Breaks a promise, as `count` says.
struct Wrong(i64);

impl Kernel for Wrong {
    const NAME: &str = "wrong";
    const DOC: &str = "";
    const INPUTS: &[Port] = &[Port::new("x", F64, "").rank(1, 1)];
    const OUTPUTS: &[Port] = &[Port::new("y", F64, "").rank(1, 1)];
    const STREAMING: Streaming = Streaming::Free;
    type Parameters = Count;

    fn open(count: Count, inputs: &[Spec]) -> Result<(Self, Vec<Spec>), Error> {
        Ok((Self(count.count), inputs.to_vec()))
    }

    fn history(&self) -> usize {
        usize::from(self.0 == 4)
    }

    fn run(&mut self, call: &mut Call<'_>) -> Result<(), Error> {
        match self.0 {
            0 => call.written(0, 4),
            1 => call.consumed(0, 4),
            2 => call.set_shape(0, &[4]),
            _ => {
                call.more();
                call.consumed(0, 0)
            }
        }
    }
}

#[test]
fn what_cannot_be_is_an_error() {
    let x = Tensor::new(&[1.0, 2.0, 3.0]);
    let reasons = [
        "y: 4 rows written, there was room for 3",
        "x: 4 rows consumed, there were 3",
        "y: [4] is not within [3]",
        "wrong wants to go on, and there is no room for a row of it or nothing to go on with",
        "wrong has a history, which only Streaming::Rows keeps",
    ];
    for (kind, reason) in (0..).zip(reasons) {
        for cuts in [Cuts::none(), Cuts::random(1)] {
            let refused = invoke_in_chunks::<Wrong>(&count(kind), std::slice::from_ref(&x), cuts);
            let Err(Error::Failed(told)) = refused else {
                panic!("{kind}: {refused:?}")
            };
            // A chunk has other numbers.
            let words = |text: &str| text.replace(|c: char| c.is_ascii_digit(), "");
            assert_eq!(words(&told), words(reason), "{kind}");
        }
    }
}
