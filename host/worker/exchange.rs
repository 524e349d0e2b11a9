//! One run as it is told to a worker, and what is believed of the answers.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_bytes::ByteBuf;
use strait_memory::{MemoryError, PoolSegment, SharedSource};
use strait_tensor::{Column, FileLayout, TensorSpec};

use super::artifact::Artifact;
use super::channel::ReceiveError;
use super::messages::{
    Answer, Ask, Ended, Filled, FilledIn, Grant, Load, Outcome, Run, RunInput, RunSource,
};
use super::process::{Company, LOOK, Lane, Mapped};
use crate::engine::{
    CancelToken, Cause, Done, Failed, InlineRoom, Job, Means, Output, OutputBody, Source, Telling,
};
use crate::plugin::{Plugin, PluginHash, Port};

/// What a worker gets to say the rest of what it has begun to say.
const REST_MAX: Duration = Duration::from_secs(2);
/// What a compiled plugin gets to be copied and made executable; and, when nobody waits for the run any more, to come to
/// the end of that, lest each run that is short of time start it anew.
const LOAD_MAX: Duration = Duration::from_secs(30);
const LOAD_GRACE: Duration = Duration::from_secs(2);

/// What a run gives.
pub(super) enum Given {
    Done(Box<Done>),
    Specs(Vec<(String, TensorSpec)>),
}

/// Why a run gives nothing.
pub(super) enum Trouble {
    /// As the worker tells it.
    Failed(Failed),
    /// On this side.
    Own(Cause),
    /// The worker is gone, or is to be.
    Lost(ReceiveError),
}

impl From<ReceiveError> for Trouble {
    fn from(error: ReceiveError) -> Self {
        Self::Lost(error)
    }
}

impl From<MemoryError> for Trouble {
    fn from(error: MemoryError) -> Self {
        Self::Own(error.into())
    }
}

/// Why nobody waits for a run any more, if nobody does.
pub(super) fn over(job: &Job, cancel: &CancelToken, deadline: Instant) -> Option<Cause> {
    if cancel.is_cancelled() {
        return Some(Cause::Cancelled);
    }
    (Instant::now() >= deadline).then_some(Cause::Deadline(job.deadline_ms))
}

/// A worker's next word on `lane`, with so many bytes of `tensors` at most, or that it has no more time for one: at `end`, or
/// `grace` after the run was cancelled.
///
/// # Errors
/// [`Trouble::Lost`].
pub(super) fn next(
    lane: &mut Lane,
    cancel: &CancelToken,
    mut end: Instant,
    grace: Duration,
    tensors: u64,
) -> Result<Answer, Trouble> {
    let mut cancelled = false;
    loop {
        let now = Instant::now();
        if !cancelled && cancel.is_cancelled() {
            cancelled = true;
            end = end.min(now + grace);
        }
        match lane.wait(end.min(now + LOOK)) {
            Err(ReceiveError::Late) if Instant::now() < end => {}
            Err(error) => return Err(error.into()),
            Ok(()) => return Ok(lane.answer(tensors, Instant::now() + REST_MAX)?),
        }
    }
}

/// Microseconds until `deadline`.
pub(super) fn left_us(deadline: Instant) -> u64 {
    let left = deadline.saturating_duration_since(Instant::now());
    u64::try_from(left.as_micros()).unwrap_or(u64::MAX)
}

/// What a worker says makes no sense: then neither does what else it has done.
pub(super) fn senseless(what: impl Into<String>) -> Trouble {
    Trouble::Lost(ReceiveError::Bad(what.into()))
}

/// One run: all that is said on its lane.
pub(super) struct Exchange<'a> {
    lane: Lane,
    job: &'a Job,
    means: &'a Means,
    grace: Duration,
    /// For its results: those that are granted ahead, until it asks for others.
    segments: Vec<PoolSegment>,
    granted: bool,
    /// Results of a chain; none: it is one kernel.
    leaving: Option<usize>,
    /// Why none could be.
    refused: Option<MemoryError>,
    /// Since it was told to run.
    company: Option<Company>,
}

impl<'a> Exchange<'a> {
    pub(super) fn new(lane: Lane, job: &'a Job, means: &'a Means, grace: Duration) -> Self {
        Self {
            lane,
            job,
            means,
            grace,
            segments: Vec::new(),
            granted: false,
            leaving: None,
            refused: None,
            company: None,
        }
    }

    /// From the first word to the last.
    ///
    /// # Errors
    /// [`Trouble`].
    pub(super) fn whole(&mut self, run: u64, open_only: bool) -> Result<Given, Trouble> {
        let telling = self.join(run)?;
        if !open_only {
            self.segments = self.ahead();
        }
        let (told, fds) = self.told(run, open_only)?;
        self.ask(&Ask::Run(Box::new(told)), &fds)?;
        let ended = loop {
            match self.answer()? {
                Answer::Need(bytes) if !open_only && !self.granted => self.grant(&bytes)?,
                Answer::Ended(ended) => break ended,
                answer => return Err(senseless(format!("{} during a run", answer.kind()))),
            }
        };
        drop(telling);
        self.given(*ended, open_only)
    }

    /// Before the `run` is told: it is among those of the process, which has its plugin, and is told when it is cancelled.
    pub(super) fn join(&mut self, run: u64) -> Result<Telling<'a>, Trouble> {
        let plugin = &self.job.kernel.plugin;
        self.has(plugin)?;
        Ok(self.join_as(run, plugin.hash))
    }

    /// Sees to it that the process has the plugin.
    pub(super) fn has(&mut self, plugin: &Plugin) -> Result<(), Trouble> {
        if !self.lane.process().has_plugin(&plugin.hash) {
            // The first time here.
            self.load(plugin)?;
            if let Some(cause) = over(self.job, &self.means.cancel, self.means.deadline) {
                return Err(Trouble::Own(cause));
            }
        }
        Ok(())
    }

    /// As [`Self::join`], of what has the hash `plugin`.
    pub(super) fn join_as(&mut self, run: u64, plugin: PluginHash) -> Telling<'a> {
        let process = Arc::clone(self.lane.process());
        self.company = Some(process.join(plugin));
        self.means.cancel.telling(move || process.cancel(run))
    }

    /// From now on this is a chain that gives so many results.
    pub(super) fn set_leaving(&mut self, outputs: usize) {
        self.leaving = Some(outputs);
    }

    /// What holds the inputs.
    pub(super) fn sources(&self) -> &'a [Source<dyn SharedSource>] {
        &self.means.inputs
    }

    /// Whether memory for results can still be asked for.
    pub(super) fn may_need(&self) -> bool {
        !self.granted
    }

    pub(super) fn ask(&mut self, ask: &Ask, fds: &[Arc<OwnedFd>]) -> Result<(), Trouble> {
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        Ok(self.lane.ask(ask, &fds)?)
    }

    pub(super) fn left_us(&self) -> u64 {
        left_us(self.means.deadline)
    }

    /// The lane, of which nothing more is to come.
    pub(super) fn into_lane(self) -> Lane {
        self.lane
    }

    /// What it has of the worker to fill, after that was killed.
    pub(super) fn into_segments(self) -> Vec<PoolSegment> {
        self.segments
    }

    /// Whether it ran, and nothing of another plugin beside it at any time.
    pub(super) fn was_alone(&self) -> bool {
        self.company.as_ref().is_some_and(Company::is_alone)
    }

    /// What is to be done, and the descriptors beside that.
    pub(super) fn told(
        &mut self,
        run: u64,
        open_only: bool,
    ) -> Result<(Run, Vec<Arc<OwnedFd>>), Trouble> {
        self.told_of(self.job, &self.means.inputs, run, open_only)
    }

    /// The same of `job`, whose inputs are in `sources`.
    pub(super) fn told_of(
        &self,
        job: &Job,
        sources: &[Source<dyn SharedSource>],
        run: u64,
        open_only: bool,
    ) -> Result<(Run, Vec<Arc<OwnedFd>>), Trouble> {
        let keeper = self.lane.process().keeper();
        let (mut inputs, mut fds) = (Vec::new(), Vec::new());
        for (input, source) in job.inputs.iter().zip(sources) {
            let source = match source {
                Source::Linked => RunSource::Linked,
                Source::Inline(bytes) => RunSource::Inline(ByteBuf::from(&**bytes)),
                Source::Segment(source) => {
                    let number = source.number();
                    let bytes = match self.lane.process().has_input(number) {
                        true => None,
                        false => {
                            let shared = source.share(&keeper)?;
                            fds.push(shared.fd);
                            Some(shared.bytes)
                        }
                    };
                    RunSource::Segment { number, bytes }
                }
            };
            inputs.push(RunInput::new(input, source));
        }
        let told = Run {
            run,
            plugin: job.kernel.plugin.hash,
            kernel: job.kernel.index(),
            inputs,
            parameters: job.parameters.clone(),
            verify: job.verify,
            limits: job.limits,
            deadline_ms: job.deadline_ms,
            left_us: self.left_us(),
            request_id: job.request_id.to_string(),
            ahead: self.segments.iter().map(PoolSegment::number).collect(),
            threads: job.threads,
            inline: job.inline,
            open_only,
        };
        Ok((told, fds))
    }

    /// Has the worker take over a plugin that was compiled before.
    fn load(&mut self, plugin: &Plugin) -> Result<(), Trouble> {
        let kept = plugin.kept.as_ref();
        let artifact = kept
            .and_then(|kept| kept.downcast_ref::<Artifact>())
            .ok_or_else(|| {
                let name = &plugin.description.name;
                Trouble::Own(Cause::Host(format!("plugin `{name}` was not loaded here")))
            })?;
        let load = Load {
            plugin: plugin.hash,
            bytes: artifact.bytes(),
            memory_only: artifact.memory_only(),
            description: plugin.description.clone(),
        };
        let ask = Ask::Load(Box::new(load));
        self.lane.ask(&ask, &[artifact.fd()?.as_fd()])?;
        let grace = self.grace.max(LOAD_GRACE);
        let (cancel, end) = (&self.means.cancel, self.means.deadline + grace);
        match next(
            &mut self.lane,
            cancel,
            end.min(Instant::now() + LOAD_MAX),
            grace,
            0,
        )? {
            Answer::Loaded(loaded) => {
                loaded.map_err(|error| Trouble::Own(Cause::Load(Box::new(error))))?;
                self.lane.process().add_plugin(plugin.hash);
                Ok(())
            }
            answer => Err(senseless(format!("{} for a plugin", answer.kind()))),
        }
    }

    /// The worker's next word, if it comes before nobody waits for the run any more, or a little later.
    pub(super) fn answer(&mut self) -> Result<Answer, Trouble> {
        let (cancel, end) = (&self.means.cancel, self.means.deadline + self.grace);
        let tensors = self.job.inline.map_or(0, |room| room.together);
        next(&mut self.lane, cancel, end, self.grace, tensors)
    }

    /// Results as large as the kernel's last ones were, if they are at hand.
    fn ahead(&self) -> Vec<PoolSegment> {
        let process = self.lane.process();
        let needs = process.needs().lock();
        let Some(bytes) = needs.get(&self.kernel()) else {
            return Vec::new();
        };
        let process = process.number();
        let warm = bytes
            .iter()
            .map(|bytes| self.means.results.warm_for(process, *bytes));
        // All or none: the rest goes back to the pool.
        warm.collect::<Option<_>>().unwrap_or_default()
    }

    /// What has needs of its own.
    fn kernel(&self) -> (PluginHash, usize, bool) {
        let kernel = &self.job.kernel;
        let has_inline = self.job.inline.is_some();
        (kernel.plugin.hash, kernel.index(), has_inline)
    }

    pub(super) fn grant(&mut self, bytes: &[u64]) -> Result<(), Trouble> {
        self.granted = true;
        self.segments.clear();
        // Fewer than there are outputs if some of them come as bytes.
        let outputs = self.leaving;
        let outputs = outputs.unwrap_or_else(|| self.job.kernel.kernel().outputs.len());
        let fits = match self.job.inline {
            None => bytes.len() == outputs,
            Some(_) => (1..=outputs).contains(&bytes.len()),
        };
        if !fits {
            return Err(senseless(format!("it needs {} results", bytes.len())));
        }
        let process = self.lane.process();
        if self.leaving.is_none() {
            let mut needs = process.needs().lock();
            needs.insert(self.kernel(), bytes.to_vec());
        }
        let process = process.number();
        for bytes in bytes {
            match self.means.results.take_for(process, *bytes) {
                Ok(segment) => self.segments.push(segment),
                Err(error) => {
                    self.refused = Some(error);
                    self.segments.clear();
                    return Ok(self.lane.ask(&Ask::Denied, &[])?);
                }
            }
        }
        let fds: Vec<_> = self.segments.iter().map(PoolSegment::new_fd).collect();
        let grants = self.segments.iter().zip(&fds).map(|(segment, fd)| Grant {
            segment: segment.number(),
            bytes: fd.as_ref().map(|_| segment.bytes()),
            once: segment.is_sealable(),
        });
        let granted = Ask::Granted(grants.collect());
        let fds: Vec<_> = fds.iter().flatten().map(AsFd::as_fd).collect();
        Ok(self.lane.ask(&granted, &fds)?)
    }

    /// Takes note of what the worker says of itself after a run, of which the outcome is left.
    pub(super) fn noted(&mut self, ended: Ended) -> Result<Outcome, Trouble> {
        let process = Arc::clone(self.lane.process());
        process.set_totals(ended.totals);
        process.set_counts(ended.counts);
        // Now it has them for certain, whichever lane is asked next.
        let numbers = self.means.inputs.iter().filter_map(|source| match source {
            Source::Segment(source) => Some(source.number()),
            Source::Inline(_) | Source::Linked => None,
        });
        process.add_inputs(numbers);
        for index in ended.gone {
            if let Some(segment) = self.segments.get(index) {
                segment.never_recycle();
            }
        }
        ended.outcome.map_err(|failed| match self.refused.take() {
            Some(refused) => refused.into(),
            None => Trouble::Failed(failed),
        })
    }

    /// Believes what the worker says as far as it fits what it was asked.
    pub(super) fn given(&mut self, ended: Ended, open_only: bool) -> Result<Given, Trouble> {
        match self.noted(ended) {
            // Which one it was, it need not say.
            Err(Trouble::Failed(failed)) => Err(Trouble::Failed(Failed {
                kernel: self.job.kernel.kernel().name.clone(),
                at: 0,
                ..failed
            })),
            Err(trouble) => Err(trouble),
            Ok(Outcome::Specs(specs)) if open_only => {
                let named = specs.iter().map(|(port, spec)| (port.as_str(), spec));
                self.declared(named).map_err(senseless)?;
                Ok(Given::Specs(specs))
            }
            Ok(Outcome::Filled(filled, report)) if !open_only => {
                let named = filled.iter().map(|one| (one.port.as_str(), &one.spec));
                self.declared(named).map_err(senseless)?;
                let report = report.checked(self.job).map_err(senseless)?;
                let outputs = self.outputs(filled)?;
                Ok(Given::Done(Box::new(Done {
                    outputs,
                    report,
                    used: None,
                })))
            }
            Ok(_) => Err(senseless("it has not done what it was asked")),
        }
    }

    /// Whether outputs are those that the kernel declares.
    fn declared<'b>(
        &self,
        outputs: impl ExactSizeIterator<Item = (&'b str, &'b TensorSpec)> + Clone,
    ) -> Result<(), String> {
        let kernel = self.job.kernel.kernel();
        if outputs.len() != kernel.outputs.len() {
            return Err(format!("it has {} results", outputs.len()));
        }
        let misfit = |port: &Port, how: &str| format!("output `{}`: {how}", port.name);
        for (port, (name, spec)) in kernel.outputs.iter().zip(outputs.clone()) {
            if name != port.name {
                return Err(misfit(port, "it has another name"));
            }
            spec.bytes().map_err(|e| misfit(port, &e.to_string()))?;
            port.fits(spec).map_err(|e| misfit(port, &e))?;
        }
        let inputs = self.job.inputs.iter().map(|input| &input.place.spec);
        kernel
            .axes_fit(inputs, outputs.map(|(_, spec)| spec))
            .map_err(|(port, e)| misfit(port, &e))
    }

    pub(super) fn outputs(&mut self, filled: Vec<Filled>) -> Result<Vec<Output>, Trouble> {
        let mut room = self.job.inline;
        let (mut in_segments, mut fits) = (0, true);
        for one in &filled {
            match &one.body {
                FilledIn::Segment { .. } => in_segments += 1,
                FilledIn::Inline(bytes) => {
                    let bytes = bytes.len() as u64;
                    fits &= one.spec.bytes() == Ok(bytes) && InlineRoom::takes(&mut room, bytes);
                }
            }
        }
        if !fits {
            return Err(senseless("it gives other bytes than it was asked for"));
        }
        if in_segments == 0 && !self.granted {
            // It had no use for what was granted ahead.
            self.segments.clear();
        }
        if in_segments != self.segments.len() {
            return Err(senseless("it has results that it has no memory for"));
        }
        // All of it is looked at first: what does not fit leaves the segments with the process that has them mapped.
        let mut layouts = Vec::with_capacity(in_segments);
        let ours = filled.iter().filter_map(|one| match one.body {
            FilledIn::Segment { reserve_bytes } => Some((one, reserve_bytes)),
            FilledIn::Inline(_) => None,
        });
        for ((one, reserve_bytes), segment) in ours.zip(&self.segments) {
            let column = Column {
                name: one.port.clone(),
                spec: one.spec.clone(),
                reserve_bytes,
            };
            let layout = FileLayout::plan(std::slice::from_ref(&column))
                .map_err(|e| senseless(e.to_string()))?;
            if layout.capacity > segment.bytes() {
                return Err(senseless(format!("result `{}` does not fit", column.name)));
            }
            layouts.push(layout);
        }
        let segments = std::mem::take(&mut self.segments);
        // For each that it has mapped anew, lest it keep one that nobody will have.
        let process = self.lane.process();
        let fillers: Vec<_> = segments
            .iter()
            .map(|segment| {
                segment
                    .is_unlent()
                    .then(|| Mapped::new(process, segment.number()))
            })
            .collect();
        let mut segments = segments.into_iter().zip(fillers).zip(layouts);
        filled
            .into_iter()
            .map(|filled| {
                let (port, spec) = (filled.port, filled.spec);
                if let FilledIn::Inline(bytes) = filled.body {
                    let bytes = bytes.into_vec();
                    let body = OutputBody::Inline { spec, bytes };
                    return Ok(Output { port, body });
                }
                let ((mut segment, filler), layout) = segments
                    .next()
                    .ok_or_else(|| senseless("it has more results than segments"))?;
                segment.set_author(process.author());
                if let Some(filler) = filler {
                    segment.lend_to(Box::new(filler))?;
                }
                Ok(Output {
                    port,
                    body: OutputBody::Segment { layout, segment },
                })
            })
            .collect()
    }
}
