//! Arrow Flight: the same flights, kernels and invocations as the data socket, for stock clients.
//!
//! ```text
//! serve ── accept ──▶ Repaired (authority) ──▶ tonic ──▶ Service (one call: a Call)
//!                                                          ├─▶ info    descriptors, FlightInfo, schemas
//!                                                          ├─▶ read    DoGet: a segment as messages
//!                                                          ├─▶ upload  DoPut: messages into a segment
//!                                                          └─▶ action  DoAction
//! ```
//! Only this room knows gRPC and protobuf. No tensor is mapped here: bytes are read and written in
//! chunks, counted. A connection's principal is the uid of the process that connected.

mod action;
mod authority;
mod call;
mod info;
mod read;
mod service;
mod upload;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use arrow_flight::flight_service_server::FlightServiceServer;
use futures::stream::{self, Stream};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tonic::transport::Server;
use tonic::transport::server::{Connected, TcpConnectInfo};

use crate::session::Host;
use authority::Repaired;
use service::Service;

/// HTTP/2 windows: with the default of 64 KiB a stream runs at less than half the speed.
const WINDOW_BYTES: u32 = 16 << 20;
/// What a connection may have under way to its reader; Linux cuts it to `net.core.wmem_max`.
const SEND_BUFFER_BYTES: usize = 2 << 20;
/// Calls at a time on one connection.
const CALLS_MAX: u32 = 1024;
/// Room for a message's metadata beside its longest body.
const METADATA_BYTES: usize = 1 << 20;
/// Pause after a connection that could not be accepted (out of descriptors, for instance).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Why Flight is not (or no longer) served.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// `/proc` does not say which uid stands for users that it cannot name.
    #[error("cannot read {OVERFLOW_UID}: {0}; is /proc mounted?")]
    OverflowUid(std::io::Error),
    /// The gRPC server ended.
    #[error("the Flight server ended: {0}")]
    Transport(#[from] tonic::transport::Error),
}

/// The uid that stands for every user outside our user namespace.
const OVERFLOW_UID: &str = "/proc/sys/kernel/overflowuid";

fn overflow_uid() -> std::io::Result<u32> {
    let text = std::fs::read_to_string(OVERFLOW_UID)?;
    text.trim().parse().map_err(std::io::Error::other)
}

/// Who is at the other end of a connection.
#[derive(Clone, Copy, Debug)]
struct Peer {
    /// None: Linux did not say.
    uid: Option<u32>,
    /// Over TCP: served as the host's own user, with less.
    remote: bool,
}

impl Peer {
    fn of<T>(request: &tonic::Request<T>) -> Self {
        let extensions = request.extensions();
        let tcp = extensions.get::<TcpConnectInfo>().map(|_| Self {
            uid: Some(rustix::process::geteuid().as_raw()),
            remote: true,
        });
        let unknown = Self {
            uid: None,
            remote: true,
        };
        extensions.get::<Self>().copied().or(tcp).unwrap_or(unknown)
    }
}

impl Connected for Repaired<UnixStream> {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        Peer {
            uid: self
                .stream
                .peer_cred()
                .ok()
                .map(|credentials| credentials.uid()),
            remote: false,
        }
    }
}

/// Serves Flight on `listener` until `shutdown`; then accepts nothing more and answers when the
/// calls at hand are done. Streams end at their clients' pace: bound the wait, and drop the future.
///
/// # Errors
/// [`ServeError`].
pub async fn serve(
    host: Arc<Host>,
    listener: UnixListener,
    shutdown: impl Future<Output = ()>,
) -> Result<(), ServeError> {
    let accepted = stream::unfold(listener, |listener| async move {
        loop {
            match listener.accept().await {
                Ok((connection, _)) => {
                    // Best effort: with a short buffer two processes wake each other all the time.
                    let _ = rustix::net::sockopt::set_socket_send_buffer_size(
                        &connection,
                        SEND_BUFFER_BYTES,
                    );
                    let connection: std::io::Result<_> = Ok(Repaired::new(connection));
                    return Some((connection, listener));
                }
                Err(error) => {
                    tracing::warn!(%error, "a Flight connection could not be accepted");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    });
    serve_connections(host, accepted, shutdown).await
}

/// Serves a part of Flight over TCP until `shutdown`: lists, reads and puts of the host's own user.
/// There is no authentication, so `listener` must be on a loopback address; whoever can connect
/// can read and put. Kernel calls and actions that change something are refused, and no mapping is told.
///
/// # Errors
/// [`ServeError`].
pub async fn serve_tcp(
    host: Arc<Host>,
    listener: TcpListener,
    shutdown: impl Future<Output = ()>,
) -> Result<(), ServeError> {
    let accepted = stream::unfold(listener, |listener| async move {
        loop {
            match listener.accept().await {
                Ok((connection, _)) => {
                    // Best effort: without it the end of a message may wait for an acknowledgement.
                    let _ = connection.set_nodelay(true);
                    let connection: std::io::Result<_> = Ok(connection);
                    return Some((connection, listener));
                }
                Err(error) => {
                    tracing::warn!(%error, "a Flight connection over TCP could not be accepted");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    });
    serve_connections(host, accepted, shutdown).await
}

async fn serve_connections<C>(
    host: Arc<Host>,
    accepted: impl Stream<Item = std::io::Result<C>>,
    shutdown: impl Future<Output = ()>,
) -> Result<(), ServeError>
where
    C: AsyncRead + AsyncWrite + Connected + Unpin + Send + 'static,
{
    let overflow_uid = overflow_uid().map_err(ServeError::OverflowUid)?;
    let message_bytes_max = host.config().message_bytes_max();
    let service = FlightServiceServer::new(Service::new(host, overflow_uid))
        .max_decoding_message_size(message_bytes_max.saturating_add(METADATA_BYTES))
        // `read` bounds what goes out, with an error that says what else the client can do.
        .max_encoding_message_size(usize::MAX);
    Server::builder()
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES)
        .max_concurrent_streams(CALLS_MAX)
        .add_service(service)
        .serve_with_incoming_shutdown(accepted, shutdown)
        .await?;
    Ok(())
}
