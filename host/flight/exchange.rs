//! DoExchange: batches through a kernel that streams, and what comes of them back while more are sent.
//!
//! ```text
//! client ─▶ Exchange: a task, a message at a time ─▶ Edge: chunks of rows ─▶ session: Prepared::stream
//! client ◀─ Outbox: what came of one chunk ◀───────── Batches ◀─────────────── (a thread of its own)
//! ```
//! Each arrow holds one chunk or message at most, and all of it is charged to the principal. A client that does not read keeps
//! the thread from going on; when that has lasted `server.stall_ms` the exchange ends, and what is still sent is thrown away
//! until the client reads why: it must not wait for ever for its own bytes to be taken.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::Arc;

use arrow_flight::flight_descriptor::DescriptorType;
use arrow_flight::{FlightData, FlightDescriptor};
use futures::stream::BoxStream;
use strait_memory::Charge;
use strait_protocol::{self as wire, PreparedInput};
use strait_tensor::TensorSpec;
use tokio::sync::mpsc;
use tonic::Streaming;

use super::call::Call;
use super::chunks::{Edge, Incoming};
use super::frames::{self, Frames};
use super::messages::{CMD_BYTES_MAX, Messages};
use super::outbox::{self, Outbox, Writer};
use super::refused::{Refused, bad_request, host_bug};
use super::upload::{Columns, read_message, reserved};
use crate::engine::CancelToken;
use crate::error::{Code, Reason, Status};
use crate::session::{Origin, StreamPermit};

/// Bytes of the rows that a kernel gets at a time, if the client does not say how many rows.
const CHUNK_BYTES: u64 = 1 << 20;
/// Rows then, of tensors without elements.
const EMPTY_ROWS: u64 = 64 << 10;
/// Most bytes of such rows, and of what can come of them.
const ROOM_BYTES: u64 = 16 << 20;

/// What the exchange does, which ends with its answers.
struct Doing {
    cancel: CancelToken,
    receiving: tokio::task::AbortHandle,
}

impl Drop for Doing {
    fn drop(&mut self) {
        self.cancel.cancel();
        self.receiving.abort();
    }
}

/// Starts an exchange, which has its `place` among the streams when it comes to that; its answers.
pub(super) fn start(
    call: &Call,
    place: impl Future<Output = Result<StreamPermit, Status>> + Send + 'static,
    messages: Streaming<FlightData>,
    refused: Refused,
) -> BoxStream<'static, Result<FlightData, tonic::Status>> {
    let outbox = Arc::<Outbox>::default();
    let cancel = CancelToken::default();
    let exchange = Exchange {
        call: call.clone(),
        messages: Messages {
            call: call.clone(),
            stream: messages,
            refused,
        },
        cancel: cancel.clone(),
    };
    let writer = Writer(Arc::clone(&outbox));
    let receiving = tokio::spawn(exchange.run(place, writer)).abort_handle();
    outbox::replies(call, outbox, Doing { cancel, receiving })
}

/// What an exchange turned out to be.
enum Beginning {
    Batches(Begun),
    Frames(Frames),
}

/// An exchange that has begun.
struct Exchange {
    call: Call,
    messages: Messages,
    cancel: CancelToken,
}

impl Exchange {
    /// Ends with the client's messages, or when nobody reads the answers any more.
    async fn run(
        mut self,
        place: impl Future<Output = Result<StreamPermit, Status>>,
        writer: Writer,
    ) {
        match self.begin(place).await {
            Ok(Beginning::Batches(begun)) => {
                let (sender, incoming) = mpsc::channel(1);
                begun.spawn(writer, incoming);
                self.forward(&sender).await;
            }
            Ok(Beginning::Frames(frames)) => {
                let ended = frames.pass(&mut self.messages, &writer).await;
                writer.end(ended, false);
            }
            Err(status) => writer.end(Err(status), false),
        }
        // Its client may write all before it reads why that is for nothing.
        self.messages.discard().await;
    }

    /// From the start to the schema.
    async fn begin(
        &mut self,
        place: impl Future<Output = Result<StreamPermit, Status>>,
    ) -> Result<Beginning, Status> {
        self.call.known_only("a kernel call")?;
        let permit = place.await?;
        let first = self
            .messages
            .next()
            .await?
            .ok_or_else(|| bad_request("an exchange without messages"))?;
        if let Some(asked) = frames::Asked::of(first.flight_descriptor.as_ref()) {
            // It may be idle for hours, and has a place among the connections, as on the data socket.
            drop(permit);
            let frames = asked.start(&self.call).await?;
            return Ok(Beginning::Frames(frames));
        }
        // It has a thread, as a connection has.
        let place = self.call.caller.account().connect()?;
        let asked = asked(first.flight_descriptor.as_ref())?;
        if asked.request_id.is_some() {
            return Err(bad_request(
                "an exchange takes its request id from the header x-request-id only: its answer begins before the cmd is read",
            ));
        }
        let mut columns = None;
        let mut message = first;
        loop {
            if read_message(&message, message.data_body.len(), &mut columns)?.is_some() {
                return Err(host_bug(
                    "beginning an exchange",
                    "a batch before its schema",
                ));
            }
            if let Some(columns) = columns {
                return Ok(Beginning::Batches(Begun {
                    call: self.call.clone(),
                    asked,
                    columns,
                    cancel: self.cancel.clone(),
                    _places: (permit, place),
                }));
            }
            message = self
                .messages
                .next()
                .await?
                .ok_or_else(|| bad_request("the exchange ended before its schema"))?;
        }
    }

    /// Hands on message after message, as soon as the one before is taken.
    async fn forward(&mut self, sender: &mpsc::Sender<Incoming>) {
        // Before anything is asked of the connection: what is not taken stays with the client.
        while let Ok(place) = sender.reserve().await {
            let next = self.messages.next().await.and_then(|message| {
                let charged = |message: FlightData| {
                    let charge = reserved(&self.call.caller, message.data_body.len() as u64)?;
                    Ok((message, charge))
                };
                message.map(charged).transpose()
            });
            let goes_on = matches!(next, Ok(Some(_)));
            place.send(next);
            if !goes_on {
                return;
            }
        }
    }
}

/// What the first message asks for.
fn asked(descriptor: Option<&FlightDescriptor>) -> Result<wire::Exchange, Status> {
    const LIKE: &str = "it looks like {\"kernel\": \"cumsum\", \"parameters\": {}}";
    let refused = |what: String| Err(bad_request(what));
    match descriptor.map(|descriptor| (descriptor.r#type(), &descriptor.cmd)) {
        Some((DescriptorType::Cmd, cmd)) if cmd.len() > CMD_BYTES_MAX => refused(format!(
            "the exchange's cmd has {} bytes; at most {CMD_BYTES_MAX} are read",
            cmd.len()
        )),
        Some((DescriptorType::Cmd, cmd)) => serde_json::from_slice(cmd).or_else(|error| {
            refused(format!(
                "the exchange's cmd is not what to do in JSON ({error}); {LIKE}"
            ))
        }),
        Some(_) => refused(format!(
            "the exchange's descriptor is no cmd, which says what to do with the batches; {LIKE}"
        )),
        None => refused(format!(
            "the exchange's first message has no descriptor; make it a cmd: {LIKE}"
        )),
    }
}

/// An exchange whose schema has come.
struct Begun {
    call: Call,
    asked: wire::Exchange,
    columns: Columns,
    cancel: CancelToken,
    _places: (StreamPermit, Charge),
}

impl Begun {
    fn spawn(self, writer: Writer, incoming: mpsc::Receiver<Incoming>) {
        // It gets that once it is there.
        let (hand_over, handed) = std::sync::mpsc::channel::<Writer>();
        let thread = std::thread::Builder::new().name("strait-exchange".to_owned());
        let spawned = thread.spawn(move || {
            let Ok(writer) = handed.recv() else { return };
            let span = self.call.span.clone();
            let _in_span = span.enter();
            let mut unread = false;
            let ended = self.exchange(&writer, incoming, &mut unread);
            // What it had is given back before its end is told.
            writer.end(ended, unread);
        });
        match spawned {
            // It waits for it.
            Ok(_) => drop(hand_over.send(writer)),
            Err(error) => {
                let message = format!(
                    "no thread for an exchange: {error}; end others, or have the operator raise the host's limit of processes"
                );
                let status = Status::new(Code::ResourceExhausted, Reason::BudgetExceeded, message);
                writer.end(Err(status), false);
            }
        }
    }

    /// The whole of it. Blocks. `unread`: it failed since nobody reads.
    fn exchange(
        self,
        writer: &Writer,
        incoming: mpsc::Receiver<Incoming>,
        unread: &mut bool,
    ) -> Result<(), Status> {
        let (request, ports) = self.request()?;
        let caller = &self.call.caller;
        let id = Arc::clone(&self.call.request_id);
        let cancel = self.cancel.clone();
        let preparing = caller.preparing(Origin::Batches, request, ROOM_BYTES, id, cancel)?;
        let prepared = preparing.prepare()?;
        let told = prepared.to_wire(0, None);
        // A chunk that came, and the answers to two: one is with the client's connection, one waits.
        let bytes = told.reply_bytes.saturating_mul(2);
        let _charge = reserved(caller, bytes.saturating_add(told.request_bytes))?;
        let mut edge = Edge::new(&self.call, writer, incoming, (self.columns, &ports), told)?;
        let ended = edge.run(&prepared, &self.cancel);
        *unread = edge.is_stalled();
        ended
    }

    /// The PREPARE that it stands for, and the port of each column.
    fn request(&self) -> Result<(wire::Prepare, Vec<String>), Status> {
        let wire::Exchange {
            kernel,
            inputs,
            parameters,
            rows,
            deadline_ms,
            limits,
            ..
        } = self.asked.clone();
        let found = self.call.caller.kernel(&kernel)?;
        let mut cut = found.kernel().inputs.iter().filter(|port| !port.whole);
        let ports: Vec<String> = match (self.columns.rows().len(), cut.next(), cut.next()) {
            (1, Some(only), None) => vec![only.name.clone()],
            _ => self
                .columns
                .rows()
                .map(|(name, _)| name.to_owned())
                .collect(),
        };
        let rows = self.rows(rows)?;
        let mut inputs: BTreeMap<_, _> = inputs
            .into_iter()
            .map(|(port, input)| (port, PreparedInput::Fixed(input)))
            .collect();
        for (port, (name, row)) in ports.iter().zip(self.columns.rows()) {
            let Some(TensorSpec { dtype, shape }) = row.spec(rows).filter(|_| !row.is_0d) else {
                return Err(bad_request(format!(
                    "column `{name}` says that it is 0-d (strait.shape=[]); a stream is of rows: leave that metadata out"
                )));
            };
            let spec = PreparedInput::Spec { dtype, shape };
            if inputs.insert(port.clone(), spec).is_some() {
                return Err(bad_request(format!(
                    "input `{}` is both in the cmd and a column of the schema; give it once",
                    crate::text::name(port)
                )));
            }
        }
        let request = wire::Prepare {
            kernel,
            inputs,
            parameters,
            stream: true,
            deadline_ms,
            limits,
            ..wire::Prepare::default()
        };
        Ok((request, ports))
    }

    /// How many rows the kernel gets at a time.
    fn rows(&self, asked: Option<u64>) -> Result<u64, Status> {
        let mut row_bytes = 0_u64;
        for (_, row) in self.columns.rows() {
            row_bytes = row_bytes.saturating_add(row.bytes()?);
        }
        let rows = match asked {
            Some(0) => {
                return Err(bad_request(
                    "`rows` of 0; ask for at least 1, or leave it out",
                ));
            }
            Some(rows) => rows,
            None => CHUNK_BYTES
                .checked_div(row_bytes)
                .unwrap_or(EMPTY_ROWS)
                .max(1),
        };
        let bytes = rows.saturating_mul(row_bytes);
        if bytes > ROOM_BYTES {
            let message = format!(
                "{rows} rows at a time have {bytes} bytes; a chunk has at most {ROOM_BYTES}: ask for fewer `rows`, or use PREPARE or INVOKE"
            );
            return Err(
                Status::new(Code::InvalidArgument, Reason::BadInput, message)
                    .with("asked", bytes)
                    .with("limit", ROOM_BYTES),
            );
        }
        Ok(rows)
    }
}
