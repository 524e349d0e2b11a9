//! Sockets of their own for prepared calls, each with a thread behind it.
//!
//! ```text
//! connection ── PREPARE ──▶ Lane::start ── thread: prepare ──▶ OK + descriptor
//!                                            └── CALL ──▶ call, OK ──▶ … until the client closes it or the connection ends
//! ```
//! A call then has two switches of threads and no more: the client's to this thread, and back.

mod channel;

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use parking_lot::Mutex;
use strait_memory::FrameSocket;
use strait_protocol::{self as wire, Header, Op};
use tokio::sync::oneshot;

use super::frames::{Outgoing, encode, failure};
use super::trace_span;
use crate::engine::CancelToken;
use crate::error::{Code, Reason, Status};
use crate::session::{Called, ChunkEdge, ChunkFrame, Parted, Prepared, Preparing, Session};

/// One prepared kernel's socket, as the connection that asked for it sees it.
#[derive(Debug)]
pub(super) struct Lane {
    socket: FrameSocket,
    /// Of what it does now.
    cancel: Mutex<CancelToken>,
    /// It does something.
    busy: AtomicBool,
    ended: AtomicBool,
}

impl Lane {
    fn token(&self) -> CancelToken {
        let token = CancelToken::default();
        *self.cancel.lock() = token.clone();
        self.busy.store(true, Ordering::SeqCst);
        // Whoever ends it sees the new token, or is seen here.
        if self.ended.load(Ordering::SeqCst) {
            token.cancel();
        }
        token
    }

    /// Ends what it does now; false if that is nothing.
    pub(super) fn cancel(&self) -> bool {
        let token = self.cancel.lock().clone();
        token.cancel();
        self.busy.load(Ordering::SeqCst)
    }

    /// Ends it, whatever it does.
    fn end(&self) {
        self.ended.store(true, Ordering::SeqCst);
        self.cancel();
        // Its client may have ended it.
        let _ = self.socket.shutdown();
    }

    /// Ends it after what it does now.
    fn retire(&self) {
        let _ = self.socket.shutdown_receiving();
    }

    fn serve(&self, prepared: &Prepared) {
        let mut incoming = Incoming::new(&self.socket, prepared);
        loop {
            let asked = match incoming.next() {
                Ok(Some(asked)) => asked,
                Ok(None) => return,
                Err((sequence, status)) => {
                    let refused = failure(sequence, &status, "-");
                    if refused.send(&self.socket).is_err() {
                        return;
                    }
                    continue;
                }
            };
            let span = trace_span(&asked.header);
            let _in_span = span.enter();
            let goes_on = match (prepared.streams(), prepared.channel()) {
                (true, None) => self.stream(prepared, &mut incoming, asked),
                (true, Some(channel)) => {
                    let cancel = self.token();
                    let (header, first) = asked.into_chunk();
                    let mut edge = Edge::new(&self.socket, &mut incoming, header);
                    channel::produce(prepared, channel, first, &cancel, &mut edge);
                    false
                }
                (false, _) => self.call(prepared, &asked),
            };
            self.busy.store(false, Ordering::SeqCst);
            if !goes_on {
                return incoming.discard();
            }
        }
    }

    /// False if nobody is there any more.
    fn call(&self, prepared: &Prepared, asked: &Asked) -> bool {
        let mut unsent = None;
        let cancel = self.token();
        prepared.call(&asked.frame, asked.payload.clone(), &cancel, |result| {
            let answer = Answered::new(&asked.header, prepared, result);
            // A client that does not read keeps its own turn from ending no longer than it takes to notice.
            match answer.send_now(&self.socket) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => unsent = Some(answer),
                // The next `recv` sees the end.
                Ok(()) | Err(_) => {}
            }
        });
        unsent.is_none_or(|answer| answer.send(&self.socket).is_ok())
    }

    /// From the first chunk to the last. False if the stream has failed: then what is still on its way belongs to nothing.
    fn stream(&self, prepared: &Prepared, incoming: &mut Incoming<'_>, asked: Asked) -> bool {
        let cancel = self.token();
        let (header, first) = asked.into_chunk();
        let mut edge = Edge::new(&self.socket, incoming, header);
        let ended = prepared.stream(first, &cancel, &mut edge);
        let goes_on = ended.is_ok();
        edge.end(prepared, ended) && goes_on
    }
}

/// A frame that came, of the right kind.
struct Asked {
    header: Header,
    frame: Arc<Vec<u8>>,
    payload: Range<usize>,
}

impl Asked {
    fn into_chunk(self) -> (Header, ChunkFrame) {
        let chunk = ChunkFrame {
            frame: self.frame,
            payload: self.payload,
            last: self.header.op == Op::Last,
        };
        (self.header, chunk)
    }
}

/// What comes on the socket of one PREPARE.
struct Incoming<'a> {
    socket: &'a FrameSocket,
    /// Bytes of each payload.
    payload: usize,
    /// What the frames are.
    ops: &'static [Op],
    frame: Arc<Vec<u8>>,
}

impl<'a> Incoming<'a> {
    fn new(socket: &'a FrameSocket, prepared: &Prepared) -> Self {
        Self {
            socket,
            payload: usize::try_from(prepared.request_bytes()).unwrap_or(0),
            ops: match prepared.streams() {
                true => &[Op::Chunk, Op::Last],
                false => &[Op::Call],
            },
            frame: Arc::default(),
        }
    }

    /// Waits for the next one; none at the end.
    ///
    /// # Errors
    /// What is answered to one that is wrong, and its sequence.
    fn next(&mut self) -> Result<Option<Asked>, (u32, Status)> {
        // What is longer is truncated, and noticed.
        let bytes = wire::HEADER_BYTES + self.payload + 1;
        // Nobody has the one before any more, unless an input of it is still on its way somewhere.
        if Arc::get_mut(&mut self.frame).is_none_or(|frame| frame.len() != bytes) {
            self.frame = Arc::new(vec![0; bytes]);
        }
        let Some(buffer) = Arc::get_mut(&mut self.frame) else {
            return Ok(None);
        };
        let Ok(received) = self.socket.recv(buffer) else {
            return Ok(None);
        };
        if received.bytes == 0 {
            return Ok(None);
        }
        let packet = &buffer[..received.bytes];
        let fds = received.fds.len();
        // Before anything is answered.
        drop(received.fds);
        let header = match received.truncated {
            true => Err(format!(
                "a frame with more than the {} bytes of payload of this PREPARE, or with descriptors",
                self.payload
            )),
            false => header_of(packet, fds, self.ops),
        };
        let header = header.map_err(|message| {
            let status = Status::new(Code::InvalidArgument, Reason::BadFrame, message);
            (Header::sequence_of(packet), status)
        })?;
        Ok(Some(Asked {
            header,
            frame: Arc::clone(&self.frame),
            payload: wire::HEADER_BYTES..received.bytes,
        }))
    }
}

impl Incoming<'_> {
    /// Nothing more is answered. What comes is thrown away until the client closes its end: a socket that is closed with
    /// something unread looks reset, and the client would not receive what was sent last.
    fn discard(&self) {
        if self.socket.shutdown_sending().is_ok() {
            let mut nothing = [0; wire::HEADER_BYTES];
            while self
                .socket
                .recv(&mut nothing)
                .is_ok_and(|received| received.bytes > 0)
            {}
        }
    }
}

/// The header of a packet that is one of `ops`, or what is wrong with that.
fn header_of(packet: &[u8], fds: usize, ops: &[Op]) -> Result<Header, String> {
    let (header, body, _) = Header::decode(packet).map_err(|error| error.to_string())?;
    if !ops.contains(&header.op) {
        let takes = match ops {
            [only] => format!("it takes {only:?} only"),
            _ => "it streams, and takes Chunk and Last".to_owned(),
        };
        return Err(format!(
            "{:?} on the socket of a PREPARE; {takes}: other requests go over the connection",
            header.op
        ));
    }
    if !body.is_empty() || fds > 0 {
        return Err(format!(
            "such a frame has neither a body nor descriptors, this one has {} bytes and {fds}",
            body.len()
        ));
    }
    Ok(header)
}

/// The client's side of a stream.
struct Edge<'a, 'b> {
    socket: &'a FrameSocket,
    incoming: &'a mut Incoming<'b>,
    /// Of the chunk that was received last.
    header: Header,
    unsent: Option<Answered>,
}

impl<'a, 'b> Edge<'a, 'b> {
    fn new(socket: &'a FrameSocket, incoming: &'a mut Incoming<'b>, header: Header) -> Self {
        Self {
            socket,
            incoming,
            header,
            unsent: None,
        }
    }

    /// Answers what was received last with what became of the stream. False if nobody is there any more.
    fn end(&mut self, prepared: &Prepared, ended: Result<Called, Status>) -> bool {
        self.flush().is_ok()
            && Answered::new(&self.header, prepared, ended)
                .send(self.socket)
                .is_ok()
    }
}

impl ChunkEdge for Edge<'_, '_> {
    fn receive(&mut self) -> Result<Option<ChunkFrame>, Status> {
        let asked = self.incoming.next().map_err(|(sequence, status)| {
            self.header.sequence = sequence;
            status
        })?;
        Ok(asked.map(|asked| {
            let (header, chunk) = asked.into_chunk();
            self.header = header;
            chunk
        }))
    }

    fn send(&mut self, payload: Vec<Vec<u8>>, done: bool) -> Result<(), Parted> {
        self.flush()?;
        let op = if done { Op::Ok } else { Op::Chunk };
        let answer = Answered::parts(op, &self.header, payload, Vec::new());
        match answer.send_now(self.socket) {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                self.unsent = Some(answer);
                Ok(())
            }
            Err(_) => Err(Parted::Left),
        }
    }

    fn is_full(&self) -> bool {
        self.unsent.is_some()
    }

    fn flush(&mut self) -> Result<(), Parted> {
        let sent = self.unsent.take().map(|answer| answer.send(self.socket));
        sent.transpose().map(drop).map_err(|_| Parted::Left)
    }
}

/// What a kernel had to say, as a frame's body; empty if that is nothing.
///
/// # Errors
/// `BAD_ANSWER` if that is more than a frame takes.
fn notes_body(notes: Vec<(String, String)>) -> Result<Vec<u8>, Status> {
    if notes.is_empty() {
        return Ok(Vec::new());
    }
    let notes = notes
        .into_iter()
        .map(|(key, text)| wire::Note { key, text });
    let notes = notes.collect();
    let frame = encode(Op::Ok, 0, &wire::Called { notes }, Vec::new());
    match frame.op {
        Op::Error => Err(Status::new(
            Code::Internal,
            Reason::BadAnswer,
            "the kernel left more notes than a frame takes; the plugin must leave fewer or shorter ones",
        )),
        _ => Ok(frame.body),
    }
}

/// What is answered on the socket of a PREPARE.
enum Answered {
    Ok {
        header: Header,
        body: Vec<u8>,
        payload: Vec<Vec<u8>>,
    },
    Error(Outgoing),
}

impl Answered {
    fn new(asked: &Header, prepared: &Prepared, result: Result<Called, Status>) -> Self {
        let error = |status: &Status| {
            let trace = asked.trace;
            let failure = failure(asked.sequence, status, prepared.request_id());
            Self::Error(Outgoing { trace, ..failure })
        };
        let called = match result {
            Ok(called) => called,
            Err(status) => return error(&status),
        };
        match notes_body(called.notes) {
            Ok(body) => Self::parts(Op::Ok, asked, called.payload, body),
            Err(status) => error(&status),
        }
    }

    fn parts(op: Op, asked: &Header, payload: Vec<Vec<u8>>, body: Vec<u8>) -> Self {
        let length = |bytes: usize| u32::try_from(bytes).unwrap_or(u32::MAX);
        Self::Ok {
            header: Header {
                op,
                sequence: asked.sequence,
                body_bytes: length(body.len()),
                payload_bytes: length(payload.iter().map(Vec::len).sum()),
                trace: asked.trace,
            },
            body,
            payload,
        }
    }

    fn send_now(&self, socket: &FrameSocket) -> std::io::Result<()> {
        self.with_parts(|parts| socket.send_now(parts))
    }

    fn send(&self, socket: &FrameSocket) -> std::io::Result<()> {
        self.with_parts(|parts| socket.send(parts, &[]))
    }

    fn with_parts<R>(&self, send: impl FnOnce(&[&[u8]]) -> R) -> R {
        match self {
            Self::Ok {
                header,
                body,
                payload,
            } => {
                let header = header.encode();
                let mut parts = vec![&header[..], &body[..]];
                parts.extend(payload.iter().map(Vec::as_slice));
                send(&parts)
            }
            Self::Error(outgoing) => send(&[&outgoing.header(), &outgoing.body]),
        }
    }
}

/// A PREPARE that is under way.
pub(super) struct Starting {
    pub(super) lane: Arc<Lane>,
    /// The client's end.
    pub(super) socket: OwnedFd,
    /// What is told of it.
    pub(super) result: oneshot::Receiver<Result<wire::Prepared, Status>>,
}

/// The lanes of one connection, by their numbers.
#[derive(Default)]
pub(super) struct Lanes {
    last: u64,
    lanes: BTreeMap<u64, Arc<Lane>>,
    ends: FuturesUnordered<std::pin::Pin<Box<dyn Future<Output = u64> + Send + Sync>>>,
}

impl Lanes {
    /// Starts what PREPARE asks for.
    ///
    /// # Errors
    /// What it is answered.
    pub(super) fn start(
        &mut self,
        session: &Session,
        request: wire::Prepare,
        request_id: Arc<str>,
    ) -> Result<Starting, Status> {
        let account = session.caller().account();
        // It has a socket and a thread, as a connection has.
        let place = account.connect()?;
        let (ours, theirs) = FrameSocket::pair().map_err(|error| {
            Status::no_descriptors(&format!("no socket for prepared calls: {error}"))
        })?;
        let room = super::payload_room(&ours);
        let lane = Arc::new(Lane {
            socket: ours,
            cancel: Mutex::default(),
            busy: AtomicBool::new(false),
            ended: AtomicBool::new(false),
        });
        let preparing = session.caller().preparing(
            Some(session.id),
            request,
            room,
            request_id,
            lane.token(),
        )?;
        self.last += 1;
        let number = self.last;
        let (answer, result) = oneshot::channel();
        let (end, ended) = oneshot::channel::<()>();
        let serving = Arc::clone(&lane);
        std::thread::Builder::new()
            .name(format!("strait-calls-{number}"))
            .spawn(move || {
                // Told when it drops, whatever happens here.
                let _end = end;
                run(&serving, preparing, number, answer);
                // What it had is given back before its end is told.
                drop((serving, place));
            })
            .map_err(|error| {
                let message = format!(
                    "no thread for prepared calls: {error}; end others, or have the operator raise the host's limit of processes"
                );
                Status::new(Code::ResourceExhausted, Reason::BudgetExceeded, message)
            })?;
        self.lanes.insert(number, Arc::clone(&lane));
        self.ends.push(Box::pin(async move {
            // Nothing is ever sent.
            let _ = ended.await;
            number
        }));
        Ok(Starting {
            lane,
            socket: theirs.into(),
            result,
        })
    }

    /// Ends what `number` does now; false if there is none of that number, or it does nothing.
    pub(super) fn cancel(&self, number: u64) -> bool {
        self.lanes.get(&number).is_some_and(|lane| lane.cancel())
    }

    pub(super) fn is_empty(&self) -> bool {
        self.lanes.is_empty()
    }

    /// Waits for one to end. For ever, if there is none.
    pub(super) async fn ended(&mut self) {
        match self.ends.next().await {
            Some(number) => drop(self.lanes.remove(&number)),
            None => std::future::pending().await,
        }
    }

    /// Ends all of them after what they do now.
    pub(super) fn retire(&self) {
        self.lanes.values().for_each(|lane| lane.retire());
    }
}

impl Drop for Lanes {
    fn drop(&mut self) {
        self.lanes.values().for_each(|lane| lane.end());
    }
}

fn run(
    lane: &Lane,
    preparing: Preparing,
    number: u64,
    answer: oneshot::Sender<Result<wire::Prepared, Status>>,
) {
    let prepared = match preparing.prepare() {
        Ok(prepared) => prepared,
        Err(status) => return drop(answer.send(Err(status))),
    };
    lane.busy.store(false, Ordering::SeqCst);
    // Nobody waits for it if the connection has ended.
    if answer.send(Ok(prepared.to_wire(number))).is_ok() {
        lane.serve(&prepared);
    }
}
