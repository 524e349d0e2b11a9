//! `cast`: the same values in another dtype.

use strait_plugin::prelude::*;

parameters! {
    /// Parameters of `cast`.
    pub struct Parameters {
        /// Name of the new dtype.
        #[choices(
            "bool8", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "bfloat16",
            "float8_e4m3fn", "float8_e5m2", "float32", "float64", "complex64", "complex128"
        )]
        pub to: String,
    }
}

/// Conversions as numpy's `astype` and `ml_dtypes` do them, with these decisions where those leave it open or
/// round twice:
///
/// * float to integer: cut towards zero, held at the type's limits, NaN is 0;
/// * integer to integer: the low bits (wraps);
/// * to a float: rounded once, to the nearest (even), from all sources; too large is infinity, or NaN in
///   `float8_e4m3fn`; a NaN becomes the quiet NaN with its sign;
/// * to `bool8`: whether it is not 0 (NaN is not);
/// * complex to real: refused, since a part would be lost.
#[derive(Debug)]
pub struct Cast;

impl Kernel for Cast {
    const NAME: &str = "cast";
    const DOC: &str = "The same values as dtype `to`; float to integer cuts towards zero and saturates.";
    const INPUTS: &[Port] = &[Port::new("x", dtypes::ALL, "Any shape.")];
    const OUTPUTS: &[Port] = &[Port::new("y", dtypes::ALL, "Shape of x, dtype `to`.")];
    const SPLIT_AXIS: Option<u32> = Some(0);
    const COST_HINT: f64 = 1.0;
    type Parameters = Parameters;

    fn open(parameters: Parameters, inputs: &[Spec]) -> Result<(Self, Vec<Spec>), Error> {
        let x = &inputs[0];
        let unknown = || Error::bad_argument("to", format!("{:?} is no dtype", parameters.to));
        let to = Dtype::by_name(&parameters.to).ok_or_else(unknown)?;
        if is_complex(x.dtype) && !is_complex(to) && to != Dtype::Bool8 {
            let (from, to) = (x.dtype.name(), to.name());
            return Err(Error::bad_argument(
                "to",
                format!("{from} to {to} would lose the imaginary part: give x.real or x.imag instead"),
            ));
        }
        Ok((Self, vec![x.with_dtype(to)]))
    }

    fn run(&mut self, call: &mut Call<'_>) -> Result<(), Error> {
        let (from, to) = (call.input_spec(0).dtype, call.output_spec(0).dtype);
        match (from, to) {
            _ if from == to => dispatch!(from, T in all => {
                let x = call.input::<T>(0)?;
                call.output::<T>(0)?.copy_from_slice(&x);
                Ok(())
            }),
            (Dtype::Complex64, _) => from_complex::<f32>(call, to),
            (Dtype::Complex128, _) => from_complex::<f64>(call, to),
            (_, Dtype::Complex64) => to_complex::<f32>(call, from),
            (_, Dtype::Complex128) => to_complex::<f64>(call, from),
            _ => dispatch!(from, S in reals => {
                dispatch!(to, D in reals => {
                    elementwise::<S, D>(call, |x| D::from_wide(x.widen()))
                })
            }),
        }
    }
}

fn is_complex(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::Complex64 | Dtype::Complex128)
}

fn elementwise<S: Element, D: Element>(call: &mut Call<'_>, f: impl Fn(S) -> D) -> Result<(), Error> {
    let x = call.input::<S>(0)?;
    let mut y = call.output::<D>(0)?;
    map(&x, &mut y, f);
    Ok(())
}

fn from_complex<T: Real>(call: &mut Call<'_>, to: Dtype) -> Result<(), Error>
where
    Complex<T>: Element,
    f32: FromWide<T>,
    f64: FromWide<T>,
{
    match to {
        Dtype::Bool8 => elementwise(call, |x: Complex<T>| Bool8::from(x.re.to_f64() != 0.0 || x.im.to_f64() != 0.0)),
        Dtype::Complex64 => elementwise(call, |x: Complex<T>| Complex {
            re: f32::from_wide(x.re),
            im: f32::from_wide(x.im),
        }),
        _ => elementwise(call, |x: Complex<T>| Complex { re: f64::from_wide(x.re), im: f64::from_wide(x.im) }),
    }
}

fn to_complex<T>(call: &mut Call<'_>, from: Dtype) -> Result<(), Error>
where
    T: Default + FromWide<i32> + FromWide<u32> + FromWide<i64> + FromWide<u64> + FromWide<f32> + FromWide<f64>,
    Complex<T>: Element,
{
    dispatch!(from, S in reals => {
        elementwise(call, |x: S| Complex { re: T::from_wide(x.widen()), im: T::default() })
    })
}

/// The smallest of a few types that holds a real dtype exactly.
trait Widen: Element {
    type Wide;
    fn widen(self) -> Self::Wide;
}

macro_rules! widen {
    ($($type:ty => $wide:ty, |$value:ident| $widened:expr;)+) => {
        $(
            impl Widen for $type {
                type Wide = $wide;

                #[inline]
                fn widen(self) -> $wide {
                    let $value = self;
                    $widened
                }
            }
        )+
    };
}

widen! {
    Bool8 => i32, |x| i32::from(x.get());
    i8 => i32, |x| x.into();
    i16 => i32, |x| x.into();
    i32 => i32, |x| x;
    i64 => i64, |x| x;
    u8 => i32, |x| x.into();
    u16 => i32, |x| x.into();
    u32 => u32, |x| x;
    u64 => u64, |x| x;
    F16 => f32, |x| x.to_f32();
    Bf16 => f32, |x| x.to_f32();
    F8E4m3fn => f32, |x| x.to_f32();
    F8E5m2 => f32, |x| x.to_f32();
    f32 => f32, |x| x;
    f64 => f64, |x| x;
}

/// Conversion from one of the wide types; see [`Cast`] for the rules.
trait FromWide<W> {
    fn from_wide(value: W) -> Self;
}

macro_rules! from_wide {
    ($($target:ty),+ => $wides:tt) => { $(from_wide!(@ $target, $wides);)+ };
    (@ $target:ty, ($($wide:ty),+)) => {
        $(
            impl FromWide<$wide> for $target {
                #[inline]
                #[allow(
                    clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_possible_wrap,
                    clippy::cast_precision_loss, clippy::cast_lossless, clippy::unnecessary_cast,
                    reason = "`as` follows the rules above"
                )]
                fn from_wide(value: $wide) -> Self {
                    value as Self
                }
            }
        )+
    };
}
from_wide!(i8, i16, i32, i64, u8, u16, u32, u64, f32, f64 => (i32, u32, i64, u64, f32, f64));

macro_rules! bool_from_wide {
    ($($wide:ty),+) => {
        $(
            impl FromWide<$wide> for Bool8 {
                #[inline]
                fn from_wide(value: $wide) -> Self {
                    Self::from(value != <$wide>::default())
                }
            }
        )+
    };
}
bool_from_wide!(i32, u32, i64, u64, f32, f64);

macro_rules! narrow_from_wide {
    ($($target:ty),+) => {
        $(
            impl FromWide<i32> for $target {
                #[inline]
                fn from_wide(value: i32) -> Self {
                    Self::from_f64(value.into())
                }
            }
            impl FromWide<u32> for $target {
                #[inline]
                fn from_wide(value: u32) -> Self {
                    Self::from_f64(value.into())
                }
            }
            impl FromWide<i64> for $target {
                #[inline]
                fn from_wide(value: i64) -> Self {
                    Self::from_i64(value)
                }
            }
            impl FromWide<u64> for $target {
                #[inline]
                fn from_wide(value: u64) -> Self {
                    Self::from_u64(value)
                }
            }
            impl FromWide<f32> for $target {
                #[inline]
                fn from_wide(value: f32) -> Self {
                    Self::from_f32(value)
                }
            }
            impl FromWide<f64> for $target {
                #[inline]
                fn from_wide(value: f64) -> Self {
                    <$target>::from_f64(value)
                }
            }
        )+
    };
}
narrow_from_wide!(F16, Bf16, F8E4m3fn, F8E5m2);
