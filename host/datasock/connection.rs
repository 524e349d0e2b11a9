//! One connection: reads frames, answers them, pushes what happens.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use strait_client::wire::{self, FrameError, Header, Op};
use strait_memory::{FrameSocket, Peer, Received};
use tokio::io::unix::AsyncFd;
use tokio::sync::{mpsc, oneshot, watch};

use super::requests::{Reply, Running, encode, failure, respond};
use super::{Outgoing, Pushes};
use crate::engine::CancelToken;
use crate::error::{Code, Status};
use crate::lease::Principal;
use crate::session::{Gone, Host, Invoked, Session};

/// Longest packet: one byte more than a frame may have, so that a longer one is noticed.
const PACKET_BYTES: usize = wire::HEADER_BYTES + wire::BODY_BYTES_MAX + 1;
/// Replies that may wait for a slow client before its requests wait, too.
const REPLIES_WAITING: usize = 32;
/// What a closed connection's last replies get to be written.
const FAREWELL: Duration = Duration::from_secs(1);
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
}

/// Serves one connection to its end. Ending it cancels what runs and ends its leases.
pub(super) async fn run(
    host: Arc<Host>,
    socket: FrameSocket,
    pushes: Arc<Pushes>,
    draining: watch::Receiver<bool>,
) {
    let (peer, socket) = match prepare(socket) {
        Ok(prepared) => prepared,
        Err(error) => {
            tracing::warn!(%error, "a connection could not be prepared");
            return;
        }
    };
    let (replies, waiting) = mpsc::channel(REPLIES_WAITING);
    let mut writer = tokio::spawn(write(Arc::clone(&socket), waiting));
    if overflow_uid() == Some(peer.uid) {
        let status = Status::new(
            Code::PermissionDenied,
            "PRINCIPAL",
            format!(
                "uid {} stands for every user that is unknown in this user namespace; connect from the host's own",
                peer.uid
            ),
        );
        let refused = failure(0, &status, "-");
        // The writer may have ended with the connection.
        let _ = replies.send(refused).await;
    } else {
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
            replies: replies.clone(),
            greeted: false,
            running: HashMap::new(),
            finished: FuturesUnordered::new(),
        };
        // Beside all of it: `serve` may be waiting for a client that does not read its replies.
        tokio::select! {
            () = exited(peer.pidfd) => {}
            () = connection.serve(gone, draining) => {}
        }
        pushes.lock().remove(&id);
        for cancel in connection.running.values() {
            cancel.cancel();
        }
        tracing::info!(session = id, "disconnected");
    }
    drop(replies);
    // What has been answered is still written, unless the client does not read it.
    if tokio::time::timeout(FAREWELL, &mut writer).await.is_err() {
        writer.abort();
    }
}

fn prepare(socket: FrameSocket) -> std::io::Result<(Peer, Sockets)> {
    socket.set_nonblocking(true)?;
    let peer = socket.peer()?;
    Ok((peer, Arc::new(super::watched(socket)?)))
}

/// The uid that Linux shows for users that a namespace does not map.
fn overflow_uid() -> Option<u32> {
    std::fs::read_to_string("/proc/sys/kernel/overflowuid")
        .ok()?
        .trim()
        .parse()
        .ok()
}

async fn write(socket: Sockets, mut waiting: mpsc::Receiver<Outgoing>) {
    while let Some(Outgoing {
        op,
        sequence,
        body,
        fds,
    }) = waiting.recv().await
    {
        let Ok(body_bytes) = u32::try_from(body.len()) else {
            return;
        };
        let header = Header {
            op,
            sequence,
            body_bytes,
        }
        .encode();
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        let sent = socket
            .async_io(tokio::io::Interest::WRITABLE, |socket| {
                socket.send(&[&header, &body], &fds)
            })
            .await;
        if let Err(error) = sent {
            tracing::debug!(%error, "a reply could not be sent");
            // Whoever sends next sees the closed channel and ends.
            return;
        }
    }
}

type Finished = (u32, Arc<str>, wire::Invoke, Result<Arc<Invoked>, Status>);

struct Connection {
    session: Session,
    socket: Sockets,
    replies: mpsc::Sender<Outgoing>,
    greeted: bool,
    running: HashMap<u32, CancelToken>,
    finished: FuturesUnordered<std::pin::Pin<Box<dyn Future<Output = Finished> + Send + Sync>>>,
}

impl Connection {
    async fn serve(
        &mut self,
        mut gone: mpsc::UnboundedReceiver<Gone>,
        mut draining: watch::Receiver<bool>,
    ) {
        let mut buffer = vec![0; PACKET_BYTES];
        let socket = Arc::clone(&self.socket);
        let mut ending = *draining.borrow();
        loop {
            if ending && self.running.is_empty() {
                return;
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
            match end {
                Ok(()) => {}
                Err(End::Gone | End::Refused | End::Drained) => return,
            }
        }
    }

    async fn send(&self, outgoing: Outgoing) -> Result<(), End> {
        self.replies.send(outgoing).await.map_err(|_| End::Gone)
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
            cancel,
            request_id,
            invoke,
            result,
        }: Running,
    ) {
        self.running.insert(sequence, cancel);
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
            self.running.get(&other).map(CancelToken::cancel).is_some()
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
