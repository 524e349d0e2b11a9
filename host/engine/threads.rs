//! Threads that help the one that runs an invocation with its slices.
//!
//! They are there from the start: a worker process makes no thread once its walls stand. Nobody waits for one of them to be
//! free: whoever asks for help goes on by itself, and what is left to do when a helper comes is what it does.

use std::cell::Cell;
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use rustix::time::{ClockId, clock_gettime};

type Work = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct State {
    waiting: VecDeque<Work>,
    ending: bool,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

/// The helpers of one engine.
pub(super) struct Threads {
    shared: Arc<Shared>,
    handles: Vec<JoinHandle<()>>,
}

thread_local! {
    static LENT: Cell<Duration> = const { Cell::new(Duration::ZERO) };
}

/// CPU time that other threads have used for invocations of the calling one.
#[must_use]
pub fn lent_cpu_time() -> Duration {
    LENT.get()
}

/// Another thread has used `time` for the calling one.
pub(super) fn lend(time: Duration) {
    LENT.set(LENT.get() + time);
}

/// CPU time of the calling thread.
pub(super) fn cpu_time() -> Duration {
    // A clock of Linux's own threads is never before its start.
    Duration::try_from(clock_gettime(ClockId::ThreadCPUTime)).unwrap_or_default()
}

fn help(shared: &Shared) {
    let mut state = shared.state.lock();
    loop {
        if let Some(work) = state.waiting.pop_front() {
            drop(state);
            // A bug of ours in one invocation must not end the thread for the others.
            if catch_unwind(AssertUnwindSafe(work)).is_err() {
                tracing::error!("a slice panicked; this is a bug of strait");
            }
            state = shared.state.lock();
        } else if state.ending {
            return;
        } else {
            shared.changed.wait(&mut state);
        }
    }
}

impl Threads {
    /// So many.
    ///
    /// # Errors
    /// Linux gives no threads.
    pub(super) fn new(count: usize) -> Result<Self, String> {
        let mut threads = Self {
            shared: Arc::default(),
            handles: Vec::with_capacity(count),
        };
        for index in 0..count {
            let shared = Arc::clone(&threads.shared);
            let thread = std::thread::Builder::new()
                .name(format!("strait-slice-{index}"))
                .spawn(move || help(&shared));
            let thread = thread.map_err(|e| format!("no thread for slices: {e}"))?;
            threads.handles.push(thread);
        }
        Ok(threads)
    }

    pub(super) fn count(&self) -> usize {
        self.handles.len()
    }

    /// Has a helper do `work` as soon as one is free.
    pub(super) fn ask(&self, work: impl FnOnce() + Send + 'static) {
        self.shared.state.lock().waiting.push_back(Box::new(work));
        self.shared.changed.notify_one();
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        let mut state = self.shared.state.lock();
        state.ending = true;
        let forgotten = std::mem::take(&mut state.waiting);
        drop(state);
        drop(forgotten);
        self.shared.changed.notify_all();
        let own = std::thread::current().id();
        for handle in self.handles.drain(..) {
            // The last to hold the engine may be a helper, which cannot wait for itself.
            if handle.thread().id() != own {
                // Its work's panics are caught, so joining cannot fail for that.
                let _ = handle.join();
            }
        }
    }
}
