//! The clock behind deadlines and cancels: advances wasmtime's epoch while anything runs.

use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

/// Time between two checks inside a running kernel.
const TICK: Duration = Duration::from_millis(2);

#[derive(Debug, Default)]
struct Shared {
    /// (invocations that run, the engine is ending)
    running: Mutex<(usize, bool)>,
    changed: Condvar,
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

impl Ticker {
    pub(super) fn new(engine: wasmtime::Engine) -> Self {
        let shared = Arc::new(Shared::default());
        let watched = Arc::clone(&shared);
        let tick = move || {
            let mut running = watched.running.lock().unwrap_or_else(|e| e.into_inner());
            loop {
                if running.1 {
                    return;
                }
                let idle = running.0 == 0;
                running = if idle {
                    watched
                        .changed
                        .wait(running)
                        .unwrap_or_else(|e| e.into_inner())
                } else {
                    let timed = watched.changed.wait_timeout(running, TICK);
                    engine.increment_epoch();
                    timed.unwrap_or_else(|e| e.into_inner()).0
                };
            }
        };
        let thread = std::thread::Builder::new()
            .name("strait-epoch".to_owned())
            .spawn(tick)
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
        self.shared
            .running
            .lock()
            .unwrap_or_else(|e| e.into_inner())
            .0 += 1;
        self.shared.changed.notify_one();
        Ok(Ticking(Arc::clone(&self.shared)))
    }
}

impl Drop for Ticking {
    fn drop(&mut self) {
        self.0.running.lock().unwrap_or_else(|e| e.into_inner()).0 -= 1;
    }
}

impl Drop for Ticker {
    fn drop(&mut self) {
        self.shared
            .running
            .lock()
            .unwrap_or_else(|e| e.into_inner())
            .1 = true;
        self.shared.changed.notify_one();
        if let Some(thread) = self.thread.take() {
            // It only fails if the thread panicked, which it then reported itself.
            let _ = thread.join();
        }
    }
}
