//! Tensors as C has them.

use std::ffi::{CStr, c_char, c_void};
use std::ptr;

use strait_client::{Dtype, NewTensor, TensorSpec, TensorView};

use crate::failure::Failure;
use crate::pointer::{Lent, StaticText, Text};

/// The most axes that a tensor can have.
pub const STRAIT_DIMS_MAX: usize = 8;

/// The type of a tensor's elements, by numpy's and ml_dtypes' names. Always little-endian. Numbers never change.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(non_camel_case_types, reason = "as it is written in strait.h")]
pub enum ElementType {
    /// One byte: 0 is false, any other true.
    bool8 = 1,
    /// Signed, 8 bits.
    int8 = 2,
    /// Signed, 16 bits.
    int16 = 3,
    /// Signed, 32 bits.
    int32 = 4,
    /// Signed, 64 bits.
    int64 = 5,
    /// Unsigned, 8 bits.
    uint8 = 6,
    /// Unsigned, 16 bits.
    uint16 = 7,
    /// Unsigned, 32 bits.
    uint32 = 8,
    /// Unsigned, 64 bits.
    uint64 = 9,
    /// IEEE 754 binary16.
    float16 = 10,
    /// The upper half of a binary32.
    bfloat16 = 11,
    /// OCP 8-bit float, 4 exponent and 3 mantissa bits, finite values and NaN only.
    float8_e4m3fn = 12,
    /// OCP 8-bit float, 5 exponent and 2 mantissa bits, with infinities.
    float8_e5m2 = 13,
    /// IEEE 754 binary32.
    float32 = 14,
    /// IEEE 754 binary64.
    float64 = 15,
    /// A pair of float32: real, imaginary.
    complex64 = 16,
    /// A pair of float64: real, imaginary.
    complex128 = 17,
}

const TYPES: [(ElementType, Dtype, &CStr); 17] = [
    (ElementType::bool8, Dtype::Bool8, c"bool8"),
    (ElementType::int8, Dtype::Int8, c"int8"),
    (ElementType::int16, Dtype::Int16, c"int16"),
    (ElementType::int32, Dtype::Int32, c"int32"),
    (ElementType::int64, Dtype::Int64, c"int64"),
    (ElementType::uint8, Dtype::Uint8, c"uint8"),
    (ElementType::uint16, Dtype::Uint16, c"uint16"),
    (ElementType::uint32, Dtype::Uint32, c"uint32"),
    (ElementType::uint64, Dtype::Uint64, c"uint64"),
    (ElementType::float16, Dtype::Float16, c"float16"),
    (ElementType::bfloat16, Dtype::Bfloat16, c"bfloat16"),
    (
        ElementType::float8_e4m3fn,
        Dtype::Float8E4m3fn,
        c"float8_e4m3fn",
    ),
    (ElementType::float8_e5m2, Dtype::Float8E5m2, c"float8_e5m2"),
    (ElementType::float32, Dtype::Float32, c"float32"),
    (ElementType::float64, Dtype::Float64, c"float64"),
    (ElementType::complex64, Dtype::Complex64, c"complex64"),
    (ElementType::complex128, Dtype::Complex128, c"complex128"),
];

fn number(dtype: Dtype) -> u32 {
    let known = TYPES.iter().find(|(_, known, _)| *known == dtype);
    known.map_or(0, |(number, ..)| *number as u32)
}

/// An array: what it is, and where its elements are, row-major (the last axis varies fastest) and contiguous.
///
/// A program fills one in to say what it has (with `data`) or wants (a spec: `data` is NULL); set all of it to zero first. One that a
/// function fills in points to memory of that function's handle, which the program may only read.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Tensor {
    /// Its name in a segment, or the port of a result. May be NULL if the name is given in another way.
    pub name: *const c_char,
    /// One of strait_dtype.
    pub dtype: u32,
    /// Number of axes: how many entries of `shape` are used. 0: one element.
    pub ndim: u32,
    /// The sizes of its axes.
    pub shape: [u64; STRAIT_DIMS_MAX],
    /// The elements.
    pub data: *const c_void,
    /// Bytes at `data`: exactly the number of elements times the size of one. In a spec: 0, or the same.
    pub bytes: u64,
}

impl Tensor {
    pub(crate) const NONE: Self = Self {
        name: ptr::null(),
        dtype: 0,
        ndim: 0,
        shape: [0; STRAIT_DIMS_MAX],
        data: ptr::null(),
        bytes: 0,
    };

    /// What a tensor is that C is given; `name` lives as long as the handle.
    fn new(name: &CStr, dtype: Dtype, shape: &[u64], data: *const u8, bytes: u64) -> Self {
        let mut sizes = [0; STRAIT_DIMS_MAX];
        for (size, given) in sizes.iter_mut().zip(shape) {
            *size = *given;
        }
        Self {
            name: name.as_ptr(),
            dtype: number(dtype),
            // At most eight: the protocol's limit, which the client checks.
            ndim: u32::try_from(shape.len()).unwrap_or_default(),
            shape: sizes,
            data: data.cast(),
            bytes,
        }
    }

    pub(crate) fn view(name: &CStr, tensor: &TensorView<'_>) -> Self {
        let bytes = tensor.bytes();
        Self::new(
            name,
            tensor.dtype(),
            tensor.shape(),
            bytes.as_ptr(),
            bytes.len() as u64,
        )
    }

    pub(crate) fn shown(name: &CStr, dtype: Dtype, shape: &[u64], at: Lent) -> Self {
        Self::new(name, dtype, shape, at.address(), at.bytes().len() as u64)
    }

    pub(crate) fn spec_of(name: &CStr, dtype: Dtype, shape: &[u64], bytes: u64) -> Self {
        Self::new(name, dtype, shape, ptr::null(), bytes)
    }

    /// Dtype and shape, and how many bytes that makes.
    fn checked(&self, what: &str) -> Result<(TensorSpec, u64), Failure> {
        let known = TYPES
            .iter()
            .find(|(number, ..)| *number as u32 == self.dtype);
        let Some((_, dtype, _)) = known else {
            let text = format!("{what}: dtype {} is none of strait_dtype", self.dtype);
            return Err(Failure::argument(text));
        };
        let shape = usize::try_from(self.ndim)
            .ok()
            .and_then(|ndim| self.shape.get(..ndim));
        let Some(shape) = shape else {
            let text = format!(
                "{what}: {} axes; a tensor has at most {STRAIT_DIMS_MAX}",
                self.ndim
            );
            return Err(Failure::argument(text));
        };
        let spec = TensorSpec {
            dtype: *dtype,
            shape: shape.to_vec(),
        };
        let bytes = spec
            .bytes()
            .map_err(|error| Failure::argument(format!("{what}: {error}")))?;
        Ok((spec, bytes))
    }

    /// Dtype and shape of a tensor that has no elements yet.
    pub(crate) fn spec(&self, what: &str) -> Result<TensorSpec, Failure> {
        let (spec, bytes) = self.checked(what)?;
        if self.bytes != 0 && self.bytes != bytes {
            let text = format!("{what}: {spec} has {bytes} bytes, not {}", self.bytes);
            return Err(Failure::argument(text));
        }
        Ok(spec)
    }

    /// A tensor with elements of C's.
    pub(crate) fn elements(&self, what: &str) -> Result<(TensorSpec, Lent), Failure> {
        let (spec, bytes) = self.checked(what)?;
        if self.bytes != bytes {
            let text = format!(
                "{what}: {spec} has {bytes} bytes; {} were given",
                self.bytes
            );
            return Err(Failure::argument(text));
        }
        let lent = Lent::new(self.data.cast(), bytes, what)?;
        Ok((spec, lent))
    }

    /// A tensor of a segment to be made.
    pub(crate) fn new_tensor(&self, index: usize) -> Result<NewTensor, Failure> {
        let what = format!("tensor {index}");
        let name = Text::at(self.name);
        let name = name.get(&format!("name of {what}"))?.to_owned();
        let TensorSpec { dtype, shape } = self.spec(&what)?;
        Ok(NewTensor { name, dtype, shape })
    }
}

/// The name of one of strait_dtype, such as "float64"; NULL for other numbers.
#[unsafe(no_mangle)]
pub extern "C" fn strait_dtype_name(dtype: u32) -> StaticText {
    let known = TYPES.iter().find(|(number, ..)| *number as u32 == dtype);
    known.map_or(StaticText::NULL, |(_, _, name)| StaticText::new(name))
}

/// The strait_dtype of that name; 0 if there is none, or `name` is NULL.
#[unsafe(no_mangle)]
pub extern "C" fn strait_dtype_named(name: Text) -> u32 {
    let name = name.get("name").unwrap_or_default();
    let known = TYPES.iter().find(|(_, dtype, _)| dtype.name() == name);
    known.map_or(0, |(number, ..)| *number as u32)
}
