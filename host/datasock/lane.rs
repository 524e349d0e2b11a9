//! Sockets of their own for prepared calls, each with a thread behind it.
//!
//! ```text
//! connection ── PREPARE ──▶ Lane::start ── thread: prepare ──▶ OK + descriptor
//!                                            └── CALL ──▶ call, OK ──▶ … until the client closes it or the connection ends
//! ```
//! A call then has two switches of threads and no more: the client's to this thread, and back.

use std::collections::BTreeMap;
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
use crate::session::{Called, Prepared, Preparing, Session};

/// One prepared kernel's socket, as the connection that asked for it sees it.
#[derive(Debug)]
pub(super) struct Lane {
    socket: FrameSocket,
    /// Of what it does now.
    cancel: Mutex<CancelToken>,
    ended: AtomicBool,
}

impl Lane {
    fn token(&self) -> CancelToken {
        let token = CancelToken::default();
        *self.cancel.lock() = token.clone();
        // Whoever ends it sees the new token, or is seen here.
        if self.ended.load(Ordering::SeqCst) {
            token.cancel();
        }
        token
    }

    /// Ends what it does now.
    pub(super) fn cancel(&self) {
        let token = self.cancel.lock().clone();
        token.cancel();
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
        let request = usize::try_from(prepared.request_bytes()).unwrap_or(0);
        // What is longer is truncated, and noticed.
        let bytes = wire::HEADER_BYTES + request + 1;
        let mut frame = Arc::new(vec![0; bytes]);
        loop {
            // Nobody has the one before any more, unless an input of it is still on its way somewhere.
            let buffer = match Arc::get_mut(&mut frame) {
                Some(buffer) => buffer,
                None => {
                    frame = Arc::new(vec![0; bytes]);
                    continue;
                }
            };
            let Ok(received) = self.socket.recv(buffer) else {
                return;
            };
            if received.bytes == 0 {
                return;
            }
            let packet = &buffer[..received.bytes];
            let fds = received.fds.len();
            // Before anything is answered.
            drop(received.fds);
            let header = match received.truncated {
                true => Err(format!(
                    "a frame with more than the {request} bytes of payload of this PREPARE, or with descriptors"
                )),
                false => call_header(packet, fds),
            };
            let header = match header {
                Ok(header) => header,
                Err(message) => {
                    let status = Status::new(Code::InvalidArgument, Reason::BadFrame, message);
                    let refused = failure(Header::sequence_of(packet), &status, "-");
                    if refused.send(&self.socket).is_err() {
                        return;
                    }
                    continue;
                }
            };
            let payload = wire::HEADER_BYTES..received.bytes;
            let span = trace_span(&header);
            let _in_span = span.enter();
            let mut unsent = None;
            let cancel = self.token();
            prepared.call(&frame, payload, &cancel, |result| {
                let answer = Answered::new(&header, prepared, result);
                // A client that does not read keeps its own turn from ending no longer than it takes to notice.
                match answer.send_now(&self.socket) {
                    Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                        unsent = Some(answer);
                    }
                    // The next `recv` sees the end.
                    Ok(()) | Err(_) => {}
                }
            });
            if let Some(answer) = unsent
                && answer.send(&self.socket).is_err()
            {
                return;
            }
        }
    }
}

/// The header of a CALL, or what is wrong with the packet.
fn call_header(packet: &[u8], fds: usize) -> Result<Header, String> {
    let (header, body, _) = Header::decode(packet).map_err(|error| error.to_string())?;
    if header.op != Op::Call {
        return Err(format!(
            "{:?} on the socket of a PREPARE; it takes CALL only, and other requests go over the connection",
            header.op
        ));
    }
    if !body.is_empty() || fds > 0 {
        return Err(format!(
            "a CALL has neither a body nor descriptors, this one has {} bytes and {fds}",
            body.len()
        ));
    }
    Ok(header)
}

/// OK or ERROR to CALL.
enum Answered {
    Ok {
        header: Header,
        body: Vec<u8>,
        called: Called,
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
        let notes = called.notes.iter().map(|(key, text)| wire::Note {
            key: key.clone(),
            text: text.clone(),
        });
        let body = match called.notes.is_empty() {
            true => Vec::new(),
            false => {
                let notes = notes.collect();
                let body = encode(Op::Ok, 0, &wire::Called { notes }, Vec::new());
                if body.op == Op::Error {
                    let status = Status::new(
                        Code::Internal,
                        Reason::BadAnswer,
                        "the kernel left more notes than a frame takes; the plugin must leave fewer or shorter ones",
                    );
                    return error(&status);
                }
                body.body
            }
        };
        let payload: usize = called.payload.iter().map(Vec::len).sum();
        let length = |bytes: usize| u32::try_from(bytes).unwrap_or(u32::MAX);
        Self::Ok {
            header: Header {
                op: Op::Ok,
                sequence: asked.sequence,
                body_bytes: length(body.len()),
                payload_bytes: length(payload),
                trace: asked.trace,
            },
            body,
            called,
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
                called,
            } => {
                let header = header.encode();
                let mut parts = vec![&header[..], &body[..]];
                parts.extend(called.payload.iter().map(Vec::as_slice));
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
            ended: AtomicBool::new(false),
        });
        let preparing =
            session
                .caller()
                .preparing(session.id, request, room, request_id, lane.token())?;
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

    /// Ends what `number` does now; false if there is none of that number.
    pub(super) fn cancel(&self, number: u64) -> bool {
        self.lanes
            .get(&number)
            .inspect(|lane| lane.cancel())
            .is_some()
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
    // Nobody waits for it if the connection has ended.
    if answer.send(Ok(prepared.to_wire(number))).is_ok() {
        lane.serve(&prepared);
    }
}
