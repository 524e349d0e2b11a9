//! `histogram`: how many elements fall into each of several equal bins.

use strait_plugin::prelude::*;

parameters! {
    /// Parameters of `histogram`.
    pub struct Parameters {
        /// Number of bins.
        #[minimum(1)] #[maximum(1_048_576)]
        pub bins: i64 = 10,
        /// Lower edge of the first bin.
        pub lo: f64,
        /// Upper edge of the last bin.
        pub hi: f64,
    }
}

/// `numpy.histogram(x, bins, range=(lo, hi))` of all elements: bin i holds those with edges\[i\] <= x < edges\[i+1\], the last
/// one also those equal to `hi`, where edges is `numpy.linspace(lo, hi, bins + 1)`.
///
/// What is in no bin is counted in `outside`: below `lo`, above `hi`, NaN. Elements are compared with the edges as f64 (64-bit
/// integers beyond 2^53 are rounded). The counts are exact, so that no order matters; they come after the last chunk.
#[derive(Debug)]
pub struct Histogram {
    bins: Bins,
    /// Rows of `counts` and of `outside` that were given.
    given: [usize; 2],
}

impl Kernel for Histogram {
    const NAME: &str = "histogram";
    const DOC: &str =
        "Counts of the elements in `bins` equal bins from `lo` to `hi`, and of those outside.";
    const INPUTS: &[Port] = &[Port::new("x", dtypes::REALS, "Any shape.")];
    const OUTPUTS: &[Port] = &[
        Port::new("counts", &[Dtype::Int64], "One element for each bin.").rank(1, 1),
        Port::new(
            "outside",
            &[Dtype::Int64],
            "Three elements: how many are below lo, above hi, NaN.",
        )
        .rank(1, 1),
    ];
    const STREAMING: Streaming = Streaming::Free;
    const COST_HINT: f64 = 3.0;
    type Parameters = Parameters;

    fn open(parameters: Parameters, _: &[Spec]) -> Result<(Self, Vec<Spec>), Error> {
        let bins = Bins::new(&parameters)?;
        let counts = Spec::new(Dtype::Int64, [bins.counts.len() as u64]);
        let outside = Spec::new(Dtype::Int64, [bins.outside.len() as u64]);
        Ok((
            Self {
                bins,
                given: [0; 2],
            },
            vec![counts, outside],
        ))
    }

    fn run(&mut self, call: &mut Call<'_>) -> Result<(), Error> {
        dispatch!(call.input_spec(0).dtype, T in reals => {
            let mut buffer = [0.0; BLOCK];
            for x in call.input::<T>(0)?.chunks(BLOCK) {
                let elements = &mut buffer[..x.len()];
                map(x, elements, T::to_f64);
                self.bins.count(elements);
            }
            Ok(())
        })
    }

    fn finish(&mut self, call: &mut Call<'_>) -> Result<(), Error> {
        let tables = [&self.bins.counts, &self.bins.outside[..]];
        for (index, (table, given)) in tables.into_iter().zip(&mut self.given).enumerate() {
            let mut y = call.output::<i64>(index)?;
            let left = &table[*given..];
            let rows = left.len().min(y.len());
            y[..rows].copy_from_slice(&left[..rows]);
            *given += rows;
            call.written(index, rows)?;
            if rows < left.len() {
                call.more();
            }
        }
        Ok(())
    }
}

/// Elements that are converted at a time.
const BLOCK: usize = 1024;

#[derive(Debug)]
struct Bins {
    edges: Vec<f64>,
    lo: f64,
    hi: f64,
    /// Bins for each unit of x, nearly.
    scale: f64,
    counts: Vec<i64>,
    /// Below, above, NaN.
    outside: [i64; 3],
}

impl Bins {
    fn new(parameters: &Parameters) -> Result<Self, Error> {
        let Parameters { bins, lo, hi } = *parameters;
        let count = usize::try_from(bins).unwrap_or(0);
        if !(lo < hi && (hi - lo).is_finite()) {
            return Err(Error::bad_argument(
                "hi",
                format!("from {lo} to {hi} there are no bins: give finite lo < hi"),
            ));
        }
        let step = (hi - lo) / bins as f64;
        let mut edges: Vec<f64> = (0..count).map(|i| i as f64 * step + lo).collect();
        edges.push(hi);
        if !edges.is_sorted_by(|a, b| a < b) {
            return Err(Error::bad_argument(
                "bins",
                format!("float64 has no {bins} different bins between {lo} and {hi}: give fewer"),
            ));
        }
        Ok(Self {
            edges,
            lo,
            hi,
            scale: bins as f64 / (hi - lo),
            counts: vec![0; count],
            outside: [0; 3],
        })
    }

    fn count(&mut self, elements: &[f64]) {
        let last = self.counts.len() - 1;
        for x in elements {
            if x.is_nan() {
                self.outside[2] += 1;
            } else if *x < self.lo {
                self.outside[0] += 1;
            } else if *x > self.hi {
                self.outside[1] += 1;
            } else {
                let guess = (x - self.lo) * self.scale;
                #[expect(
                    clippy::cast_possible_truncation,
                    clippy::cast_sign_loss,
                    reason = "a guess; `as` holds it at the type's limits"
                )]
                let mut bin = (guess as usize).min(last);
                // The edges decide. They are in order, and x is between the first and the last.
                while *x < self.edges[bin] {
                    bin -= 1;
                }
                while bin < last && *x >= self.edges[bin + 1] {
                    bin += 1;
                }
                self.counts[bin] += 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parameters(bins: i64, lo: f64, hi: f64) -> [(&'static str, Value); 3] {
        [
            ("bins", Value::Number(bins.into())),
            ("lo", Value::Number(lo.into())),
            ("hi", Value::Number(hi.into())),
        ]
    }

    fn counts<T: Element>(x: &[T], bins: i64, lo: f64, hi: f64) -> (Vec<i64>, Vec<i64>) {
        let outcome = testing::invoke::<Histogram>(&parameters(bins, lo, hi), &[Tensor::new(x)]);
        let outputs = outcome.expect("valid").outputs;
        (outputs[0].values(), outputs[1].values())
    }

    #[test]
    fn edges_belong_to_the_bin_above_but_the_last() {
        let x = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, -0.0];
        assert_eq!(counts(&x, 4, 0.0, 4.0), (vec![3, 2, 1, 2], vec![0, 0, 0]));
        let x = [-1.0, f64::NEG_INFINITY, 4.5, f64::INFINITY, f64::NAN, 2.0];
        assert_eq!(counts(&x, 4, 0.0, 4.0), (vec![0, 0, 1, 0], vec![2, 2, 1]));
        // 0.3 / 0.1 is below 3 in f64; the edge, 3 * 0.1, is above 0.3.
        let x = [0.1, 0.2, 0.3, 0.1 * 3.0, 0.7, 1.0];
        assert_eq!(counts(&x, 10, 0.0, 1.0).0, [0, 1, 2, 1, 0, 0, 1, 0, 0, 1]);
    }

    #[test]
    fn each_edge_and_its_neighbours() {
        let bins = Bins::new(&Parameters {
            bins: 997,
            lo: -3.7,
            hi: 11.3,
        });
        let mut bins = bins.expect("valid");
        let edges = bins.edges.clone();
        for edge in &edges[1..997] {
            bins.count(&[edge.next_down(), *edge]);
        }
        assert_eq!(bins.counts[0], 1);
        assert_eq!(bins.counts[1..996], [2; 995]);
        assert_eq!((bins.counts[996], bins.outside), (1, [0; 3]));
    }

    #[test]
    fn dtypes_and_no_elements() {
        assert_eq!(counts(&[0u8, 9, 10, 255], 2, 0.0, 10.0).0, [1, 2]);
        assert_eq!(counts(&[Bool8(0), Bool8(3)], 2, 0.0, 1.0).0, [1, 1]);
        assert_eq!(counts::<f32>(&[], 3, 0.0, 1.0), (vec![0; 3], vec![0; 3]));
    }

    #[test]
    fn impossible_bins_are_refused() {
        let refused = [
            (10, 1.0, 1.0, "hi"),
            (10, 1.0, f64::NAN, "hi"),
            (10, f64::NEG_INFINITY, 1.0, "hi"),
            (10, -1e308, 1e308, "hi"),
            (10, 1.0, 1.0f64.next_up(), "bins"),
            (0, 0.0, 1.0, "bins"),
        ];
        for (bins, lo, hi, name) in refused {
            let outcome =
                testing::invoke::<Histogram>(&parameters(bins, lo, hi), &[Tensor::new(&[1.0])]);
            let Err(Error::BadArgument(bad)) = outcome else {
                panic!("{bins} {lo} {hi}: {outcome:?}")
            };
            assert_eq!(bad.name, name);
        }
    }
}
