//! Operations: what was started and may be waited for by a descriptor.

use std::any::Any;
use std::future::Future;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};

use parking_lot::Mutex;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use strait_client::Error;

use crate::failure::{Failure, asked, end, entry};
use crate::pointer::{Out, hand_out};

/// What an operation ends with: a handle, a text or nothing. `finish` knows which functions give which.
pub(crate) type Outcome = Box<dyn Any>;

/// An outcome.
pub(crate) fn done<T: Any>(outcome: T) -> Result<Outcome, Failure> {
    Ok(Box::new(outcome))
}

type Work = Pin<Box<dyn Future<Output = Result<Outcome, Failure>> + Send>>;

/// Work that has a socket of its own, which is readable when there is something to do.
pub(crate) trait Lane: Send {
    fn fd(&self) -> Option<BorrowedFd<'_>>;

    /// Takes what has come; with `wait` until it is all. `None`: there is more to come.
    fn advance(&mut self, wait: bool) -> Result<Option<Outcome>, Failure>;
}

/// Something that was started, by one of the functions that end with _start.
///
/// It makes progress in strait_operation_poll and strait_finish..., on the thread that calls them and nowhere else: copies and system calls of this process
/// are made there. Its first request is sent when it is started.
pub struct Operation {
    event: Arc<Event>,
    progress: Mutex<Progress>,
}

enum Progress {
    Work(Work),
    Lane(Box<dyn Lane>),
    Done(Result<Outcome, Failure>),
}

/// Tells whoever waits for the descriptor that there is something to do.
#[derive(Debug)]
struct Event(OwnedFd);

impl Event {
    fn new() -> Result<Self, Failure> {
        let made = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let what = "make an event descriptor";
        let fd = made.map_err(|error| Error::Linux {
            what,
            source: error.into(),
        })?;
        Ok(Self(fd))
    }

    fn set(&self) {
        // It fails only when the counter is full, and then it is readable.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    fn clear(&self) {
        // It fails when nothing was set.
        let _ = rustix::io::read(&self.0, &mut [0; 8]);
    }
}

impl Wake for Event {
    fn wake(self: Arc<Self>) {
        self.set();
    }
}

impl Operation {
    /// Starts what is waited for by an event.
    pub(crate) fn start(
        work: impl Future<Output = Result<Outcome, Failure>> + Send + 'static,
    ) -> Result<Self, Failure> {
        Self::new(Progress::Work(Box::pin(work)))
    }

    /// Starts what is waited for by its own socket, to which it has been sent already.
    pub(crate) fn on(lane: impl Lane + 'static) -> Result<Self, Failure> {
        Self::new(Progress::Lane(Box::new(lane)))
    }

    fn new(progress: Progress) -> Result<Self, Failure> {
        let operation = Self {
            event: Arc::new(Event::new()?),
            progress: Mutex::new(progress),
        };
        operation.advance(&mut operation.progress.lock(), false);
        Ok(operation)
    }

    /// Does what can be done now, with `wait` until it is done. Whether it is.
    fn advance(&self, progress: &mut Progress, wait: bool) -> bool {
        let done = loop {
            let step = match progress {
                Progress::Done(_) => return true,
                Progress::Lane(lane) => lane.advance(wait).transpose(),
                Progress::Work(work) => {
                    // Before the work is looked at: what happens meanwhile sets it again.
                    self.event.clear();
                    let waker = Waker::from(Arc::clone(&self.event));
                    match work.as_mut().poll(&mut Context::from_waker(&waker)) {
                        Poll::Ready(outcome) => Some(outcome),
                        Poll::Pending => None,
                    }
                }
            };
            match step {
                Some(outcome) => break outcome,
                None if !wait => return false,
                None => {
                    if let Err(failure) = ready(self.event.0.as_fd(), true) {
                        break Err(failure);
                    }
                }
            }
        };
        *progress = Progress::Done(done);
        // It stays readable.
        self.event.set();
        true
    }

    /// Waits until it is done.
    pub(crate) fn finish(self) -> Result<Outcome, Failure> {
        self.advance(&mut self.progress.lock(), true);
        match self.progress.into_inner() {
            Progress::Done(outcome) => outcome,
            Progress::Work(_) | Progress::Lane(_) => {
                Err(Failure::state("the operation is not done"))
            }
        }
    }
}

/// Whether a descriptor is readable, or at its end; with `wait` once it is.
pub(crate) fn ready(fd: BorrowedFd<'_>, wait: bool) -> Result<bool, Failure> {
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    let timeout = if wait { None } else { Some(&now) };
    loop {
        match rustix::event::poll(&mut [PollFd::new(&fd, PollFlags::IN)], timeout) {
            Ok(count) => return Ok(count > 0),
            Err(Errno::INTR) => {}
            Err(error) => {
                let what = "wait for a descriptor";
                let source = error.into();
                return Err(Error::Linux { what, source }.into());
            }
        }
    }
}

/// Hands out an operation.
pub(crate) fn hand_out_started(
    operation: Out<'_, *mut Operation>,
    start: impl FnOnce() -> Result<Operation, Failure>,
) -> Option<Box<Failure>> {
    entry(|| hand_out(operation, "operation", start))
}

/// A descriptor that becomes readable when there is something to do: then call strait_operation_poll. It stays readable when the operation is done. It belongs
/// to the operation: do not read from it or close it, and ask again after each strait_operation_poll. -1 for NULL.
#[unsafe(no_mangle)]
pub extern "C" fn strait_operation_fd(operation: Option<&Operation>) -> i32 {
    asked(operation, -1, |operation| {
        match &*operation.progress.lock() {
            Progress::Lane(lane) => lane.fd().map_or(-1, |fd| fd.as_raw_fd()),
            Progress::Work(_) | Progress::Done(_) => operation.event.0.as_raw_fd(),
        }
    })
}

/// Does what can be done without waiting. True once the operation is done, so that strait_finish... returns at once; true for NULL.
#[unsafe(no_mangle)]
pub extern "C" fn strait_operation_poll(operation: Option<&Operation>) -> bool {
    asked(operation, true, |operation| {
        operation.advance(&mut operation.progress.lock(), false)
    })
}

/// Abandons an operation: a kernel that it runs is cancelled, its result is released. A prepared call or a stream
/// whose operation is abandoned before it is done is over; one that the host has not begun then runs to its deadline. NULL is fine.
#[unsafe(no_mangle)]
pub extern "C" fn strait_operation_free(operation: Option<Box<Operation>>) {
    end(operation);
}
