//! Header and footer around tensors that lie where [`crate::FileLayout`] put them.

use std::collections::HashMap;

use arrow_ipc::convert::IpcSchemaEncoder;
use arrow_ipc::{
    Block, Buffer, FieldNode, FooterBuilder, MessageBuilder, MessageHeader, MetadataVersion,
    RecordBatchBuilder,
};
use arrow_schema::{DataType, Field, Schema};
use flatbuffers::{FlatBufferBuilder, UnionWIPOffset, WIPOffset};

use super::{
    BOOL8, CONTINUATION, DTYPE_KEY, EXTENSION_METADATA, EXTENSION_NAME, FIXED_SHAPE_TENSOR, MAGIC,
    MAGIC_END, SHAPE_0D, SHAPE_KEY,
};
use crate::{Dtype, TensorPlace, TensorSpec};

/// What stands before and behind the body of a file.
pub(crate) struct Framing {
    pub(crate) header: Vec<u8>,
    pub(crate) footer: Vec<u8>,
}

/// Writes header and footer of a file whose body spans `body_offset..body_end`.
///
/// The caller has checked the tensors: all of `rows` rows, rows of at most `i32::MAX` values,
/// offsets and sizes within `i64`, metadata within [`super::METADATA_BYTES_MAX`]; and `schema`
/// declares them.
pub(crate) fn frame(
    schema: &Schema,
    tensors: &[TensorPlace],
    rows: u64,
    body_offset: u64,
    body_end: u64,
) -> Framing {
    let body_bytes = signed(body_end - body_offset);

    let mut header = MAGIC.to_vec();
    push_message(&mut header, &schema_message(schema), None);
    let batch_offset = header.len();
    let batch = batch_message(schema, tensors, rows, body_offset, body_bytes);
    push_message(&mut header, &batch, Some(body_offset));

    let metadata_bytes = i32::try_from(header.len() - batch_offset)
        .expect("metadata is at most METADATA_BYTES_MAX and its padding");
    let block = Block::new(signed(batch_offset as u64), metadata_bytes, body_bytes);
    Framing {
        header,
        footer: footer(schema, block),
    }
}

/// Values of a column of `rows` rows, and of each list below it, if they can be counted in `i64`.
pub(crate) fn values(field: &Field, rows: u64) -> Option<Vec<u64>> {
    let countable = |count: u64| i64::try_from(count).is_ok().then_some(count);
    let mut counts = vec![countable(rows)?];
    let (mut count, mut level) = (rows, field.data_type());
    while let DataType::FixedSizeList(item, size) = level {
        count = count.checked_mul(u64::try_from(*size).ok()?)?;
        counts.push(countable(count)?);
        level = item.data_type();
    }
    Some(counts)
}

/// Bytes that `schema` takes in a header, or in a footer.
pub(crate) fn schema_bytes(schema: &Schema) -> u64 {
    schema_message(schema).len() as u64
}

fn signed(value: u64) -> i64 {
    i64::try_from(value).expect("the layout keeps sizes within i64")
}

/// Appends a message's metadata, padded to 8 bytes or to end at the offset `until`.
fn push_message(file: &mut Vec<u8>, metadata: &[u8], until: Option<u64>) {
    let start = file.len() + 8;
    let end = match until {
        Some(until) => usize::try_from(until).expect("a header fits into memory"),
        None => (start + metadata.len()).next_multiple_of(8),
    };
    assert!(
        start + metadata.len() <= end,
        "{} bytes of metadata from byte {start} to {end}",
        metadata.len()
    );
    let length = i32::try_from(end - start).expect("metadata is at most METADATA_BYTES_MAX");
    file.extend_from_slice(&CONTINUATION);
    file.extend_from_slice(&length.to_le_bytes());
    file.extend_from_slice(metadata);
    file.resize(end, 0);
}

fn schema_message(schema: &Schema) -> Vec<u8> {
    let mut builder = FlatBufferBuilder::new();
    let header = IpcSchemaEncoder::new()
        .schema_to_fb_offset(&mut builder, schema)
        .as_union_value();
    finish_message(builder, MessageHeader::Schema, header, 0)
}

fn batch_message(
    schema: &Schema,
    tensors: &[TensorPlace],
    rows: u64,
    body_offset: u64,
    body_bytes: i64,
) -> Vec<u8> {
    let mut nodes = Vec::new();
    let mut buffers = Vec::new();
    for (field, tensor) in schema.fields().iter().zip(tensors) {
        let start = signed(tensor.offset - body_offset);
        for count in values(field, rows).expect("the layout keeps counts within i64") {
            // Each level has a validity buffer of no bytes: nothing is null.
            nodes.push(FieldNode::new(signed(count), 0));
            buffers.push(Buffer::new(start, 0));
        }
        buffers.push(Buffer::new(start, signed(tensor.length)));
    }
    let mut builder = FlatBufferBuilder::new();
    let nodes = builder.create_vector(&nodes);
    let buffers = builder.create_vector(&buffers);
    let mut batch = RecordBatchBuilder::new(&mut builder);
    batch.add_length(signed(rows));
    batch.add_nodes(nodes);
    batch.add_buffers(buffers);
    let header = batch.finish().as_union_value();
    finish_message(builder, MessageHeader::RecordBatch, header, body_bytes)
}

fn finish_message(
    mut builder: FlatBufferBuilder<'_>,
    kind: MessageHeader,
    header: WIPOffset<UnionWIPOffset>,
    body_bytes: i64,
) -> Vec<u8> {
    let mut message = MessageBuilder::new(&mut builder);
    message.add_version(MetadataVersion::V5);
    message.add_header_type(kind);
    message.add_header(header);
    message.add_bodyLength(body_bytes);
    let root = message.finish();
    builder.finish(root, None);
    builder.finished_data().to_vec()
}

/// The end-of-stream marker, the footer, its length, the closing magic.
fn footer(schema: &Schema, batch: Block) -> Vec<u8> {
    let mut builder = FlatBufferBuilder::new();
    let schema = IpcSchemaEncoder::new().schema_to_fb_offset(&mut builder, schema);
    let batches = builder.create_vector(&[batch]);
    let mut footer = FooterBuilder::new(&mut builder);
    footer.add_version(MetadataVersion::V5);
    footer.add_schema(schema);
    footer.add_recordBatches(batches);
    let root = footer.finish();
    builder.finish(root, None);

    let footer = builder.finished_data();
    let length = i32::try_from(footer.len()).expect("metadata is at most METADATA_BYTES_MAX");
    let mut bytes = [CONTINUATION, [0; 4]].concat();
    bytes.extend_from_slice(footer);
    bytes.extend_from_slice(&length.to_le_bytes());
    bytes.extend_from_slice(MAGIC_END);
    bytes
}

/// The shape of one row in storage, if a row is more than one primitive value: the axes after the
/// first, and for complex numbers a last one of 2.
fn row_shape(spec: &TensorSpec) -> Option<Vec<u64>> {
    let mut shape = spec.shape.get(1..).unwrap_or_default().to_vec();
    if spec.dtype.is_complex() {
        shape.push(2);
    }
    (!shape.is_empty()).then_some(shape)
}

/// Primitive values in a row of that shape. A zero axis makes it 0 however large the others are.
fn row_values(shape: &[u64]) -> u64 {
    if shape.contains(&0) {
        0
    } else {
        shape.iter().product()
    }
}

/// How a tensor is written in Arrow. Its rows have at most `i32::MAX` values.
pub(crate) fn field(name: &str, spec: &TensorSpec) -> Field {
    let (primitive, dtype_is_storage) = storage(spec.dtype);
    let mut metadata = HashMap::new();
    let mut note = |key: &str, value: String| metadata.insert(key.to_owned(), value);
    if spec.shape.is_empty() {
        note(SHAPE_KEY, SHAPE_0D.to_owned());
    }
    let data_type = match row_shape(spec) {
        None => {
            if spec.dtype == Dtype::Bool8 {
                note(EXTENSION_NAME, BOOL8.to_owned());
                note(EXTENSION_METADATA, String::new());
            } else if !dtype_is_storage {
                note(DTYPE_KEY, spec.dtype.name().to_owned());
            }
            primitive
        }
        Some(shape) => {
            // A field has one extension type; the tensor takes it, and the dtype goes beside it.
            note(EXTENSION_NAME, FIXED_SHAPE_TENSOR.to_owned());
            note(EXTENSION_METADATA, shape_json(&shape));
            if !dtype_is_storage {
                note(DTYPE_KEY, spec.dtype.name().to_owned());
            }
            let values = i32::try_from(row_values(&shape)).expect("the layout checked the row");
            // The item's name and nullability are those that pyarrow's own tensor type has.
            DataType::new_fixed_size_list(primitive, values, true)
        }
    };
    Field::new(name, data_type, false).with_metadata(metadata)
}

/// Parameters of `arrow.fixed_shape_tensor`, by hand: pyarrow refuses the nulls that
/// arrow-schema's own type writes.
fn shape_json(shape: &[u64]) -> String {
    let sizes: Vec<String> = shape.iter().map(u64::to_string).collect();
    format!("{{\"shape\":[{}]}}", sizes.join(","))
}

/// The primitive type that holds `dtype`'s values, and whether it tells the dtype already.
fn storage(dtype: Dtype) -> (DataType, bool) {
    match dtype {
        Dtype::Bool8 => (DataType::Int8, false),
        Dtype::Int8 => (DataType::Int8, true),
        Dtype::Int16 => (DataType::Int16, true),
        Dtype::Int32 => (DataType::Int32, true),
        Dtype::Int64 => (DataType::Int64, true),
        Dtype::Uint8 => (DataType::UInt8, true),
        Dtype::Uint16 => (DataType::UInt16, true),
        Dtype::Uint32 => (DataType::UInt32, true),
        Dtype::Uint64 => (DataType::UInt64, true),
        Dtype::Float16 => (DataType::Float16, true),
        Dtype::Bfloat16 => (DataType::UInt16, false),
        Dtype::Float8E4m3fn | Dtype::Float8E5m2 => (DataType::UInt8, false),
        Dtype::Float32 => (DataType::Float32, true),
        Dtype::Float64 => (DataType::Float64, true),
        Dtype::Complex64 => (DataType::Float32, false),
        Dtype::Complex128 => (DataType::Float64, false),
    }
}
