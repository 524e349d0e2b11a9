//! What the bytes of an element mean.

use half::{bf16, f16};

use crate::Dtype;

/// One element.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Element {
    Boolean(bool),
    Integer(i128),
    /// What a binary32 holds exactly.
    Single(f32),
    Double(f64),
    Complex(f64, f64),
}

/// Calls `each` with every whole element of `bytes`, which are little-endian.
#[inline]
pub(crate) fn for_each(dtype: Dtype, bytes: &[u8], mut each: impl FnMut(Element)) {
    use Element::{Boolean, Complex, Double, Integer, Single};
    macro_rules! elements {
        ($size:literal, $bytes:ident => $element:expr) => {
            for &$bytes in bytes.as_chunks::<$size>().0 {
                each($element);
            }
        };
    }
    match dtype {
        Dtype::Bool8 => elements!(1, b => Boolean(b != [0])),
        Dtype::Int8 => elements!(1, b => Integer(i8::from_le_bytes(b).into())),
        Dtype::Int16 => elements!(2, b => Integer(i16::from_le_bytes(b).into())),
        Dtype::Int32 => elements!(4, b => Integer(i32::from_le_bytes(b).into())),
        Dtype::Int64 => elements!(8, b => Integer(i64::from_le_bytes(b).into())),
        Dtype::Uint8 => elements!(1, b => Integer(b[0].into())),
        Dtype::Uint16 => elements!(2, b => Integer(u16::from_le_bytes(b).into())),
        Dtype::Uint32 => elements!(4, b => Integer(u32::from_le_bytes(b).into())),
        Dtype::Uint64 => elements!(8, b => Integer(u64::from_le_bytes(b).into())),
        Dtype::Float16 => elements!(2, b => Single(f16::from_le_bytes(b).to_f32())),
        Dtype::Bfloat16 => elements!(2, b => Single(bf16::from_le_bytes(b).to_f32())),
        Dtype::Float8E4m3fn => elements!(1, b => Single(e4m3fn(b[0]))),
        // The upper half of a binary16.
        Dtype::Float8E5m2 => elements!(1, b => Single(f16::from_le_bytes([0, b[0]]).to_f32())),
        Dtype::Float32 => elements!(4, b => Single(f32::from_le_bytes(b))),
        Dtype::Float64 => elements!(8, b => Double(f64::from_le_bytes(b))),
        Dtype::Complex64 => elements!(8, b => {
            let [re, im] = halves::<4, 8>(b).map(f32::from_le_bytes);
            Complex(re.into(), im.into())
        }),
        Dtype::Complex128 => elements!(16, b => {
            let [re, im] = halves::<8, 16>(b).map(f64::from_le_bytes);
            Complex(re, im)
        }),
    }
}

fn halves<const N: usize, const M: usize>(pair: [u8; M]) -> [[u8; N]; 2] {
    let mut halves = [[0; N]; 2];
    halves.as_flattened_mut().copy_from_slice(&pair);
    halves
}

/// OCP's 8-bit float without infinities: exponent bias 7, NaN where all bits but the sign are set.
fn e4m3fn(bits: u8) -> f32 {
    let (exponent, mantissa) = (bits >> 3 & 15, f32::from(bits & 7));
    let size = match (exponent, bits & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa / 8.0 * 2.0_f32.powi(-6),
        _ => (1.0 + mantissa / 8.0) * 2.0_f32.powi(i32::from(exponent) - 7),
    };
    if bits & 0x80 == 0 { size } else { -size }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(dtype: Dtype, bytes: &[u8]) -> Vec<Element> {
        let mut elements = Vec::new();
        for_each(dtype, bytes, |element| elements.push(element));
        elements
    }

    #[test]
    fn small_floats() {
        use Element::Single;
        // From the OCP specification's tables.
        assert_eq!(
            all(Dtype::Float8E4m3fn, &[0x7e, 0x08, 0x07, 0x01, 0xb8, 0x80]),
            [448.0, 0.015_625, 0.013_671_875, 0.001_953_125, -1.0, -0.0].map(Single)
        );
        assert_eq!(
            all(Dtype::Float8E5m2, &[0x7b, 0x04, 0x01, 0xbc, 0x7c]),
            [57344.0, 6.103_515_6e-5, 1.525_878_9e-5, -1.0, f32::INFINITY].map(Single)
        );
        for (dtype, nan) in [(Dtype::Float8E4m3fn, 0xff), (Dtype::Float8E5m2, 0x7d)] {
            assert!(matches!(all(dtype, &[nan])[..], [Single(x)] if x.is_nan()));
        }
        assert_eq!(
            all(Dtype::Bfloat16, &[0x80, 0x3f, 0, 0xc0]),
            [Single(1.0), Single(-2.0)]
        );
    }

    #[test]
    fn whole_elements_only() {
        assert_eq!(all(Dtype::Int16, &[1, 0, 9]), [Element::Integer(1)]);
        let bytes = [1.5_f32.to_le_bytes(), (-2.0_f32).to_le_bytes()].concat();
        assert_eq!(all(Dtype::Complex64, &bytes), [Element::Complex(1.5, -2.0)]);
        assert_eq!(
            all(Dtype::Uint64, &[0xff; 8]),
            [Element::Integer(u64::MAX.into())]
        );
    }
}
