//! Runs in the workers of their owners: a seat for each, once more for one that another's end has ended, and how many.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use strait_memory::SharedSource;

use super::channel::ReceiveError;
use super::crew::{Crew, is_over};
use super::exchange::{Exchange, Given, Trouble, over};
use crate::engine::{CancelToken, Cause, Chain, ChainDone, Failed, Job, Means, Source, Stage};

/// What all runs have in common.
#[derive(Debug)]
pub(super) struct Runs {
    crew: Arc<Crew>,
    grace: Duration,
    last: AtomicU64,
    invocations: AtomicU64,
    running: AtomicU64,
}

impl Runs {
    /// Runs in `crew`, each of which gets `grace` beyond its deadline.
    pub(super) fn new(crew: Arc<Crew>, grace: Duration) -> Self {
        Self {
            crew,
            grace,
            last: AtomicU64::new(0),
            invocations: AtomicU64::new(0),
            running: AtomicU64::new(0),
        }
    }

    /// Runs `job`, or opens it only.
    ///
    /// # Errors
    /// [`Failed`].
    pub(super) fn run(&self, job: &Job, means: &Means, open_only: bool) -> Result<Given, Failed> {
        self.repeated(job, means, true, |exchange| {
            exchange.whole(self.next_number(), open_only)
        })
    }

    /// Runs several kernels at once.
    ///
    /// # Errors
    /// [`Failed`].
    pub(super) fn chain(&self, chain: &Chain, means: &Means) -> Result<ChainDone, Failed> {
        let Some(job) = chain.stages.first() else {
            return Ok(ChainDone::default());
        };
        // Which of several plugins it was is not known.
        let known = chain.is_of_one_plugin();
        self.repeated(job, means, known, |exchange| {
            exchange.chained(self.next_number(), chain)
        })
    }

    /// Has `run` talk to a worker, and once more to another one if that ends meanwhile. `known`: whose fault that is, if nothing else was
    /// there.
    fn repeated<T>(
        &self,
        job: &Job,
        means: &Means,
        known: bool,
        run: impl Fn(&mut Exchange<'_>) -> Result<T, Trouble>,
    ) -> Result<T, Failed> {
        let mut was_alone = false;
        let given = match self.seated(job, means, false, &mut was_alone, &run) {
            // Nothing of it has left the worker, and it may have been another run that ended that: once more, where it can
            // hurt nobody else.
            Err(Trouble::Lost(ReceiveError::Gone)) if can_be_repeated(means) => {
                self.seated(job, means, true, &mut was_alone, &run)
            }
            given => given,
        };
        let (cancel, deadline) = (&means.cancel, means.deadline);
        given.map_err(|trouble| failed(job, trouble, was_alone && known, cancel, deadline))
    }

    /// Runs `job` in a worker that ends after it.
    pub(super) fn run_alone(
        &self,
        job: &Job,
        means: &Means,
        was_alone: &mut bool,
    ) -> Result<Given, Trouble> {
        self.seated(job, means, true, was_alone, |exchange| {
            exchange.whole(self.next_number(), false)
        })
    }

    /// `alone`: in a worker that ends after it.
    fn seated<T>(
        &self,
        job: &Job,
        means: &Means,
        alone: bool,
        was_alone: &mut bool,
        run: impl FnOnce(&mut Exchange<'_>) -> Result<T, Trouble>,
    ) -> Result<T, Trouble> {
        *was_alone = false;
        let seated = self.crew.take(means, alone)?;
        let lane = seated.process().lane();
        let mut exchange = Exchange::new(lane, job, means, self.grace);
        let given = run(&mut exchange);
        if let Err(Trouble::Lost(lost)) = &given {
            *was_alone = exchange.was_alone();
            // What it would have filled is forgotten with its seat.
            seated.process().kill(&lost.to_string());
            self.crew.bury(seated.process(), exchange.into_segments());
        }
        given
    }

    /// A number for another one.
    pub(super) fn next_number(&self) -> u64 {
        self.last.fetch_add(1, Ordering::Relaxed) + 1
    }

    pub(super) fn crew(&self) -> &Arc<Crew> {
        &self.crew
    }

    pub(super) fn grace(&self) -> Duration {
        self.grace
    }

    /// Invocations so far, and those that run.
    pub(super) fn counts(&self) -> (u64, u64) {
        let [invocations, running] =
            [&self.invocations, &self.running].map(|count| count.load(Ordering::Relaxed));
        (invocations, running)
    }

    pub(super) fn counted<R>(&self, run: impl FnOnce() -> R) -> R {
        self.invocations.fetch_add(1, Ordering::Relaxed);
        self.running.fetch_add(1, Ordering::Relaxed);
        let given = run();
        self.running.fetch_sub(1, Ordering::Relaxed);
        given
    }
}

/// What is told of a run of `job` that was over or is, and did not end well; nothing of another plugin was beside it in its
/// process, if it `was_alone`.
pub(super) fn failed(
    job: &Job,
    trouble: Trouble,
    was_alone: bool,
    cancel: &CancelToken,
    deadline: Instant,
) -> Failed {
    let took_process = match &trouble {
        // It did not end when it was to: that the worker had to is its own doing.
        Trouble::Lost(ReceiveError::Late) => was_alone,
        // Whoever cancels a run may do it at the moment when something else ends its worker.
        Trouble::Lost(_) => was_alone && !cancel.is_cancelled(),
        Trouble::Failed(_) | Trouble::Own(_) => false,
    };
    let cause = match trouble {
        Trouble::Failed(failed) => return failed,
        Trouble::Own(cause) => cause,
        Trouble::Lost(_) => over(job, cancel, deadline).unwrap_or(Cause::Lost),
    };
    Failed {
        took_process,
        ..Failed::new(&job.kernel.kernel().name, Stage::Run, cause)
    }
}

/// Whether a run would find what it found the first time, and has time for it.
pub(super) fn can_be_repeated(means: &Means) -> bool {
    let is_final = |source: &Source<dyn SharedSource>| match source {
        Source::Segment(source) => source.is_final(),
        Source::Inline(_) | Source::Linked => true,
    };
    !is_over(means) && means.inputs.iter().all(is_final)
}
