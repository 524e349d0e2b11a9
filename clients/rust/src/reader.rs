//! Who receives.
//!
//! A reply that goes from the socket through one thread to another costs a second wake-up, twice
//! the time of a small call. So a thread that waits receives by itself, also for the others, and
//! wakes the next one when it leaves. The reader thread of the connection receives when no thread
//! waits: for tasks, and what the host pushes. It also sends what found the socket full and
//! renews leases, at any time.

use std::future::Future;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, TryLockError};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::Thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;

use crate::connection::{End, Shared, State};
use crate::wire::{BODY_BYTES_MAX, HEADER_BYTES};

/// After a thread received for itself the next call is probably near: the reader thread leaves
/// the socket alone for this long, so that it is not woken by each reply of a series. What the
/// host pushes meanwhile is seen that much later.
const SERIES: Duration = Duration::from_millis(20);

/// The right to receive.
#[derive(Debug)]
pub(crate) struct Reading {
    /// Held, with the buffer, by the one who receives.
    buffer: Mutex<Vec<u8>>,
    /// The reader thread found it taken and wants to be told when it is free.
    asked: AtomicBool,
}

impl Reading {
    pub(crate) fn new() -> Self {
        let buffer = Mutex::new(vec![0; HEADER_BYTES + BODY_BYTES_MAX]);
        Self {
            buffer,
            asked: AtomicBool::new(false),
        }
    }

    fn take(&self) -> Option<MutexGuard<'_, Vec<u8>>> {
        match self.buffer.try_lock() {
            Ok(buffer) => Some(buffer),
            // Its contents are written anew for each frame.
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// For the reader thread: whether a caller receives, who will then tell when it ends.
    fn is_taken(&self) -> bool {
        // Asked first: a caller that leaves between the two lines sees it.
        self.asked.store(true, SeqCst);
        let taken = self.take().is_none();
        if !taken {
            self.asked.store(false, SeqCst);
        }
        taken
    }
}

/// Whether a thread that waits has reason to look.
#[derive(Debug)]
pub(crate) struct Woken {
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

/// Runs `future` on the calling thread; `until` returns once it is to be polled again.
pub(crate) fn wait<F: Future>(future: F, until: impl Fn(&Woken)) -> F::Output {
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
            Poll::Pending => until(&woken),
        }
    }
}

/// For [`wait`]: leaves receiving to the reader thread.
pub(crate) fn park(woken: &Woken) {
    while !woken.take() {
        std::thread::park();
    }
}

impl Shared {
    /// For [`wait`]: receives until this thread is woken, unless somebody else does that.
    pub(crate) fn serve_until(&self, woken: &Woken) {
        while !woken.take() {
            match self.reading.take() {
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
        let mut state = self.lock();
        state.led = Some(Instant::now());
        let next = state.waiting_thread();
        drop(state);
        if let Some(next) = next {
            next.wake();
        }
        if self.reading.asked.swap(false, SeqCst) {
            self.wake_reader();
        }
    }

    /// The reader thread.
    pub(crate) fn read(&self) {
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
                && let Some(mut buffer) = self.reading.take()
            {
                self.receive(&mut buffer);
            }
        }
    }

    /// Sends what waits, renews what is due; says what to wait for. `None` at the end.
    fn plan(&self) -> Option<(PollFlags, Option<Timespec>)> {
        let mut state = self.lock();
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
        // A thread that waits may have found the right taken by this very look.
        let waited_for = state.task_waits() || state.waiting_thread().is_some();
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
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => break,
                // What the host said before it closed may still lie in the socket.
                Err(_) => state.outgoing.clear(),
            }
        }
    }
}
