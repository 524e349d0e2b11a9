//! The data socket: frames, descriptors, sessions. `docs/protocol.md` is the contract.
//!
//! ```text
//! serve ── accept ──▶ connection (one task) ── requests ──▶ session::Host
//!   └── sweep: leases that run out ──▶ GONE          └── writer (one task) ──▶ socket
//! ```
//! Only this room knows the frames.

mod connection;
mod requests;

use std::collections::HashMap;
use std::future::Future;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use strait_client::wire;
use strait_memory::FrameListener;
use tokio::io::unix::AsyncFd;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use crate::lease::SessionId;
use crate::session::{Gone, Host};

/// How often leases are looked at: how late a GONE can be.
const SWEEP: Duration = Duration::from_millis(100);
/// Most connections at a time.
const CONNECTIONS_MAX: usize = 1024;

/// Where GONE goes, by session.
#[derive(Debug, Default)]
struct Pushes(Mutex<HashMap<SessionId, mpsc::UnboundedSender<Gone>>>);

impl Pushes {
    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<SessionId, mpsc::UnboundedSender<Gone>>> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn send(&self, gone: Gone) {
        if let Some(session) = self.lock().get(&gone.session) {
            // The connection may be closing, which ends its leases anyway.
            let _ = session.send(gone);
        }
    }
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
    let pushes = Arc::new(Pushes::default());
    let (draining, drained) = watch::channel(false);
    let mut connections = JoinSet::new();
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
            ready = listener.readable() => {
                let mut ready = ready?;
                match ready.try_io(|listener| listener.get_ref().accept()) {
                    Ok(Ok(socket)) if connections.len() < CONNECTIONS_MAX => {
                        let connection = connection::run(Arc::clone(&host), socket, Arc::clone(&pushes), drained.clone());
                        connections.spawn(connection);
                    }
                    Ok(Ok(_)) => tracing::warn!(connections = CONNECTIONS_MAX, "a connection was refused: too many"),
                    Ok(Err(error)) => {
                        // Out of descriptors, for instance: nothing that trying at once would mend.
                        tracing::warn!(%error, "a connection could not be accepted");
                        tokio::time::sleep(SWEEP).await;
                    }
                    Err(_would_block) => {}
                }
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

/// A frame on its way out.
#[derive(Debug)]
struct Outgoing {
    op: wire::Op,
    sequence: u32,
    body: Vec<u8>,
    fds: Vec<std::os::fd::OwnedFd>,
}
