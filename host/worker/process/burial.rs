//! What waits until Linux has taken a process apart that was killed: gigabytes take it a third of a second.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

/// How long anybody waits for that.
const BURIAL_MAX: Duration = Duration::from_secs(2);

/// Whether it is done.
#[derive(Debug, Default)]
pub(super) struct Burial {
    is_over: Mutex<bool>,
    changed: Condvar,
}

impl Burial {
    pub(super) fn end(&self) {
        *self.is_over.lock() = true;
        self.changed.notify_all();
    }

    /// Returns when it is over, or takes too long.
    pub(super) fn wait(&self) {
        let until = Instant::now() + BURIAL_MAX;
        let mut is_over = self.is_over.lock();
        while !*is_over && !self.changed.wait_until(&mut is_over, until).timed_out() {}
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
}
