//! One connection: reads frames, answers them, pushes what happens.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use strait_memory::{Charge, FrameSocket, Peer, Received};
use strait_protocol::{self as wire, FrameError, Header, Op};
use tokio::io::unix::AsyncFd;
use tokio::sync::{mpsc, oneshot, watch};

use super::Pushes;
use super::answer::{Answer, parse};
use super::dispatch::{Reply, respond};
use super::frames::{Outgoing, encode, failure};
use super::handlers::calls::{self, Cancelling, Running, Wanted};
use super::handlers::leases::ENDED_AT_ONCE;
use super::in_flight::{Ending, InFlight};
use super::lane::{Lane, Lanes, Told};
use crate::error::{Code, Reason, Status};
use crate::session::{Call, Caller, Gone, Invoked, Session, Unread};

/// Longest packet: one byte more than a frame may have, so that a longer one is noticed.
const PACKET_BYTES: usize = wire::HEADER_BYTES + wire::BODY_BYTES_MAX + wire::PAYLOAD_BYTES_MAX + 1;
/// Replies that may wait for a slow client before its requests wait, too.
const REPLIES_WAITING: usize = 32;
/// What a closed connection's last replies get to be written.
const FAREWELL: Duration = Duration::from_secs(1);
/// How long somebody who is refused is waited for to say something.
const REFUSAL: Duration = Duration::from_millis(100);

type Sockets = Arc<AsyncFd<FrameSocket>>;

/// Why a connection ends.
enum End {
    /// EOF, a socket error, or the process exited.
    Gone,
    /// It does not speak the protocol; it has been told.
    Refused,
    /// The host ends.
    Drained,
    /// The host ends, and this client does not read.
    Deaf,
}

/// Serves one connection, which has `place` among its principal's, to its end. Ending it cancels what runs and ends
/// its leases.
pub(super) async fn run(
    caller: Caller,
    socket: FrameSocket,
    (peer, place): (Peer, Charge),
    pushes: Arc<Pushes>,
    draining: watch::Receiver<bool>,
) {
    let socket = match prepare(socket) {
        Ok(socket) => socket,
        Err(error) => {
            tracing::warn!(%error, "a connection could not be prepared");
            return;
        }
    };
    let (replies, waiting) = mpsc::channel(REPLIES_WAITING);
    let unsent = Arc::new(AtomicUsize::new(0));
    let in_flight = InFlight::new(Arc::clone(&socket), place);
    let ending = Ending(Arc::clone(&in_flight));
    caller
        .account()
        .watch_unread(Arc::clone(&in_flight) as Arc<dyn Unread>);
    let mut writer = tokio::spawn(write(Arc::clone(&in_flight), waiting, Arc::clone(&unsent)));
    let account = Arc::clone(caller.account());
    let session = Session::open(caller);
    let (push, gone) = mpsc::unbounded_channel();
    pushes.lock().insert(session.id, push);
    tracing::info!(
        session = session.id,
        pid = peer.pid,
        uid = peer.uid,
        "connected"
    );
    let id = session.id;
    let mut connection = Connection {
        room: super::payload_room(socket.get_ref()),
        session,
        socket,
        in_flight: Arc::clone(&in_flight),
        replies,
        unsent,
        draining,
        greeted: false,
        running: HashMap::new(),
        finished: FuturesUnordered::new(),
        lanes: Lanes::default(),
    };
    // Beside all of it: `serve` may be waiting for a client that does not read its replies.
    let end = tokio::select! {
        () = exited(peer.pidfd) => End::Gone,
        end = connection.serve(gone) => end,
    };
    pushes.lock().remove(&id);
    for call in connection.running.values() {
        call.cancel();
    }
    match connection.session.lease_count() > ENDED_AT_ONCE {
        true => tokio::task::block_in_place(|| drop(connection)),
        false => drop(connection),
    }
    tracing::info!(session = id, "disconnected");
    // What has been answered is still written, unless the client does not read it.
    if matches!(end, End::Deaf) || tokio::time::timeout(FAREWELL, &mut writer).await.is_err() {
        writer.abort();
    }
    drop(ending);
    account.settle();
}

/// Tells whoever connected why it is not served, as the reply to its first frame.
pub(super) async fn refuse(socket: FrameSocket, status: &Status) {
    // If Linux does not let us tell, it sees the end.
    let Ok(socket) = prepare(socket) else {
        return;
    };
    let mut buffer = [0; wire::HEADER_BYTES];
    // A connection that is closed with something unread looks as if it had been reset.
    let first = socket.async_io(tokio::io::Interest::READABLE, |socket| {
        socket.recv(&mut buffer)
    });
    let first = tokio::time::timeout(REFUSAL, first).await;
    let sequence = match first {
        Ok(Ok(received)) => Header::sequence_of(&buffer[..received.bytes]),
        _ => 0,
    };
    let refused = failure(sequence, status, "-");
    // Its socket's buffer is empty; one that is gone need not be told.
    let _ = refused.send(socket.get_ref());
}

fn prepare(socket: FrameSocket) -> std::io::Result<Sockets> {
    socket.set_nonblocking(true)?;
    Ok(Arc::new(super::watched(socket)?))
}

async fn write(
    in_flight: Arc<InFlight>,
    mut waiting: mpsc::Receiver<Outgoing>,
    unsent: Arc<AtomicUsize>,
) {
    while let Some(mut outgoing) = waiting.recv().await {
        let sent = in_flight.send_when_writable(&mut outgoing).await;
        unsent.fetch_sub(1, Ordering::Release);
        if let Err(error) = sent {
            tracing::debug!(%error, "a reply could not be sent");
            // The client would wait for it for ever. Whoever receives on this connection sees the end.
            in_flight.end();
            return;
        }
    }
}

/// What was under way and is done.
enum Finished {
    Invoke(Wanted, Result<Arc<Invoked>, Status>),
    Prepare(Arc<str>, OwnedFd, Result<Told, Status>),
}

/// What can be ended while it is under way.
enum Stop {
    Call(Call),
    Lane(Arc<Lane>),
}

impl Stop {
    fn cancel(&self) {
        match self {
            Self::Call(call) => call.cancel(),
            // It is under way until this connection has its answer, whatever it says.
            Self::Lane(lane) => {
                let _ = lane.cancel();
            }
        }
    }
}

type Finishing = std::pin::Pin<Box<dyn Future<Output = (Header, Finished)> + Send + Sync>>;

struct Connection {
    session: Session,
    socket: Sockets,
    in_flight: Arc<InFlight>,
    /// To the writer, for what the socket does not take at once.
    replies: mpsc::Sender<Outgoing>,
    /// Replies that are with the writer. This task alone adds to them.
    unsent: Arc<AtomicUsize>,
    draining: watch::Receiver<bool>,
    /// Bytes that a reply's payload may have.
    room: u64,
    greeted: bool,
    /// INVOKEs and PREPAREs.
    running: HashMap<u32, Stop>,
    finished: FuturesUnordered<Finishing>,
    /// What was prepared.
    lanes: Lanes,
}

impl Connection {
    async fn serve(&mut self, mut gone: mpsc::UnboundedReceiver<Gone>) -> End {
        let mut draining = self.draining.clone();
        let mut buffer = vec![0; PACKET_BYTES];
        let socket = Arc::clone(&self.socket);
        let mut ending = *draining.borrow();
        loop {
            if ending && self.is_idle() {
                return End::Drained;
            }
            let receive = socket.async_io(tokio::io::Interest::READABLE, |socket| {
                socket.recv(&mut buffer)
            });
            let end = tokio::select! {
                Ok(()) = draining.changed(), if !ending => {
                    ending = true;
                    self.shutdown().await
                }
                Some(gone) = gone.recv() => self.gone(gone).await,
                Some((header, finished)) = self.finished.next(), if !self.finished.is_empty() => {
                    self.finish(&header, finished).await
                }
                () = self.lanes.ended() => Ok(()),
                received = receive => match received {
                    Ok(received) => self.receive(&buffer, received).await,
                    Err(_) => Err(End::Gone),
                },
            };
            if let Err(end) = end {
                return end;
            }
        }
    }

    /// Sends the reply to the request that `header` began, in that one's trace.
    async fn reply(&self, header: &Header, outgoing: Outgoing) -> Result<(), End> {
        let trace = header.trace;
        self.send(Outgoing { trace, ..outgoing }).await
    }

    async fn send(&self, mut outgoing: Outgoing) -> Result<(), End> {
        // Most replies find room, and then the writer need not be woken for them.
        if self.unsent.load(Ordering::Acquire) == 0 {
            match self.in_flight.send(&mut outgoing) {
                Ok(()) => return Ok(()),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(error) => {
                    tracing::debug!(%error, "a reply could not be sent");
                    return Err(End::Gone);
                }
            }
        }
        self.unsent.fetch_add(1, Ordering::Release);
        let mut draining = self.draining.clone();
        let deaf = async {
            // An error means that the host is gone, which is an end, too.
            let _ = draining.wait_for(|draining| *draining).await;
            tokio::time::sleep(FAREWELL).await;
        };
        tokio::select! {
            biased;
            sent = self.replies.send(outgoing) => sent.map_err(|_| End::Gone),
            () = deaf => Err(End::Deaf),
        }
    }

    async fn shutdown(&self) -> Result<(), End> {
        let drain_ms =
            u64::try_from(self.session.host().config().drain().as_millis()).unwrap_or(u64::MAX);
        self.send(encode(
            Op::Shutdown,
            0,
            &wire::Shutdown { drain_ms },
            Vec::new(),
        ))
        .await?;
        self.lanes.retire();
        if self.is_idle() {
            Err(End::Drained)
        } else {
            Ok(())
        }
    }

    /// Nothing is under way.
    fn is_idle(&self) -> bool {
        self.running.is_empty() && self.lanes.is_empty()
    }

    async fn gone(&self, gone: Gone) -> Result<(), End> {
        let body = wire::Gone {
            lease: gone.lease,
            segment: gone.segment.to_string(),
            reason: "expired".to_owned(),
        };
        self.send(encode(Op::Gone, 0, &body, Vec::new())).await
    }

    async fn receive(&mut self, buffer: &[u8], received: Received) -> Result<(), End> {
        if received.truncated {
            let status = Status::new(
                Code::InvalidArgument,
                Reason::BadFrame,
                format!(
                    "a frame was truncated; it takes at most {} bytes and {} descriptors",
                    PACKET_BYTES - 1,
                    wire::FDS_MAX
                ),
            );
            self.send(failure(
                Header::sequence_of(&buffer[..received.bytes]),
                &status,
                "-",
            ))
            .await?;
            return Err(End::Refused);
        }
        if received.bytes == 0 {
            return Err(End::Gone);
        }
        let packet = &buffer[..received.bytes];
        let (header, body, payload) = match Header::decode(packet) {
            Ok(decoded) => decoded,
            Err(error) => {
                let status =
                    Status::new(Code::InvalidArgument, Reason::BadFrame, error.to_string());
                self.send(failure(Header::sequence_of(packet), &status, "-"))
                    .await?;
                return match error {
                    // Where the frame begins and ends was clear.
                    FrameError::Op(_)
                    | FrameError::Payload(_)
                    | FrameError::Reserved(_)
                    | FrameError::Flags(_) => Ok(()),
                    FrameError::Short(_)
                    | FrameError::Magic(_)
                    | FrameError::Version(_)
                    | FrameError::Length { .. }
                    | FrameError::TooLong(_)
                    | FrameError::PayloadTooLong(_) => Err(End::Refused),
                };
            }
        };
        if received.no_room {
            let status = Status::no_descriptors("the descriptors beside the frame cannot be taken");
            return self
                .reply(&header, failure(header.sequence, &status, "-"))
                .await;
        }
        self.request(header, (body, payload), received.fds).await
    }

    async fn request(
        &mut self,
        header: Header,
        (body, payload): (&[u8], &[u8]),
        fds: Vec<OwnedFd>,
    ) -> Result<(), End> {
        let sequence = header.sequence;
        if sequence == 0 || self.running.contains_key(&sequence) {
            let status = Status::new(
                Code::InvalidArgument,
                Reason::BadFrame,
                format!(
                    "sequence {sequence} is {}; choose another",
                    if sequence == 0 {
                        "reserved for pushed frames"
                    } else {
                        "in use by what is under way"
                    }
                ),
            );
            return self.reply(&header, failure(sequence, &status, "-")).await;
        }
        if !self.greeted && header.op != Op::Hello {
            let status = Status::new(
                Code::FailedPrecondition,
                Reason::NoHello,
                "the first frame must be HELLO",
            );
            return self.reply(&header, failure(sequence, &status, "-")).await;
        }
        if header.op == Op::Cancel && fds.is_empty() {
            return self.cancel(&header, body).await;
        }
        if header.op == Op::Prepare && fds.is_empty() {
            return self.prepare(header, body).await;
        }
        let answered = super::trace_span(&header).in_scope(|| {
            respond(
                &self.session,
                header.op,
                sequence,
                (body, payload),
                self.room,
                fds,
            )
        });
        match answered {
            Reply::Frame(outgoing) => {
                self.greeted |= outgoing.op == Op::Welcome;
                self.reply(&header, outgoing).await
            }
            Reply::Last(outgoing) => {
                self.reply(&header, outgoing).await?;
                Err(End::Refused)
            }
            Reply::Running(running) => {
                self.track(header, *running);
                Ok(())
            }
        }
    }

    fn track(
        &mut self,
        header: Header,
        Running {
            call,
            wanted,
            result,
        }: Running,
    ) {
        self.running.insert(header.sequence, Stop::Call(call));
        self.finished.push(Box::pin(async move {
            (header, Finished::Invoke(wanted, joined(result).await))
        }));
    }

    async fn prepare(&mut self, header: Header, body: &[u8]) -> Result<(), End> {
        let (request, id) = match parse::<wire::Prepare>(&self.session, body) {
            Ok(parsed) => parsed,
            Err(status) => {
                let refused = failure(header.sequence, &status, "-");
                return self.reply(&header, refused).await;
            }
        };
        let started = super::trace_span(&header).in_scope(|| {
            let whose = (self.session.caller(), Some(self.session.id));
            self.lanes.start(whose, request, Arc::clone(&id))
        });
        let starting = match started {
            Ok(starting) => starting,
            Err(status) => {
                let refused = failure(header.sequence, &status, &id);
                return self.reply(&header, refused).await;
            }
        };
        self.running
            .insert(header.sequence, Stop::Lane(starting.lane));
        let (socket, result) = (starting.socket.into(), starting.result);
        self.finished.push(Box::pin(async move {
            (header, Finished::Prepare(id, socket, joined(result).await))
        }));
        Ok(())
    }

    async fn finish(&mut self, header: &Header, finished: Finished) -> Result<(), End> {
        self.running.remove(&header.sequence);
        let reply = match finished {
            Finished::Invoke(wanted, result) => {
                calls::invoked(&self.session, header.sequence, &wanted, result)
            }
            Finished::Prepare(id, socket, Ok((prepared, memory))) => {
                let fds = std::iter::once(Arc::new(socket)).chain(memory);
                Answer::of(&prepared)
                    .with(fds.collect(), Vec::new())
                    .framed(Op::Ok, &self.session, header.sequence, &id)
            }
            Finished::Prepare(id, _, Err(status)) => failure(header.sequence, &status, &id),
        };
        self.reply(header, reply).await
    }

    async fn cancel(&self, header: &Header, body: &[u8]) -> Result<(), End> {
        let reply = calls::cancel(&self.session, header.sequence, body, |asked| match asked {
            Cancelling::Sequence(other) => self.running.get(&other).map(Stop::cancel).is_some(),
            Cancelling::Prepared(number) => self.lanes.cancel(number),
        });
        self.reply(header, reply).await
    }
}

pub(super) async fn joined<T>(result: oneshot::Receiver<Result<T, Status>>) -> Result<T, Status> {
    result.await.unwrap_or_else(|_| {
        Err(Status::new(
            Code::Internal,
            Reason::Host,
            "an invocation was lost",
        ))
    })
}

/// Ready when the process behind `pidfd` has exited; never without one.
async fn exited(pidfd: Option<OwnedFd>) {
    let watched = pidfd.and_then(|fd| super::watched(fd).ok());
    match watched {
        Some(watched) if watched.readable().await.is_ok() => {}
        _ => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use rustix::event::{PollFd, PollFlags, Timespec};

    use super::*;
    use crate::config::Config;
    use crate::session::Host;

    /// The next packet, its length; 0 at the end.
    fn receive(client: &FrameSocket) -> usize {
        let timeout = Timespec {
            tv_sec: 10,
            tv_nsec: 0,
        };
        let mut ready = [PollFd::new(client, PollFlags::IN)];
        assert_eq!(
            rustix::event::poll(&mut ready, Some(&timeout)),
            Ok(1),
            "nothing came"
        );
        client.recv(&mut [0; 4096]).expect("a packet").bytes
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_connection_that_is_broken_off_ends_for_its_client() {
        let directory = tempfile::tempdir().expect("a directory");
        let mut config = Config::default();
        config.engine.cache = Some(std::path::PathBuf::new());
        let host = Host::start(config, directory.path()).expect("a host");
        let caller = host.own_caller();
        let account = Arc::clone(caller.account());
        let (client, socket) = FrameSocket::pair().expect("a socket pair");
        let peer = Peer {
            pid: 0,
            uid: 0,
            gid: 0,
            pidfd: None,
        };
        let place = account.connect().expect("a place");
        let (_draining, drained) = watch::channel(false);
        let serving = run(caller, socket, (peer, place), Arc::default(), drained);
        let serving = tokio::spawn(serving);
        let ping = Header {
            op: Op::Ping,
            sequence: 1,
            body_bytes: 0,
            payload_bytes: 0,
            trace: wire::TraceContext::NONE,
        };
        client.send(&[&ping.encode()], &[]).expect("sent");
        assert!(
            receive(&client) > wire::HEADER_BYTES,
            "it is told to say HELLO"
        );
        serving.abort();
        assert!(serving.await.is_err(), "it was broken off");
        assert_eq!(receive(&client), 0);
    }
}
