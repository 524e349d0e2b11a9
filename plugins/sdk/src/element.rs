//! Element types: which Rust type stands for which dtype.

use crate::{Bf16, Dtype, Error, F8E4m3fn, F8E5m2, F16, Role, Spec};
use alloc::{format, string::String, vec::Vec};

/// Lists of dtypes for [`Port`](crate::Port)s.
pub mod dtypes {
    use crate::Dtype::{self, *};

    /// Every dtype.
    pub const ALL: &[Dtype] = &[
        Bool8,
        Int8,
        Int16,
        Int32,
        Int64,
        Uint8,
        Uint16,
        Uint32,
        Uint64,
        Float16,
        Bfloat16,
        Float8E4m3fn,
        Float8E5m2,
        Float32,
        Float64,
        Complex64,
        Complex128,
    ];
    /// All but the complex ones.
    pub const REALS: &[Dtype] = &[
        Bool8,
        Int8,
        Int16,
        Int32,
        Int64,
        Uint8,
        Uint16,
        Uint32,
        Uint64,
        Float16,
        Bfloat16,
        Float8E4m3fn,
        Float8E5m2,
        Float32,
        Float64,
    ];
    /// Real floating point, 8 to 64 bits.
    pub const FLOATS: &[Dtype] = &[
        Float16,
        Bfloat16,
        Float8E4m3fn,
        Float8E5m2,
        Float32,
        Float64,
    ];
    /// Signed and unsigned integers without `bool8`.
    pub const INTEGERS: &[Dtype] = &[Int8, Int16, Int32, Int64, Uint8, Uint16, Uint32, Uint64];
}

impl Dtype {
    /// numpy's name, as it stands in protocol messages: `float8_e4m3fn`, not WIT's `float8-e4m3fn`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Bool8 => "bool8",
            Self::Int8 => "int8",
            Self::Int16 => "int16",
            Self::Int32 => "int32",
            Self::Int64 => "int64",
            Self::Uint8 => "uint8",
            Self::Uint16 => "uint16",
            Self::Uint32 => "uint32",
            Self::Uint64 => "uint64",
            Self::Float16 => "float16",
            Self::Bfloat16 => "bfloat16",
            Self::Float8E4m3fn => "float8_e4m3fn",
            Self::Float8E5m2 => "float8_e5m2",
            Self::Float32 => "float32",
            Self::Float64 => "float64",
            Self::Complex64 => "complex64",
            Self::Complex128 => "complex128",
        }
    }

    /// The dtype with that [`name`](Self::name).
    #[must_use]
    pub fn by_name(name: &str) -> Option<Self> {
        dtypes::ALL
            .iter()
            .copied()
            .find(|dtype| dtype.name() == name)
    }

    /// Bytes of one element.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        match self {
            Self::Bool8 | Self::Int8 | Self::Uint8 | Self::Float8E4m3fn | Self::Float8E5m2 => 1,
            Self::Int16 | Self::Uint16 | Self::Float16 | Self::Bfloat16 => 2,
            Self::Int32 | Self::Uint32 | Self::Float32 => 4,
            Self::Int64 | Self::Uint64 | Self::Float64 | Self::Complex64 => 8,
            Self::Complex128 => 16,
        }
    }
}

impl Spec {
    /// A data tensor of that dtype and shape.
    #[must_use]
    pub fn new(dtype: Dtype, shape: impl Into<Vec<u64>>) -> Self {
        Self {
            dtype,
            role: Role::Data,
            shape: shape.into(),
        }
    }

    /// The same shape with another dtype.
    #[must_use]
    pub fn with_dtype(&self, dtype: Dtype) -> Self {
        Self {
            dtype,
            ..self.clone()
        }
    }

    /// Rows: what one index of axis 0 holds each; a tensor without axes is one row.
    #[must_use]
    pub fn rows(&self) -> u64 {
        self.shape.first().copied().unwrap_or(1)
    }

    /// Number of elements; `None` if it, or the size in bytes, does not fit this machine's addresses.
    #[must_use]
    pub fn elements(&self) -> Option<usize> {
        // A zero anywhere makes the tensor empty, however large the other dimensions are.
        if self.shape.contains(&0) {
            return Some(0);
        }
        let count = self
            .shape
            .iter()
            .try_fold(1u64, |product, &size| product.checked_mul(size))?;
        isize::try_from(count.checked_mul(self.dtype.bytes())?).ok()?;
        usize::try_from(count).ok()
    }
}

impl Error {
    /// The caller's mistake: what is wrong with which parameter or port, and what to do.
    pub fn bad_argument(name: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::BadArgument(crate::BadArgument {
            name: name.into(),
            reason: reason.into(),
        })
    }

    /// A wish that this kernel does not fulfil.
    pub fn unsupported(reason: impl Into<String>) -> Self {
        Self::Unsupported(reason.into())
    }

    /// The kernel could not do its work.
    pub fn failed(reason: impl Into<String>) -> Self {
        Self::Failed(reason.into())
    }

    #[doc(hidden)]
    #[must_use]
    pub fn unhandled(dtype: Dtype) -> Self {
        Self::Failed(format!(
            "the kernel's declaration allows {}, its code does not handle it",
            dtype.name()
        ))
    }
}

/// A Rust type that is one element of a tensor.
///
/// # Safety
/// Every bit pattern is a valid value, there is no padding, the size is `DTYPE.bytes()`, and the
/// alignment is at most 64 bytes.
#[expect(unsafe_code, reason = "windows are read as slices of these types")]
pub unsafe trait Element: Copy + Default + PartialEq + core::fmt::Debug + 'static {
    /// The dtype that this type stands for.
    const DTYPE: Dtype;
}

/// One byte: 0 is false, everything else true. Kernels write 0 and 1 only.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[repr(transparent)]
pub struct Bool8(pub u8);

impl Bool8 {
    /// Whether it is true.
    #[inline]
    #[must_use]
    pub fn get(self) -> bool {
        self.0 != 0
    }
}

impl From<bool> for Bool8 {
    #[inline]
    fn from(value: bool) -> Self {
        Self(u8::from(value))
    }
}

/// A complex number as it lies in memory: real part, imaginary part.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[repr(C)]
pub struct Complex<T> {
    /// Real part.
    pub re: T,
    /// Imaginary part.
    pub im: T,
}

macro_rules! elements {
    ($($type:ty => $dtype:ident),+ $(,)?) => {
        $(
            const _: () = assert!(size_of::<$type>() as u64 == Dtype::$dtype.bytes());
            // SAFETY: a number, or a transparent or `repr(C)` struct of one or two numbers: all bits
            // are valid and nothing is padding; the size is asserted above; alignment is at most 8.
            #[expect(unsafe_code, reason = "see SAFETY")]
            unsafe impl Element for $type {
                const DTYPE: Dtype = Dtype::$dtype;
            }
        )+
    };
}

elements! {
    Bool8 => Bool8, i8 => Int8, i16 => Int16, i32 => Int32, i64 => Int64, u8 => Uint8, u16 => Uint16,
    u32 => Uint32, u64 => Uint64, F16 => Float16, Bf16 => Bfloat16, F8E4m3fn => Float8E4m3fn,
    F8E5m2 => Float8E5m2, f32 => Float32, f64 => Float64, Complex<f32> => Complex64, Complex<f64> => Complex128,
}

/// A real number that can be computed with as `f64`.
pub trait Real: Element {
    /// Exact, but for 64-bit integers beyond 2^53, which are rounded to the nearest (even).
    fn to_f64(self) -> f64;
    /// Floats: rounded once, to the nearest (even); too large is infinity (NaN in `float8_e4m3fn`,
    /// which has none). Integers: cut towards zero, held at the type's limits, NaN is 0. `bool8`: not 0.
    fn from_f64(value: f64) -> Self;
}

macro_rules! primitive_reals {
    ($($type:ty),+) => {
        $(
            impl Real for $type {
                #[inline]
                #[allow(clippy::cast_lossless, reason = "one macro for types of all widths")]
                fn to_f64(self) -> f64 {
                    self as f64
                }

                #[inline]
                #[allow(
                    clippy::cast_possible_truncation, clippy::cast_sign_loss,
                    reason = "`as` does what the trait promises"
                )]
                fn from_f64(value: f64) -> Self {
                    value as Self
                }
            }
        )+
    };
}
primitive_reals!(i8, i16, i32, i64, u8, u16, u32, u64, f32, f64);

impl Real for Bool8 {
    #[inline]
    fn to_f64(self) -> f64 {
        f64::from(u8::from(self.get()))
    }

    #[inline]
    fn from_f64(value: f64) -> Self {
        Self::from(value != 0.0)
    }
}

macro_rules! narrow_reals {
    ($($type:ty),+) => {
        $(
            impl Real for $type {
                #[inline]
                fn to_f64(self) -> f64 {
                    f64::from(self.to_f32())
                }

                #[inline]
                fn from_f64(value: f64) -> Self {
                    <$type>::from_f64(value)
                }
            }
        )+
    };
}
narrow_reals!(F16, Bf16, F8E4m3fn, F8E5m2);
