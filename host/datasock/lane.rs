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
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use parking_lot::Mutex;
use strait_memory::{FrameSocket, SharedPages};
use strait_protocol::{self as wire, Header, Op};
use strait_ring::Spin;
use tokio::sync::oneshot;

use super::frames::failure;
use super::line::{Answered, Asked, Line};
use super::trace_span;
use crate::engine::CancelToken;
use crate::error::{Code, Reason, Status};
use crate::lease::SessionId;
use crate::session::{Called, Caller, ChunkEdge, ChunkFrame, Origin, Parted, Prepared, Preparing};

/// One prepared kernel's socket, as the connection that asked for it sees it.
#[derive(Debug)]
pub(super) struct Lane {
    socket: FrameSocket,
    /// Of what it does now, from when that came until it is answered.
    doing: Mutex<Option<CancelToken>>,
    ended: AtomicBool,
    /// It takes nothing more.
    over: AtomicBool,
}

impl Lane {
    fn token(&self) -> CancelToken {
        let token = CancelToken::default();
        *self.doing.lock() = Some(token.clone());
        // Whoever ends it sees the new token, or is seen here.
        if self.ended.load(Ordering::SeqCst) {
            token.cancel();
        }
        token
    }

    /// What it does is over. Before that is answered: whoever has read the answer means the next one.
    fn done(&self) {
        *self.doing.lock() = None;
    }

    /// Ends what it does now; false if that is nothing.
    pub(super) fn cancel(&self) -> bool {
        self.doing
            .lock()
            .as_ref()
            .map(CancelToken::cancel)
            .is_some()
    }

    /// Ends it, whatever it does.
    fn end(&self) {
        self.ended.store(true, Ordering::SeqCst);
        self.over.store(true, Ordering::SeqCst);
        // Before it is cancelled, so that it can tell this from a CANCEL. Its client may have ended it.
        let _ = self.socket.shutdown();
        self.cancel();
    }

    /// Ends it after what it does now.
    fn retire(&self) {
        self.over.store(true, Ordering::SeqCst);
        let _ = self.socket.shutdown_receiving();
    }

    fn serve(&self, prepared: &Prepared, ring: Option<(wire::Ring, SharedPages)>, spin: Spin) {
        let mut line = Line::new(&self.socket, ring, &self.over, prepared, spin);
        loop {
            let asked = match line.next() {
                Ok(Some(asked)) => asked,
                // Bytes that were to wake this side may be unread.
                Ok(None) if line.is_ring() => return line.discard(),
                Ok(None) => return,
                Err((sequence, status)) => {
                    let refused = failure(sequence, &status, "-");
                    match refused.send(&self.socket) {
                        Ok(()) if line.is_ring() => return line.discard(),
                        Ok(()) => continue,
                        Err(_) => return,
                    }
                }
            };
            let span = trace_span(&asked.header);
            let _in_span = span.enter();
            let goes_on = match (prepared.streams(), prepared.channel()) {
                (true, None) => self.stream(prepared, &mut line, asked),
                (true, Some(channel)) => {
                    let cancel = self.token();
                    let (header, first) = asked.into_chunk();
                    let mut edge = Edge::new(&mut line, header);
                    channel::produce(prepared, channel, first, &cancel, &mut edge);
                    false
                }
                (false, _) => self.call(prepared, &mut line, &asked),
            };
            if !goes_on {
                return line.discard();
            }
        }
    }

    /// False if nobody is there any more.
    fn call(&self, prepared: &Prepared, line: &mut Line<'_>, asked: &Asked) -> bool {
        let mut unsent = None;
        let cancel = self.token();
        prepared.call(&asked.frame, asked.payload.clone(), &cancel, |result| {
            let answer = Answered::new(&asked.header, prepared, result);
            self.done();
            // A client that does not read keeps its own turn from ending no longer than it takes to notice.
            match line.send_now(&answer) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => unsent = Some(answer),
                // The next `recv` sees the end.
                Ok(()) | Err(_) => {}
            }
        });
        unsent.is_none_or(|answer| line.send(&answer).is_ok())
    }

    /// From the first chunk to the last. False if the stream has failed: then what is still on its way belongs to nothing.
    fn stream(&self, prepared: &Prepared, line: &mut Line<'_>, asked: Asked) -> bool {
        let cancel = self.token();
        let (header, first) = asked.into_chunk();
        let mut edge = Edge::new(line, header);
        let ended = prepared.stream(first, &cancel, &mut edge);
        self.done();
        let goes_on = ended.is_ok();
        edge.end(prepared, ended) && goes_on
    }
}

/// The client's side of a stream.
struct Edge<'a, 'b> {
    line: &'a mut Line<'b>,
    /// Of the chunk that was received last.
    header: Header,
    unsent: Option<Answered>,
}

impl<'a, 'b> Edge<'a, 'b> {
    fn new(line: &'a mut Line<'b>, header: Header) -> Self {
        Self {
            line,
            header,
            unsent: None,
        }
    }

    /// Answers what was received last with what became of the stream. False if nobody is there any more.
    fn end(&mut self, prepared: &Prepared, ended: Result<Called, Status>) -> bool {
        let answered = Answered::new(&self.header, prepared, ended);
        self.flush().is_ok() && self.line.send(&answered).is_ok()
    }
}

impl ChunkEdge for Edge<'_, '_> {
    fn receive(&mut self) -> Result<Option<ChunkFrame>, Status> {
        let asked = self.line.next().map_err(|(sequence, status)| {
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
        match self.line.send_now(&answer) {
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
        let sent = self.unsent.take().map(|answer| self.line.send(&answer));
        sent.transpose().map(drop).map_err(|_| Parted::Left)
    }
}

/// A PREPARE that is under way.
pub(super) struct Starting {
    pub(super) lane: Arc<Lane>,
    /// The client's end.
    pub(super) socket: FrameSocket,
    /// What is told of it.
    pub(super) result: oneshot::Receiver<Result<Told, Status>>,
}

/// What is told of a PREPARE, and the memory of its ring if it has one.
pub(super) type Told = (wire::Prepared, Option<Arc<OwnedFd>>);

/// The lanes of one connection, by their numbers.
#[derive(Default)]
pub(super) struct Lanes {
    last: u64,
    lanes: BTreeMap<u64, Arc<Lane>>,
    ends: FuturesUnordered<std::pin::Pin<Box<dyn Future<Output = u64> + Send + Sync>>>,
}

impl Lanes {
    /// Starts what a PREPARE of `caller` asks for, whose `session` has segments that it may name.
    ///
    /// # Errors
    /// What it is answered.
    pub(super) fn start(
        &mut self,
        (caller, session): (&Caller, Option<SessionId>),
        request: wire::Prepare,
        request_id: Arc<str>,
    ) -> Result<Starting, Status> {
        // It has a socket and a thread, as a connection has.
        let place = caller.account().connect()?;
        let (ours, theirs) = FrameSocket::pair().map_err(|error| {
            Status::no_descriptors(&format!("no socket for prepared calls: {error}"))
        })?;
        let room = super::payload_room(&ours);
        let lane = Arc::new(Lane {
            socket: ours,
            doing: Mutex::default(),
            ended: AtomicBool::new(false),
            over: AtomicBool::new(false),
        });
        let origin = Origin::Frames(session);
        let preparing = caller.preparing(origin, request, room, request_id, lane.token())?;
        self.last += 1;
        let number = self.last;
        let (answer, result) = oneshot::channel();
        let (end, ended) = oneshot::channel::<()>();
        let serving = Arc::clone(&lane);
        let spin = caller.host().config().spin();
        std::thread::Builder::new()
            .name(format!("strait-calls-{number}"))
            .spawn(move || {
                // Told when it drops, whatever happens here.
                let _end = end;
                run(&serving, preparing, (number, spin), answer);
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
            socket: theirs,
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
    (number, spin): (u64, Spin),
    answer: oneshot::Sender<Result<Told, Status>>,
) {
    let prepared = preparing.prepare();
    let prepared = prepared.and_then(|prepared| Ok((prepared.ring()?, prepared)));
    let (ring, prepared) = match prepared {
        Ok(prepared) => prepared,
        Err(status) => return drop(answer.send(Err(status))),
    };
    lane.done();
    let memory = ring.as_ref().and_then(|(_, memory)| memory.descriptor());
    let layout = ring.as_ref().map(|(layout, _)| *layout);
    // Nobody waits for it if the connection has ended.
    if answer
        .send(Ok((prepared.to_wire(number, layout), memory)))
        .is_ok()
    {
        lane.serve(&prepared, ring, spin);
    }
}
