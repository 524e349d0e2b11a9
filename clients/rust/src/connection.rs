//! One connection, shared by many callers.
//!
//! ```text
//! callers ── request ─▶ send at once, or queue while the socket is full ─▶ host
//!    ▲                                                                      │
//!    └─ Pending (a future) ◀─ State.waiting by sequence ◀─ receive ◀────────┘
//! ```
//! Whoever receives (see `reader.rs`) hands replies with their descriptors to whoever waits for
//! that sequence, and releases what arrives for nobody. It needs no async runtime, so a
//! [`Pending`] can be awaited in any of them or waited for by a thread.

use std::collections::{HashMap, VecDeque};
use std::future::Future;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::EventfdFlags;
use serde::Serialize;
use serde::de::DeserializeOwned;
use strait_memory::FrameSocket;

use crate::error::Error;
use crate::lease::{Leases, Renewal};
use crate::reader::{Reading, wait};
use crate::wire::{self, BODY_BYTES_MAX, FDS_MAX, Header, Op};

/// A connection to a host, ended by the drop of its last holder.
#[derive(Debug)]
pub(crate) struct Connection {
    shared: Arc<Shared>,
    reader: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) socket: FrameSocket,
    /// Makes the reader thread look at `state` again: new work to send, an earlier renewal, its
    /// turn to receive, the end.
    pub(crate) wake: OwnedFd,
    /// The process that connected; threads and mappings do not survive a fork.
    owner: i32,
    pub(crate) reading: Reading,
    /// Held for short: over maps and one non-blocking send, never over a wake or a wait.
    state: Mutex<State>,
}

#[derive(Debug)]
pub(crate) struct State {
    sequence: u32,
    waiting: HashMap<u32, Waiting>,
    /// Frames that found the socket full, in order.
    pub(crate) outgoing: VecDeque<Frame>,
    pub(crate) leases: Leases,
    /// When the host said it would end.
    shutdown: Option<Instant>,
    pub(crate) end: Option<End>,
    /// Whether the reader thread waits for frames, so that a task need not wake it.
    pub(crate) listening: bool,
    /// When a caller last received for itself.
    pub(crate) led: Option<Instant>,
}

/// Who waits: a thread can receive its reply itself, a task cannot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Face {
    Thread,
    Task,
}

/// What becomes of a reply.
#[derive(Debug)]
enum Waiting {
    /// Somebody waits, and is to be woken if they asked already.
    Caller(Face, Option<Waker>),
    /// It is here and nobody took it yet.
    Arrived(Reply),
    /// Nobody wants it any more; its leases are released when it comes.
    Nobody,
    /// The reader's own.
    Renewal(Renewal),
}

#[derive(Debug)]
pub(crate) struct Frame {
    bytes: Vec<u8>,
    fds: Vec<OwnedFd>,
}

/// How the connection ended.
#[derive(Clone, Debug)]
pub(crate) enum End {
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

/// A reply frame with its descriptors.
#[derive(Debug)]
pub(crate) struct Reply {
    op: Op,
    body: Vec<u8>,
    fds: Vec<OwnedFd>,
}

impl Reply {
    /// Reads an OK (or WELCOME); an ERROR becomes [`Error::Remote`].
    pub(crate) fn read<T: DeserializeOwned>(self) -> Result<(T, Vec<OwnedFd>), Error> {
        if self.op == Op::Error {
            return Err(parse::<wire::Failure>(&self.body)?.into());
        }
        Ok((parse(&self.body)?, self.fds))
    }

    /// The leases that it grants, without caring what it answers.
    fn leases(&self) -> Vec<u64> {
        let Ok(body) = serde_json::from_slice::<serde_json::Value>(&self.body) else {
            return Vec::new();
        };
        let results = body["results"].as_array().into_iter().flatten();
        let entries = std::iter::once(&body).chain(results);
        entries
            .filter_map(|entry| entry["lease"].as_u64())
            .collect()
    }
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, Error> {
    serde_json::from_slice(body).map_err(|error| {
        let what = std::any::type_name::<T>()
            .rsplit("::")
            .next()
            .unwrap_or_default();
        Error::Protocol(format!("its reply is not a {what}: {error}"))
    })
}

impl Frame {
    fn new<B: Serialize>(op: Op, sequence: u32, body: &B) -> Result<Self, Error> {
        let body = serde_json::to_vec(body).expect("bodies are maps with text keys");
        let too_long = || Error::RequestTooLong {
            bytes: body.len(),
            max: BODY_BYTES_MAX,
        };
        if body.len() > BODY_BYTES_MAX {
            return Err(too_long());
        }
        let body_bytes = u32::try_from(body.len()).map_err(|_| too_long())?;
        let mut bytes = Header {
            op,
            sequence,
            body_bytes,
        }
        .encode()
        .to_vec();
        bytes.extend_from_slice(&body);
        Ok(Self {
            bytes,
            fds: Vec::new(),
        })
    }

    pub(crate) fn send(&self, socket: &FrameSocket) -> io::Result<()> {
        let fds: Vec<_> = self.fds.iter().map(AsFd::as_fd).collect();
        socket.send(&[&self.bytes], &fds)
    }
}

impl State {
    /// Takes a sequence that no request under way has.
    fn expect(&mut self, waiting: Waiting) -> u32 {
        loop {
            self.sequence = self.sequence.wrapping_add(1);
            if self.sequence != 0 && !self.waiting.contains_key(&self.sequence) {
                self.waiting.insert(self.sequence, waiting);
                return self.sequence;
            }
        }
    }

    /// Whether a task waits, which cannot receive by itself.
    pub(crate) fn task_waits(&self) -> bool {
        let mut waiting = self.waiting.values();
        waiting.any(|waiting| matches!(waiting, Waiting::Caller(Face::Task, _)))
    }

    /// What wakes a thread that waits.
    pub(crate) fn waiting_thread(&self) -> Option<Waker> {
        self.waiting.values().find_map(|waiting| match waiting {
            Waiting::Caller(Face::Thread, waker) => waker.clone(),
            _ => None,
        })
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
            sequence: 0,
            waiting: HashMap::new(),
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
        fds: Vec<OwnedFd>,
        face: Face,
    ) -> Result<Pending, Error> {
        self.shared.check_owner()?;
        let mut state = self.shared.lock();
        if let Some(end) = &state.end {
            return Err(end.clone().into());
        }
        let sequence = state.expect(Waiting::Caller(face, None));
        let sent = Frame::new(op, sequence, body)
            .and_then(|frame| self.shared.transmit(&mut state, Frame { fds, ..frame }));
        if let Err(error) = sent {
            state.waiting.remove(&sequence);
            return Err(error);
        }
        if face == Face::Task && !state.listening {
            self.shared.wake_reader();
        }
        Ok(Pending {
            connection: Arc::clone(self),
            op,
            sequence,
            face,
            done: false,
        })
    }

    /// Waits on the calling thread for a future whose requests are [`Face::Thread`], and receives
    /// its replies unless somebody else does.
    pub(crate) fn wait<F: Future>(&self, future: F) -> F::Output {
        wait(future, |woken| self.shared.serve_until(woken))
    }

    /// Whether this is the process that connected.
    pub(crate) fn check_owner(&self) -> Result<(), Error> {
        self.shared.check_owner()
    }

    /// Ends a running INVOKE; the INVOKE's own reply tells how it went.
    pub(crate) fn cancel(&self, sequence: u32) {
        if self.shared.check_owner().is_ok() {
            self.shared.cancel(&mut self.shared.lock(), sequence);
        }
    }

    pub(crate) fn register(&self, lease: u64, life: Duration) {
        if self
            .shared
            .lock()
            .leases
            .insert(lease, life, Instant::now())
        {
            self.shared.wake_reader();
        }
    }

    pub(crate) fn renewed(&self, lease: u64, life: Duration) {
        if self
            .shared
            .lock()
            .leases
            .renewed(&[lease], life, Instant::now())
        {
            self.shared.wake_reader();
        }
    }

    /// Gives a lease back without waiting for the answer.
    pub(crate) fn release(&self, lease: u64) {
        // Checked before the lock: a fork may have copied it while another thread held it.
        if self.shared.check_owner().is_err() {
            return;
        }
        let mut state = self.shared.lock();
        if state.leases.remove(lease) {
            self.shared.release(&mut state, vec![lease]);
        }
    }

    pub(crate) fn check_lease(&self, lease: u64) -> Result<(), Error> {
        self.shared.check_owner()?;
        let state = self.shared.lock();
        if let Some(end) = &state.end {
            return Err(end.clone().into());
        }
        match state.leases.why_gone(lease) {
            None => Ok(()),
            Some(reason) => Err(Error::LeaseExpired {
                message: format!(
                    "lease {lease} is over ({reason}); its pages stay readable until they are \
                     dropped, for anything else map the tensor again"
                ),
                request_id: "-".into(),
            }),
        }
    }

    /// The time that the host still gives, once it announced its end.
    pub(crate) fn draining(&self) -> Option<Duration> {
        self.shared.check_owner().ok()?;
        let end = self.shared.lock().shutdown?;
        Some(end.saturating_duration_since(Instant::now()))
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
        let reader = self
            .reader
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
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
    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics between two changes that belong together.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

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

    pub(crate) fn wake_reader(&self) {
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
    fn tell<B: Serialize>(&self, state: &mut State, op: Op, body: &B, waiting: Waiting) {
        if state.end.is_some() {
            return;
        }
        let sequence = state.expect(waiting);
        let sent = Frame::new(op, sequence, body).and_then(|frame| self.transmit(state, frame));
        if sent.is_err() {
            state.waiting.remove(&sequence);
        }
    }

    fn release(&self, state: &mut State, leases: Vec<u64>) {
        if !leases.is_empty() {
            let body = wire::Leases {
                leases,
                lease_ms: None,
                request_id: None,
            };
            self.tell(state, Op::Release, &body, Waiting::Nobody);
        }
    }

    fn cancel(&self, state: &mut State, sequence: u32) {
        let body = wire::Cancel {
            sequence,
            request_id: None,
        };
        self.tell(state, Op::Cancel, &body, Waiting::Nobody);
    }

    pub(crate) fn renew(&self, state: &mut State, renewal: Renewal) {
        let lease_ms = u64::try_from(renewal.life.as_millis()).ok();
        let leases = renewal.leases.clone();
        let body = wire::Leases {
            leases,
            lease_ms,
            request_id: None,
        };
        self.tell(state, Op::Renew, &body, Waiting::Renewal(renewal));
    }

    /// Takes one frame from the socket if there is one. The caller has the right to receive, and
    /// keeps it until whoever the frame is for was woken: a thread that gets the right looks then
    /// whether it was woken, and not again before the next frame.
    pub(crate) fn receive(&self, buffer: &mut [u8]) {
        let received = match self.socket.recv(buffer) {
            Ok(received) => received,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
            Err(_) => return self.finish(End::Disconnected),
        };
        let dispatched = if received.truncated || received.no_room {
            Err(End::Protocol(format!(
                "a frame of more than {} bytes, or with more than {FDS_MAX} descriptors or more \
                 than this process may open",
                buffer.len()
            )))
        } else if received.bytes == 0 {
            Err(End::Disconnected)
        } else {
            self.dispatch(&buffer[..received.bytes], received.fds)
        };
        if let Err(end) = dispatched {
            self.finish(end);
        }
    }

    fn dispatch(&self, packet: &[u8], fds: Vec<OwnedFd>) -> Result<(), End> {
        let (header, body) =
            Header::decode(packet).map_err(|error| End::Protocol(error.to_string()))?;
        let bad = |error: Error| End::Protocol(error.to_string());
        match header.op {
            Op::Gone => {
                let gone: wire::Gone = parse(body).map_err(bad)?;
                self.lock().leases.gone(gone.lease, gone.reason);
            }
            Op::Shutdown => {
                let shutdown: wire::Shutdown = parse(body).map_err(bad)?;
                let drain = Duration::from_millis(shutdown.drain_ms);
                self.lock().shutdown = Instant::now().checked_add(drain);
            }
            // About a frame that the host could not read; it closes after that.
            Op::Error if header.sequence == 0 => {
                let failure: wire::Failure = parse(body).map_err(bad)?;
                return Err(End::Protocol(format!(
                    "it refused a frame: {}",
                    failure.message
                )));
            }
            Op::Ok | Op::Welcome | Op::Error => {
                self.deliver(
                    header.sequence,
                    Reply {
                        op: header.op,
                        body: body.to_vec(),
                        fds,
                    },
                );
            }
            op => return Err(End::Protocol(format!("{op:?} is not for clients"))),
        }
        Ok(())
    }

    fn deliver(&self, sequence: u32, reply: Reply) {
        let mut state = self.lock();
        match state.waiting.remove(&sequence) {
            Some(Waiting::Caller(_, waker)) => {
                state.waiting.insert(sequence, Waiting::Arrived(reply));
                drop(state);
                if let Some(waker) = waker {
                    waker.wake();
                }
            }
            Some(Waiting::Renewal(renewal)) => self.after_renewal(&mut state, renewal, reply),
            Some(Waiting::Nobody) | None => self.release(&mut state, reply.leases()),
            // A second reply to one request; the first one stands.
            Some(arrived @ Waiting::Arrived(_)) => {
                state.waiting.insert(sequence, arrived);
                self.release(&mut state, reply.leases());
            }
        }
    }

    fn after_renewal(&self, state: &mut State, renewal: Renewal, reply: Reply) {
        match reply.read::<wire::Renewed>() {
            Ok((renewed, _)) => {
                let life = Duration::from_millis(renewed.expires_ms);
                // The reader plans anew after each frame, so it sees the new times.
                state.leases.renewed(&renewal.leases, life, Instant::now());
            }
            Err(Error::LeaseExpired { message, .. }) => match renewal.leases[..] {
                [lease] => state.leases.gone(lease, message),
                // One of them is over and none was renewed: find out which.
                _ => renewal.leases.iter().for_each(|&lease| {
                    self.renew(
                        state,
                        Renewal {
                            leases: vec![lease],
                            life: renewal.life,
                        },
                    );
                }),
            },
            // Not repeated: the leases then end on their own, and GONE tells.
            Err(_) => {}
        }
    }

    /// Ends everything that waits, and the reader thread. The first end stands.
    pub(crate) fn finish(&self, end: End) {
        let mut state = self.lock();
        state.end.get_or_insert(end);
        state.outgoing.clear();
        state
            .waiting
            .retain(|_, waiting| matches!(waiting, Waiting::Caller(..) | Waiting::Arrived(_)));
        let waiting = state.waiting.values_mut();
        let wakers: Vec<Waker> = waiting
            .filter_map(|waiting| match waiting {
                Waiting::Caller(_, waker) => waker.take(),
                _ => None,
            })
            .collect();
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

/// A request under way.
///
/// Dropping it takes the interest away: a running INVOKE is cancelled, and leases that still
/// arrive are released.
#[derive(Debug)]
pub(crate) struct Pending {
    connection: Arc<Connection>,
    op: Op,
    sequence: u32,
    face: Face,
    done: bool,
}

impl Pending {
    pub(crate) fn sequence(&self) -> u32 {
        self.sequence
    }
}

impl Future for Pending {
    type Output = Result<Reply, Error>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        // A future that was carried over a fork must not touch the lock.
        if let Err(error) = self.connection.shared.check_owner() {
            return Poll::Ready(Err(error));
        }
        let mut state = self.connection.shared.lock();
        let answer = match state.waiting.remove(&self.sequence) {
            Some(Waiting::Arrived(reply)) => Ok(reply),
            Some(Waiting::Caller(..)) if state.end.is_none() => {
                let waker = Some(context.waker().clone());
                state
                    .waiting
                    .insert(self.sequence, Waiting::Caller(self.face, waker));
                return Poll::Pending;
            }
            _ => Err(state.end.clone().unwrap_or(End::Disconnected).into()),
        };
        drop(state);
        self.done = true;
        Poll::Ready(answer)
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        let shared = &self.connection.shared;
        if self.done || shared.check_owner().is_err() {
            return;
        }
        let mut state = shared.lock();
        match state.waiting.remove(&self.sequence) {
            Some(Waiting::Arrived(reply)) => shared.release(&mut state, reply.leases()),
            Some(Waiting::Caller(..)) if state.end.is_none() => {
                state.waiting.insert(self.sequence, Waiting::Nobody);
                if self.op == Op::Invoke {
                    shared.cancel(&mut state, self.sequence);
                }
            }
            _ => {}
        }
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
        let locked = connection.shared.lock();
        let body = wire::Empty::default();
        let error = connection
            .request(Op::Ping, &body, Vec::new(), Face::Thread)
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
    fn sequences_skip_zero_and_those_under_way() {
        let (client, _host) = FrameSocket::pair().expect("a socket pair");
        let connection = Connection::open(client, true).expect("a thread");
        let mut state = connection.shared.lock();
        state.sequence = u32::MAX - 1;
        let taken: Vec<u32> = (0..3).map(|_| state.expect(Waiting::Nobody)).collect();
        assert_eq!(taken, [u32::MAX, 1, 2]);
        state.sequence = u32::MAX - 1;
        assert_eq!(state.expect(Waiting::Nobody), 3);
    }

    #[test]
    fn a_request_that_fits_no_frame_is_not_sent() {
        let (client, _host) = FrameSocket::pair().expect("a socket pair");
        let connection = Connection::open(client, true).expect("a thread");
        let body = wire::Name {
            name: "x".repeat(BODY_BYTES_MAX),
            request_id: None,
        };
        let error = connection
            .request(Op::Lookup, &body, Vec::new(), Face::Thread)
            .expect_err("too long");
        assert!(error.to_string().contains("at most 61440"), "{error}");
        assert!(connection.shared.lock().waiting.is_empty());
    }
}
