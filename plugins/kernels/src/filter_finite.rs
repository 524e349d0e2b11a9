//! `filter-finite`: drops NaN and infinities.

use strait_plugin::prelude::*;

/// The finite elements in their order. The note `dropped` says how many were not.
#[derive(Debug)]
pub struct FilterFinite {
    dropped: usize,
}

impl Kernel for FilterFinite {
    const NAME: &str = "filter-finite";
    const DOC: &str = "Drops NaN and infinities; the note `dropped` counts them.";
    const INPUTS: &[Port] = &[Port::new("x", dtypes::ALL, "One axis.").rank(1, 1)];
    const OUTPUTS: &[Port] = &[Port::new(
        "y",
        dtypes::ALL,
        "The finite elements, at most as many as x has.",
    )
    .rank(1, 1)];
    const SIGNATURE: &str = "(n)->(m)";
    const STREAMING: Streaming = Streaming::Rows;
    const COST_HINT: f64 = 1.0;
    type Parameters = ();

    fn open((): (), inputs: &[Spec]) -> Result<(Self, Vec<Spec>), Error> {
        Ok((Self { dropped: 0 }, inputs.to_vec()))
    }

    fn run(&mut self, call: &mut Call<'_>) -> Result<(), Error> {
        dispatch!(call.input_spec(0).dtype, T in all => {
            let x = call.input::<T>(0)?;
            let mut y = call.output::<T>(0)?;
            let kept = T::filter(&x, &mut y);
            self.dropped += x.len() - kept;
            call.written(0, kept)
        })
    }

    fn finish(&mut self, call: &mut Call<'_>) -> Result<(), Error> {
        call.note("dropped", format!("{}", self.dropped));
        Ok(())
    }
}

/// See [`Finite::filter`].
fn filter<T: Finite>(x: &[T], y: &mut [T]) -> usize {
    let mut kept = 0;
    for block in x.chunks(64) {
        // Without an early exit this is SIMD code; most blocks have nothing to drop.
        if block.iter().fold(true, |all, x| all & x.finite()) {
            y[kept..kept + block.len()].copy_from_slice(block);
            kept += block.len();
        } else {
            for x in block {
                y[kept] = *x;
                kept += usize::from(x.finite());
            }
        }
    }
    kept
}

trait Finite: Element {
    fn finite(self) -> bool;

    /// Copies the finite elements of `x` to the start of `y`, which is as long, and counts them.
    fn filter(x: &[Self], y: &mut [Self]) -> usize {
        filter(x, y)
    }
}

impl Finite for Bool8 {
    fn finite(self) -> bool {
        true
    }

    /// All of them, true as 1.
    fn filter(x: &[Self], y: &mut [Self]) -> usize {
        map(x, y, |x| x.get().into());
        x.len()
    }
}

macro_rules! finite {
    ($($type:ty => |$value:ident| $finite:expr;)+) => {
        $(
            impl Finite for $type {
                #[inline]
                fn finite(self) -> bool {
                    let $value = self;
                    $finite
                }
            }
        )+
    };
}

finite! {
    i8 => |_x| true;
    i16 => |_x| true;
    i32 => |_x| true;
    i64 => |_x| true;
    u8 => |_x| true;
    u16 => |_x| true;
    u32 => |_x| true;
    u64 => |_x| true;
    F16 => |x| x.is_finite();
    Bf16 => |x| x.is_finite();
    F8E4m3fn => |x| x.is_finite();
    F8E5m2 => |x| x.is_finite();
    f32 => |x| x.is_finite();
    f64 => |x| x.is_finite();
    Complex<f32> => |x| x.re.is_finite() & x.im.is_finite();
    Complex<f64> => |x| x.re.is_finite() & x.im.is_finite();
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filtered<T: Element>(x: &[T]) -> (Vec<T>, String) {
        let outcome = testing::invoke::<FilterFinite>(&[], &[Tensor::new(x)]).expect("valid");
        let (y, notes) = (&outcome.outputs[0], &outcome.notes);
        assert_eq!((notes.len(), notes[0].key.as_str()), (1, "dropped"));
        let values = y.values();
        assert_eq!(y.shape, [values.len() as u64]);
        (values, notes[0].text.clone())
    }

    #[test]
    fn keeps_the_order_at_every_density() {
        for every in [1usize, 2, 3, 7, 63, 64, 65, 1000] {
            let x: Vec<f64> = (0..777)
                .map(|i| if i % every == 0 { f64::NAN } else { i as f64 })
                .collect();
            let expected: Vec<f64> = x.iter().copied().filter(|x| x.is_finite()).collect();
            let (y, dropped) = filtered(&x);
            assert_eq!(y, expected, "{every}");
            assert_eq!(dropped, (x.len() - expected.len()).to_string());
        }
    }

    #[test]
    fn each_dtype() {
        assert_eq!(filtered(&[1i64, i64::MAX]), (vec![1, i64::MAX], "0".into()));
        assert_eq!(filtered::<f32>(&[]), (vec![], "0".into()));
        assert_eq!(
            filtered(&[Bool8(0), Bool8(1), Bool8(255)]),
            (vec![Bool8(0), Bool8(1), Bool8(1)], "0".into())
        );
        assert_eq!(filtered(&[f32::NEG_INFINITY, 1.0]), (vec![1.0], "1".into()));
        assert_eq!(
            filtered(&[F16(0x7c00), F16(0xfbff), F16(0xfe00)]),
            (vec![F16(0xfbff)], "2".into())
        );
        assert_eq!(
            filtered(&[F8E4m3fn(0x7f), F8E4m3fn(0x7e)]),
            (vec![F8E4m3fn(0x7e)], "1".into())
        );
        assert_eq!(
            filtered(&[F8E5m2(0x7c), F8E5m2(0x7b), F8E5m2(0xff)]),
            (vec![F8E5m2(0x7b)], "2".into())
        );
        assert_eq!(
            filtered(&[Bf16(0x7f80), Bf16(0x7f7f)]),
            (vec![Bf16(0x7f7f)], "1".into())
        );
        let complex = |re, im| Complex { re, im };
        let x = [
            complex(1.0, 2.0),
            complex(f64::NAN, 0.0),
            complex(0.0, f64::INFINITY),
            complex(3.0, 4.0),
        ];
        assert_eq!(filtered(&x), (vec![x[0], x[3]], "2".into()));
    }
}
