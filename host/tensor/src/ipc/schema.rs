//! Which columns a schema declares, and which of them are tensors.

use arrow_ipc::{Field, MetadataVersion, Schema, Type, UnionMode, root_as_message};
use arrow_schema::FieldRef;

use super::write::encapsulated;
use super::{CONTINUATION, IpcError, MAGIC};
use crate::arrow::{self, Row};
use crate::{LayoutError, METADATA_BYTES_MAX, TensorPlace, TensorSpec};

/// No schema of a segment that the host laid out comes near this.
const SCHEMA_BYTES_MAX: u64 = 2 << 20;
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

/// A schema as an encapsulated message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SchemaMessage {
    /// The message: [`Self::PREFIX_BYTES`] bytes, then its flatbuffer and padding.
    pub bytes: Vec<u8>,
    /// For each column as [`SchemaColumn::levels`].
    pub levels: Vec<Vec<u64>>,
}

impl SchemaMessage {
    /// Bytes before the flatbuffer.
    pub const PREFIX_BYTES: usize = 8;

    /// One that declares `tensors` (name and spec), whose lengths may differ.
    ///
    /// # Errors
    /// [`LayoutError::RowTooLong`] for what Arrow has no type for.
    pub fn of<'a>(
        tensors: impl IntoIterator<Item = (&'a str, &'a TensorSpec)>,
    ) -> Result<Self, LayoutError> {
        let schema = arrow::schema(tensors)?;
        let level =
            |field: &FieldRef| arrow::values(field, 1).expect("such rows are counted in i32");
        Ok(Self {
            bytes: encapsulated(&schema),
            levels: schema.fields().iter().map(level).collect(),
        })
    }

    /// The one in the file that begins with `header`, if that file has just `tensors`. For bytes that nobody can
    /// still write.
    pub fn in_header(header: &[u8], tensors: &[TensorPlace]) -> Option<Self> {
        let file = header.strip_prefix(&MAGIC)?;
        let (start, rest) = file.split_first_chunk::<{ Self::PREFIX_BYTES }>()?;
        let bytes = usize::try_from(message_bytes(start)?).ok()?;
        let schema = root_as_message(rest.get(..bytes)?)
            .ok()?
            .header_as_schema()?;
        let columns = read_schema(schema).ok()?;
        let fits = columns.len() == tensors.len()
            && columns.iter().zip(tensors).all(|(column, tensor)| {
                column.name == tensor.name && column.row == Ok(Row::of(&tensor.spec))
            });
        fits.then(|| Self {
            bytes: file[..start.len() + bytes].to_vec(),
            levels: columns.into_iter().map(|column| column.levels).collect(),
        })
    }

    /// As [`Self::in_header`], of the file that `read` copies bytes out of, from an offset on. None, too, if what
    /// comes before the first tensor is no file of ours.
    ///
    /// # Errors
    /// Those of `read`.
    pub fn in_file<E>(
        tensors: &[TensorPlace],
        mut read: impl FnMut(u64, &mut [u8]) -> Result<(), E>,
    ) -> Result<Option<Self>, E> {
        let first_tensor = tensors.iter().map(|tensor| tensor.offset).min();
        let room = first_tensor.unwrap_or(0).min(SCHEMA_BYTES_MAX);
        let mut start = [0; MAGIC.len() + Self::PREFIX_BYTES];
        if room < start.len() as u64 {
            return Ok(None);
        }
        read(0, &mut start)?;
        let length = start
            .last_chunk()
            .and_then(message_bytes)
            .map(|length| start.len() as u64 + u64::from(length));
        let Some(length) = length.filter(|length| *length <= room) else {
            return Ok(None);
        };
        let mut header = vec![0; usize::try_from(length).unwrap_or(0)];
        read(0, &mut header)?;
        Ok(Self::in_header(&header, tensors))
    }
}

/// The length of a file's first message, of which `start` are the first bytes.
fn message_bytes(start: &[u8; SchemaMessage::PREFIX_BYTES]) -> Option<u32> {
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
            let (tensor, levels) = arrow::read(field);
            for (node, values) in nodes.iter_mut().zip(levels) {
                node.values = values;
            }
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
