//! DoGet: the tensors of a segment as a stream of record batches, cut by rows.
//!
//! ```text
//! one tensor:  pages of the segment ─────────────────────────▶ gRPC's buffer ─▶ gathered ─▶ socket
//! several:     pages ── rows of each, side by side ─▶ body ──▶ gRPC's buffer ─▶ gathered ─▶ socket
//! ```
//! Each arrow but the last is a counted copy; whoever takes long frames gets them ungathered. The pages are mapped read-only for as long as the
//! stream lives; nobody writes them, since the segment is sealed or a result of this process that is held.
//! Bodies are as the IPC format has them: each column's rows on a multiple of 64 bytes. A message
//! is made when the connection asks for it: at most 512 KiB, some 50 us (a longer row takes longer).

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arrow_flight::FlightData;
use bytes::Bytes;
use futures::stream::{self, BoxStream, StreamExt};
use parking_lot::{Mutex, MutexGuard};
use strait_memory::{Charge, ReadMapping};
use strait_tensor::{BatchColumn, SchemaMessage, batch_message};

use super::call::Call;
use super::connection::State;
use super::info;
use super::refused::host_bug;
use crate::error::{Code, Reason, Status};
use crate::lease::LiveSegment;
use crate::session::{Host, Reading, StreamPermit};

/// Bodies of this size are the fastest, and well below the 4 MiB that clients take by default.
const BODY_BYTES: u64 = 512 << 10;
/// Longer bodies are charged to the host's budget: the usual ones (with the padding of a few
/// hundred columns) are small beside what a connection buffers.
const UNCHARGED_BYTES_MAX: u64 = 2 * BODY_BYTES;
/// The IPC format's alignment of buffers.
const BUFFER_ALIGN: usize = 64;
/// Buffers that wait for their next use: gRPC holds one while the next is read.
const SPARE_MAX: usize = 2;

/// A column as it lies in the segment.
#[derive(Debug)]
struct ColumnPlace {
    offset: u64,
    row_bytes: u64,
    /// Values in one row: 1, then those of each list in Arrow's storage.
    levels: Vec<u64>,
}

impl ColumnPlace {
    fn bytes(&self, rows: u64) -> u64 {
        self.row_bytes * rows
    }
}

/// What one stream reads, and how it is cut.
struct Reader {
    // Dropped before the segment that keeps its bytes as they are.
    pages: ReadMapping,
    _segment: Arc<LiveSegment>,
    host: Arc<Host>,
    connection: Option<Arc<State>>,
    columns: Vec<ColumnPlace>,
    rows: Range<u64>,
    rows_per_message: u64,
    // Held for a push, a pop or an exchange.
    spare: Mutex<Vec<Vec<u8>>>,
    /// For the copies of a giant row, until the next one is asked for.
    charge: Mutex<Option<Charge>>,
}

impl Reader {
    /// `levels` are the values in one row of each column: [`SchemaMessage::levels`].
    ///
    /// # Errors
    /// `UNSUPPORTED_OP` if its tensors are of different lengths; `INLINE_TOO_LARGE` if one row
    /// does not fit a message.
    fn new(
        call: &Call,
        segment: Arc<LiveSegment>,
        rows: Option<Range<u64>>,
        levels: Vec<Vec<u64>>,
    ) -> Result<Self, Status> {
        let host = call.caller.host();
        let tensors = segment.tensors();
        let count = tensors.first().map_or(0, |tensor| tensor.spec.rows());
        if let Some(other) = tensors.iter().find(|tensor| tensor.spec.rows() != count) {
            let message = format!(
                "its first tensor has {count} rows and `{}` has {}, so they do not make one table; {}",
                other.name,
                other.spec.rows(),
                map_instead(host, &segment)
            );
            return Err(Status::new(
                Code::Unimplemented,
                Reason::UnsupportedOp,
                message,
            ));
        }
        let columns: Vec<ColumnPlace> = levels
            .into_iter()
            .zip(tensors)
            .map(|(levels, tensor)| ColumnPlace {
                offset: tensor.offset,
                row_bytes: tensor.length.checked_div(count).unwrap_or(0),
                levels,
            })
            .collect();
        let row_bytes: u64 = columns.iter().map(|column| column.row_bytes).sum();
        let most = host.config().message_bytes_max() as u64;
        if body_bytes(&columns, 1) > most {
            let message = format!(
                "a row has {row_bytes} bytes and a message takes at most {most} (setting server.message_bytes_max); {}",
                map_instead(host, &segment)
            );
            return Err(
                Status::new(Code::OutOfRange, Reason::InlineTooLarge, message)
                    .with("row_bytes", row_bytes)
                    .with("message_bytes_max", most)
                    .with("segment", segment.id().to_string()),
            );
        }
        let rows_per_message = BODY_BYTES.checked_div(row_bytes).unwrap_or(count).max(1);
        let pages = segment.readonly_fd().map_err(Status::from)?;
        let pages =
            ReadMapping::of_result(pages, length_of(segment.capacity())?).map_err(|error| {
                Status::new(
                    Code::Internal,
                    Reason::Host,
                    format!("the segment cannot be read: {error}"),
                )
            })?;
        Ok(Self {
            pages,
            _segment: segment,
            host: Arc::clone(host),
            connection: call.connection(),
            columns,
            rows: rows.unwrap_or(0..count),
            rows_per_message,
            spare: Mutex::default(),
            charge: Mutex::default(),
        })
    }

    /// The rows of each message.
    fn parts(&self) -> impl Iterator<Item = Range<u64>> + Send + 'static {
        let (Range { start, end }, step) = (self.rows.clone(), self.rows_per_message);
        std::iter::successors(Some(start), move |start| start.checked_add(step))
            .take_while(move |start| *start < end)
            .map(move |start| start..start.saturating_add(step).min(end))
    }

    /// The message of those rows.
    fn message(self: &Arc<Self>, rows: Range<u64>) -> Result<FlightData, Status> {
        let count = rows.end - rows.start;
        let bytes = body_bytes(&self.columns, count);
        let mut charge = self.charge.lock();
        *charge = None;
        if bytes > UNCHARGED_BYTES_MAX {
            // This copy, if one is made, and gRPC's.
            let reserved = self.host.budget().try_reserve(2 * bytes);
            *charge = Some(reserved.map_err(strait_memory::MemoryError::from)?);
        }
        drop(charge);
        let body = match self.columns.as_slice() {
            [column] => self.slice(column, rows.start, padded(column.bytes(count)))?,
            columns => self.assemble(columns, rows, bytes)?,
        };
        // gRPC's copy, and that for the socket.
        let gathers = self
            .connection
            .as_ref()
            .is_some_and(|state| state.gathers());
        let copies = if gathers { 2 } else { 1 };
        self.count(count, copies);
        Ok(FlightData::new()
            .with_data_header(batch_header(&self.columns, count, bytes)?)
            .with_data_body(body))
    }

    /// Counts so many copies of `rows` rows, without what lies between them in a body.
    fn count(&self, rows: u64, copies: u64) {
        let bytes: u64 = self.columns.iter().map(|column| column.bytes(rows)).sum();
        self.host.inline_copied().add(copies * bytes);
    }

    /// The pages themselves. A tensor's region ends on a multiple of 64 KiB: what follows its last
    /// byte is padding in the segment as well.
    fn slice(
        self: &Arc<Self>,
        column: &ColumnPlace,
        row: u64,
        bytes: u64,
    ) -> Result<Bytes, Status> {
        let start = length_of(column.offset + column.bytes(row))?;
        let range = start..start + length_of(bytes)?;
        let body = Slice {
            reader: Arc::clone(self),
            range,
        };
        // Checked here, where it can be said; `as_ref` has no way to.
        body.reader.pages(&body.range)?;
        Ok(Bytes::from_owner(body))
    }

    fn pages(&self, range: &Range<usize>) -> Result<&[u8], Status> {
        self.pages.bytes().get(range.clone()).ok_or_else(|| {
            host_bug(
                "reading a segment",
                format!("bytes {range:?} of {}", self.pages.bytes().len()),
            )
        })
    }

    /// The rows of all columns, each on a multiple of 64 bytes, in a buffer that comes back.
    fn assemble(
        self: &Arc<Self>,
        columns: &[ColumnPlace],
        rows: Range<u64>,
        bytes: u64,
    ) -> Result<Bytes, Status> {
        let count = rows.end - rows.start;
        let mut body = self.lock_spare().pop().unwrap_or_default();
        body.clear();
        body.reserve(length_of(bytes)?);
        for column in columns {
            let start = length_of(column.offset + column.bytes(rows.start))?;
            body.extend_from_slice(self.pages(&(start..start + length_of(column.bytes(count))?))?);
            body.resize(body.len().next_multiple_of(BUFFER_ALIGN), 0);
        }
        self.count(count, 1);
        Ok(Bytes::from_owner(Assembled {
            bytes: body,
            reader: Arc::clone(self),
        }))
    }

    fn lock_spare(&self) -> MutexGuard<'_, Vec<Vec<u8>>> {
        self.spare.lock()
    }
}

/// A part of the mapped pages.
struct Slice {
    reader: Arc<Reader>,
    range: Range<usize>,
}

impl AsRef<[u8]> for Slice {
    fn as_ref(&self) -> &[u8] {
        self.reader
            .pages
            .bytes()
            .get(self.range.clone())
            .unwrap_or_default()
    }
}

/// A message's body; gives its buffer back when gRPC has copied it.
struct Assembled {
    bytes: Vec<u8>,
    reader: Arc<Reader>,
}

impl AsRef<[u8]> for Assembled {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Assembled {
    fn drop(&mut self) {
        let mut spare = self.reader.lock_spare();
        if spare.len() < SPARE_MAX {
            spare.push(std::mem::take(&mut self.bytes));
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
    bytes.next_multiple_of(BUFFER_ALIGN as u64)
}

fn body_bytes(columns: &[ColumnPlace], rows: u64) -> u64 {
    columns
        .iter()
        .map(|column| padded(column.bytes(rows)))
        .sum()
}

fn length_of(bytes: u64) -> Result<usize, Status> {
    usize::try_from(bytes).map_err(|error| host_bug("sizing a message", error))
}

/// The metadata of a record batch of `rows` rows, none of them null.
fn batch_header(columns: &[ColumnPlace], rows: u64, bytes: u64) -> Result<Vec<u8>, Status> {
    let mut start = 0;
    let columns = columns.iter().map(|column| {
        let bytes = column.bytes(rows);
        let levels = column.levels.iter();
        let part = BatchColumn {
            counts: levels.map(|values| rows.saturating_mul(*values)).collect(),
            start,
            bytes,
        };
        start += padded(bytes);
        part
    });
    batch_message(columns, rows, bytes)
        .ok_or_else(|| host_bug("counting rows", format!("{rows} rows of {bytes} bytes")))
}

/// What keeps a stream's place and its flight's state for as long as the stream lives.
///
/// One of the host's places for streams; the flight's guard, if the segment has a name.
pub(super) type Held = (StreamPermit, Option<Reading>);

/// What a stream holds, until it ends or its client has not read for too long.
struct Streaming {
    reader: Arc<Reader>,
    _held: Held,
    asked: Instant,
}

/// Ends the watch over a stream that ended.
struct Watch(tokio::task::AbortHandle);

impl Drop for Watch {
    fn drop(&mut self) {
        self.0.abort();
    }
}

type Shared = Arc<Mutex<Option<Streaming>>>;

fn lock(shared: &Shared) -> MutexGuard<'_, Option<Streaming>> {
    shared.lock()
}

/// Takes away what a stream holds when nothing is asked of it for `stall`: a stream whose client
/// does not read is not polled, and could not end by itself.
fn watch(shared: &Shared, stall: Duration) -> Watch {
    let weak = Arc::downgrade(shared);
    let watching = tokio::spawn(async move {
        let mut wait = stall;
        loop {
            tokio::time::sleep(wait).await;
            let Some(shared) = weak.upgrade() else { return };
            let mut streaming = lock(&shared);
            let idle = streaming.as_ref().map(|s| s.asked.elapsed());
            match idle {
                None => return,
                Some(idle) if idle < stall => wait = stall - idle,
                Some(_) => {
                    let ended = streaming.take();
                    drop(streaming);
                    drop(ended);
                    return;
                }
            }
        }
    });
    Watch(watching.abort_handle())
}

/// The segment as a stream: its schema, then those `rows` that it has, or all.
///
/// # Errors
/// `UNSUPPORTED_OP`, `INLINE_TOO_LARGE`, `BAD_TENSOR`, each with the mapped way.
pub(super) fn stream(
    host: &Arc<Host>,
    segment: Arc<LiveSegment>,
    rows: Option<Range<u64>>,
    held: Held,
    call: Call,
) -> Result<BoxStream<'static, Result<FlightData, tonic::Status>>, Status> {
    let SchemaMessage { bytes, levels } = info::segment_schema(&segment)?;
    let reader = Arc::new(Reader::new(&call, segment, rows, levels)?);
    let schema = Bytes::from(bytes).slice(SchemaMessage::PREFIX_BYTES..);
    let schema = FlightData::new().with_data_header(schema);
    let parts = stream::iter(reader.parts());
    let shared: Shared = Arc::new(Mutex::new(Some(Streaming {
        reader,
        _held: held,
        asked: Instant::now(),
    })));
    let stall = host.config().stall();
    let watch = watch(&shared, stall);
    let batches = parts.map(move |rows| match &mut *lock(&shared) {
        Some(streaming) => {
            streaming.asked = Instant::now();
            streaming.reader.message(rows)
        }
        None => Err(stalled(stall)),
    });
    let messages = stream::once(async move { Ok(schema) })
        .chain(batches)
        .map(move |message| {
            let _: &Watch = &watch;
            message.map_err(|status| call.failed(&status))
        })
        // After an error there is nothing more.
        .scan(false, |failed, message| {
            let ended = std::mem::replace(failed, message.is_err());
            std::future::ready((!ended).then_some(message))
        });
    Ok(messages.boxed())
}

fn stalled(stall: Duration) -> Status {
    Status::new(
        Code::DeadlineExceeded,
        Reason::Deadline,
        format!(
            "nothing of the stream was read for {} ms (setting server.stall_ms); \
             read it without such a pause, or map the segment",
            stall.as_millis()
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_reads_back() {
        let column = |row_bytes, levels: &[u64]| ColumnPlace {
            offset: 0,
            row_bytes,
            levels: levels.to_vec(),
        };
        let columns = [column(8, &[1]), column(12, &[1, 3])];
        let header = batch_header(&columns, 5, body_bytes(&columns, 5)).expect("small");
        let message = arrow_ipc::root_as_message(&header).expect("a message");
        let batch = message.header_as_record_batch().expect("a batch");
        assert_eq!((message.bodyLength(), batch.length()), (128, 5));
        let nodes: Vec<_> = batch
            .nodes()
            .expect("nodes")
            .iter()
            .map(|node| node.length())
            .collect();
        assert_eq!(nodes, [5, 5, 15]);
        let buffers: Vec<_> = batch
            .buffers()
            .expect("buffers")
            .iter()
            .map(|b| (b.offset(), b.length()))
            .collect();
        assert_eq!(buffers, [(0, 0), (0, 40), (64, 0), (64, 0), (64, 60)]);
    }
}
