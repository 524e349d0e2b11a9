//! A bounded number of threads on which kernels run, and one queue before them.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;

type Job = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct Queue {
    /// By the number that [`Queued`] knows.
    jobs: VecDeque<(u64, Job)>,
    last: u64,
    /// Places that [`Workers::reserve`] gave out and that hold no job yet.
    reserved: usize,
    /// Threads that wait for a job.
    idle: usize,
    ending: bool,
}

#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    more: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// The queue is full.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{queue_len} invocations are waiting already, as many as the host's queue takes; try again later"
)]
pub(super) struct QueueFull {
    /// Its length.
    pub queue_len: usize,
}

/// The threads. Dropping it lets what is queued finish, then joins them.
pub(super) struct Workers {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    queue_len_max: usize,
}

impl std::fmt::Debug for Workers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Workers")
            .field("threads", &self.threads.len())
            .finish_non_exhaustive()
    }
}

fn work(shared: &Shared) {
    let mut queue = shared.lock();
    loop {
        if let Some((_, job)) = queue.jobs.pop_front() {
            drop(queue);
            // A bug of ours in one invocation must not end the thread for the others; the
            // invocation's callers learn of it because its reply channel is dropped.
            if catch_unwind(AssertUnwindSafe(job)).is_err() {
                tracing::error!("an invocation panicked; this is a bug of strait");
            }
            queue = shared.lock();
        } else if queue.ending {
            return;
        } else {
            queue.idle += 1;
            queue = shared.more.wait(queue).unwrap_or_else(|e| e.into_inner());
            queue.idle -= 1;
        }
    }
}

impl Workers {
    /// # Errors
    /// If Linux gives no threads.
    pub(super) fn new(threads: usize, queue_len_max: usize) -> std::io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let mut workers = Self {
            shared,
            threads: Vec::new(),
            queue_len_max,
        };
        for index in 0..threads.max(1) {
            let shared = Arc::clone(&workers.shared);
            let thread = std::thread::Builder::new()
                .name(format!("strait-worker-{index}"))
                .spawn(move || work(&shared))?;
            workers.threads.push(thread);
        }
        Ok(workers)
    }

    /// A place in the queue.
    ///
    /// # Errors
    /// [`QueueFull`].
    pub(super) fn reserve(&self) -> Result<Place, QueueFull> {
        let mut queue = self.shared.lock();
        // A thread that has yet to wake for its job keeps nobody waiting.
        let queue_len = (queue.jobs.len() + queue.reserved).saturating_sub(queue.idle);
        if queue_len >= self.queue_len_max {
            return Err(QueueFull { queue_len });
        }
        queue.reserved += 1;
        Ok(Place {
            shared: Arc::clone(&self.shared),
            filled: false,
        })
    }
}

/// A place in the queue, to be filled or given back by dropping it.
pub(super) struct Place {
    shared: Arc<Shared>,
    filled: bool,
}

impl Place {
    /// Runs `job` when a thread is free.
    pub(super) fn submit(mut self, job: impl FnOnce() + Send + 'static) -> Queued {
        let mut queue = self.shared.lock();
        self.filled = true;
        queue.reserved -= 1;
        queue.last += 1;
        let id = queue.last;
        queue.jobs.push_back((id, Box::new(job)));
        let waits = queue.jobs.len() > queue.idle;
        drop(queue);
        self.shared.more.notify_one();
        Queued {
            shared: Arc::clone(&self.shared),
            id,
            waits,
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if !self.filled {
            self.shared.lock().reserved -= 1;
        }
    }
}

/// A job that was submitted.
pub(super) struct Queued {
    shared: Arc<Shared>,
    id: u64,
    /// No thread was free for it at that moment.
    pub(super) waits: bool,
}

impl std::fmt::Debug for Queued {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Queued")
            .field("id", &self.id)
            .field("waits", &self.waits)
            .finish_non_exhaustive()
    }
}

impl Queued {
    /// Takes the job out of the queue and drops it, if no thread has begun it.
    pub(super) fn withdraw(&self) {
        let mut queue = self.shared.lock();
        let at = queue.jobs.iter().position(|(id, _)| *id == self.id);
        let job = at.and_then(|at| queue.jobs.remove(at));
        drop(queue);
        // Whoever waits for it is told by that: not under the lock.
        drop(job);
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.shared.lock().ending = true;
        self.shared.more.notify_all();
        let own = std::thread::current().id();
        for thread in self.threads.drain(..) {
            // The last holder of the host may be a job of ours, which cannot wait for itself.
            if thread.thread().id() == own {
                continue;
            }
            // A worker catches what its jobs panic with, so joining cannot fail for that.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    /// Two threads that wait for a job.
    fn two_idle(queue_len_max: usize) -> Workers {
        let workers = Workers::new(2, queue_len_max).expect("threads");
        while workers.shared.lock().idle < 2 {
            std::thread::yield_now();
        }
        workers
    }

    #[test]
    fn who_has_a_thread_does_not_wait() {
        for _ in 0..200 {
            let workers = two_idle(1);
            let (done, all_done) = mpsc::channel();
            let mut gates = Vec::new();
            for waits in [false, false, true] {
                let ((open, gate), done) = (mpsc::channel::<()>(), done.clone());
                let queued = workers.reserve().expect("a place").submit(move || {
                    gate.recv().expect("opened");
                    done.send(()).expect("counted");
                });
                assert_eq!(queued.waits, waits);
                gates.push(open);
            }
            assert_eq!(workers.reserve().err(), Some(QueueFull { queue_len: 1 }));
            for open in gates {
                open.send(()).expect("it runs or will");
            }
            (0..3).for_each(|_| all_done.recv().expect("done"));
        }
    }

    #[test]
    fn a_place_is_given_back_filled_or_not() {
        let workers = two_idle(1);
        for _ in 0..10 {
            let places: Vec<_> = (0..3)
                .map(|_| workers.reserve().expect("a place"))
                .collect();
            assert!(workers.reserve().is_err());
            drop(places);
            let (done, is_done) = mpsc::channel();
            let place = workers.reserve().expect("a place");
            place.submit(move || done.send(()).expect("it is waited for"));
            is_done.recv().expect("done");
            while workers.shared.lock().idle < 2 {
                std::thread::yield_now();
            }
            assert_eq!(workers.shared.lock().reserved, 0);
        }
    }
}
