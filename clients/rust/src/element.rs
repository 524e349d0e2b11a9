//! Rust types of tensor elements.

use strait_tensor::Dtype;

use crate::error::Error;

/// A Rust type whose values lie in a tensor as they lie in memory.
///
/// `u8` also reads and writes `bool8` (0 or 1). Complex numbers are arrays (real, imaginary).
/// The 8-bit floats have no Rust type: use the tensor's bytes.
pub trait Element: bytemuck::Pod + Send + Sync {
    /// The dtype of a tensor of such elements.
    const DTYPE: Dtype;

    /// Whether a tensor of that dtype can be read and written as a slice of this type.
    #[must_use]
    fn fits(dtype: Dtype) -> bool {
        dtype == Self::DTYPE
    }
}

macro_rules! elements {
    ($($element:ty => $dtype:ident,)*) => {
        $(impl Element for $element { const DTYPE: Dtype = Dtype::$dtype; })*
    };
}

elements! {
    i8 => Int8,
    i16 => Int16,
    i32 => Int32,
    i64 => Int64,
    u16 => Uint16,
    u32 => Uint32,
    u64 => Uint64,
    half::f16 => Float16,
    half::bf16 => Bfloat16,
    f32 => Float32,
    f64 => Float64,
    [f32; 2] => Complex64,
    [f64; 2] => Complex128,
}

impl Element for u8 {
    const DTYPE: Dtype = Dtype::Uint8;

    fn fits(dtype: Dtype) -> bool {
        matches!(dtype, Dtype::Uint8 | Dtype::Bool8)
    }
}

pub(crate) fn check<T: Element>(name: &str, dtype: Dtype) -> Result<(), Error> {
    if T::fits(dtype) {
        return Ok(());
    }
    Err(Error::Dtype {
        name: name.to_owned(),
        dtype,
        asked: T::DTYPE,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_type_is_as_wide_as_its_dtype() {
        fn check<T: Element>() {
            assert_eq!(size_of::<T>() as u64, T::DTYPE.size(), "{}", T::DTYPE);
            let fitting: Vec<_> = Dtype::ALL
                .into_iter()
                .filter(|dtype| T::fits(*dtype))
                .collect();
            assert!(fitting.contains(&T::DTYPE), "{fitting:?}");
        }
        check::<i8>();
        check::<i16>();
        check::<i32>();
        check::<i64>();
        check::<u8>();
        check::<u16>();
        check::<u32>();
        check::<u64>();
        check::<half::f16>();
        check::<half::bf16>();
        check::<f32>();
        check::<f64>();
        check::<[f32; 2]>();
        check::<[f64; 2]>();
    }

    #[test]
    fn a_mismatch_names_both() {
        let text = super::check::<f32>("x", Dtype::Int16)
            .expect_err("not int16")
            .to_string();
        assert_eq!(text, "tensor \"x\" is int16; float32 was asked for");
        assert!(super::check::<u8>("mask", Dtype::Bool8).is_ok());
        assert!(super::check::<i8>("mask", Dtype::Bool8).is_err());
    }
}
