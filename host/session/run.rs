//! One run of a kernel, and all who wait for its outcome.
//!
//! ```text
//! Call (one caller's handle) ──▶ Run ──▶ callers: their answers     leaving: a cancel, a deadline
//! Deadlines (a thread) ──────────▶│ ├──▶ its job in the queue ┐ ended when
//!                                   └──▶ the engine's token   ┘ the last caller leaves
//! ```
//! A request without an idempotency key has a run of its own; repeats with one key share theirs.
//! Whoever leaves while others wait is answered at once. The last one ends the run, and is
//! answered when nothing of it is left.

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Weak};
use std::thread::JoinHandle;
use std::time::Instant;

use super::invoke::{Answer, Invoked};
use super::workers::Queued;
use crate::engine::{CancelToken, InvokeError};
use crate::error::{Code, Status};

/// Why a caller no longer waits.
#[derive(Clone, Copy, Debug)]
enum Leaving {
    /// It said so, or is gone.
    Cancelled,
    /// Its time is over.
    Late,
}

#[derive(Debug)]
struct Caller {
    id: u64,
    answer: Answer,
    deadline_ms: u64,
    /// Set while the clock is watched for it.
    due: Option<Due>,
    /// What it is answered if the run fails, once it is leaving as the last one.
    leaving: Option<Status>,
}

#[derive(Debug, Default)]
struct State {
    callers: Vec<Caller>,
    last: u64,
    queued: Option<Queued>,
    started: bool,
    /// Nobody waits any more, or all have been answered: nobody can join.
    over: bool,
}

/// A run.
#[derive(Debug)]
pub(super) struct Run {
    kernel: String,
    cancel: CancelToken,
    // A std mutex: never held while an answer is given or a job dropped.
    state: Mutex<State>,
}

/// A caller's handle on the invocation that it asked for. Dropping it changes nothing.
#[derive(Clone, Debug)]
pub struct Call {
    run: Weak<Run>,
    caller: u64,
}

impl Call {
    /// A call that was answered before there was a run.
    pub(super) fn answered() -> Self {
        Self {
            run: Weak::new(),
            caller: 0,
        }
    }

    /// Ends this caller's wait; if nobody else waits for it, the run, too. It is answered by
    /// `CANCELLED`, unless the outcome was there first.
    pub fn cancel(&self) {
        if let Some(run) = self.run.upgrade() {
            run.leave(self.caller, Leaving::Cancelled);
        }
    }
}

impl Run {
    /// A run of the kernel that was asked for as `kernel`.
    pub(super) fn new(kernel: &str) -> Arc<Self> {
        let name = kernel.rsplit('/').next().unwrap_or(kernel);
        Arc::new(Self {
            kernel: name.to_owned(),
            cancel: CancelToken::default(),
            state: Mutex::default(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// What the engine looks at.
    pub(super) fn cancel_token(&self) -> CancelToken {
        self.cancel.clone()
    }

    /// Whether nobody can join any more.
    pub(super) fn is_over(&self) -> bool {
        self.lock().over
    }

    /// One more that waits for the outcome.
    ///
    /// # Errors
    /// The answer, if the run is over.
    pub(super) fn join(self: &Arc<Self>, answer: Answer, deadline_ms: u64) -> Result<Call, Answer> {
        let mut state = self.lock();
        if state.over {
            return Err(answer);
        }
        state.last += 1;
        let id = state.last;
        state.callers.push(Caller {
            id,
            answer,
            deadline_ms,
            due: None,
            leaving: None,
        });
        Ok(Call {
            run: Arc::downgrade(self),
            caller: id,
        })
    }

    /// From now on the clock is watched for a caller.
    pub(super) fn watch(self: &Arc<Self>, call: &Call, deadlines: &Deadlines, at: Instant) {
        let mut state = self.lock();
        if let Some(caller) = state.callers.iter_mut().find(|c| c.id == call.caller) {
            caller.due = Some(deadlines.add(at, self, call.caller));
        }
    }

    /// Its job is in the queue.
    pub(super) fn queued(&self, queued: Queued) {
        let mut state = self.lock();
        if !state.over {
            state.queued = Some(queued);
            return;
        }
        drop(state);
        // All have left meanwhile.
        queued.withdraw();
    }

    /// A worker begins it. False if nobody waits for it any more.
    pub(super) fn start(&self) -> bool {
        let mut state = self.lock();
        state.started = true;
        !state.over
    }

    fn leave(&self, id: u64, leaving: Leaving) {
        let mut state = self.lock();
        let Some(at) = state.callers.iter().position(|caller| caller.id == id) else {
            return;
        };
        let status = match leaving {
            Leaving::Cancelled => InvokeError::Cancelled(self.kernel.clone()).into(),
            Leaving::Late => self.late(state.started, state.callers[at].deadline_ms),
        };
        if state.callers.len() > 1 {
            let caller = state.callers.swap_remove(at);
            drop(state);
            caller.answer.give(Err(status));
            return;
        }
        // The first reason stands.
        state.callers[at].leaving.get_or_insert(status);
        state.over = true;
        let queued = state.queued.take();
        drop(state);
        self.cancel.cancel();
        if let Some(queued) = queued {
            queued.withdraw();
        }
    }

    /// What is said at a deadline.
    pub(super) fn late(&self, started: bool, deadline_ms: u64) -> Status {
        if started {
            let kernel = self.kernel.clone();
            return InvokeError::Deadline {
                kernel,
                deadline_ms,
            }
            .into();
        }
        Status::new(
            Code::DeadlineExceeded,
            "DEADLINE",
            format!(
                "the invocation of kernel `{}` was still waiting for a worker at its deadline of {deadline_ms} ms; \
                 ask again later or with a longer deadline, or have the operator raise engine.workers",
                self.kernel
            ),
        )
        .with("deadline_ms", deadline_ms)
    }

    /// Answers everybody. Without a result it never ran, or its worker was lost.
    pub(super) fn end(&self, result: Option<Result<Arc<Invoked>, Status>>) {
        let mut state = self.lock();
        state.over = true;
        state.queued = None;
        let mut callers = std::mem::take(&mut state.callers);
        drop(state);
        let last = callers.pop();
        for caller in callers {
            caller.end(result.clone());
        }
        // By value: whoever has the answer finds that nobody else here holds the results.
        if let Some(last) = last {
            last.end(result);
        }
    }
}

impl Caller {
    fn end(self, result: Option<Result<Arc<Invoked>, Status>>) {
        match (result, self.leaving) {
            (Some(Ok(invoked)), _) => self.answer.give(Ok(invoked)),
            (_, Some(status)) => self.answer.give(Err(status)),
            (Some(Err(status)), None) => self.answer.give(Err(status)),
            // An answer that is dropped says that its worker was lost.
            (None, None) => {}
        }
    }
}

type DueKey = (Instant, u64);

#[derive(Debug, Default)]
struct Clock {
    due: BTreeMap<DueKey, (Weak<Run>, u64)>,
    last: u64,
    ending: bool,
}

#[derive(Debug, Default)]
struct Shared {
    // Taken under a run's lock, never the other way round.
    clock: Mutex<Clock>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Clock> {
        self.clock.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn watch(&self) {
        let mut clock = self.lock();
        while !clock.ending {
            let now = Instant::now();
            clock = match clock.due.first_entry() {
                None => self.changed.wait(clock).unwrap_or_else(|e| e.into_inner()),
                Some(first) if first.key().0 > now => {
                    let wait = first.key().0 - now;
                    let waited = self.changed.wait_timeout(clock, wait);
                    waited.unwrap_or_else(|e| e.into_inner()).0
                }
                Some(first) => {
                    let (run, caller) = first.remove();
                    drop(clock);
                    if let Some(run) = run.upgrade() {
                        run.leave(caller, Leaving::Late);
                    }
                    self.lock()
                }
            };
        }
    }
}

/// One thread that sleeps until the next deadline of those that wait: for a worker, or for a run
/// that they share. (The engine looks after a run's own deadline.)
#[derive(Debug)]
pub(super) struct Deadlines {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// A deadline that is watched until this is dropped.
#[derive(Debug)]
struct Due {
    shared: Arc<Shared>,
    key: DueKey,
}

impl Drop for Due {
    fn drop(&mut self) {
        self.shared.lock().due.remove(&self.key);
    }
}

impl Deadlines {
    /// # Errors
    /// If Linux gives no thread.
    pub(super) fn new() -> std::io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let of_thread = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("strait-deadlines".to_owned())
            .spawn(move || of_thread.watch())?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    fn add(&self, at: Instant, run: &Arc<Run>, caller: u64) -> Due {
        let mut clock = self.shared.lock();
        clock.last += 1;
        let key = (at, clock.last);
        clock.due.insert(key, (Arc::downgrade(run), caller));
        let first = clock.due.first_key_value().map(|(first, _)| *first) == Some(key);
        drop(clock);
        if first {
            self.shared.changed.notify_one();
        }
        Due {
            shared: Arc::clone(&self.shared),
            key,
        }
    }
}

impl Drop for Deadlines {
    fn drop(&mut self) {
        self.shared.lock().ending = true;
        self.shared.changed.notify_one();
        if let Some(thread) = self.thread.take()
            // The last holder of the host may be a caller whom this thread answers.
            && thread.thread().id() != std::thread::current().id()
        {
            // It fails only if the thread panicked, which it then reported itself.
            let _ = thread.join();
        }
    }
}
