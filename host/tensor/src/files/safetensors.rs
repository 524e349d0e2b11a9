//! Hugging Face's `.safetensors`: the length of a JSON header, the header, then all tensors without a gap.
//!
//! The crate of that name parses from a slice of the whole file; here only the header is read.

use std::fmt;
use std::io::{self, Read};

use serde::de::{self, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};

use super::named::NamedTensor;
use crate::{Dtype, TensorSpec};

/// As in the format's own reader.
const HEADER_BYTES_MAX: u64 = 100_000_000;
/// The header is padded so that the tensors begin on a multiple of this.
const ALIGN_BYTES: usize = 64;

/// A tensor in the file.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) name: String,
    /// Its spec and where it lies in the file; or why it cannot be a tensor.
    pub(super) tensor: Result<(TensorSpec, u64), String>,
}

/// What is wrong with a file, or what reading it failed of.
#[derive(Debug)]
pub(super) enum Problem {
    Io(io::Error),
    Content(String),
}

impl From<io::Error> for Problem {
    fn from(error: io::Error) -> Problem {
        Problem::Io(error)
    }
}

#[derive(Deserialize)]
struct Declared {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

/// The header's entries by their order there, so that a name which is there twice is seen.
struct Header(Vec<(String, Declared)>);

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Header, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Header;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object with an entry for each tensor")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let mut names = std::collections::HashSet::new();
                let mut entries = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if !names.insert(name.clone()) {
                        return Err(de::Error::custom(format_args!("{name:?} is there twice")));
                    }
                    if name == "__metadata__" {
                        map.next_value::<de::IgnoredAny>()?;
                    } else {
                        entries.push((name, map.next_value()?));
                    }
                }
                Ok(Header(entries))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

/// The tensors of a file of `bytes` bytes, by their place. The reader stands at its beginning.
pub(super) fn open(mut file: impl Read, bytes: u64) -> Result<Vec<Entry>, Problem> {
    let damaged = |reason: String| Problem::Content(format!("damaged .safetensors: {reason}"));
    if bytes < 8 {
        return Err(damaged(format!(
            "{bytes} bytes, and its header's length alone has 8"
        )));
    }
    let mut length = [0; 8];
    file.read_exact(&mut length)?;
    let length = u64::from_le_bytes(length);
    if length > HEADER_BYTES_MAX.min(bytes - 8) {
        return Err(damaged(format!(
            "a header of {length} bytes in a file of {bytes}; at most {HEADER_BYTES_MAX} are read"
        )));
    }
    let mut header = Vec::new();
    file.take(length).read_to_end(&mut header)?;
    let Header(mut declared) =
        serde_json::from_slice(&header).map_err(|error| damaged(format!("header: {error}")))?;
    declared.sort_by_key(|(_, tensor)| tensor.data_offsets);

    let data_offset = 8 + length;
    let mut end = 0;
    let mut entries = Vec::with_capacity(declared.len());
    for (name, tensor) in declared {
        let (from, to) = tensor.data_offsets;
        if from != end || to < from {
            return Err(damaged(format!(
                "tensor {name:?} lies from byte {from} to {to} of the data, and the one before it ends at {end}"
            )));
        }
        end = to;
        let read = check(&name, tensor, to - from).map_err(damaged)?;
        entries.push(Entry {
            name,
            tensor: read.map(|spec| (spec, data_offset + from)),
        });
    }
    let found = bytes - data_offset;
    if end != found {
        return Err(damaged(format!(
            "its header tells of {end} bytes of data and {found} are there"
        )));
    }
    Ok(entries)
}

/// What the tensor is, or why it is none for us; an error if it contradicts itself.
fn check(name: &str, declared: Declared, bytes: u64) -> Result<Result<TensorSpec, String>, String> {
    let Some(dtype) = dtype(&declared.dtype) else {
        return Ok(Err(format!(
            "tensor {name:?} has dtype {:?}, which no kernel takes; convert it, for instance to              bfloat16 or uint8, and save it again",
            declared.dtype
        )));
    };
    let spec = TensorSpec {
        dtype,
        shape: declared.shape,
    };
    match spec.bytes() {
        Ok(needed) if needed == bytes => Ok(Ok(spec)),
        Ok(needed) => Err(format!(
            "tensor {name:?}, {spec}, has {needed} bytes and lies in {bytes}"
        )),
        Err(reason) => Ok(Err(format!("tensor {name:?}: {reason}"))),
    }
}

/// The format's words, and ours.
const WORDS: [(&str, Dtype); 16] = [
    ("BOOL", Dtype::Bool8),
    ("U8", Dtype::Uint8),
    ("I8", Dtype::Int8),
    ("F8_E5M2", Dtype::Float8E5m2),
    ("F8_E4M3", Dtype::Float8E4m3fn),
    ("I16", Dtype::Int16),
    ("U16", Dtype::Uint16),
    ("F16", Dtype::Float16),
    ("BF16", Dtype::Bfloat16),
    ("I32", Dtype::Int32),
    ("U32", Dtype::Uint32),
    ("F32", Dtype::Float32),
    ("C64", Dtype::Complex64),
    ("F64", Dtype::Float64),
    ("I64", Dtype::Int64),
    ("U64", Dtype::Uint64),
];

fn dtype(word: &str) -> Option<Dtype> {
    let found = WORDS.iter().find(|(known, _)| *known == word);
    found.map(|(_, dtype)| *dtype)
}

fn word(dtype: Dtype) -> Option<&'static str> {
    let found = WORDS.iter().find(|(_, known)| *known == dtype);
    found.map(|(word, _)| *word)
}

/// The tensors as they lie in the file: the widest elements first, so that each is aligned.
pub(super) fn order<'a>(tensors: &[NamedTensor<'a>]) -> Vec<NamedTensor<'a>> {
    let mut order = tensors.to_vec();
    order.sort_by_key(|tensor| (std::cmp::Reverse(tensor.spec.dtype.size()), tensor.name));
    order
}

/// What stands before the tensors.
///
/// # Errors
/// A tensor that the format has no way to hold.
pub(super) fn header(tensors: &[NamedTensor<'_>]) -> Result<Vec<u8>, String> {
    let mut entries = Vec::with_capacity(tensors.len());
    let mut end = 0;
    for NamedTensor { name, spec, bytes } in tensors {
        if *name == "__metadata__" {
            return Err("a tensor of .safetensors cannot be called \"__metadata__\"".to_owned());
        }
        let Some(dtype) = word(spec.dtype) else {
            return Err(format!(
                "tensor {name:?}: .safetensors has no {}; write .npz or .arrow",
                spec.dtype
            ));
        };
        let start = end;
        end += bytes.len();
        let declared = serde_json::json!({
            "dtype": dtype, "shape": spec.shape, "data_offsets": [start, end],
        });
        entries.push(format!("{}:{declared}", serde_json::json!(name)));
    }
    let mut text = format!("{{{}}}", entries.join(","));
    let padded = (8 + text.len()).next_multiple_of(ALIGN_BYTES) - 8;
    text.extend(std::iter::repeat_n(' ', padded - text.len()));
    if text.len() as u64 > HEADER_BYTES_MAX {
        return Err(format!(
            "{} tensors need a header of {} bytes; .safetensors has at most {HEADER_BYTES_MAX}",
            tensors.len(),
            text.len()
        ));
    }
    let length = text.len() as u64;
    Ok([&length.to_le_bytes(), text.as_bytes()].concat())
}
