//! numpy's `.npy` format: a Python dictionary as a header, then the elements.

use std::io::{self, Read};

use super::transpose::read_fortran;
use crate::{Dtype, LayoutError, TensorSpec};

const MAGIC: &[u8; 6] = b"\x93NUMPY";
/// Longer headers exist for structured dtypes only, which are refused anyway.
const HEADER_BYTES_MAX: u32 = 1 << 16;

/// What is wrong with a `.npy` file.
#[derive(Debug, thiserror::Error)]
pub enum NpyError {
    /// Not the format at all.
    #[error("not a .npy file: it does not begin with \\x93NUMPY ({bytes} bytes in all)")]
    Magic {
        /// The length of the file.
        bytes: u64,
    },
    /// A version of the format that is not known.
    #[error(".npy version {major}.{minor}; 1.0, 2.0 and 3.0 are read")]
    Version {
        /// The major version.
        major: u8,
        /// The minor version.
        minor: u8,
    },
    /// A header that nobody needs.
    #[error("a header of {bytes} bytes; at most {HEADER_BYTES_MAX} are read")]
    HeaderTooLong {
        /// The length that the file gives.
        bytes: u32,
    },
    /// The file ends within its header.
    #[error("cut off: its header needs {needed} bytes and the file has {bytes}")]
    HeaderTruncated {
        /// Where the header ends.
        needed: u64,
        /// The length of the file.
        bytes: u64,
    },
    /// A header that numpy would not write.
    #[error("damaged header: {reason} at its byte {at}")]
    Header {
        /// What is wrong.
        reason: String,
        /// Where.
        at: usize,
    },
    /// Elements that no kernel takes.
    #[error("dtype {descr:?} is {reason}")]
    Dtype {
        /// numpy's word for it.
        descr: String,
        /// What that is, and what to do.
        reason: &'static str,
    },
    /// The file ends before its data does.
    #[error("cut off: {spec} has {needed} bytes, the file {found} after its header")]
    Truncated {
        /// What the header says.
        spec: TensorSpec,
        /// Its bytes.
        needed: u64,
        /// The bytes after the header.
        found: u64,
    },
    /// The file goes on after its data.
    #[error(
        "{spec} has {needed} bytes, the file {found} after its header: the header is wrong, or several \
         arrays are in one file; write each with a np.save of its own"
    )]
    TooLong {
        /// What the header says.
        spec: TensorSpec,
        /// Its bytes.
        needed: u64,
        /// The bytes after the header.
        found: u64,
    },
    /// A shape that is not possible.
    #[error("{0}")]
    Layout(LayoutError),
    /// The operating system said no.
    #[error("cannot read its header: {0}")]
    Io(io::Error),
}

impl From<io::Error> for NpyError {
    fn from(error: io::Error) -> NpyError {
        NpyError::Io(error)
    }
}

/// The elements in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Data {
    offset: u64,
    fortran_order: bool,
    big_endian: bool,
}

/// Reads the header from the start of a file of `bytes` bytes and checks it against that length.
pub(super) fn open(mut file: impl Read, bytes: u64) -> Result<(TensorSpec, Data), NpyError> {
    let (header, offset) = read_header(&mut file, bytes)?;
    let (spec, fortran_order, big_endian) = parse_header(&header)?;
    let needed = spec.bytes().map_err(NpyError::Layout)?;
    let found = bytes - offset;
    match needed.cmp(&found) {
        std::cmp::Ordering::Equal => Ok((
            spec,
            Data {
                offset,
                fortran_order,
                big_endian,
            },
        )),
        std::cmp::Ordering::Greater => Err(NpyError::Truncated {
            spec,
            needed,
            found,
        }),
        std::cmp::Ordering::Less => Err(NpyError::TooLong {
            spec,
            needed,
            found,
        }),
    }
}

/// The dictionary, and where the data starts.
fn read_header(file: &mut impl Read, bytes: u64) -> Result<(Vec<u8>, u64), NpyError> {
    let truncated = |needed| NpyError::HeaderTruncated { needed, bytes };
    if bytes < MAGIC.len() as u64 {
        return Err(NpyError::Magic { bytes });
    }
    let mut magic = [0; MAGIC.len()];
    file.read_exact(&mut magic)?;
    if magic != *MAGIC {
        return Err(NpyError::Magic { bytes });
    }
    if bytes < 8 {
        return Err(truncated(8));
    }
    let mut version = [0; 2];
    file.read_exact(&mut version)?;
    let prefix_bytes: u64 = match version {
        [1, 0] => 10,
        [2 | 3, 0] => 12,
        [major, minor] => return Err(NpyError::Version { major, minor }),
    };
    if bytes < prefix_bytes {
        return Err(truncated(prefix_bytes));
    }
    let mut length = [0; 4];
    let length_bytes = if prefix_bytes == 10 { 2 } else { 4 };
    file.read_exact(&mut length[..length_bytes])?;
    let length = u32::from_le_bytes(length);
    if length > HEADER_BYTES_MAX {
        return Err(NpyError::HeaderTooLong { bytes: length });
    }
    let offset = prefix_bytes + u64::from(length);
    if bytes < offset {
        return Err(truncated(offset));
    }
    let mut header = vec![0; length as usize];
    file.read_exact(&mut header)?;
    Ok((header, offset))
}

/// What the dictionary says: spec, whether in Fortran order, whether big-endian.
fn parse_header(header: &[u8]) -> Result<(TensorSpec, bool, bool), NpyError> {
    let mut text = Python {
        text: header,
        at: 0,
    };
    let (mut descr, mut fortran_order, mut shape) = (None, None, None);
    text.expect(b'{')?;
    while !text.accept(b'}') {
        let at = text.at;
        let key = text.string()?;
        text.expect(b':')?;
        let is_new = match key {
            "descr" => {
                if matches!(text.peek(), Some(b'[' | b'(')) {
                    return Err(NpyError::Dtype {
                        descr: "[...]".to_owned(),
                        reason: "structured; save each of its fields as an array of its own",
                    });
                }
                descr.replace(text.string()?).is_none()
            }
            "fortran_order" => fortran_order.replace(text.boolean()?).is_none(),
            "shape" => shape.replace(text.sizes()?).is_none(),
            _ => false,
        };
        if !is_new {
            let reason = format!("key {key:?}, unknown or for the second time,");
            return Err(NpyError::Header { reason, at });
        }
        if !text.accept(b',') {
            text.expect(b'}')?;
            break;
        }
    }
    if text.peek().is_some() {
        return Err(text.unexpected("the end"));
    }
    let (Some(descr), Some(fortran_order), Some(shape)) = (descr, fortran_order, shape) else {
        let reason = "it ends without all of 'descr', 'fortran_order' and 'shape'".to_owned();
        return Err(NpyError::Header {
            reason,
            at: text.at,
        });
    };
    let (dtype, big_endian) = parse_descr(descr)?;
    Ok((TensorSpec { dtype, shape }, fortran_order, big_endian))
}

/// The little Python that the header is written in.
struct Python<'a> {
    text: &'a [u8],
    at: usize,
}

impl<'a> Python<'a> {
    /// The next byte that is no white space.
    fn peek(&mut self) -> Option<u8> {
        while self.text.get(self.at).is_some_and(u8::is_ascii_whitespace) {
            self.at += 1;
        }
        self.text.get(self.at).copied()
    }

    fn accept(&mut self, byte: u8) -> bool {
        let found = self.peek() == Some(byte);
        self.at += usize::from(found);
        found
    }

    fn expect(&mut self, byte: u8) -> Result<(), NpyError> {
        if self.accept(byte) {
            return Ok(());
        }
        Err(self.unexpected(&format!("{:?}", char::from(byte))))
    }

    fn unexpected(&mut self, expected: &str) -> NpyError {
        let found = match self.peek() {
            Some(byte) => format!("{:?}", char::from(byte)),
            None => "its end".to_owned(),
        };
        NpyError::Header {
            reason: format!("{found} instead of {expected}"),
            at: self.at,
        }
    }

    /// The bytes from here on that `belongs` takes.
    fn take(&mut self, belongs: impl Fn(&u8) -> bool) -> &'a [u8] {
        let rest = &self.text[self.at..];
        let length = rest.iter().take_while(|byte| belongs(byte)).count();
        self.at += length;
        &rest[..length]
    }

    fn string(&mut self) -> Result<&'a str, NpyError> {
        let Some(quote @ (b'\'' | b'"')) = self.peek() else {
            return Err(self.unexpected("a string"));
        };
        let at = self.at;
        self.at += 1;
        let text = self.take(|&byte| byte != quote && byte != b'\\');
        if self.text.get(self.at) != Some(&quote) {
            return Err(self.unexpected("the end of a string"));
        }
        self.at += 1;
        std::str::from_utf8(text).map_err(|_| NpyError::Header {
            reason: "a string that is not UTF-8".to_owned(),
            at,
        })
    }

    fn boolean(&mut self) -> Result<bool, NpyError> {
        self.peek();
        let at = self.at;
        match self.take(u8::is_ascii_alphabetic) {
            b"True" => Ok(true),
            b"False" => Ok(false),
            _ => {
                self.at = at;
                Err(self.unexpected("True or False"))
            }
        }
    }

    /// A tuple of sizes. Python 2 wrote an `L` behind some.
    fn sizes(&mut self) -> Result<Vec<u64>, NpyError> {
        self.expect(b'(')?;
        let mut sizes = Vec::new();
        while !self.accept(b')') {
            self.peek();
            let at = self.at;
            let digits = std::str::from_utf8(self.take(u8::is_ascii_digit)).unwrap_or_default();
            if digits.is_empty() {
                return Err(self.unexpected("a size"));
            }
            let size = digits.parse().map_err(|_| NpyError::Header {
                reason: format!("a size of {} digits", digits.len()),
                at,
            })?;
            sizes.push(size);
            self.accept(b'L');
            if !self.accept(b',') {
                if sizes.len() == 1 {
                    return Err(self.unexpected("the ',' of a tuple"));
                }
                self.expect(b')')?;
                break;
            }
        }
        Ok(sizes)
    }
}

/// numpy's word for a dtype, and whether it means big-endian bytes. What `numpy.load` takes is read:
/// codes with or without a size, and the dtypes' names.
fn parse_descr(descr: &str) -> Result<(Dtype, bool), NpyError> {
    let refused = |reason| NpyError::Dtype {
        descr: descr.to_owned(),
        reason,
    };
    let (order, kind) = match descr.as_bytes().first() {
        Some(b'<' | b'>' | b'|' | b'=') => descr.split_at(1),
        _ => ("", descr),
    };
    let dtype = match kind {
        "b1" | "?" => Dtype::Bool8,
        "i1" | "b" => Dtype::Int8,
        "i2" | "h" => Dtype::Int16,
        "i4" | "i" => Dtype::Int32,
        "i8" | "l" | "q" | "n" | "p" => Dtype::Int64,
        "u1" | "B" => Dtype::Uint8,
        "u2" | "H" => Dtype::Uint16,
        "u4" | "I" => Dtype::Uint32,
        "u8" | "L" | "Q" | "N" | "P" => Dtype::Uint64,
        "f2" | "e" => Dtype::Float16,
        "f4" | "f" => Dtype::Float32,
        "f8" | "d" => Dtype::Float64,
        "c8" | "F" => Dtype::Complex64,
        "c16" | "D" => Dtype::Complex128,
        // ml_dtypes: its other one-byte floats are of kind V.
        "f1" => Dtype::Float8E5m2,
        "V2" if order == ">" => return Err(refused("two opaque bytes, big-endian")),
        // There is no order to swap: ml_dtypes writes '<', others '|'.
        "V2" => return Ok((Dtype::Bfloat16, false)),
        "V1" => {
            return Err(refused(
                "one opaque byte, as ml_dtypes writes several of its 8-bit floats: which one is not in \
                 the file; save it as .arrow, which keeps the type, or as uint8",
            ));
        }
        name => match named(name).filter(|_| order.is_empty()) {
            Some(dtype) => dtype,
            None => return Err(refused(why_not(name))),
        },
    };
    // '|', '=' and none at all mean the machine's own order, as in numpy.
    let big_endian = order == ">" && dtype.size() > 1;
    Ok((dtype, big_endian))
}

/// The dtype of that name in numpy, with C's `long` of 64 bits.
fn named(name: &str) -> Option<Dtype> {
    Some(match name {
        "bool" | "bool_" => Dtype::Bool8,
        "byte" => Dtype::Int8,
        "short" => Dtype::Int16,
        "intc" => Dtype::Int32,
        "int" | "int_" | "long" | "longlong" | "intp" => Dtype::Int64,
        "ubyte" => Dtype::Uint8,
        "ushort" => Dtype::Uint16,
        "uintc" => Dtype::Uint32,
        "uint" | "ulong" | "ulonglong" | "uintp" => Dtype::Uint64,
        "half" => Dtype::Float16,
        "single" => Dtype::Float32,
        "float" | "double" => Dtype::Float64,
        "csingle" => Dtype::Complex64,
        "complex" | "cdouble" => Dtype::Complex128,
        name => return name.parse().ok(),
    })
}

/// What a dtype is that no kernel takes, and what to do.
fn why_not(kind: &str) -> &'static str {
    match kind {
        "O" | "object" | "object_" => {
            return "of Python objects; convert it with .astype() to a dtype of numbers";
        }
        "str" | "str_" | "unicode" => return "of strings; tensors hold numbers only",
        "bytes" | "bytes_" | "c" => return "of byte strings; tensors hold numbers only",
        "void" => return "of opaque bytes; save .view('uint8') instead",
        "f16" | "g" | "longdouble" | "float128" => {
            return "a long double; convert it with .astype('float64')";
        }
        "c32" | "G" | "clongdouble" | "complex256" => {
            return "a long complex; convert it with .astype('complex128')";
        }
        _ => {}
    }
    // With a size or a unit behind.
    let is = |name| {
        let rest = kind.strip_prefix(name);
        rest.is_some_and(|rest| {
            rest.trim_start_matches(|c: char| c.is_ascii_digit())
                .is_empty()
        }) || rest.is_some_and(|rest| rest.contains('['))
    };
    if kind.contains(',') || kind.starts_with(|c: char| c.is_ascii_digit() || c == '(') {
        "structured or of arrays; save each of its fields as an array of its own"
    } else if is("S") || is("a") {
        "of byte strings; tensors hold numbers only"
    } else if is("U") {
        "of strings; tensors hold numbers only"
    } else if is("M") || is("datetime") {
        "of dates; save .view('int64') instead"
    } else if is("m") || is("timedelta") {
        "of time differences; save .view('int64') instead"
    } else if is("V") {
        "of opaque bytes; save .view('uint8') instead"
    } else {
        "not known; save the array again with numpy.save"
    }
}

impl Data {
    /// Where the elements begin.
    pub(super) fn offset(&self) -> u64 {
        self.offset
    }

    /// Whether the first axis is the fastest.
    pub(super) fn fortran_order(&self) -> bool {
        self.fortran_order
    }

    /// Whether the numbers have their bytes in the other order.
    pub(super) fn big_endian(&self) -> bool {
        self.big_endian
    }

    /// Reads the elements in row-major order and little-endian from a reader that stands at
    /// [`Data::offset`]. `destination` has exactly the bytes of `spec`.
    pub(super) fn read_into(
        &self,
        mut file: impl Read,
        spec: &TensorSpec,
        destination: &mut [u8],
    ) -> io::Result<()> {
        let is_same_in_both_orders = spec.shape.iter().filter(|&&n| n != 1).count() <= 1;
        if self.fortran_order && !is_same_in_both_orders && !destination.is_empty() {
            let sizes = spec.shape.iter().map(|&n| usize::try_from(n));
            let shape: Vec<usize> = sizes
                .collect::<Result<_, _>>()
                .expect("no axis is longer than the buffer");
            match spec.dtype.size() {
                1 => read_fortran::<1>(&mut file, &shape, destination)?,
                2 => read_fortran::<2>(&mut file, &shape, destination)?,
                4 => read_fortran::<4>(&mut file, &shape, destination)?,
                8 => read_fortran::<8>(&mut file, &shape, destination)?,
                _ => read_fortran::<16>(&mut file, &shape, destination)?,
            }
        } else {
            file.read_exact(destination)?;
        }
        self.to_little_endian(spec.dtype, destination);
        Ok(())
    }

    /// Turns whole elements as they lie in the file into little-endian ones.
    pub(super) fn to_little_endian(self, dtype: Dtype, elements: &mut [u8]) {
        if self.big_endian {
            let parts = if dtype.is_complex() { 2 } else { 1 };
            match dtype.size() / parts {
                2 => swap::<2>(elements),
                4 => swap::<4>(elements),
                8 => swap::<8>(elements),
                _ => {}
            }
        }
    }
}

fn swap<const N: usize>(bytes: &mut [u8]) {
    for number in bytes.as_chunks_mut::<N>().0 {
        number.reverse();
    }
}

/// The bytes before the elements, as `numpy.save` writes them.
pub(super) fn header(spec: &TensorSpec) -> Vec<u8> {
    let shape = match spec.shape.as_slice() {
        [n] => format!("({n},)"),
        sizes => {
            let sizes: Vec<String> = sizes.iter().map(u64::to_string).collect();
            format!("({})", sizes.join(", "))
        }
    };
    let mut text = format!(
        "{{'descr': '{}', 'fortran_order': False, 'shape': {shape}, }}",
        descr(spec.dtype)
    );
    // numpy keeps room for the leading axis to grow in place to 21 digits.
    if let Some(rows) = spec.shape.first() {
        text.extend(std::iter::repeat_n(' ', 21 - rows.to_string().len()));
    }
    let prefix_bytes = MAGIC.len() + 4;
    let unpadded = prefix_bytes + text.len() + 1;
    text.extend(std::iter::repeat_n(' ', 64 - unpadded % 64));
    text.push('\n');
    let length = u16::try_from(text.len()).expect("a shape of at most 8 axes is short");
    let mut bytes = [MAGIC.as_slice(), &[1, 0], &length.to_le_bytes()].concat();
    bytes.extend_from_slice(text.as_bytes());
    bytes
}

/// numpy's and ml_dtypes' word for a dtype in a `.npy` header.
fn descr(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::Bool8 => "|b1",
        Dtype::Int8 => "|i1",
        Dtype::Int16 => "<i2",
        Dtype::Int32 => "<i4",
        Dtype::Int64 => "<i8",
        Dtype::Uint8 => "|u1",
        Dtype::Uint16 => "<u2",
        Dtype::Uint32 => "<u4",
        Dtype::Uint64 => "<u8",
        Dtype::Float16 => "<f2",
        Dtype::Bfloat16 => "<V2",
        Dtype::Float8E4m3fn => "<V1",
        Dtype::Float8E5m2 => "<f1",
        Dtype::Float32 => "<f4",
        Dtype::Float64 => "<f8",
        Dtype::Complex64 => "<c8",
        Dtype::Complex128 => "<c16",
    }
}
