//! Prepared kernels that wait in their owner's worker: what is said about them, and what is believed of the answers.
//!
//! ```text
//! Prepared ── the first time in a process: prepare ─▶ bound there under a number, until it is forgotten
//!    ├─ call, on a lane of the runs ─▶ ended; renew: waits
//!    └─ stream, on a lane of its own ─▶ chunk ─▶ piece, … ─▶ ended; renew: waits
//! ```
//! It has a seat in the process for each call, and for a stream from its first chunk to its last. Between them the process
//! may end as any other that is idle, or be lost: the next call prepares the kernel anew in whatever process it gets.

use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use strait_memory::{ResultSource, SharedSource};
use strait_tensor::TensorSpec;

use super::channel::ReceiveError;
use super::crew::Seated;
use super::exchange::{Exchange, Given, Trouble, left_us, next, over, senseless};
use super::messages::{Answer, Ask, Bring, Call, Chunk, Control, Ended, Outcome, Piece};
use super::process::{Lane, Process};
use super::runs::{Runs, can_be_repeated, failed};
use crate::engine::{
    Batch, Batches, Brought, CancelToken, Cause, Done, Failed, InlineRoom, Job, Means, OutputBody,
    Owner, RENEWAL, Ready, Report, Source, Stage,
};

/// What bringing a kernel back may take beyond what the engine itself allows, lest a busy machine cost a process.
const RENEWAL_GRACE: Duration = Duration::from_secs(2);

/// A prepared job, bound in a worker where there is one.
#[derive(Debug)]
pub(super) struct Prepared {
    runs: Arc<Runs>,
    job: Arc<Job>,
    owner: Owner,
    inputs: Vec<Source<dyn SharedSource>>,
    results: ResultSource,
    /// At their largest.
    outputs: Vec<(String, TensorSpec)>,
    waiting_bytes: u64,
    bound: Option<Bound>,
    /// The last run was answered, and what it left is being brought back.
    renewing: Option<Renewing>,
}

/// Where a job is bound, until this is dropped.
#[derive(Debug)]
struct Bound {
    // What a process has open must not outlive it for this.
    process: Weak<Process>,
    /// Its number there.
    prepared: u64,
}

impl Bound {
    fn is_in(&self, process: &Arc<Process>) -> bool {
        self.process.as_ptr() == Arc::as_ptr(process)
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        // One that is gone has forgotten it; nobody waits until it is taken apart.
        let process = self.process.upgrade();
        if let Some(process) = process.filter(|process| !process.is_gone()) {
            process.forget(&Control::ForgetPrepared(self.prepared));
        }
    }
}

/// The lane goes back before the seat.
#[derive(Debug)]
struct Renewing {
    lane: Lane,
    seated: Seated,
}

impl Exchange<'_> {
    /// Has the job made ready under the number `prepared`: its outputs at their largest, and the bytes with which it waits.
    fn prepare(
        &mut self,
        run: u64,
        prepared: u64,
    ) -> Result<(Vec<(String, TensorSpec)>, u64), Trouble> {
        let _telling = self.join(run)?;
        let (told, fds) = self.told(run, true)?;
        self.ask(&Ask::Prepare(prepared, Box::new(told)), &fds)?;
        let outputs = match self.end(true)? {
            Given::Specs(outputs) => outputs,
            Given::Done(_) => return Err(senseless("it has not done what it was asked")),
        };
        match self.answer()? {
            Answer::Waits(bytes) => Ok((outputs, bytes)),
            answer => Err(senseless(format!("{} for what is prepared", answer.kind()))),
        }
    }

    fn call(&mut self, run: u64, prepared: u64, brought: &[Brought]) -> Result<Done, Trouble> {
        let telling = self.join(run)?;
        let call = Call {
            prepared,
            run,
            left_us: self.left_us(),
            brought: Bring::all(brought),
        };
        self.ask(&Ask::Call(Box::new(call)), &[])?;
        let given = self.end(false)?;
        drop(telling);
        match given {
            Given::Done(done) => Ok(*done),
            Given::Specs(_) => Err(senseless("it has not done what it was asked")),
        }
    }

    fn end(&mut self, open_only: bool) -> Result<Given, Trouble> {
        match self.answer()? {
            Answer::Ended(ended) => self.given(*ended, open_only),
            answer => Err(senseless(format!("{} of what is prepared", answer.kind()))),
        }
    }
}

impl Prepared {
    /// Has `job` bound in its owner's worker.
    ///
    /// # Errors
    /// [`Failed`].
    pub(super) fn new(runs: Arc<Runs>, job: Job, means: Means) -> Result<Self, Failed> {
        let mut prepared = Self {
            runs,
            job: Arc::new(job),
            owner: means.owner,
            inputs: Source::filled(&means.inputs, Vec::new()),
            results: means.results.clone(),
            outputs: Vec::new(),
            waiting_bytes: 0,
            bound: None,
            renewing: None,
        };
        let mut was_alone = false;
        let bound = match prepared.begin(&means, false, &mut was_alone) {
            // As with any run. The first call that comes binds it where the others are.
            Err(Trouble::Lost(ReceiveError::Gone)) if can_be_repeated(&means) => {
                prepared.begin(&means, true, &mut was_alone)
            }
            bound => bound,
        };
        let (cancel, deadline) = (&means.cancel, means.deadline);
        bound.map_err(|trouble| failed(&prepared.job, trouble, was_alone, cancel, deadline))?;
        Ok(prepared)
    }

    /// The first time.
    fn begin(&mut self, means: &Means, alone: bool, was_alone: &mut bool) -> Result<(), Trouble> {
        let seated = self.runs.crew().take(means, alone)?;
        let begun = self.bind(seated.process().lane(), means, was_alone);
        self.told_of(&begun, &seated);
        drop(seated);
        if alone {
            // With its process.
            self.bound = None;
        }
        begun.map(drop)
    }

    /// After what was said: whoever is lost is no more.
    fn told_of<R>(&mut self, said: &Result<R, Trouble>, seated: &Seated) {
        if let Err(Trouble::Lost(lost)) = said {
            // What it would have filled is forgotten with its seat.
            seated.process().kill(&lost.to_string());
            self.bound = None;
        }
    }

    fn means(&self, brought: Vec<Brought>, deadline: Instant, cancel: &CancelToken) -> Means {
        Means {
            owner: self.owner,
            inputs: Source::filled(&self.inputs, brought),
            results: self.results.clone(),
            deadline,
            cancel: cancel.clone(),
        }
    }

    /// Binds the job in the process of `lane`, if it is not bound there; its number, and the lane for what follows.
    fn bind(
        &mut self,
        lane: Lane,
        means: &Means,
        was_alone: &mut bool,
    ) -> Result<(u64, Lane), Trouble> {
        *was_alone = false;
        let process = Arc::clone(lane.process());
        match self.bound.take() {
            Some(bound) if bound.is_in(&process) => {
                let prepared = bound.prepared;
                self.bound = Some(bound);
                return Ok((prepared, lane));
            }
            // It was in another one.
            bound => drop(bound),
        }
        // A number of a run is nobody else's.
        let prepared = self.runs.next_number();
        let mut exchange = Exchange::new(lane, &self.job, means, self.runs.grace());
        let bound = exchange.prepare(prepared, prepared);
        *was_alone = exchange.was_alone();
        let (outputs, waiting_bytes) = bound?;
        self.check(&outputs, waiting_bytes)?;
        let lane = exchange.into_lane();
        self.bound = Some(Bound {
            process: Arc::downgrade(&process),
            prepared,
        });
        if self.outputs.is_empty() {
            (self.outputs, self.waiting_bytes) = (outputs, waiting_bytes);
        } else if self.outputs != outputs {
            return Err(Trouble::Failed(self.failed(
                Stage::Open,
                Cause::Contract(
                    "`open` announces other outputs than before for the same inputs and parameters"
                        .to_owned(),
                ),
            )));
        }
        Ok((prepared, lane))
    }

    /// Whether that is what can have been prepared.
    fn check(&self, outputs: &[(String, TensorSpec)], waiting_bytes: u64) -> Result<(), Trouble> {
        let mut room = self.job.inline;
        let bytes = |spec: &TensorSpec| spec.bytes().unwrap_or(u64::MAX);
        if !outputs
            .iter()
            .all(|(_, spec)| InlineRoom::takes(&mut room, bytes(spec)))
        {
            return Err(senseless("it has results that a frame has no room for"));
        }
        // Once as the guest's own memory, once as what is kept of that, and what it took in `bind`.
        let limits = &self.job.limits;
        let most = limits.guest_bytes.saturating_add(limits.window_bytes);
        if waiting_bytes > most.saturating_mul(3) {
            return Err(senseless(format!("it waits with {waiting_bytes} bytes")));
        }
        Ok(())
    }

    fn failed(&self, stage: Stage, cause: Cause) -> Failed {
        Failed::new(&self.job.kernel.kernel().name, stage, cause)
    }

    /// One run in the owner's worker.
    fn called(
        &mut self,
        job: &Job,
        means: &Means,
        brought: &[Brought],
        was_alone: &mut bool,
    ) -> Result<Done, Trouble> {
        *was_alone = false;
        let seated = self.runs.crew().take(means, false)?;
        // What it brings is not told to `bind`.
        let bare = self.means(Vec::new(), means.deadline, &means.cancel);
        let bound = self.bind(seated.process().lane(), &bare, was_alone);
        self.told_of(&bound, &seated);
        let (prepared, lane) = bound?;
        let mut exchange = Exchange::new(lane, job, means, self.runs.grace());
        let done = exchange.call(self.runs.next_number(), prepared, brought);
        *was_alone = exchange.was_alone();
        self.told_of(&done, &seated);
        if !matches!(done, Err(Trouble::Lost(_))) {
            let lane = exchange.into_lane();
            self.renewing = Some(Renewing { lane, seated });
        }
        done
    }

    /// All of a stream, in the owner's worker.
    fn streamed(
        &mut self,
        first: Batch,
        batches: &mut dyn Batches,
        cancel: &CancelToken,
    ) -> Result<Vec<(String, String)>, Failed> {
        let job = Arc::clone(&self.job);
        let means = self.means(Vec::new(), first.deadline, cancel);
        let told =
            |trouble, was_alone, deadline| failed(&job, trouble, was_alone, cancel, deadline);
        let seated = self.runs.crew().take(&means, false);
        let seated = seated.map_err(|trouble| told(trouble, false, means.deadline))?;
        let mut was_alone = false;
        let bound = self.bind(seated.process().lane(), &means, &mut was_alone);
        self.told_of(&bound, &seated);
        let (prepared, _) = bound.map_err(|trouble| told(trouble, was_alone, means.deadline))?;
        let lane = seated.process().stream_lane();
        let lane = lane.map_err(|cause| self.failed(Stage::Run, cause))?;
        let mut stream = Stream {
            lane,
            job: &job,
            outputs: &self.outputs,
            cancel,
            grace: self.runs.grace(),
            run: self.runs.next_number(),
            deadline: means.deadline,
            was_alone: false,
        };
        let ended = stream.whole(prepared, first, batches);
        let Stream {
            lane,
            was_alone,
            deadline,
            ..
        } = stream;
        self.told_of(&ended, &seated);
        if ended.is_ok() {
            self.renewing = Some(Renewing { lane, seated });
        }
        ended.map_err(|trouble| told(trouble, was_alone, deadline))
    }
}

impl Ready for Prepared {
    fn outputs(&self) -> Vec<(String, TensorSpec)> {
        self.outputs.clone()
    }

    fn waiting_bytes(&self) -> u64 {
        self.waiting_bytes
    }

    fn run(
        &mut self,
        brought: Vec<Brought>,
        deadline: Instant,
        cancel: &CancelToken,
    ) -> Result<Done, Failed> {
        // Nobody has asked for it.
        let _ = self.renew();
        let (runs, job) = (Arc::clone(&self.runs), Arc::clone(&self.job));
        let resized = job.resized(&self.inputs, &brought);
        let job = resized.as_ref().unwrap_or(&job);
        let means = self.means(brought.clone(), deadline, cancel);
        let mut was_alone = false;
        let done = runs.counted(
            || match self.called(job, &means, &brought, &mut was_alone) {
                // As with any run: alone, and then it needs not be ready for another one.
                Err(Trouble::Lost(ReceiveError::Gone)) if can_be_repeated(&means) => {
                    match runs.run_alone(job, &means, &mut was_alone)? {
                        Given::Done(done) => Ok(*done),
                        Given::Specs(_) => Err(senseless("it did not run")),
                    }
                }
                done => done,
            },
        );
        let done =
            done.map_err(|trouble| failed(job, trouble, was_alone, &means.cancel, deadline))?;
        let inline = |body: &OutputBody| matches!(body, OutputBody::Inline { .. });
        match done.outputs.iter().all(|output| inline(&output.body)) {
            true => Ok(done),
            false => Err(self.failed(
                Stage::Results,
                Cause::Contract("a result is larger than `open` first announced".to_owned()),
            )),
        }
    }

    fn stream(
        &mut self,
        batches: &mut dyn Batches,
        cancel: &CancelToken,
    ) -> Result<Vec<(String, String)>, Failed> {
        let _ = self.renew();
        // Each batch brings its own deadline, and its turn.
        let first = batches.next();
        let first = first.map_err(|cause| self.failed(Stage::Run, cause))?;
        let runs = Arc::clone(&self.runs);
        runs.counted(|| self.streamed(first, batches, cancel))
    }

    fn renew(&mut self) -> Result<(), Failed> {
        let Some(Renewing { mut lane, seated }) = self.renewing.take() else {
            return Ok(());
        };
        let company = seated.process().join(self.job.kernel.plugin.hash);
        let until = Instant::now() + RENEWAL + self.runs.grace().max(RENEWAL_GRACE);
        let never = CancelToken::default();
        let lost = match next(&mut lane, &never, until, Duration::ZERO, 0) {
            Ok(Answer::Waits(_)) => return Ok(()),
            Ok(answer) => ReceiveError::Bad(format!("{} after a call", answer.kind())),
            Err(Trouble::Lost(lost)) => lost,
            Err(Trouble::Own(_) | Trouble::Failed(_)) => ReceiveError::Gone,
        };
        seated.process().kill(&lost.to_string());
        self.bound = None;
        Err(Failed {
            took_process: company.is_alone(),
            ..self.failed(Stage::Bind, Cause::Lost)
        })
    }
}

impl Drop for Prepared {
    fn drop(&mut self) {
        // Or the lane's next run would hear of it.
        let _ = self.renew();
    }
}

/// A stream that is under way.
struct Stream<'a> {
    lane: Lane,
    job: &'a Job,
    /// At their largest.
    outputs: &'a [(String, TensorSpec)],
    cancel: &'a CancelToken,
    grace: Duration,
    run: u64,
    /// Of the chunk that is under way.
    deadline: Instant,
    /// In the last step, with its process.
    was_alone: bool,
}

impl Stream<'_> {
    /// From the first chunk to the last; what the kernel had to say.
    fn whole(
        &mut self,
        prepared: u64,
        first: Batch,
        batches: &mut dyn Batches,
    ) -> Result<Vec<(String, String)>, Trouble> {
        let stream = Ask::Stream(Call {
            prepared,
            run: self.run,
            left_us: 0,
            brought: Vec::new(),
        });
        self.lane.ask(&stream, &[])?;
        let mut batch = first;
        loop {
            let last = batch.last;
            if let Some(ended) = self.chunk(batch, batches)? {
                // It had no more to say before all was given.
                return self.ended(ended, false);
            }
            if last {
                return match self.heard()? {
                    Answer::Ended(ended) => self.ended(*ended, true),
                    answer => Err(senseless(format!("{} after a stream", answer.kind()))),
                };
            }
            batch = match batches.next() {
                Ok(batch) => batch,
                Err(cause) => return Err(self.stop(cause)),
            };
        }
    }

    /// One chunk, and what comes of it; the stream's end, if that comes before.
    fn chunk(&mut self, batch: Batch, batches: &mut dyn Batches) -> Result<Option<Ended>, Trouble> {
        self.deadline = batch.deadline;
        let chunk = Ask::Chunk(Box::new(Chunk {
            brought: Bring::all(&batch.brought),
            last: batch.last,
            left_us: left_us(self.deadline),
        }));
        drop(batch);
        let mut answer = self.step(&chunk)?;
        loop {
            match answer {
                Answer::Keeps(bytes) => {
                    if let Err(cause) = batches.keeps(bytes) {
                        return Err(self.stop(cause));
                    }
                }
                Answer::Piece(piece) => {
                    let done = piece.done;
                    let outputs = self.believed(*piece)?;
                    match batches.give(outputs, done) {
                        Ok(deadline) => self.deadline = deadline,
                        Err(cause) => return Err(self.stop(cause)),
                    }
                    if done {
                        return Ok(None);
                    }
                }
                Answer::Ended(ended) => return Ok(Some(*ended)),
                answer => return Err(senseless(format!("{} during a stream", answer.kind()))),
            }
            // A guest that gives little at a time is seldom found at it by the clock of its process.
            if let Some(cause) = over(self.job, self.cancel, self.deadline) {
                return Err(self.stop(cause));
            }
            answer = self.step(&Ask::GoOn(left_us(self.deadline)))?;
        }
    }

    /// Has the worker go on; its next word.
    fn step(&mut self, ask: &Ask) -> Result<Answer, Trouble> {
        let process = Arc::clone(self.lane.process());
        self.was_alone = false;
        if process.is_gone() || process.has_ended() {
            // While it waited: that was not this kernel.
            return Err(ReceiveError::Gone.into());
        }
        let company = process.join(self.job.kernel.plugin.hash);
        self.lane.ask(ask, &[])?;
        let heard = self.heard();
        self.was_alone = company.is_alone();
        heard
    }

    fn heard(&mut self) -> Result<Answer, Trouble> {
        let end = self.deadline + self.grace;
        // Whoever always has something to say is late, too.
        if Instant::now() >= end {
            return Err(ReceiveError::Late.into());
        }
        let (process, run) = (Arc::clone(self.lane.process()), self.run);
        // Not while a turn is waited for, of which another one is told.
        let _telling = self.cancel.telling(move || process.cancel(run));
        let bytes = self.outputs.iter().map(|(_, spec)| spec.bytes());
        let bytes = bytes.fold(0_u64, |sum, bytes| sum.saturating_add(bytes.unwrap_or(0)));
        next(&mut self.lane, self.cancel, end, self.grace, bytes)
    }

    /// Ends the stream on this side, as nobody wants more of it.
    fn stop(&mut self, cause: Cause) -> Trouble {
        // It has as much time for that as if it were cancelled now.
        let until = Instant::now() + self.grace.max(RENEWAL_GRACE);
        let stopped = self.lane.ask(&Ask::Stop, &[]).map_err(Trouble::from);
        let never = CancelToken::default();
        let stopped = stopped.and_then(|()| next(&mut self.lane, &never, until, Duration::ZERO, 0));
        match stopped {
            Ok(Answer::Ended(ended)) => self.note(&ended),
            Ok(answer) => {
                let why = format!("{} for the end of a stream", answer.kind());
                self.lane.process().kill(&why);
            }
            Err(Trouble::Lost(lost)) => self.lane.process().kill(&lost.to_string()),
            Err(Trouble::Own(_) | Trouble::Failed(_)) => {}
        }
        Trouble::Own(cause)
    }

    fn note(&self, ended: &Ended) {
        let process = self.lane.process();
        process.set_totals(ended.totals);
        process.set_counts(ended.counts);
    }

    /// What the kernel had to say, if all is given that it had to give.
    fn ended(&self, ended: Ended, all_given: bool) -> Result<Vec<(String, String)>, Trouble> {
        self.note(&ended);
        match ended.outcome {
            Err(failed) => Err(Trouble::Failed(Failed {
                // Which one it was, it need not say.
                kernel: self.job.kernel.kernel().name.clone(),
                ..failed
            })),
            Ok(Outcome::Streamed(notes)) if all_given => {
                let report = Report {
                    notes,
                    ..Report::default()
                };
                Ok(report.checked(self.job).map_err(senseless)?.notes)
            }
            Ok(_) => Err(senseless("it has not done what it was asked")),
        }
    }

    /// Rows of the outputs, if they are such.
    fn believed(&self, piece: Piece) -> Result<Vec<(TensorSpec, Vec<u8>)>, Trouble> {
        self.lane.process().set_totals(piece.totals);
        let is_part = |(spec, bytes): (&TensorSpec, &[u8]), whole: &TensorSpec| {
            let (rows, most) = (spec.shape.first(), whole.shape.first());
            spec.dtype == whole.dtype
                && spec.shape.len() == whole.shape.len()
                && spec.shape.get(1..) == whole.shape.get(1..)
                && rows <= most
                && spec.bytes() == Ok(bytes.len() as u64)
        };
        let outputs = piece.outputs;
        let fits = outputs.len() == self.outputs.len()
            && outputs
                .iter()
                .zip(self.outputs)
                .all(|((spec, bytes), (_, whole))| is_part((spec, bytes), whole));
        if !fits {
            return Err(senseless("it gives other rows than it announced"));
        }
        let outputs = outputs.into_iter();
        Ok(outputs
            .map(|(spec, bytes)| (spec, bytes.into_vec()))
            .collect())
    }
}
