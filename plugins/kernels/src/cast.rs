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
    const DOC: &str =
        "The same values as dtype `to`; float to integer cuts towards zero and saturates.";
    const INPUTS: &[Port] = &[Port::new("x", dtypes::ALL, "Any shape.")];
    const OUTPUTS: &[Port] = &[Port::new("y", dtypes::ALL, "Shape of x, dtype `to`.")];
    const SIGNATURE: &str = "()->()";
    const SPLIT_AXIS: Option<u32> = Some(0);
    const STREAMING: Streaming = Streaming::Rows;
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
                format!(
                    "{from} to {to} would lose the imaginary part: give x.real or x.imag instead"
                ),
            ));
        }
        Ok((Self, vec![x.with_dtype(to)]))
    }

    fn run(&mut self, call: &mut Call<'_>) -> Result<(), Error> {
        let (from, to) = (call.input_spec(0).dtype, call.output_spec(0).dtype);
        match (from, to) {
            // Which bytes are true is the caller's business, what we write is ours.
            (Dtype::Bool8, Dtype::Bool8) => {
                let x = call.input::<Bool8>(0)?;
                map(&x, &mut call.output::<Bool8>(0)?, |x| x.get().into());
                Ok(())
            }
            _ if from == to => dispatch!(from, T in all => {
                let x = call.input::<T>(0)?;
                call.output::<T>(0)?.copy_from_slice(&x);
                Ok(())
            }),
            (Dtype::Complex64, _) => from_complex::<f32>(call, to),
            (Dtype::Complex128, _) => from_complex::<f64>(call, to),
            _ => dispatch!(from, S in reals => { from_real::<S>(call, to) }),
        }
    }
}

fn is_complex(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::Complex64 | Dtype::Complex128)
}

/// By way of the source's wide type, block by block in the first-level cache: all sources share the loops of 6
/// wide types, which makes the plugin half as large. 32- and 64-bit sources are their own wide types.
fn from_real<S: Widen>(call: &mut Call<'_>, to: Dtype) -> Result<(), Error> {
    let x = call.input::<S>(0)?;
    S::Wide::write(call, to, &mut |write| {
        let mut buffer = [S::Wide::default(); BLOCK];
        for block in x.chunks(BLOCK) {
            write(S::widen(block, &mut buffer));
        }
    })
}

const BLOCK: usize = 1024;

/// Takes the next elements of the result, before their conversion.
type Writer<'a, W> = &'a mut dyn FnMut(&[W]);

/// A type that holds several dtypes exactly.
trait Wide: Copy + Default {
    /// Fills the output, which is of dtype `to`, with what `produce` hands to the writer.
    fn write(
        call: &mut Call<'_>,
        to: Dtype,
        produce: &mut dyn FnMut(Writer<'_, Self>),
    ) -> Result<(), Error>;
}

macro_rules! wide {
    ($($type:ty),+) => {
        $(
            impl Wide for $type {
                fn write(
                    call: &mut Call<'_>,
                    to: Dtype,
                    produce: &mut dyn FnMut(Writer<'_, Self>),
                ) -> Result<(), Error> {
                    dispatch!(to, D in all => {
                        let mut y = call.output::<D>(0)?;
                        let mut written = 0;
                        produce(&mut |x| {
                            map(x, &mut y[written..], D::from_wide);
                            written += x.len();
                        });
                        Ok(())
                    })
                }
            }
        )+
    };
}
wide!(i32, i64, u32, u64, f32, f64);

fn from_complex<T: Real>(call: &mut Call<'_>, to: Dtype) -> Result<(), Error>
where
    Complex<T>: Element,
    f32: FromWide<T>,
    f64: FromWide<T>,
{
    let x = call.input::<Complex<T>>(0)?;
    match to {
        Dtype::Bool8 => map(&x, &mut call.output::<Bool8>(0)?, |x| {
            Bool8::from((x.re.to_f64() != 0.0) | (x.im.to_f64() != 0.0))
        }),
        Dtype::Complex64 => map(&x, &mut call.output::<Complex<f32>>(0)?, |x| Complex {
            re: f32::from_wide(x.re),
            im: f32::from_wide(x.im),
        }),
        _ => map(&x, &mut call.output::<Complex<f64>>(0)?, |x| Complex {
            re: f64::from_wide(x.re),
            im: f64::from_wide(x.im),
        }),
    }
    Ok(())
}

/// The smallest of a few types that holds a real dtype exactly.
trait Widen: Element {
    type Wide: Wide;

    /// `x` in that type; in `buffer`, which is at least as long, if it is not in that type already.
    fn widen<'a>(x: &'a [Self], buffer: &'a mut [Self::Wide]) -> &'a [Self::Wide];
}

macro_rules! own_wide_type {
    ($($type:ty),+) => {
        $(
            impl Widen for $type {
                type Wide = Self;

                fn widen<'a>(x: &'a [Self], _: &'a mut [Self]) -> &'a [Self] {
                    x
                }
            }
        )+
    };
}
own_wide_type!(i32, i64, u32, u64, f32, f64);

macro_rules! widen {
    ($($type:ty => $wide:ty, |$value:ident| $widened:expr;)+) => {
        $(
            impl Widen for $type {
                type Wide = $wide;

                #[inline(never)]
                fn widen<'a>(x: &'a [Self], buffer: &'a mut [$wide]) -> &'a [$wide] {
                    map(x, buffer, |$value| $widened);
                    &buffer[..x.len()]
                }
            }
        )+
    };
}

widen! {
    Bool8 => i32, |x| i32::from(x.get());
    i8 => i32, |x| x.into();
    i16 => i32, |x| x.into();
    u8 => i32, |x| x.into();
    u16 => i32, |x| x.into();
    F16 => f32, |x| x.to_f32();
    Bf16 => f32, |x| x.to_f32();
    F8E4m3fn => f32, |x| x.to_f32();
    F8E5m2 => f32, |x| x.to_f32();
}

/// Conversion from one of the wide types; see [`Cast`] for the rules.
trait FromWide<W>: Copy {
    fn from_wide(value: W) -> Self;
}

impl<W, T: FromWide<W> + Default> FromWide<W> for Complex<T> {
    #[inline]
    fn from_wide(value: W) -> Self {
        Self {
            re: T::from_wide(value),
            im: T::default(),
        }
    }
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
from_wide!(i8, i16, u8, u16 => (i32, u32, i64, u64));
from_wide!(i32, i64, u32, u64, f32, f64 => (i32, u32, i64, u64, f32, f64));

/// By way of `i32`: for it there is a saturating SIMD instruction.
macro_rules! short_integer_from_float {
    ($($target:ty),+) => {
        $(
            impl FromWide<f32> for $target {
                #[inline]
                #[expect(clippy::cast_possible_truncation, reason = "saturates; then it is in range")]
                #[allow(clippy::cast_sign_loss, reason = "it is in range")]
                fn from_wide(value: f32) -> Self {
                    (value as i32).clamp(Self::MIN.into(), Self::MAX.into()) as Self
                }
            }
            impl FromWide<f64> for $target {
                #[inline]
                #[expect(clippy::cast_possible_truncation, reason = "saturates; then it is in range")]
                #[allow(clippy::cast_sign_loss, reason = "it is in range")]
                fn from_wide(value: f64) -> Self {
                    (value as i32).clamp(Self::MIN.into(), Self::MAX.into()) as Self
                }
            }
        )+
    };
}
short_integer_from_float!(i8, i16, u8, u16);

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
