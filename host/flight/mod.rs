//! Arrow Flight: the same flights, kernels and invocations as the data socket, for stock clients.
//!
//! ```text
//! serve ── accept ──▶ Connection (authority, gathering, times) ──▶ tonic ──▶ Front (a Call) ──▶ Service
//!            └─ over TCP: `remote`, `tls`                          └─▶ health
//!                                                                   ├─▶ info    descriptors, FlightInfo, schemas
//!                                                                   ├─▶ read    DoGet: a segment as messages
//!                                                                   ├─▶ upload  DoPut: messages into a segment
//!                                                Front, bodies ─ values of long messages ─▲
//!                                                                   ├─▶ exchange  DoExchange: batches through a kernel, `outbox` what comes of them
//!                                                                   │       └─▶ frames  those of the data socket: prepared calls, channels
//!                                                                   └─▶ action  DoAction, `invoke` a call in one message
//! ```
//! Only this room knows gRPC and protobuf. No tensor is mapped here: bytes are read and written in
//! chunks, counted. On the unix socket a connection's principal is the uid of the process that connected; over TCP each call's is
//! that of its token or of the connection's certificate.

mod action;
mod arriving;
mod authority;
mod batches;
mod bodies;
mod call;
mod chunks;
mod compressed;
mod connection;
mod exchange;
mod follow;
mod frames;
mod front;
mod gather;
mod goal;
mod guesses;
mod health;
mod info;
mod invoke;
mod messages;
mod metadata;
mod outbox;
mod read;
mod refused;
mod remote;
mod service;
mod staged;
mod ticket;
mod tls;
mod upload;
mod waiting;

use std::fs::File;
use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arrow_flight::flight_service_server::FlightServiceServer;
use futures::stream;
use strait_memory::Charge;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tonic::transport::Server;

use crate::error::Status;
use crate::session::{Caller, Host};
use connection::{Connections, State};
use front::Front;
use health::Health;
use remote::{Remote, RemoteListener, RemoteStream};
use service::Service;

pub use remote::Doors;
pub use tls::{Tls, TlsError, TlsFiles};

/// HTTP/2 windows: with the default of 64 KiB a stream runs at less than half the speed.
const WINDOW_BYTES: u32 = 16 << 20;
/// What a connection may have under way to its reader; Linux cuts it to `net.core.wmem_max`.
const SEND_BUFFER_BYTES: usize = 2 << 20;
/// Longest frame that is taken: with the default of 16 KiB an upload is read in as many pieces.
const FRAME_BYTES: u32 = 256 << 10;
/// Calls at a time on one connection.
const CALLS_MAX: u32 = 1024;
/// Room for a message's metadata beside its longest body.
const METADATA_BYTES: usize = 1 << 20;
/// Pause after a connection that could not be accepted (out of descriptors, for instance).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Such connections are told of once in this time.
const TOLD_EACH: Duration = Duration::from_secs(1);
/// Longest headers of a call, together.
const HEADERS_BYTES: u32 = 16 << 10;
/// Over TCP: a peer of whom nothing came for so long is asked whether it is there,
const KEEPALIVE: Duration = Duration::from_secs(30);
/// and has that much time to say so.
const KEEPALIVE_TIME: Duration = Duration::from_secs(20);
/// How often connections are looked at.
const SWEEP_EACH: Duration = Duration::from_millis(250);

/// Why Flight is not (or no longer) served.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The gRPC server ended.
    #[error("the Flight server ended: {0}")]
    Transport(#[from] tonic::transport::Error),
}

/// Who is at the other end of a connection.
#[derive(Clone, Debug)]
enum Who {
    /// A process of this machine; or why the host did not let it in: each of its calls is told.
    Near(Result<Caller, Status>),
    /// Somebody over TCP: each call says who makes it.
    Far(Arc<Remote>),
}

/// The other end of a connection.
#[derive(Clone, Debug)]
struct Peer {
    who: Who,
    /// None: in a test.
    connection: Option<Arc<State>>,
}

impl Peer {
    fn of(who: Who) -> Self {
        Self {
            who,
            connection: None,
        }
    }
}

/// What connections come from.
trait Listener {
    type Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static;

    /// After what silence peers are asked whether they are there.
    const KEEPALIVE: Option<Duration>;

    /// The next connection, ready to be used, and who that is.
    fn next(
        &mut self,
        host: &Arc<Host>,
    ) -> impl Future<Output = io::Result<(Self::Stream, Peer)>> + Send;
}

impl Listener for UnixListener {
    type Stream = UnixStream;

    /// Linux says when a process ends, and one that is stopped may go on.
    const KEEPALIVE: Option<Duration> = None;

    async fn next(&mut self, host: &Arc<Host>) -> io::Result<(UnixStream, Peer)> {
        let (stream, _) = self.accept().await?;
        // Best effort: with a short buffer two processes wake each other all the time.
        let _ = rustix::net::sockopt::set_socket_send_buffer_size(&stream, SEND_BUFFER_BYTES);
        let uid = stream.peer_cred().ok();
        let caller = host.caller(uid.map(|credentials| credentials.uid()));
        Ok((stream, Peer::of(Who::Near(caller))))
    }
}

impl Listener for RemoteListener {
    type Stream = RemoteStream;

    const KEEPALIVE: Option<Duration> = Some(KEEPALIVE);

    async fn next(&mut self, _: &Arc<Host>) -> io::Result<(RemoteStream, Peer)> {
        let (stream, remote) = self.next().await?;
        Ok((stream, Peer::of(Who::Far(Arc::new(remote)))))
    }
}

/// Serves Flight on `listener` until `shutdown`; then accepts nothing more and answers when the
/// calls at hand are done. Streams end at their clients' pace: bound the wait, and drop the future.
///
/// # Errors
/// [`ServeError`].
pub fn serve(
    host: Arc<Host>,
    listener: UnixListener,
    shutdown: impl Future<Output = ()>,
) -> impl Future<Output = Result<(), ServeError>> {
    // Its spare descriptor is there before anybody can count the host's.
    let accepting = Accepting::new(Arc::clone(&host), listener);
    serve_connections(host, accepting, shutdown)
}

/// Serves Flight over TCP until `shutdown`, to whom `doors` let in: each call has a token, or its connection a certificate. With
/// open doors there is no authentication, so `listener` must be on a loopback address; whoever can connect can read and put as
/// the host's own user, and do nothing else.
///
/// # Errors
/// [`ServeError`].
pub fn serve_tcp(
    host: Arc<Host>,
    listener: TcpListener,
    doors: Doors,
    shutdown: impl Future<Output = ()>,
) -> impl Future<Output = Result<(), ServeError>> {
    // Its spare descriptor is there before anybody can count the host's.
    let accepting = Accepting::new(Arc::clone(&host), RemoteListener::new(listener, doors));
    serve_connections(host, accepting, shutdown)
}

/// Connections as they come. When no descriptor is left for one, a spare makes room for it to be
/// taken and closed: its client is told, and does not wait for a host that is full.
struct Accepting<L> {
    host: Arc<Host>,
    listener: L,
    spare: Option<File>,
    told: Option<Instant>,
}

impl<L: Listener> Accepting<L> {
    fn new(host: Arc<Host>, listener: L) -> Self {
        Self {
            host,
            listener,
            spare: spare(),
            told: None,
        }
    }

    async fn next(&mut self) -> (L::Stream, Peer, Option<Charge>) {
        loop {
            let error = match self.listener.next(&self.host).await {
                Ok((stream, peer)) => {
                    // Whose uid is unknown is told so, and served nothing; whoever is far has no place until it says who it is.
                    let place = match &peer.who {
                        Who::Near(caller) => caller.as_ref().ok().map(|c| c.account().connect()),
                        Who::Far(_) => None,
                    };
                    match place.transpose() {
                        Ok(place) => return (stream, peer, place),
                        Err(status) => {
                            self.tell(&status);
                            continue;
                        }
                    }
                }
                Err(error) => error,
            };
            self.tell(&error);
            if self.spare.take().is_some() {
                let _ = tokio::time::timeout(ACCEPT_PAUSE, self.listener.next(&self.host)).await;
            }
            self.spare = spare();
            tokio::time::sleep(ACCEPT_PAUSE).await;
        }
    }
}

impl<L> Accepting<L> {
    fn tell(&mut self, error: &dyn std::fmt::Display) {
        if self.told.is_none_or(|told| told.elapsed() > TOLD_EACH) {
            self.told = Some(Instant::now());
            tracing::warn!(%error, "a Flight connection could not be accepted");
        }
    }
}

fn spare() -> Option<File> {
    File::open("/dev/null").ok()
}

async fn serve_connections<L: Listener>(
    host: Arc<Host>,
    accepting: Accepting<L>,
    shutdown: impl Future<Output = ()>,
) -> Result<(), ServeError> {
    let config = host.config();
    let connections = Connections::new(&host);
    let flight = FlightServiceServer::new(Service::new(Arc::clone(&host)))
        .max_decoding_message_size(config.message_bytes_max().saturating_add(METADATA_BYTES))
        // `read` bounds what goes out, with an error that says what else the client can do.
        .max_encoding_message_size(usize::MAX);
    let accepted = stream::unfold(accepting, |mut accepting| async {
        let (stream, peer, place) = accepting.next().await;
        let connection: io::Result<_> = Ok(connections.add(stream, peer, place));
        Some((connection, accepting))
    });
    let health = Health::new().await;
    let shutdown = async {
        shutdown.await;
        health.drain().await;
        connections.drain();
    };
    let served = Server::builder()
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES)
        .max_frame_size(FRAME_BYTES)
        .max_concurrent_streams(CALLS_MAX)
        .http2_max_header_list_size(HEADERS_BYTES)
        .http2_keepalive_interval(L::KEEPALIVE)
        .http2_keepalive_timeout(Some(KEEPALIVE_TIME))
        .serve_with_incoming_shutdown(
            Front::new(flight, health.service(), Arc::clone(&host)),
            accepted,
            shutdown,
        );
    let swept = async {
        let mut ticks = tokio::time::interval(SWEEP_EACH);
        loop {
            ticks.tick().await;
            connections.sweep(Instant::now());
        }
    };
    tokio::select! {
        served = served => Ok(served?),
        () = swept => Ok(()),
    }
}
