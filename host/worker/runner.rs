//! The [`Runner`] that has kernels run in a worker process.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use strait_memory::ResultPool;
use strait_tensor::TensorSpec;

use super::channel::ReceiveError;
use super::exchange::{Exchange, Given, Needs, Trouble, load};
use super::messages::{Start, Totals};
use super::process::{LOOK, Process, Recipe};
use crate::engine::{
    Cause, Done, EngineConfig, Failed, Job, LoadError, Means, Runner, RunnerCounts, Stage,
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
    /// What a run gets beyond its deadline, or after it was cancelled, to end by itself.
    pub grace: Duration,
    /// How kernels run there.
    pub engine: EngineConfig,
    /// Warm mappings of inputs, idle or in use.
    pub parked_mappings_max: u64,
    /// Bytes of idle ones.
    pub parked_bytes_max: u64,
}

/// Runs kernels in a worker process. One that ends is followed by another.
#[derive(Debug)]
pub struct WorkerRunner {
    recipe: Arc<Recipe>,
    grace: Duration,
    pool: Arc<ResultPool>,
    seat: Arc<Seat>,
    /// Of those that are gone.
    past: Mutex<Totals>,
    last_run: AtomicU64,
    invocations: AtomicU64,
    running: AtomicU64,
    needs: Needs,
}

impl WorkerRunner {
    /// Workers that fill segments of `pool`. The first one starts with the first plugin.
    ///
    /// # Errors
    /// The program cannot be opened.
    pub fn new(settings: WorkerSettings<'_>, pool: Arc<ResultPool>) -> io::Result<Self> {
        let program = settings.program.unwrap_or(Path::new("/proc/self/exe"));
        let program = File::open(program).map_err(|error| {
            let path = program.display();
            io::Error::new(
                error.kind(),
                format!("the program of workers, {path}: {error}"),
            )
        })?;
        Ok(Self {
            recipe: Arc::new(Recipe {
                program,
                arguments: settings.arguments,
                lanes: settings.lanes,
                start: Start {
                    engine: settings.engine,
                    parked_mappings_max: settings.parked_mappings_max,
                    parked_bytes_max: settings.parked_bytes_max,
                },
                census: Arc::default(),
            }),
            grace: settings.grace,
            pool,
            seat: Arc::default(),
            past: Mutex::default(),
            last_run: AtomicU64::new(0),
            invocations: AtomicU64::new(0),
            running: AtomicU64::new(0),
            needs: Mutex::default(),
        })
    }

    /// The worker that lives, or a new one as soon as there is one, unless it `is_over` before.
    fn process(&self, is_over: impl Fn() -> bool) -> Result<Arc<Process>, Trouble> {
        let mut awaited = None;
        let mut sitting = self.seat.sitting.lock();
        loop {
            if let Some(process) = &sitting.process {
                if !process.is_gone() && !process.has_ended() {
                    return Ok(Arc::clone(process));
                }
                self.pool.forget(process.number());
                self.remember(process);
                sitting.process = None;
            }
            if !sitting.starting {
                if let Some(why) = &sitting.failed
                    && awaited == Some(sitting.attempts)
                {
                    return Err(Trouble::Own(Cause::Host(why.clone())));
                }
                self.seat.start(&mut sitting, &self.recipe)?;
            }
            awaited = Some(sitting.attempts);
            if is_over() {
                return Err(ReceiveError::Late.into());
            }
            self.seat.changed.wait_for(&mut sitting, LOOK);
        }
    }

    fn run(&self, job: &Job, means: &Means, open_only: bool) -> Result<Given, Failed> {
        let given = self
            .process(|| is_over(means))
            .and_then(|process| self.run_in(&process, job, means, open_only));
        let given = match given {
            // Nothing of it has left the worker, and it may have been another run that ended that: once more, where it can
            // hurt nobody else.
            Err(Trouble::Lost(ReceiveError::Gone)) if can_be_repeated(means) => {
                self.run_alone(job, means, open_only)
            }
            given => given,
        };
        given.map_err(|trouble| {
            let cause = match trouble {
                Trouble::Failed(failed) => return failed,
                Trouble::Own(cause) => cause,
                Trouble::Lost(_) if means.cancel.is_cancelled() => Cause::Cancelled,
                Trouble::Lost(ReceiveError::Late) if Instant::now() >= means.deadline => {
                    Cause::Deadline(job.deadline_ms)
                }
                Trouble::Lost(_) => Cause::Lost,
            };
            Failed::new(&job.kernel.kernel().name, Stage::Run, cause)
        })
    }

    /// In a worker that ends after it.
    fn run_alone(&self, job: &Job, means: &Means, open_only: bool) -> Result<Given, Trouble> {
        let process =
            Process::start(&self.recipe, || is_over(means)).map_err(|error| {
                match is_over(means) {
                    true => ReceiveError::Late.into(),
                    false => Trouble::Own(Cause::Host(error.to_string())),
                }
            })?;
        let given = self.run_in(&process, job, means, open_only);
        process.end();
        self.remember(&process);
        given
    }

    /// What a worker that is gone has counted.
    fn remember(&self, process: &Process) {
        let mut past = self.past.lock();
        // A worker may tell anything.
        *past = past.with(process.totals(), u64::saturating_add);
    }

    fn run_in(
        &self,
        process: &Arc<Process>,
        job: &Job,
        means: &Means,
        open_only: bool,
    ) -> Result<Given, Trouble> {
        let mut exchange = Exchange::new(process.lane(), job, means, self.grace, &self.needs);
        let run = self.last_run.fetch_add(1, Ordering::Relaxed) + 1;
        let given = exchange.whole(run, open_only);
        if let Err(Trouble::Lost(lost)) = &given {
            process.bury(&lost.to_string());
            self.pool.forget(process.number());
        }
        given
    }

    fn counted<R>(&self, run: impl FnOnce() -> R) -> R {
        self.invocations.fetch_add(1, Ordering::Relaxed);
        self.running.fetch_add(1, Ordering::Relaxed);
        let given = run();
        self.running.fetch_sub(1, Ordering::Relaxed);
        given
    }
}

/// Where the worker of all runs is.
#[derive(Debug, Default)]
struct Seat {
    /// Never held while a worker is waited for.
    sitting: Mutex<Sitting>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Sitting {
    process: Option<Arc<Process>>,
    /// A thread starts one.
    starting: bool,
    attempts: u64,
    /// Why the last attempt gave none.
    failed: Option<String>,
}

impl Seat {
    /// Starts a worker on a thread of its own: whoever waits for it does that no longer than it has time.
    fn start(self: &Arc<Self>, sitting: &mut Sitting, recipe: &Arc<Recipe>) -> Result<(), Trouble> {
        let (seat, recipe) = (Arc::clone(self), Arc::clone(recipe));
        std::thread::Builder::new()
            .name("strait-starter".to_owned())
            .spawn(move || {
                let started = Process::start(&recipe, || false);
                let mut sitting = seat.sitting.lock();
                sitting.starting = false;
                match started {
                    Ok(process) => sitting.process = Some(process),
                    Err(error) => sitting.failed = Some(error.to_string()),
                }
                seat.changed.notify_all();
            })
            .map_err(|e| Trouble::Own(Cause::Host(format!("no thread to start a worker: {e}"))))?;
        sitting.starting = true;
        sitting.attempts += 1;
        sitting.failed = None;
        Ok(())
    }
}

/// Whether nobody waits for a run any more.
fn is_over(means: &Means) -> bool {
    means.cancel.is_cancelled() || Instant::now() >= means.deadline
}

/// Whether a run would find what it found the first time, and has time for it.
fn can_be_repeated(means: &Means) -> bool {
    !is_over(means) && means.inputs.iter().all(|source| source.is_final())
}

impl Runner for WorkerRunner {
    fn load(&self, bytes: Arc<[u8]>) -> Result<Plugin, LoadError> {
        let process = self.process(|| false).map_err(|trouble| match trouble {
            Trouble::Own(Cause::Host(why)) => LoadError::NoWorker(why),
            _ => LoadError::NoWorker("none started".to_owned()),
        })?;
        let hash = Plugin::hash(&bytes);
        let description = load(&mut process.lane(), &bytes, hash).map_err(|error| {
            process.kill(&error.to_string());
            LoadError::NoWorker(error.to_string())
        })??;
        Ok(Plugin::new(bytes, description)?)
    }

    fn invoke(&self, job: &Job, means: Means) -> Result<Done, Failed> {
        match self.counted(|| self.run(job, &means, false))? {
            Given::Done(done) => Ok(done),
            Given::Specs(_) => Err(Failed::new(
                &job.kernel.kernel().name,
                Stage::Run,
                Cause::Host("the worker did not run it".to_owned()),
            )),
        }
    }

    fn open_only(&self, job: &Job, means: Means) -> Result<Vec<(String, TensorSpec)>, Failed> {
        match self.run(job, &means, true)? {
            Given::Specs(specs) => Ok(specs),
            Given::Done(done) => Ok(done
                .outputs
                .into_iter()
                .flat_map(|output| output.layout.tensors)
                .map(|place| (place.name, place.spec))
                .collect()),
        }
    }

    fn counts(&self) -> RunnerCounts {
        let process = self.seat.sitting.lock().process.clone();
        // One that ended while nobody used it.
        let process = process.filter(|process| !process.has_ended());
        let (counts, now) = process.map_or_else(Default::default, |process| {
            (process.counts(), process.totals())
        });
        let totals = self.past.lock().with(now, u64::saturating_add);
        RunnerCounts {
            invocations: self.invocations.load(Ordering::Relaxed),
            running: self.running.load(Ordering::Relaxed),
            copied_in: totals.copied_in,
            copied_out: totals.copied_out,
            parked: counts.lot,
            births: (totals.huge_asked, totals.huge),
            processes: (
                self.recipe.census.living.load(Ordering::Relaxed),
                self.recipe.census.started.load(Ordering::Relaxed),
                self.recipe.census.lost.load(Ordering::Relaxed),
            ),
        }
    }
}
