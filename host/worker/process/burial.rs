//! What waits until Linux has taken a process apart that was killed: gigabytes take it a third of a second.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

/// How long it is waited for, by all together.
const BURIAL_MAX: Duration = Duration::from_secs(2);

/// Whether it is done.
#[derive(Debug, Default)]
pub(super) struct Burial {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    is_over: bool,
    /// Since it is waited for.
    until: Option<Instant>,
}

impl Burial {
    pub(super) fn end(&self) {
        self.state.lock().is_over = true;
        self.changed.notify_all();
    }

    /// Returns when it is over, or takes too long.
    pub(super) fn wait(&self) {
        let mut state = self.state.lock();
        let latest = || Instant::now() + BURIAL_MAX;
        let until = *state.until.get_or_insert_with(latest);
        while !state.is_over && !self.changed.wait_until(&mut state, until).timed_out() {}
    }
}

/// Something that the process could still fill: dropping it waits.
#[derive(Debug)]
pub(in crate::worker) struct Buried<T> {
    burial: Arc<Burial>,
    // After that.
    what: Option<T>,
}

impl<T> Buried<T> {
    pub(super) fn new(burial: &Arc<Burial>, what: T) -> Self {
        Self {
            burial: Arc::clone(burial),
            what: Some(what),
        }
    }
}

impl<T> Drop for Buried<T> {
    fn drop(&mut self) {
        self.burial.wait();
        drop(self.what.take());
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    struct Dropped(Arc<AtomicBool>);

    impl Drop for Dropped {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }

    #[test]
    fn what_is_buried_is_dropped_when_the_process_is_no_more() {
        let (burial, is_dropped) = (Arc::new(Burial::default()), Arc::default());
        let buried = Buried::new(&burial, Dropped(Arc::clone(&is_dropped)));
        std::thread::scope(|scope| {
            let dropping = scope.spawn(move || drop(buried));
            assert!(!is_dropped.load(Ordering::Relaxed), "it is still there");
            burial.end();
            dropping.join().expect("no panic");
        });
        assert!(is_dropped.load(Ordering::Relaxed));
        // Later on nobody waits.
        drop(Buried::new(&burial, ()));
    }

    #[test]
    fn one_that_does_not_end_is_waited_for_once() {
        let (burial, begin) = (Arc::new(Burial::default()), Instant::now());
        drop(Buried::new(&burial, ()));
        let first = begin.elapsed();
        (0..100).for_each(|_| drop(Buried::new(&burial, ())));
        assert!(first >= BURIAL_MAX, "{first:?}");
        assert!(begin.elapsed() < 10 * BURIAL_MAX, "{:?}", begin.elapsed());
    }
}
