//! A bounded number of threads on which kernels run, and the queue before them.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use rustix::time::{ClockId, clock_gettime};

use super::cpu::CpuOver;
use super::queue::{FairQueue, QueueFull, Share, Turn};
use crate::engine::{CancelToken, lent_cpu_time};

type Job = Box<dyn FnOnce() + Send>;

struct State {
    queue: FairQueue<Job>,
    /// Threads that wait for a job, by index. The last one's caches are the warmest.
    idle: Vec<usize>,
    ending: bool,
}

struct Shared {
    state: Mutex<State>,
    /// What each thread sleeps on: with one for all of them Linux wakes whoever slept longest.
    beds: Box<[Condvar]>,
}

impl Shared {
    /// Wakes a thread if there is a job for one that sleeps, or one to sleep no longer than somebody has to wait for its
    /// quota of CPU time.
    fn wake(&self, state: &mut State) {
        if (state.queue.has_next() || state.queue.next_opening().is_some())
            && let Some(thread) = state.idle.pop()
        {
            self.beds[thread].notify_one();
        }
    }

    fn wake_all(&self, state: &mut State) {
        for thread in state.idle.drain(..) {
            self.beds[thread].notify_one();
        }
    }
}

/// The threads. Dropping it lets what is queued, or has a place, finish, then joins them.
pub(super) struct Workers {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl std::fmt::Debug for Workers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Workers")
            .field("threads", &self.threads.len())
            .finish_non_exhaustive()
    }
}

/// CPU time of the calling thread, and of others for it.
fn cpu_time() -> Duration {
    // A clock of Linux's own threads is never before its start.
    Duration::try_from(clock_gettime(ClockId::ThreadCPUTime)).unwrap_or_default() + lent_cpu_time()
}

fn work(shared: &Shared, index: usize) {
    let mut state = shared.state.lock();
    loop {
        if let Some((turn, job)) = state.queue.take() {
            // The job that this thread was woken for may have been taken by another, and then woken nobody.
            shared.wake(&mut state);
            drop(state);
            let (begin, cpu) = (Instant::now(), cpu_time());
            // A bug of ours in one invocation must not end the thread for the others; the
            // invocation's callers learn of it because its reply channel is dropped.
            if catch_unwind(AssertUnwindSafe(job)).is_err() {
                tracing::error!("an invocation panicked; this is a bug of strait");
            }
            turn.share().cpu().count(cpu_time().saturating_sub(cpu));
            state = shared.state.lock();
            state.queue.end(&turn, begin.elapsed());
        } else if state.ending && state.queue.is_drained() {
            // Another thread may sleep until the queue is empty.
            shared.wake_all(&mut state);
            return;
        } else {
            state.idle.push(index);
            let opening = state.queue.next_opening();
            while state.idle.contains(&index) {
                match opening {
                    None => shared.beds[index].wait(&mut state),
                    Some(at) => {
                        if shared.beds[index].wait_until(&mut state, at).timed_out() {
                            state.idle.retain(|idle| *idle != index);
                        }
                    }
                }
            }
        }
    }
}

impl Workers {
    /// Threads for `slots` jobs at a time and the one more that [`FairQueue`] may let run.
    ///
    /// # Errors
    /// If Linux gives no threads.
    pub(super) fn new(slots: usize, queue_len_max: usize) -> std::io::Result<Self> {
        let slots = slots.max(1);
        let state = State {
            queue: FairQueue::new(slots, queue_len_max),
            idle: Vec::new(),
            ending: false,
        };
        let shared = Shared {
            state: Mutex::new(state),
            beds: (0..=slots).map(|_| Condvar::new()).collect(),
        };
        let mut workers = Self {
            shared: Arc::new(shared),
            threads: Vec::new(),
        };
        for index in 0..=slots {
            let shared = Arc::clone(&workers.shared);
            let thread = std::thread::Builder::new()
                .name(format!("strait-worker-{index}"))
                .spawn(move || work(&shared, index))?;
            workers.threads.push(thread);
        }
        Ok(workers)
    }

    /// A [`Share`]'s limits are others now: its jobs may begin.
    pub(super) fn limits_changed(&self) {
        // Under the lock: a thread that has just looked would sleep through it.
        self.shared.wake_all(&mut self.shared.state.lock());
    }

    /// A turn at once for work on the calling thread, if nothing else waits for one.
    pub(super) fn begin(&self, share: &Arc<Share>) -> Option<OwnTurn> {
        let turn = self.shared.state.lock().queue.begin(share)?;
        let held = Held::Place {
            shared: Arc::clone(&self.shared),
            turn,
            begin: Instant::now(),
        };
        Some(OwnTurn::new(share, held))
    }

    /// A place in the queue for a job of `share`'s principal.
    ///
    /// # Errors
    /// [`QueueFull`].
    pub(super) fn reserve(&self, share: &Arc<Share>) -> Result<Permit, QueueFull> {
        self.shared.state.lock().queue.reserve(share)?;
        Ok(Permit {
            shared: Arc::clone(&self.shared),
            share: Arc::clone(share),
            filled: false,
        })
    }
}

/// A turn of the thread that has it, until it is dropped there.
pub(super) struct OwnTurn {
    share: Arc<Share>,
    cpu: Duration,
    held: Held,
}

enum Held {
    /// It keeps none of the threads.
    Place {
        shared: Arc<Shared>,
        turn: Turn,
        begin: Instant,
    },
    /// One of the threads has its turn for it, until this is dropped.
    Thread { _over: Sender<()> },
}

/// Why there was no turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NoTurn {
    Late,
    Cancelled,
    /// The threads are gone.
    Ended,
}

impl OwnTurn {
    fn new(share: &Arc<Share>, held: Held) -> Self {
        Self {
            share: Arc::clone(share),
            cpu: cpu_time(),
            held,
        }
    }
}

impl Drop for OwnTurn {
    fn drop(&mut self) {
        self.share.cpu().count(cpu_time().saturating_sub(self.cpu));
        if let Held::Place {
            shared,
            turn,
            begin,
        } = &self.held
        {
            let mut state = shared.state.lock();
            state.queue.end(turn, begin.elapsed());
            shared.wake(&mut state);
            if state.ending {
                shared.wake_all(&mut state);
            }
        }
    }
}

/// A place in the queue, to be filled or given back by dropping it.
pub(super) struct Permit {
    shared: Arc<Shared>,
    share: Arc<Share>,
    filled: bool,
}

impl Permit {
    /// Runs `job` when it is its principal's turn and a thread is free.
    pub(super) fn submit(mut self, job: impl FnOnce() + Send + 'static) -> Queued {
        self.filled = true;
        let mut state = self.shared.state.lock();
        let (id, waits) = state.queue.push(&self.share, Box::new(job));
        self.shared.wake(&mut state);
        drop(state);
        Queued {
            shared: Arc::clone(&self.shared),
            share: Arc::clone(&self.share),
            id,
            waits,
        }
    }
}

impl Permit {
    /// Waits until it is its principal's turn and a thread is free, which then waits in its place.
    ///
    /// # Errors
    /// [`NoTurn`].
    pub(super) fn wait(self, until: Instant, cancel: &CancelToken) -> Result<OwnTurn, NoTurn> {
        let share = Arc::clone(&self.share);
        let (tell, told) = channel();
        let (over, is_over) = channel::<()>();
        let cancelled = tell.clone();
        // All of them may find that nobody waits for them any more.
        let queued = self.submit(move || {
            if tell.send(Ok(())).is_ok() {
                let _ = is_over.recv();
            }
        });
        let _telling = cancel.telling(move || {
            let _ = cancelled.send(Err(NoTurn::Cancelled));
        });
        let left = until.saturating_duration_since(Instant::now());
        let turn = told.recv_timeout(left).unwrap_or_else(|error| {
            Err(match error {
                RecvTimeoutError::Timeout => NoTurn::Late,
                RecvTimeoutError::Disconnected => NoTurn::Ended,
            })
        });
        if turn.is_err() {
            queued.withdraw();
        }
        turn.map(|()| OwnTurn::new(&share, Held::Thread { _over: over }))
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        if !self.filled {
            let mut state = self.shared.state.lock();
            state.queue.give_back(&self.share);
            if state.ending {
                // It may have been the last one that the threads waited for.
                self.shared.wake_all(&mut state);
            }
        }
    }
}

/// A job that was submitted.
pub(super) struct Queued {
    shared: Arc<Shared>,
    share: Arc<Share>,
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
    /// Whether it waits because its principal has used too much CPU time.
    pub(super) fn cpu_over(&self) -> Option<CpuOver> {
        self.share.cpu().over()
    }

    /// Takes the job out of the queue and drops it, if no thread has begun it.
    pub(super) fn withdraw(&self) {
        let mut state = self.shared.state.lock();
        let job = state.queue.withdraw(&self.share, self.id);
        if state.ending {
            // It may have been the last one that the threads waited for.
            self.shared.wake_all(&mut state);
        }
        drop(state);
        // Whoever waits for it is told by that: not under the lock.
        drop(job);
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        let mut state = self.shared.state.lock();
        state.ending = true;
        self.shared.wake_all(&mut state);
        drop(state);
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
    use crate::session::cpu::CpuMeter;

    fn share(whose: &str) -> Arc<Share> {
        Share::new(whose.into(), usize::MAX, usize::MAX, CpuMeter::default())
    }

    fn settle(workers: &Workers) {
        while !workers.shared.state.lock().queue.is_empty() {
            std::thread::yield_now();
        }
    }

    /// A job that runs until it is told to end, and tells when it has begun and ended.
    struct Gated {
        queued: Queued,
        open: mpsc::Sender<()>,
        begun: mpsc::Receiver<()>,
        ended: mpsc::Receiver<()>,
    }

    fn gated(workers: &Workers, share: &Arc<Share>) -> Gated {
        let ((open, gate), (begin, begun), (end, ended)) =
            (mpsc::channel(), mpsc::channel(), mpsc::channel());
        let place = workers.reserve(share).expect("a place");
        let queued = place.submit(move || {
            begin.send(()).expect("waited for");
            gate.recv().expect("opened");
            end.send(()).expect("waited for");
        });
        Gated {
            queued,
            open,
            begun,
            ended,
        }
    }

    #[test]
    fn who_has_a_thread_does_not_wait() {
        for _ in 0..200 {
            let (workers, one) = (Workers::new(2, 1).expect("threads"), share("one"));
            let jobs = [false, false, true].map(|waits| {
                let job = gated(&workers, &one);
                assert_eq!(job.queued.waits, waits);
                job
            });
            let full = QueueFull::Host { waiting: 1 };
            assert_eq!(workers.reserve(&one).err(), Some(full));
            for job in &jobs {
                job.open.send(()).expect("it runs or will");
            }
            for job in jobs {
                job.ended.recv().expect("done");
            }
        }
    }

    #[test]
    fn a_place_is_given_back_filled_or_not() {
        let (workers, one) = (Workers::new(2, 1).expect("threads"), share("one"));
        for _ in 0..10 {
            let places: Vec<_> = (0..3)
                .map(|_| workers.reserve(&one).expect("a place"))
                .collect();
            assert!(workers.reserve(&one).is_err());
            drop(places);
            let (done, is_done) = mpsc::channel();
            let place = workers.reserve(&one).expect("a place");
            place.submit(move || done.send(()).expect("it is waited for"));
            is_done.recv().expect("done");
            settle(&workers);
        }
    }

    #[test]
    fn one_who_runs_nothing_begins_beside_long_jobs_of_another() {
        let workers = Workers::new(2, 1000).expect("threads");
        let (one, two, three) = (share("one"), share("two"), share("three"));
        let long: Vec<_> = (0..50).map(|_| gated(&workers, &one)).collect();
        long[0].begun.recv().expect("begun");
        long[1].begun.recv().expect("begun");
        let other = gated(&workers, &two);
        other
            .begun
            .recv()
            .expect("begun while both threads are taken");
        let second = gated(&workers, &two);
        let third = gated(&workers, &three);
        assert!(second.queued.waits && third.queued.waits);
        assert_eq!(workers.shared.state.lock().queue.running(), 3);
        other.open.send(()).expect("it runs");
        // Whoever runs nothing, by turns: not the first one's next.
        second.begun.recv().expect("begun");
        second.open.send(()).expect("it runs");
        third.begun.recv().expect("begun");
        third.open.send(()).expect("it runs");
        for job in &long[2..] {
            job.queued.withdraw();
        }
        long[..2]
            .iter()
            .for_each(|job| job.open.send(()).expect("it runs"));
        settle(&workers);
        assert!(long[2].begun.recv().is_err(), "it was withdrawn");
        assert_eq!((one.used().runs, two.used().runs), (2, 2));
    }

    #[test]
    fn cpu_time_is_the_jobs_own() {
        let (workers, one) = (Workers::new(1, 1).expect("threads"), share("one"));
        let burn = || {
            let begin = cpu_time();
            while cpu_time().saturating_sub(begin) < Duration::from_millis(20) {}
        };
        workers.reserve(&one).expect("a place").submit(burn);
        let sleep = || std::thread::sleep(Duration::from_millis(200));
        workers.reserve(&one).expect("a place").submit(sleep);
        settle(&workers);
        let used = one.cpu().used().total;
        let sensible = Duration::from_millis(20)..Duration::from_millis(200);
        assert!(sensible.contains(&used), "{used:?}");
    }

    #[test]
    fn who_has_used_too_much_cpu_time_begins_when_that_has_flowed_off() {
        let (workers, one, two) = (
            Workers::new(2, 100).expect("threads"),
            share("one"),
            share("two"),
        );
        one.cpu().set_limit(100_000);
        // Half a second too much.
        one.cpu().count(Duration::from_millis(60_500_000));
        let begin = Instant::now();
        let job = gated(&workers, &one);
        assert!(job.queued.waits);
        // Threads that were woken meanwhile sleep on no longer than that.
        for _ in 0..10 {
            let other = gated(&workers, &two);
            other.open.send(()).expect("it runs");
            other.ended.recv().expect("done");
        }
        job.begun.recv().expect("begun");
        let waited = begin.elapsed();
        assert!(waited > Duration::from_millis(300), "{waited:?}");
        job.open.send(()).expect("it runs");
        settle(&workers);
        // Nobody waits for a quota that gives nothing at the end, once its caller has left.
        one.cpu().set_limit(0);
        let never = gated(&workers, &one);
        let ending = std::thread::spawn(move || drop(workers));
        never.queued.withdraw();
        ending.join().expect("no panic");
        assert!(never.begun.recv().is_err(), "it was withdrawn");
    }

    #[test]
    fn who_has_a_place_at_the_end_still_runs() {
        let (workers, one) = (Workers::new(2, 100).expect("threads"), share("one"));
        let [filled, given_back] = [(); 2].map(|()| workers.reserve(&one).expect("a place"));
        let shared = Arc::clone(&workers.shared);
        let ending = std::thread::spawn(move || drop(workers));
        let asleep = || {
            let state = shared.state.lock();
            state.ending && state.idle.len() == 3
        };
        let begin = Instant::now();
        while !(asleep() || ending.is_finished()) && begin.elapsed() < Duration::from_secs(5) {
            std::thread::yield_now();
        }
        let (done, is_done) = mpsc::channel();
        filled.submit(move || done.send(()).expect("it is waited for"));
        let ran = is_done.recv_timeout(Duration::from_secs(5));
        ran.expect("it runs though the end came before it");
        assert!(!ending.is_finished(), "the other one may still come");
        drop(given_back);
        ending.join().expect("no panic");
    }

    #[test]
    fn what_is_queued_at_the_end_still_runs() {
        let workers = Workers::new(2, 100).expect("threads");
        let (done, all) = mpsc::channel();
        for whose in ["one", "two", "three"] {
            let limited = Share::new(whose.into(), 100, 1, CpuMeter::default());
            for _ in 0..10 {
                let done = done.clone();
                let place = workers.reserve(&limited).expect("a place");
                place.submit(move || done.send(()).expect("counted"));
            }
        }
        drop((workers, done));
        assert_eq!(all.iter().count(), 30);
    }
}
