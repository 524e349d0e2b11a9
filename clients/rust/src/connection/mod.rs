//! One connection, shared by many callers.
//!
//! ```text
//! callers ── request ─▶ send at once, or queue while the socket is full ─▶ host
//!    ▲                                                                      │
//!    └─ Pending (a future) ◀─ Routes, by sequence ◀─ receive ◀──────────────┘
//! ```
//! `reader` receives and says whose turn that is, `routes` knows who waits for which sequence,
//! `renewal` when which lease is to be renewed; the last two do no I/O. It needs no async runtime,
//! so a [`Pending`] can be awaited in any of them or waited for by a thread.

mod frames;
mod pending;
mod reader;
mod renewal;
mod routes;

use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::task::Waker;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::event::EventfdFlags;
use serde::Serialize;
use strait_memory::FrameSocket;

use self::frames::Frame;
pub(crate) use self::frames::{Payload, Reply};
pub(crate) use self::pending::Pending;
use self::reader::Reading;
use self::renewal::{Leases, Renewal};
pub(crate) use self::routes::Waiter;
use self::routes::{Route, Routes};
use crate::error::Error;
use crate::wire::{self, Op};

/// A connection to a host, ended by the drop of its last holder.
#[derive(Debug)]
pub(crate) struct Connection {
    shared: Arc<Shared>,
    reader: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Debug)]
struct Shared {
    socket: FrameSocket,
    /// Makes the reader thread look at `state` again: new work to send, an earlier renewal, its
    /// turn to receive, the end.
    wake: OwnedFd,
    /// The process that connected; threads and mappings do not survive a fork.
    owner: i32,
    reading: Reading,
    /// Held for short: over maps and one non-blocking send, never over a wake or a wait.
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    routes: Routes,
    /// Frames that found the socket full, in order.
    outgoing: VecDeque<Frame>,
    leases: Leases,
    /// When the host said it would end.
    shutdown: Option<Instant>,
    end: Option<End>,
    /// Whether the reader thread waits for frames, so that a task need not wake it.
    listening: bool,
    /// When a caller last received for itself.
    led: Option<Instant>,
}

/// What goes with a request's JSON.
#[derive(Debug, Default)]
pub(crate) struct Beside<'a> {
    /// The bytes of inline tensors.
    pub(crate) payload: &'a [u8],
    pub(crate) fds: Vec<OwnedFd>,
}

/// How the connection ended.
#[derive(Clone, Debug)]
enum End {
    Disconnected,
    Protocol(String),
}

impl From<End> for Error {
    fn from(end: End) -> Self {
        match end {
            End::Disconnected => Error::Disconnected,
            End::Protocol(what) => Error::Protocol(what),
        }
    }
}

impl Connection {
    /// Takes over a connected socket and starts the reader.
    ///
    /// # Errors
    /// [`Error::Linux`] if Linux grants no thread or no event descriptor.
    pub(crate) fn open(socket: FrameSocket, renew: bool) -> Result<Arc<Self>, Error> {
        Self::open_for(here(), socket, renew)
    }

    fn open_for(owner: i32, socket: FrameSocket, renew: bool) -> Result<Arc<Self>, Error> {
        let refused = |what| move |source: io::Error| Error::Linux { what, source };
        socket
            .set_nonblocking(true)
            .map_err(refused("make the data socket non-blocking"))?;
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let wake = rustix::event::eventfd(0, flags)
            .map_err(|error| refused("make an event descriptor")(error.into()))?;
        let state = State {
            routes: Routes::default(),
            outgoing: VecDeque::new(),
            leases: Leases::new(renew),
            shutdown: None,
            end: None,
            listening: false,
            led: None,
        };
        let shared = Arc::new(Shared {
            socket,
            wake,
            owner,
            reading: Reading::new(),
            state: Mutex::new(state),
        });
        let reading = Arc::clone(&shared);
        let reader = std::thread::Builder::new()
            .name("strait-client".into())
            .spawn(move || reading.read())
            .map_err(refused("start the reader thread"))?;
        Ok(Arc::new(Self {
            shared,
            reader: Mutex::new(Some(reader)),
        }))
    }

    /// Sends a request with descriptors; the answer is to be awaited.
    pub(crate) fn request<B: Serialize>(
        self: &Arc<Self>,
        op: Op,
        body: &B,
        beside: Beside<'_>,
        waiter: Waiter,
    ) -> Result<Pending, Error> {
        self.shared.check_owner()?;
        let mut state = self.shared.state.lock();
        if let Some(end) = &state.end {
            return Err(end.clone().into());
        }
        let sequence = state.routes.add(Route::Caller(waiter, None));
        let sent = Frame::new(op, sequence, body, beside.payload, beside.fds)
            .and_then(|frame| self.shared.transmit(&mut state, frame));
        if let Err(error) = sent {
            state.routes.remove(sequence);
            return Err(error);
        }
        if waiter == Waiter::Task && !state.listening {
            self.shared.wake_reader();
        }
        Ok(Pending {
            connection: Arc::clone(self),
            op,
            sequence,
            done: false,
        })
    }

    /// Bytes of inline tensors that one request has room for.
    pub(crate) fn payload_room(&self) -> usize {
        let buffer = rustix::net::sockopt::socket_send_buffer_size(&self.shared.socket);
        // If Linux does not say, no tensor travels in frames.
        wire::payload_room(buffer.unwrap_or(0))
    }

    /// Waits on the calling thread for a future whose requests are [`Waiter::Thread`], and receives
    /// its replies unless somebody else does.
    pub(crate) fn wait<F: Future>(&self, future: F) -> F::Output {
        self.shared.wait(future)
    }

    /// Whether this is the process that connected.
    pub(crate) fn check_owner(&self) -> Result<(), Error> {
        self.shared.check_owner()
    }

    /// Ends a running INVOKE; the INVOKE's own reply tells how it went.
    pub(crate) fn cancel(&self, sequence: u32) {
        if self.shared.check_owner().is_ok() {
            self.shared.cancel(&mut self.shared.state.lock(), sequence);
        }
    }

    /// Takes charge of a lease that the host granted: of its renewal, if leases are renewed, and of
    /// noting its end.
    pub(crate) fn register(&self, lease: u64, life: Duration) {
        let now = Instant::now();
        let sooner = self.shared.state.lock().leases.insert(lease, life, now);
        if sooner {
            self.shared.wake_reader();
        }
    }

    /// The host gave leases a new life because a caller asked for it.
    pub(crate) fn renewed(&self, leases: &[u64], life: Duration) {
        let now = Instant::now();
        let sooner = self.shared.state.lock().leases.renewed(leases, life, now);
        if sooner {
            self.shared.wake_reader();
        }
    }

    /// Gives a lease back without waiting for the answer.
    pub(crate) fn release(&self, lease: u64) {
        // Checked before the lock: a fork may have copied it while another thread held it.
        if self.shared.check_owner().is_err() {
            return;
        }
        let mut state = self.shared.state.lock();
        if state.leases.remove(lease) {
            self.shared.release(&mut state, vec![lease]);
        }
    }

    pub(crate) fn check_lease(&self, lease: u64) -> Result<(), Error> {
        self.shared.check_owner()?;
        let state = self.shared.state.lock();
        if let Some(end) = &state.end {
            return Err(end.clone().into());
        }
        match state.leases.why_gone(lease) {
            None => Ok(()),
            Some(reason) => Err(Error::LeaseExpired {
                message: format!(
                    "lease {lease} is over ({reason}); its pages stay readable until they are \
                     dropped, for anything else map it again"
                ),
                request_id: "-".into(),
            }),
        }
    }

    /// The time that the host still gives, once it announced its end.
    pub(crate) fn draining(&self) -> Option<Duration> {
        self.shared.check_owner().ok()?;
        let end = self.shared.state.lock().shutdown?;
        Some(end.saturating_duration_since(Instant::now()))
    }

    /// Whether it is over, as far as this side knows. Without a system call.
    pub(crate) fn has_ended(&self) -> bool {
        self.shared.state.lock().end.is_some()
    }

    /// Ends the connection for all its holders and waits for the reader.
    pub(crate) fn close(&self) {
        if self.shared.check_owner().is_err() {
            return;
        }
        // Segments may hold the socket for longer; the host is to see its end now.
        // It fails only if the host was faster.
        let _ = self.shared.socket.shutdown();
        self.shared.finish(End::Disconnected);
        let reader = self.reader.lock().take();
        if let Some(reader) = reader
            && reader.thread().id() != std::thread::current().id()
        {
            drop(reader.join());
        }
    }
}

impl Drop for Connection {
    /// Does not wait for the reader, which lets go of the socket within moments.
    fn drop(&mut self) {
        if self.shared.check_owner().is_ok() {
            self.shared.finish(End::Disconnected);
        }
    }
}

fn here() -> i32 {
    rustix::process::getpid().as_raw_nonzero().get()
}

impl Shared {
    fn check_owner(&self) -> Result<(), Error> {
        let here = here();
        if here == self.owner {
            Ok(())
        } else {
            Err(Error::Forked {
                owner: self.owner,
                here,
            })
        }
    }

    fn wake_reader(&self) {
        // The only way to fail is a full counter, and then the reader is awake anyway.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    /// Sends now, or later if the socket is full. Frames keep their order.
    fn transmit(&self, state: &mut State, frame: Frame) -> Result<(), Error> {
        if state.outgoing.is_empty() {
            match frame.send(&self.socket) {
                Ok(()) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(lost(error)),
            }
        }
        state.outgoing.push_back(frame);
        self.wake_reader();
        Ok(())
    }

    /// A request whose answer does not matter to its sender. If it cannot be sent the connection
    /// is over, which ends whatever the request was to end.
    fn tell<B: Serialize>(&self, state: &mut State, op: Op, body: &B, route: Route) {
        if state.end.is_some() {
            return;
        }
        let sequence = state.routes.add(route);
        let sent = Frame::new(op, sequence, body, &[], Vec::new())
            .and_then(|frame| self.transmit(state, frame));
        if sent.is_err() {
            state.routes.remove(sequence);
        }
    }

    fn release(&self, state: &mut State, leases: Vec<u64>) {
        if !leases.is_empty() {
            let body = wire::Leases {
                leases,
                lease_ms: None,
                request_id: None,
            };
            self.tell(state, Op::Release, &body, Route::Nobody);
        }
    }

    fn cancel(&self, state: &mut State, sequence: u32) {
        let body = wire::Cancel {
            sequence: Some(sequence),
            prepared: None,
            request_id: None,
        };
        self.tell(state, Op::Cancel, &body, Route::Nobody);
    }

    fn renew(&self, state: &mut State, renewal: Renewal) {
        let lease_ms = u64::try_from(renewal.life.as_millis()).ok();
        let leases = renewal.leases.clone();
        let body = wire::Leases {
            leases,
            lease_ms,
            request_id: None,
        };
        self.tell(state, Op::Renew, &body, Route::Renewal(renewal));
    }

    /// Ends everything that waits, and the reader thread. The first end stands.
    fn finish(&self, end: End) {
        let mut state = self.state.lock();
        state.end.get_or_insert(end);
        state.outgoing.clear();
        let wakers = state.routes.end();
        drop(state);
        wakers.into_iter().for_each(Waker::wake);
        self.wake_reader();
    }
}

fn lost(error: io::Error) -> Error {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, NotConnected};
    match error.kind() {
        BrokenPipe | ConnectionReset | NotConnected => Error::Disconnected,
        _ => Error::Linux {
            what: "send a request",
            source: error,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_forked_child_is_refused_before_any_lock() {
        let (client, host) = FrameSocket::pair().expect("a socket pair");
        let parent = here() + 1;
        let connection = Connection::open_for(parent, client, true).expect("a thread");
        let locked = connection.shared.state.lock();
        let body = wire::Empty::default();
        let error = connection
            .request(Op::Ping, &body, Beside::default(), Waiter::Thread)
            .expect_err("it is a fork");
        assert!(
            matches!(error, Error::Forked { owner, here: child } if owner == parent && child == here()),
            "{error}"
        );
        assert!(matches!(
            connection.check_lease(1),
            Err(Error::Forked { .. })
        ));
        connection.release(1);
        connection.cancel(1);
        connection.close();
        assert_eq!(connection.draining(), None);
        drop(locked);
        host.set_nonblocking(true)
            .expect("a socket can be non-blocking");
        let nothing = host
            .recv(&mut [0; 64])
            .expect_err("the parent's connection is left alone");
        assert_eq!(nothing.kind(), io::ErrorKind::WouldBlock);
    }

    #[test]
    fn a_request_that_fits_no_frame_is_not_sent() {
        let (client, _host) = FrameSocket::pair().expect("a socket pair");
        let connection = Connection::open(client, true).expect("a thread");
        let body = wire::Name {
            name: "x".repeat(wire::BODY_BYTES_MAX),
            request_id: None,
        };
        let error = connection
            .request(Op::Lookup, &body, Beside::default(), Waiter::Thread)
            .expect_err("too long");
        assert!(error.to_string().contains("at most 61440"), "{error}");
        let mut state = connection.shared.state.lock();
        assert!(state.routes.abandon(1).is_none());
        assert_eq!(state.routes.add(Route::Nobody), 2);
    }
}
