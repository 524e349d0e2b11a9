//! DoPut: record batches into a new segment.
//!
//! ```text
//! schema ──▶ Columns ──▶ each batch: ranges of its body, checked ──▶ `staged`: where they go ──▶ end: a segment
//!                                                                     ▲
//!                          the body of a long message, as it comes ───┘
//! ```
//! A long message comes without its body, which goes past gRPC to its place ([`Bodies`]). Of every other the values
//! are copied out. So an upload holds the bytes of its tensors (and room for some more), all of it charged to its
//! principal's budget, and never what else came in its messages. Every length is held against the bytes
//! that there are. Compressed batches are collected, and decoded into memory that was charged before ([`compressed`]).

use std::collections::HashSet;
use std::ops::Range;
use std::sync::Arc;

use arrow_flight::FlightData;
use arrow_ipc::MessageHeader;
use arrow_schema::Schema;
use bytes::Bytes;
use futures::{Stream, StreamExt};
use strait_memory::{Charge, MemoryError};
use strait_tensor::layout::HUGE_MIN_BYTES;
use strait_tensor::{
    Column, Compression, FileLayout, LayoutError, Row, TensorSpec, check_row, kept_schema,
};

use super::bodies::Bodies;
use super::call::Call;
use super::compressed::{self, is_compressed};
use super::goal::Goal;
use super::metadata::Metadata;
use super::refused::{Refused, bad_request, bad_tensor, host_bug, malformed};
use super::staged::{self, Staged, Values};
use crate::error::{Code, Reason, Status};
use crate::lease::LiveSegment;
use crate::session::{self, Caller, Host};

/// Longest flatbuffer of a message. A schema of the most and longest names with the most metadata
/// has a third of that.
const HEADER_BYTES_MAX: usize = 1 << 20;
/// Longer bodies are not copied on a thread of the runtime.
const COPY_INLINE_BYTES_MAX: usize = 1 << 20;

/// A column, and its values as they arrived.
#[derive(Debug)]
struct ColumnPlan {
    name: String,
    row: Row,
    row_bytes: u64,
    /// Values in one row, for the column itself and each list level below it.
    levels: Vec<u64>,
    values: Values,
}

impl ColumnPlan {
    fn spec(&self, rows: u64) -> Result<TensorSpec, Status> {
        self.row.spec(rows).ok_or_else(|| {
            bad_tensor(format!(
                "column `{}` says that it is 0-d (strait.shape=[]) but has {rows} rows; send one row, or leave that metadata out",
                self.name
            ))
        })
    }
}

/// A batch, as it lies in its message.
pub(super) struct Batch {
    pub(super) rows: u64,
    /// Where in the body each column's values are, or what they are made of.
    ranges: Vec<Range<usize>>,
    compression: Option<Compression>,
}

impl Batch {
    /// Where its values are.
    ///
    /// # Errors
    /// `BAD_TENSOR` if they are compressed.
    pub(super) fn plain(self) -> Result<Vec<Range<usize>>, Status> {
        match self.compression {
            None => Ok(self.ranges),
            Some(_) => Err(bad_tensor(
                "the batch is compressed; an exchange takes uncompressed ones",
            )),
        }
    }
}

/// What the schema says that the stream holds.
#[derive(Debug)]
pub(super) struct Columns {
    plans: Vec<ColumnPlan>,
    /// As it is kept in the segment.
    schema: Schema,
}

impl Columns {
    /// Where they lie in a segment if so many rows are all.
    fn layout(&self, rows: u64) -> Result<FileLayout, Status> {
        let columns = self
            .plans
            .iter()
            .map(|plan| Ok(Column::new(&plan.name, plan.spec(rows)?)?))
            .collect::<Result<Vec<_>, Status>>()?;
        Ok(FileLayout::plan_as(&columns, &self.schema)?)
    }

    /// Whether a single column has so many values, with `bytes` more, that they go to a file.
    fn has_many(&self, bytes: u64) -> bool {
        match self.plans.as_slice() {
            [only] => only.values.held_bytes() + bytes >= HUGE_MIN_BYTES,
            _ => false,
        }
    }

    /// Name and row of each.
    pub(super) fn rows(&self) -> impl ExactSizeIterator<Item = (&str, &Row)> {
        self.plans
            .iter()
            .map(|plan| (plan.name.as_str(), &plan.row))
    }

    fn values(&mut self) -> impl Iterator<Item = &mut Values> {
        self.plans.iter_mut().map(|plan| &mut plan.values)
    }

    fn of(message: arrow_ipc::Schema<'_>) -> Result<Self, Status> {
        let columns = strait_tensor::read_schema(message)
            .map_err(|error| bad_tensor(format!("the schema: {error}")))?;
        session::check_tensor_names(columns.iter().map(|column| column.name.as_str()))?;
        Metadata::default().check_schema(message)?;
        let mut names = HashSet::new();
        let mut plans = Vec::with_capacity(columns.len());
        for column in columns {
            let name = column.name;
            if !names.insert(name.clone()) {
                return Err(LayoutError::NameTwice { name }.into());
            }
            let row = column
                .row
                .map_err(|reason| bad_tensor(format!("column `{name}`: {reason}")))?;
            plans.push(ColumnPlan {
                row_bytes: row.bytes()?,
                name,
                row,
                levels: column.levels,
                values: Values::default(),
            });
        }
        // What cannot be said in Arrow however many rows come.
        for plan in &plans {
            check_row(&plan.name, &plan.spec(1)?)?;
        }
        let schema = kept_schema(message)
            .map_err(|error| bad_tensor(format!("the schema is not valid Arrow: {error}")))?;
        Ok(Self { plans, schema })
    }

    /// Where each column's values lie in a batch's body of `body_bytes` bytes, and its rows.
    fn batch(&self, batch: arrow_ipc::RecordBatch<'_>, body_bytes: usize) -> Result<Batch, Status> {
        let compression = compressed::of(batch)?;
        let rows = u64::try_from(batch.length())
            .map_err(|_| bad_tensor(format!("a batch of {} rows", batch.length())))?;
        let mut nodes = batch.nodes().into_iter().flatten();
        let mut buffers = batch.buffers().into_iter().flatten();
        let mut ranges = Vec::with_capacity(self.plans.len());
        for column in &self.plans {
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
            let range = values_range(buffer, rows, column.row_bytes, body_bytes, compression)
                .ok_or_else(|| {
                    wrong(format!(
                        "a buffer of {} bytes at {} in a body of {} does not hold {rows} rows of {} bytes",
                        buffer.length(),
                        buffer.offset(),
                        body_bytes,
                        column.row_bytes
                    ))
                })?;
            ranges.push(range);
        }
        if nodes.next().is_some() || buffers.next().is_some() {
            return Err(bad_tensor(
                "a batch has more nodes or buffers than its schema",
            ));
        }
        Ok(Batch {
            rows,
            ranges,
            compression,
        })
    }

    /// The values of a compressed batch, one column behind the other, and where each is. Their bytes are charged to `caller`
    /// before there is memory for them.
    fn inflated(
        &self,
        batch: &Batch,
        compression: Compression,
        body: &[u8],
        caller: &Caller,
    ) -> Result<(Bytes, Vec<Range<usize>>, Charge), Status> {
        let too_many = || bad_tensor(format!("{} rows do not fit any memory", batch.rows));
        let sizes = self.plans.iter().map(|plan| {
            let bytes = batch.rows.checked_mul(plan.row_bytes);
            bytes.and_then(|bytes| usize::try_from(bytes).ok())
        });
        let sizes = sizes.collect::<Option<Vec<_>>>().ok_or_else(too_many)?;
        let total = sizes
            .iter()
            .try_fold(0_usize, |sum, size| sum.checked_add(*size));
        let charge = reserved(caller, total.ok_or_else(too_many)? as u64)?;
        let parts = self.plans.iter().zip(&batch.ranges).zip(&sizes);
        let parts = parts.map(|((plan, range), size)| (&*plan.name, &body[range.clone()], *size));
        let (body, ranges) = compressed::inflated(compression, parts)?;
        Ok((body, ranges, charge))
    }
}

/// The part of a body that `rows` rows take, if `buffer` holds them; all of `buffer` if it is compressed.
fn values_range(
    buffer: &arrow_ipc::Buffer,
    rows: u64,
    row_bytes: u64,
    body_bytes: usize,
    compression: Option<Compression>,
) -> Option<Range<usize>> {
    let start = usize::try_from(buffer.offset()).ok()?;
    let length = usize::try_from(buffer.length()).ok()?;
    let needed = usize::try_from(rows.checked_mul(row_bytes)?).ok()?;
    let inside = start
        .checked_add(length)
        .is_some_and(|end| end <= body_bytes);
    match compression {
        None => (inside && needed <= length).then(|| start..start + needed),
        Some(_) => inside.then(|| start..start + length),
    }
}

/// A flight while its batches arrive. Dropped before the end it leaves nothing.
#[derive(Debug)]
struct Arriving {
    host: Arc<Host>,
    goal: Goal,
    columns: Option<Columns>,
    rows: u64,
    /// How many there are in all, if the client says.
    announced: Option<u64>,
    /// Long values, or many.
    staged: Option<Staged>,
    /// For the values that the columns hold.
    charge: Charge,
    way: Way,
}

/// Whether a body of `length` bytes with so many bytes of values is kept as it is.
fn is_kept(length: u64, values: u64) -> bool {
    length > COPY_INLINE_BYTES_MAX as u64 && length - length / 8 <= values
}

impl Arriving {
    /// The next message, whose body has `to_come` bytes if it is not in `data`.
    fn take(&mut self, data: &FlightData, to_come: Option<u64>) -> Result<(), Status> {
        let body_bytes = match to_come {
            Some(bytes) => usize::try_from(bytes).unwrap_or(usize::MAX),
            None => data.data_body.len(),
        };
        let Some(batch) = read_message(data, body_bytes, &mut self.columns)? else {
            return Ok(());
        };
        let here = to_come.is_none().then_some(&data.data_body);
        match (batch.compression, here, &self.columns) {
            (Some(compression), Some(body), Some(columns)) => {
                let caller = self.goal.caller();
                let (body, ranges, _charge) =
                    columns.inflated(&batch, compression, body, caller)?;
                self.store(batch.rows, &ranges, Some(&body))
            }
            (Some(_), ..) => Err(host_bug(
                "storing an upload",
                "a compressed body is not here",
            )),
            (None, ..) => self.store(batch.rows, &batch.ranges, here),
        }
    }

    /// A batch of `rows` rows: of each column the range of its body, which is `here` or to come.
    fn store(
        &mut self,
        rows: u64,
        ranges: &[Range<usize>],
        here: Option<&Bytes>,
    ) -> Result<(), Status> {
        let Some(columns) = &mut self.columns else {
            return Err(host_bug("storing an upload", "a batch before its schema"));
        };
        self.rows = self
            .rows
            .checked_add(rows)
            .ok_or_else(|| bad_tensor("more than 2^64 rows"))?;
        let bytes: u64 = ranges.iter().map(|range| range.len() as u64).sum();
        if bytes == 0 {
            return Ok(());
        }
        let caller = self.goal.caller();
        if self.staged.is_none() && (here.is_none() || columns.has_many(bytes)) {
            let layout = columns.layout(rows)?;
            let staged = Staged::begin(caller, layout, columns.values())?;
            if staged.has_all() {
                self.way.0.have_place();
                // What came is in the file, which is charged for itself.
                self.charge = reserved(caller, 0)?;
            }
            self.staged = Some(staged);
        }
        match (&mut self.staged, here) {
            (Some(staged), None) => {
                let route = staged.place(ranges, columns.values())?;
                self.way.0.route(route);
            }
            (Some(staged), Some(body)) if staged.has_all() => {
                let route = staged.place(ranges, columns.values())?;
                route.write(0, body)?;
            }
            (_, Some(body)) if is_kept(body.len() as u64, bytes) => {
                self.charge.absorb(reserved(caller, body.len() as u64)?);
                for (values, range) in columns.values().zip(ranges) {
                    values.keep(body.slice(range.clone()));
                }
            }
            (_, body) => {
                self.charge.absorb(reserved(caller, bytes)?);
                let body = body.map_or(&[][..], |body| body);
                for (values, range) in columns.values().zip(ranges) {
                    values.gather(&body[range.clone()]);
                }
                self.host.uploads_copied().add(bytes);
            }
        }
        Ok(())
    }

    /// Whether a message, of whose body so many bytes are to come if it is not there, takes longer than a runtime thread has.
    fn is_slow(&self, message: &FlightData, to_come: Option<u64>) -> bool {
        let here = message.data_body.len();
        let bytes = to_come.unwrap_or(here as u64);
        let grows = match (&self.staged, &self.columns) {
            (Some(staged), _) if staged.has_all() => !staged.has_room(bytes),
            (None, Some(columns)) => to_come.is_some() || columns.has_many(bytes),
            _ => to_come.is_some(),
        };
        grows || here > COPY_INLINE_BYTES_MAX || is_compressed(&message.data_header)
    }

    /// Publishes what arrived as a segment. Blocks.
    fn finish(mut self) -> Result<Arc<LiveSegment>, Status> {
        let columns = self
            .columns
            .take()
            .ok_or_else(|| bad_request("the upload ended before its schema"))?;
        if let Some(announced) = self.announced.filter(|rows| *rows != self.rows) {
            let message = format!(
                "the upload ended after {} of the {announced} rows that its header x-strait-rows says; nothing of it is kept",
                self.rows
            );
            return Err(Status::new(Code::Cancelled, Reason::Cancelled, message));
        }
        let layout = columns.layout(self.rows)?;
        let values = columns.plans.into_iter().map(|plan| plan.values).collect();
        let segment = staged::finish(self.staged.take(), self.goal.caller(), &layout, values)?;
        self.goal.reached(segment, layout)
    }
}

/// Reads the next message of a table, whose body has `body_bytes` bytes: its schema becomes `columns`; of a batch its rows, and
/// where in the body each column's values are.
pub(super) fn read_message(
    data: &FlightData,
    body_bytes: usize,
    columns: &mut Option<Columns>,
) -> Result<Option<Batch>, Status> {
    if data.data_header.is_empty() {
        if body_bytes == 0 {
            return Ok(None); // application metadata alone
        }
        return Err(bad_request(format!(
            "a message with a body of {body_bytes} bytes and no header"
        )));
    }
    if data.data_header.len() > HEADER_BYTES_MAX {
        return Err(bad_tensor(format!(
            "a message has a header of {} bytes, at most {HEADER_BYTES_MAX} are read; \
             send fewer columns or less metadata",
            data.data_header.len()
        )));
    }
    let message = arrow_ipc::root_as_message(&data.data_header)
        .map_err(|error| unreadable(&error.to_string()))?;
    if let Some(pair) = message.custom_metadata().into_iter().flatten().next() {
        return Err(bad_tensor(format!(
            "a message has metadata of its own (`{:.100}`), which is not kept; put it into the schema's",
            pair.key().unwrap_or_default()
        )));
    }
    match (message.header_type(), &mut *columns) {
        (MessageHeader::Schema, None) => {
            let schema = message
                .header_as_schema()
                .ok_or_else(|| bad_request("a schema message without a schema"))?;
            *columns = Some(Columns::of(schema)?);
            Ok(None)
        }
        (MessageHeader::RecordBatch, Some(columns)) => {
            let batch = message
                .header_as_record_batch()
                .ok_or_else(|| bad_request("a batch message without a batch"))?;
            columns.batch(batch, body_bytes).map(Some)
        }
        (MessageHeader::Schema, Some(_)) => {
            Err(bad_request("a second schema; one stream is one table"))
        }
        (MessageHeader::DictionaryBatch, _) => Err(bad_tensor(
            "a dictionary batch; tensors are not dictionary-encoded, decode them first",
        )),
        (other, _) => Err(bad_request(format!(
            "a message of kind {}; a table is a schema and then record batches",
            other.variant_name().unwrap_or("unknown")
        ))),
    }
}

/// The way of long bodies, which ends with the upload: the connection may have its end of it for longer.
#[derive(Debug)]
struct Way(Bodies);

impl Drop for Way {
    fn drop(&mut self) {
        self.0.end();
    }
}

/// For `bytes` of what a stream brings.
pub(super) fn reserved(caller: &Caller, bytes: u64) -> Result<Charge, Status> {
    let charge = caller.account().segments().try_reserve(bytes);
    Ok(charge.map_err(MemoryError::from)?)
}

fn unreadable(found: &str) -> Status {
    // The lines behind the first name the flatbuffer fields on the way there.
    let found = found.lines().next().unwrap_or_default();
    if found.starts_with("Utf8 error") {
        return bad_tensor(format!(
            "a column's name or the schema's metadata is not UTF-8 ({found}); encode it as text, base64 for instance"
        ));
    }
    bad_request(format!("a message's metadata is corrupt: {found}"))
}

/// What the client's stream ended with instead of its end.
pub(super) fn broken_off(status: &tonic::Status, message_bytes_max: usize) -> Status {
    match status.code() {
        // tonic's own limit on a message.
        tonic::Code::OutOfRange | tonic::Code::ResourceExhausted => Status::new(
            Code::OutOfRange,
            Reason::InlineTooLarge,
            format!(
                "{}; a message takes at most {message_bytes_max} bytes (setting server.message_bytes_max): \
                 send fewer rows in a batch, or create the tensor through the data socket",
                status.message()
            ),
        ),
        tonic::Code::Internal if status.message().contains("Protobuf") => {
            malformed("DoPut", status)
        }
        _ => Status::new(
            Code::Cancelled,
            Reason::Cancelled,
            format!("the upload ended too early: {}", status.message()),
        ),
    }
}

/// Takes a whole upload, and gives the flight its name, or keeps it without one: the segment, and whether it has a name.
///
/// # Errors
/// `CANCELLED` if it has not the number of `rows`. `BAD_REQUEST` and `BAD_TENSOR` for what is no table of tensors, `BAD_NAME`, `NAME_TAKEN`,
/// `WRONG_STATE`, `BUDGET_EXCEEDED`, `INLINE_TOO_LARGE`, `DRAINING`, `CANCELLED`, `DEADLINE`. Nothing is left.
pub(super) async fn receive(
    call: &Call,
    (replace, rows): (bool, Option<u64>),
    mut messages: impl Stream<Item = Result<FlightData, tonic::Status>> + Unpin,
    bodies: &Bodies,
    refused: &Refused,
) -> Result<(Arc<LiveSegment>, bool), Status> {
    let host = Arc::clone(call.caller.host());
    let message_bytes_max = host.config().message_bytes_max();
    let ended = |status: tonic::Status| {
        let refused = refused.take();
        refused.unwrap_or_else(|| broken_off(&status, message_bytes_max))
    };
    let first = messages
        .next()
        .await
        .ok_or_else(|| bad_request("an upload without messages"))?
        .map_err(ended)?;
    let goal = Goal::of(&call.caller, first.flight_descriptor.as_ref(), replace)?;
    let is_named = goal.is_named();
    let charge = reserved(&call.caller, 0)?;
    let mut arriving = Arriving {
        host,
        goal,
        columns: None,
        rows: 0,
        announced: rows,
        staged: None,
        charge,
        way: Way(bodies.clone()),
    };
    arriving.take(&first, bodies.take())?;
    drop(first);
    while let Some(message) = messages.next().await {
        let message = message.map_err(ended)?;
        let to_come = bodies.take();
        if !arriving.is_slow(&message, to_come) {
            arriving.take(&message, to_come)?;
        } else {
            arriving = off_the_runtime(move || {
                arriving.take(&message, to_come)?;
                Ok(arriving)
            })
            .await?;
        }
    }
    // What gRPC still holds goes before the segment comes.
    drop(messages);
    let _working = call.working();
    let segment = off_the_runtime(move || arriving.finish()).await?;
    Ok((segment, is_named))
}

async fn off_the_runtime<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Status> + Send + 'static,
) -> Result<T, Status> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(host_bug("storing an upload", error)),
    }
}
