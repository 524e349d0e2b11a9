//! One connection: its bytes on the way to HTTP/2, and how long it may keep the host waiting.
//!
//! [`Connection`] notes when bytes move, when a frame was begun and is not whole, and since when
//! the peer takes nothing. [`Connections::sweep`] looks at those times and breaks the connections
//! that have kept the host waiting too long: HTTP/2 itself would wait for ever.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, Waker, ready};
use std::time::{Duration, Instant};

use parking_lot::{Mutex, MutexGuard};
use strait_memory::{Budget, Charge};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Sleep;
use tonic::transport::server::Connected;

use super::authority::AuthorityRepair;
use super::gather::{BYTES_MAX as GATHERED_BYTES_MAX, Gathered};
use super::{Peer, Who};
use crate::error::Status;
use crate::session::{Caller, Host};

/// While the host ends: a connection on which nothing moves for so long, and for which the host
/// does nothing, is not waited for.
const SILENCE_AT_THE_END: Duration = Duration::from_secs(1);

/// A connection on which nothing moved for so long gives back what it was charged for gathering.
const IDLE: Duration = Duration::from_secs(1);

/// Connections over TCP at a time on which no call has shown yet who makes it.
const STRANGERS_MAX: usize = 256;

/// What a peer gets to close its side after the host has closed its own.
const FAREWELL: Duration = Duration::from_secs(1);

#[derive(Debug)]
struct Times {
    /// The last byte in either direction.
    moved: Instant,
    /// The peer has begun a frame (or not even the first one) and is waited for.
    begun: Option<Instant>,
    /// The peer takes nothing of what there is to send.
    blocked: Option<Instant>,
    /// No call on it has shown yet who makes it.
    stranger: Option<Instant>,
    broken: bool,
    task: Option<Waker>,
}

/// What is known of a connection while it lives.
#[derive(Debug)]
pub(super) struct State {
    // Held for a few loads and stores.
    times: Mutex<Times>,
    working: AtomicUsize,
    gathers: AtomicBool,
    /// It was charged for what it gathers.
    is_charged: AtomicBool,
    /// Its place among the connections of its principal.
    place: Mutex<Option<Charge>>,
}

impl State {
    fn new(is_stranger: bool, place: Option<Charge>) -> Self {
        let now = Instant::now();
        Self {
            times: Mutex::new(Times {
                moved: now,
                begun: Some(now),
                blocked: None,
                stranger: is_stranger.then_some(now),
                broken: false,
                task: None,
            }),
            working: AtomicUsize::new(0),
            gathers: AtomicBool::new(true),
            is_charged: AtomicBool::new(false),
            place: Mutex::new(place),
        }
    }

    /// A call has shown who makes it: from the first one on the connection is among that one's.
    ///
    /// # Errors
    /// `QUOTA_EXCEEDED`, `BUDGET_EXCEEDED`: there is no place for it.
    pub(super) fn admit(&self, caller: &Caller) -> Result<(), Status> {
        if self.times().stranger.is_some() {
            let place = caller.account().connect()?;
            *self.place.lock() = Some(place);
            self.times().stranger = None;
        }
        Ok(())
    }

    fn times(&self) -> MutexGuard<'_, Times> {
        self.times.lock()
    }

    fn break_off(&self, why: &str) {
        let mut times = self.times();
        if !times.broken {
            times.broken = true;
            tracing::info!("a Flight connection was closed: {why}");
        }
        let task = times.task.take();
        drop(times);
        if let Some(task) = task {
            task.wake();
        }
    }

    /// Whether what it sends is put together for the socket, which is a copy.
    pub(super) fn gathers(&self) -> bool {
        self.gathers.load(Ordering::Relaxed)
    }

    /// The host does something for a call of this connection until the guard drops.
    pub(super) fn working(self: &Arc<Self>) -> Working {
        self.working.fetch_add(1, Ordering::Relaxed);
        Working(Arc::clone(self))
    }
}

/// The host is at work.
#[derive(Debug)]
pub(super) struct Working(Arc<State>);

impl Drop for Working {
    fn drop(&mut self) {
        self.0.working.fetch_sub(1, Ordering::Relaxed);
        // What comes of it may take its time to leave.
        self.0.times().moved = Instant::now();
    }
}

/// All connections of a listener.
#[derive(Debug)]
pub(super) struct Connections {
    states: Mutex<Vec<Weak<State>>>,
    request_time: Duration,
    stall: Duration,
    draining: Arc<AtomicBool>,
    budget: Arc<Budget>,
}

impl Connections {
    pub(super) fn new(host: &Host) -> Self {
        let config = host.config();
        let (request_time, stall) = (config.request_time(), config.stall());
        Self {
            states: Mutex::default(),
            budget: Arc::clone(host.budget()),
            request_time,
            stall,
            draining: Arc::default(),
        }
    }

    fn states(&self) -> MutexGuard<'_, Vec<Weak<State>>> {
        self.states.lock()
    }

    pub(super) fn add<S>(&self, stream: S, peer: Peer, place: Option<Charge>) -> Connection<S> {
        let is_stranger = matches!(&peer.who, Who::Far(_));
        let state = Arc::new(State::new(is_stranger, place));
        if is_stranger {
            self.make_room();
        }
        self.states().push(Arc::downgrade(&state));
        Connection {
            stream,
            repair: AuthorityRepair::default(),
            gathered: Gathered::default(),
            draining: Arc::clone(&self.draining),
            budget: Arc::clone(&self.budget),
            flushing: Flushing::Done,
            farewell: None,
            peer: Peer {
                connection: Some(Arc::clone(&state)),
                ..peer
            },
            state,
        }
    }

    /// Breaks the oldest connection of a stranger, if there are as many as there may be.
    fn make_room(&self) {
        let states: Vec<_> = self.states().iter().filter_map(Weak::upgrade).collect();
        let strangers = states.iter().filter_map(|state| {
            let times = state.times();
            let is_there = !times.broken;
            times.stranger.filter(|_| is_there).map(|at| (at, state))
        });
        let strangers: Vec<_> = strangers.collect();
        if strangers.len() >= STRANGERS_MAX
            && let Some((_, oldest)) = strangers.into_iter().min_by_key(|(at, _)| *at)
        {
            oldest.break_off("too many connections have not shown yet whose they are");
        }
    }

    /// From now on nobody is waited for who neither takes nor gives anything.
    pub(super) fn drain(&self) {
        self.draining.store(true, Ordering::Relaxed);
    }

    /// Breaks the connections that keep the host waiting.
    pub(super) fn sweep(&self, now: Instant) {
        let mut live = Vec::new();
        self.states().retain(|state| {
            live.extend(state.upgrade());
            state.strong_count() > 0
        });
        let draining = self.draining.load(Ordering::Relaxed);
        for state in live {
            let mut times = state.times();
            let for_long = |since: Option<Instant>, most: Duration| {
                since.is_some_and(|since| now.saturating_duration_since(since) > most)
            };
            let why = if for_long(times.begun, self.request_time) {
                "it did not finish what it began to send (setting server.request_ms)"
            } else if for_long(times.blocked, self.stall) {
                "it read nothing of what was sent (setting server.stall_ms)"
            } else if for_long(times.stranger, self.request_time) {
                "no call on it showed who makes it (setting server.request_ms)"
            } else if draining
                && state.working.load(Ordering::Relaxed) == 0
                && for_long(Some(times.moved), SILENCE_AT_THE_END)
            {
                "the host ends, and nothing moved on it"
            } else {
                let is_idle = for_long(Some(times.moved), IDLE);
                if is_idle && state.is_charged.load(Ordering::Relaxed) {
                    // It looks for itself, see `poll_read`.
                    let task = times.task.take();
                    drop(times);
                    if let Some(task) = task {
                        task.wake();
                    }
                }
                continue;
            };
            drop(times);
            state.break_off(why);
        }
    }
}

/// Whether what was written is in the socket: TLS keeps bytes of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flushing {
    Done,
    Due,
    /// The socket is full, and wakes the task when it is not.
    Waiting,
}

/// A connection whose incoming bytes are repaired, whose outgoing ones are gathered, and whose times are noted.
#[derive(Debug)]
pub(super) struct Connection<S> {
    stream: S,
    repair: AuthorityRepair,
    gathered: Gathered,
    draining: Arc<AtomicBool>,
    budget: Arc<Budget>,
    /// Set once the host's side is closed at the host's end.
    farewell: Option<Pin<Box<Sleep>>>,
    peer: Peer,
    state: Arc<State>,
    flushing: Flushing,
}

impl<S> Connection<S> {
    fn check(&self) -> io::Result<()> {
        match self.state.times().broken {
            true => Err(io::ErrorKind::TimedOut.into()),
            false => Ok(()),
        }
    }

    fn wrote<T>(&self, context: &Context<'_>, result: &Poll<io::Result<T>>) {
        let mut times = self.state.times();
        match result {
            Poll::Pending => {
                times.blocked.get_or_insert_with(Instant::now);
                times.task = Some(context.waker().clone());
            }
            Poll::Ready(_) => {
                times.blocked = None;
                times.moved = Instant::now();
            }
        }
    }
}

impl<S: AsyncWrite + Unpin> Connection<S> {
    fn poll_drain(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.gathered.is_empty() {
            let stream = Pin::new(&mut self.stream);
            let result = self.gathered.poll_drain(stream, context);
            self.wrote(context, &result);
            self.flushing = Flushing::Due;
            ready!(result)?;
        }
        if self.flushing == Flushing::Done {
            return Poll::Ready(Ok(()));
        }
        let result = Pin::new(&mut self.stream).poll_flush(context);
        // A socket has nothing to flush, and then this says nothing about its peer.
        if result.is_pending() || self.flushing == Flushing::Waiting {
            self.wrote(context, &result);
        }
        self.flushing = match result {
            Poll::Pending => Flushing::Waiting,
            Poll::Ready(_) => Flushing::Done,
        };
        result
    }
}

impl<S> Connection<S> {
    /// Room for more to be gathered, if the host's budget has it: without, it leaves in smaller pieces.
    fn widen(&mut self) {
        if let Ok(charge) = self.budget.try_reserve(GATHERED_BYTES_MAX as u64) {
            self.gathered.charge(charge);
            self.state.is_charged.store(true, Ordering::Relaxed);
        }
    }

    /// Gives that back once nothing has moved for a while.
    fn narrow(&mut self) {
        let is_charged = self.state.is_charged.load(Ordering::Relaxed);
        if is_charged && self.gathered.is_empty() && self.state.times().moved.elapsed() > IDLE {
            self.gathered = Gathered::default();
            self.state.is_charged.store(false, Ordering::Relaxed);
        }
    }
}

impl<S> Connected for Connection<S> {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for Connection<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.check()?;
        // HTTP/2 reads each time that it is woken: what was gathered the last time leaves now.
        if let Poll::Ready(Err(error)) = self.poll_drain(context) {
            return Poll::Ready(Err(error));
        }
        self.narrow();
        let before = buffer.filled().len();
        let frames = self.repair.frames();
        let result = Pin::new(&mut self.stream).poll_read(context, buffer);
        if let Poll::Ready(Ok(())) = result {
            self.repair.pass(&mut buffer.filled_mut()[before..]);
        }
        let mut times = self.state.times();
        if self.repair.frames() != frames || !self.repair.is_midway() {
            times.begun = None;
            let gathers = !Gathered::is_direct(self.repair.frame_bytes());
            self.state.gathers.store(gathers, Ordering::Relaxed);
        }
        match result {
            Poll::Ready(_) => times.moved = Instant::now(),
            Poll::Pending => {
                if self.repair.is_midway() {
                    times.begun.get_or_insert_with(Instant::now);
                }
                times.task = Some(context.waker().clone());
            }
        }
        drop(times);
        result
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Connection<S> {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(context, &[io::IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.check()?;
        let length = slices.iter().map(|slice| slice.len()).sum();
        let gathers = self.state.gathers();
        if gathers && !self.gathered.has_room(length) && self.gathered.is_narrow() {
            self.widen();
        }
        if gathers && !self.gathered.has_room(length) {
            ready!(self.poll_drain(context))?;
        }
        if !gathers || !self.gathered.has_room(length) {
            ready!(self.poll_drain(context))?;
            let result = Pin::new(&mut self.stream).poll_write_vectored(context, slices);
            self.flushing = Flushing::Due;
            self.wrote(context, &result);
            return result;
        }
        self.gathered.take(slices);
        Poll::Ready(Ok(length))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    /// h2 flushes after each frame. What is gathered leaves when the connection's task is run again,
    /// which is at once: until then the streams may add to it.
    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.check()?;
        if self.gathered.is_left_alone() {
            context.waker().wake_by_ref();
        } else if self.gathered.is_empty()
            // What does not leave now does when the task is woken for it.
            && let Poll::Ready(Err(error)) = self.poll_drain(context)
        {
            return Poll::Ready(Err(error));
        }
        Poll::Ready(Ok(()))
    }

    /// Closes the host's side. When the host ends it waits a moment for the peer's: a client that finds the
    /// socket gone when it acknowledges what it has read gives up all that it has not read yet.
    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_drain(context))?;
        let this = &mut *self;
        let farewell = match &mut this.farewell {
            Some(farewell) => farewell,
            unset => {
                ready!(Pin::new(&mut this.stream).poll_shutdown(context))?;
                if !this.draining.load(Ordering::Relaxed) {
                    return Poll::Ready(Ok(()));
                }
                unset.insert(Box::pin(tokio::time::sleep(FAREWELL)))
            }
        };
        let mut unread = [0; 4096];
        while farewell.as_mut().poll(context).is_pending() {
            let mut buffer = ReadBuf::new(&mut unread);
            // An error is an end, too.
            match ready!(Pin::new(&mut this.stream).poll_read(context, &mut buffer)) {
                Ok(()) if !buffer.filled().is_empty() => {}
                Ok(()) | Err(_) => break,
            }
        }
        Poll::Ready(Ok(()))
    }
}
