//! What comes of a stream's chunks, as batches of one table.

use std::collections::VecDeque;
use std::ops::Range;

use arrow_flight::FlightData;
use bytes::Bytes;
use strait_protocol::{self as wire, PreparedTensor, SIZES_BYTES};
use strait_tensor::{BatchColumn, SchemaMessage, TensorSpec, batch_message};

use super::call::Call;
use super::refused::host_bug;
use crate::error::{Code, Reason, Status};

/// Bodies of answers are cut to this size, as those of DoGet.
const BODY_BYTES: u64 = 512 << 10;
/// The IPC format's alignment of buffers.
const BUFFER_ALIGN: u64 = 64;

/// The answers as batches of one table.
pub(super) struct Batches {
    call: Call,
    schema: SchemaMessage,
    outputs: Vec<PreparedTensor>,
    row_bytes: Vec<u64>,
}

impl Batches {
    /// Of `outputs`, with the most rows that a batch has.
    ///
    /// # Errors
    /// `UNSUPPORTED_OP` if they are of different lengths.
    pub(super) fn new(call: &Call, outputs: &[PreparedTensor]) -> Result<Self, Status> {
        let rows = |tensor: &PreparedTensor| tensor.shape.first().copied().unwrap_or(1);
        if let [first, others @ ..] = outputs
            && let Some(other) = others.iter().find(|other| rows(other) != rows(first))
        {
            let message = format!(
                "outputs `{}` and `{}` are of different lengths, so they do not make one table; DoPut the inputs and call the kernel by GetFlightInfo, or use PREPARE on the data socket",
                first.port, other.port
            );
            return Err(Status::new(
                Code::Unimplemented,
                Reason::UnsupportedOp,
                message,
            ));
        }
        let outputs = outputs.to_vec();
        let specs: Vec<_> = outputs.iter().map(spec).collect();
        let ports = outputs.iter().map(|tensor| tensor.port.as_str());
        let schema = SchemaMessage::of(ports.zip(&specs))?;
        let row_bytes = |tensor: &PreparedTensor| {
            let rest = tensor.shape.get(1..).unwrap_or_default();
            rest.iter().product::<u64>() * tensor.dtype.size()
        };
        let row_bytes = outputs.iter().map(row_bytes).collect();
        Ok(Self {
            call: call.clone(),
            schema,
            outputs,
            row_bytes,
        })
    }

    pub(super) fn into_schema(self) -> SchemaMessage {
        self.schema
    }

    pub(super) fn schema(&self) -> FlightData {
        let schema = Bytes::copy_from_slice(&self.schema.bytes);
        FlightData::new().with_data_header(schema.slice(SchemaMessage::PREFIX_BYTES..))
    }

    /// A reply's payload as messages; none for no rows, unless there are `notes` for the last one.
    pub(super) fn of(
        &self,
        payload: Vec<Vec<u8>>,
        notes: Option<Bytes>,
    ) -> Result<VecDeque<FlightData>, Status> {
        let mut payload = payload.into_iter();
        let sizes = payload.next().unwrap_or_default();
        let rows = self.rows(&sizes)?;
        let values: Vec<Bytes> = payload.map(Bytes::from).collect();
        let row: u64 = self.row_bytes.iter().sum();
        let step = match BODY_BYTES.checked_div(row).unwrap_or(rows).max(1) {
            // So that each begins where a buffer may.
            many if many > BUFFER_ALIGN => many - many % BUFFER_ALIGN,
            few => few,
        };
        let mut messages = VecDeque::new();
        let mut start = 0;
        while start < rows {
            let end = start.saturating_add(step).min(rows);
            messages.push_back(self.message(&values, start..end)?);
            start = end;
        }
        if let Some(notes) = notes {
            if messages.is_empty() {
                messages.push_back(self.message(&values, 0..0)?);
            }
            if let Some(last) = messages.back_mut() {
                last.app_metadata = notes;
            }
        }
        Ok(messages)
    }

    /// How many each output has.
    fn rows(&self, sizes: &[u8]) -> Result<u64, Status> {
        let wrong = |tensor: &PreparedTensor, how: &str| {
            let message = format!("output `{}`: {how}", tensor.port);
            Status::new(Code::Internal, Reason::BadAnswer, message)
        };
        let mut rows = None;
        for (tensor, sizes) in self.outputs.iter().zip(sizes.chunks(SIZES_BYTES)) {
            let shape = wire::shape(sizes, tensor.shape.len());
            let shape = shape.ok_or_else(|| host_bug("answering a chunk", "no sizes"))?;
            if shape.get(1..) != tensor.shape.get(1..) {
                return Err(wrong(
                    tensor,
                    "its rows have not the sizes that they began with",
                ));
            }
            let here = shape.first().copied().unwrap_or(1);
            if *rows.get_or_insert(here) != here {
                let how = "it has other rows than the first output here, so they do not make one batch; call the kernel by GetFlightInfo, or use PREPARE on the data socket";
                return Err(wrong(tensor, how));
            }
        }
        Ok(rows.unwrap_or(0))
    }

    fn message(&self, values: &[Bytes], rows: Range<u64>) -> Result<FlightData, Status> {
        let count = rows.end - rows.start;
        let mut body_bytes = 0;
        let columns = self.schema.levels.iter().zip(&self.row_bytes);
        let columns: Vec<_> = columns
            .map(|(levels, row_bytes)| {
                let (start, bytes) = (body_bytes, count * row_bytes);
                body_bytes += bytes.next_multiple_of(BUFFER_ALIGN);
                BatchColumn {
                    counts: levels
                        .iter()
                        .map(|values| count.saturating_mul(*values))
                        .collect(),
                    start,
                    bytes,
                }
            })
            .collect();
        let tensors: u64 = columns.iter().map(|column| column.bytes).sum();
        let starts = self
            .row_bytes
            .iter()
            .map(|row_bytes| rows.start * row_bytes);
        let starts: Vec<u64> = starts.collect();
        let whole = match (values, starts.as_slice()) {
            ([only], [start]) if start % BUFFER_ALIGN == 0 => {
                let range = length_of(*start)?..length_of(start + body_bytes)?;
                (range.end <= only.len()).then(|| only.slice(range))
            }
            _ => None,
        };
        // gRPC's copy, and that for the socket.
        let gathers = self.call.connection().is_some_and(|state| state.gathers());
        let mut copies = if gathers { 2 } else { 1 };
        let body = match whole {
            Some(body) => body,
            None => {
                copies += 1;
                let mut body = Vec::with_capacity(length_of(body_bytes)?);
                for ((values, column), start) in values.iter().zip(&columns).zip(&starts) {
                    let range = length_of(*start)?..length_of(start + column.bytes)?;
                    let values = values.get(range);
                    let lost = || host_bug("answering a chunk", "rows beyond its payload");
                    body.extend_from_slice(values.ok_or_else(lost)?);
                    body.resize(
                        length_of((body.len() as u64).next_multiple_of(BUFFER_ALIGN))?,
                        0,
                    );
                }
                Bytes::from(body)
            }
        };
        let host = self.call.caller.host();
        host.inline_copied().add(copies * tensors);
        let header = batch_message(columns, count, body_bytes)
            .ok_or_else(|| host_bug("counting rows", format!("{count} of {body_bytes} bytes")))?;
        Ok(FlightData::new()
            .with_data_header(header)
            .with_data_body(body))
    }
}

fn length_of(bytes: u64) -> Result<usize, Status> {
    usize::try_from(bytes).map_err(|error| host_bug("sizing a message", error))
}

fn spec(tensor: &PreparedTensor) -> TensorSpec {
    TensorSpec {
        dtype: tensor.dtype,
        shape: tensor.shape.clone(),
    }
}
