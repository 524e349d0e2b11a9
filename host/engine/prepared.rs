//! A job that is run again and again on other elements: bound ahead, and brought back to that between its runs.
//!
//! ```text
//! prepare ── open, reserve, bind ──▶ waits ── run(elements) ──▶ answered ── renew ──▶ waits
//! ```
//! A run on smaller tensors than were prepared starts over, with `open`, in the room that is there.
//!
//! Each run finds the guest's memory as `bind` has left it, whatever the runs before it wrote there: pages that were written are
//! taken back ([`GuestSpace::keep`](strait_memory::GuestSpace::keep)), which costs less than another instance. A plugin
//! that can keep something elsewhere (in a second mutable global, in a table), or whose memory has grown meanwhile, gets
//! another instance for each run. One mutable global is what every compiler needs for its stack pointer; a plugin that
//! leaves another value there fools itself alone.

use std::sync::Arc;
use std::time::{Duration, Instant};

use strait_tensor::TensorSpec;

use super::error::{Broken, Limit};
use super::instance::Made;
use super::invocation;
use super::job::{Brought, Done, FilledBody, Output, OutputBody, Results, Source, Supplies};
use super::plan::Plan;
use super::stream::Batches;
use super::{CancelToken, Cause, Engine, Failed, Job, Logged};
use strait_memory::{InputSource, ResultPages};

/// What binding again may take while nobody waits for it: longer ones are bound by the run that needs them.
pub(crate) const RENEWAL: Duration = Duration::from_millis(100);

/// A job that can be run again and again.
pub trait Ready: Send + std::fmt::Debug {
    /// The outputs at their largest: port and spec.
    fn outputs(&self) -> Vec<(String, TensorSpec)>;

    /// Bytes of memory that it has while it waits.
    fn waiting_bytes(&self) -> u64;

    /// Runs it on the calling thread with what is `brought` for those inputs that are in frames, in their order.
    ///
    /// # Errors
    /// [`Failed`]; the next run is not concerned.
    fn run(
        &mut self,
        brought: Vec<Brought>,
        deadline: Instant,
        cancel: &CancelToken,
    ) -> Result<Done, Failed>;

    /// Runs it on the calling thread with batch after batch, and hands over what comes of each; what the kernel had to say.
    /// Its inputs in frames are those that come in batches, at most as many rows at a time in the guest as were prepared.
    ///
    /// # Errors
    /// [`Failed`]; what was given before stays given.
    fn stream(
        &mut self,
        batches: &mut dyn Batches,
        cancel: &CancelToken,
    ) -> Result<Vec<(String, String)>, Failed>;

    /// Makes it ready for its next run. To be called when nobody waits for the one before any more.
    ///
    /// # Errors
    /// [`Failed`], if that cost a process; the next run is not concerned.
    fn renew(&mut self) -> Result<(), Failed>;
}

/// No result has pages here.
#[derive(Debug)]
struct Unpaged {
    most: u64,
}

impl Results for Unpaged {
    fn take(&self, bytes: &[u64]) -> Result<Vec<ResultPages>, Cause> {
        Err(Cause::Limit {
            limit: Limit::Result,
            asked: bytes.iter().sum(),
            most: self.most,
        })
    }
}

/// In this process.
struct Prepared {
    engine: Arc<Engine>,
    job: Job,
    /// Those in frames stand for what each run brings.
    inputs: Vec<Source<dyn InputSource>>,
    plan: Plan,
    /// Bound, and as it was when it had just been.
    made: Option<Made>,
    /// What the last run left.
    used: Option<Made>,
    /// Bytes of the guest's memory that are kept; none: each run has an instance of its own.
    kept: Option<usize>,
}

impl Engine {
    /// Makes `job`, whose inputs in frames stand for what each run brings, ready to be run again and again in this process. All
    /// results are to be bytes; no memory is asked for them.
    ///
    /// # Errors
    /// [`Failed`].
    pub fn ready(
        self: &Arc<Self>,
        job: Job,
        inputs: Vec<Source<dyn InputSource>>,
        deadline: Instant,
        cancel: &CancelToken,
    ) -> Result<Box<dyn Ready>, Failed> {
        let prepared = Prepared::new(Arc::clone(self), job, inputs, deadline, cancel)?;
        Ok(Box::new(prepared))
    }
}

impl std::fmt::Debug for Prepared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Prepared")
            .field("kept", &self.kept)
            .finish_non_exhaustive()
    }
}

impl Prepared {
    /// Binds `job`, whose results are all to be bytes.
    ///
    /// # Errors
    /// [`Failed`].
    fn new(
        engine: Arc<Engine>,
        job: Job,
        inputs: Vec<Source<dyn InputSource>>,
        deadline: Instant,
        cancel: &CancelToken,
    ) -> Result<Self, Failed> {
        let supplies = supplies(&job, &inputs, Vec::new(), deadline, cancel);
        let waiting = invocation::wait(&engine, &job, &supplies);
        let (plan, made) = waiting.map_err(|broken| named(&job, broken))?;
        let mut prepared = Self {
            kept: None,
            engine,
            inputs,
            plan,
            made: None,
            used: None,
            job,
        };
        prepared.keep(made);
        Ok(prepared)
    }

    /// Has what was just bound wait.
    fn keep(&mut self, made: Made) {
        self.kept = None;
        let (bytes, _) = self.plan.restored();
        let memory = made.memory();
        if self.plan.compiled.memory_only && memory.size() == self.plan.room.end {
            match memory.space().keep(bytes) {
                Ok(()) => self.kept = Some(bytes),
                // It costs time only.
                Err(error) => tracing::debug!(%error, "a guest's memory is not kept"),
            }
        }
        self.made = Some(made);
    }

    fn bind(&mut self, deadline: Instant, cancel: &CancelToken) -> Result<(), Failed> {
        let supplies = supplies(&self.job, &self.inputs, Vec::new(), deadline, cancel);
        let waiting = invocation::wait(&self.engine, &self.job, &supplies);
        let (plan, made) = waiting.map_err(|broken| named(&self.job, broken))?;
        if plan.columns != self.plan.columns {
            let changed = Cause::Contract(
                "`open` announces other outputs than before for the same inputs and parameters"
                    .to_owned(),
            );
            let kernel = &self.job.kernel.kernel().name;
            return Err(Failed::new(kernel, super::Stage::Open, changed));
        }
        self.plan = plan;
        self.keep(made);
        Ok(())
    }

    /// What the last run left as it was before it, if that can be had.
    fn restored(&self, made: Made) -> Option<Made> {
        let (bytes, memory) = (self.kept?, made.memory());
        if memory.size() != self.plan.room.end {
            return None;
        }
        let (_, zeroed) = self.plan.restored();
        let restored = memory.space().restore(bytes, &zeroed);
        restored
            .inspect_err(|error| tracing::warn!(%error, "a guest's memory is not restored"))
            .ok()?;
        Some(made)
    }
}

impl Ready for Prepared {
    fn outputs(&self) -> Vec<(String, TensorSpec)> {
        let columns = self.plan.columns.iter();
        columns
            .map(|column| (column.name.clone(), column.spec.clone()))
            .collect()
    }

    fn waiting_bytes(&self) -> u64 {
        // What is kept, and the guest's own pages.
        let kept = self.kept.unwrap_or(0) as u64;
        let size = self.made.as_ref().map_or(0, |made| made.memory().size());
        // What it took in `bind`.
        let beyond = size.saturating_sub(self.plan.room.end) as u64;
        self.plan.own_bytes() + kept + beyond
    }

    fn run(
        &mut self,
        brought: Vec<Brought>,
        deadline: Instant,
        cancel: &CancelToken,
    ) -> Result<Done, Failed> {
        self.used = None;
        if self.made.is_none() {
            self.bind(deadline, cancel)?;
        }
        let resized = self.job.resized(&self.inputs, &brought);
        let supplies = supplies(&self.job, &self.inputs, brought, deadline, cancel);
        let made = self.made.take();
        let made = made.ok_or_else(|| lost(&self.job, "a prepared kernel is not bound"))?;
        let (engine, job, waits) = (&*self.engine, &self.job, (&self.plan, made));
        let filled = engine.counted(|| match &resized {
            None => invocation::go_on(engine, job, &supplies, waits),
            Some(job) => invocation::start_over(engine, job, &supplies, waits),
        });
        let filled = filled.map_err(|broken| named(job, broken))?;
        self.used = Some(filled.used.instance.rest());
        let outputs = filled.outputs.into_iter().map(|output| match output.body {
            FilledBody::Inline { spec, bytes } => Some(Output {
                port: output.port,
                body: OutputBody::Inline { spec, bytes },
            }),
            FilledBody::Pages { .. } => None,
        });
        let outputs: Option<_> = outputs.collect();
        Ok(Done {
            outputs: outputs.ok_or_else(|| lost(job, "a result has pages"))?,
            report: filled.report,
            used: None,
        })
    }

    fn stream(
        &mut self,
        batches: &mut dyn Batches,
        cancel: &CancelToken,
    ) -> Result<Vec<(String, String)>, Failed> {
        self.used = None;
        // Each batch brings its own deadline, and its turn.
        let first = batches.next().map_err(|cause| {
            let kernel = &self.job.kernel.kernel().name;
            Failed::new(kernel, super::Stage::Run, cause)
        })?;
        if self.made.is_none() {
            self.bind(first.deadline, cancel)?;
        }
        let supplies = supplies(&self.job, &self.inputs, Vec::new(), first.deadline, cancel);
        let made = self.made.take();
        let made = made.ok_or_else(|| lost(&self.job, "a prepared kernel is not bound"))?;
        let (engine, job, waits) = (&*self.engine, &self.job, (&self.plan, made));
        let ended =
            engine.counted(|| invocation::stream(engine, job, &supplies, waits, first, batches));
        let (notes, made) = ended.map_err(|broken| named(job, broken))?;
        self.used = Some(made);
        Ok(notes)
    }

    fn renew(&mut self) -> Result<(), Failed> {
        if self.made.is_some() {
            return Ok(());
        }
        if let Some(used) = self.used.take() {
            self.made = self.restored(used);
        }
        if self.made.is_none() {
            // Whatever it fails of, the next run is told.
            let _ = self.bind(Instant::now() + RENEWAL, &CancelToken::default());
        }
        Ok(())
    }
}

fn named(job: &Job, broken: Broken) -> Failed {
    broken.of(&job.kernel.kernel().name)
}

fn lost(job: &Job, what: &str) -> Failed {
    let cause = Cause::Host(what.to_owned());
    Failed::new(&job.kernel.kernel().name, super::Stage::Results, cause)
}

/// `inputs`, with what is `brought` for those in frames.
fn supplies(
    job: &Job,
    inputs: &[Source<dyn InputSource>],
    brought: Vec<Brought>,
    deadline: Instant,
    cancel: &CancelToken,
) -> Supplies {
    Supplies {
        inputs: Source::filled(inputs, brought),
        results: Arc::new(Unpaged {
            most: job.limits.result_bytes,
        }),
        deadline,
        cancel: cancel.clone(),
        logged: Logged::default(),
    }
}
