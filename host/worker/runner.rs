//! The [`Runner`] that has kernels run in a worker process.

use std::io;
use std::ops::RangeInclusive;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use strait_memory::{ResultPool, SharedSource};
use strait_tensor::TensorSpec;

use super::channel::ReceiveError;
use super::compiler::{CompilerSettings, Compilers};
use super::confine::Bounds;
use super::crew::{Crew, CrewSettings, is_over};
use super::exchange::{Exchange, Given, Trouble, over};
use super::messages::Start;
use super::prepared::Prepared;
use super::program::{Program, Recipe, Role};
use crate::engine::{
    Cache, CancelToken, Cause, Done, EngineConfig, Failed, Job, LoadError, Means, OutputBody,
    Owner, Ready, Runner, RunnerCounts, RunnerProcess, Source, Stage,
};
use crate::plugin::Plugin;

/// How the workers of a host are set up.
#[derive(Debug)]
pub struct WorkerSettings<'a> {
    /// The `strait` program; none: the one that this process runs.
    pub program: Option<&'a Path>,
    /// Its arguments, from the name of the command on.
    pub arguments: Vec<String>,
    /// Runs at a time.
    pub lanes: usize,
    /// Streams at a time, beside those.
    pub streams: usize,
    /// Whether to start none where a wall is lacking.
    pub require_walls: bool,
    /// What a run gets beyond its deadline, or after it was cancelled, to end by itself.
    pub grace: Duration,
    /// What each of them may have.
    pub bounds: Bounds,
    /// Users for them, and for compilers; none: they have the host's.
    pub uids: Option<RangeInclusive<u32>>,
    /// How many there are, and for how long.
    pub crew: CrewSettings,
    /// How kernels run there.
    pub engine: EngineConfig,
    /// What loading plugins may cost.
    pub compilers: CompilerSettings,
    /// Warm mappings of inputs, idle or in use.
    pub parked_mappings_max: u64,
    /// Bytes of idle ones.
    pub parked_bytes_max: u64,
}

/// Runs kernels in worker processes. One that ends is followed by another.
#[derive(Debug)]
pub struct WorkerRunner {
    recipe: Arc<Recipe>,
    compilers: Compilers,
    grace: Duration,
    crew: Arc<Crew>,
    last_run: AtomicU64,
    invocations: AtomicU64,
    running: AtomicU64,
}

impl WorkerRunner {
    /// Workers that fill segments of `pool`. They start with the first run of each owner.
    ///
    /// # Errors
    /// The program cannot be opened.
    pub fn new(settings: WorkerSettings<'_>, pool: Arc<ResultPool>) -> io::Result<Self> {
        let program = Program::open(settings.program, settings.arguments, settings.uids)?;
        let cache = Cache::open(settings.engine.cache.as_deref());
        let recipe = Arc::new(Recipe {
            role: Role::Worker,
            program: Arc::new(program),
            lanes: settings.lanes,
            require_walls: settings.require_walls,
            start: Start {
                engine: EngineConfig {
                    // The host's alone.
                    cache: None,
                    ..settings.engine
                },
                parked_mappings_max: settings.parked_mappings_max,
                parked_bytes_max: settings.parked_bytes_max,
                bounds: settings.bounds,
                uid: None,
                streams: settings.streams,
            },
            census: Arc::default(),
        });
        Ok(Self {
            compilers: Compilers::new(settings.compilers, &recipe, cache),
            crew: Arc::new(Crew::new(Arc::clone(&recipe), settings.crew, pool)),
            recipe,
            grace: settings.grace,
            last_run: AtomicU64::new(0),
            invocations: AtomicU64::new(0),
            running: AtomicU64::new(0),
        })
    }

    fn run(&self, job: &Job, means: &Means, open_only: bool) -> Result<Given, Failed> {
        let mut was_alone = false;
        let given = match self.run_in(job, means, open_only, false, &mut was_alone) {
            // Nothing of it has left the worker, and it may have been another run that ended that: once more, where it can
            // hurt nobody else.
            Err(Trouble::Lost(ReceiveError::Gone)) if can_be_repeated(means) => {
                self.run_in(job, means, open_only, true, &mut was_alone)
            }
            given => given,
        };
        given.map_err(|trouble| failed(job, trouble, was_alone, &means.cancel, means.deadline))
    }

    /// `alone`: in a worker that ends after it.
    pub(super) fn run_in(
        &self,
        job: &Job,
        means: &Means,
        open_only: bool,
        alone: bool,
        was_alone: &mut bool,
    ) -> Result<Given, Trouble> {
        *was_alone = false;
        let seated = self.crew.take(means, alone)?;
        let lane = seated.process().lane();
        let mut exchange = Exchange::new(lane, job, means, self.grace);
        let given = exchange.whole(self.next_run(), open_only);
        if let Err(Trouble::Lost(lost)) = &given {
            *was_alone = exchange.was_alone();
            // What it would have filled is forgotten with its seat.
            seated.process().kill(&lost.to_string());
            self.crew.bury(seated.process(), exchange.into_segments());
        }
        given
    }

    pub(super) fn next_run(&self) -> u64 {
        self.last_run.fetch_add(1, Ordering::Relaxed) + 1
    }

    pub(super) fn crew(&self) -> &Arc<Crew> {
        &self.crew
    }

    pub(super) fn grace(&self) -> Duration {
        self.grace
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
        Source::Inline(_) => true,
    };
    !is_over(means) && means.inputs.iter().all(is_final)
}

impl Runner for WorkerRunner {
    fn load(&self, bytes: Arc<[u8]>) -> Result<Plugin, LoadError> {
        self.compilers.load(bytes)
    }

    fn invoke(&self, job: &Job, means: Means) -> Result<Done, Failed> {
        match self.counted(|| self.run(job, &means, false))? {
            Given::Done(done) => Ok(*done),
            Given::Specs(_) => Err(Failed::new(
                &job.kernel.kernel().name,
                Stage::Run,
                Cause::Host("the worker did not run it".to_owned()),
            )),
        }
    }

    fn prepare(self: Arc<Self>, job: Job, means: Means) -> Result<Box<dyn Ready>, Failed> {
        Ok(Box::new(Prepared::new(self, job, means)?))
    }

    fn open_only(&self, job: &Job, means: Means) -> Result<Vec<(String, TensorSpec)>, Failed> {
        match self.run(job, &means, true)? {
            Given::Specs(specs) => Ok(specs),
            Given::Done(done) => Ok(done
                .outputs
                .into_iter()
                .flat_map(|output| match output.body {
                    OutputBody::Segment { layout, .. } => {
                        let tensors = layout.tensors.into_iter();
                        tensors.map(|place| (place.name, place.spec)).collect()
                    }
                    OutputBody::Inline { spec, .. } => vec![(output.port, spec)],
                })
                .collect()),
        }
    }

    fn counts(&self) -> RunnerCounts {
        let (totals, parked) = self.crew.totals();
        RunnerCounts {
            invocations: self.invocations.load(Ordering::Relaxed),
            running: self.running.load(Ordering::Relaxed),
            copied_in: totals.copied_in,
            copied_out: totals.copied_out,
            parked,
            births: (totals.huge_asked, totals.huge),
            processes: (
                self.recipe.census.living.load(Ordering::Relaxed),
                self.recipe.census.started.load(Ordering::Relaxed),
                self.recipe.census.lost.load(Ordering::Relaxed),
            ),
            process_fds: self.recipe.census.fds.load(Ordering::Relaxed),
        }
    }

    fn cpu_time(&self, owner: Owner) -> Duration {
        self.crew.cpu_time(owner)
    }

    fn processes(&self) -> Vec<RunnerProcess> {
        self.crew.processes()
    }

    fn end_idle(&self, now: Instant) {
        self.crew.end_idle(now);
    }
}
