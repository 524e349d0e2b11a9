//! `clip`: holds values between two bounds.

use core::cmp::Ordering;
use strait_plugin::prelude::*;

parameters! {
    /// Parameters of `clip`.
    pub struct Parameters {
        /// Lower bound.
        pub lo: Number = f64::NEG_INFINITY,
        /// Upper bound.
        pub hi: Number = f64::INFINITY,
    }
}

/// Values below `lo` become `lo`, values above `hi` become `hi`, NaN stays NaN.
///
/// A bound that the dtype does not have is moved: for floats to the nearest value (as numpy does, so too
/// large is infinity; 448 in `float8_e4m3fn`); for integers inwards to the next integer, and into the type's
/// range. Bounds and 64-bit integers are compared exactly.
#[derive(Debug)]
pub struct Clip(Parameters);

impl Kernel for Clip {
    const NAME: &str = "clip";
    const DOC: &str = "Holds values between `lo` and `hi`; NaN stays NaN.";
    const INPUTS: &[Port] = &[Port::new("x", dtypes::REALS, "Any shape.")];
    const OUTPUTS: &[Port] = &[Port::new("y", dtypes::REALS, "Dtype and shape of x.")];
    const SIGNATURE: &str = "()->()";
    const SPLIT_AXIS: Option<u32> = Some(0);
    const STREAMING: Streaming = Streaming::Rows;
    const COST_HINT: f64 = 1.0;
    type Parameters = Parameters;

    fn open(parameters: Parameters, inputs: &[Spec]) -> Result<(Self, Vec<Spec>), Error> {
        let Parameters { lo, hi } = parameters;
        for (name, bound) in [("lo", lo), ("hi", hi)] {
            if bound.to_f64().is_nan() {
                return Err(Error::bad_argument(
                    name,
                    "it is NaN: give a number, or leave it out for no bound",
                ));
            }
        }
        if lo.compare(hi).is_some_and(Ordering::is_gt) {
            return Err(Error::bad_argument(
                "lo",
                format!("{lo} is above hi, {hi}: give lo <= hi"),
            ));
        }
        dispatch!(inputs[0].dtype, T in reals => {
            let (low, high) = T::bounds(lo, hi);
            if low.to_f64() > high.to_f64() {
                let dtype = T::DTYPE.name();
                return Err(Error::bad_argument("lo", format!("no {dtype} lies between {lo} and {hi}")));
            }
            Ok(())
        })?;
        Ok((Self(parameters), inputs.to_vec()))
    }

    fn run(&mut self, call: &mut Call<'_>) -> Result<(), Error> {
        dispatch!(call.input_spec(0).dtype, T in reals => {
            let x = call.input::<T>(0)?;
            let mut y = call.output::<T>(0)?;
            let (lo, hi) = T::bounds(self.0.lo, self.0.hi);
            T::clip(&x, &mut y, lo, hi);
            Ok(())
        })
    }
}

trait Bounded: Real {
    /// The bounds that clip values of this type as `lo` and `hi` do.
    fn bounds(lo: Number, hi: Number) -> (Self, Self);
    fn clip(x: &[Self], y: &mut [Self], lo: Self, hi: Self);
}

macro_rules! integers {
    ($($type:ty),+) => {
        $(
            impl Bounded for $type {
                #[allow(
                    clippy::cast_possible_truncation, clippy::cast_sign_loss,
                    reason = "clamped to the type's range"
                )]
                fn bounds(lo: Number, hi: Number) -> (Self, Self) {
                    let held = |bound: i128| bound.clamp(Self::MIN.into(), Self::MAX.into()) as Self;
                    (held(lo.ceil()), held(hi.floor()))
                }

                fn clip(x: &[Self], y: &mut [Self], lo: Self, hi: Self) {
                    map(x, y, |x| x.max(lo).min(hi));
                }
            }
        )+
    };
}
integers!(i8, i16, i32, i64, u8, u16, u32, u64);

impl Bounded for Bool8 {
    fn bounds(lo: Number, hi: Number) -> (Self, Self) {
        let (low, high) = u8::bounds(lo, hi);
        (Self(low.min(1)), Self(high.min(1)))
    }

    fn clip(x: &[Self], y: &mut [Self], lo: Self, hi: Self) {
        map(x, y, |x| Self(x.0.min(1).max(lo.0).min(hi.0)));
    }
}

// The comparisons are numpy's: where x equals a bound the bound is taken, which decides the sign of zero, and a
// NaN, for which no comparison holds, is kept.
macro_rules! wide_floats {
    ($($type:ty),+) => {
        $(
            impl Bounded for $type {
                #[allow(
                    clippy::cast_possible_truncation, clippy::cast_precision_loss, clippy::unnecessary_cast,
                    reason = "`as` rounds once, to the nearest"
                )]
                fn bounds(lo: Number, hi: Number) -> (Self, Self) {
                    let nearest = |bound| match bound {
                        Number::Integer(bound) => bound as Self,
                        Number::Unsigned(bound) => bound as Self,
                        Number::Real(bound) => bound as Self,
                    };
                    (nearest(lo), nearest(hi))
                }

                #[expect(clippy::neg_cmp_op_on_partial_ord, reason = "it is what keeps a NaN")]
                fn clip(x: &[Self], y: &mut [Self], lo: Self, hi: Self) {
                    map(x, y, |x| {
                        let x = if !(x <= lo) { x } else { lo };
                        if !(x >= hi) { x } else { hi }
                    });
                }
            }
        )+
    };
}
wide_floats!(f32, f64);

macro_rules! narrow_floats {
    ($($type:ty, $largest:expr);+) => {
        $(
            impl Bounded for $type {
                fn bounds(lo: Number, hi: Number) -> (Self, Self) {
                    let nearest = |bound: Number| match bound {
                        _ if bound.to_f64() > $largest => Self::from_f64($largest),
                        _ if bound.to_f64() < -$largest => Self::from_f64(-$largest),
                        Number::Integer(bound) => Self::from_i64(bound),
                        Number::Unsigned(bound) => Self::from_u64(bound),
                        Number::Real(bound) => Self::from_f64(bound),
                    };
                    (nearest(lo), nearest(hi))
                }

                #[expect(clippy::neg_cmp_op_on_partial_ord, reason = "it is what keeps a NaN")]
                fn clip(x: &[Self], y: &mut [Self], lo: Self, hi: Self) {
                    let (lo_value, hi_value) = (lo.to_f32(), hi.to_f32());
                    map(x, y, |x| {
                        let value = x.to_f32();
                        let low = !(value <= lo_value);
                        let (value, x) = (if low { value } else { lo_value }, if low { x } else { lo });
                        if !(value >= hi_value) { x } else { hi }
                    });
                }
            }
        )+
    };
}
narrow_floats!(F16, f64::INFINITY; Bf16, f64::INFINITY; F8E5m2, f64::INFINITY; F8E4m3fn, 448.0);

#[cfg(test)]
mod tests {
    use super::*;

    fn clip<T: Element>(
        x: &[T],
        lo: impl Into<Number>,
        hi: impl Into<Number>,
    ) -> Result<Vec<T>, Error> {
        let parameters = [
            ("lo", Value::Number(lo.into())),
            ("hi", Value::Number(hi.into())),
        ];
        let outcome = testing::invoke::<Clip>(&parameters, &[Tensor::new(x)])?;
        Ok(outcome.outputs[0].values())
    }

    fn check<T: Element>(x: &[T], lo: impl Into<Number>, hi: impl Into<Number>, expected: &[T]) {
        let (lo, hi) = (lo.into(), hi.into());
        assert_eq!(
            clip(x, lo, hi).expect("valid bounds"),
            expected,
            "{lo} {hi}"
        );
    }

    fn reason(outcome: Result<Vec<impl Element>, Error>) -> String {
        match outcome {
            Err(Error::BadArgument(bad)) => format!("{}: {}", bad.name, bad.reason),
            other => panic!("expected a bad argument, got {other:?}"),
        }
    }

    #[test]
    fn integers_are_exact() {
        let big = 1i64 << 62;
        check(
            &[i64::MIN, big - 1, big, big + 1, i64::MAX],
            -1.0,
            big as f64,
            &[-1, big - 1, big, big, big],
        );
        check(
            &[0u64, u64::MAX, u64::MAX - 1],
            1.0,
            f64::INFINITY,
            &[1, u64::MAX, u64::MAX - 1],
        );
        check(
            &[0u64, 1 << 63, (1 << 63) + 1],
            0.0,
            9_223_372_036_854_775_808.0,
            &[0, 1 << 63, 1 << 63],
        );
        // Where an f64 is no longer exact: each dtype's neighbours, both bounds, integers and floats.
        let odd = (1i64 << 53) + 1;
        check(
            &[odd - 1, odd, odd + 1],
            i64::MIN,
            odd,
            &[odd - 1, odd, odd],
        );
        check(&[-odd - 5, -odd], -odd, i64::MAX, &[-odd, -odd]);
        check(
            &[odd - 1, odd],
            (odd - 1) as f64,
            (odd - 1) as f64,
            &[odd - 1; 2],
        );
        check(&[1u64 << 63, 5], 0, (1u64 << 63) - 1, &[(1 << 63) - 1, 5]);
        check(
            &[0, u64::MAX],
            u64::MAX - 1,
            u64::MAX,
            &[u64::MAX - 1, u64::MAX],
        );
        check(&[i64::MIN, i64::MAX], 1u64 << 63, u64::MAX, &[i64::MAX; 2]);
        check(&[-3i8, -2, 0, 2, 3], -2.5, 2.5, &[-2, -2, 0, 2, 2]);
        check(&[-3i32, 0, 3], 0.5, 1.5, &[1, 1, 1]);
    }

    #[test]
    fn bounds_outside_the_type_are_its_limits() {
        check(&[0u8, 100, 255], 300.0, 400.0, &[255, 255, 255]);
        check(&[0u8, 100, 255], -400.0, -300.0, &[0, 0, 0]);
        check(&[-128i8, 0, 127], -1e300, 1e300, &[-128, 0, 127]);
        check(&[i64::MIN, i64::MAX], -1e19, 1e19, &[i64::MIN, i64::MAX]);
        check(
            &[Bool8(0), Bool8(1), Bool8(7)],
            0.0,
            5.0,
            &[Bool8(0), Bool8(1), Bool8(1)],
        );
        check(&[Bool8(0), Bool8(1)], 0.5, 5.0, &[Bool8(1), Bool8(1)]);
    }

    #[test]
    fn floats_keep_nan_and_take_the_bound_at_equality() {
        let y = clip(&[f64::NAN, -0.0, 0.0, -5.0, f64::INFINITY], 0.0, 2.0).expect("valid");
        assert!(y[0].is_nan());
        assert_eq!(
            y[1..].iter().map(|y| y.to_bits()).collect::<Vec<_>>(),
            [0.0, 0.0, 0.0, 2.0].map(f64::to_bits)
        );
        check(&[-1.0f32, 0.0, 1.0], 0.1, 1e300, &[0.1, 0.1, 1.0]);
        // Rounded once: by way of f64 it would be a tie, and go down.
        let above_tie = (1i64 << 60) + (1 << 36) + 1;
        check(
            &[f32::MAX],
            0,
            above_tie,
            &[(1u64 << 60) as f32 * (1.0 + f32::EPSILON)],
        );
        check(
            &[f32::NEG_INFINITY, 1.0],
            f64::NEG_INFINITY,
            0.5,
            &[f32::NEG_INFINITY, 0.5],
        );
    }

    #[test]
    fn narrow_floats() {
        let f16 = |value| F16::from_f64(value);
        check(
            &[f16(-3.0), f16(0.25), F16(0x7c01), f16(9.0)],
            -1.0,
            1e9,
            &[f16(-1.0), f16(0.25), F16(0x7c01), f16(9.0)],
        );
        let f8 = |value| F8E4m3fn::from_f64(value);
        check(
            &[f8(-3.0), F8E4m3fn(0x7f), F8E4m3fn(0xff), f8(448.0)],
            -1e9,
            1e9,
            &[f8(-3.0), F8E4m3fn(0x7f), F8E4m3fn(0xff), f8(448.0)],
        );
        check(
            &[f8(1.0), F8E4m3fn(0x7f)],
            1e9,
            f64::INFINITY,
            &[f8(448.0), F8E4m3fn(0x7f)],
        );
        check(&[f8(1.0), f8(-1.0)], u64::MAX, u64::MAX, &[f8(448.0); 2]);
        check(&[f16(1.0)], 100_000, u64::MAX, &[F16(0x7c00)]);
        let above_tie = (1i64 << 60) + (1 << 52) + 1;
        check(
            &[Bf16(0x7f7f)],
            0,
            above_tie,
            &[Bf16(((127 + 60) << 7) + 1)],
        );
        check(
            &[Bf16::from_f64(5.0), Bf16(0x8000)],
            0.0,
            2.0,
            &[Bf16::from_f64(2.0), Bf16(0)],
        );
        check(
            &[F8E5m2::from_f64(5.0), F8E5m2(0xfc)],
            -2.0,
            2.0,
            &[F8E5m2::from_f64(2.0), F8E5m2::from_f64(-2.0)],
        );
    }

    #[test]
    fn impossible_bounds_are_refused() {
        assert_eq!(
            reason(clip(&[1.0], 2.0, 1.0)),
            "lo: 2 is above hi, 1: give lo <= hi"
        );
        assert_eq!(
            reason(clip(&[1.0], f64::NAN, 1.0)),
            "lo: it is NaN: give a number, or leave it out for no bound"
        );
        assert_eq!(
            reason(clip(&[1i16], 0.25, 0.75)),
            "lo: no int16 lies between 0.25 and 0.75"
        );
    }
}
