//! The client of an exchange, as the thread of a stream sees it: batches come and are cut into chunks of rows, answers go.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use arrow_flight::FlightData;
use bytes::Bytes;
use strait_memory::Charge;
use strait_protocol::{self as wire, PreparedTensor, SIZES_BYTES};
use tokio::sync::mpsc;

use super::batches::Batches;
use super::call::Call;
use super::connection::Working;
use super::outbox::{Offered, Writer};
use super::refused::host_bug;
use super::upload::{Columns, read_message};
use crate::engine::CancelToken;
use crate::error::{Code, Reason, Status};
use crate::session::{Called, ChunkEdge, ChunkFrame, Parted, Prepared};

/// What the thread gets: a message and what it is charged with, none at the client's end, or why nothing comes any more.
pub(super) type Incoming = Result<Option<(FlightData, Charge)>, Status>;

/// A batch of which rows are left.
struct At {
    data: FlightData,
    /// Each column's values.
    ranges: Vec<Range<usize>>,
    /// Rows, and how many of them have gone.
    rows: u64,
    gone: u64,
    _charge: Charge,
}

/// The client, for the thread.
pub(super) struct Edge<'a> {
    writer: &'a Writer,
    incoming: mpsc::Receiver<Incoming>,
    /// Of each input the column.
    of_inputs: Vec<usize>,
    columns: Option<Columns>,
    inputs: Vec<PreparedTensor>,
    request_bytes: usize,
    batches: Batches,
    at: Option<At>,
    frame: Arc<Vec<u8>>,
    unsent: Option<VecDeque<FlightData>>,
    is_stalled: bool,
    stall: Duration,
    call: &'a Call,
    working: Option<Working>,
}

impl<'a> Edge<'a> {
    /// `columns` with the port of each; `told` of what was prepared for them.
    pub(super) fn new(
        call: &'a Call,
        writer: &'a Writer,
        incoming: mpsc::Receiver<Incoming>,
        (columns, ports): (Columns, &[String]),
        told: wire::Prepared,
    ) -> Result<Self, Status> {
        let column = |input: &PreparedTensor| ports.iter().position(|port| *port == input.port);
        let of_inputs: Option<_> = told.inputs.iter().map(column).collect();
        Ok(Self {
            call,
            writer,
            incoming,
            columns: Some(columns),
            of_inputs: of_inputs
                .ok_or_else(|| host_bug("beginning an exchange", "an input without a column"))?,
            request_bytes: length_of(told.request_bytes)?,
            batches: Batches::new(call, &told.outputs)?,
            inputs: told.inputs,
            at: None,
            frame: Arc::default(),
            unsent: None,
            is_stalled: false,
            stall: call.caller.host().config().stall(),
            working: None,
        })
    }

    /// Whether it failed since nobody reads.
    pub(super) fn is_stalled(&self) -> bool {
        self.is_stalled
    }

    /// The whole stream. Blocks.
    ///
    /// # Errors
    /// Why it ended early.
    pub(super) fn run(&mut self, prepared: &Prepared, cancel: &CancelToken) -> Result<(), Status> {
        let schema = self.batches.schema();
        let gone = || Status::new(Code::Cancelled, Reason::Cancelled, "nobody is there");
        self.put(VecDeque::from([schema]))
            .map_err(|parted| match parted {
                Parted::Left => gone(),
                Parted::Failed(status) => status,
            })?;
        let first = self.receive().map_err(|mut status| {
            // As of the chunks that come after it.
            status.message = format!("chunk 0 of a stream: {}", status.message);
            status.with("chunk", 0)
        })?;
        let first = first.ok_or_else(gone)?;
        let Called { payload, notes } = prepared.stream(first, cancel, self)?;
        let notes = match notes.is_empty() {
            true => None,
            false => Some(notes_json(notes)?),
        };
        let last = self.batches.of(payload, notes)?;
        match self.put(last).and_then(|()| self.flush()) {
            Err(Parted::Failed(status)) => Err(status),
            // Whether that is read concerns nobody any more.
            Ok(()) | Err(Parted::Left) => Ok(()),
        }
    }

    fn put(&mut self, messages: VecDeque<FlightData>) -> Result<(), Parted> {
        if messages.is_empty() {
            return Ok(());
        }
        self.flush()?;
        match self.writer.offer(messages) {
            Offered::Taken => {}
            Offered::Full(messages) => self.unsent = Some(messages),
            Offered::Left => return Err(Parted::Left),
        }
        Ok(())
    }

    /// The next rows of the batch at hand.
    fn cut(&mut self) -> Result<Option<ChunkFrame>, Status> {
        let Some(at) = self.at.as_mut().filter(|at| at.gone < at.rows) else {
            self.at = None;
            return Ok(None);
        };
        let most = self.inputs.iter().filter_map(|input| input.shape.first());
        let rows = most.copied().min().unwrap_or(1).min(at.rows - at.gone);
        let mut copied = 0;
        let frame = buffer(&mut self.frame, self.request_bytes)?;
        for (index, (input, column)) in self.inputs.iter().zip(&self.of_inputs).enumerate() {
            let lost = || host_bug("cutting a batch", "a chunk beyond its frame");
            let values = at.ranges.get(*column).ok_or_else(lost)?;
            let row_bytes = (values.len() as u64).checked_div(at.rows).unwrap_or(0);
            let from = values.start + length_of(at.gone * row_bytes)?;
            let bytes = length_of(rows * row_bytes)?;
            let to = length_of(input.offset)?;
            let source = at.data.data_body.get(from..from + bytes).ok_or_else(lost)?;
            let into = frame.get_mut(to..to + bytes).ok_or_else(lost)?;
            into.copy_from_slice(source);
            copied += bytes as u64;
            write_sizes(frame, index, input, rows)?;
        }
        at.gone += rows;
        self.call.caller.host().uploads_copied().add(copied);
        Ok(Some(self.chunk(false)))
    }

    /// No more rows.
    fn last(&mut self) -> Result<ChunkFrame, Status> {
        let frame = buffer(&mut self.frame, self.request_bytes)?;
        for (index, input) in self.inputs.iter().enumerate() {
            write_sizes(frame, index, input, 0)?;
        }
        Ok(self.chunk(true))
    }

    fn chunk(&self, last: bool) -> ChunkFrame {
        ChunkFrame {
            frame: Arc::clone(&self.frame),
            payload: 0..self.request_bytes,
            last,
        }
    }
}

fn write_sizes(
    frame: &mut [u8],
    index: usize,
    input: &PreparedTensor,
    rows: u64,
) -> Result<(), Status> {
    let mut shape = input.shape.clone();
    if let Some(first) = shape.first_mut() {
        *first = rows;
    }
    let place = frame.get_mut(index * SIZES_BYTES..(index + 1) * SIZES_BYTES);
    let place = place.ok_or_else(|| host_bug("cutting a batch", "sizes beyond a frame"))?;
    place.copy_from_slice(&wire::sizes(&shape));
    Ok(())
}

/// A frame of that length that nobody else has: the one before, unless rows of it are still on their way somewhere.
fn buffer(frame: &mut Arc<Vec<u8>>, length: usize) -> Result<&mut Vec<u8>, Status> {
    if Arc::get_mut(frame).is_none_or(|frame| frame.len() != length) {
        *frame = Arc::new(vec![0; length]);
    }
    Arc::get_mut(frame).ok_or_else(|| host_bug("cutting a batch", "a new frame is shared"))
}

fn length_of(bytes: u64) -> Result<usize, Status> {
    usize::try_from(bytes).map_err(|error| host_bug("sizing a message", error))
}

fn notes_json(notes: Vec<(String, String)>) -> Result<Bytes, Status> {
    let notes = notes
        .into_iter()
        .map(|(key, text)| wire::Note { key, text });
    super::info::json(&wire::Called {
        notes: notes.collect(),
    })
}

impl ChunkEdge for Edge<'_> {
    fn receive(&mut self) -> Result<Option<ChunkFrame>, Status> {
        loop {
            if let Some(chunk) = self.cut()? {
                return Ok(Some(chunk));
            }
            // A host that ends does not wait for a client that says nothing.
            self.working = None;
            let Some(next) = self.incoming.blocking_recv() else {
                return Ok(None);
            };
            self.working = self.call.working();
            let Some((data, charge)) = next? else {
                return self.last().map(Some);
            };
            let batch = read_message(&data, data.data_body.len(), &mut self.columns)?;
            self.at = match batch {
                None => None,
                Some(batch) => Some(At {
                    data,
                    rows: batch.rows,
                    ranges: batch.plain()?,
                    gone: 0,
                    _charge: charge,
                }),
            };
        }
    }

    fn send(&mut self, payload: Vec<Vec<u8>>, _: bool) -> Result<(), Parted> {
        let messages = self.batches.of(payload, None);
        self.put(messages.map_err(Parted::Failed)?)
    }

    fn is_full(&self) -> bool {
        self.unsent.is_some()
    }

    fn flush(&mut self) -> Result<(), Parted> {
        while let Some(messages) = self.unsent.take() {
            match self.writer.offer(messages) {
                Offered::Taken => break,
                Offered::Left => return Err(Parted::Left),
                Offered::Full(messages) => self.unsent = Some(messages),
            }
            if !self.writer.wait(self.stall) {
                self.is_stalled = true;
                return Err(Parted::Failed(unread(self.stall)));
            }
        }
        Ok(())
    }
}

fn unread(stall: Duration) -> Status {
    Status::new(
        Code::DeadlineExceeded,
        Reason::Deadline,
        format!(
            "nothing of the answers was read for {} ms (setting server.stall_ms), and no more of them is kept; \
             read while you write: in a thread of its own, or after each batch",
            stall.as_millis()
        ),
    )
}
