//! Where kernels run: in this process, or in another.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use strait_memory::{InputSource, LotStats, PoolSegment, ResultPages, ResultSource};
use strait_tensor::TensorSpec;

use super::job::{
    Chain, ChainDone, Done, FilledBody, FilledOutput, Job, Means, Output, OutputBody, Owner,
    Results, Source, Supplies,
};
use super::prepared::Ready;
use super::{Cause, Engine, Failed, LoadError, Logged, Stage, Used};
use crate::plugin::Plugin;

/// Runs kernels for the host. Whether that is in its own process is the runner's affair: what goes in is plain data and
/// segments, and what comes out.
pub trait Runner: std::fmt::Debug + Send + Sync {
    /// Compiles a plugin, asks what it offers and checks that. A core module, as cargo makes it, is made
    /// a component first.
    ///
    /// # Errors
    /// [`LoadError`], naming what is wrong with the plugin.
    fn load(&self, bytes: Arc<[u8]>) -> Result<Plugin, LoadError>;

    /// Runs one kernel, while the calling thread waits.
    ///
    /// # Errors
    /// [`Failed`]; nothing of the invocation is left then.
    fn invoke(&self, job: &Job, means: Means) -> Result<Done, Failed>;

    /// Runs several kernels at once, rows going from one to the next, while the calling thread waits. `means` has the inputs of all
    /// stages, one after the other.
    ///
    /// # Errors
    /// [`Failed`], of the kernel concerned; nothing of the invocation is left then. [`Cause::Stalled`]: these kernels are to be run one
    /// after the other.
    fn chain(&self, chain: &Chain, means: Means) -> Result<ChainDone, Failed>;

    /// Makes `job`, whose inputs in frames stand for what each run brings, ready to be run again and again. All results are to be
    /// bytes, for which [`Job::inline`] has room.
    ///
    /// # Errors
    /// [`Failed`].
    fn prepare(self: Arc<Self>, job: Job, means: Means) -> Result<Box<dyn Ready>, Failed>;

    /// Makes ready for the next call what `used` leaves. To be called when nobody waits for the call any more.
    fn renew(&self, _used: Used) {}

    /// The outputs that an invocation would have, by `open` alone.
    ///
    /// # Errors
    /// [`Failed`].
    fn open_only(&self, job: &Job, means: Means) -> Result<Vec<(String, TensorSpec)>, Failed>;

    /// Counts as of now.
    fn counts(&self) -> RunnerCounts;

    /// CPU time that all runs of `owner` have used in other processes.
    fn cpu_time(&self, _owner: Owner) -> Duration {
        Duration::ZERO
    }

    /// The other processes that it has, those that were started first coming first.
    fn processes(&self) -> Vec<RunnerProcess> {
        Vec::new()
    }

    /// Ends what nobody has used for long. To be called from time to time; it does not wait.
    fn end_idle(&self, _now: Instant) {}
}

/// A process that a [`Runner`] has beside this one.
#[derive(Clone, Debug, Default)]
pub struct RunnerProcess {
    /// Its number among those that were started.
    pub number: u64,
    /// Linux's number of it.
    pub pid: u32,
    /// Whose runs it has; none: it is there for the next owner.
    pub owner: Option<Owner>,
    /// Runs that it has now.
    pub running: u64,
    /// Runs that it has or had.
    pub runs: u64,
    /// How long ago it was started.
    pub age: Duration,
    /// What stands between it and everything else.
    pub walls: Vec<&'static str>,
    /// What should stand between it and everything else and does not on this Linux, in words.
    pub lacks: Vec<String>,
}

/// Counts of a [`Runner`]. Bytes since the start.
#[derive(Clone, Copy, Debug, Default)]
pub struct RunnerCounts {
    /// Invocations since the start.
    pub invocations: u64,
    /// Invocations that run now.
    pub running: u64,
    /// Bytes of inputs that were copied into guests.
    pub copied_in: u64,
    /// Bytes of outputs that were copied out of guests.
    pub copied_out: u64,
    /// Slices of invocations since the start.
    pub slices: u64,
    /// The warm mappings of inputs, wherever kernels run.
    pub parked: LotStats,
    /// Bytes of results that were to be born in huge pages, and were, in other processes.
    pub births: (u64, u64),
    /// Other processes that live, were started, and were lost.
    pub processes: (u64, u64, u64),
    /// Descriptors that this process has open for those.
    pub process_fds: u64,
}

/// The results of one invocation, from a pool of this process.
#[derive(Debug)]
struct Pooled {
    source: ResultSource,
    taken: Mutex<Vec<PoolSegment>>,
}

impl Results for Pooled {
    fn take(&self, bytes: &[u64]) -> Result<Vec<ResultPages>, Cause> {
        let mut taken = self.taken.lock();
        for bytes in bytes {
            taken.push(self.source.take(*bytes)?);
        }
        Ok(taken
            .iter()
            .map(|segment| segment.pages().clone())
            .collect())
    }
}

impl Pooled {
    /// What `filled` are, with the segments that they were given. `job`: for the message.
    fn outputs(&self, filled: Vec<FilledOutput>, job: &Job) -> Result<Vec<Output>, Failed> {
        let mut segments = std::mem::take(&mut *self.taken.lock()).into_iter();
        let outputs = filled.into_iter().map(|output| {
            let body = match output.body {
                FilledBody::Pages { layout, .. } => OutputBody::Segment {
                    layout,
                    segment: segments.next()?,
                },
                FilledBody::Inline { spec, bytes } => OutputBody::Inline { spec, bytes },
            };
            Some(Output {
                port: output.port,
                body,
            })
        });
        let outputs: Option<_> = outputs.collect();
        outputs.ok_or_else(|| {
            let lost = Cause::Host("a result has no segment".to_owned());
            Failed::new(&job.kernel.kernel().name, Stage::Results, lost)
        })
    }
}

impl Means {
    /// For a job that runs in this process, and what will have its results.
    fn here(self) -> (Supplies, Arc<Pooled>) {
        let pooled = Arc::new(Pooled {
            source: self.results,
            taken: Mutex::default(),
        });
        let inputs = self.inputs.into_iter();
        let supplies = Supplies {
            inputs: inputs
                .map(|source| match source {
                    Source::Segment(segment) => Source::Segment(segment as Arc<dyn InputSource>),
                    Source::Inline(bytes) => Source::Inline(bytes),
                    Source::Linked => Source::Linked,
                })
                .collect(),
            results: Arc::clone(&pooled) as Arc<dyn Results>,
            deadline: self.deadline,
            cancel: self.cancel,
            logged: Logged::default(),
        };
        (supplies, pooled)
    }
}

impl Runner for Engine {
    fn load(&self, bytes: Arc<[u8]>) -> Result<Plugin, LoadError> {
        Engine::load(self, bytes)
    }

    fn invoke(&self, job: &Job, means: Means) -> Result<Done, Failed> {
        let (supplies, pooled) = means.here();
        let filled = self.fill(job, &supplies)?;
        Ok(Done {
            outputs: pooled.outputs(filled.outputs, job)?,
            report: filled.report,
            used: Some(filled.used),
        })
    }

    fn chain(&self, chain: &Chain, means: Means) -> Result<ChainDone, Failed> {
        let (supplies, pooled) = means.here();
        let filled = self.fill_chain(chain, supplies)?;
        let outputs = match chain.stages.last() {
            Some(job) => pooled.outputs(filled.outputs, job)?,
            None => Vec::new(),
        };
        Ok(ChainDone {
            outputs,
            reports: filled.reports,
            used: filled.used,
        })
    }

    fn prepare(self: Arc<Self>, job: Job, means: Means) -> Result<Box<dyn Ready>, Failed> {
        let (supplies, _) = means.here();
        self.ready(job, supplies.inputs, supplies.deadline, &supplies.cancel)
    }

    fn renew(&self, used: Used) {
        Engine::renew(self, used);
    }

    fn open_only(&self, job: &Job, means: Means) -> Result<Vec<(String, TensorSpec)>, Failed> {
        self.specs(job, &means.here().0)
    }

    fn counts(&self) -> RunnerCounts {
        let (invocations, running) = self.invocations();
        RunnerCounts {
            invocations,
            running,
            copied_in: self.copies().guest_in.get(),
            copied_out: self.copies().guest_out.get(),
            slices: self.slices(),
            parked: self.lot.stats(),
            births: (0, 0),
            processes: (0, 0, 0),
            process_fds: 0,
        }
    }
}
