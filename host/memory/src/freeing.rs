//! A thread on which what is big is freed, so that whoever lets go of it need not wait; and which asks, from
//! time to time, whether what others still [have](Held) is gone.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::{Condvar, Mutex, MutexGuard};

/// How soon after something was found open elsewhere this is asked again; then twice as late each time.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// How many of those held elsewhere one round asks about: some milliseconds.
const ROUND_MAX: usize = 1024;

type Garbage = Box<dyn Send>;

/// Something that the host has let go of, and that others may still have. It is charged to a `B`: a budget, which
/// owns the thread and so is not named here.
pub(crate) trait Held<B>: Send {
    /// True as long as anybody has it.
    fn is_held(&mut self) -> bool;

    /// Whether `budget` has more room once it is gone.
    fn counts_in(&self, budget: &B) -> bool;
}

/// Those that are still held.
struct HeldElsewhere<B>(Mutex<VecDeque<Box<dyn Held<B>>>>);

impl<B> HeldElsewhere<B> {
    fn push(&self, held: Box<dyn Held<B>>) {
        self.0.lock().push_back(held);
    }

    fn is_empty(&self) -> bool {
        self.0.lock().is_empty()
    }

    /// Asks about some of those that count in `full` (None: about any), those first that were not asked for
    /// longest, and takes out those that nobody else has any more.
    fn take_gone(&self, full: Option<&B>) -> Vec<Box<dyn Held<B>>> {
        let mut gone = Vec::new();
        let mut asked = Vec::new();
        let mut all = self.0.lock();
        for _ in 0..all.len() {
            let Some(mut held) = all.pop_front() else {
                break;
            };
            if asked.len() + gone.len() == ROUND_MAX
                || full.is_some_and(|full| !held.counts_in(full))
            {
                all.push_back(held);
            } else if held.is_held() {
                asked.push(held);
            } else {
                gone.push(held);
            }
        }
        all.extend(asked);
        gone
    }
}

#[derive(Default)]
struct State {
    waiting: VecDeque<Garbage>,
    /// Something is being freed now.
    busy: bool,
    /// How much was freed so far.
    freed: u64,
    ending: bool,
    /// Until it is asked again what is open elsewhere. 0: something new is.
    pause: Duration,
}

struct Shared<B> {
    state: Mutex<State>,
    changed: Condvar,
    elsewhere: HeldElsewhere<B>,
}

impl<B> Shared<B> {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
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
            } else if self.elsewhere.is_empty() {
                self.changed.wait(&mut state);
            } else {
                let pause = state.pause.clamp(FIRST_PAUSE, LONGEST_PAUSE);
                state.pause = pause;
                if self.changed.wait_for(&mut state, pause).timed_out() {
                    state.pause *= 2;
                    drop(state);
                    drop(self.elsewhere.take_gone(None));
                    state = self.lock();
                }
            }
        }
    }
}

/// The thread. Dropping it lets what is waiting be freed first.
pub(crate) struct Freeing<B> {
    shared: Arc<Shared<B>>,
    thread: Option<JoinHandle<()>>,
}

impl<B: 'static> Freeing<B> {
    pub(crate) fn start() -> io::Result<Self> {
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            changed: Condvar::new(),
            elsewhere: HeldElsewhere(Mutex::default()),
        });
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

    /// Keeps `held`, and what is charged for it, until nobody else has it.
    pub(crate) fn keep(&self, held: Box<dyn Held<B>>) {
        self.shared.elsewhere.push(held);
        // With the lock: the thread either has not looked yet, or waits already.
        self.shared.lock().pause = Duration::ZERO;
        self.shared.changed.notify_all();
    }

    /// Asks at once about those kept that count in `full`. True if any of them is being freed.
    pub(crate) fn free_gone(&self, full: &B) -> bool {
        let gone = self.shared.elsewhere.take_gone(Some(full));
        let any = !gone.is_empty();
        for held in gone {
            self.free(Box::new(held));
        }
        any
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
            self.shared.changed.wait(&mut state);
        }
        state.freed != moment
    }
}

impl<B> Drop for Freeing<B> {
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
        let freeing = Freeing::<()>::start().expect("a thread");
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
        let freeing = Freeing::<()>::start().expect("a thread");
        let garbage = Arc::new(());
        for _ in 0..10 {
            freeing.free(Box::new(Arc::clone(&garbage)));
        }
        drop(freeing);
        assert_eq!(Arc::strong_count(&garbage), 1);
    }
}
