//! Who receives.
//!
//! A reply that goes from the socket through one thread to another costs a second wake-up, twice
//! the time of a small call. So a thread that waits receives by itself, also for the others, and
//! wakes the next one when it leaves. The reader thread of the connection receives when no thread
//! waits: for tasks, and what the host pushes. It also sends what found the socket full and
//! renews leases, at any time.

use std::future::Future;
use std::io;
use std::os::fd::OwnedFd;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst, fence};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::Thread;
use std::time::{Duration, Instant};

use parking_lot::{Mutex, MutexGuard};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;

use super::frames::{Payload, Reply, parse};
use super::renewal::Answer;
use super::routes::Delivery;
use super::{End, Shared, State};
use crate::error::Error;
use crate::wire::{self, BODY_BYTES_MAX, FDS_MAX, HEADER_BYTES, Header, Op, PAYLOAD_BYTES_MAX};

/// After a thread received for itself the next call is probably near: the reader thread leaves
/// the socket alone for this long, so that it is not woken by each reply of a series. What the
/// host pushes meanwhile is seen that much later.
const SERIES: Duration = Duration::from_millis(20);

/// The right to receive.
#[derive(Debug)]
pub(super) struct Reading {
    /// Held, with the buffer, by the one who receives.
    buffer: Mutex<Vec<u8>>,
    /// The reader thread found it taken and wants to be told when it is free.
    asked: AtomicBool,
}

impl Reading {
    pub(super) fn new() -> Self {
        let buffer = Mutex::new(vec![0; HEADER_BYTES + BODY_BYTES_MAX + PAYLOAD_BYTES_MAX]);
        Self {
            buffer,
            asked: AtomicBool::new(false),
        }
    }

    /// For the reader thread: whether a caller receives, who will then tell when it ends.
    fn is_taken(&self) -> bool {
        // Asked first: a caller that leaves between the two lines sees it. The fence pairs with
        // that of the caller, without which each could miss what the other wrote.
        self.asked.store(true, SeqCst);
        fence(SeqCst);
        let taken = self.buffer.is_locked();
        if !taken {
            self.asked.store(false, SeqCst);
        }
        taken
    }
}

/// Whether a thread that waits has reason to look.
#[derive(Debug)]
struct Woken {
    flag: AtomicBool,
    thread: Thread,
}

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.flag.store(true, SeqCst);
        self.thread.unpark();
    }
}

impl Woken {
    fn take(&self) -> bool {
        self.flag.swap(false, SeqCst)
    }
}

impl Shared {
    /// Runs `future` on the calling thread, which receives while it waits.
    pub(super) fn wait<F: Future>(&self, future: F) -> F::Output {
        let mut future = pin!(future);
        let woken = Arc::new(Woken {
            flag: AtomicBool::new(false),
            thread: std::thread::current(),
        });
        let waker = Waker::from(Arc::clone(&woken));
        let mut context = Context::from_waker(&waker);
        loop {
            match future.as_mut().poll(&mut context) {
                Poll::Ready(output) => return output,
                Poll::Pending => self.serve_until(&woken),
            }
        }
    }

    /// Receives until this thread is woken, unless somebody else does that.
    fn serve_until(&self, woken: &Woken) {
        while !woken.take() {
            match self.reading.buffer.try_lock() {
                Some(buffer) => {
                    self.lead(buffer, woken);
                    return;
                }
                None => std::thread::park(),
            }
        }
    }

    fn lead(&self, mut buffer: MutexGuard<'_, Vec<u8>>, woken: &Woken) {
        while !woken.take() {
            let mut ready = [PollFd::new(&self.socket, PollFlags::IN)];
            // An error is what receiving then reports.
            let _ = rustix::event::poll(&mut ready, None);
            self.receive(&mut buffer);
        }
        drop(buffer);
        fence(SeqCst);
        let mut state = self.state.lock();
        state.led = Some(Instant::now());
        let next = state.routes.waiting_thread();
        drop(state);
        if let Some(next) = next {
            next.wake();
        }
        if self.reading.asked.swap(false, SeqCst) {
            self.wake_reader();
        }
    }

    /// The reader thread.
    pub(super) fn read(&self) {
        while let Some((interest, timeout)) = self.plan() {
            let mut ready = [
                PollFd::new(&self.socket, interest),
                PollFd::new(&self.wake, PollFlags::IN),
            ];
            match rustix::event::poll(&mut ready, timeout.as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(_) => self.finish(End::Disconnected),
            }
            let [socket, wake] = ready.map(|ready| ready.revents());
            if !wake.is_empty() {
                let _ = rustix::io::read(&self.wake, &mut [0; 8]);
            }
            // Linux reports an end whether it is asked for or not.
            if socket.intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR)
                && let Some(mut buffer) = self.reading.buffer.try_lock()
            {
                self.receive(&mut buffer);
            }
        }
    }

    /// Sends what waits, renews what is due; says what to wait for. `None` at the end.
    fn plan(&self) -> Option<(PollFlags, Option<Timespec>)> {
        let mut state = self.state.lock();
        if state.end.is_some() {
            return None;
        }
        let now = Instant::now();
        for renewal in state.leases.due(now) {
            self.renew(&mut state, renewal);
        }
        self.flush(&mut state);
        let sending = if state.outgoing.is_empty() {
            PollFlags::empty()
        } else {
            PollFlags::OUT
        };
        let renewal = state
            .leases
            .next()
            .map(|next| next.saturating_duration_since(now));
        let series = state
            .led
            .map(|led| (led + SERIES).saturating_duration_since(now));
        // A thread that waits may have found the right taken while this one received.
        let waited_for = state.routes.task_waits() || state.routes.waiting_thread().is_some();
        let series = series.filter(|left| !left.is_zero() && !waited_for);
        let taken = self.reading.is_taken();
        state.listening = !taken && series.is_none();
        let receiving = if state.listening {
            PollFlags::IN
        } else {
            PollFlags::empty()
        };
        // While a caller receives, it tells when it ends.
        let series = series.filter(|_| !taken);
        let timeout = renewal.into_iter().chain(series).min();
        let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
        Some((receiving | sending, timeout))
    }

    fn flush(&self, state: &mut State) {
        while let Some(frame) = state.outgoing.front() {
            match frame.send(&self.socket) {
                Ok(()) => drop(state.outgoing.pop_front()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                // What the host said before it closed may still lie in the socket.
                Err(_) => state.outgoing.clear(),
            }
        }
    }

    /// Takes one frame from the socket if there is one. The caller has the right to receive, and
    /// keeps it until whoever the frame is for was woken: a thread that gets the right looks then
    /// whether it was woken, and not again before the next frame.
    fn receive(&self, buffer: &mut [u8]) {
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
        let (header, body, payload) =
            Header::decode(packet).map_err(|error| End::Protocol(error.to_string()))?;
        let bad = |error: Error| End::Protocol(error.to_string());
        match header.op {
            Op::Gone => {
                let gone: wire::Gone = parse(body).map_err(bad)?;
                self.state.lock().leases.gone(gone.lease, gone.reason);
            }
            Op::Shutdown => {
                let shutdown: wire::Shutdown = parse(body).map_err(bad)?;
                let drain = Duration::from_millis(shutdown.drain_ms);
                self.state.lock().shutdown = Instant::now().checked_add(drain);
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
                        payload: Payload::new(payload),
                        fds,
                    },
                );
            }
            op => return Err(End::Protocol(format!("{op:?} is not for clients"))),
        }
        Ok(())
    }

    fn deliver(&self, sequence: u32, reply: Reply) {
        let mut state = self.state.lock();
        match state.routes.deliver(sequence, reply) {
            Delivery::Caller(waker) => {
                drop(state);
                if let Some(waker) = waker {
                    waker.wake();
                }
            }
            Delivery::Renewal(renewal, reply) => {
                let answer = match reply.read::<wire::Renewed>() {
                    Ok((renewed, _)) => Answer::Renewed(Duration::from_millis(renewed.expires_ms)),
                    Err(Error::LeaseExpired { message, .. }) => Answer::Expired(message),
                    Err(_) => Answer::Failed,
                };
                // The reader plans anew after each frame, so it sees the new times.
                for renewal in state.leases.answered(renewal, answer, Instant::now()) {
                    self.renew(&mut state, renewal);
                }
            }
            Delivery::Nobody(reply) => self.release(&mut state, reply.leases()),
        }
    }
}
