//! The narrow floats: `float16`, `bfloat16` and the two OCP 8-bit formats.
//!
//! All conversions are free of branches, so that loops over them become SIMD code. Wider sources come
//! through an `f32` that was *rounded to odd* (inexact results get their last bit set): rounding that once more,
//! to nearest even, gives the same as one rounding from the source, because an `f32` has more than two
//! bits to spare over each of these formats.

/// Square root, rounded correctly; `core` has none for wasm.
#[inline]
#[must_use]
pub fn sqrt(value: f64) -> f64 {
    #[cfg(all(target_arch = "wasm32", target_feature = "simd128"))]
    {
        use core::arch::wasm32::{f64x2_extract_lane, f64x2_splat, f64x2_sqrt};
        f64x2_extract_lane::<0>(f64x2_sqrt(f64x2_splat(value)))
    }
    #[cfg(all(target_arch = "wasm32", not(target_feature = "simd128")))]
    compile_error!(
        "strait-plugin needs -Ctarget-feature=+simd128 (see plugins/.cargo/config.toml)"
    );
    #[cfg(not(target_arch = "wasm32"))]
    value.sqrt()
}

/// `value` as `f32`, exact or with the last bit set, whichever way it was cut.
#[inline]
#[expect(
    clippy::cast_possible_truncation,
    reason = "the rounding is what this function mends"
)]
fn to_odd_f32(value: f64) -> f32 {
    let nearest = value as f32;
    let back = f64::from(nearest);
    let bits = nearest.to_bits();
    // Where rounding went away from zero (also to infinity), one step back is the truncated value.
    let truncated = bits.wrapping_sub(u32::from(back.abs() > value.abs()));
    let odd = truncated | 1;
    let inexact = (back != value) & !value.is_nan();
    f32::from_bits(if inexact { odd } else { bits })
}

/// `value` as `f64` so that rounding that to 24 bits or fewer is the same as rounding `value`.
#[inline]
#[expect(
    clippy::cast_precision_loss,
    reason = "at most 53 significant bits are left"
)]
fn to_sticky_f64(value: u64) -> f64 {
    const LOW: u64 = (1 << 11) - 1;
    let sticky = u64::from(value & LOW != 0) << 11;
    let short = (value & !LOW) | sticky;
    (if value < 1 << 53 { value } else { short }) as f64
}

/// Code of an `f32` in a format with `MANTISSA` bits after the point and exponents biased by `BIAS`.
///
/// Codes above `FINITE_MAX` become `OVERFLOW` (infinity, or NaN where there is none).
#[inline]
fn encode<
    const MANTISSA: u32,
    const BIAS: u32,
    const FINITE_MAX: u32,
    const OVERFLOW: u32,
    const NAN: u32,
>(
    value: f32,
) -> u32 {
    let shift = 23 - MANTISSA;
    let absolute = value.to_bits() & 0x7fff_ffff;
    let nearest_even = (1 << (shift - 1)) - 1 + ((absolute >> shift) & 1);
    let normal = ((absolute + nearest_even) >> shift).wrapping_sub((127 - BIAS) << MANTISSA);
    // Below the smallest normal: adding a number whose last bit has the weight of the format's smallest
    // step leaves the rounded multiple of that step in the sum's last bits.
    let step = f32::from_bits((127 + 1 - BIAS + 23 - MANTISSA) << 23);
    let subnormal = (f32::from_bits(absolute) + step)
        .to_bits()
        .wrapping_sub(step.to_bits());
    let code = if absolute < (127 - BIAS + 1) << 23 {
        subnormal
    } else {
        normal
    };
    let code = if (code > FINITE_MAX) | (absolute >= 0x7f80_0000) {
        OVERFLOW
    } else {
        code
    };
    if absolute > 0x7f80_0000 { NAN } else { code }
}

/// The inverse of [`encode`] for finite codes without the sign; exact.
#[inline]
fn decode<const MANTISSA: u32, const BIAS: u32>(code: u32) -> f32 {
    f32::from_bits(code << (23 - MANTISSA)) * f32::from_bits((127 + 127 - BIAS) << 23)
}

macro_rules! narrow_float {
    ($(#[$doc:meta])* $name:ident($bits:ty)) => {
        $(#[$doc])*
        ///
        /// Comparison with `==` is of the bits: 0 and -0 differ, a NaN equals itself.
        #[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
        #[repr(transparent)]
        pub struct $name(pub $bits);

        impl $name {
            /// Rounded once, to the nearest (even).
            #[inline]
            #[must_use]
            pub fn from_f64(value: f64) -> Self {
                Self::from_f32(to_odd_f32(value))
            }

            /// Rounded once, to the nearest (even).
            #[inline]
            #[must_use]
            pub fn from_u64(value: u64) -> Self {
                Self::from_f64(to_sticky_f64(value))
            }

            /// Rounded once, to the nearest (even).
            #[inline]
            #[must_use]
            pub fn from_i64(value: i64) -> Self {
                let absolute = to_sticky_f64(value.unsigned_abs());
                Self::from_f64(if value < 0 { -absolute } else { absolute })
            }

            /// Whether it is neither NaN nor an infinity.
            #[inline]
            #[must_use]
            pub fn is_finite(self) -> bool {
                self.to_f32().is_finite()
            }
        }
    };
}

narrow_float! {
    /// IEEE binary16.
    F16(u16)
}
narrow_float! {
    /// The upper half of an `f32`.
    Bf16(u16)
}
narrow_float! {
    /// OCP E4M3: largest 448, no infinity, one NaN for each sign.
    F8E4m3fn(u8)
}
narrow_float! {
    /// OCP E5M2: largest 57344, with infinities.
    F8E5m2(u8)
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "codes are as wide as their type"
)]
impl F16 {
    /// Rounded to the nearest (even); too large is infinity; a NaN is the quiet NaN of its sign.
    #[inline]
    #[must_use]
    pub fn from_f32(value: f32) -> Self {
        let sign = (value.to_bits() >> 16) & 0x8000;
        Self((encode::<10, 15, 0x7bff, 0x7c00, 0x7e00>(value) | sign) as u16)
    }

    /// Exact.
    #[inline]
    #[must_use]
    pub fn to_f32(self) -> f32 {
        let code = u32::from(self.0 & 0x7fff);
        let special = if code >= 0x7c00 { 0x7f80_0000 } else { 0 };
        f32::from_bits(
            decode::<10, 15>(code).to_bits() | special | (u32::from(self.0 & 0x8000) << 16),
        )
    }
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "codes are as wide as their type"
)]
impl Bf16 {
    /// Rounded to the nearest (even); too large is infinity; a NaN is the quiet NaN of its sign.
    #[inline]
    #[must_use]
    pub fn from_f32(value: f32) -> Self {
        let bits = value.to_bits();
        let rounded = (bits.wrapping_add(0x7fff + ((bits >> 16) & 1))) >> 16;
        let nan = 0x7fc0 | ((bits >> 16) & 0x8000);
        Self(
            (if bits & 0x7fff_ffff > 0x7f80_0000 {
                nan
            } else {
                rounded
            }) as u16,
        )
    }

    /// Exact.
    #[inline]
    #[must_use]
    pub fn to_f32(self) -> f32 {
        f32::from_bits(u32::from(self.0) << 16)
    }
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "codes are as wide as their type"
)]
impl F8E4m3fn {
    /// Rounded to the nearest (even); beyond 464, infinity and NaN are NaN.
    #[inline]
    #[must_use]
    pub fn from_f32(value: f32) -> Self {
        let sign = (value.to_bits() >> 24) & 0x80;
        Self((encode::<3, 7, 0x7e, 0x7f, 0x7f>(value) | sign) as u8)
    }

    /// Exact.
    #[inline]
    #[must_use]
    pub fn to_f32(self) -> f32 {
        let code = u32::from(self.0 & 0x7f);
        let special = if code == 0x7f { 0x7fc0_0000 } else { 0 };
        f32::from_bits(decode::<3, 7>(code).to_bits() | special | (u32::from(self.0 & 0x80) << 24))
    }
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "codes are as wide as their type"
)]
impl F8E5m2 {
    /// Rounded to the nearest (even); too large is infinity; a NaN is the quiet NaN of its sign.
    #[inline]
    #[must_use]
    pub fn from_f32(value: f32) -> Self {
        let sign = (value.to_bits() >> 24) & 0x80;
        Self((encode::<2, 15, 0x7b, 0x7c, 0x7e>(value) | sign) as u8)
    }

    /// Exact.
    #[inline]
    #[must_use]
    pub fn to_f32(self) -> f32 {
        let code = u32::from(self.0 & 0x7f);
        let special = if code >= 0x7c { 0x7f80_0000 } else { 0 };
        f32::from_bits(decode::<2, 15>(code).to_bits() | special | (u32::from(self.0 & 0x80) << 24))
    }
}
