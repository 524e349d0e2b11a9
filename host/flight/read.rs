//! DoGet: the tensors of a segment as a stream of record batches, cut by rows.
//!
//! ```text
//! segment ── read_at, on the blocking pool, two messages ahead ──▶ body ──▶ gRPC
//! ```
//! Bodies are as the IPC format has them: each column's rows on a multiple of 64 bytes. Each
//! message is read into a buffer that an earlier one gave back.

use std::ops::Range;
use std::sync::{Arc, Mutex};

use arrow_flight::{FlightData, SchemaAsIpc};
use arrow_ipc::convert::IpcSchemaEncoder;
use arrow_ipc::writer::IpcWriteOptions;
use arrow_ipc::{Buffer, FieldNode, MessageBuilder, MessageHeader, MetadataVersion, RecordBatchBuilder};
use arrow_schema::Schema;
use bytes::Bytes;
use futures::stream::{self, BoxStream, StreamExt};
use strait_memory::Charge;
use strait_tensor::TensorSpec;
use tokio::sync::OwnedSemaphorePermit;

use super::call::Call;
use super::info::{self, host_bug};
use crate::error::{Code, Status};
use crate::lease::LiveSegment;
use crate::session::{Host, Reading};

/// Bodies of this size are the fastest, and well below the 4 MiB that clients take by default.
const BODY_BYTES: u64 = 512 << 10;
/// The IPC format's alignment of buffers.
const BUFFER_ALIGN_BYTES: u64 = 64;
/// Messages that are read before the connection asks for them.
const READ_AHEAD: usize = 2;

/// A column as it lies in the segment.
#[derive(Debug)]
struct ColumnPlace {
    offset: u64,
    row_bytes: u64,
    /// Values of storage in a row that is a list; none for a primitive column.
    row_values: Option<u64>,
}

impl ColumnPlace {
    fn bytes(&self, rows: u64) -> u64 {
        self.row_bytes * rows
    }
}

/// Values in one row, if a row is a list in Arrow's storage.
fn row_values(spec: &TensorSpec) -> Option<u64> {
    let inner = spec.shape.get(1..).unwrap_or_default();
    let pair = if spec.dtype.is_complex() { 2 } else { 1 };
    let is_list = spec.dtype.is_complex() || !inner.is_empty();
    let values = inner.iter().fold(pair, |values: u64, axis| values.saturating_mul(*axis));
    is_list.then_some(values)
}

/// What one stream reads, and how it is cut.
#[derive(Debug)]
struct Reader {
    host: Arc<Host>,
    segment: Arc<LiveSegment>,
    columns: Vec<ColumnPlace>,
    rows: u64,
    rows_per_message: u64,
    // A std mutex: held for a push or a pop.
    spare: Mutex<Vec<Vec<u8>>>,
}

impl Reader {
    /// # Errors
    /// `UNSUPPORTED_OP` if its tensors are of different lengths; `INLINE_TOO_LARGE` if one row
    /// does not fit a message.
    fn new(host: &Arc<Host>, segment: Arc<LiveSegment>) -> Result<Self, Status> {
        let tensors = segment.tensors();
        let rows = |spec: &TensorSpec| spec.shape.first().copied().unwrap_or(1);
        let count = tensors.first().map_or(0, |tensor| rows(&tensor.spec));
        if let Some(other) = tensors.iter().find(|tensor| rows(&tensor.spec) != count) {
            let message = format!(
                "its first tensor has {count} rows and `{}` has {}, which is no one table; {}",
                other.name,
                rows(&other.spec),
                map_instead(host, &segment)
            );
            return Err(Status::new(Code::Unimplemented, "UNSUPPORTED_OP", message));
        }
        let columns: Vec<ColumnPlace> = tensors
            .iter()
            .map(|tensor| ColumnPlace {
                offset: tensor.offset,
                row_bytes: tensor.length.checked_div(count).unwrap_or(0),
                row_values: row_values(&tensor.spec),
            })
            .collect();
        let row_bytes: u64 = columns.iter().map(|column| column.row_bytes).sum();
        let most = host.config().message_bytes_max() as u64;
        if body_bytes(&columns, 1) > most {
            let message = format!(
                "a row has {row_bytes} bytes and a message takes at most {most} (setting server.message_bytes_max); {}",
                map_instead(host, &segment)
            );
            return Err(Status::new(Code::OutOfRange, "INLINE_TOO_LARGE", message)
                .with("row_bytes", row_bytes)
                .with("message_bytes_max", most)
                .with("segment", segment.id().to_string()));
        }
        let rows_per_message = BODY_BYTES.checked_div(row_bytes).unwrap_or(count).max(1);
        Ok(Self { host: Arc::clone(host), segment, columns, rows: count, rows_per_message, spare: Mutex::default() })
    }

    /// The rows of each message.
    fn parts(&self) -> impl Iterator<Item = Range<u64>> + Send + 'static {
        let (rows, step) = (self.rows, self.rows_per_message);
        std::iter::successors(Some(0_u64), move |start| start.checked_add(step))
            .take_while(move |start| *start < rows)
            .map(move |start| start..start.saturating_add(step).min(rows))
    }

    /// Copies those rows out. Blocks.
    fn message(self: &Arc<Self>, rows: Range<u64>) -> Result<FlightData, Status> {
        let count = rows.end - rows.start;
        let bytes = body_bytes(&self.columns, count);
        // The usual message is small beside what the connection buffers; a giant row is not.
        // Twice: this copy, and gRPC's.
        let charge = match bytes {
            ..=BODY_BYTES => None,
            _ => {
                let charge = self.host.budget().try_reserve(2 * bytes);
                Some(charge.map_err(|error| Status::from(strait_memory::MemoryError::from(error)))?)
            }
        };
        let mut body = self.lock_spare().pop().unwrap_or_default();
        body.resize(length_of(bytes)?, 0);
        let mut rest = body.as_mut_slice();
        for column in &self.columns {
            let (into, after) = rest.split_at_mut(length_of(column.bytes(count))?);
            self.segment.read_at(column.offset + column.bytes(rows.start), into, self.host.inline_copied())?;
            let padding = padded(column.bytes(count)) - column.bytes(count);
            let (padding, after) = after.split_at_mut(length_of(padding)?);
            padding.fill(0);
            rest = after;
        }
        let header = batch_header(&self.columns, count, bytes)?;
        let body = Body { bytes: body, reader: Arc::clone(self), _charge: charge };
        Ok(FlightData::new().with_data_header(header).with_data_body(Bytes::from_owner(body)))
    }

    fn lock_spare(&self) -> std::sync::MutexGuard<'_, Vec<Vec<u8>>> {
        self.spare.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// A message's body; gives its buffer back when gRPC has copied it.
struct Body {
    bytes: Vec<u8>,
    reader: Arc<Reader>,
    _charge: Option<Charge>,
}

impl AsRef<[u8]> for Body {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Body {
    fn drop(&mut self) {
        let bytes = std::mem::take(&mut self.bytes);
        let mut spare = self.reader.lock_spare();
        if self._charge.is_none() && spare.len() <= READ_AHEAD {
            spare.push(bytes);
        }
    }
}

fn map_instead(host: &Host, segment: &LiveSegment) -> String {
    format!(
        "on this machine map segment {} through {} instead (the endpoint's app_metadata is its mapping)",
        segment.id(),
        host.mapping(segment).socket
    )
}

/// A buffer's bytes with what follows it up to the next buffer.
fn padded(bytes: u64) -> u64 {
    bytes.next_multiple_of(BUFFER_ALIGN_BYTES)
}

fn body_bytes(columns: &[ColumnPlace], rows: u64) -> u64 {
    columns.iter().map(|column| padded(column.bytes(rows))).sum()
}

fn length_of(bytes: u64) -> Result<usize, Status> {
    usize::try_from(bytes).map_err(|error| host_bug("sizing a message", error))
}

fn signed(value: u64) -> Result<i64, Status> {
    i64::try_from(value).map_err(|error| host_bug("counting rows", error))
}

/// The metadata of a record batch of `rows` rows, none of them null.
fn batch_header(columns: &[ColumnPlace], rows: u64, bytes: u64) -> Result<Vec<u8>, Status> {
    let mut nodes = Vec::new();
    let mut buffers = Vec::new();
    let mut start = 0;
    for column in columns {
        nodes.push(FieldNode::new(signed(rows)?, 0));
        buffers.push(Buffer::new(signed(start)?, 0));
        if let Some(values) = column.row_values {
            nodes.push(FieldNode::new(signed(rows.saturating_mul(values))?, 0));
            buffers.push(Buffer::new(signed(start)?, 0));
        }
        let used = column.bytes(rows);
        buffers.push(Buffer::new(signed(start)?, signed(used)?));
        start += padded(used);
    }
    // An emptied builder of arrow-ipc's, so that its version of flatbuffers is the one in use.
    let mut builder = IpcSchemaEncoder::new().schema_to_fb(&Schema::empty());
    builder.reset();
    let nodes = builder.create_vector(&nodes);
    let buffers = builder.create_vector(&buffers);
    let mut batch = RecordBatchBuilder::new(&mut builder);
    batch.add_length(signed(rows)?);
    batch.add_nodes(nodes);
    batch.add_buffers(buffers);
    let batch = batch.finish().as_union_value();
    let mut message = MessageBuilder::new(&mut builder);
    message.add_version(MetadataVersion::V5);
    message.add_header_type(MessageHeader::RecordBatch);
    message.add_header(batch);
    message.add_bodyLength(signed(bytes)?);
    let message = message.finish();
    builder.finish(message, None);
    Ok(builder.finished_data().to_vec())
}

/// What keeps a stream's place and its flight's state for as long as the stream lives.
///
/// One of the host's places for streams; the flight's guard, if the segment has a name.
pub(super) type Held = (OwnedSemaphorePermit, Option<Reading>);

/// The segment as a stream: its schema, then its rows.
///
/// # Errors
/// `UNSUPPORTED_OP`, `INLINE_TOO_LARGE`, `BAD_TENSOR`, each with the mapped way.
pub(super) fn stream(
    host: &Arc<Host>,
    segment: Arc<LiveSegment>,
    held: Held,
    call: Call,
) -> Result<BoxStream<'static, Result<FlightData, tonic::Status>>, Status> {
    let schema = info::segment_schema(&segment)?;
    let schema = FlightData::from(SchemaAsIpc::new(&schema, &IpcWriteOptions::default()));
    let reader = Arc::new(Reader::new(host, segment)?);
    let parts = reader.parts();
    let batches = stream::iter(parts)
        .map(move |rows| {
            let reader = Arc::clone(&reader);
            async move {
                // The read waits for the segment's lock, which parking may hold for milliseconds.
                match tokio::task::spawn_blocking(move || reader.message(rows)).await {
                    Ok(message) => message,
                    Err(error) => Err(host_bug("reading a message", error)),
                }
            }
        })
        .buffered(READ_AHEAD);
    let messages = stream::once(async move { Ok(schema) }).chain(batches).map(move |message| {
        let _: &Held = &held;
        message.map_err(|status| call.failed(&status))
    });
    Ok(messages.boxed())
}

#[cfg(test)]
mod tests {
    use super::*;
    use strait_tensor::Dtype;

    #[test]
    fn values_of_a_row_are_those_of_the_storage() {
        for (dtype, shape, values) in [
            (Dtype::Float64, &[][..], None),
            (Dtype::Float64, &[5], None),
            (Dtype::Float64, &[5, 3, 2], Some(6)),
            (Dtype::Float64, &[5, 3, 0], Some(0)),
            (Dtype::Complex64, &[], Some(2)),
            (Dtype::Complex64, &[5, 3], Some(6)),
        ] {
            let spec = TensorSpec { dtype, shape: shape.to_vec() };
            assert_eq!(row_values(&spec), values, "{spec}");
        }
    }

    #[test]
    fn a_header_reads_back() {
        let column = |row_bytes, row_values| ColumnPlace { offset: 0, row_bytes, row_values };
        let columns = [column(8, None), column(12, Some(3))];
        let header = batch_header(&columns, 5, body_bytes(&columns, 5)).expect("small");
        let message = arrow_ipc::root_as_message(&header).expect("a message");
        let batch = message.header_as_record_batch().expect("a batch");
        assert_eq!((message.bodyLength(), batch.length()), (128, 5));
        let nodes: Vec<_> = batch.nodes().expect("nodes").iter().map(|node| node.length()).collect();
        assert_eq!(nodes, [5, 5, 15]);
        let buffers: Vec<_> =
            batch.buffers().expect("buffers").iter().map(|b| (b.offset(), b.length())).collect();
        assert_eq!(buffers, [(0, 0), (0, 40), (64, 0), (64, 0), (64, 60)]);
    }
}
