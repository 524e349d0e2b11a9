//! Header and footer around tensors that lie where [`crate::FileLayout`] put them.

use arrow_ipc::convert::IpcSchemaEncoder;
use arrow_ipc::{
    Block, Buffer, FieldNode, FooterBuilder, MessageBuilder, MessageHeader, MetadataVersion,
    RecordBatchBuilder,
};
use arrow_schema::Schema;
use flatbuffers::{FlatBufferBuilder, UnionWIPOffset, WIPOffset};

use super::{CONTINUATION, MAGIC, MAGIC_END};
use crate::TensorPlace;
use crate::arrow::values;

/// What stands before and behind the body of a file.
pub(crate) struct Framing {
    pub(crate) header: Vec<u8>,
    pub(crate) footer: Vec<u8>,
}

/// Writes header and footer of a file whose body spans `body_offset..body_end`.
///
/// The caller has checked the tensors: all of `rows` rows, rows of at most `i32::MAX` values,
/// offsets and sizes within `i64`, metadata within [`crate::METADATA_BYTES_MAX`]; and `schema`
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
    let columns = schema
        .fields()
        .iter()
        .zip(tensors)
        .map(|(field, tensor)| BatchColumn {
            counts: values(field, rows).expect("the layout keeps counts within i64"),
            start: tensor.offset - body_offset,
            bytes: tensor.length,
        });
    let batch = batch_message(columns, rows, body_end - body_offset)
        .expect("the layout keeps sizes within i64");
    push_message(&mut header, &batch, Some(body_offset));

    let metadata_bytes = i32::try_from(header.len() - batch_offset)
        .expect("metadata is at most METADATA_BYTES_MAX and its padding");
    let block = Block::new(signed(batch_offset as u64), metadata_bytes, body_bytes);
    Framing {
        header,
        footer: footer(schema, block),
    }
}

/// `schema` as an encapsulated message.
pub(super) fn encapsulated(schema: &Schema) -> Vec<u8> {
    let mut bytes = Vec::new();
    push_message(&mut bytes, &schema_message(schema), None);
    bytes
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

/// A column's part of a record batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BatchColumn {
    /// Its values: those of the column, then those of each list below.
    pub counts: Vec<u64>,
    /// Where its bytes start in the body.
    pub start: u64,
    /// How many they are.
    pub bytes: u64,
}

/// The metadata of a record batch of `rows` rows, none of them null, with a body of `body_bytes`. None if
/// something is more than `i64` counts.
pub fn batch_message(
    columns: impl IntoIterator<Item = BatchColumn>,
    rows: u64,
    body_bytes: u64,
) -> Option<Vec<u8>> {
    let signed = |value: u64| i64::try_from(value).ok();
    let mut nodes = Vec::new();
    let mut buffers = Vec::new();
    for column in columns {
        let start = signed(column.start)?;
        for count in column.counts {
            // Each level has a validity buffer of no bytes: nothing is null.
            nodes.push(FieldNode::new(signed(count)?, 0));
            buffers.push(Buffer::new(start, 0));
        }
        buffers.push(Buffer::new(start, signed(column.bytes)?));
    }
    let mut builder = FlatBufferBuilder::new();
    let nodes = builder.create_vector(&nodes);
    let buffers = builder.create_vector(&buffers);
    let mut batch = RecordBatchBuilder::new(&mut builder);
    batch.add_length(signed(rows)?);
    batch.add_nodes(nodes);
    batch.add_buffers(buffers);
    let header = batch.finish().as_union_value();
    let body_bytes = signed(body_bytes)?;
    Some(finish_message(
        builder,
        MessageHeader::RecordBatch,
        header,
        body_bytes,
    ))
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
