use strait_plugin::prelude::*;

parameters! {
    /// Parameters of `smooth`.
    pub struct Parameters {
        /// Weight of the newest row.
        #[minimum(0.0)] #[maximum(1.0)]
        pub alpha: f64 = 0.1,
    }
}

/// Exponential smoothing: s += alpha * (x - s), from row 0 on.
pub struct Smooth {
    alpha: f64,
    /// s of each column: what one chunk leaves to the next.
    state: Vec<f64>,
}

impl Kernel for Smooth {
    const NAME: &str = "smooth";
    const DOC: &str = "Exponential smoothing down each column.";
    const INPUTS: &[Port] = &[Port::new("x", &[Dtype::Float64], "A row is one moment.").rank(1, 8)];
    const OUTPUTS: &[Port] = &[Port::new("y", &[Dtype::Float64], "Shape of x.").rank(1, 8)];
    const SIGNATURE: &str = "()->()";
    const STREAMING: Streaming = Streaming::Rows;
    type Parameters = Parameters;

    fn open(parameters: Parameters, inputs: &[Spec]) -> Result<(Self, Vec<Spec>), Error> {
        let (alpha, state) = (parameters.alpha, Vec::new());
        Ok((Self { alpha, state }, inputs.to_vec()))
    }

    fn run(&mut self, call: &mut Call<'_>) -> Result<(), Error> {
        let x = call.input::<f64>(0)?;
        let mut y = call.output::<f64>(0)?;
        let width = x.row_len().max(1);
        if x.first_row() == 0 {
            self.state = x.iter().take(width).copied().collect();
        }
        for (x, y) in x.chunks(width).zip(y.chunks_mut(width)) {
            for ((x, y), s) in x.iter().zip(y).zip(&mut self.state) {
                *s += self.alpha * (x - *s);
                *y = *s;
            }
        }
        Ok(())
    }
}

strait_plugin::export!("smooth", [Smooth]);

#[test]
fn rows_may_be_cut_anywhere() {
    let x: Vec<f64> = (0..300).map(|i| f64::from(i * 37 % 100)).collect();
    testing::assert_streams::<Smooth>(&[], &[Tensor::shaped(&x, &[100, 3])]);
}
