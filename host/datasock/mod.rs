//! The data socket: frames, descriptors, sessions. `docs/protocol.md` is the contract.
//!
//! ```text
//! serve ── accept ──▶ connection (one task) ── dispatch ──▶ handlers ──▶ session::Caller
//!   │                                  └── lane (a thread each): PREPARE, CALL
//!   └── sweep: leases that run out ──▶ GONE        └── writer (one task) ──▶ socket
//! ```
//! Only this room knows the frames.

mod answer;
mod channel;
mod connection;
mod dispatch;
mod elsewhere;
mod frames;
mod handlers;
mod in_flight;
mod lane;
mod line;

use std::collections::HashMap;
use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Mutex, MutexGuard};
use strait_memory::{Charge, FrameListener, FrameSocket, Peer, SpareDescriptor};
use strait_protocol::Header;
use tokio::io::unix::AsyncFd;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use crate::error::{Code, Reason, Status, out_of_descriptors};
use crate::lease::SessionId;
use crate::session::{Caller, Gone, Host};

/// How often leases are looked at: how late a GONE can be.
const SWEEP: Duration = Duration::from_millis(100);

/// Connections that are being told why they are not served; further ones are closed at once.
const REFUSED_MAX: usize = 64;

/// What is logged while a request is taken stands in it, if the request belongs to a trace.
fn trace_span(header: &Header) -> tracing::Span {
    match header.trace.id() {
        Some(id) => tracing::info_span!("request", op = ?header.op, trace_id = %id),
        None => tracing::Span::none(),
    }
}

/// Bytes of payload that a frame on `socket` has room for.
fn payload_room(socket: &FrameSocket) -> u64 {
    // If Linux does not say, no tensor travels in frames.
    let buffer = rustix::net::sockopt::socket_send_buffer_size(socket).unwrap_or(0);
    strait_protocol::payload_room(buffer) as u64
}

/// Where GONE goes, by session.
#[derive(Debug, Default)]
struct Pushes(Mutex<HashMap<SessionId, mpsc::UnboundedSender<Gone>>>);

impl Pushes {
    fn lock(&self) -> MutexGuard<'_, HashMap<SessionId, mpsc::UnboundedSender<Gone>>> {
        self.0.lock()
    }

    fn send(&self, gone: Gone) {
        if let Some(session) = self.lock().get(&gone.session) {
            // The connection may be closing, which ends its leases anyway.
            let _ = session.send(gone);
        }
    }
}

/// Log lines about connections that were refused: at most one a second.
#[derive(Debug, Default)]
struct Refusals {
    untold: u64,
    told: Option<Instant>,
}

impl Refusals {
    fn count(&mut self, why: &str) {
        self.untold += 1;
        if self
            .told
            .is_none_or(|at| at.elapsed() >= Duration::from_secs(1))
        {
            tracing::warn!(refused = self.untold, why, "connections were refused");
            (self.untold, self.told) = (0, Some(Instant::now()));
        }
    }
}

/// Somebody who connected.
struct Accepted {
    socket: FrameSocket,
    /// Nothing but the spare's place was left for it.
    full: Option<std::io::Error>,
}

/// The next connection, if need be at the spare's place.
fn accept(listener: &FrameListener, spare: &mut SpareDescriptor) -> std::io::Result<Accepted> {
    match listener.accept() {
        Ok(socket) => Ok(Accepted { socket, full: None }),
        // Linux says so before it looks whether anybody waits.
        Err(error) if out_of_descriptors(&error) => {
            spare.give_up();
            listener.accept().map(|socket| Accepted {
                socket,
                full: Some(error),
            })
        }
        Err(error) => Err(error),
    }
}

/// Who connected, with its place, or why it cannot be served.
fn admit(host: &Arc<Host>, socket: &FrameSocket) -> Result<(Peer, Caller, Charge), Status> {
    let peer = socket.peer().map_err(cannot_connect)?;
    let caller = host.caller(Some(peer.uid))?;
    let place = caller.account().connect()?;
    Ok((peer, caller, place))
}

fn cannot_connect(error: std::io::Error) -> Status {
    if out_of_descriptors(&error) {
        return Status::no_descriptors("the connection cannot be served");
    }
    let message = format!("the host cannot serve this connection: {error}");
    Status::new(Code::Internal, Reason::Host, message)
}

/// Serves the data socket until `shutdown`; then tells every client SHUTDOWN, lets running
/// invocations finish within the drain time, and closes. Also ends the leases that run out.
///
/// # Errors
/// If the listener cannot be watched.
pub async fn serve(
    host: Arc<Host>,
    listener: FrameListener,
    shutdown: impl Future<Output = ()>,
) -> std::io::Result<()> {
    listener.set_nonblocking(true)?;
    let listener = watched(listener)?;
    host.serve_frames(Arc::new(elsewhere::Elsewhere));
    let pushes = Arc::new(Pushes::default());
    let (draining, drained) = watch::channel(false);
    let mut connections = JoinSet::new();
    let mut spare = SpareDescriptor::new()?;
    let mut refusals = Refusals::default();
    let mut refused = JoinSet::new();
    let mut sweep = tokio::time::interval(SWEEP);
    sweep.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut shutdown = std::pin::pin!(shutdown);
    loop {
        tokio::select! {
            () = &mut shutdown => break,
            _ = sweep.tick() => {
                for gone in host.expire(Instant::now()) {
                    pushes.send(gone);
                }
            }
            Some(_) = connections.join_next(), if !connections.is_empty() => {}
            Some(_) = refused.join_next(), if !refused.is_empty() => {}
            ready = listener.readable() => {
                let mut ready = ready?;
                match ready.try_io(|listener| accept(listener.get_ref(), &mut spare)) {
                    Ok(Ok(Accepted { socket, full: None })) => match admit(&host, &socket) {
                        Ok((peer, caller, place)) => {
                            let connection = connection::run(caller, socket, (peer, place), Arc::clone(&pushes), drained.clone());
                            connections.spawn(connection);
                        }
                        Err(status) => {
                            refusals.count(&status.message);
                            // Beside this loop: whoever says nothing is waited for, and that is nobody else's time.
                            if refused.len() < REFUSED_MAX {
                                refused.spawn(async move { connection::refuse(socket, &status).await });
                            }
                        }
                    },
                    Ok(Ok(Accepted { socket, full: Some(error) })) => {
                        let status = cannot_connect(error);
                        refusals.count(&status.message);
                        connection::refuse(socket, &status).await;
                    }
                    Ok(Err(error)) => {
                        refusals.count(&error.to_string());
                        tokio::time::sleep(SWEEP).await;
                    }
                    Err(_would_block) => {}
                }
                spare.refill();
            }
        }
    }
    // Nobody is connected any more if the receivers are gone.
    let _ = draining.send(true);
    let drain = host.config().drain();
    let finished = async { while connections.join_next().await.is_some() {} };
    if tokio::time::timeout(drain, finished).await.is_err() {
        tracing::warn!(
            drain_ms = drain.as_millis(),
            "connections were still busy at the end of the drain time"
        );
        connections.shutdown().await;
    }
    Ok(())
}

/// `fd` with tokio's reactor behind it.
fn watched<T: std::os::fd::AsRawFd>(fd: T) -> std::io::Result<AsyncFd<T>> {
    // `AsyncFd::new` is deprecated because a type could lie about its descriptor; its successor
    // is unsafe for that reason alone. The types here own theirs for as long as they live.
    #[expect(
        deprecated,
        reason = "the successor needs `unsafe` for a promise that our types keep"
    )]
    AsyncFd::new(fd)
}
