//! The clock behind deadlines and cancels: advances wasmtime's epoch while anything runs.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::{Condvar, Mutex, MutexGuard};

/// Time between two checks inside a running kernel.
const TICK: Duration = Duration::from_millis(2);
/// Ticks after the last invocation before the clock sleeps: waking it for every call of a series
/// would cost each one a switch of threads.
const LINGER_TICKS: u32 = 25;

#[derive(Debug, Default)]
struct State {
    /// Invocations that run.
    running: usize,
    /// The clock waits to be woken.
    asleep: bool,
    /// The engine is ending.
    ending: bool,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }
}

/// One thread that sleeps while nothing runs.
#[derive(Debug)]
pub(super) struct Ticker {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// Keeps the clock going while it lives.
#[derive(Debug)]
pub(super) struct Ticking(Arc<Shared>);

fn tick(shared: &Shared, engine: &wasmtime::Engine) {
    let mut idle_ticks = 0;
    let mut state = shared.lock();
    while !state.ending {
        idle_ticks = if state.running > 0 { 0 } else { idle_ticks + 1 };
        state.asleep = idle_ticks > LINGER_TICKS;
        if state.asleep {
            shared.changed.wait(&mut state);
            idle_ticks = 0;
        } else {
            // Only an end or a first invocation after a sleep is told, so this is one tick.
            shared.changed.wait_for(&mut state, TICK);
            engine.increment_epoch();
        }
    }
}

impl Ticker {
    pub(super) fn new(engine: wasmtime::Engine) -> Self {
        let shared = Arc::new(Shared::default());
        let watched = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("strait-epoch".to_owned())
            .spawn(move || tick(&watched, &engine))
            .ok();
        Self { shared, thread }
    }

    /// # Errors
    /// If Linux gave no thread for the clock: without it nothing could be stopped.
    pub(super) fn start(&self) -> Result<Ticking, String> {
        if self.thread.is_none() {
            return Err(
                "no thread for the deadline clock; raise the limit of processes".to_owned(),
            );
        }
        let mut state = self.shared.lock();
        state.running += 1;
        let asleep = std::mem::take(&mut state.asleep);
        drop(state);
        if asleep {
            self.shared.changed.notify_one();
        }
        Ok(Ticking(Arc::clone(&self.shared)))
    }
}

impl Drop for Ticking {
    fn drop(&mut self) {
        self.0.lock().running -= 1;
    }
}

impl Drop for Ticker {
    fn drop(&mut self) {
        self.shared.lock().ending = true;
        self.shared.changed.notify_one();
        if let Some(thread) = self.thread.take() {
            // It only fails if the thread panicked, which it then reported itself.
            let _ = thread.join();
        }
    }
}
