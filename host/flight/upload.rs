//! DoPut: record batches into a new segment.
//!
//! ```text
//! schema ──▶ Columns ──▶ each batch: ranges of its body, checked ──▶ end: rows are known
//!                                                                     └─▶ segment, one counted copy
//! ```
//! What arrives is kept as gRPC delivered it, charged to the host's budget, and copied once. Every
//! length in it is held against the bytes that there are; nothing is decoded.

use std::ops::Range;
use std::sync::Arc;

use arrow_array::RecordBatch;
use arrow_flight::FlightData;
use arrow_ipc::writer::FileWriter;
use arrow_ipc::{Endianness, MessageHeader};
use arrow_schema::{DataType, Field, Schema};
use bytes::Bytes;
use futures::{Stream, StreamExt};
use strait_memory::{Charge, MemoryError};
use strait_tensor::{Column, Dtype, TensorSpec};

use super::info::{bad_request, host_bug};
use crate::error::{Code, Status};
use crate::lease::LiveSegment;
use crate::session::{Host, Upload};

/// What a message costs beside its bytes.
const MESSAGE_OVERHEAD_BYTES: u64 = 256;
/// Field metadata of a 0-d tensor: one row that is the only element.
const SHAPE_KEY: &str = "strait.shape";
const SHAPE_0D: &str = "[]";

fn bad_tensor(message: String) -> Status {
    Status::new(Code::InvalidArgument, "BAD_TENSOR", message)
}

/// A column of the schema.
#[derive(Debug)]
struct ColumnPlan {
    name: String,
    dtype: Dtype,
    /// The axes after the first.
    inner: Vec<u64>,
    is_0d: bool,
    row_bytes: u64,
    /// Values in one row, for the column itself and each list level below it.
    levels: Vec<u64>,
}

impl ColumnPlan {
    fn spec(&self, rows: u64) -> Result<TensorSpec, Status> {
        if self.is_0d && rows != 1 {
            return Err(bad_tensor(format!(
                "column `{}` says that it is 0-d ({SHAPE_KEY}={SHAPE_0D}) but has {rows} rows; send one row, or leave that metadata out",
                self.name
            )));
        }
        let leading = (!self.is_0d).then_some(rows);
        let shape = leading
            .into_iter()
            .chain(self.inner.iter().copied())
            .collect();
        Ok(TensorSpec {
            dtype: self.dtype,
            shape,
        })
    }
}

/// Values in a row of each level of `field`: 1 for the column itself, then those of its lists.
fn levels(field: &Field) -> Result<Vec<u64>, Status> {
    let mut levels = vec![1_u64];
    let mut values = 1_u64;
    let mut inner = field.data_type();
    let refused = |reason: String| bad_tensor(format!("column `{}` {reason}", field.name()));
    while let DataType::FixedSizeList(item, size) = inner {
        values = u64::try_from(*size)
            .ok()
            .and_then(|size| values.checked_mul(size))
            .ok_or_else(|| {
                refused(format!(
                    "has lists of {size} in lists of {values} values, which nobody can count"
                ))
            })?;
        levels.push(values);
        inner = item.data_type();
    }
    let advice = match inner {
        _ if inner.is_integer() || inner.is_floating() => return Ok(levels),
        DataType::Dictionary(..) => "is dictionary-encoded; decode it first",
        DataType::Boolean => {
            "has its truth values packed into bits; cast it to int8 (arrow.bool8), one byte each"
        }
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View => {
            "is text (utf8); a tensor has numbers of a fixed width, so leave it out or encode it"
        }
        DataType::Date32
        | DataType::Date64
        | DataType::Time32(_)
        | DataType::Time64(_)
        | DataType::Timestamp(..)
        | DataType::Duration(_) => "is a time; cast it to the integers that it stores",
        _ => {
            "has no numbers of a fixed width; send integers, floats, fixed-size lists or fixed-shape tensors of them"
        }
    };
    Err(refused(format!("{advice} (its Arrow type is {inner})")))
}

/// What the schema says that the stream holds.
#[derive(Debug)]
struct Columns(Vec<ColumnPlan>);

impl Columns {
    fn of(schema: arrow_ipc::Schema<'_>) -> Result<Self, Status> {
        if schema.endianness() != Endianness::Little {
            return Err(bad_tensor(
                "the schema's numbers are big-endian; send them little-endian".to_owned(),
            ));
        }
        let schema = arrow_ipc::convert::try_fb_to_schema(schema)
            .map_err(|error| bad_tensor(format!("the schema is not valid Arrow: {error}")))?;
        let mut plans = Vec::with_capacity(schema.fields.len());
        let mut fields = Vec::with_capacity(schema.fields.len());
        for field in &schema.fields {
            let mut metadata = field.metadata().clone();
            let is_0d = metadata
                .remove(SHAPE_KEY)
                .is_some_and(|shape| shape == SHAPE_0D);
            fields.push(field.as_ref().clone().with_metadata(metadata));
            plans.push((is_0d, levels(field)?));
        }
        // The tensor room reads IPC files and knows what is a tensor: show it an empty one.
        let places = strait_tensor::read_layout(&empty_file(Schema::new(fields))?)
            .map_err(|error| bad_tensor(error.to_string()))?;
        let plans = places.into_iter().zip(plans).map(|(place, (is_0d, levels))| {
            let inner = place.spec.shape.get(1..).unwrap_or_default().to_vec();
            if is_0d && !inner.is_empty() {
                return Err(bad_tensor(format!(
                    "column `{}` says that it is 0-d ({SHAPE_KEY}={SHAPE_0D}) but its rows have the shape {inner:?}",
                    place.name
                )));
            }
            let row = TensorSpec { dtype: place.spec.dtype, shape: inner };
            let row_bytes = row.bytes()?;
            Ok(ColumnPlan { name: place.name, dtype: row.dtype, inner: row.shape, is_0d, row_bytes, levels })
        });
        plans.collect::<Result<_, _>>().map(Self)
    }

    /// Where each column's values lie in a batch's `body`, and its rows.
    fn batch(
        &self,
        batch: arrow_ipc::RecordBatch<'_>,
        body: &[u8],
    ) -> Result<(u64, Vec<Range<usize>>), Status> {
        if batch.compression().is_some() {
            return Err(bad_tensor(
                "the batch is compressed; send it uncompressed: the copy is local".to_owned(),
            ));
        }
        let rows = u64::try_from(batch.length())
            .map_err(|_| bad_tensor(format!("a batch of {} rows", batch.length())))?;
        let mut nodes = batch.nodes().into_iter().flatten();
        let mut buffers = batch.buffers().into_iter().flatten();
        let mut ranges = Vec::with_capacity(self.0.len());
        for column in &self.0 {
            let wrong = |what: String| bad_tensor(format!("column `{}`: {what}", column.name));
            for (level, values) in column.levels.iter().enumerate() {
                let node = nodes
                    .next()
                    .ok_or_else(|| wrong("the batch has too few nodes for it".to_owned()))?;
                if node.null_count() != 0 {
                    return Err(wrong(format!(
                        "it has {} nulls; a tensor has none: fill or drop them, or pass a mask of its own",
                        node.null_count()
                    )));
                }
                let needed = rows.checked_mul(*values);
                let enough = u64::try_from(node.length()).is_ok_and(|length| {
                    needed.is_some_and(|needed| {
                        if level == 0 {
                            length == needed
                        } else {
                            length >= needed
                        }
                    })
                });
                if !enough {
                    return Err(wrong(format!(
                        "{} values where {rows} rows of {values} belong",
                        node.length()
                    )));
                }
                // Its validity: nothing is null, so it says nothing.
                buffers
                    .next()
                    .ok_or_else(|| wrong("the batch has too few buffers for it".to_owned()))?;
            }
            let buffer = buffers
                .next()
                .ok_or_else(|| wrong("the batch has too few buffers for it".to_owned()))?;
            let range = values_range(buffer, rows, column.row_bytes, body.len())
                .ok_or_else(|| {
                    wrong(format!(
                        "a buffer of {} bytes at {} in a body of {} does not hold {rows} rows of {} bytes",
                        buffer.length(),
                        buffer.offset(),
                        body.len(),
                        column.row_bytes
                    ))
                })?;
            if column.dtype == Dtype::Bool8
                && let Some(at) = body[range.clone()].iter().position(|byte| *byte > 1)
            {
                return Err(wrong(format!(
                    "truth value {at} of a batch is the byte {}; bool8 has 0 and 1",
                    body[range][at]
                )));
            }
            ranges.push(range);
        }
        if nodes.next().is_some() || buffers.next().is_some() {
            return Err(bad_tensor(
                "a batch has more nodes or buffers than its schema".to_owned(),
            ));
        }
        Ok((rows, ranges))
    }
}

/// The part of a body that `rows` rows take, if `buffer` holds them.
fn values_range(
    buffer: &arrow_ipc::Buffer,
    rows: u64,
    row_bytes: u64,
    body_bytes: usize,
) -> Option<Range<usize>> {
    let start = usize::try_from(buffer.offset()).ok()?;
    let length = usize::try_from(buffer.length()).ok()?;
    let needed = usize::try_from(rows.checked_mul(row_bytes)?).ok()?;
    let inside = start
        .checked_add(length)
        .is_some_and(|end| end <= body_bytes);
    (inside && needed <= length).then(|| start..start + needed)
}

/// An IPC file of that schema and no rows.
fn empty_file(schema: Schema) -> Result<Vec<u8>, Status> {
    let write = || {
        let mut writer = FileWriter::try_new(Vec::new(), &schema)?;
        writer.write(&RecordBatch::new_empty(Arc::new(schema.clone())))?;
        writer.into_inner()
    };
    write().map_err(|error| {
        bad_tensor(format!(
            "the schema cannot be written as an Arrow file: {error}"
        ))
    })
}

/// A batch as it arrived.
#[derive(Debug)]
struct Batch {
    rows: u64,
    body: Bytes,
    /// For each column.
    ranges: Vec<Range<usize>>,
    _charge: Charge,
}

/// A flight while its batches arrive. Dropped before the end it leaves nothing.
#[derive(Debug)]
struct Arriving {
    host: Arc<Host>,
    upload: Upload,
    columns: Option<Columns>,
    rows: u64,
    batches: Vec<Batch>,
}

impl Arriving {
    fn take(&mut self, data: FlightData) -> Result<(), Status> {
        if data.data_header.is_empty() {
            if data.data_body.is_empty() {
                return Ok(()); // application metadata alone
            }
            return Err(bad_request(format!(
                "a message with a body of {} bytes and no header",
                data.data_body.len()
            )));
        }
        let message = arrow_ipc::root_as_message(&data.data_header).map_err(|error| {
            let found = error.to_string();
            bad_request(format!(
                "a message's metadata is corrupt: {}",
                found.lines().next().unwrap_or_default()
            ))
        })?;
        match (message.header_type(), &self.columns) {
            (MessageHeader::Schema, None) => {
                let schema = message
                    .header_as_schema()
                    .ok_or_else(|| bad_request("a schema message without a schema"))?;
                self.columns = Some(Columns::of(schema)?);
                Ok(())
            }
            (MessageHeader::RecordBatch, Some(columns)) => {
                let bytes =
                    (data.data_header.len() + data.data_body.len()) as u64 + MESSAGE_OVERHEAD_BYTES;
                let charge = self
                    .host
                    .budget()
                    .try_reserve(bytes)
                    .map_err(MemoryError::from)?;
                let batch = message
                    .header_as_record_batch()
                    .ok_or_else(|| bad_request("a batch message without a batch"))?;
                let (rows, ranges) = columns.batch(batch, &data.data_body)?;
                self.rows = self
                    .rows
                    .checked_add(rows)
                    .ok_or_else(|| bad_tensor("more than 2^64 rows".to_owned()))?;
                if rows > 0 {
                    self.batches.push(Batch {
                        rows,
                        body: data.data_body,
                        ranges,
                        _charge: charge,
                    });
                }
                Ok(())
            }
            (MessageHeader::Schema, Some(_)) => {
                Err(bad_request("a second schema; one upload is one table"))
            }
            (MessageHeader::DictionaryBatch, _) => Err(bad_tensor(
                "a dictionary batch; tensors are not dictionary-encoded, decode them first"
                    .to_owned(),
            )),
            (other, _) => Err(bad_request(format!(
                "a message of kind {}; an upload is a schema and then record batches",
                other.variant_name().unwrap_or("unknown")
            ))),
        }
    }

    /// Copies what arrived into a segment and publishes it. Blocks.
    fn finish(self) -> Result<Arc<LiveSegment>, Status> {
        let Self {
            host,
            upload,
            columns,
            rows,
            batches,
        } = self;
        let Columns(plans) =
            columns.ok_or_else(|| bad_request("the upload ended before its schema"))?;
        let columns = plans
            .iter()
            .map(|plan| Ok(Column::new(&plan.name, plan.spec(rows)?)?))
            .collect::<Result<Vec<_>, Status>>()?;
        let (segment, layout) = host.allocate_to_fill(&columns)?;
        let mut before = 0;
        for batch in batches {
            for ((plan, place), range) in plans.iter().zip(&layout.tensors).zip(&batch.ranges) {
                let offset = place.offset + before * plan.row_bytes;
                segment.write_at(offset, &batch.body[range.clone()], host.uploads_copied())?;
            }
            before += batch.rows;
        }
        upload.finish(segment, layout)
    }
}

/// What the client's stream ended with instead of its end.
fn broken_off(status: &tonic::Status, message_bytes_max: usize) -> Status {
    match status.code() {
        // tonic's own limit on a message.
        tonic::Code::OutOfRange | tonic::Code::ResourceExhausted => Status::new(
            Code::OutOfRange,
            "INLINE_TOO_LARGE",
            format!(
                "{}; a message takes at most {message_bytes_max} bytes (setting server.message_bytes_max): \
                 send fewer rows in a batch, or create the tensor through the data socket",
                status.message()
            ),
        ),
        _ => Status::new(
            Code::Cancelled,
            "CANCELLED",
            format!("the upload broke off before its end: {}", status.message()),
        ),
    }
}

/// The flight that the stream's first message names.
fn name(first: &FlightData) -> Result<&str, Status> {
    let descriptor = first
        .flight_descriptor
        .as_ref()
        .map(|descriptor| descriptor.path.as_slice());
    match descriptor {
        Some([name]) => Ok(name),
        Some(path) => Err(bad_request(format!(
            "the upload's descriptor has a path of {} parts; it must be [name]",
            path.len()
        ))),
        None => Err(bad_request(
            "the upload's first message has no descriptor; it must be the path [name]",
        )),
    }
}

/// Takes a whole upload and gives the flight its name.
///
/// # Errors
/// `BAD_REQUEST` and `BAD_TENSOR` for what is no table of tensors, `BAD_NAME`, `NAME_TAKEN`,
/// `WRONG_STATE`, `BUDGET_EXCEEDED`, `INLINE_TOO_LARGE`, `DRAINING`, `CANCELLED`. Nothing is left.
pub(super) async fn receive(
    host: Arc<Host>,
    principal: crate::lease::Principal,
    replace: bool,
    mut messages: impl Stream<Item = Result<FlightData, tonic::Status>> + Unpin,
) -> Result<Arc<LiveSegment>, Status> {
    let message_bytes_max = host.config().message_bytes_max();
    let ended = |status: tonic::Status| broken_off(&status, message_bytes_max);
    let first = messages
        .next()
        .await
        .ok_or_else(|| bad_request("an upload without messages"))?
        .map_err(ended)?;
    let upload = host.begin_upload(principal, name(&first)?, replace)?;
    let mut arriving = Arriving {
        host,
        upload,
        columns: None,
        rows: 0,
        batches: Vec::new(),
    };
    arriving.take(first)?;
    while let Some(message) = messages.next().await {
        arriving.take(message.map_err(ended)?)?;
    }
    match tokio::task::spawn_blocking(move || arriving.finish()).await {
        Ok(result) => result,
        Err(error) => Err(host_bug("storing an upload", error)),
    }
}
