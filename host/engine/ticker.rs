//! The clock behind deadlines and cancels: while anything runs it advances wasmtime's epoch, at which guests check, or looks
//! after those that do not.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::{Condvar, Mutex, MutexGuard};

use super::Interruption;
use super::leash::{self, Leash};

/// Time between two checks of a running kernel.
const TICK: Duration = Duration::from_millis(2);
/// Ticks after the last invocation before the clock sleeps: waking it for every call of a series
/// would cost each one a switch of threads.
const LINGER_TICKS: u32 = 25;

#[derive(Debug, Default)]
struct State {
    /// Invocations that run.
    running: Vec<Arc<Leash>>,
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

/// Keeps the clock going for an invocation while it lives.
#[derive(Debug)]
pub(super) struct Ticking {
    shared: Arc<Shared>,
    leash: Arc<Leash>,
}

impl Ticking {
    pub(super) fn leash(&self) -> &Arc<Leash> {
        &self.leash
    }
}

fn tick(shared: &Shared, engine: &wasmtime::Engine, interruption: Interruption) {
    let mut idle_ticks = 0;
    let mut state = shared.lock();
    while !state.ending {
        let idle = state.running.is_empty();
        idle_ticks = if idle { idle_ticks + 1 } else { 0 };
        state.asleep = idle_ticks > LINGER_TICKS;
        if state.asleep {
            shared.changed.wait(&mut state);
            idle_ticks = 0;
        } else {
            // Only an end or a first invocation after a sleep is told, so this is one tick.
            shared.changed.wait_for(&mut state, TICK);
            match interruption {
                Interruption::Checks => engine.increment_epoch(),
                // With the lock: none of their threads goes on to something else meanwhile.
                Interruption::Signals => state.running.iter().for_each(|leash| leash.pull_if_due()),
                Interruption::None => {}
            }
        }
    }
}

impl Ticker {
    /// # Errors
    /// Linux takes no handler for the signals.
    pub(super) fn new(
        engine: wasmtime::Engine,
        interruption: Interruption,
    ) -> Result<Self, String> {
        if interruption == Interruption::Signals {
            leash::handle_signals()?;
        }
        let shared = Arc::new(Shared::default());
        let watched = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("strait-epoch".to_owned())
            .spawn(move || tick(&watched, &engine, interruption))
            .ok();
        Ok(Self { shared, thread })
    }

    /// # Errors
    /// If Linux gave no thread for the clock: without it nothing could be stopped.
    pub(super) fn start(&self, leash: Arc<Leash>) -> Result<Ticking, String> {
        if self.thread.is_none() {
            return Err(
                "no thread for the deadline clock; raise the limit of processes".to_owned(),
            );
        }
        let mut state = self.shared.lock();
        state.running.push(Arc::clone(&leash));
        let asleep = std::mem::take(&mut state.asleep);
        drop(state);
        if asleep {
            self.shared.changed.notify_one();
        }
        Ok(Ticking {
            shared: Arc::clone(&self.shared),
            leash,
        })
    }
}

impl Drop for Ticking {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state
            .running
            .retain(|leash| !Arc::ptr_eq(leash, &self.leash));
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
