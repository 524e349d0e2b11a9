//! One run of a kernel, and all who wait for its outcome.
//!
//! ```text
//! Call (one caller's handle) ──▶ Run ──▶ waiters: their answers     leaving: a cancel, a deadline
//! Deadlines (a thread) ──────────▶│ ├──▶ its job in the queue ┐ ended when
//!                                   └──▶ the engine's token   ┘ the last caller leaves
//! ```
//! A request without an idempotency key has a run of its own; repeats with one key share theirs. What a run gives is an
//! invocation's outcome or, of `open` alone, the specs of its outputs.
//! Whoever leaves while others wait is answered at once. The last one ends the run, and is
//! answered when nothing of it is left.

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::Instant;

use parking_lot::{Condvar, Mutex, MutexGuard};

use super::answer::{Answer, Invoked};
use super::cpu::CpuOver;
use super::workers::Queued;
use crate::engine::{CancelToken, Failed};
use crate::error::{Code, Reason, Status};

/// Why a caller no longer waits.
#[derive(Clone, Copy, Debug)]
enum Leaving {
    /// It said so, or is gone.
    Cancelled,
    /// Its time is over.
    Late,
}

/// Most that wait for one run: each costs memory, and a place in no queue.
pub(super) const WAITERS_MAX: usize = 256;

/// An answer that joined no run.
pub(super) enum NotJoined<T> {
    /// The run is over.
    Over(Answer<T>),
    /// It has [`WAITERS_MAX`] who wait.
    Full(Answer<T>),
}

#[derive(Debug)]
struct Waiter<T> {
    id: u64,
    answer: Answer<T>,
    deadline_ms: u64,
    /// Set while the clock is watched for it.
    due: Option<Due>,
    /// What it is answered if the run fails, once it is leaving as the last one.
    leaving: Option<Status>,
}

#[derive(Debug)]
struct State<T> {
    waiters: Vec<Waiter<T>>,
    last: u64,
    queued: Option<Queued>,
    started: bool,
    /// Nobody waits any more, or all have been answered: nobody can join.
    over: bool,
}

/// What a run may give.
pub(super) trait Given: Clone + Send + std::fmt::Debug + 'static {}

impl<T: Clone + Send + std::fmt::Debug + 'static> Given for T {}

/// A run that gives a `T`: by default that of an invocation.
#[derive(Debug)]
pub(super) struct Run<T = Arc<Invoked>> {
    kernel: String,
    cancel: CancelToken,
    // Never held while an answer is given or a job dropped.
    state: Mutex<State<T>>,
}

/// A run, whatever it gives.
trait Leave: Send + Sync + std::fmt::Debug {
    fn leave(&self, caller: u64, leaving: Leaving);
}

/// A caller's handle on the invocation that it asked for. Dropping it changes nothing.
#[derive(Clone, Debug)]
pub struct Call {
    run: Weak<dyn Leave>,
    caller: u64,
}

impl Call {
    /// A call that was answered before there was a run.
    pub(super) fn answered() -> Self {
        Self {
            run: Weak::<Run>::new(),
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

impl<T> State<T> {
    /// One more that waits; answers its number.
    fn add(&mut self, answer: Answer<T>, deadline_ms: u64) -> u64 {
        self.last += 1;
        self.waiters.push(Waiter {
            id: self.last,
            answer,
            deadline_ms,
            due: None,
            leaving: None,
        });
        self.last
    }
}

impl<T: Given> Run<T> {
    /// A run of the kernel that was asked for as `kernel`, and the first one's wait for its outcome.
    pub(super) fn begin(kernel: &str, answer: Answer<T>, deadline_ms: u64) -> (Arc<Self>, Call) {
        let name = kernel.rsplit('/').next().unwrap_or(kernel);
        let mut state = State {
            waiters: Vec::new(),
            last: 0,
            queued: None,
            started: false,
            over: false,
        };
        let first = state.add(answer, deadline_ms);
        let run = Arc::new(Self {
            kernel: name.to_owned(),
            cancel: CancelToken::default(),
            state: Mutex::new(state),
        });
        let call = run.call(first);
        (run, call)
    }

    fn call(self: &Arc<Self>, caller: u64) -> Call {
        let run: Weak<Self> = Arc::downgrade(self);
        Call { run, caller }
    }

    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock()
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
    /// The answer, if the run is over or has enough who wait.
    pub(super) fn join(
        self: &Arc<Self>,
        answer: Answer<T>,
        deadline_ms: u64,
    ) -> Result<Call, NotJoined<T>> {
        let mut state = self.lock();
        if state.over {
            return Err(NotJoined::Over(answer));
        }
        if state.waiters.len() >= WAITERS_MAX {
            return Err(NotJoined::Full(answer));
        }
        Ok(self.call(state.add(answer, deadline_ms)))
    }

    /// From now on the clock is watched for a caller.
    pub(super) fn watch(self: &Arc<Self>, call: &Call, deadlines: &Deadlines, at: Instant) {
        let mut state = self.lock();
        if let Some(caller) = state.waiters.iter_mut().find(|c| c.id == call.caller) {
            let run: Weak<Self> = Arc::downgrade(self);
            caller.due = Some(deadlines.add(at, run, call.caller));
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

    /// Ends it for all who wait.
    pub(super) fn cancel(&self) {
        let waiting: Vec<u64> = self.lock().waiters.iter().map(|waiter| waiter.id).collect();
        for id in waiting {
            self.leave(id, Leaving::Cancelled);
        }
    }

    /// What is said at a deadline.
    pub(super) fn late(&self, started: bool, deadline_ms: u64) -> Status {
        match started {
            true => Failed::late(&self.kernel, deadline_ms).into(),
            false => still_waiting(&self.kernel, deadline_ms, None),
        }
    }

    /// Answers everybody. Without a result it never ran, or its worker was lost.
    pub(super) fn end(&self, result: Option<Result<T, Status>>) {
        let mut state = self.lock();
        state.over = true;
        state.queued = None;
        let mut waiters = std::mem::take(&mut state.waiters);
        drop(state);
        let last = waiters.pop();
        for caller in waiters {
            caller.end(result.clone());
        }
        // By value: whoever has the answer finds that nobody else here holds the results.
        if let Some(last) = last {
            last.end(result);
        }
    }
}

/// What is said at the deadline of what has not begun; `over`: it waited for its principal's quota of CPU time.
pub(super) fn still_waiting(kernel: &str, deadline_ms: u64, over: Option<&CpuOver>) -> Status {
    let again = "ask again later or with a longer deadline, or have the operator raise";
    let (what, remedy) = match over {
        None => ("a worker", format!("{again} engine.workers")),
        Some(over) => (
            "CPU time",
            format!("its principal has used {over}; {again} the quota"),
        ),
    };
    Status::new(
        Code::DeadlineExceeded,
        Reason::Deadline,
        format!(
            "the invocation of kernel `{kernel}` was still waiting for {what} at its deadline of {deadline_ms} ms; {remedy}"
        ),
    )
    .with("deadline_ms", deadline_ms)
}

impl<T: Given> Leave for Run<T> {
    fn leave(&self, id: u64, leaving: Leaving) {
        let mut state = self.lock();
        let Some(at) = state.waiters.iter().position(|caller| caller.id == id) else {
            return;
        };
        let status = match leaving {
            Leaving::Cancelled => Failed::cancelled(&self.kernel).into(),
            Leaving::Late => {
                let deadline_ms = state.waiters[at].deadline_ms;
                let waiting = state.queued.as_ref().filter(|_| !state.started);
                match waiting.and_then(Queued::cpu_over) {
                    Some(over) => still_waiting(&self.kernel, deadline_ms, Some(&over)),
                    None => self.late(state.started, deadline_ms),
                }
            }
        };
        if state.waiters.len() > 1 {
            let caller = state.waiters.swap_remove(at);
            drop(state);
            caller.answer.give(Err(status));
            return;
        }
        // The first reason stands.
        state.waiters[at].leaving.get_or_insert(status);
        state.over = true;
        let queued = state.queued.take();
        drop(state);
        self.cancel.cancel();
        if let Some(queued) = queued {
            queued.withdraw();
        }
    }
}

impl<T> Waiter<T> {
    fn end(self, result: Option<Result<T, Status>>) {
        match (result, self.leaving) {
            (Some(Ok(given)), _) => self.answer.give(Ok(given)),
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
    due: BTreeMap<DueKey, (Weak<dyn Leave>, u64)>,
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
        self.clock.lock()
    }

    fn watch(&self) {
        let mut clock = self.lock();
        while !clock.ending {
            let now = Instant::now();
            match clock.due.first_entry() {
                None => self.changed.wait(&mut clock),
                Some(first) if first.key().0 > now => {
                    let due = first.key().0;
                    self.changed.wait_until(&mut clock, due);
                }
                Some(first) => {
                    let (run, caller) = first.remove();
                    drop(clock);
                    if let Some(run) = run.upgrade() {
                        run.leave(caller, Leaving::Late);
                    }
                    clock = self.lock();
                }
            }
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

    fn add(&self, at: Instant, run: Weak<dyn Leave>, caller: u64) -> Due {
        let mut clock = self.shared.lock();
        clock.last += 1;
        let key = (at, clock.last);
        clock.due.insert(key, (run, caller));
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
