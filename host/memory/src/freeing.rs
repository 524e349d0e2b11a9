//! A thread on which what is big is freed, so that whoever lets go of it need not wait.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

type Garbage = Box<dyn Send>;

#[derive(Default)]
struct State {
    waiting: VecDeque<Garbage>,
    /// Something is being freed now.
    busy: bool,
    /// How much was freed so far.
    freed: u64,
    ending: bool,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Garbage is dropped without the lock, so a panic there leaves the state whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed
            .wait(state)
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self) {
        let mut state = self.lock();
        loop {
            if let Some(garbage) = state.waiting.pop_front() {
                state.busy = true;
                drop(state);
                drop(garbage);
                state = self.lock();
                state.busy = false;
                state.freed += 1;
                self.changed.notify_all();
            } else if state.ending {
                return;
            } else {
                state = self.wait(state);
            }
        }
    }
}

/// The thread. Dropping it lets what is waiting be freed first.
pub(crate) struct Freeing {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Freeing {
    pub(crate) fn start() -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let of_thread = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("strait-freeing".to_owned())
            .spawn(move || of_thread.work())?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    pub(crate) fn free(&self, garbage: Garbage) {
        self.shared.lock().waiting.push_back(garbage);
        self.shared.changed.notify_all();
    }

    /// A moment to give to [`Self::freed_since`].
    pub(crate) fn now(&self) -> u64 {
        self.shared.lock().freed
    }

    /// Waits until something has been freed after `moment`. False if nothing was and nothing
    /// is about to be.
    pub(crate) fn freed_since(&self, moment: u64) -> bool {
        let mut state = self.shared.lock();
        while state.freed == moment && (state.busy || !state.waiting.is_empty()) {
            state = self.shared.wait(state);
        }
        state.freed != moment
    }
}

impl Drop for Freeing {
    fn drop(&mut self) {
        self.shared.lock().ending = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take()
            // The last holder may be the garbage itself, and the thread cannot wait for itself.
            && thread.thread().id() != std::thread::current().id()
        {
            // It fails only if dropping panicked, which was reported there.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    struct Slow(mpsc::Receiver<()>);

    impl Drop for Slow {
        fn drop(&mut self) {
            let _ = self.0.recv();
        }
    }

    #[test]
    fn one_waits_for_what_is_being_freed_and_for_nothing_else() {
        let freeing = Freeing::start().expect("a thread");
        let moment = freeing.now();
        assert!(!freeing.freed_since(moment), "nothing is being freed");
        let (go, wait) = mpsc::channel();
        freeing.free(Box::new(Slow(wait)));
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| freeing.freed_since(moment));
            go.send(()).expect("it waits");
            assert!(waiting.join().expect("no panic"));
        });
        assert!(freeing.freed_since(moment), "it has been already");
        assert!(!freeing.freed_since(freeing.now()));
    }

    #[test]
    fn what_is_waiting_is_freed_at_the_end() {
        let freeing = Freeing::start().expect("a thread");
        let garbage = Arc::new(());
        for _ in 0..10 {
            freeing.free(Box::new(Arc::clone(&garbage)));
        }
        drop(freeing);
        assert_eq!(Arc::strong_count(&garbage), 1);
    }
}
