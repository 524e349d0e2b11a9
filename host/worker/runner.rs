//! The [`Runner`] that has kernels run in a worker process.

use std::io;
use std::ops::RangeInclusive;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use strait_memory::ResultPool;
use strait_tensor::TensorSpec;

use super::compiler::{CompilerSettings, Compilers};
use super::confine::Bounds;
use super::crew::{Crew, CrewSettings};
use super::exchange::Given;
use super::messages::Start;
use super::prepared::Prepared;
use super::program::{Program, Recipe, Role};
use super::runs::Runs;
use crate::engine::{
    Cache, Cause, Chain, ChainDone, Done, EngineConfig, Failed, Job, LoadError, Means, OutputBody,
    Owner, Ready, Runner, RunnerCounts, RunnerProcess, Stage,
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
    runs: Arc<Runs>,
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
            runs: Arc::new(Runs::new(
                Arc::new(Crew::new(Arc::clone(&recipe), settings.crew, pool)),
                settings.grace,
            )),
            recipe,
        })
    }
}

impl Runner for WorkerRunner {
    fn load(&self, bytes: Arc<[u8]>) -> Result<Plugin, LoadError> {
        self.compilers.load(bytes)
    }

    fn invoke(&self, job: &Job, means: Means) -> Result<Done, Failed> {
        match self.runs.counted(|| self.runs.run(job, &means, false))? {
            Given::Done(done) => Ok(*done),
            Given::Specs(_) => Err(Failed::new(
                &job.kernel.kernel().name,
                Stage::Run,
                Cause::Host("the worker did not run it".to_owned()),
            )),
        }
    }

    fn chain(&self, chain: &Chain, means: Means) -> Result<ChainDone, Failed> {
        self.runs.counted(|| self.runs.chain(chain, &means))
    }

    fn prepare(self: Arc<Self>, job: Job, means: Means) -> Result<Box<dyn Ready>, Failed> {
        Ok(Box::new(Prepared::new(Arc::clone(&self.runs), job, means)?))
    }

    fn open_only(&self, job: &Job, means: Means) -> Result<Vec<(String, TensorSpec)>, Failed> {
        match self.runs.run(job, &means, true)? {
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
        let (invocations, running) = self.runs.counts();
        let (totals, parked) = self.runs.crew().totals();
        RunnerCounts {
            invocations,
            running,
            copied_in: totals.copied_in,
            copied_out: totals.copied_out,
            slices: totals.slices,
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
        self.runs.crew().cpu_time(owner)
    }

    fn processes(&self) -> Vec<RunnerProcess> {
        self.runs.crew().processes()
    }

    fn end_idle(&self, now: Instant) {
        self.runs.crew().end_idle(now);
    }
}
