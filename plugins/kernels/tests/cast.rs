//! `cast` against numpy and ml_dtypes (vectors.txt, written by vectors.py) and against a reference of its own.

#![expect(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a test's own numbers"
)]

use standard::Cast;
use strait_plugin::prelude::*;

fn cast(x: &Tensor, to: &str) -> Result<Tensor, Error> {
    let mut outcome =
        testing::invoke::<Cast>(&[("to", Value::Text(to.into()))], std::slice::from_ref(x))?;
    Ok(outcome.outputs.remove(0))
}

fn converted<S: Element, D: Element>(x: &[S]) -> Vec<D> {
    cast(&Tensor::new(x), D::DTYPE.name())
        .expect("a legal cast")
        .values()
}

/// All upper halves of an `f32` with the lower halves around a tie.
fn floats() -> Vec<f32> {
    let lower = [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff];
    (0..=u16::MAX)
        .flat_map(|upper| lower.map(|lower| f32::from_bits(u32::from(upper) << 16 | lower)))
        .collect()
}

fn fnv(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |state, byte| {
        (state ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3)
    })
}

fn from_hex(text: &str) -> Vec<u8> {
    let digits = text.as_bytes().chunks(2);
    digits
        .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
        .collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// NaNs as vectors.py writes them; `cast` does so itself but for the dtypes that it copies.
fn quiet(tensor: Tensor) -> Tensor {
    fn each<T: Element>(tensor: &Tensor, f: impl Fn(T) -> T) -> Tensor {
        Tensor::shaped(
            &tensor.values::<T>().into_iter().map(f).collect::<Vec<_>>(),
            &tensor.shape,
        )
    }
    let f32s = |x: f32| if x.is_nan() { f32::NAN.copysign(x) } else { x };
    let f64s = |x: f64| if x.is_nan() { f64::NAN.copysign(x) } else { x };
    match tensor.dtype {
        Dtype::Float32 => each(&tensor, f32s),
        Dtype::Float64 => each(&tensor, f64s),
        Dtype::Complex64 => each(&tensor, |x: Complex<f32>| Complex {
            re: f32s(x.re),
            im: f32s(x.im),
        }),
        Dtype::Complex128 => each(&tensor, |x: Complex<f64>| Complex {
            re: f64s(x.re),
            im: f64s(x.im),
        }),
        _ => tensor,
    }
}

#[test]
fn equals_numpy_and_ml_dtypes() {
    let mut lines = 0;
    for line in include_str!("vectors.txt")
        .lines()
        .filter(|line| !line.starts_with('#'))
    {
        let words: Vec<&str> = line.split(' ').collect();
        lines += 1;
        match words[..] {
            ["sweep", "float32", to, hash] => {
                let y = cast(&Tensor::new(&floats()), to).expect("legal");
                assert_eq!(format!("{:016x}", fnv(&y.bytes)), hash, "float32 to {to}");
            }
            ["sweep", from, to, hash] => {
                let dtype = Dtype::by_name(from).expect("a dtype");
                let bytes: Vec<u8> = match dtype.bytes() {
                    1 => (0..=u8::MAX).collect(),
                    _ => (0..=u16::MAX).flat_map(u16::to_le_bytes).collect(),
                };
                let count = bytes.len() as u64 / dtype.bytes();
                let y = quiet(
                    cast(
                        &Tensor {
                            dtype,
                            shape: vec![count],
                            bytes,
                        },
                        to,
                    )
                    .expect("legal"),
                );
                assert_eq!(format!("{:016x}", fnv(&y.bytes)), hash, "{from} to {to}");
            }
            ["cast", from, to, x, expected] => {
                let (dtype, bytes) = (Dtype::by_name(from).expect("a dtype"), from_hex(x));
                let x = Tensor {
                    dtype,
                    shape: vec![bytes.len() as u64 / dtype.bytes()],
                    bytes,
                };
                let y = quiet(cast(&x, to).expect("legal"));
                assert_eq!(
                    hex(&y.bytes),
                    expected,
                    "{from} to {to} of {}",
                    hex(&x.bytes)
                );
            }
            _ => panic!("unknown line: {line}"),
        }
    }
    assert!(lines > 250, "vectors.txt has only {lines} lines");
}

/// A narrow float as the reference sees it: its non-negative finite values in ascending order of codes.
struct Format {
    /// Value of code i is `values[i]`.
    values: Vec<f64>,
    /// What the next value would be if the format went on.
    beyond: f64,
    overflow: u16,
    nan: u16,
    sign: u16,
}

impl Format {
    /// From the formats' definitions: `mantissa` bits after the point, exponents biased by `bias`.
    fn new(mantissa: i32, bias: i32, codes: u16, overflow: u16, nan: u16, sign: u16) -> Self {
        let value = |code: u16| {
            let (exponent, fraction) = (
                i32::from(code >> mantissa),
                f64::from(code & ((1 << mantissa) - 1)),
            );
            let fraction = fraction / f64::from(1 << mantissa);
            if exponent == 0 {
                fraction * 2f64.powi(1 - bias)
            } else {
                (1.0 + fraction) * 2f64.powi(exponent - bias)
            }
        };
        Self {
            values: (0..codes).map(value).collect(),
            beyond: value(codes),
            overflow,
            nan,
            sign,
        }
    }

    fn by_name(name: &str) -> Self {
        match name {
            "float16" => Self::new(10, 15, 0x7c00, 0x7c00, 0x7e00, 0x8000),
            "bfloat16" => Self::new(7, 127, 0x7f80, 0x7f80, 0x7fc0, 0x8000),
            "float8_e4m3fn" => Self::new(3, 7, 0x7f, 0x7f, 0x7f, 0x80),
            _ => Self::new(2, 15, 0x7c, 0x7c, 0x7e, 0x80),
        }
    }

    /// The code nearest to `x`, ties to even. All differences are exact: neighbours are within a factor of 2,
    /// or multiples of the smallest subnormal.
    fn nearest(&self, x: f64) -> u16 {
        let sign = if x.is_sign_negative() { self.sign } else { 0 };
        let size = x.abs();
        if size.is_nan() {
            return self.nan | sign;
        }
        let above = self.values.partition_point(|value| *value < size);
        let at = |code: usize| self.values.get(code).copied().unwrap_or(self.beyond);
        let code = match above {
            0 => 0,
            _ if size >= self.beyond => self.values.len(),
            _ => {
                let (down, up) = (size - at(above - 1), at(above) - size);
                if down < up || (down == up && (above - 1) % 2 == 0) {
                    above - 1
                } else {
                    above
                }
            }
        };
        let code = u16::try_from(code).expect("codes are short");
        sign | if usize::from(code) < self.values.len() {
            code
        } else {
            self.overflow
        }
    }
}

fn codes<S: Element>(x: &[S], to: &str) -> Vec<u16> {
    let y = cast(&Tensor::new(x), to).expect("legal");
    match y.dtype.bytes() {
        1 => y.bytes.iter().map(|byte| u16::from(*byte)).collect(),
        _ => y
            .bytes
            .as_chunks()
            .0
            .iter()
            .map(|bytes| u16::from_le_bytes(*bytes))
            .collect(),
    }
}

const NARROW: [&str; 4] = ["float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"];

#[test]
fn float32_to_narrow_is_nearest_even() {
    let x = floats();
    for to in NARROW {
        let format = Format::by_name(to);
        for (x, code) in x.iter().zip(codes(&x, to)) {
            assert_eq!(
                code,
                format.nearest(f64::from(*x)),
                "{x:e} ({:08x}) to {to}",
                x.to_bits()
            );
        }
    }
}

#[test]
fn float64_to_narrow_rounds_once() {
    for to in NARROW {
        let format = Format::by_name(to);
        let mut x = vec![
            0.0,
            f64::MIN_POSITIVE,
            f64::from_bits(1),
            f64::MAX,
            f64::INFINITY,
            f64::NAN,
        ];
        x.extend([
            f64::from(f32::MAX),
            f64::from(f32::MAX).next_up(),
            format.beyond,
        ]);
        let mut pairs = format.values.clone();
        pairs.push(format.beyond);
        for pair in pairs.windows(2) {
            // By way of an f32 the neighbours of the middle would become the middle, and then go to even.
            let middle = pair[0] + (pair[1] - pair[0]) / 2.0;
            x.extend([pair[0], middle.next_down(), middle, middle.next_up()]);
        }
        x.extend(x.clone().iter().map(|x| -x));
        for (x, code) in x.iter().zip(codes(&x, to)) {
            assert_eq!(code, format.nearest(*x), "{x:e} to {to}");
        }
    }
}

#[test]
fn wide_integers_to_narrow_round_once() {
    for to in NARROW {
        let format = Format::by_name(to);
        for shift in 0..56 {
            for head in 128u64..256 {
                // The middle between two bfloat16 is 2^56 * head + 2^55: too near for f64 to see the last bit.
                let middle = (head << shift) | (1 << shift >> 1);
                let x = [middle - 1, middle, middle + 1];
                for (x, code) in x.iter().zip(codes(&x, to)) {
                    assert_eq!(code, nearest_u64(&format, *x), "{x} to {to}");
                }
                let x = x.map(|x| -i64::try_from(x >> 1).expect("below 2^63"));
                for (x, code) in x.iter().zip(codes(&x, to)) {
                    let expected = nearest_u64(&format, x.unsigned_abs()) | format.sign;
                    assert_eq!(code, expected, "{x} to {to}");
                }
            }
        }
    }
}

/// As [`Format::nearest`], in integers.
fn nearest_u64(format: &Format, x: u64) -> u16 {
    let above = format
        .values
        .partition_point(|value| *value < 2f64.powi(64) && (*value as u128) < u128::from(x));
    if x < 256 || above == format.values.len() {
        // Small integers are exact in f64; beyond the largest value only the middle to the next one matters.
        return format.nearest(x as f64);
    }
    let (down, up) = (
        x as u128 - format.values[above - 1] as u128,
        format.values[above] as u128 - x as u128,
    );
    let code = if down < up || (down == up && (above - 1) % 2 == 0) {
        above - 1
    } else {
        above
    };
    u16::try_from(code).expect("codes are short")
}

#[test]
fn wide_integers_to_floats_round_once() {
    let x = [
        (1u64 << 53) + 1,
        u64::MAX,
        (1 << 54) + (1 << 30) + 1,
        1 << 63,
    ];
    assert_eq!(converted::<u64, f64>(&x), x.map(|x| x as f64));
    assert_eq!(converted::<u64, f32>(&x), x.map(|x| x as f32));
    let x = [-(1i64 << 53) - 1, i64::MIN, i64::MAX];
    assert_eq!(converted::<i64, f64>(&x), x.map(|x| x as f64));
    assert_eq!(converted::<i64, f32>(&x), x.map(|x| x as f32));
}

#[test]
fn out_of_range_saturates() {
    let x = [
        300.7,
        -1.5,
        f64::NAN,
        f64::INFINITY,
        f64::NEG_INFINITY,
        1e300,
    ];
    assert_eq!(converted::<f64, u8>(&x), [255, 0, 0, 255, 0, 255]);
    assert_eq!(converted::<f64, i8>(&x), [127, -1, 0, 127, -128, 127]);
    assert_eq!(
        converted::<f64, u64>(&x),
        [300, 0, 0, u64::MAX, 0, u64::MAX]
    );
    let narrow = x.map(|x| x as f32);
    assert_eq!(
        converted::<f32, i16>(&narrow),
        [300, -1, 0, i16::MAX, i16::MIN, i16::MAX]
    );
    assert_eq!(converted::<i32, u8>(&[256, -1, 511]), [0, 255, 255]);
    assert_eq!(converted::<i8, u64>(&[-1]), [u64::MAX]);
}

#[test]
fn to_bool_and_from_odd_bools() {
    assert_eq!(
        converted::<f64, Bool8>(&[0.0, -0.0, 1e-300, f64::NAN]),
        [Bool8(0), Bool8(0), Bool8(1), Bool8(1)]
    );
    assert_eq!(
        converted::<Bool8, i64>(&[Bool8(0), Bool8(1), Bool8(200)]),
        [0, 1, 1]
    );
    let complex = |re, im| Complex { re, im };
    assert_eq!(
        converted::<Complex<f32>, Bool8>(&[complex(0.0, 0.0), complex(0.0, 2.0)]),
        [Bool8(0), Bool8(1)]
    );
}

#[test]
fn the_same_dtype_is_the_same_bits() {
    let x = [0x7ff0_0000_0000_0001, 0xffff_ffff_ffff_ffff, 1].map(f64::from_bits);
    assert_eq!(
        converted::<f64, f64>(&x)
            .iter()
            .map(|x| x.to_bits())
            .collect::<Vec<_>>(),
        x.map(f64::to_bits)
    );
}

#[test]
fn a_tensor_longer_than_a_block() {
    let x: Vec<u16> = (0..10_000).collect();
    assert_eq!(
        converted::<u16, f64>(&x),
        x.iter().map(|x| f64::from(*x)).collect::<Vec<_>>()
    );
}

#[test]
fn what_would_lose_a_part_or_does_not_exist_is_refused() {
    let reason = |x: Tensor, to: &str| match cast(&x, to) {
        Err(Error::BadArgument(bad)) => format!("{}: {}", bad.name, bad.reason),
        other => panic!("expected a bad argument, got {other:?}"),
    };
    let complex = Tensor::new(&[Complex {
        re: 1.0f64,
        im: 0.0,
    }]);
    assert_eq!(
        reason(complex, "float64"),
        "to: complex128 to float64 would lose the imaginary part: give x.real or x.imag instead"
    );
    assert!(
        reason(Tensor::new(&[1.0]), "float12")
            .starts_with("to: \"float12\" is none of its values: bool8, int8")
    );
    assert_eq!(
        testing::invoke::<Cast>(&[], &[Tensor::new(&[1.0])]).unwrap_err(),
        Error::bad_argument("to", "it has no default: give it (text)")
    );
}
