//! Which columns a schema declares, and which of them are tensors.

use arrow_ipc::{Field, MetadataVersion, Precision, Schema, Type, UnionMode, root_as_message};

use super::{
    BOOL8, CONTINUATION, DTYPE_KEY, EXTENSION_METADATA, EXTENSION_NAME, FIXED_SHAPE_TENSOR,
    IpcError, MAGIC, METADATA_BYTES_MAX, SHAPE_0D, SHAPE_KEY,
};
use crate::{Dtype, RANK_MAX, TensorPlace};

/// Lists within lists deeper than this are not followed.
const DEPTH_MAX: usize = 32;

/// A column of the schema.
pub(super) struct Declared {
    pub(super) name: String,
    /// Its field nodes in a record batch, outer before inner.
    pub(super) nodes: Vec<Node>,
    /// What it is as a tensor, or why it is none.
    pub(super) tensor: Result<Row, String>,
}

/// A field node's part of a record batch.
pub(super) struct Node {
    /// Buffers that every batch has for it.
    pub(super) buffers: usize,
    /// Further buffers, as many as the batch says.
    pub(super) is_view: bool,
    /// Values of this node in one row of the column, for the nodes of a tensor.
    pub(super) values: u64,
}

/// A tensor without its leading axis, the rows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// The type of the elements.
    pub dtype: Dtype,
    /// The axes after the first.
    pub shape: Vec<u64>,
    /// One row that is the only element.
    pub is_0d: bool,
}

/// A column that a schema declares.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SchemaColumn {
    /// Its name.
    pub name: String,
    /// What it is as a tensor, or why it is none.
    pub row: Result<Row, String>,
    /// Values in one row for each of its field nodes, outer before inner: 1, then those of its
    /// lists. Meaningless if it is no tensor.
    pub levels: Vec<u64>,
}

/// What `schema` declares, column by column.
///
/// # Errors
/// [`IpcError::Invalid`] for a schema that no column of can be read.
pub fn read_schema(schema: Schema<'_>) -> Result<Vec<SchemaColumn>, IpcError> {
    let columns = declared(schema, MetadataVersion::V5).map_err(IpcError::Invalid)?;
    let column = |declared: Declared| SchemaColumn {
        name: declared.name,
        levels: declared.nodes.iter().map(|node| node.values).collect(),
        row: declared.tensor,
    };
    Ok(columns.into_iter().map(column).collect())
}

/// The schema of the file that begins with `header`, as an encapsulated message, if that file has
/// just `tensors`. For bytes that nobody can still write.
pub fn schema_message<'a>(header: &'a [u8], tensors: &[TensorPlace]) -> Option<&'a [u8]> {
    let file = header.strip_prefix(&MAGIC)?;
    let (start, rest) = file.split_first_chunk::<8>()?;
    let bytes = usize::try_from(message_bytes(start)?).ok()?;
    let schema = root_as_message(rest.get(..bytes)?)
        .ok()?
        .header_as_schema()?;
    let columns = read_schema(schema).ok()?;
    let fits = columns.len() == tensors.len()
        && columns.iter().zip(tensors).all(|(column, tensor)| {
            column.name == tensor.name
                && column.row.as_ref().is_ok_and(|row| {
                    row.dtype == tensor.spec.dtype
                        && row.is_0d == tensor.spec.shape.is_empty()
                        && row.shape == tensor.spec.shape.get(1..).unwrap_or_default()
                })
        });
    fits.then_some(&file[..start.len() + bytes])
}

/// The length of the first message of a file of ours, of which these are bytes 8 to 15.
pub fn message_bytes(start: &[u8; 8]) -> Option<u32> {
    let length = start.strip_prefix(&CONTINUATION)?;
    let length = i32::from_le_bytes(length.try_into().ok()?);
    u32::try_from(length)
        .ok()
        .filter(|length| (1..=METADATA_BYTES_MAX).contains(length))
}

/// Reads the columns, or says what is wrong with the schema.
pub(super) fn declared(
    schema: Schema<'_>,
    version: MetadataVersion,
) -> Result<Vec<Declared>, String> {
    if schema.endianness() != arrow_ipc::Endianness::Little {
        return Err("its numbers are big-endian; write it on a little-endian machine".to_owned());
    }
    let fields = schema.fields().ok_or("it has no list of fields")?;
    fields
        .iter()
        .map(|field| {
            let name = field.name().unwrap_or_default().to_owned();
            let mut nodes = Vec::new();
            push_nodes(&mut nodes, field, version, 0)
                .map_err(|reason| format!("column {name:?}: {reason}"))?;
            let tensor = row(field, &mut nodes);
            Ok(Declared {
                name,
                nodes,
                tensor,
            })
        })
        .collect()
}

/// Appends the nodes of a field and its children, in the order of a record batch.
fn push_nodes(
    nodes: &mut Vec<Node>,
    field: Field<'_>,
    version: MetadataVersion,
    depth: usize,
) -> Result<(), String> {
    if depth > DEPTH_MAX {
        return Err(format!("nested deeper than {DEPTH_MAX}"));
    }
    let mut push = |buffers, is_view| {
        nodes.push(Node {
            buffers,
            is_view,
            values: 0,
        });
    };
    if field.dictionary().is_some() {
        push(2, false); // the indices; the values are in messages of their own
        return Ok(());
    }
    match field.type_type() {
        Type::Null | Type::RunEndEncoded => push(0, false),
        Type::Int
        | Type::FloatingPoint
        | Type::Bool
        | Type::Decimal
        | Type::Date
        | Type::Time
        | Type::Timestamp
        | Type::Interval
        | Type::Duration
        | Type::FixedSizeBinary
        | Type::List
        | Type::LargeList
        | Type::Map => push(2, false),
        Type::Binary | Type::Utf8 | Type::LargeBinary | Type::LargeUtf8 => push(3, false),
        Type::ListView | Type::LargeListView => push(3, false),
        Type::BinaryView | Type::Utf8View => push(2, true),
        Type::FixedSizeList | Type::Struct_ => push(1, false),
        Type::Union => {
            let union = field.type_as_union().ok_or("a union without its mode")?;
            // Before version 5 of the format unions had a validity buffer.
            let validity = usize::from(version.0 < MetadataVersion::V5.0);
            let offsets = usize::from(union.mode() == UnionMode::Dense);
            push(1 + validity + offsets, false);
        }
        unknown => return Err(format!("unknown Arrow type {}", unknown.0)),
    }
    for child in field.children().into_iter().flatten() {
        push_nodes(nodes, child, version, depth + 1)?;
    }
    Ok(())
}

/// Reads a field as a tensor and notes on its nodes how many values they have in a row.
fn row(field: Field<'_>, nodes: &mut [Node]) -> Result<Row, String> {
    if field.dictionary().is_some() {
        return Err("it is dictionary-encoded; decode it first".to_owned());
    }
    let mut shape = Vec::new();
    let mut values = 1_u64;
    let mut leaf = field;
    let mut depth = 0;
    while let Some(list) = leaf.type_as_fixed_size_list() {
        let size = u64::try_from(list.listSize())
            .map_err(|_| format!("a list of {} values", list.listSize()))?;
        set_values(nodes, depth, values);
        depth += 1;
        shape.push(size);
        values = values
            .checked_mul(size)
            .filter(|&values| values <= i64::MAX.cast_unsigned())
            .ok_or_else(|| format!("rows of {shape:?} values are too many to count"))?;
        let mut children = leaf.children().into_iter().flatten();
        leaf = match (children.next(), children.next()) {
            (Some(child), None) => child,
            _ => return Err("a fixed-size list without exactly one child".to_owned()),
        };
        if leaf.dictionary().is_some() {
            return Err("its values are dictionary-encoded".to_owned());
        }
    }
    set_values(nodes, depth, values);

    let primitive = primitive(leaf)?;
    match metadata(field, EXTENSION_NAME) {
        Some(FIXED_SHAPE_TENSOR) => shape = tensor_shape(field, &shape)?,
        Some(BOOL8) if !shape.is_empty() => return Err("arrow.bool8 over a list".to_owned()),
        _ => {}
    }
    let dtype = logical(field, primitive, &mut shape)?;
    let is_0d = match metadata(field, SHAPE_KEY) {
        None => false,
        Some(SHAPE_0D) if shape.is_empty() => true,
        Some(other) => {
            return Err(format!(
                "{SHAPE_KEY} {other:?} does not fit rows of shape {shape:?}"
            ));
        }
    };
    if shape.len() >= RANK_MAX {
        return Err(format!(
            "it has {} axes; at most {RANK_MAX} are possible",
            shape.len() + 1
        ));
    }
    Ok(Row {
        dtype,
        shape,
        is_0d,
    })
}

fn set_values(nodes: &mut [Node], index: usize, values: u64) {
    if let Some(node) = nodes.get_mut(index) {
        node.values = values;
    }
}

fn metadata<'a>(field: Field<'a>, key: &str) -> Option<&'a str> {
    let pairs = field.custom_metadata()?;
    pairs
        .iter()
        .find(|pair| pair.key() == Some(key))
        .map(|pair| pair.value().unwrap_or_default())
}

/// The type of the bits, or why there are none that a kernel can take.
fn primitive(field: Field<'_>) -> Result<Dtype, String> {
    if let Some(int) = field.type_as_int() {
        return match (int.bitWidth(), int.is_signed()) {
            (8, true) => Ok(Dtype::Int8),
            (16, true) => Ok(Dtype::Int16),
            (32, true) => Ok(Dtype::Int32),
            (64, true) => Ok(Dtype::Int64),
            (8, false) => Ok(Dtype::Uint8),
            (16, false) => Ok(Dtype::Uint16),
            (32, false) => Ok(Dtype::Uint32),
            (64, false) => Ok(Dtype::Uint64),
            (bits, _) => Err(format!("integers of {bits} bits")),
        };
    }
    if let Some(float) = field.type_as_floating_point() {
        return match float.precision() {
            Precision::HALF => Ok(Dtype::Float16),
            Precision::SINGLE => Ok(Dtype::Float32),
            Precision::DOUBLE => Ok(Dtype::Float64),
            other => Err(format!("floats of precision {}", other.0)),
        };
    }
    let name = field.type_type().variant_name().unwrap_or("unknown");
    Err(match field.type_type() {
        Type::Bool => {
            "its booleans are packed into bits; cast them to int8 (arrow.bool8), one byte each"
                .to_owned()
        }
        Type::Utf8 | Type::LargeUtf8 | Type::Utf8View => format!(
            "it is text ({name}); a tensor has numbers of a fixed width, so leave it out or encode it"
        ),
        Type::Date | Type::Time | Type::Timestamp | Type::Duration => {
            format!("it is a time ({name}); cast it to the integers that it stores")
        }
        _ => format!("its type, {name}, has no fixed-width numbers"),
    })
}

/// The shape of a row that `arrow.fixed_shape_tensor` declares over a list of that many values.
fn tensor_shape(field: Field<'_>, lists: &[u64]) -> Result<Vec<u64>, String> {
    #[derive(serde::Deserialize)]
    struct Parameters {
        shape: Vec<u64>,
        /// arrow-rs writes `permutations`, against the specification.
        #[serde(alias = "permutations")]
        permutation: Option<Vec<u64>>,
        dim_names: Option<Vec<String>>,
    }
    let json = metadata(field, EXTENSION_METADATA).unwrap_or_default();
    let Parameters {
        shape,
        permutation,
        dim_names,
    } = serde_json::from_str(json)
        .map_err(|error| format!("{FIXED_SHAPE_TENSOR} metadata {json:.100?}: {error}"))?;
    // Kept as it is, and pyarrow could not read it back.
    if let Some(names) = dim_names.filter(|names| names.len() != shape.len()) {
        return Err(format!(
            "{FIXED_SHAPE_TENSOR} has {} dim_names for a shape of {} axes; name each or none",
            names.len(),
            shape.len()
        ));
    }
    if let Some(permutation) = permutation
        && !permutation.iter().copied().eq(0..shape.len() as u64)
    {
        return Err(format!(
            "its axes are permuted ({permutation:?}); write it in row-major order"
        ));
    }
    let values = if shape.contains(&0) {
        Some(0)
    } else {
        shape
            .iter()
            .try_fold(1_u64, |values, &n| values.checked_mul(n))
    };
    match lists {
        &[size] if values == Some(size) => Ok(shape),
        _ => Err(format!(
            "{FIXED_SHAPE_TENSOR} of shape {shape:?} over lists of {lists:?}"
        )),
    }
}

/// The dtype that a column means by its primitive values; removes the last axis of complex ones.
fn logical(field: Field<'_>, stored: Dtype, shape: &mut Vec<u64>) -> Result<Dtype, String> {
    let Some(name) = metadata(field, DTYPE_KEY) else {
        let is_bool8 = metadata(field, EXTENSION_NAME) == Some(BOOL8);
        return match stored {
            Dtype::Int8 if is_bool8 => Ok(Dtype::Bool8),
            _ if is_bool8 => Err(format!("arrow.bool8 over {stored}")),
            _ => Ok(stored),
        };
    };
    let dtype: Dtype = name
        .parse()
        .map_err(|error| format!("{DTYPE_KEY}: {error}"))?;
    let fits = match dtype {
        Dtype::Bool8 => stored == Dtype::Int8,
        Dtype::Bfloat16 => stored == Dtype::Uint16,
        Dtype::Float8E4m3fn | Dtype::Float8E5m2 => stored == Dtype::Uint8,
        Dtype::Complex64 => stored == Dtype::Float32 && shape.pop() == Some(2),
        Dtype::Complex128 => stored == Dtype::Float64 && shape.pop() == Some(2),
        _ => stored == dtype,
    };
    if fits {
        Ok(dtype)
    } else {
        Err(format!(
            "{DTYPE_KEY} is {dtype} over {stored} values in rows of {shape:?}"
        ))
    }
}
