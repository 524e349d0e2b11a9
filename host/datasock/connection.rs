//! One connection: reads frames, answers them, pushes what happens.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use strait_client::wire::{self, FrameError, Header, Op};
use strait_memory::{FrameSocket, Peer, Received};
use tokio::io::unix::AsyncFd;
use tokio::sync::{mpsc, oneshot, watch};

use super::requests::{ENDED_AT_ONCE, Reply, Running, encode, failure, respond};
use super::{Outgoing, Pushes};
use crate::error::{Code, Status};
use crate::lease::Principal;
use crate::session::{Call, Gone, Host, Invoked, Session};

/// Longest packet: one byte more than a frame may have, so that a longer one is noticed.
const PACKET_BYTES: usize = wire::HEADER_BYTES + wire::BODY_BYTES_MAX + 1;
/// Replies that may wait for a slow client before its requests wait, too.
const REPLIES_WAITING: usize = 32;
/// What a closed connection's last replies get to be written.
const FAREWELL: Duration = Duration::from_secs(1);
/// How long somebody who is refused is waited for to say something.
const REFUSAL: Duration = Duration::from_millis(100);
/// INVOKEs of one connection that may be under way.
const INVOKES_MAX: usize = 256;

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

/// Serves one connection to its end. Ending it cancels what runs and ends its leases.
pub(super) async fn run(
    host: Arc<Host>,
    socket: FrameSocket,
    peer: Peer,
    pushes: Arc<Pushes>,
    draining: watch::Receiver<bool>,
) {
    if overflow_uid() == Some(peer.uid) {
        let status = Status::new(
            Code::PermissionDenied,
            "PRINCIPAL",
            format!(
                "uid {} stands for every user that is unknown in this user namespace; connect from the host's own",
                peer.uid
            ),
        );
        return refuse(socket, &status).await;
    }
    let socket = match prepare(socket) {
        Ok(socket) => socket,
        Err(error) => {
            tracing::warn!(%error, "a connection could not be prepared");
            return;
        }
    };
    let (replies, waiting) = mpsc::channel(REPLIES_WAITING);
    let unsent = Arc::new(AtomicUsize::new(0));
    let mut writer = tokio::spawn(write(Arc::clone(&socket), waiting, Arc::clone(&unsent)));
    let session = host.open_session(Principal { uid: peer.uid });
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
        session,
        socket,
        replies,
        unsent,
        draining,
        greeted: false,
        running: HashMap::new(),
        finished: FuturesUnordered::new(),
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

/// The uid that Linux shows for users that a namespace does not map.
fn overflow_uid() -> Option<u32> {
    std::fs::read_to_string("/proc/sys/kernel/overflowuid")
        .ok()?
        .trim()
        .parse()
        .ok()
}

async fn write(socket: Sockets, mut waiting: mpsc::Receiver<Outgoing>, unsent: Arc<AtomicUsize>) {
    while let Some(outgoing) = waiting.recv().await {
        let sent = socket
            .async_io(tokio::io::Interest::WRITABLE, |socket| {
                outgoing.send(socket)
            })
            .await;
        unsent.fetch_sub(1, Ordering::Release);
        if let Err(error) = sent {
            tracing::debug!(%error, "a reply could not be sent");
            // Whoever sends next sees the closed channel and ends.
            return;
        }
    }
}

impl Outgoing {
    /// Sends it at once, or not at all.
    fn send(&self, socket: &FrameSocket) -> std::io::Result<()> {
        // Whoever made it has held it against the longest body.
        let body_bytes = u32::try_from(self.body.len()).map_err(std::io::Error::other)?;
        let header = Header {
            op: self.op,
            sequence: self.sequence,
            body_bytes,
        }
        .encode();
        let fds: Vec<_> = self.fds.iter().map(AsFd::as_fd).collect();
        socket.send(&[&header, &self.body], &fds)
    }
}

type Finished = (u32, Arc<str>, wire::Invoke, Result<Arc<Invoked>, Status>);

struct Connection {
    session: Session,
    socket: Sockets,
    /// To the writer, for what the socket does not take at once.
    replies: mpsc::Sender<Outgoing>,
    /// Replies that are with the writer. This task alone adds to them.
    unsent: Arc<AtomicUsize>,
    draining: watch::Receiver<bool>,
    greeted: bool,
    running: HashMap<u32, Call>,
    finished: FuturesUnordered<std::pin::Pin<Box<dyn Future<Output = Finished> + Send + Sync>>>,
}

impl Connection {
    async fn serve(&mut self, mut gone: mpsc::UnboundedReceiver<Gone>) -> End {
        let mut draining = self.draining.clone();
        let mut buffer = vec![0; PACKET_BYTES];
        let socket = Arc::clone(&self.socket);
        let mut ending = *draining.borrow();
        loop {
            if ending && self.running.is_empty() {
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
                Some(finished) = self.finished.next(), if !self.finished.is_empty() => self.finish(finished).await,
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

    async fn send(&self, outgoing: Outgoing) -> Result<(), End> {
        // Most replies find room, and then the writer need not be woken for them.
        if self.unsent.load(Ordering::Acquire) == 0 {
            match outgoing.send(self.socket.get_ref()) {
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
        if self.running.is_empty() {
            Err(End::Drained)
        } else {
            Ok(())
        }
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
                "BAD_FRAME",
                format!(
                    "a frame was cut: at most {} bytes and {} descriptors",
                    wire::HEADER_BYTES + wire::BODY_BYTES_MAX,
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
        let (header, body) = match Header::decode(packet) {
            Ok(decoded) => decoded,
            Err(error) => {
                let status = Status::new(Code::InvalidArgument, "BAD_FRAME", error.to_string());
                self.send(failure(Header::sequence_of(packet), &status, "-"))
                    .await?;
                return match error {
                    // Where the frame begins and ends was clear.
                    FrameError::Op(_) | FrameError::Flags(_) => Ok(()),
                    FrameError::Short(_)
                    | FrameError::Magic(_)
                    | FrameError::Version(_)
                    | FrameError::Length { .. }
                    | FrameError::TooLong(_) => Err(End::Refused),
                };
            }
        };
        if received.no_room {
            let status = Status::no_descriptors("the descriptors beside the frame cannot be taken");
            return self.send(failure(header.sequence, &status, "-")).await;
        }
        self.request(header, body, received.fds).await
    }

    async fn request(&mut self, header: Header, body: &[u8], fds: Vec<OwnedFd>) -> Result<(), End> {
        let sequence = header.sequence;
        if sequence == 0 || self.running.contains_key(&sequence) {
            let status = Status::new(
                Code::InvalidArgument,
                "BAD_FRAME",
                format!(
                    "sequence {sequence} is {}; choose another",
                    if sequence == 0 {
                        "reserved for pushed frames"
                    } else {
                        "in use by a running INVOKE"
                    }
                ),
            );
            return self.send(failure(sequence, &status, "-")).await;
        }
        if !self.greeted && header.op != Op::Hello {
            let status = Status::new(
                Code::FailedPrecondition,
                "NO_HELLO",
                "the first frame must be HELLO",
            );
            return self.send(failure(sequence, &status, "-")).await;
        }
        if header.op == Op::Invoke && self.running.len() >= INVOKES_MAX {
            let status = Status::new(
                Code::ResourceExhausted,
                "QUOTA_EXCEEDED",
                format!("{INVOKES_MAX} INVOKEs of this connection are under way; wait for one"),
            );
            return self.send(failure(sequence, &status, "-")).await;
        }
        if header.op == Op::Cancel && fds.is_empty() {
            return self.cancel(sequence, body).await;
        }
        match respond(&self.session, header.op, sequence, body, fds) {
            Reply::Frame(outgoing) => {
                self.greeted |= outgoing.op == Op::Welcome;
                self.send(outgoing).await
            }
            Reply::Last(outgoing) => {
                self.send(outgoing).await?;
                Err(End::Refused)
            }
            Reply::Running(running) => {
                self.track(sequence, *running);
                Ok(())
            }
        }
    }

    fn track(
        &mut self,
        sequence: u32,
        Running {
            call,
            request_id,
            invoke,
            result,
        }: Running,
    ) {
        self.running.insert(sequence, call);
        self.finished.push(Box::pin(async move {
            (sequence, request_id, invoke, joined(result).await)
        }));
    }

    async fn finish(
        &mut self,
        (sequence, request_id, invoke, result): Finished,
    ) -> Result<(), End> {
        self.running.remove(&sequence);
        let reply = super::requests::invoked(&self.session, sequence, &invoke, &request_id, result);
        self.send(reply).await
    }

    async fn cancel(&self, sequence: u32, body: &[u8]) -> Result<(), End> {
        let reply = super::requests::cancel(&self.session, sequence, body, |other| {
            self.running.get(&other).map(Call::cancel).is_some()
        });
        self.send(reply).await
    }
}

async fn joined(
    result: oneshot::Receiver<Result<Arc<Invoked>, Status>>,
) -> Result<Arc<Invoked>, Status> {
    result.await.unwrap_or_else(|_| {
        Err(Status::new(
            Code::Internal,
            "HOST",
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
