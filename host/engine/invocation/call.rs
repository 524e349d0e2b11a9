//! What all states of an invocation carry.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use strait_memory::{Copied, InputSource};

use crate::engine::error::{Broken, Stage};
use crate::engine::instance::{Instance, Made};
use crate::engine::job::{Job, Report, Source, Supplies};
use crate::engine::leash::Until;
use crate::engine::spare::Used;
use crate::engine::state::State;
use crate::engine::{Compiled, Engine};

/// What every state carries.
pub(in crate::engine) struct Call<'a> {
    pub(super) engine: &'a Engine,
    pub(in crate::engine) job: &'a Job,
    pub(super) supplies: &'a Supplies,
    pub(in crate::engine) compiled: Arc<Compiled>,
    pub(in crate::engine) instance: Instance,
    pub(in crate::engine) copied: Copied,
    pub(in crate::engine) report: Report,
    pub(super) begin: Instant,
    pub(in crate::engine) lap: Instant,
    /// None: nobody is told of them.
    pub(super) faults_before: Option<u64>,
}

impl<'a> Call<'a> {
    /// With `made`, if there is one, or with a fresh instance.
    pub(super) fn begin(
        engine: &'a Engine,
        job: &'a Job,
        supplies: &'a Supplies,
        compiled: Arc<Compiled>,
        made: Option<Made>,
        faults_before: Option<u64>,
    ) -> Result<Self, Broken> {
        let begin = Instant::now();
        assert_eq!(
            supplies.inputs.len(),
            job.inputs.len(),
            "a source for each input"
        );
        let description = &job.kernel.plugin.description;
        let state = State::new(
            job.limits,
            Arc::clone(&job.request_id),
            Arc::from(description.name.as_str()),
        )
        .logging_in(&supplies.logged);
        let until = Until {
            deadline: supplies.deadline,
            deadline_ms: job.deadline_ms,
            cancel: supplies.cancel.clone(),
        };
        let record = description.panic_record;
        let instance = Instance::new(engine, &compiled, made, state, until, record)?;
        let mut call = Self {
            engine,
            job,
            supplies,
            compiled,
            instance,
            copied: Copied::new(),
            report: Report::default(),
            begin,
            lap: begin,
            faults_before,
        };
        call.report.seconds.instantiate = call.lap();
        Ok(call)
    }

    /// Copies `range` (guest addresses) in, from `offset` of what holds an input, while no window is there.
    pub(super) fn copy_in(
        &mut self,
        range: Range<usize>,
        offset: u64,
        source: &Source<dyn InputSource>,
    ) -> Result<(), Broken> {
        const STAGE: Stage = Stage::Place;
        let copied = &self.copied;
        let fill = |into: &mut [u8]| match source {
            Source::Segment(source) => source.read_at(offset, into, copied),
            Source::Inline(bytes) => {
                // Whoever made the job has held one against the other.
                into.copy_from_slice(bytes);
                copied.add(into.len() as u64);
                Ok(())
            }
            // It comes while the kernel runs.
            Source::Linked => Ok(()),
        };
        self.instance
            .regions_mut()
            .with_mut(range, fill)
            .map_err(|e| STAGE.broke(e))?
            .map_err(|e| STAGE.broke(e))
    }

    /// Seconds since the last lap.
    pub(super) fn lap(&mut self) -> f64 {
        let now = Instant::now();
        let elapsed = now.duration_since(self.lap).as_secs_f64();
        self.lap = now;
        elapsed
    }

    /// What is told of all of it, and its instance.
    pub(super) fn end(self) -> (Report, Used) {
        let mut report = self.report;
        report.copied_bytes = self.copied.get();
        report.minor_faults = self
            .faults_before
            .map_or(0, |before| minor_faults().saturating_sub(before));
        report.seconds.total = self.begin.elapsed().as_secs_f64();
        let used = Used {
            instance: self.instance,
            plugin: self.job.kernel.plugin.hash,
            compiled: self.compiled,
            limits: self.job.limits,
            seconds: report.seconds.instantiate,
        };
        (report, used)
    }
}

/// Page faults of the process so far. A missing figure is no reason to fail an invocation.
pub(super) fn minor_faults() -> u64 {
    strait_memory::process::minor_faults().unwrap_or(0)
}
